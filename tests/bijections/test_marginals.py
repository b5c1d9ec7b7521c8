"""Lines and normal scores of columns: masses, values that come back, samples, what is unseen."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from iresnet_jax.bijections.marginals import Marginals
from iresnet_jax.data.tables import choose, describe, fit_marginals
from iresnet_jax.models.saved import _of_cells as saved_cells

SINGLE = 1e-5  # float32
# A regular grid, a continuous entry, numbers that end at 0 and 3, and another grid.
LINES = Marginals.lines(
    [1, 0, 1, 0.05], least=[-np.inf, -np.inf, 0, -np.inf], most=[np.inf, np.inf, 3, np.inf]
)
# As models were saved before: a regular grid, a continuous entry, values off any grid, a continuous
# entry with two atoms, and a grid with one.
SAVED = saved_cells(
    {
        "knots": [[20], [0], [0, 1, 4], [0], [0]],
        "gaps": [[1], [0], [1, 3, 1], [0], [0.05]],
        "atoms": [[], [], [], [0, 1], [0.1]],
        "widths": [[], [], [], [2, 0.5], [3]],
    }
)
SEEN = np.array(
    [[25, -0.3, 4, 0, 0.1], [17, 0.7, 0, 1, 0.05], [20, 9, 1, 0.5, -3.0], [21, 0, 7, -2.5, 0.15]],
    np.float32,
)


def test_values_of_saved_models_are_spread_over_their_cells_and_come_back():
    x, bijection = np.repeat(SEEN, 500, axis=0), SAVED
    u, log_ratio, _ = jax.jit(bijection.forward_and_logdet)(x, jax.random.key(0))
    places = jax.tree.map(np.asarray, jax.jit(SAVED.places)(x))
    width = np.where(places.has_mass, places.high - places.low, 0)
    start = np.where(places.has_mass, places.low, places.score)
    noise = ((np.asarray(u, np.float64) - start) / np.where(width > 0, width, 1)).reshape(4, 500, 5)
    np.testing.assert_allclose(width[0], [1, 0, 2, 2, 3.05], rtol=SINGLE)
    # half-way, and the gaps go on
    np.testing.assert_allclose(start[::500, 2], [2.5, -0.5, 0.5, 6.5])
    # what is above an atom moves up
    np.testing.assert_allclose(start[::500, 3], [0, 3, 2.5, -2.5])
    for row, column in np.argwhere(width[::500] > 0):
        assert stats.kstest(noise[row, :, column], "uniform").pvalue > 1e-3
    assert np.all(noise.transpose(0, 2, 1)[width[::500] == 0] == 0)
    # An atom of a continuous entry and a whole number have a mass, and an atom of another grid a
    # mass by the spacing.
    expected = [2 * np.log(2) + np.log(3.05 / 0.05), np.log(0.5), np.log(2), 0]
    np.testing.assert_allclose(np.asarray(log_ratio)[::500], expected, rtol=SINGLE, atol=SINGLE)
    back, of_inverse, _, info = jax.jit(bijection.inverse_and_logdet)(u, jax.random.key(0))
    np.testing.assert_allclose(back, x, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(np.asarray(back)[:, 3], x[:, 3])
    np.testing.assert_allclose(of_inverse, -log_ratio, rtol=SINGLE, atol=SINGLE)
    assert np.all(info.error_bound == 0)


def test_noise_that_is_rounded_stays_in_its_cell():
    x = jnp.repeat(jnp.array([2024.0, 1e5, 4e6, 2**23 - 1.0]), 50_000)[:, None]
    bijection = Marginals.lines([1])
    u, _, _ = jax.jit(bijection.forward_and_logdet)(x, jax.random.key(0))
    np.testing.assert_array_equal(jax.jit(bijection.inverse)(u)[0], x)


def test_other_numbers_count_as_the_value_whose_cell_they_lie_in():
    x = jnp.array([[20.4, 0.123, 2.4, 1e-3, 0.07], [-3.6, 5.0, 2.6, -1e-3, 9.01]], jnp.float32)
    back = jax.jit(lambda x: SAVED.inverse(SAVED.forward(x))[0])(x)
    np.testing.assert_allclose(
        back, [[20, 0.123, 1, 1e-3, 0.05], [-4, 5.0, 4, -1e-3, 9.0]], rtol=1e-4, atol=1e-6
    )


def test_the_outermost_numbers_of_a_line_own_half_lines():
    x = np.repeat(np.float32([[0, 0.5, 0, 0.1], [3, 2, 3, -0.2], [9, -1, 2, 0]]), 2000, axis=0)
    u, log_factor, _ = jax.jit(LINES.forward_and_logdet)(x, jax.random.key(0))
    u, log_factor = np.asarray(u, np.float64).reshape(3, 2000, 4), np.reshape(log_factor, (3, 2000))
    assert stats.kstest(0.5 - u[0, :, 2], "expon").pvalue > 1e-3
    assert stats.kstest(u[1, :, 2] - 2.5, "expon").pvalue > 1e-3
    assert stats.kstest(u[2, :, 2] - 1.5, "uniform").pvalue > 1e-3
    # minus the log-density of noise
    grid = np.log(0.05) - np.log(0.05)
    np.testing.assert_allclose(log_factor[0], grid + 0.5 - u[0, :, 2], atol=1e-5)
    np.testing.assert_allclose(log_factor[1], grid + u[1, :, 2] - 2.5, atol=1e-5)
    np.testing.assert_allclose(log_factor[2], grid, atol=1e-5)
    back = jax.jit(LINES.inverse)(jnp.asarray(u.reshape(-1, 4), jnp.float32))[0]
    np.testing.assert_allclose(back, x, rtol=1e-6, atol=1e-6)


def test_a_density_bounds_the_number_of_its_values():
    """Uniform on [0, 3) in cells of 1/2: each value has probability 1/6, which is attained."""
    forward_and_logdet = jax.jit(Marginals.lines([0.5], origin=[0.25]).forward_and_logdet)
    u, log_ratio, _ = forward_and_logdet(jnp.asarray([[0.25], [2.75]]), jax.random.key(0))
    inside = (u[:, 0] >= 0) & (u[:, 0] < 3)
    np.testing.assert_allclose(
        jnp.where(inside, -np.log(3), -np.inf) + log_ratio, np.log(1 / 6 / 0.5), rtol=1e-6
    )


def columns():
    """Columns of 1500 rows by name; a copy depends on the flag."""
    rng, n = np.random.default_rng(0), 1500
    flag = rng.random(n) < 0.3
    return {
        "flag": flag,
        "copy": flag ^ (rng.random(n) < 0.05),
        "codes": rng.choice([1, 2, 5], n, p=[0.5, 0.3, 0.2]),
        "category": rng.choice(3, n),  # of four
        "constant": np.full(n, 7),
        "counts": rng.poisson(3, n),
        "heaps": np.where(
            rng.random(n) < 0.5, 10 * rng.integers(0, 10, n), rng.integers(0, 100, n)
        ),
        "tenths": rng.normal(0, 1.5, n).round(1),
        "roots": np.sqrt(rng.integers(1, 40, n)),
        "normal": rng.normal(size=n),
        "amount": np.where(rng.random(n) < 0.4, 0, rng.exponential(size=n)),
        "share": rng.beta(2, 3, n),
        "heavy": rng.standard_cauchy(n),
    }


NAMES = list(columns())
X = np.stack(list(columns().values()), axis=1).astype(np.float32)
LISTED = NAMES[: NAMES.index("normal")]
LEVELS, EXISTING = NAMES[:5], {"flag": 2, "copy": 2, "category": 4}
N, NUM_SAMPLES = len(X), 40_000


@pytest.fixture(scope="module")
def scores():
    """The fitted scores, and compiled functions of them."""
    levels = [EXISTING.get(name, 0) for name in NAMES]
    kinds = describe({"train": X}, NAMES, levels=levels, bounds={"share": (0, 1)})
    found = fit_marginals(X, kinds, choose(X, kinds))
    return found, jax.jit(Marginals.placed), jax.jit(Marginals.from_line)


def support(name):
    """Values of a column, and what each stands for; for a copy both of the flag's levels."""
    column = np.unique(X[:, NAMES.index(name)]).astype(np.float64)
    if name in ("flag", "copy"):
        return np.array([[0, 0, 1, 1], [0, 1, 0, 1]][name == "copy"]), np.full(4, 0.5)
    if name == "category":
        return np.arange(4.0), np.ones(4)
    if name in LEVELS:
        return column, np.ones(len(column))
    if name in ("counts", "heaps"):
        return np.arange(2000.0), np.ones(2000)
    if name == "tenths":
        return np.arange(-500, 501) / 10, np.full(1001, 0.1)
    if name == "roots":
        edges = np.convolve(column, [0.5, 0.5], "valid")
        outer = column[[0, -1]] + np.array([-1, 1]) * np.diff(column)[[0, -1]] / 2
        return column, np.diff([outer[0], *edges, outer[1]])
    t = np.linspace(-15, 15, 10_001)
    edges = {"share": 1 / (1 + np.exp(-t)), "amount": np.exp(t)}.get(name, np.sinh(t))
    x, sizes = (edges[1:] + edges[:-1]) / 2, np.diff(edges)
    return (np.append(x, 0), np.append(sizes, 1)) if name == "amount" else (x, sizes)


