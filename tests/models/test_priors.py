"""Priors against SciPy and quadrature."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, special, stats

from iresnet_jax.models import mixtures, priors, scales

EXACT = 1e-10  # float64, same maths by another route
QUADRATURE = 1e-8  # what scipy.integrate.quad promises by default
SINGLE = 1e-5  # float32, same maths by another route
P_VALUE = 1e-3  # fixed seeds: a correct sampler passes or fails once and for all

PRIORS = {"gaussian": ("log_std", stats.norm), "logistic": ("log_scale", stats.logistic)}


def prior_and_oracle(name, d=3, seed=0):
    rng = np.random.default_rng(seed)
    mean, log_scale = rng.normal(size=d), rng.normal(size=d)
    scale_name, distribution = PRIORS[name]
    params = {"mean": jnp.asarray(mean), scale_name: jnp.asarray(log_scale)}
    return params, functools.partial(priors.log_prob, name), distribution(mean, np.exp(log_scale))


@pytest.mark.parametrize("name", PRIORS)
def test_log_prob_matches_scipy(x64, name):
    params, log_prob, oracle = prior_and_oracle(name)
    z = np.concatenate([np.random.default_rng(1).normal(size=(6, 3)), np.full((1, 3), 100.0), np.full((1, 3), -100.0)])
    value = log_prob(params, jnp.asarray(z))
    assert value.shape == (8,)
    np.testing.assert_allclose(value, oracle.logpdf(z).sum(axis=1), rtol=EXACT)


@pytest.mark.parametrize("name", PRIORS)
def test_density_integrates_to_one(x64, name):
    params, log_prob, _ = prior_and_oracle(name, d=1, seed=3)
    density = jax.jit(lambda z: jnp.exp(log_prob(params, z.reshape(1, 1)))[0])
    centre = float(params["mean"][0])
    halves = [
        integrate.quad(lambda z: float(density(jnp.asarray(z))), *ends)[0] for ends in [(-np.inf, centre), (centre, np.inf)]
    ]
    np.testing.assert_allclose(halves, 0.5, rtol=0, atol=QUADRATURE)


@pytest.mark.parametrize("name", PRIORS)
def test_float32_log_prob_and_gradients_are_finite_and_right_far_out(name):
    _, distribution = PRIORS[name]
    params, log_prob = priors.standard(name, 1), functools.partial(priors.log_prob, name)
    z = jnp.array([[-100.0], [0.0], [100.0]])
    np.testing.assert_allclose(log_prob(params, z), distribution.logpdf(z[:, 0]), rtol=SINGLE)
    gradients = jax.grad(lambda p, z: jnp.sum(log_prob(p, z)), argnums=(0, 1))(params, z)
    slope = {"gaussian": 100, "logistic": 1}[name]
    np.testing.assert_allclose(gradients[1], [[slope], [0], [-slope]], rtol=SINGLE)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))


@pytest.mark.parametrize("name", PRIORS)
def test_samples_follow_the_prior_at_its_temperature(x64, name):
    scale_name, distribution = PRIORS[name]
    params = {"mean": jnp.asarray([1.0, -2.0]), scale_name: jnp.asarray([0.5, -1.0])}
    sample = functools.partial(priors.sample, name)
    for temperature in (1.0, 0.5):
        z = np.asarray(sample(params, jax.random.key(0), 4000, temperature))
        assert z.shape == (4000, 2)
        for j in range(2):
            scale = temperature * np.exp(float(params[scale_name][j]))
            assert stats.kstest(z[:, j], distribution(float(params["mean"][j]), scale).cdf).pvalue > P_VALUE
            # The test tells the two temperatures apart.
            other = distribution(float(params["mean"][j]), scale * (1.5 - temperature) / temperature)
            assert stats.kstest(z[:, j], other.cdf).pvalue < 1e-9
        assert abs(np.corrcoef(z.T)[0, 1]) < 5 / np.sqrt(4000)
    np.testing.assert_array_equal(sample(params, jax.random.key(0), 3, 0.0), np.tile([1.0, -2.0], (3, 1)))


WEIGHTS = np.array([0.2, 0.5, 0.3])


def mixture(d=4, num_components=5, seed=0):
    """A mixture of three components, two more that are absent, and moments of the three."""
    rng = np.random.default_rng(seed)
    factors = rng.normal(size=(3, d, d))
    covariances = factors @ factors.transpose(0, 2, 1) + 0.1 * np.eye(d)
    means = 3 * rng.normal(size=(3, d))
    return mixtures.mixture_of(means, covariances, WEIGHTS, num_components), means, covariances


def test_a_mixture_s_log_prob_matches_scipy(x64):
    """The parameters are in single precision, and the oracle takes them as they are; one absent logit is infinite."""
    params, _, covariances = mixture()
    params = {**params, "logits": params["logits"].at[4].set(-np.inf)}
    own = {name: np.asarray(values, np.float64) for name, values in params.items()}
    z = np.concatenate([3 * np.random.default_rng(1).normal(size=(6, 4)), np.full((1, 4), 100.0)])
    of_components = []
    for k in range(3):
        factor = own["lower"][k] + np.diag(np.exp(own["log_diagonal"][k]))
        covariance = np.linalg.inv(factor.T @ factor)
        np.testing.assert_allclose(covariance, covariances[k], rtol=0, atol=1e-4)
        of_components.append(stats.multivariate_normal(own["mean"][k], covariance).logpdf(z) + own["logits"][k])
    expected = special.logsumexp(of_components, axis=0) - special.logsumexp(own["logits"][:3])
    exact = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), params)
    np.testing.assert_allclose(priors.log_prob("mixture", exact, jnp.asarray(z)), expected, rtol=1e-8)  # an inverse of inverses


def test_absent_components_change_neither_values_nor_gradients():
    z = jnp.asarray(3 * np.random.default_rng(1).normal(size=(6, 4)), jnp.float32)
    value_and_grad = jax.jit(
        jax.value_and_grad(lambda params, z: jnp.sum(priors.log_prob("mixture", params, z)), argnums=(0, 1))
    )
    (padded, _, _), (own, _, _) = mixture(), mixture(num_components=3)
    value, (of_params, of_z) = value_and_grad(padded, z)
    expected, (of_own, of_own_z) = value_and_grad(own, z)
    np.testing.assert_allclose(value, expected, rtol=SINGLE)
    np.testing.assert_allclose(of_z, of_own_z, rtol=SINGLE)
    for name, gradient in of_params.items():
        np.testing.assert_allclose(gradient[:3], of_own[name], rtol=1e-4, atol=1e-4)
        assert not np.any(gradient[3:])


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_samples_of_a_mixture_have_its_moments(temperature):
    params, means, covariances = mixture()
    z = np.asarray(priors.sample("mixture", params, jax.random.key(0), 20_000, temperature), np.float64)
    assert z.shape == (20_000, 4)
    mean = WEIGHTS @ means
    within, between = (
        np.einsum("k,kij->ij", WEIGHTS, covariances),
        np.einsum("k,ki,kj->ij", WEIGHTS, means - mean, means - mean),
    )
    stderr = 5 * z.std(axis=0) / np.sqrt(len(z))
    assert np.all(np.abs(z.mean(axis=0) - mean) < stderr)
    np.testing.assert_allclose(np.cov(z.T), temperature**2 * within + between, atol=0.03 * np.trace(within + between))


def test_a_mixture_without_temperature_gives_its_means():
    params, means, _ = mixture()
    z = np.asarray(priors.sample("mixture", params, jax.random.key(0), 2000, 0.0))
    values, counts = np.unique(z, axis=0, return_counts=True)
    order = np.argsort(means[:, 0])
    np.testing.assert_allclose(values, means[order], rtol=SINGLE)
    assert np.all(np.abs(counts / 2000 - WEIGHTS[order]) < 5 * np.sqrt(0.25 / 2000))


SCALES = {
    "mean": np.array([1.0, -2.0, 0.5]),
    "log_std": np.array([0.0, 0.5, -1.0]),
    "log_scales": np.array([-2.5, 0.0, 1.5]),
    "logits": np.log([0.2, 0.5, 0.3]) + 1,  # up to a constant
}


def test_log_prob_and_fit_of_scales_match_scipy(x64):
    params = jax.tree.map(jnp.asarray, SCALES)
    covariances = np.exp(2 * SCALES["log_scales"])[:, None, None] * np.diag(np.exp(2 * SCALES["log_std"]))
    oracles = [stats.multivariate_normal(SCALES["mean"], covariance) for covariance in covariances]

    def exact(z):
        return special.logsumexp([oracle.logpdf(z) for oracle in oracles], axis=0, b=np.array([[0.2], [0.5], [0.3]]))

    z = np.asarray(priors.sample("scales", params, jax.random.key(0), 6000))
    few = np.concatenate([z[:5], np.full((1, 3), 100.0)])
    np.testing.assert_allclose(priors.log_prob("scales", params, jnp.asarray(few)), exact(few), rtol=EXACT)
    fitted, held_out = scales.fitted(z[:5000], 8), z[5000:]
    lost = exact(held_out) - priors.log_prob("scales", fitted, jnp.asarray(held_out))
    assert abs(np.mean(lost)) < 0.02  # the sampler's density is that of the oracle, and the fit's
    assert np.all(np.isfinite(scales.fitted(np.ones((2, 3)), 4)["log_scales"]))


def test_samples_of_scales_at_a_temperature_are_closer_to_the_mean():
    params = jax.tree.map(lambda part: jnp.asarray(part, jnp.float32), SCALES)
    whole, half, none = (priors.sample("scales", params, jax.random.key(0), 9, temperature) for temperature in (1.0, 0.5, 0.0))
    mean = params["mean"][None]
    np.testing.assert_allclose(half - mean, 0.5 * (whole - mean), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(none, np.tile(params["mean"], (9, 1)))


def test_priors_of_classes_are_stacked_and_equally_likely():
    stacked = priors.standard("gaussian", 3, num_classes=2)
    assert {name: values.shape for name, values in stacked.items()} == {"mean": (2, 3), "log_std": (2, 3), "class_logits": (2,)}
    assert not any(np.any(values) for values in stacked.values())


@pytest.mark.parametrize("kind", priors.PRIORS)
def test_priors_of_classes_have_the_moments_of_their_latents(kind):
    """And the frequencies; class 2 has no examples, and gets the mean of all."""
    rng = np.random.RandomState(0)
    labels = np.repeat([0, 1], [300, 100])
    z = np.where(labels[:, None] == 0, [3.0, -1.0], [-3.0, 1.0]) + rng.normal(size=(400, 2)) * [1.0, 0.5]
    fitted = priors.of_classes(kind, z, labels, 3)
    for label in (0, 1):
        np.testing.assert_allclose(fitted["mean"][label], z[labels == label].mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(fitted["mean"][2], z.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(np.exp(fitted["class_logits"]), np.array([301, 101, 1]) / 403, rtol=1e-5)
    one = {name: values[0] for name, values in fitted.items() if name != "class_logits"}
    drawn = np.asarray(priors.sample(kind, one, jax.random.key(0), 20_000))
    np.testing.assert_allclose(drawn.std(axis=0), [1.0, 0.5], rtol=0.08)


STANDARD = priors.standard("gaussian", 2)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: priors.log_prob("gaussian", STANDARD, jnp.zeros((4, 3))), r"shape \(3,\) .* got \(2,\) and \(2,\)"),
        (
            lambda: priors.log_prob("logistic", {"mean": jnp.zeros(3), "log_scale": jnp.zeros(1)}, jnp.zeros((4, 3))),
            r"got \(3,\) and \(1,\)",
        ),
        (lambda: priors.sample("gaussian", STANDARD, jax.random.key(0), 0), "got 0 and 1.0"),
        (lambda: priors.sample("gaussian", STANDARD, jax.random.key(0), 1, -0.5), "got 1 and -0.5"),
        (lambda: priors.sample("gaussian", STANDARD, jax.random.key(0), 1, float("nan")), "got 1 and nan"),
        (lambda: priors.standard("cauchy", 3), "prior must be one of gaussian, logistic, mixture, scales, own, got 'cauchy'"),
        (lambda: priors.standard("mixture", 3, num_classes=2), "mixtures need num_components"),
        (lambda: priors.standard("scales", 3, 2, 4), "and take no classes"),
        (
            lambda: priors.log_prob("scales", priors.standard("scales", 3, None, 4), jnp.zeros((4, 2))),
            r"3 dimensions, got z of shape \(4, 2\)",
        ),
        (lambda: priors.log_prob("mixture", mixture()[0], jnp.zeros((4, 3))), r"4 dimensions, got z of shape \(4, 3\)"),
        (lambda: mixtures.mixture_of([[0.0]], [[[0.0]]], [1.0]), "covariances of a mixture must be positive definite"),
        (lambda: mixtures.mixture_of([[0.0]], [[[1.0]]], [0.0]), "weights of a mixture must be at least 0"),
        (lambda: mixtures.mixture_of([[0.0]] * 2, [[[1.0]]] * 2, [1.0] * 2, 1), "2 components, and 1 are allowed"),
    ],
)
def test_caller_mistakes(call, match):
    with pytest.raises(ValueError, match=match):
        call()
