"""The likelihood of test data against a dense Jacobian, the parts of its standard error, and its check by an estimate."""

import dataclasses

import kept
import numpy as np
import pytest

from iresnet_jax.evaluation import likelihood
from iresnet_jax.evaluation.likelihood import SUSPICIOUS_Z, checked, compare, split_error

# Estimates of variances from thousands of draws scatter by a few percent; a part that absorbs another one is off by far more.
PARTS_RTOL = 0.1
EXACT_RTOL = 1e-12  # the same float64 sums in another order
SAME_RTOL = 1e-5  # the same maths by another route, float32
DIFFERENCE_RTOL = 1e-3  # differences of such float32 numbers


def nested_draws(data, noise, probes, *, n=4000, s=4, p=3, seed=0):
    """Values whose standard deviations between examples, noise draws and probe draws are known; probes' vary by example."""
    rng = np.random.default_rng(seed)
    spread = rng.uniform(0.5, 1.5, (n, 1, 1))
    spread *= probes / np.sqrt(np.mean(spread**2))
    parts = rng.normal(0, data, (n, 1, 1)), rng.normal(0, noise, (n, s, 1)), spread * rng.normal(size=(n, s, p))
    return 3 + sum(parts)


def check_parts(split_error, data, noise, probes):
    n, s, p = 4000, 4, 3
    result = split_error(nested_draws(data, noise, probes))
    assert abs(result.mean - 3) < 5 * result.stderr
    np.testing.assert_allclose(result.stderr_data, data / np.sqrt(n), rtol=PARTS_RTOL)
    np.testing.assert_allclose(result.stderr_dequantisation, noise / np.sqrt(s * n), rtol=PARTS_RTOL)
    np.testing.assert_allclose(result.stderr_probes, probes / np.sqrt(s * p * n), rtol=PARTS_RTOL)
    total = data**2 / n + noise**2 / (s * n) + probes**2 / (s * p * n)
    np.testing.assert_allclose(result.stderr, np.sqrt(total), rtol=PARTS_RTOL)


CASES = [(1.0, 0.5, 0.8), (0.2, 0.6, 1.0), (1.0, 1.0, 1.0)]


@pytest.mark.parametrize("parts", CASES)
def test_parts_of_the_standard_error_are_recovered(parts):
    check_parts(split_error, *parts)


def test_a_split_that_forgets_to_subtract_the_probes_is_rejected():
    def naive(values):
        right = split_error(values)
        noise = np.sqrt(values.mean(axis=2).var(axis=1, ddof=1).mean() / (values.shape[1] * len(values)))
        return dataclasses.replace(right, stderr_dequantisation=float(noise))

    with pytest.raises(AssertionError):
        check_parts(naive, *CASES[0])


def test_parts_add_up_to_the_standard_error_of_independent_examples_and_none_becomes_negative():
    values = nested_draws(1.0, 0.5, 0.8, n=50)
    result = split_error(values)
    np.testing.assert_allclose(result.stderr, values.mean(axis=(1, 2)).std(ddof=1) / np.sqrt(50), rtol=EXACT_RTOL)
    squares = result.stderr_data**2 + result.stderr_probes**2 + result.stderr_dequantisation**2
    np.testing.assert_allclose(result.stderr**2, squares, rtol=EXACT_RTOL)
    without_noise = split_error(nested_draws(1.0, 0.0, 1.0, n=20, seed=3))
    assert 0 <= without_noise.stderr_dequantisation < without_noise.stderr_probes


def test_what_one_draw_cannot_tell_is_none_and_stays_in_the_total():
    values = nested_draws(0.1, 0.5, 0.8, s=1, p=1)
    result = split_error(values)
    assert (result.stderr_probes, result.stderr_dequantisation) == (None, None)
    np.testing.assert_allclose(result.stderr, values.std(ddof=1) / np.sqrt(len(values)), rtol=EXACT_RTOL)
    with pytest.raises(ValueError, match="at least 2 examples, got 1"):
        split_error(values[:1])


