"""Decisions that all processes have to take after the same step, though one of them alone knows the reason.

A signal reaches one process, and clocks differ. So each process hands its wishes to the step beside its share of the batch, the
step adds them up over all devices, and every process reads the sum of the same step: `DELAY` steps later, when it is there
without waiting. The sum travels with those of the gradients.
"""

import collections
import enum
import signal
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import lax

from iresnet_jax.training import parallel
from iresnet_jax.training.parallel import AXIS

DELAY = 2  # steps


class Wish(enum.IntEnum):
    """What a process may wish for, by its place in the sum."""

    SIGINT = 0
    SIGTERM = 1
    SAVE = 2


class Agreement:
    """The wishes of all processes; in a process on its own they are granted at once.

    Args:
        num_processes: Their number, if it is not that of this run.
    """

    def __init__(self, num_processes: int | None = None):
        self._sums: collections.deque[Any] = collections.deque()
        self._is_shared = (num_processes or parallel.num_processes()) > 1

    def wrap(self, step: Callable[[Any, Any], tuple[Any, Any]]) -> Callable[[Any, Any], tuple[Any, Any]]:
        """A training step that takes wishes too and adds them up, for `parallel.parallelize`."""

        def with_wishes(state: Any, batch: tuple[Any, Any]) -> tuple[Any, Any]:
            examples, wishes = batch
            state, metrics = step(state, examples)
            return state, (metrics, lax.psum(wishes, AXIS))

        return with_wishes if self._is_shared else step

    def take(self, step: Callable[[Any, Any], tuple[Any, Any]], state: Any, batch: Any, wishes: set[Wish]) -> tuple[Any, Any]:
        """The state and metrics of a step that `wrap` made and `parallel.parallelize` compiled."""
        if not self._is_shared:
            return step(state, batch)
        own = np.zeros((jax.local_device_count(), len(Wish)), np.float32)
        own[:, [*wishes]] = 1
        state, (metrics, total) = step(state, (batch, own))
        self._sums.append(total)
        return state, metrics

    def granted(self, wishes: set[Wish]) -> set[Wish]:
        """What all processes do now."""
        if not self._is_shared:
            return wishes
        if len(self._sums) <= DELAY:
            return set()
        return {wish for wish, total in zip(Wish, np.asarray(self._sums.popleft()), strict=True) if total > 0}


def wish_of(received: signal.Signals | None) -> set[Wish]:
    """The wish to stop of a process that a signal has reached."""
    return set() if received is None else {Wish[received.name]}


def signal_of(granted: set[Wish]) -> signal.Signals | None:
    """The signal that some process has received."""
    return next((signal.Signals[wish.name] for wish in (Wish.SIGTERM, Wish.SIGINT) if wish in granted), None)
