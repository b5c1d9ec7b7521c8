"""Priors against SciPy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats

from iresnet_jax.models import priors
from iresnet_jax.models.mixtures import EntryMixtures, GaussianMixture, ScaleMixture
from iresnet_jax.models.priors import ClassPriors, Gaussian, Logistic

EXACT = 1e-9  # float64, same maths by another route
P_VALUE = 1e-3  # fixed seeds: a correct sampler passes or fails once and for all
D = 3
DISTRIBUTIONS = {"gaussian": stats.norm, "logistic": stats.logistic}


def drawn(family, num_dims=D, seed=0):
    """A member of a family with random numbers, in float64."""
    standard = priors.standard(family, num_dims, 3 if family in priors.MIXTURES else None)
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape)), standard)


def components(prior):
    """Components of a mixture of vectors as SciPy's distributions, and their weights."""
    if isinstance(prior, ScaleMixture):
        covariances = [np.diag(np.exp(2 * (prior.log_std + scale))) for scale in prior.log_scales]
        means = [prior.mean] * len(covariances)
    else:
        factors = np.tril(prior.lower, -1) + [np.diag(np.exp(own)) for own in prior.log_diagonal]
        means, covariances = prior.mean, np.linalg.inv(factors.transpose(0, 2, 1) @ factors)
    return [
        stats.multivariate_normal(*one) for one in zip(means, covariances, strict=True)
    ], special.softmax(prior.logits)


def by_scipy(prior, z):
    """Log-density of latents in NumPy."""
    prior = jax.tree.map(np.asarray, prior)
    if isinstance(prior, Gaussian | Logistic):
        return (
            DISTRIBUTIONS[priors.family_of(prior)](prior.mean, np.exp(prior.log_scale))
            .logpdf(z)
            .sum(axis=1)
        )
    if isinstance(prior, EntryMixtures):
        of_components = stats.norm(prior.mean, np.exp(prior.log_scale)).logpdf(z[:, :, None])
        return special.logsumexp(
            of_components, axis=2, b=special.softmax(prior.logits, axis=1)
        ).sum(axis=1)
    oracles, weights = components(prior)
    return special.logsumexp([oracle.logpdf(z) for oracle in oracles], axis=0, b=weights[:, None])


@pytest.mark.parametrize("family", priors.FAMILIES)
def test_log_prob_matches_scipy(x64, family):
    prior = drawn(family)
    z = np.concatenate(
        [
            np.random.default_rng(1).normal(size=(6, D)),
            np.full((1, D), 100.0),
            np.full((1, D), -100.0),
        ]
    )
    np.testing.assert_allclose(prior.log_prob(jnp.asarray(z)), by_scipy(prior, z), rtol=EXACT)


@pytest.mark.parametrize("family", priors.LOCATION_SCALE)
def test_samples_follow_the_prior_at_its_temperature(x64, family):
    prior = priors.LOCATION_SCALE[family](jnp.asarray([1.0, -2.0]), jnp.asarray([0.5, -1.0]))
    for temperature in (1.0, 0.5):
        z = np.asarray(prior.sample(jax.random.key(0), (4000,), temperature))
        assert z.shape == (4000, 2)
        for j in range(2):
            mean, scale = float(prior.mean[j]), temperature * np.exp(float(prior.log_scale[j]))
            assert stats.kstest(z[:, j], DISTRIBUTIONS[family](mean, scale).cdf).pvalue > P_VALUE
            # The test tells the two temperatures apart.
            other = DISTRIBUTIONS[family](mean, scale * (1.5 - temperature) / temperature)
            assert stats.kstest(z[:, j], other.cdf).pvalue < 1e-9
        assert abs(np.corrcoef(z.T)[0, 1]) < 5 / np.sqrt(4000)


@pytest.mark.parametrize("family", priors.MIXTURES)
def test_at_a_temperature_samples_are_closer_to_their_means(x64, family):
    prior = drawn(family)
    whole, half, means = (
        prior.sample(jax.random.key(0), (9,), temperature) for temperature in (1.0, 0.5, 0.0)
    )
    np.testing.assert_allclose(half - means, 0.5 * (whole - means), rtol=EXACT)
    assert np.isin(means, np.asarray(prior.mean)).all()