def test_masses_of_scores_add_up_to_1_are_the_shares_of_the_data_and_those_of_samples(scores):
    marginals, placed, from_line = scores
    found = [support(name) for name in NAMES]
    most = max(len(x) for x, _ in found)
    x, sizes = (
        np.stack([np.pad(part, (0, most - len(part)), mode) for part in parts], axis=1)
        for parts, mode in zip(zip(*found, strict=True), ("edge", "constant"), strict=True)
    )
    # Scores of any noise tell the same mass: log phi(z) and the factor add up to it.
    z, log_factors = placed(
        marginals, np.float32(x), np.random.default_rng(0).random(x.shape, np.float32)
    )
    masses = np.exp(np.asarray(log_factors, np.float64) + stats.norm.logpdf(z)) * sizes
    np.testing.assert_allclose(masses.sum(axis=0), 1, atol=2e-3)
    normal = np.random.default_rng(1).normal(size=(NUM_SAMPLES, len(NAMES))).astype(np.float32)
    samples = np.asarray(from_line(marginals, normal)[0])

    def check(share, of_samples):
        error = np.sqrt(max(share * (1 - share), 1 / NUM_SAMPLES) / NUM_SAMPLES)
        assert np.mean(of_samples) == pytest.approx(share, abs=4 * error + 1e-3)

    for i, name in enumerate(NAMES):
        if name in LISTED[2:]:
            near = np.argmin(np.abs(np.unique(samples[:, i])[:, None] - x[:, i]), axis=1)
            np.testing.assert_allclose(x[near, i], np.unique(samples[:, i]), rtol=1e-5, atol=1e-6)
            for place, value in zip(near, np.unique(samples[:, i]), strict=True):
                check(masses[place, i], samples[:, i] == value)
        if name in LEVELS[2:] or name == "amount":
            for value in np.unique(X[:, i]) if name in LEVELS else [0]:
                share = masses[(x[:, i] == value) & (sizes[:, i] == 1), i].sum()
                assert share == pytest.approx(np.mean(X[:, i] == value), abs=1e-3)
    for pair in ([0, 0], [0, 1], [1, 0], [1, 1]):  # one depends on the other
        check(np.mean(np.all(X[:, :2] == pair, axis=1)), np.all(samples[:, :2] == pair, axis=1))
    assert samples.min(axis=0)[[NAMES.index(n) for n in ("counts", "heaps", "amount")]].min() == 0
    share = samples[:, NAMES.index("share")]
    assert 0 < share.min() < share.max() < 1


