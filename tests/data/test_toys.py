"""Toy densities against NumPy restatements of their definitions, and samples against densities."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from sklearn import datasets

from iresnet_jax.data import toys

ATOL_F64 = 1e-9  # same density by another quadrature; its nodes have 1e-12 to spare
RTOL_F32 = 1e-5  # rounding of distances and exponents in float32, relative to max(1, |log p|)
ATOL_MASS = 1e-6  # the grid resolves the narrowest noise (0.08) to 1e-7; float32 sums and 5-sigma tails remain
ATOL_ENTROPY = 2e-4  # stored to 1e-4, and the grid's own error is below that
P_VALUE = 1e-3  # fixed keys, one test a toy: not a lottery
NUM_SAMPLES = 20_000
NUM_COMPARED = 60  # samples at which densities are compared

every_toy = pytest.mark.parametrize("name", toys.TOYS)


# Oracles: the customary generators restated in NumPy, one uniform parameter u and all components at a time -----------------


def panels(num_panels=400, order=8):
    """Composite Gauss-Legendre rule for a mean over u in [0, 1], in t with u = t^2: smooth for sqrt(u), too."""
    node, weight = np.polynomial.legendre.leggauss(order)
    t = ((np.arange(num_panels)[:, None] + (node + 1) / 2) / num_panels).ravel()
    return t**2, 2 * t * np.tile(weight / 2 / num_panels, num_panels)


def circle(u, radius, turn=2 * np.pi):
    return radius * np.stack([np.cos(turn * u), np.sin(turn * u)], -1)


def gaussian(sigma):
    return lambda offset: stats.norm.logpdf(offset, scale=sigma).sum(-1)


def roll(u):
    t = 1.5 * np.pi * (1 + 2 * u)
    return np.stack([t * np.cos(t), t * np.sin(t)], -1) / 5


def spiral(u):
    t = 3 * np.pi * np.sqrt(u)
    return t[:, None] / 3 * np.stack([-np.cos(t), np.sin(t)], -1)


def jittered(low):
    """Kernel of an arm: uniform on [low, low + 1/6], convolved with a Gaussian of 0.1, on both axes."""

    def log_density(offset):
        mass = stats.norm.cdf((offset - low) / 0.1) - stats.norm.cdf((offset - low - 1 / 6) / 0.1)
        with np.errstate(divide="ignore"):
            return np.log(6 * mass).sum(-1)

    return log_density


CURVES = {  # curves or points with equal shares, each with its kernel
    "8gaussians": [(lambda u, k=k: circle(np.full_like(u, k / 8), 4 / 1.414), gaussian(0.5 / 1.414)) for k in range(8)],
    "moons": [
        (lambda u: circle(u, 2, np.pi) + np.array([-1, -0.2]), gaussian(0.2)),
        (lambda u: 2 * (np.array([1, 0.5]) - circle(u, 1, np.pi)) + np.array([-1, -0.2]), gaussian(0.2)),
    ],
    "circles": [(lambda u, r=r: circle(u, r), gaussian(0.24)) for r in (3, 1.5)],
    "rings": [(lambda u, r=r: circle(u, r), gaussian(0.08)) for r in (3, 2.25, 1.5, 0.75)],
    "2spirals": [(spiral, jittered(0.0)), (lambda u: -spiral(u), jittered(-1 / 6))],
    "swissroll": [(roll, gaussian(0.2))],
}


def oracle_log_prob(name, x):
    u, weight = panels()
    density = np.zeros(len(x))
    for curve, kernel in CURVES[name]:
        density += np.exp(kernel(x[:, None] - curve(u)[None])) @ weight / len(CURVES[name])
    return np.log(density)


def checkerboard(n):
    rng = np.random.default_rng(0)
    first = rng.random(n) * 4 - 2
    second = rng.random(n) - 2 * rng.integers(0, 2, n) + np.floor(first) % 2
    return 2 * np.stack([first, second], -1)


def pinwheel(n):
    rng = np.random.default_rng(0)
    features = rng.normal(size=(n, 2)) * [0.3, 0.1] + [1, 0]
    angle = 2 * np.pi / 5 * rng.integers(0, 5, n) + 0.25 * np.exp(features[:, 0])
    turned = 2 * (features @ [1, 1j]) * np.exp(-1j * angle)
    return np.stack([turned.real, turned.imag], -1)


GENERATORS = {
    "checkerboard": checkerboard,
    "pinwheel": pinwheel,
    "moons": lambda n: datasets.make_moons(n, noise=0.1, random_state=0)[0] * 2 + np.array([-1, -0.2]),
    "circles": lambda n: datasets.make_circles(n, factor=0.5, noise=0.08, random_state=0)[0] * 3,
    "swissroll": lambda n: datasets.make_swiss_roll(n, noise=1.0, random_state=0)[0][:, [0, 2]] / 5,
}


# Every toy is sampled and evaluated once, in float32, for all the tests that look at it -------------------------------------

HALF_WIDTH, CELL, CELLS_PER_BIN = 5.0, 1 / 12, 6  # a grid that holds all the mass of all toys
OPTIMISED = {name: {"xla_backend_optimization_level": 2} for name in ("2spirals", "pinwheel")}  # compiling is quick here
FAR = np.array([[30.0, -40.0], [-1e3, 2.0]])


class Evaluated(NamedTuple):
    x: np.ndarray  # samples
    log_prob: np.ndarray  # log-density at the first NUM_COMPARED of them
    cells: np.ndarray  # log-density in the middle of every cell of the grid
    far: np.ndarray  # log-density at FAR


@functools.cache
def evaluate(name):
    with jax.enable_x64(False):
        x = jax.jit(toys.TOYS[name].sample, static_argnums=1)(jax.random.key(7), NUM_SAMPLES)
        middle = np.arange(-HALF_WIDTH + CELL / 2, HALF_WIDTH, CELL)
        grid = np.stack(np.meshgrid(middle, middle, indexing="ij"), -1).reshape(-1, 2)
        points = jnp.concatenate([x[:NUM_COMPARED], jnp.asarray(FAR, jnp.float32), jnp.asarray(grid, jnp.float32)])
        log_prob = np.asarray(jax.jit(toys.TOYS[name].log_prob, compiler_options=OPTIMISED.get(name))(points), np.float64)
    at_x, far, cells = np.split(log_prob, [NUM_COMPARED, NUM_COMPARED + len(FAR)])
    return Evaluated(np.asarray(x), at_x, cells.reshape(len(middle), len(middle)), far)


def assert_samples_follow(name, x):
    """Chi-square test of a histogram with bins of 0.5 against the integrated density."""
    bins = int(2 * HALF_WIDTH / CELL) // CELLS_PER_BIN
    probability = np.exp(evaluate(name).cells).reshape(bins, CELLS_PER_BIN, bins, CELLS_PER_BIN).sum((1, 3)) * CELL**2
    edges = np.linspace(-HALF_WIDTH, HALF_WIDTH, bins + 1)
    observed = np.histogram2d(x[:, 0], x[:, 1], [edges, edges])[0].ravel()
    expected = len(x) * probability.ravel()
    rare = expected < 10  # together in one bin, with what is off the grid
    observed = np.append(observed[~rare], len(x) - observed[~rare].sum())
    expected = np.append(expected[~rare], len(x) - expected[~rare].sum())
    if expected[-1] < 1:  # as on the checkerboard
        assert observed[-1] == 0
        observed, expected = observed[:-1], expected[:-1]
    statistic = np.sum((observed - expected) ** 2 / expected)
    assert stats.chi2.sf(statistic, len(expected) - 1) > P_VALUE


# Densities ----------------------------------------------------------------------------------------------------------------


@every_toy
def test_density_integrates_to_one_and_has_the_entropy(name):
    log_prob = evaluate(name).cells
    inside = log_prob[np.isfinite(log_prob)]
    assert np.exp(inside).sum() * CELL**2 == pytest.approx(1, abs=ATOL_MASS)
    assert -(np.exp(inside) * inside).sum() * CELL**2 == pytest.approx(toys.TOYS[name].entropy, abs=ATOL_ENTROPY)


@pytest.mark.parametrize("name", CURVES)
def test_density_equals_a_denser_quadrature(name, x64):
    x = evaluate(name).x[:NUM_COMPARED].astype(np.float64)
    expected = oracle_log_prob(name, x)
    np.testing.assert_array_less(np.abs(evaluate(name).log_prob - expected), RTOL_F32 * np.maximum(1, np.abs(expected)))
    x = np.concatenate([x, x + np.array([0.3, -0.2])])  # on the curves and beside them
    log_prob = jax.jit(toys.TOYS[name].log_prob)(jnp.asarray(x))
    np.testing.assert_allclose(log_prob, oracle_log_prob(name, x), rtol=0, atol=ATOL_F64)


def wheel_term(a, b):
    """Points of the pinwheel's first arm, what (a, b) alone contributes to the log-density there, and the volume change."""

    def wheel(point):
        a, b = point
        angle = 0.25 * jnp.exp(a)
        return 2 * jnp.stack([a * jnp.cos(angle) + b * jnp.sin(angle), -a * jnp.sin(angle) + b * jnp.cos(angle)])

    points = jnp.stack([x.ravel() for x in jnp.meshgrid(jnp.asarray(a), jnp.asarray(b))], -1)
    x, volume = jax.jit(lambda points: (jax.vmap(wheel)(points), jnp.abs(jnp.linalg.det(jax.vmap(jax.jacfwd(wheel))(points)))))(
        points
    )
    one_term = stats.norm.logpdf(points, [1, 0], [0.3, 0.1]).sum(-1) - np.log(5 * volume)
    return x, one_term, volume


