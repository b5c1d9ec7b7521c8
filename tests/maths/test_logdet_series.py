"""Log-determinants against dense Jacobians; the truncation tested without noise, the sampling
against its own target.
"""

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

from iresnet_jax.maths.logdet_estimator import draw_probes
from iresnet_jax.maths.logdet_exact import SMALL, ExactLogdet, dense_logdet, log_abs_det
from iresnet_jax.maths.logdet_krylov import KrylovLogdet, quadratic_form
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
    """A call of the estimator as one program: outside of ``jit`` every operation would be
    compiled by itself.
    """
    return jax.jit(functools.partial(estimator, branch, **settings))(x, key)


# ------------------------------------------------------------------------------------------- values


def test_exact_against_slogdet(x64):
    params, x = network()
    expected = [
        np.linalg.slogdet(np.eye(DIM) + jacobian)[1] for jacobian in dense_jacobians(params, x)
    ]
    logdet = jax.jit(lambda x: dense_logdet(functools.partial(apply, params), x))(jnp.asarray(x))
    np.testing.assert_allclose(logdet, expected, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("num_dims", [5, 2 * SMALL + 4])
def test_elimination_without_exchanges_is_stable_for_contractions(x64, num_dims):
    """Pivots of I + J are at least 1 - L, whatever J: rotations and reflections of norm L
    included.
    """
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


# -------------------------------------------------------------------------------- truncation bounds


@pytest.mark.parametrize("num_terms", [1, 6])
def test_the_remainder_of_every_probe_is_within_its_bound(x64, num_terms):
    params, x = network(lipschitz=0.8)
    branch, x = functools.partial(apply, params), jnp.asarray(x)
    estimates, infos = [], []
    for n in (num_terms, 200):  # at 200 terms .8^n is below rounding
        logdet, info = estimate(
            SeriesLogdet(num_terms=n), branch, x, jax.random.key(3), lipschitz_bound=0.8
        )
        estimates.append(logdet)
        infos.append(info)
    remainder = jnp.abs(estimates[0] - estimates[1])
    assert jnp.all(remainder > 1e-8)
    assert jnp.all(remainder <= infos[0].truncation_bound)
    assert jnp.all(infos[1].truncation_bound < 1e-18)
    unknown = estimate(SeriesLogdet(num_terms=num_terms), branch, x, jax.random.key(3))[
        1
    ].truncation_bound
    assert jnp.all(jnp.isinf(unknown))
    of_zero = estimate(SeriesLogdet(num_terms=num_terms), lambda x: 0 * x, x, jax.random.key(3))[
        1
    ].truncation_bound
    assert jnp.all(jnp.isinf(of_zero))


@pytest.mark.parametrize(("lipschitz", "num_terms"), [(0.0, 1), (0.3, 2), (0.9, 10), (0.98, 40)])
def test_a_priori_bound_against_brute_force(lipschitz, num_terms):
    tail = math.fsum(lipschitz**k / k for k in range(num_terms + 1, 20_000))
    np.testing.assert_allclose(truncation_bound(7, lipschitz, num_terms), 7 * tail, rtol=EXACT)
    # -log det(I - L I) attains it
    attained = abs(
        7 * math.log1p(-lipschitz) - oracles.series_logdet(-lipschitz * np.eye(7), num_terms)
    )
    np.testing.assert_allclose(attained, 7 * tail, atol=EXACT)


def test_the_truncation_bound_of_almost_no_contraction_is_above_the_tail_and_takes_no_time():
    lipschitz = 1 - 1e-9
    tail = -np.log1p(-lipschitz) - np.sum(lipschitz ** np.arange(1, 6) / np.arange(1, 6))
    assert 784 * tail <= truncation_bound(784, lipschitz, 5) <= 784 * 3 * tail


# ---------------------------------------------------------------------------------------- gradients


def weighted_sum(logdet):
    return jnp.sum(WEIGHTS * logdet)


def gradients_of(logdet_of):
    """Gradients of a mixed-sign sum over examples, by parameters and inputs, compiled."""

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1))
    def gradients(params, x):
        return weighted_sum(logdet_of(functools.partial(apply, params), x))

    return gradients


def assert_same_tree(actual, expected):
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=GRADIENT, atol=GRADIENT),
        actual,
        expected,
    )


@pytest.fixture
def exact_gradients(x64):
    return gradients_of_slogdet()


@functools.cache
def gradients_of_slogdet():
    params, x = network()

    def loss(params, x):
        jacobians = jax.vmap(jax.jacfwd(lambda row: apply(params, row[None])[0]))(x)
        return weighted_sum(jnp.linalg.slogdet(jnp.eye(DIM)[None] + jacobians)[1])

    return jax.jit(jax.grad(loss, argnums=(0, 1)))(params, x)


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
def test_the_gradient_is_that_of_the_exact_logdet(exact_gradients, name):
    assert_same_tree(gradients_of(LOGDETS[name])(*network()), exact_gradients)


