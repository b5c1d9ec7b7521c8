"""Time of a training run: how long it has trained, how many updates a limit allows, and when validations are due."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator

from iresnet_jax.training import parallel

VALIDATIONS = 20  # of a run, where nothing else is said
LONGEST = 2**31 - 1  # updates, which a state can count
SOON = 5  # steps after which a run with a time limit first estimates its length
EARLY = 0.1  # share of the time for steps before which a run that has a number of steps estimates no other


class Clock:
    """Clocks of a run, which start when it is made. Processes of one run decide by the length that they agree on.

    Args:
        minutes: Limit on the time of training; 0 is none.
        first_step: Updates that led to the state that the run goes on from.
        most_steps: Largest number of updates.
        seconds_before: Seconds of training that led to that state.
        seconds_of_steps: Longest time from the end of the first step on, whatever compiling takes.
        agree: ``estimated length -> length`` that counts, the same in all processes of a run.
    """

    def __init__(
        self,
        minutes: float | int,
        *,
        first_step: int,
        most_steps: float | int,
        seconds_before: float | int,
        seconds_of_steps: float | int,
        agree: Callable[[int], int],
    ):
        self._minutes, self._first_step, self._most_steps = minutes, first_step, most_steps
        self._limit_s, self._seconds_of_steps, self._agree = 60 * minutes or math.inf, seconds_of_steps, agree
        self._seconds_before, self._validation_s, self._has_validated = seconds_before, 0.0, False
        self._began = self._steps_began = self._validated_at = time.monotonic()
        self._estimate = math.inf  # of the updates that the limit allows

    @property
    def elapsed_s(self) -> float:
        """Seconds of training so far."""
        return self._seconds_before + time.monotonic() - self._began

    @property
    def has_limit(self) -> bool:
        """Whether time may end the run."""
        return math.isfinite(self._limit_s)

    def begin_steps(self) -> float:
        """Starts the time of steps, at the end of the first one; the seconds that it took, compilation included."""
        self._steps_began = self._validated_at = time.monotonic()
        self._limit_s = min(self._limit_s, self.elapsed_s + self._seconds_of_steps)
        return self._steps_began - self._began

    @contextlib.contextmanager
    def validation(self) -> Iterator[None]:
        """Measures the time of a validation, the body of ``with``; the first one compiles and does not count."""
        began = time.monotonic()
        yield
        self._validated_at = time.monotonic()
        self._validation_s = self._validated_at - began if self._has_validated else 0.0
        self._has_validated = True

    def is_over(self, step: int) -> bool:
        """Whether the limit leaves no more than a validation."""
        if parallel.num_processes() > 1:
            return step >= self._estimate
        return self.elapsed_s + self._validation_s >= self._limit_s

    def is_validation_due(self, step: int, validated_step: int) -> bool:
        """Whether a twentieth of the time has passed since the last validation."""
        if parallel.num_processes() > 1:
            return step - max(validated_step, self._first_step) > self._estimate / VALIDATIONS
        whole = 60 * self._minutes or self._limit_s  # of a shorter run, those of its steps are enough
        return time.monotonic() - self._validated_at > whole / VALIDATIONS

    def is_estimate_due(self, step: int) -> bool:
        """Whether the length of the run should be estimated now, before the first line of the log."""
        return self.has_limit and step == self._first_step + SOON

    def length(self, step: int) -> int | None:
        """Updates that the limit allows, from the time of those so far with their validations; None while it is too early.

        A short pause at its start does not change the length of a run that has time for all its steps.
        """
        steps = step - self._first_step - 1
        if not self.has_limit or steps < 1:
            return None
        seconds, left_s = time.monotonic() - self._steps_began, self._limit_s - self.elapsed_s
        is_alone = parallel.num_processes() == 1  # other processes estimate at the same steps
        if is_alone and self._most_steps < LONGEST and seconds < EARLY * (seconds + left_s):
            return None
        left = max(left_s - self._validation_s, 0.0) * steps / seconds
        length = min(step + max(int(left), 1), max(self._most_steps, step))
        self._estimate = self._agree(int(min(length, LONGEST)))
        return self._estimate

    def left(self, step: int, horizon: int) -> str:
        """Predicted time until the last step, or until the limit if that comes first, such as 1:05."""
        seconds_per_step = (time.monotonic() - self._steps_began) / max(step - self._first_step - 1, 1)
        left_s = min(seconds_per_step * (horizon - step), self._limit_s - self.elapsed_s)
        minutes, seconds = divmod(round(max(left_s, 0)), 60)
        return f"{minutes}:{seconds:02d}"