def test_pinwheel_density_follows_from_the_jacobian_of_its_map(x64):
    log_prob = jax.jit(toys.TOYS["pinwheel"].log_prob)
    x, only_term, _ = wheel_term(np.linspace(1.2, 1.9, 8), np.linspace(-0.3, 0.3, 7))  # where the arms lie far apart
    np.testing.assert_allclose(log_prob(x), only_term, rtol=0, atol=ATOL_F64)
    x, one_term, volume = wheel_term(np.linspace(2.1, 2.8, 8), np.linspace(-1.5, 0.3, 7))  # on both sides of the fold ...
    excess = (log_prob(x) - one_term)[volume > 0.6]  # ... but not on it, where a pair of roots shares a cell
    assert np.all(excess > -ATOL_F64)
    assert np.sum(excess > 1) > 10  # several points of the plane (a, b) do meet here


@every_toy
def test_samples_are_float32_and_densities_have_the_dtype_of_the_points(name, x64):
    drawn = jax.eval_shape(lambda key: toys.TOYS[name].sample(key, 3), jax.random.key(0))
    assert drawn == jax.ShapeDtypeStruct((3, 2), jnp.float32)
    for dtype in (jnp.float32, jnp.float64):
        points = jax.ShapeDtypeStruct((3, 2), dtype)
        assert jax.eval_shape(toys.TOYS[name].log_prob, points) == jax.ShapeDtypeStruct((3,), dtype)


