"""Densities against SciPy and quadrature, log-dets against dense Jacobians, integers against their exact cells."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats

from iresnet_jax.bijections import equalize as histogram
from iresnet_jax.bijections import likelihood
from iresnet_jax.bijections.likelihood import GaussianPrior, LogisticPrior

EXACT = 1e-10  # float64, same maths by another route
SLOGDET = 1e-9  # float64, dense determinant
QUADRATURE = 1e-8  # what scipy.integrate.quad promises by default
SINGLE = 1e-5  # float32, same maths by another route
P_VALUE = 1e-3  # fixed seeds: a correct sampler passes or fails once and for all

PRIORS = {
    "gaussian": (GaussianPrior, likelihood.gaussian_log_prob, likelihood.gaussian_sample, stats.norm),
    "logistic": (LogisticPrior, likelihood.logistic_log_prob, likelihood.logistic_sample, stats.logistic),
}


def prior_and_oracle(name, d=3, seed=0):
    rng = np.random.default_rng(seed)
    mean, log_scale = rng.normal(size=d), rng.normal(size=d)
    make, log_prob, sample, distribution = PRIORS[name]
    return make(jnp.asarray(mean), jnp.asarray(log_scale)), log_prob, sample, distribution(mean, np.exp(log_scale))


# --- integers and the unit interval ---


@pytest.mark.parametrize("num_levels", [2, 3, 17, 49, 255, 256])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_every_edge_of_every_cell_returns_its_level(x64, num_levels, dtype):
    """No float of a cell may leave it: 0 and almost 1 as noise are the extremes."""
    smallest, largest = likelihood._cells(num_levels, np.dtype(dtype))
    levels = np.arange(num_levels)
    assert largest[-1] < 1
    np.testing.assert_array_equal(smallest[1:], np.nextafter(largest[:-1], np.ones((), dtype)))  # no gap, no overlap
    for quantize in (likelihood.quantize, jax.jit(likelihood.quantize, static_argnums=1)):
        np.testing.assert_array_equal(quantize(jnp.asarray(smallest), num_levels), levels)
        np.testing.assert_array_equal(quantize(jnp.asarray(largest), num_levels), levels)


@pytest.mark.parametrize("num_levels", [17, 256])
def test_dequantized_highest_level_stays_below_one_in_float32(num_levels):
    x = jnp.full((64, 2**14), num_levels - 1, jnp.uint8)
    key = jax.random.key(0)
    y = likelihood.dequantize(key, x, num_levels)
    assert y.dtype == jnp.float32
    assert y.max() < 1
    np.testing.assert_array_equal(likelihood.quantize(y, num_levels), x)
    if num_levels == 256:  # the naive formula does reach 1 on these very numbers, so the test above can fail
        naive = (x.astype(jnp.float32) + jax.random.uniform(key, x.shape)) / num_levels
        assert naive.max() == 1


@settings(max_examples=10)  # each number of levels compiles anew
@given(seed=st.integers(0, 2**31 - 1), num_levels=st.integers(2, 256))
def test_quantize_inverts_dequantize(seed, num_levels):
    x = jnp.asarray(np.random.default_rng(seed).integers(num_levels, size=(2, 5, 5)), jnp.int32)
    y = likelihood.dequantize(jax.random.key(seed), x, num_levels)
    assert 0 <= y.min() <= y.max() < 1
    np.testing.assert_array_equal(likelihood.quantize(y, num_levels), x)


def test_dequantization_noise_is_uniform_and_independent_of_the_level():
    x = jnp.asarray(np.arange(20000).reshape(20, 1000) % 256, jnp.uint8)
    y = np.asarray(likelihood.dequantize(jax.random.key(1), x), np.float64)
    noise = (256 * y - np.asarray(x)).ravel()
    assert stats.kstest(noise, "uniform").pvalue > P_VALUE
    assert abs(np.corrcoef(noise, np.asarray(x).ravel())[0, 1]) < 5 / np.sqrt(noise.size)


def test_a_key_for_each_example_makes_its_noise_independent_of_the_batch():
    keys = jax.random.split(jax.random.key(0), 4)
    x = jnp.asarray(np.random.default_rng(0).integers(256, size=(4, 3, 2)), jnp.uint8)
    y = likelihood.dequantize(keys, x)
    np.testing.assert_array_equal(likelihood.dequantize(keys[2:], x[2:]), y[2:])
    np.testing.assert_array_equal(likelihood.dequantize(keys[1], x[1][None])[0].shape, x.shape[1:])
    noise = 256 * np.asarray(y) - np.asarray(x)
    assert len(np.unique(noise)) == noise.size
    jitted = jax.jit(likelihood.dequantize, static_argnums=2)(keys, x, 256)
    np.testing.assert_array_equal(jitted, y)


def test_levels_out_of_range_become_nan_and_samples_out_of_range_are_clipped():
    y = likelihood.dequantize(jax.random.key(0), jnp.array([[-1, 0, 31, 32]]), 32)
    np.testing.assert_array_equal(np.isnan(y), [[True, False, False, True]])
    x = likelihood.quantize(jnp.array([-jnp.inf, -0.1, 1.0, 7.0]), 32)
    np.testing.assert_array_equal(x, [0, 0, 31, 31])


# --- data transforms ---

FREQUENCIES = (0.15, 0.5, 0.1, 0.25)
SHARES = np.array([[0.999, 0.3], [0.5, 0.01]])[:, :, None]
TRANSFORMS = {
    "logit .05": (
        lambda x: likelihood.logit_forward_and_logdet(x, 0.05),
        lambda y: likelihood.logit_inverse_and_logdet(y, 0.05),
    ),
    "logit 1e-6": (
        lambda x: likelihood.logit_forward_and_logdet(x, 1e-6),
        lambda y: likelihood.logit_inverse_and_logdet(y, 1e-6),
    ),
    "center": (likelihood.center_forward_and_logdet, likelihood.center_inverse_and_logdet),
    "equalize": (
        lambda x: histogram.equalize_forward_and_logdet(x, FREQUENCIES),
        lambda u: histogram.equalize_inverse_and_logdet(u, FREQUENCIES),
    ),
    "equalize, entrywise": (
        lambda x: histogram.equalize_forward_and_logdet(x, FREQUENCIES, SHARES),
        lambda u: histogram.equalize_inverse_and_logdet(u, FREQUENCIES, SHARES),
    ),
}


def slogdet_of(transform, x):
    jacobian = jax.jacfwd(lambda x: transform(x[None])[0][0])(x)
    return np.linalg.slogdet(np.asarray(jacobian).reshape(x.size, x.size))[1]


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_round_trip_with_logdets_of_the_dense_jacobian(x64, name):
    forward, inverse = TRANSFORMS[name]
    x = jnp.asarray(np.random.default_rng(0).uniform(size=(3, 2, 2, 1)))
    y, logdet = forward(x)
    back, logdet_inverse = inverse(y)
    assert logdet.shape == logdet_inverse.shape == (3,)
    np.testing.assert_allclose(back, x, rtol=0, atol=EXACT)
    np.testing.assert_allclose(logdet_inverse, -logdet, rtol=0, atol=SLOGDET)
    for i in range(3):
        np.testing.assert_allclose(logdet[i], slogdet_of(forward, x[i]), rtol=0, atol=SLOGDET)
        np.testing.assert_allclose(logdet_inverse[i], slogdet_of(inverse, y[i]), rtol=0, atol=SLOGDET)


def test_the_logdet_oracle_rejects_a_forgotten_constant(x64):
    """RealNVP's log(1 - 2 alpha) is the term that implementations drop."""
    x = jnp.full((4,), 0.3)
    forward, _ = TRANSFORMS["logit .05"]
    without = forward(x[None])[1][0] - 4 * np.log1p(-0.1)
    assert abs(without - slogdet_of(forward, x)) > 0.4