@pytest.mark.parametrize("family", priors.FAMILIES)
def test_a_fit_to_samples_is_as_likely_as_their_prior(x64, family):
    """The sampler's density is that of the oracle and of the fit: equal mean log-densities."""
    prior = drawn(family, seed=2)
    z = np.asarray(prior.sample(jax.random.key(0), (6000,)))
    fitted = type(prior).fit(z[:5000], *([4] if family in priors.MIXTURES else []))
    lost = by_scipy(prior, z[5000:]) - fitted.log_prob(jnp.asarray(z[5000:]))
    assert abs(np.mean(lost)) < 0.03
    far = dataclasses.replace(prior, mean=prior.mean + 3)
    assert np.mean(by_scipy(prior, z) - by_scipy(far, z)) > 0.1  # the test tells other priors apart


def test_samples_of_a_mixture_have_its_moments(x64):
    prior = drawn("mixture")
    z = np.asarray(prior.sample(jax.random.key(0), (20_000,)))
    oracles, weights = components(jax.tree.map(np.asarray, prior))
    means, covariances = (
        np.stack([oracle.mean for oracle in oracles]),
        np.stack([oracle.cov for oracle in oracles]),
    )
    mean = weights @ means
    expected = np.einsum(
        "k,kij->ij", weights, covariances + (means - mean)[:, :, None] * (means - mean)[:, None]
    )
    assert np.all(np.abs(z.mean(axis=0) - mean) < 5 * z.std(axis=0) / np.sqrt(len(z)))
    np.testing.assert_allclose(np.cov(z.T), expected, atol=0.03 * np.trace(expected))


def test_a_mixture_is_fitted_to_modes():
    modes = np.array([[-5.0, 0.0], [5.0, 0.0], [0.0, 300.0]])
    z = np.repeat(modes, 400, axis=0) + np.random.default_rng(0).normal(size=(1200, 2)) * [0.5, 2.0]
    found = GaussianMixture.fit(z, 3)
    order = np.lexsort(np.asarray(found.mean).round().T)
    np.testing.assert_allclose(np.asarray(found.mean)[order], modes, atol=0.5)
    np.testing.assert_allclose(np.exp(-found.log_diagonal[:, 0]), 0.5, rtol=0.15)
    np.testing.assert_allclose(jax.nn.softmax(found.logits), 1 / 3, atol=0.01)


def test_latents_that_are_all_alike_have_a_fit():
    for family in (Gaussian, ScaleMixture, EntryMixtures):
        sizes = [2] if family in priors.MIXTURES.values() else []
        assert all(
            np.isfinite(leaf).all() for leaf in jax.tree.leaves(family.fit(np.ones((4, D)), *sizes))
        )


@pytest.mark.parametrize("family", priors.LOCATION_SCALE)
def test_priors_of_classes_have_the_means_of_their_latents(family):
    """And the frequencies; class 2 has no examples, and gets the mean of all."""
    rng = np.random.RandomState(0)
    labels = np.repeat([0, 1], [300, 100])
    z = np.where(labels[:, None] == 0, [3.0, -1.0], [-3.0, 1.0]) + rng.normal(size=(400, 2))
    fitted = ClassPriors.fit(family, z, labels, 3)
    for label in (0, 1):
        np.testing.assert_allclose(
            fitted.by_class.mean[label], z[labels == label].mean(axis=0), rtol=1e-5
        )
    np.testing.assert_allclose(fitted.by_class.mean[2], z.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(np.exp(fitted.logits), np.array([301, 101, 1]) / 403, rtol=1e-5)
    of_class = np.asarray(
        fitted.sample(jax.random.key(0), (20_000,), labels=jnp.zeros(20_000, int))
    )
    np.testing.assert_allclose(of_class.std(axis=0), 1, rtol=0.08)
    shapes = jax.tree.map(jnp.shape, priors.standard(family, 2, num_classes=3))
    assert shapes == jax.tree.map(jnp.shape, fitted)
