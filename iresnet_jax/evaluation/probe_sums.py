r"""What the probes of an evaluation add up to: log-likelihoods, their standard errors, and estimates of their biases.

With ``v_n`` the value of an ``n``-dimensional Krylov subspace, its bias is estimated as

    d_1 max(1, r / (1 - r)),    r = d_1 / d_2,    d_1 = rms |v_n - v_(n-1)|,    d_2 = rms |v_(n-1) - v_(n-2)|

which is the rest of a geometric series and never less than the last change, or as the rigorous bound where that is smaller.
Means over probes and noise draws are taken before the root mean square over examples; what remains of the noise of few probes
makes the estimate larger. Biases of blocks are added.
"""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from iresnet_jax.evaluation.allocation import PROBES_AT_ONCE, Choice

MARGIN = 1.05  # on the number of further probes, as the variance that it is computed from is an estimate


class BlockSums:
    """Sums over the probes of one block, by example and noise draw; they stay 0 for an exact block."""

    def __init__(self, choice: Choice, shape: tuple[int, int]):
        self.choice, self.num_draws = choice, 0
        self._total, self._squares, self._bound = np.zeros(shape), np.zeros(shape), np.zeros(shape)
        self._changes = np.zeros((2, *shape))  # the last one, from a subspace of one dimension less, and the one before

    @property
    def num_probes(self) -> int:
        """Probes of each example and noise draw."""
        return self.num_draws * PROBES_AT_ONCE

    def add(
        self,
        rows: Int[np.ndarray, " m"],
        noise_draw: int,
        values: Float[np.ndarray, "m 3 p"],
        bounds: Float[np.ndarray, "m p"],
    ) -> None:
        """Adds the probes of a draw: values of subspaces of the last three numbers of dimensions, and bounds of the last."""
        values = values.astype(np.float64)
        self._total[rows, noise_draw] += values[:, -1].sum(axis=1)
        self._squares[rows, noise_draw] += (values[:, -1] ** 2).sum(axis=1)
        for i in range(2):
            self._changes[i, rows, noise_draw] += (values[:, -1 - i] - values[:, -2 - i]).sum(axis=1)
        self._bound[rows, noise_draw] += bounds.astype(np.float64).sum(axis=1)

    def mean(self) -> Float[np.ndarray, "n s"]:
        """The log-determinant."""
        return self._total / self.num_probes

    def variance(self) -> float:
        """Variance of the mean over probes, mean over examples and noise draws."""
        spread = (self._squares - self._total**2 / self.num_probes) / (self.num_probes - 1)
        return float(np.maximum(spread, 0).mean()) / self.num_probes

    def bias(self) -> float:
        """Estimate of the bias in nats, root mean square over examples."""
        last, before = (rms(change.mean(axis=1)) / self.num_probes for change in self._changes)
        rounding = float(np.finfo(np.float32).eps) * rms(self.mean())
        return min(extrapolated_bias(last, before, rounding), self.bias_bound())

    def bias_bound(self) -> float:
        """Bound of the bias for these probes, guaranteed if the Lipschitz constant is."""
        return rms(self._bound.mean(axis=1)) / self.num_probes


def extrapolated_bias(last_change: float, change_before: float, rounding: float) -> float:
    """What is left of a sequence whose changes go on to shrink at the ratio of the last two, at least the last change.

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
    """All that has been computed for some examples and noise draws.

    Attributes:
        known: Log-likelihood without the log-determinants of estimated blocks.
        blocks: The sums of every block.
    """

    def __init__(self, choices: Sequence[Choice], shape: tuple[int, int]):
        self.known = np.zeros(shape)
        self.blocks = [BlockSums(choice, shape) for choice in choices]

    @property
    def _estimated(self) -> list[BlockSums]:
        return [block for block in self.blocks if block.choice.num_steps]

    def log_prob(self) -> Float[np.ndarray, "n s"]:
        """Log-likelihood in nats."""
        return self.known + sum((block.mean() for block in self._estimated), np.zeros(()))

    def stderr(self) -> float:
        """Standard error over probes of the mean over noise draws, root mean square over examples, in nats."""
        return math.sqrt(sum((block.variance() for block in self._estimated), 0.0) / self.known.shape[1])

    def bias(self) -> float:
        """Estimate of the bias in nats."""
        return sum((block.bias() for block in self._estimated), 0.0)

    def bias_bound(self) -> float:
        """Bound of the bias in nats."""
        return sum((block.bias_bound() for block in self._estimated), 0.0)

    def missing_draws(self, target: float) -> list[int]:
        """Further draws of every block that are expected to meet the target; none if it is met or biases leave no room."""
        room, stderr = target - self.bias(), self.stderr()
        if room <= 0 or stderr <= room:
            return [0 for _ in self.blocks]
        more = MARGIN * (stderr / room) ** 2 - 1
        return [math.ceil(more * block.num_draws) for block in self.blocks]
