"""Standard errors and biases from sums over probes, against sequences whose limits are known."""

import math

import numpy as np
import pytest

from iresnet_jax.evaluation.allocation import PROBES_AT_ONCE, Choice
from iresnet_jax.evaluation.probe_sums import Sums, extrapolated_bias


@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.8, 0.98, -0.9])
def test_the_bias_of_a_geometric_sequence_is_not_underestimated(ratio):
    value = [1 - ratio**n for n in range(20)]
    for n in range(3, 20):
        estimate = extrapolated_bias(abs(value[n] - value[n - 1]), abs(value[n - 1] - value[n - 2]), 0.0)
        assert estimate >= (1 - 1e-9) * abs(1 - value[n])


def test_sequences_that_do_not_converge_have_no_bias_estimate_and_rounding_is_no_change():
    assert extrapolated_bias(1.0, 0.9, 1e-6) == math.inf
    assert extrapolated_bias(1e-7, 1e-9, 1e-6) == 1e-6


def draws(sums, num_draws, spread, seed=0):
    """Adds draws to two blocks; values of the first are too large by .04, .02 and .01 in subspaces of 3, 4 and 5 dimensions."""
    rng = np.random.default_rng(seed)
    num, num_noise = sums.known.shape
    for block, offset in zip(sums.blocks, (0.01, 0.0), strict=True):
        for _ in range(num_draws):
            for noise in range(num_noise):
                values = 3 + rng.normal(0, spread, (num, 1, PROBES_AT_ONCE)) + offset * np.array([4, 2, 1]).reshape(1, 3, 1)
                block.add(np.arange(num), noise, values.astype(np.float32), np.full((num, PROBES_AT_ONCE), 7.0))
        block.num_draws += num_draws


def test_errors_are_those_of_the_means_over_probes_and_noise():
    sums = Sums([Choice(5, 8), Choice(5, 8)], (2000, 2))
    draws(sums, 4, spread=0.5)
    found = sums.log_prob()
    expected = 0.5 * math.sqrt(2 / (8 * 2))  # two blocks, 8 probes, 2 noise draws
    assert sums.stderr() == pytest.approx(expected, rel=0.05)
    assert np.std(found.mean(axis=1) - 6.01) == pytest.approx(expected, rel=0.05)
    assert sums.bias() == pytest.approx(0.01, rel=1e-3)
    assert sums.bias_bound() == pytest.approx(14)


def test_missing_draws_meet_the_target_and_are_none_if_it_is_out_of_reach():
    sums = Sums([Choice(5, 4), Choice(5, 4)], (500, 1))
    draws(sums, 2, spread=0.5)
    missing = sums.missing_draws(0.1)
    assert min(missing) > 0
    draws(sums, missing[0], spread=0.5, seed=1)
    assert sums.bias() + sums.stderr() <= 0.1
    assert sums.missing_draws(0.1) == [0, 0]
    assert sums.missing_draws(0.005) == [0, 0]  # less than the bias