def test_logit_is_accurate_and_finite_at_both_ends_in_float32():
    alpha = 1e-6
    x = np.array([0, 2**-24, 1e-4, 0.5, 1 - 2**-12, 1 - 2**-24, 1], np.float32)
    s = alpha + (1 - 2 * alpha) * x.astype(np.float64)
    y, logdet = likelihood.logit_forward_and_logdet(jnp.asarray(x)[:, None], alpha)
    assert y.dtype == logdet.dtype == jnp.float32
    np.testing.assert_allclose(y[:, 0], np.log(s) - np.log1p(-s), rtol=SINGLE, atol=SINGLE)
    np.testing.assert_allclose(logdet, np.log1p(-2 * alpha) - np.log(s) - np.log1p(-s), rtol=SINGLE)
    far = jnp.array([[-100.0, 100.0]])
    back, logdet = likelihood.logit_inverse_and_logdet(far, alpha)
    np.testing.assert_allclose(back, [[0.0, 1.0]], atol=2 * alpha)
    np.testing.assert_allclose(logdet, -200, rtol=SINGLE)


# --- priors ---


@pytest.mark.parametrize("name", PRIORS)
def test_log_prob_matches_scipy(x64, name):
    params, log_prob, _, oracle = prior_and_oracle(name)
    z = np.concatenate([np.random.default_rng(1).normal(size=(6, 3)), np.full((1, 3), 100.0), np.full((1, 3), -100.0)])
    value = log_prob(params, jnp.asarray(z))
    assert value.shape == (8,)
    np.testing.assert_allclose(value, oracle.logpdf(z).sum(axis=1), rtol=EXACT)


