"""The plan of an evaluation: it keeps to its target and costs no more than plans that are easy to think of."""

import math

import pytest

from iresnet_jax.evaluation import allocation
from iresnet_jax.evaluation.allocation import Block, Choice, cheapest

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
    assert all(choice.num_probes % allocation.PROBES_AT_ONCE == 0 for choice in choices)
    assert cost(choices, blocks) <= sum(block.exact for block in blocks)
    for steps in range(3, 40):
        for probes in (2**k for k in range(1, 16)):
            equal = [Choice(steps, probes) if block.variance is not None else Choice() for block in blocks]
            if error(equal, blocks, num_noise) <= allocation.SAFETY * target * 0.6:  # room for its split into bias and error
                assert cost(choices, blocks) <= cost(equal, blocks)


def test_cheap_exact_blocks_are_exact_and_dear_ones_are_not():
    assert all(choice == Choice() for choice in cheapest(MODELS["exact is cheap"], 0.05, 1))
    assert all(choice.num_steps for choice in cheapest(MODELS["exact is dear"], 0.05, 1))
    assert [bool(choice.num_steps) for choice in cheapest(MODELS["not measured"], 0.05, 1)] == [False, True]


def test_more_steps_are_worth_it_only_where_the_bias_is_the_obstacle():
    slow = {n: 1.0 for n in range(3, 14)}
    blocks = [Block("a", 1.0, DEAR, 1.0, slow), Block("b", 1.0, CHEAP, 1.0, slow), Block("c", 1.0, DEAR, 1.0, CURVE)]
    assert cheapest(blocks, 0.05, 1)[0] == Choice()
    assert allocation.worth_more_steps(blocks, 13, 0.05, 1) == [0]