@every_toy
def test_density_far_away_is_tiny_but_no_nan(name):
    far = evaluate(name).far
    assert np.all(far < -500)
    assert np.all(np.isneginf(far) if name == "checkerboard" else np.isfinite(far))


# Samplers -----------------------------------------------------------------------------------------------------------------


@every_toy
def test_samples_follow_the_density(name):
    assert_samples_follow(name, evaluate(name).x)


@pytest.mark.parametrize("name", GENERATORS)
def test_customary_generator_follows_the_density(name):
    assert_samples_follow(name, GENERATORS[name](NUM_SAMPLES))


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("moons", lambda x: x + 0.03),
        ("pinwheel", lambda x: x[:, ::-1]),
        ("8gaussians", lambda x: x * 1.414 / math.sqrt(2) * 1.01),
    ],
)
def test_mistakes_that_look_right_in_a_scatter_plot_are_rejected(name, wrong):
    with pytest.raises(AssertionError):
        assert_samples_follow(name, wrong(evaluate(name).x))


def test_points_are_independent():
    """Equal counts a component, as in the customary generators, would have no variance between draws."""
    keys = jax.random.split(jax.random.key(3), 200)
    x = np.asarray(jax.jit(jax.vmap(lambda key: toys.TOYS["8gaussians"].sample(key, 80)))(keys))
    octant = np.round(np.arctan2(x[..., 1], x[..., 0]) / (2 * np.pi / 8)) % 8
    counts = np.sum(octant == 0, axis=1)
    binomial_variance = 80 * (1 / 8) * (7 / 8)
    assert abs(counts.var(ddof=1) / binomial_variance - 1) < 5 * np.sqrt(2 / 199)
