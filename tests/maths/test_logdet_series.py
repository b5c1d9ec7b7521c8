"""Log-determinants against dense Jacobians; truncation without noise, sampling by its target."""

import dataclasses
import functools
import math
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from scipy import stats

from iresnet_jax.maths.keys import keys_of_examples
from iresnet_jax.maths.logdet_estimator import draw_probes
from iresnet_jax.maths.logdet_exact import SMALL, dense_logdet, log_abs_det
from iresnet_jax.maths.logdet_krylov import quadratic_form
from iresnet_jax.maths.logdet_series import (
    RouletteLogdet,
    SeriesLogdet,
    truncation_bound,
    weighted_series,
)

EXACT = 1e-10  # the same mathematics by another route, in float64
GRADIENT = 1e-6  # gradients through a series of 60 terms at Lip(g) = 1/2
PMF = 1e-9  # sums over a probability mass function that leaves out 1e-12 of the mass
SIGMAS = 5  # standard errors within which a sample mean must lie

DIM, BATCH = 4, 3
LIPSCHITZ = 0.5
WEIGHTS = np.array([1.0, -0.7, 0.4])  # cotangents of mixed sign, one per example


def network(seed=0, lipschitz=LIPSCHITZ):
    """Parameters of ``g(x) = W2 tanh(W1 x + b)`` with ``|W1| |W2| = lipschitz``, and a batch."""
    rng = np.random.default_rng(seed)
    w1, w2 = (w / oracles.operator_norm(w) for w in rng.normal(size=(2, DIM, DIM)))
    params = {"w1": lipschitz * w1, "bias": rng.normal(size=DIM), "w2": w2}
    return params, rng.normal(size=(BATCH, DIM))


def apply(params, x):
    return jnp.tanh(x @ params["w1"].T + params["bias"][None]) @ params["w2"].T


def dense_jacobians(params, x):
    return [oracles.tanh_network(row, params["w1"], params["bias"], params["w2"])[1] for row in x]


def exact_logdets():
    return [np.linalg.slogdet(np.eye(DIM) + jac)[1] for jac in dense_jacobians(*network())]


def full_basis(x):
    """Probes ``sqrt(d) e_i``: the mean of ``v^T A v`` over them is the trace, without noise."""
    d = x.shape[1]
    return jnp.broadcast_to(math.sqrt(d) * jnp.eye(d)[:, None, :], (d, *x.shape))


def exact_trace_series(branch, x, num_terms):
    return jnp.mean(
        weighted_series(branch, x, full_basis(x), jnp.ones(num_terms), num_terms)[0], axis=0
    )


@functools.partial(jax.jit, static_argnames="num_terms")
def series_of_network(params, x, num_terms):
    return exact_trace_series(functools.partial(apply, params), x, num_terms)


def estimate(estimator, branch, x, key, **settings):
    """A call of the estimator as one program."""
    return jax.jit(functools.partial(estimator, branch, **settings))(x, key)


