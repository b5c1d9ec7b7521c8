r"""The probes of an evaluation at a stated accuracy: how many of them a block gets, and what they add up to.

A block that is estimated by ``p`` probes of ``n`` products each has the variance ``s^2 / p`` and costs ``p n``. Over blocks,
the least cost of a total variance is ``(sum_b s_b sqrt(n_b))^2 / variance``, with ``p_b`` proportional to ``s_b / sqrt(n_b)``
(Neyman 1934). Costs are operations, as products with the Jacobian of a block count different ones.

With ``v_n`` the value of an ``n``-dimensional Krylov subspace, its bias is estimated as

    d_1 max(1, r / (1 - r)),    r = d_1 / d_2,    d_1 = rms |v_n - v_(n-1)|,    d_2 = rms |v_(n-1) - v_(n-2)|

which is the rest of a geometric series and never less than the last change, or as the rigorous bound where that is smaller.
Means over probes and noise draws are taken before the root mean square over examples; what remains of the noise of few probes
makes the estimate larger. Biases of blocks are added.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

PROBES_AT_ONCE = 2  # the least number that has a variance
BIAS_SHARES = (0.05, 0.1, 0.2, 0.3, 0.5)  # of the target that the planned bias may take, all tried
MARGIN = 1.05  # on the number of further probes, as the variance that it is computed from is an estimate
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


def extrapolated_bias(last_change: float, change_before: float, rounding: float) -> float:
    """The rest of a sequence whose changes keep shrinking at the ratio of the last two; at least the last change.

    Args:
        last_change: Size of the last change.
        change_before: Size of the change before.
        rounding: Size up to which a change is noise; the result is then that.
    """
    if last_change <= rounding:
        return rounding
    ratio = last_change / max(change_before, rounding)
    return last_change * max(1.0, ratio / (1 - ratio)) if ratio < 1 else math.inf


def rms(values: Float[np.ndarray, "..."]) -> float:
    """Root mean square."""
    return float(np.sqrt(np.mean(np.square(values))))


class Sums:
    """Sums over the probes of every block, by example and noise draw; those of an exact block stay 0.

    Attributes:
        known: Log-likelihood without the log-determinants of estimated blocks, by example and noise draw.
        num_draws: Draws of `PROBES_AT_ONCE` probes that an example has had for each noise draw, by block.
    """

    def __init__(self, choices: Sequence[Choice], shape: tuple[int, int]):
        self.known, self.num_draws = np.zeros(shape), [0 for _ in choices]
        self._estimated = [b for b, choice in enumerate(choices) if choice.num_steps]
        self._total, self._squares, self._bound = np.zeros((3, len(choices), *shape))
        self._changes = np.zeros((2, len(choices), *shape))  # the last one, from one dimension less, and the one before

    def num_probes(self, block: int) -> int:
        """Probes of each example and noise draw."""
        return self.num_draws[block] * PROBES_AT_ONCE

    def add(
        self,
        block: int,
        rows: Int[np.ndarray, " m"],
        noise_draw: int,
        values: Float[np.ndarray, "m 3 p"],
        bounds: Float[np.ndarray, "m p"],
    ) -> None:
        """Adds the probes of a draw: values of subspaces of the last three numbers of dimensions, and bounds of the last."""
        values = values.astype(np.float64)
        self._total[block, rows, noise_draw] += values[:, -1].sum(axis=1)
        self._squares[block, rows, noise_draw] += (values[:, -1] ** 2).sum(axis=1)
        self._bound[block, rows, noise_draw] += bounds.astype(np.float64).sum(axis=1)
        for i in range(2):
            self._changes[i, block, rows, noise_draw] += (values[:, -1 - i] - values[:, -2 - i]).sum(axis=1)

    def log_prob(self) -> Float[np.ndarray, "n s"]:
        """Log-likelihood in nats."""
        return self.known + sum((self._total[b] / self.num_probes(b) for b in self._estimated), np.zeros(()))

    def stderr(self) -> float:
        """Standard error over probes of the mean over noise draws, root mean square over examples, in nats."""
        variance = 0.0
        for b in self._estimated:
            num = self.num_probes(b)
            spread = (self._squares[b] - self._total[b] ** 2 / num) / (num - 1)
            variance += float(np.maximum(spread, 0).mean()) / num
        return math.sqrt(variance / self.known.shape[1])

    def bias(self) -> float:
        """Estimate of the bias in nats, root mean square over examples; biases of blocks are added."""
        found = 0.0
        for b in self._estimated:
            last, before = (rms(change[b].mean(axis=1)) / self.num_probes(b) for change in self._changes)
            rounding = float(np.finfo(np.float32).eps) * rms(self._total[b]) / self.num_probes(b)
            found += min(extrapolated_bias(last, before, rounding), self._bias_bound(b))
        return found

    def bias_bound(self) -> float:
        """Bound of the bias in nats for these probes, guaranteed if the Lipschitz constants are."""
        return sum(map(self._bias_bound, self._estimated), 0.0)

    def _bias_bound(self, block: int) -> float:
        return rms(self._bound[block].mean(axis=1)) / self.num_probes(block)

    def missing_draws(self, target: float) -> list[int]:
        """Further draws of every block that are expected to meet the target; none if it is met or biases leave no room."""
        room, stderr = target - self.bias(), self.stderr()
        if room <= 0 or stderr <= room:
            return [0 for _ in self.num_draws]
        more = MARGIN * (stderr / room) ** 2 - 1
        return [math.ceil(more * num) for num in self.num_draws]