def test_a_closed_form_trace_takes_part_in_value_and_gradient(exact_gradients):
    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=(0, 1))
    def value_and_gradients(params, x):
        branch, trace = functools.partial(apply, params), functools.partial(trace_of, params)
        series = jnp.mean(
            weighted_series(branch, x, full_basis(x), jnp.ones(60), 60, trace=trace)[0], axis=0
        )
        return weighted_sum(series / 2 + krylov_in_whole_space(branch, x, trace) / 2)

    value, gradients = value_and_gradients(*network())
    assert_same_tree(gradients, exact_gradients)
    exact = [
        np.linalg.slogdet(np.eye(DIM) + jacobian)[1] for jacobian in dense_jacobians(*network())
    ]
    np.testing.assert_allclose(value, WEIGHTS @ exact, rtol=GRADIENT)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_terms():
    params, x = network()
    params, x = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), (params, x))

    def temporary_bytes(num_terms):
        def loss(params, x):
            return jnp.sum(
                SeriesLogdet(num_terms)(functools.partial(apply, params), x, jax.random.key(0))[0]
            )

        analysis = (
            jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
            .lower(params, x)
            .compile()
            .memory_analysis()
        )
        assert analysis is not None
        return analysis.temp_size_in_bytes

    assert temporary_bytes(5) == temporary_bytes(40)


# ----------------------------------------------------------------------------------------- roulette

ROULETTES: dict[str, tuple[RouletteLogdet, Any]] = {
    "poisson": (RouletteLogdet("poisson", 2.0), stats.poisson(2.0)),
    "poisson of mean .5, no exact term": (
        RouletteLogdet("poisson", 0.5, num_exact_terms=0),
        stats.poisson(0.5),
    ),
    # drawn in two from 10 on
    "geometric": (RouletteLogdet("geometric", 0.4, num_exact_terms=1), stats.geom(0.4, loc=-1)),
}


def assert_every_term_has_expected_weight_one(weights, num_exact_terms, distribution):
    """``sum_n P(n) 1{k kept} weight_k = 1`` for every term ``k`` of the table, with SciPy's
    probabilities.
    """
    n = np.arange(200)
    mass = distribution.pmf(n)
    for k in range(1, len(weights) + 1):
        kept = num_exact_terms + np.minimum(n, len(weights) - num_exact_terms) >= k
        # Relative to the last terms' tiny probabilities the mass function is only good to its own
        # rounding.
        np.testing.assert_allclose(
            np.sum(mass[kept]) * weights[k - 1], 1, rtol=PMF, err_msg=f"term {k}"
        )


@pytest.mark.parametrize("name", ROULETTES)
def test_expected_weights_are_one(name):
    estimator, distribution = ROULETTES[name]
    assert_every_term_has_expected_weight_one(
        estimator.weights(), estimator.num_exact_terms, distribution
    )


@pytest.mark.parametrize("name", ROULETTES)
def test_the_expectation_over_lengths_is_the_series_of_the_whole_table(x64, name):
    estimator, distribution = ROULETTES[name]
    x = jnp.ones((1, 5))  # on half the identity, where Rademacher probes have no noise
    longest = len(estimator.weights()) - estimator.num_exact_terms

    @jax.jit
    def estimate(length):
        fixed = RouletteLogdet(
            estimator.distribution,
            estimator.parameter,
            num_exact_terms=estimator.num_exact_terms,
            length=length,
        )
        logdet, info = fixed(lambda x: 0.5 * x, x, jax.random.key(0), lipschitz_bound=0.5)
        return logdet[0], info.truncation_bound[0]

    estimates, bounds = zip(
        *(estimate(jnp.int32(estimator.num_exact_terms + n)) for n in range(longest + 1)),
        strict=True,
    )
    mass = distribution.pmf(np.arange(longest + 1))
    mass[-1] += distribution.sf(longest)
    expectation = np.dot(mass, np.array(estimates))
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


# --------------------------------------------------------------------------------- keys and lengths


@pytest.mark.parametrize(
    "estimator", [RouletteLogdet("geometric", 0.3), KrylovLogdet(3)], ids=["roulette", "krylov"]
)
def test_with_a_key_an_example_the_batch_does_not_matter(x64, estimator):
    params, x = network()
    branch, x = functools.partial(apply, params), jnp.asarray(x)
    keys = jax.random.split(jax.random.key(0), BATCH)
    run = jax.jit(functools.partial(estimator, branch))
    together, _ = run(x, keys)
    reversed_batch, _ = run(x[::-1], keys[::-1])
    np.testing.assert_allclose(reversed_batch[::-1], together, rtol=EXACT)
    for i in range(BATCH):
        alone, _ = run(x[i : i + 1], keys[i : i + 1])
        np.testing.assert_allclose(alone[0], together[i], rtol=EXACT)