def test_exact_against_slogdet(x64):
    params, x = network()
    logdet = jax.jit(lambda x: dense_logdet(functools.partial(apply, params), x))(jnp.asarray(x))
    np.testing.assert_allclose(logdet, exact_logdets(), rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("num_dims", [5, 2 * SMALL + 4])
def test_elimination_without_exchanges_is_stable_for_contractions(x64, num_dims):
    """Pivots of I + J are at least 1 - L: rotations and reflections of norm L included."""
    rng, compute = np.random.default_rng(0), jax.jit(log_abs_det)
    gradient_of = jax.jit(jax.grad(lambda m: log_abs_det(m).sum()))
    for lipschitz in (0.5, 0.9999):
        rotations = np.linalg.qr(rng.normal(size=(6400 // num_dims, num_dims, num_dims)))[0]
        reflections = -np.eye(num_dims)[None]
        matrices = np.eye(num_dims) + lipschitz * np.concatenate([rotations, reflections])
        np.testing.assert_allclose(
            compute(jnp.asarray(matrices)), np.linalg.slogdet(matrices)[1], atol=1e-9
        )
        single = compute(jnp.asarray(matrices, jnp.float32))
        np.testing.assert_allclose(
            single, np.linalg.slogdet(matrices.astype(np.float32))[1], atol=1e-5 / (1 - lipschitz)
        )
        gradient = gradient_of(jnp.asarray(matrices))
        np.testing.assert_allclose(
            gradient, np.linalg.inv(matrices).swapaxes(1, 2), rtol=1e-7, atol=1e-7
        )
    # no contraction beside the identity: exchanges would be needed
    swap = jnp.asarray([[[0.0, 1.0], [1.0, 0.0]]])
    assert not np.isclose(compute(swap), 0)


@pytest.mark.parametrize("num_terms", [1, 5])
def test_the_truncated_series_has_the_terms_it_says(x64, num_terms):
    params, x = network()
    expected = [
        oracles.series_logdet(jacobian, num_terms) for jacobian in dense_jacobians(params, x)
    ]
    actual = series_of_network(params, x, num_terms)
    np.testing.assert_allclose(actual, expected, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("num_terms", [1, 6])
def test_the_remainder_of_every_probe_is_within_its_bound(x64, num_terms):
    params, x = network(lipschitz=0.8)
    branch, x = functools.partial(apply, params), jnp.asarray(x)
    (short, info), (whole, info_of_whole) = (
        estimate(SeriesLogdet(num_terms=n), branch, x, jax.random.key(3), lipschitz_bound=0.8)
        for n in (num_terms, 200)  # at 200 terms .8^n is below rounding
    )
    assert jnp.all(jnp.abs(short - whole) > 1e-8)
    assert jnp.all(jnp.abs(short - whole) <= info.truncation_bound)
    assert jnp.all(info_of_whole.truncation_bound < 1e-18)
    # without a Lipschitz bound nothing is known, whatever the last term is
    unknown = estimate(SeriesLogdet(num_terms=num_terms), lambda x: 0 * x, x, jax.random.key(3))
    assert jnp.all(jnp.isinf(unknown[1].truncation_bound))


@pytest.mark.parametrize(("lipschitz", "num_terms"), [(0.0, 1), (0.3, 2), (0.9, 10), (0.98, 40)])
def test_a_priori_bound_against_brute_force(lipschitz, num_terms):
    tail = math.fsum(lipschitz**k / k for k in range(num_terms + 1, 20_000))
    np.testing.assert_allclose(truncation_bound(7, lipschitz, num_terms), 7 * tail, rtol=EXACT)
    # -log det(I - L I) attains it
    attained = abs(
        7 * math.log1p(-lipschitz) - oracles.series_logdet(-lipschitz * np.eye(7), num_terms)
    )
    np.testing.assert_allclose(attained, 7 * tail, atol=EXACT)


def weighted_sum(logdet):
    return jnp.sum(WEIGHTS * logdet)


def gradients_of(logdet_of):
    """Gradients of a mixed-sign sum over examples, by parameters and inputs."""

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1))
    def gradients(params, x):
        return weighted_sum(logdet_of(functools.partial(apply, params), x))

    return gradients(*network())


def assert_same_tree(actual, expected):
    chex.assert_trees_all_close(actual, expected, rtol=GRADIENT, atol=GRADIENT)


@functools.cache
def exact_gradients():
    def slogdet(branch, x):
        jacobians = jax.vmap(jax.jacfwd(lambda row: branch(row[None])[0]))(x)
        return jnp.linalg.slogdet(jnp.eye(DIM)[None] + jacobians)[1]

    return gradients_of(slogdet)


def trace_of(params, x):
    slopes = 1 - jnp.tanh(x @ params["w1"].T + params["bias"][None]) ** 2
    return slopes @ jnp.einsum("ij,ji->i", params["w1"], params["w2"])


def krylov_in_whole_space(branch, x, trace=None):
    return jnp.mean(quadratic_form(branch, x, full_basis(x), DIM, trace=trace)[0], axis=0)


def in_scan(branch, x):
    def step(total, _):
        return total + exact_trace_series(branch, x, 60) / 2, None

    return jax.lax.scan(jax.checkpoint(step), jnp.zeros(len(x)), None, length=2)[0]


def with_lengths(branch, x):
    lengths = jnp.array([60, 70, 80])
    return jnp.mean(weighted_series(branch, x, full_basis(x), jnp.ones(80), lengths)[0], axis=0)


LOGDETS = {
    "dense": dense_logdet,
    "series, in scan and checkpoint": in_scan,
    "series, a length an example": with_lengths,
    "krylov": krylov_in_whole_space,
}


@pytest.mark.parametrize("name", LOGDETS)
def test_the_gradient_is_that_of_the_exact_logdet(x64, name):
    assert_same_tree(gradients_of(LOGDETS[name]), exact_gradients())


def test_a_closed_form_trace_takes_part_in_value_and_gradient(x64):
    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=(0, 1))
    def value_and_gradients(params, x):
        branch, trace = functools.partial(apply, params), functools.partial(trace_of, params)
        series = jnp.mean(
            weighted_series(branch, x, full_basis(x), jnp.ones(60), 60, trace=trace)[0], axis=0
        )
        return weighted_sum(series / 2 + krylov_in_whole_space(branch, x, trace) / 2)

    value, gradients = value_and_gradients(*network())
    assert_same_tree(gradients, exact_gradients())
    np.testing.assert_allclose(value, WEIGHTS @ np.array(exact_logdets()), rtol=GRADIENT)


ROULETTES: dict[str, tuple[RouletteLogdet, Any]] = {
    "poisson": (RouletteLogdet("poisson", 2.0), stats.poisson(2.0)),
    "no exact term": (RouletteLogdet("poisson", 0.5, num_exact_terms=0), stats.poisson(0.5)),
    # drawn in two from 10 on
    "geometric": (RouletteLogdet("geometric", 0.4, num_exact_terms=1), stats.geom(0.4, loc=-1)),
}


@pytest.mark.parametrize("name", ROULETTES)
def test_expected_weights_are_one(name):
    """``sum_n P(n) 1{k kept} weight_k = 1`` for every ``k``, with SciPy's probabilities."""
    estimator, distribution = ROULETTES[name]
    weights, num_exact = estimator.weights(), estimator.num_exact_terms
    lengths = num_exact + np.minimum(np.arange(200), len(weights) - num_exact)
    kept = lengths[None] >= np.arange(1, len(weights) + 1)[:, None]
    np.testing.assert_allclose(kept @ distribution.pmf(np.arange(200)) * weights, 1, rtol=PMF)


@pytest.mark.parametrize("name", ROULETTES)
def test_the_expectation_over_lengths_is_the_series_of_the_whole_table(x64, name):
    estimator, distribution = ROULETTES[name]
    x = jnp.ones((1, 5))  # on half the identity, where Rademacher probes have no noise
    longest = len(estimator.weights()) - estimator.num_exact_terms

    @jax.jit
    @jax.vmap
    def estimate(length):
        fixed = dataclasses.replace(estimator, length=length)
        logdet, info = fixed(lambda x: 0.5 * x, x, jax.random.key(0), lipschitz_bound=0.5)
        return logdet[0], info.truncation_bound[0]

    estimates, bounds = estimate(estimator.num_exact_terms + jnp.arange(longest + 1))
    mass = distribution.pmf(np.arange(longest + 1))
    mass[-1] += distribution.sf(longest)
    expectation = np.dot(mass, estimates)
    table = oracles.series_logdet(0.5 * np.eye(5), len(estimator.weights()))
    np.testing.assert_allclose(expectation, table, rtol=PMF)
    assert abs(expectation - 5 * math.log(1.5)) <= bounds[0] + PMF


@pytest.mark.parametrize("name", ROULETTES)
def test_lengths_follow_their_distribution(name):
    estimator, distribution = ROULETTES[name]
    num_draws = 20_000
    # the last one takes the tail
    cells = 1 + int(np.argmax(distribution.sf(np.arange(100)) < 2e-3))
    draws = jax.jit(jax.vmap(estimator.draw_length))(jax.random.split(jax.random.key(0), num_draws))
    counts = np.bincount(np.minimum(draws - estimator.num_exact_terms, cells - 1), minlength=cells)
    expected = np.append(distribution.pmf(np.arange(cells - 1)), distribution.sf(cells - 2))
    assert stats.chisquare(counts, num_draws * expected).pvalue > 1e-3
    assert stats.chisquare(np.roll(counts, 1), num_draws * expected).pvalue < 1e-6


def test_standard_errors_over_probes_are_those_of_the_samples(x64):
    params, x = network()
    branch, x = functools.partial(apply, params), jnp.asarray(x)
    probes = draw_probes(jax.random.key(0), x, 64)
    samples, _ = jax.jit(lambda x, probes: weighted_series(branch, x, probes, jnp.ones(5), 5))(
        x, probes
    )
    _, info = estimate(SeriesLogdet(5, num_probes=64), branch, x, jax.random.key(0))
    np.testing.assert_allclose(info.stderr, np.std(samples, axis=0, ddof=1) / 8, rtol=EXACT)


def test_with_a_key_an_example_the_batch_does_not_matter(x64):
    estimator, (params, x) = RouletteLogdet("geometric", 0.3), network()
    branch, x = functools.partial(apply, params), jnp.asarray(x)
    keys = jax.random.split(jax.random.key(0), BATCH)
    run = jax.jit(functools.partial(estimator, branch))
    together, _ = run(x, keys)
    for i in range(BATCH):
        alone, _ = run(x[i : i + 1], keys[i : i + 1])
        np.testing.assert_allclose(alone[0], together[i], rtol=EXACT)


def test_a_fixed_length_is_shared_and_does_not_recompile():
    params, x = network()
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def estimate(key_length, key):
        fixed = RouletteLogdet().fix_length(key_length)
        return fixed(functools.partial(apply, params), x, key)[0], fixed.length

    key = jax.random.key(0)
    results = [estimate(jax.random.key(i), key) for i in range(6)]
    assert len({int(length) for _, length in results}) > 1
    for i, (logdet, length) in enumerate(results):
        other = next((r for r, n in results[:i] if n == length), logdet)
        np.testing.assert_array_equal(logdet, other)  # same length, same probes, same number
    assert SeriesLogdet().fix_length(key) == SeriesLogdet()


def test_equal_examples_have_equal_keys_and_others_have_others():
    x = np.array([[0.0, 1.0], [1.0, 0.0], [-0.0, 1.0], [0.0, 1.0 + 2e-7]])
    first, *others = jax.random.key_data(keys_of_examples(jnp.asarray(x, jnp.float32)))
    assert [bool((first == other).all()) for other in others] == [False, True, False]


def test_probes_have_the_moments_they_promise():
    x = jnp.zeros((2, 3))
    draws = np.asarray(draw_probes(jax.random.key(0), x, 4000)).reshape(4000, 6)
    assert np.all(np.abs(draws) == 1)
    np.testing.assert_allclose(draws.mean(0), 0, atol=SIGMAS / math.sqrt(4000))
    np.testing.assert_allclose(draws.T @ draws / 4000, np.eye(6), atol=SIGMAS * math.sqrt(2 / 4000))
