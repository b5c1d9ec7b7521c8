"""The plan of an evaluation: it keeps to its target and costs no more than plans that are easy to think of."""

import math

import numpy as np
import pytest

from iresnet_jax.evaluation import probes
from iresnet_jax.evaluation.probes import PROBES_AT_ONCE, Block, Choice, Sums, cheapest, extrapolated_bias

CURVE = {n: 2.0**-n for n in range(3, 40)}  # bias by number of products
DEAR, CHEAP = 1e5, 30.0  # products of an exact log-determinant
MODELS = {
    "exact is dear": [Block("a", 1.0, DEAR, variance, CURVE) for variance in (0.01, 1.0, 4.0)],
    "exact is cheap": [Block("a", 1.0, CHEAP, variance, CURVE) for variance in (0.01, 1.0, 4.0)],
    "two stages": [
        Block("a", 1.0, DEAR, 1.0, CURVE),
        Block("b", 5.0, 5 * 400.0, 0.2, CURVE),
        Block("b", 5.0, 5 * 90.0, 9.0, CURVE),
    ],
    "not measured": [Block("a", 1.0, 20.0), Block("b", 2.0, 2 * DEAR, 1.0, CURVE)],
}


def cost(choices, blocks):
    return sum(choice.cost(block) for choice, block in zip(choices, blocks, strict=True))


def error(choices, blocks, num_noise):
    used = [(choice, block) for choice, block in zip(choices, blocks, strict=True) if choice.num_steps]
    bias = sum(block.biases[choice.num_steps] for choice, block in used)
    return bias + math.sqrt(sum(block.variance / choice.num_probes for choice, block in used) / num_noise)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("target", "num_noise"), [(0.5, 1), (0.05, 1), (0.05, 4), (1e-4, 1)])
def test_it_meets_the_target_for_no_more_than_exact_or_equal_probes(name, target, num_noise):
    blocks = MODELS[name]
    choices = cheapest(blocks, target, num_noise)
    assert error(choices, blocks, num_noise) <= target
    assert all(choice.num_probes % probes.PROBES_AT_ONCE == 0 for choice in choices)
    assert cost(choices, blocks) <= sum(block.exact for block in blocks)
    for steps in range(3, 40):
        for num_probes in (2**k for k in range(1, 16)):
            equal = [Choice(steps, num_probes) if block.variance is not None else Choice() for block in blocks]
            if error(equal, blocks, num_noise) <= probes.SAFETY * target * 0.6:  # room for its split into bias and error
                assert cost(choices, blocks) <= cost(equal, blocks)


def test_cheap_exact_blocks_are_exact_and_dear_ones_are_not():
    assert all(choice == Choice() for choice in cheapest(MODELS["exact is cheap"], 0.05, 1))
    assert all(choice.num_steps for choice in cheapest(MODELS["exact is dear"], 0.05, 1))
    assert [bool(choice.num_steps) for choice in cheapest(MODELS["not measured"], 0.05, 1)] == [False, True]


def test_more_steps_are_worth_it_only_where_the_bias_is_the_obstacle():
    slow = {n: 1.0 for n in range(3, 14)}
    blocks = [Block("a", 1.0, DEAR, 1.0, slow), Block("b", 1.0, CHEAP, 1.0, slow), Block("c", 1.0, DEAR, 1.0, CURVE)]
    assert cheapest(blocks, 0.05, 1)[0] == Choice()
    assert probes.worth_more_steps(blocks, 13, 0.05, 1) == [0]


@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.8, 0.98, -0.9])
def test_the_bias_of_a_geometric_sequence_is_not_underestimated(ratio):
    value = [1 - ratio**n for n in range(20)]
    for n in range(3, 20):
        estimate = extrapolated_bias(abs(value[n] - value[n - 1]), abs(value[n - 1] - value[n - 2]), 0.0)
        assert estimate >= (1 - 1e-9) * abs(1 - value[n])


def test_sequences_that_do_not_converge_have_no_bias_estimate_and_rounding_is_no_change():
    assert extrapolated_bias(1.0, 0.9, 1e-6) == math.inf
    assert extrapolated_bias(1e-7, 1e-9, 1e-6) == 1e-6


def add_draws(sums, num_draws, spread, seed=0):
    """Adds draws to two blocks; values of the first are too large by .04, .02 and .01 in subspaces of 3, 4 and 5 dimensions."""
    rng = np.random.default_rng(seed)
    num, num_noise = sums.known.shape
    for b, offset in enumerate((0.01, 0.0)):
        for noise in list(range(num_noise)) * num_draws:
            values = 3 + rng.normal(0, spread, (num, 1, PROBES_AT_ONCE)) + offset * np.array([4, 2, 1]).reshape(1, 3, 1)
            sums.add(b, np.arange(num), noise, values.astype(np.float32), np.full((num, PROBES_AT_ONCE), 7.0))
        sums.num_draws[b] += num_draws


def test_errors_are_those_of_the_means_over_probes_and_noise():
    sums = Sums([Choice(5, 8), Choice(5, 8)], (2000, 2))
    add_draws(sums, 4, spread=0.5)
    expected = 0.5 * math.sqrt(2 / (8 * 2))  # two blocks, 8 probes, 2 noise draws
    assert sums.stderr() == pytest.approx(expected, rel=0.05)
    assert np.std(sums.log_prob().mean(axis=1) - 6.01) == pytest.approx(expected, rel=0.05)
    assert sums.bias() == pytest.approx(0.01, rel=1e-3)
    assert sums.bias_bound() == pytest.approx(14)


def test_missing_draws_meet_the_target_and_are_none_if_it_is_out_of_reach():
    sums = Sums([Choice(5, 4), Choice(5, 4)], (500, 1))
    add_draws(sums, 2, spread=0.5)
    missing = sums.missing_draws(0.1)
    assert min(missing) > 0
    add_draws(sums, missing[0], spread=0.5, seed=1)
    assert sums.bias() + sums.stderr() <= 0.1
    assert sums.missing_draws(0.1) == [0, 0]
    assert sums.missing_draws(0.005) == [0, 0]  # less than the bias
