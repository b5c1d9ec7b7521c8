"""The likelihood of test data against a dense Jacobian, and by an unbiased estimate beyond the
dimensions of exactness.
"""

import kept
import numpy as np
import pytest

from iresnet_jax.evaluation import likelihood
from iresnet_jax.maths.logdet_series import SeriesLogdet

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
    with pytest.raises(ValueError, match="at least 2 examples, got 1"):
        likelihood.measure(model, images[:1], kept.SETTINGS, 3)


def test_an_estimate_is_unbiased_or_said_to_be_biased_beyond(monkeypatch):
    model, points = (
        kept.model(kept.POINTS),
        np.random.default_rng(0).normal(size=(64, 2)).astype(np.float32),
    )
    exact = likelihood.measure(model, points, kept.SETTINGS, 3)
    assert (exact.unit, exact.num_dequantisations) == ("nats", 0)
    monkeypatch.setattr(likelihood, "MAX_EXACT_DIMS", 1)
    result = likelihood.measure(model, points, kept.SETTINGS, 3)
    assert result.estimator == "unbiased up to term 26, 8 exact terms and a Poisson(2) tail"
    # the examples are the same: the probes alone differ
    assert 0 < abs(result.mean - exact.mean) < 0.2 * result.stderr
    bound = max(block.bound for block in model.certificate().blocks)
    # two dimensions, two blocks, eight terms
    assert 0 < result.truncation_bound < 2 * 2 * bound**9 / 9 / (1 - bound)
    assert "terms beyond those always computed change it by at most" in str(result)
    assert "biased by at most the truncation bound" in likelihood.described(SeriesLogdet(8))[0]
