"""Posteriors in closed form against NumPy restatements of their simulators, quadrature and Monte Carlo."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from iresnet_jax.data import simulators

NUM_PAIRS = 20_000
ATOL_ENTROPY = 2e-4  # stored to 1e-4
ATOL_F64 = 1e-9  # same maths by another route
ATOL_MASS = 4e-3  # of a random point in every cell along the edges of the crescents, relative to the share that is left
ATOL_MOMENT = 3e-4  # of the same points
CELLS = 1000  # of each side of the box: five across the noise of the crescent
P_VALUE = 1e-3  # fixed keys, one test a simulator: not a lottery

every_simulator = pytest.mark.parametrize("name", simulators.SIMULATORS)


@functools.cache
def pairs(name):
    """Pairs of a simulator with their posterior log-density."""
    simulator = simulators.SIMULATORS[name]
    theta, x = jax.jit(simulator.sample, static_argnums=1)(jax.random.key(7), NUM_PAIRS)
    return np.asarray(theta), np.asarray(x), np.asarray(jax.jit(simulator.log_prob)(theta, x), np.float64)


def posterior_samples(name, x, num, seed=3):
    sample = jax.jit(simulators.SIMULATORS[name].sample_given, static_argnums=2)
    return np.asarray(sample(jax.random.key(seed), jnp.asarray(x, jnp.float32), num), np.float64)


# Oracles: the benchmark's definitions, restated in NumPy -------------------------------------------------------------------


def rotated(theta):
    """The shift of the crescent by the parameters, as the benchmark writes it."""
    first, second = theta[..., 0], theta[..., 1]
    return np.stack([-np.abs(first + second) / math.sqrt(2), (-first + second) / math.sqrt(2)], -1)


def simulate_two_moons(rng, theta):
    angle, radius = rng.uniform(-np.pi / 2, np.pi / 2, len(theta)), rng.normal(0.1, 0.01, len(theta))
    return np.stack([radius * np.cos(angle) + 0.25, radius * np.sin(angle)], -1) + rotated(theta)


def two_moons_likelihood(theta, x):
    """``p(x | theta)``: the density of an angle and a radius over the area of polar coordinates."""
    p = x - rotated(theta) - np.array([0.25, 0])
    radius = np.linalg.norm(p, axis=-1)
    return np.where(p[..., 0] > 0, stats.norm.pdf(radius, 0.1, 0.01) / (np.pi * radius), 0)


@functools.cache
def box_grid():
    """A random point in every cell of the box: the edges of the crescents lie along the diagonals of the cells."""
    corner = np.stack(np.meshgrid(np.arange(CELLS), np.arange(CELLS), indexing="ij"), -1).reshape(-1, 2)
    return (corner + np.random.default_rng(5).random(corner.shape)) / CELLS * 2 - 1


# Observations whose crescents lie within the box of the prior, and observations that the box cuts.
PLACES = {"middle": [-0.3, 0.2], "touching": [0.3, 0.0], "corner": [-1.05, 0.05], "side": [-0.4, 0.7], "rim": [0.2, 1.38]}


@functools.cache
def of_cells(place):
    """Density and likelihood at a point of every cell of the box, the density only where the likelihood is not tiny."""
    x, grid = np.array(PLACES[place]), box_grid()
    likelihood = two_moons_likelihood(grid, x)
    near = likelihood > 1e-9 * likelihood.max()
    with jax.enable_x64(True):
        theta = jnp.asarray(grid[near])
        log_prob = jax.jit(simulators.SIMULATORS["sbi_two_moons"].log_prob)(
            theta, jnp.broadcast_to(jnp.asarray(x), theta.shape)
        )
    density = np.zeros(len(grid))
    density[near] = np.exp(log_prob)
    return density, likelihood


# Densities ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", PLACES)
def test_two_moons_density_is_normalised_and_proportional_to_the_likelihood(place):
    density, likelihood = of_cells(place)
    assert density.sum() * (2 / CELLS) ** 2 == pytest.approx(1, abs=ATOL_MASS)
    evidence = likelihood.sum() * (2 / CELLS) ** 2
    np.testing.assert_allclose(density * evidence, likelihood, atol=2e-3 * likelihood.max())


def test_two_moons_is_impossible_outside_of_the_box_and_of_the_crescent():
    simulator = simulators.SIMULATORS["sbi_two_moons"]
    theta = jnp.asarray([[1.001, 0.0], [0.0, -1.5], [0.4, 0.4]])
    x = jnp.asarray([[-0.35, 0.7], [-0.8, 1.0], [-0.6, 0.0]])
    assert np.all(np.isneginf(jax.jit(simulator.log_prob)(theta, x)))
    for impossible in ([5.0, 0.0], [-5.0, 0.0], [0.0, 5.0], [-1.0, 1.0]):
        assert np.all(np.isnan(posterior_samples("sbi_two_moons", impossible, 3)))


def test_linear_gaussian_density_is_bayes_rule(x64):
    theta, x, _ = (values[:50].astype(np.float64) for values in pairs("linear_gaussian"))
    found = simulators.SIMULATORS["linear_gaussian"].log_prob(jnp.asarray(theta), jnp.asarray(x))
    deviation = math.sqrt(0.1)
    joint = stats.norm.logpdf(theta, 0, deviation).sum(-1) + stats.norm.logpdf(x, theta, deviation).sum(-1)
    np.testing.assert_allclose(found, joint - stats.norm.logpdf(x, 0, math.sqrt(0.2)).sum(-1), rtol=0, atol=ATOL_F64)


# Entropies ----------------------------------------------------------------------------------------------------------------


@every_simulator
def test_pairs_have_the_entropy(name):
    information = -pairs(name)[2]
    standard_error = information.std() / np.sqrt(NUM_PAIRS)
    assert standard_error < 0.02
    assert abs(information.mean() - simulators.SIMULATORS[name].entropy) <= 4 * standard_error + ATOL_ENTROPY


def test_two_moons_entropy_is_an_integral_over_the_observations(x64):
    """``E log share = int (share / 2) log share dx``, as ``share / 2`` is the density of an observation."""
    low, high, cells = np.array([-1.42, -1.62]), np.array([0.5, 1.62]), 200
    middle = (np.arange(cells)[:, None] + 0.5) / cells * (high - low) + low
    grid = np.stack(np.meshgrid(*middle.T, indexing="ij"), -1).reshape(-1, 2)
    share_of = jax.jit(lambda x: jax.lax.map(simulators._share_in_box, x, batch_size=1024))
    share = np.asarray(share_of(jnp.asarray(grid)))
    cell = np.prod((high - low) / cells)
    assert share.sum() / 2 * cell == pytest.approx(1, abs=1e-4)
    log_share = np.sum(share * np.log(np.maximum(share, 1e-300))) / 2 * cell
    radius = 0.1 + 0.01 * np.linspace(-8, 8, 4001)
    weight = stats.norm.pdf(radius, 0.1, 0.01)
    of_crescent = stats.norm(0.1, 0.01).entropy() + np.sum(weight * np.log(np.pi * radius)) / weight.sum()
    entropy = of_crescent + math.log(2) + log_share
    assert entropy == pytest.approx(simulators.SIMULATORS["sbi_two_moons"].entropy, abs=ATOL_ENTROPY)


# Samplers -----------------------------------------------------------------------------------------------------------------


def test_two_moons_observations_follow_the_benchmarks_simulator():
    theta, x, _ = pairs("sbi_two_moons")
    theirs = simulate_two_moons(np.random.default_rng(0), theta)
    for ours, other in ((x[:, 0], theirs[:, 0]), (x[:, 1], theirs[:, 1]), *((x - theirs).T[:, None] * [[1], [-1]])):
        assert stats.ks_2samp(ours, other).pvalue > P_VALUE
    for parameter in theta.T:
        assert stats.kstest(parameter, "uniform", (-1, 2)).pvalue > P_VALUE


@pytest.mark.parametrize("place", ["middle", "corner", "side"])
def test_two_moons_posterior_samples_have_the_moments_of_the_density(place):
    drawn = posterior_samples("sbi_two_moons", PLACES[place], NUM_PAIRS)
    assert np.abs(drawn).max() <= 1
    mass = of_cells(place)[0]
    mass, grid = mass / mass.sum(), box_grid()

    def features(theta):
        along, across = theta[:, 0] + theta[:, 1], theta[:, 1] - theta[:, 0]
        return np.stack([along, np.abs(along), across, across**2, along**2, np.abs(along) * across])

    def assert_moments_agree(drawn):
        """Of shape, place and side, to 5 standard errors, which see a shift by a tenth of the noise."""
        found, expected = features(drawn), features(grid) @ mass
        assert np.all(np.abs(found.mean(1) - expected) <= 5 * found.std(1) / math.sqrt(NUM_PAIRS) + ATOL_MOMENT)

    assert_moments_agree(drawn)
    one_side = np.abs(drawn.sum(axis=1, keepdims=True)) / 2 + drawn - drawn.mean(axis=1, keepdims=True)
    for wrong in (drawn + np.array([0.003, -0.003]), one_side):
        with pytest.raises(AssertionError):
            assert_moments_agree(wrong)


def test_linear_gaussian_posterior_samples_have_its_moments():
    x = np.linspace(-1, 1, 10)
    drawn = posterior_samples("linear_gaussian", x, NUM_PAIRS)
    np.testing.assert_allclose(drawn.mean(axis=0), x / 2, atol=5 * math.sqrt(0.05 / NUM_PAIRS))
    np.testing.assert_allclose(np.cov(drawn.T), 0.05 * np.eye(10), atol=5 * 0.05 * math.sqrt(2 / NUM_PAIRS))


@every_simulator
def test_pairs_and_posterior_samples_are_float32_whatever_the_default_precision(name, x64):
    simulator = simulators.SIMULATORS[name]
    theta, x = jax.eval_shape(lambda key: simulator.sample(key, 5), jax.random.key(0))
    assert theta == jax.ShapeDtypeStruct((5, simulator.num_parameters), jnp.float32)
    assert x == jax.ShapeDtypeStruct((5, simulator.num_observed), jnp.float32)
    for dtype in (jnp.float32, jnp.float64):
        given = jax.ShapeDtypeStruct((simulator.num_observed,), dtype)
        assert jax.eval_shape(lambda key, x: simulator.sample_given(key, x, 5), jax.random.key(0), given) == theta
        shapes = (jax.ShapeDtypeStruct(values.shape, dtype) for values in (theta, x))
        assert jax.eval_shape(simulator.log_prob, *shapes) == jax.ShapeDtypeStruct((5,), dtype)
