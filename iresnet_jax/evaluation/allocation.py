"""The cheapest way to the log-determinants of a flow at a stated accuracy: exact or estimated, block by block.

A block that is estimated by ``p`` probes of ``n`` products each has the variance ``s^2 / p`` and costs ``p n``. Over blocks,
the least cost of a total variance is ``(sum_b s_b sqrt(n_b))^2 / variance``, with ``p_b`` proportional to ``s_b / sqrt(n_b)``
(Neyman 1934). Costs are operations, as products with the Jacobian of a block count different ones.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

PROBES_AT_ONCE = 2  # the least number that has a variance
BIAS_SHARES = (0.05, 0.1, 0.2, 0.3, 0.5)  # of the target that the planned bias may take, all tried
SAFETY = 0.9  # of the target that the plan uses, as its variances and biases are estimates of few examples


@dataclass(frozen=True)
class Block:
    """What is known about a block.

    Attributes:
        stage: Its stage.
        product: Operations of a product with its Jacobian.
        exact: Operations of its exact log-determinant.
        variance: Variance of an estimate by one probe, mean over examples; None if not measured: the block is exact.
        biases: Estimated bias, root mean square over examples, by number of products.
    """

    stage: str
    product: float
    exact: float
    variance: float | None = None
    biases: Mapping[int, float] | None = None


@dataclass(frozen=True)
class Choice:
    """How a block is evaluated: exactly if both are 0.

    Attributes:
        num_steps: Products a probe.
        num_probes: Probes, a multiple of `PROBES_AT_ONCE`.
    """

    num_steps: int = 0
    num_probes: int = 0

    def cost(self, block: Block) -> float:
        """Operations of an example for each noise draw."""
        return self.num_steps * self.num_probes * block.product if self.num_steps else block.exact


def cheapest(blocks: Sequence[Block], target: float, num_noise: int) -> list[Choice]:
    """How to evaluate every block such that ``bias + standard error <= target`` of the mean over noise draws.

    Args:
        blocks: The blocks; all are exact if it is cheapest.
        target: Largest error in nats, root mean square over examples.
        num_noise: Noise draws of an example, each with its own probes.
    """
    plans = [[Choice() for _ in blocks]]
    for share in BIAS_SHARES:
        bias, stderr = share * SAFETY * target, (1 - share) * SAFETY * target
        plans.append(_with_steps(blocks, _enough_steps(blocks, bias), num_noise * stderr**2))
    return min(plans, key=lambda plan: sum(choice.cost(block) for choice, block in zip(plan, blocks, strict=True)))


def worth_more_steps(blocks: Sequence[Block], num_steps: int, target: float, num_noise: int) -> list[int]:
    """Places of the measured blocks that `cheapest` leaves exact and would not if so many products had no bias."""
    chosen = cheapest(blocks, target, num_noise)
    steps = {block.stage: num_steps for block in blocks}
    hoped = _with_steps(blocks, steps, num_noise * (SAFETY * target) ** 2)
    return [b for b in range(len(blocks)) if hoped[b].num_steps and not chosen[b].num_steps]


def _with_steps(blocks, steps, variance):
    """Probes for the blocks of the stages whose number of products is known; exact where that is cheaper."""
    estimated = [b for b, block in enumerate(blocks) if block.stage in steps and block.variance is not None]
    while True:
        choices, plan = _allocate(blocks, estimated, steps, variance), [Choice() for _ in blocks]
        for b, choice in choices.items():
            plan[b] = choice
        savings = {b: choice.cost(blocks[b]) - blocks[b].exact for b, choice in choices.items()}
        worst = max(savings, key=lambda b: savings[b], default=None)
        if worst is None or savings[worst] <= 0:
            return plan
        estimated.remove(worst)  # which leaves the others more of the variance


def _enough_steps(blocks, bias):
    """By stage, the least number of products for a bias that is this stage's share by its number of blocks."""
    steps, measured = {}, [block for block in blocks if block.biases]
    for stage in {block.stage for block in measured}:
        own = [block.biases for block in measured if block.stage == stage]
        share = bias * len(own) / len(measured)
        enough = [n for n in own[0] if sum(biases[n] for biases in own) <= share]
        if enough:
            steps[stage] = min(enough)
    return steps


def _allocate(blocks, estimated, steps, variance):
    scale = sum(math.sqrt(blocks[b].variance * steps[blocks[b].stage] * blocks[b].product) for b in estimated) / variance
    choices = {}
    for b in estimated:
        num_steps = steps[blocks[b].stage]
        ideal = math.sqrt(blocks[b].variance / (num_steps * blocks[b].product)) * scale
        rounds = max(math.ceil(ideal / PROBES_AT_ONCE), 1)
        choices[b] = Choice(num_steps, rounds * PROBES_AT_ONCE)
    return choices