@pytest.mark.parametrize("name", PRIORS)
def test_density_integrates_to_one(x64, name):
    params, log_prob, _, _ = prior_and_oracle(name, d=1, seed=3)
    density = jax.jit(lambda z: jnp.exp(log_prob(params, z.reshape(1, 1)))[0])
    centre = float(params.mean[0])
    halves = [
        integrate.quad(lambda z: float(density(jnp.asarray(z))), *ends)[0] for ends in [(-np.inf, centre), (centre, np.inf)]
    ]
    np.testing.assert_allclose(halves, 0.5, rtol=0, atol=QUADRATURE)


@pytest.mark.parametrize("name", PRIORS)
def test_float32_log_prob_and_gradients_are_finite_and_right_far_out(name):
    make, log_prob, _, distribution = PRIORS[name]
    params = make(jnp.zeros(1), jnp.zeros(1))
    z = jnp.array([[-100.0], [0.0], [100.0]])
    np.testing.assert_allclose(log_prob(params, z), distribution.logpdf(z[:, 0]), rtol=SINGLE)
    gradients = jax.grad(lambda p, z: jnp.sum(log_prob(p, z)), argnums=(0, 1))(params, z)
    slope = {"gaussian": 100, "logistic": 1}[name]
    np.testing.assert_allclose(gradients[1], [[slope], [0], [-slope]], rtol=SINGLE)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))


@pytest.mark.parametrize("name", PRIORS)
def test_samples_follow_the_prior_at_its_temperature(x64, name):
    make, _, sample, distribution = PRIORS[name]
    params = make(jnp.asarray([1.0, -2.0]), jnp.asarray([0.5, -1.0]))
    for temperature in (1.0, 0.5):
        z = np.asarray(sample(params, jax.random.key(0), 4000, temperature))
        assert z.shape == (4000, 2)
        for j in range(2):
            scale = temperature * np.exp(float(params[1][j]))
            assert stats.kstest(z[:, j], distribution(float(params[0][j]), scale).cdf).pvalue > P_VALUE
            # The test tells the two temperatures apart.
            other = distribution(float(params[0][j]), scale * (1.5 - temperature) / temperature)
            assert stats.kstest(z[:, j], other.cdf).pvalue < 1e-9
        assert abs(np.corrcoef(z.T)[0, 1]) < 5 / np.sqrt(4000)
    np.testing.assert_array_equal(sample(params, jax.random.key(0), 3, 0.0), np.tile([1.0, -2.0], (3, 1)))


# --- bits per dimension ---


def test_bits_per_dim_of_uniform_and_cellwise_constant_densities(x64):
    # Uniform density: every level is equally likely, log2(num_levels) bits each.
    np.testing.assert_allclose(likelihood.bits_per_dim(jnp.zeros(2), 784), 8, rtol=0, atol=EXACT)
    np.testing.assert_allclose(likelihood.bits_per_dim(jnp.zeros(2), 64, 17), np.log2(17), rtol=0, atol=EXACT)
    np.testing.assert_allclose(likelihood.bits_per_dim(jnp.array([-3 * np.log(2)]), 3, 1), 1, rtol=0, atol=EXACT)
    # Constant on cells: the density n P(k) gives -log2 P(k), without a gap.
    probabilities = np.random.default_rng(0).dirichlet(np.ones(16))
    bits = likelihood.bits_per_dim(jnp.log(16 * jnp.asarray(probabilities)), 1, 16)
    np.testing.assert_allclose(bits, -np.log2(probabilities), rtol=0, atol=EXACT)


