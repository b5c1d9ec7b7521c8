"""The likelihood against dense Jacobians; the importance-weighted bound against quadrature."""

import dataclasses

import jax.numpy as jnp
import kept
import numpy as np
import pytest
from scipy.special import logsumexp

import iresnet_jax as ir
from iresnet_jax.evaluation import likelihood

SAME_RTOL = 1e-5  # the same maths by another route, float32
DIFFERENCE_RTOL = 1e-3  # differences of such float32 numbers


def test_the_exact_likelihood_is_that_of_a_dense_jacobian_with_the_spread_of_the_examples():
    model, (images, _) = kept.model(kept.IMAGES), kept.images(40)
    by_hand = np.stack([kept.dense_bits(model, images, 3, draw) for draw in range(2)])
    result = likelihood.measure(model, images, kept.SETTINGS, 3)
    np.testing.assert_allclose(result.mean, by_hand.mean(), rtol=SAME_RTOL)
    np.testing.assert_allclose(
        result.stderr, by_hand.mean(axis=0).std(ddof=1) / np.sqrt(40), rtol=DIFFERENCE_RTOL
    )
    assert (result.estimator, result.unit, result.truncation_bound) == (
        "exact log-determinant",
        "bits/dim",
        0,
    )
    assert (result.num_examples, result.num_dequantisations, result.num_probes) == (40, 2, 1)


def test_an_estimate_is_unbiased_or_said_to_be_biased_beyond(monkeypatch):
    model, points = (
        kept.model(kept.POINTS),
        np.random.default_rng(0).normal(size=(64, 2)).astype(np.float32),
    )
    settings = dataclasses.replace(kept.SETTINGS, num_importance_draws=2)  # of discrete data alone
    exact = likelihood.measure(model, points, settings, 3)
    assert (exact.unit, exact.num_dequantisations, exact.importance) == ("nats", 0, None)
    monkeypatch.setattr(likelihood, "MAX_EXACT_DIMS", 1)
    result = likelihood.measure(model, points, kept.SETTINGS, 3)
    assert result.estimator == "unbiased up to term 26, 8 exact terms and a Poisson(2) tail"
    # the examples are the same: the probes alone differ
    assert 0 < abs(result.mean - exact.mean) < 0.2 * result.stderr
    bound = max(block.bound for block in model.certificate().blocks)
    # two dimensions, two blocks, eight terms
    assert 0 < result.truncation_bound < 2 * 2 * bound**9 / 9 / (1 - bound)
    assert "terms beyond those always computed change it by at most" in str(result)
    assert "biased by at most the truncation bound" in likelihood.described(ir.SeriesLogdet(8))[0]


# A mean over REPEATS estimates lies within so many of its standard errors of its expectation.
SIGNIFICANT = 5.0
EXACT_RTOL = 1e-12  # the same float64 sums in another order
LEVELS, REPEATS, DRAWS = 4, 200, 8
TWO_PIXELS = ir.DensitySpec(
    ir.FlowSpec((2,), (ir.StageSpec(2, hidden=(8, 8)),)),
    transform=ir.Logit(0.05),
    num_levels=LEVELS,
)
VARIATIONAL = dataclasses.replace(
    TWO_PIXELS,
    flow=dataclasses.replace(
        TWO_PIXELS.flow, noise=ir.NoiseSpec(1, (4,), network=(4, 2), window=3)
    ),
)
ALL = (
    np.stack(np.meshgrid(*2 * [np.arange(LEVELS)], indexing="ij"), axis=-1)
    .reshape(-1, 2)
    .astype(np.uint8)
)


def log_probabilities(model, num=48):
    """Log-probabilities of all images by quadrature of the density over their cells."""
    middles = (np.arange(num * LEVELS) + 0.5) / (num * LEVELS)
    points = (
        np.stack(np.meshgrid(middles, middles, indexing="ij"), axis=-1)
        .reshape(-1, 2)
        .astype(np.float32)
    )
    density = np.exp(np.asarray(model.continuous.log_prob(jnp.asarray(points)), np.float64))
    return np.log(density.reshape(LEVELS, num, LEVELS, num).mean(axis=(1, 3)).ravel() / LEVELS**2)


@pytest.mark.parametrize("spec", [TWO_PIXELS, VARIATIONAL])
def test_in_expectation_it_grows_with_the_draws_and_stays_below_the_probabilities(spec):
    model = kept.model(spec)
    exact = log_probabilities(model)
    assert -0.1 < logsumexp(exact) < 1e-3  # some latents are those of no level
    settings = dataclasses.replace(kept.SETTINGS, batch_size=4096, num_importance_draws=DRAWS)
    exactly, images = likelihood.with_estimator(model, settings), np.repeat(ALL, REPEATS, axis=0)
    weights = (
        -likelihood.objective(exactly, images, settings, 0, num_noise=DRAWS, same_probes=True)
        / spec.unit_of_a_nat
    )
    bounds = {
        k: likelihood.log_likelihood_bound(weights[:, :k]).reshape(-1, REPEATS)
        for k in (1, 2, DRAWS)
    }
    means = {k: bound.mean(axis=1) for k, bound in bounds.items()}
    assert means[1].mean() < means[2].mean() < means[DRAWS].mean() < exact.mean()
    for k, bound in bounds.items():
        assert np.all(means[k] < exact + SIGNIFICANT * bound.std(axis=1) / np.sqrt(REPEATS))
        assert logsumexp(means[k]) < 0
    found = likelihood.mean_bound(weights, 1.0, "nats")
    np.testing.assert_allclose(
        found.gain, (means[DRAWS] - weights.reshape(len(ALL), -1).mean(axis=1)).mean(), rtol=1e-9
    )
    measured = likelihood.measure(model, ALL[:4], settings, 1)
    assert measured.bound == spec.bound
    assert measured.importance.mean < measured.mean


def test_estimated_log_determinants_keep_it_a_bound_where_the_plain_formula_is_none():
    rng = np.random.default_rng(0)
    log_weights = rng.normal(size=(1, 6, 1))
    exact = likelihood.log_likelihood_bound(log_weights)
    np.testing.assert_allclose(
        exact, logsumexp(log_weights, axis=1)[:, 0] - np.log(6), rtol=EXACT_RTOL
    )
    estimated = log_weights + rng.normal(size=(20_000, 6, 2))
    found = likelihood.log_likelihood_bound(estimated)
    plain = likelihood.log_likelihood_bound(estimated.mean(axis=2, keepdims=True))
    stderr = found.std() / np.sqrt(len(found))
    assert found.mean() + SIGNIFICANT * stderr < exact < plain.mean() - SIGNIFICANT * stderr
    assert likelihood.mean_bound(estimated, 1.0, "nats").estimation_gap > exact - found.mean()


def test_some_examples_show_what_the_mean_of_all_gains():
    model, (images, _) = kept.model(kept.IMAGES), kept.images(20)
    settings = dataclasses.replace(kept.SETTINGS, num_importance_draws=4, num_importance_examples=8)
    measured = likelihood.measure(model, images, settings, 3)
    rows = np.linspace(0, 19, 8, dtype=int)
    own = likelihood.importance_bound(
        model, images[rows], dataclasses.replace(settings, num_importance_examples=0), 3
    )
    assert own.gain_stderr > 0
    expected = own.of_all(measured.mean, measured.stderr)
    assert measured.importance == expected
    assert (expected.mean, expected.num_examples) == (measured.mean - own.gain, 8)
    assert expected.stderr == np.hypot(measured.stderr, own.gain_stderr)
