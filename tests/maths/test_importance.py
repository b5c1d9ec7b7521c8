"""Importance weights: against closed forms, and tails of known shape."""

import math

import numpy as np
import pytest

from iresnet_jax.maths import importance


@pytest.mark.parametrize("shape", [0.3, 0.5, 1.0])
def test_the_tail_of_pareto_weights_has_their_shape(shape):
    # P(w > t) = t^(-1 / k): the tail is generalised Pareto with shape k above any threshold
    weights = np.random.default_rng(0).uniform(size=100_000) ** -shape
    assert importance.pareto_k(np.log(weights)) == pytest.approx(shape, abs=0.15)


def test_normalising_constant_of_a_gaussian():
    """``q = N(0, 1)`` and ``p = exp(-x^2 / 2.4)``: ``w = c exp(a x^2)``, whose moments are known."""
    x = np.random.default_rng(0).normal(size=50_000)
    found = importance.summarize(-(x**2) / 2.4 + 0.5 * x**2 + 0.5 * math.log(2 * math.pi))
    a = 0.5 - 1 / 2.4
    mean, square = (1 - 2 * a) ** -0.5, (1 - 4 * a) ** -0.5  # of exp(a x^2) and of its square
    assert found.is_reliable
    assert abs(found.log_z - 0.5 * math.log(2.4 * math.pi)) < 4 * found.stderr
    assert found.ess == pytest.approx(mean**2 / square, abs=0.005)
    assert found.stderr == pytest.approx(math.sqrt((square / mean**2 - 1) / len(x)), rel=0.3)


def test_a_proposal_that_is_too_narrow_has_a_heavy_tail():
    x = 0.25 * np.random.default_rng(0).normal(size=10_000)
    assert not importance.summarize(-0.5 * x**2 + 0.5 * (x / 0.25) ** 2).is_reliable


def test_equal_weights():
    found = importance.summarize(np.full(1000, 700.0))
    assert (found.ess, found.log_z, found.stderr, found.pareto_k) == (1.0, 700.0, 0.0, -math.inf)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_one_weight_that_is_no_number_makes_them_unreliable(bad):
    log_weights = np.random.default_rng(0).normal(size=500)
    assert importance.summarize(np.append(log_weights, -math.inf)).is_reliable
    assert not importance.summarize(np.append(log_weights, bad)).is_reliable


def test_few_weights_are_refused():
    with pytest.raises(ValueError, match="at least 100 weights"):
        importance.summarize(np.zeros(99))


def test_weights_beside_which_the_others_vanish_are_unreliable():
    found = importance.summarize(-1e8 * np.random.default_rng(0).exponential(size=10_000))
    assert found.pareto_k == math.inf
    assert not found.is_reliable