def test_uniform_dequantisation_bounds_the_discrete_bits_from_above(x64):
    """Logistic density on [0, 1) x num_levels, whose cells have a closed-form probability."""
    num_levels, scale = 8, 0.07
    prior = LogisticPrior(jnp.asarray([0.45]), jnp.log(jnp.asarray([scale])))
    edges = stats.logistic(0.45, scale).cdf(np.arange(num_levels + 1) / num_levels)
    probabilities = np.diff(edges)
    for level in range(num_levels):
        x = jnp.full((4000, 1), level, jnp.uint8)
        y = likelihood.dequantize(jax.random.key(level), x, num_levels, dtype=jnp.float64)
        bits = np.asarray(likelihood.bits_per_dim(likelihood.logistic_log_prob(prior, y), 1, num_levels))
        # Jensen's gap in closed form, by quadrature over the cell.
        density = stats.logistic(0.45, scale).logpdf
        low, high = level / num_levels, (level + 1) / num_levels
        mean_log = num_levels * integrate.quad(density, low, high)[0]
        exact_bound = -mean_log / np.log(2) + np.log2(num_levels)
        assert exact_bound > -np.log2(probabilities[level])
        standard_error = bits.std() / np.sqrt(bits.size)
        assert standard_error < 0.05
        assert abs(bits.mean() - exact_bound) < 5 * standard_error


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: likelihood.dequantize(jax.random.key(0), jnp.zeros((2, 3), jnp.uint8), 1), "got 1"),
        (lambda: likelihood.quantize(jnp.zeros(3), 257), r"\[2, 256\], got 257"),
        (
            lambda: likelihood.dequantize(jax.random.split(jax.random.key(0), 3), jnp.zeros((2, 3), jnp.uint8)),
            r"shape \(\) or \(2,\), got .* of shape \(3,\)",
        ),
        # Without the tests' import hook, which refuses the kind of key first.
        (
            lambda: inspect.unwrap(likelihood.dequantize)(jax.random.PRNGKey(0), jnp.zeros((2, 3), jnp.uint8)),
            r"typed key .* got uint32 of shape \(2,\)",
        ),
        (
            lambda: likelihood.dequantize(jax.random.key(0), jnp.zeros((2, 3), jnp.uint8), dtype=jnp.float16),
            "got float16",
        ),
        (lambda: likelihood.logit_forward_and_logdet(jnp.zeros((1, 2)), 0.0), r"\(0, 0.5\), got 0.0"),
        (lambda: likelihood.logit_inverse_and_logdet(jnp.zeros((1, 2)), 0.5), r"\(0, 0.5\), got 0.5"),
        (
            lambda: likelihood.gaussian_log_prob(GaussianPrior(jnp.zeros(2), jnp.zeros(2)), jnp.zeros((4, 3))),
            r"shape \(3,\) .* got \(2,\) and \(2,\)",
        ),
        (
            lambda: likelihood.logistic_log_prob(LogisticPrior(jnp.zeros(3), jnp.zeros(1)), jnp.zeros((4, 3))),
            r"got \(3,\) and \(1,\)",
        ),
        (
            lambda: likelihood.gaussian_sample(GaussianPrior(jnp.zeros(2), jnp.zeros(2)), jax.random.key(0), 0),
            "got 0 and 1.0",
        ),
        (
            lambda: likelihood.logistic_sample(LogisticPrior(jnp.zeros(2), jnp.zeros(2)), jax.random.key(0), 1, -0.5),
            "got 1 and -0.5",
        ),
        (lambda: likelihood.bits_per_dim(jnp.zeros(1), 0), "got 0 and 256"),
    ],
)
def test_caller_mistakes(call, match):
    with pytest.raises(ValueError, match=match):
        call()