@pytest.mark.parametrize(
    "estimator",
    [ExactLogdet(), KrylovLogdet(3), SeriesLogdet(3), RouletteLogdet()],
    ids=lambda e: type(e).__name__,
)
def test_a_batch_may_be_empty(estimator):
    branch = functools.partial(apply, network()[0])
    value, _ = estimate(estimator, branch, jnp.zeros((0, DIM)), jax.random.key(0))
    assert value.shape == (0,)


def test_a_fixed_length_is_shared_and_does_not_recompile():
    params, x = network()
    params, x = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), (params, x))
    estimator = RouletteLogdet()
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def estimate(key_length, key):
        fixed = estimator.fix_length(key_length)
        return fixed(functools.partial(apply, params), x, key)[0], fixed.length

    key = jax.random.key(0)
    results = [estimate(jax.random.key(i), key) for i in range(6)]
    assert len({int(length) for _, length in results}) > 1
    for i, (logdet, length) in enumerate(results):
        other = next((r for r, n in results[:i] if n == length), logdet)
        np.testing.assert_array_equal(logdet, other)  # same length, same probes, same number
    assert SeriesLogdet().fix_length(key) == SeriesLogdet()
    assert ExactLogdet().fix_length(key) == ExactLogdet()


def test_probes_have_the_moments_they_promise():
    x = jnp.zeros((2, 3))
    draws = np.asarray(draw_probes(jax.random.key(0), x, 4000)).reshape(4000, 6)
    assert np.all(np.abs(draws) == 1)
    np.testing.assert_allclose(draws.mean(0), 0, atol=SIGMAS / math.sqrt(4000))
    np.testing.assert_allclose(draws.T @ draws / 4000, np.eye(6), atol=SIGMAS * math.sqrt(2 / 4000))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SeriesLogdet(0), "num_terms must be at least 1, got 0"),
        (
            lambda: SeriesLogdet()(lambda x: x, jnp.float32(1.0), jax.random.key(0)),
            "x must have a batch axis first",
        ),
        (
            lambda: SeriesLogdet()(
                lambda x: x, jnp.ones((1, 1)), jax.random.key(0), lipschitz_bound=float("nan")
            ),
            "a Lipschitz bound must be at least 0",
        ),
        (
            lambda: RouletteLogdet("uniform"),
            "distribution must be poisson or geometric, got 'uniform'",
        ),
        (lambda: RouletteLogdet(parameter=-1.0), r"must lie in \(0, 500\], got -1"),
        (lambda: RouletteLogdet(num_exact_terms=-1), "must not be negative, got -1"),
        (lambda: SeriesLogdet()(lambda x: x, jnp.ones((1, 1))), "key must be given"),
        (lambda: truncation_bound(3, 1.0, 5), r"lipschitz_bound must lie in \[0, 1\), got 1"),
        (
            lambda: weighted_series(
                lambda x: x, jnp.ones((1, 1)), jnp.ones((1, 1, 1)), jnp.ones(2), 3
            ),
            "between 0 and the number of weights 2, got 3",
        ),
    ],
)
def test_mistakes_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# --------------------------------------------------------------------------------- arguments of jit


@pytest.mark.parametrize("estimator", [SeriesLogdet(2), RouletteLogdet(length=jnp.int32(3))])
def test_an_estimator_is_an_argument_of_jit_like_any_array(estimator):
    leaves, structure = jax.tree.flatten(estimator)
    # settings are static, a fixed length is data
    assert len(leaves) == isinstance(estimator, RouletteLogdet)
    assert jax.tree.unflatten(structure, leaves) == estimator
    x = jnp.ones((2, 3))
    logdet = jax.jit(lambda e, x: e(lambda x: 0 * x, x, jax.random.key(0))[0])(estimator, x)
    np.testing.assert_array_equal(logdet, 0)


def test_whatever_can_be_a_batch_is_one_and_old_keys_are_keys():
    estimator = RouletteLogdet()
    estimate = jax.jit(functools.partial(estimator, lambda x: 0.5 * x))
    key = jax.random.key(0)
    expected, _ = estimate(jnp.ones((2, 7)), key)
    np.testing.assert_array_equal(estimate(jnp.ones((2, 7)), jax.random.PRNGKey(0))[0], expected)
    assert estimate(jnp.ones((2, 7), int), jax.random.split(jax.random.PRNGKey(0)))[0].shape == (2,)
    listed, _ = jax.jit(lambda key: estimator(lambda x: 0.5 * x, np.ones((2, 7)).tolist(), key))(
        key
    )
    np.testing.assert_allclose(listed, expected, rtol=1e-6)
    empty, info = estimate(jnp.ones((0, 7)), key)
    assert empty.shape == info.stderr.shape == info.truncation_bound.shape == (0,)
    bounded = jax.jit(
        lambda bound: estimator(lambda x: 0.5 * x, jnp.ones((2, 7)), key, lipschitz_bound=bound)[1]
    )
    for bad in (-0.5, float("nan"), 1.5):
        assert np.isinf(bounded(bad).truncation_bound).all()