def test_z_of_an_estimate_is_its_difference_in_standard_errors_of_the_difference():
    rng = np.random.default_rng(0)
    exact = rng.normal(2.0, 5.0, 400)  # the spread of the examples cancels
    estimated = exact + rng.normal(0.03, 0.1, 400)
    found = compare(estimated, exact)
    difference = estimated - exact
    np.testing.assert_allclose(found.mean, estimated.mean(), rtol=EXACT_RTOL)
    np.testing.assert_allclose(found.difference, difference.mean(), rtol=EXACT_RTOL)
    np.testing.assert_allclose(found.z, difference.mean() / (difference.std(ddof=1) / 20), rtol=1e-4)  # and rounding
    assert abs(compare(exact + 1e-9, exact).z) < 0.1  # rounding of float32 is no difference


def test_chance_is_not_said_and_a_bias_is():
    """A false alarm for ten examples, whose z have heavy tails, and a bias of 6 standard errors, in 4000 evaluations."""
    rng = np.random.default_rng(0)

    def alarms(bias, num_examples):
        zs = [checked(lambda _: rng.normal(bias, 1, num_examples), np.zeros(num_examples), 4).z for _ in range(4000)]
        return np.mean(np.abs(zs) > SUSPICIOUS_Z)

    assert alarms(0.0, 10) == 0
    assert alarms(6 / np.sqrt(360), 360) > 0.9


def test_the_exact_likelihood_is_the_headline_up_to_the_dimensions_where_it_is_affordable():
    model, (images, _) = kept.model(kept.IMAGES), kept.images(40)
    by_hand = np.stack([kept.dense_bits(model, images, 3, draw) for draw in range(2)])
    result, log_prob = likelihood.measure(model, images, kept.SETTINGS, 3)
    np.testing.assert_allclose(-log_prob * kept.IMAGES.unit_of_a_nat, by_hand.mean(axis=0), rtol=SAME_RTOL)
    np.testing.assert_allclose(result.mean, by_hand.mean(), rtol=SAME_RTOL)
    assert (result.estimator, result.unit) == ("exact log-determinant", "bits/dim")
    assert (result.truncation_bound, result.stderr_probes) == (0, 0)
    assert (result.num_examples, result.num_dequantisations, result.num_probes) == (40, 2, 1)
    np.testing.assert_allclose(result.stderr, by_hand.mean(axis=0).std(ddof=1) / np.sqrt(40), rtol=DIFFERENCE_RTOL)
    noise = np.sqrt(by_hand.var(axis=0, ddof=1).mean() / (2 * 40))
    np.testing.assert_allclose(result.stderr_dequantisation, noise, rtol=DIFFERENCE_RTOL)
    assert 0 < result.stderr_dequantisation < result.stderr_data
    estimate = result.estimate
    assert abs(estimate.z) < SUSPICIOUS_Z
    assert estimate.difference != 0
    np.testing.assert_allclose(estimate.mean - estimate.difference, by_hand[0].mean(), rtol=SAME_RTOL)


def test_an_estimate_is_the_headline_beyond(monkeypatch):
    model, points = kept.model(kept.POINTS), np.random.default_rng(0).normal(size=(64, 2)).astype(np.float32)
    exact = likelihood.measure(model, points, kept.SETTINGS, 3).summary
    assert (exact.unit, exact.num_dequantisations, exact.stderr_dequantisation) == ("nats", 0, 0)
    assert "noise" not in str(exact)  # continuous data have none
    monkeypatch.setattr(likelihood, "MAX_EXACT_DIMS", 1)
    result = likelihood.measure(model, points, kept.SETTINGS, 3).summary
    assert result.estimator == "unbiased up to term 26, 8 exact terms and a Poisson(2) tail"
    assert result.estimate is None
    assert abs(result.mean - exact.mean) < 5 * result.stderr_probes
    assert 0 < result.stderr_probes < result.stderr_data
    bound = max(block.bound for block in model.certificate().blocks)
    assert 0 < result.truncation_bound < 2 * 2 * bound**9 / 9 / (1 - bound)  # two dimensions, two blocks, eight terms