def test_single_precision_leads_back_from_scores(scores):
    """By any noise, and from numbers beyond the data."""
    marginals, placed, from_line = scores
    far, at = X[:4].copy(), NAMES.index
    for name in ("counts", "heaps", "tenths", "normal", "amount", "heavy"):
        far[:, at(name)] = [500, 1e-30, 1e5, -0.0]
    far[:, at("share")] = [1e-30, 1e-6, 0.999999, 0.5]
    x = np.concatenate([X, far])
    for noise in (0.0, 0.5, 1 - 2.0**-24):
        z, log_factors = placed(marginals, x, np.float32(noise))
        assert np.all(np.isfinite(z) & np.isfinite(log_factors))
        back = np.asarray(from_line(marginals, z)[0])
        np.testing.assert_array_equal(back[:, : at("tenths")], np.rint(x[:, : at("tenths")]))
        np.testing.assert_allclose(back, x, rtol=SINGLE, atol=1e-6)


def test_what_is_unseen_is_rare_and_finite(scores):
    """Levels, other values than a constant, numbers between those of a grid, and any number."""
    marginals, placed, _ = scores
    x, at = np.repeat(X[:1], 3, axis=0), NAMES.index
    x[:, at("codes")], x[:, at("category")], x[:, at("constant")] = [3, 9, -1], [3, -1, 0.5], 8
    x[:, at("counts")], x[:, at("heaps")], x[:, at("tenths")] = [-1, 1e5, 1e30], -5, [1e30, 0.05, 9]
    x[:, at("amount") :] = np.array([[1e30], [1e-30], [1e4]]) * [1, 0.5 / 1e30, 1]
    z, log_factors = placed(marginals, x, np.float32(0.3))
    log_masses = np.asarray(log_factors, np.float64) + stats.norm.logpdf(np.asarray(z, np.float64))
    assert np.all(np.isfinite(log_masses))
    assert np.all(log_masses[:, at("codes") : at("tenths")] < -np.log(N))


def test_gradients_of_the_density_of_continuous_scores_are_those_of_differences(x64):
    x = X[:, NAMES.index("share") :].astype(np.float64)
    kinds = describe({"train": x}, bounds={0: (0, 1)})
    marginals = fit_marginals(x, kinds, choose(x, kinds))
    assert marginals.is_continuous

    def log_prob(x):
        z, log_det, _ = marginals.forward_and_logdet(x[None])
        return log_det[0] - jnp.sum(z**2) / 2

    grad = jax.jit(jax.vmap(jax.grad(log_prob)))
    values = jax.jit(jax.vmap(log_prob))
    rows, step = x[:50], 1e-8
    for i in range(2):
        off = step * np.eye(2)[i]
        differences = (values(rows + off) - values(rows - off)) / (2 * step)
        np.testing.assert_allclose(grad(rows)[:, i], differences, rtol=1e-4, atol=1e-4)
    unseen = np.array([[1e-9, 1e9], [0.999, -1e-9]])
    assert np.all(np.isfinite(grad(unseen)))
