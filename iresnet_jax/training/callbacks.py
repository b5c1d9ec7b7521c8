"""What happens between the steps of `train`: every use of a training is a list of callbacks."""

import contextlib
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import jax
import numpy as np

from iresnet_jax.models.model import STOPPED
from iresnet_jax.training import parallel
from iresnet_jax.training.run import Run, check_finite
from iresnet_jax.training.signals import SIGNALS, Stopped, StopRequests, heard_in_memory

AGREE_EVERY = 10  # steps after which processes ask each other whether to stop, at the latest


class Callback:
    """Something to do between steps.

    Callbacks see the `Run`: they read its ``step``, ``horizon``, ``state`` and ``records``, call
    its ``model()`` and ``record(...)``, and may ``end`` it.

    Attributes:
        order: Place among the callbacks of a training: `after_step` runs from the lowest to the
            highest, `during` is entered from the highest to the lowest. `Validate` has 20,
            `Checkpoints` 100.
        resumes: Whether a training with this callback can be stopped and resumed.

    Example:
        >>> class Stop(Callback):
        ...     def after_step(self, run):
        ...         if run.is_validated and run.losses[-1] < 0.1:
        ...             run.end("the loss was small enough")
    """

    order: ClassVar[int] = 50
    resumes: ClassVar[bool] = False

    def during(self, run: Run) -> contextlib.AbstractContextManager[Any]:
        """What surrounds the whole training."""
        del run
        return contextlib.nullcontext()

    def after_step(self, run: Run) -> None:
        """What follows each step."""

    def of(self, name: str) -> "Callback":
        """The callback for one of several trainings that a search makes, such as `fit`."""
        del name
        return self


class TimeLimit(Callback):
    """Ends a training by time, at a learning rate of zero: the schedule is stretched over the
    updates that fit.

    Their number is estimated after 2, 4, 8 and so on of them, at every line of the log, and at the
    last update that was estimated.

    Args:
        minutes: Longest time, compilation included; None for no limit.
        steps_s: Longest time from the end of the first step on, whatever compiling takes.
        began: Reading of ``time.monotonic`` at which the time starts; by default the training.
    """

    order = 0

    def __init__(
        self,
        minutes: float | None = None,
        *,
        steps_s: float = math.inf,
        began: float | None = None,
    ):
        self.limit_s, self.steps_s = 60 * minutes if minutes else math.inf, steps_s
        self.began = began

    def during(self, run: Run) -> contextlib.AbstractContextManager[Any]:
        """Sets the limit."""
        run.clock.limit_s = self.limit_s
        if self.began is not None:
            run.clock.began -= run.clock.made - self.began
        return contextlib.nullcontext()

    def after_step(self, run: Run) -> None:
        """Estimates the length."""
        clock, taken = run.clock, run.step - run.first_step
        if taken == 1:
            clock.limit_s = min(clock.limit_s, clock.elapsed_s + self.steps_s)
        elif math.isfinite(clock.limit_s) and (
            run.step % run.log_every == 0 or taken.bit_count() == 1 or run.step >= run.horizon
        ):
            jax.block_until_ready(run.state)
            most = int(max(min(run.step + clock.steps_left(run.step), run.most), run.step))
            run.stretch(parallel.from_first(lambda: most))  # by the clock of process 0


class Log(Callback):
    """Records the means over the steps since the last line of the log."""

    order = 10

    def after_step(self, run: Run) -> None:
        """Writes a line where one is due."""
        if not run.is_log_due:
            return
        means = run.means()
        if means["grad_norm"] == 0 and run.step <= run.log_every:
            raise ValueError(
                "the gradient of the loss is 0: the loss has to depend on the model that it is "
                "given"
            )
        run.record("train", means | run.clock.seconds_per_step(run.step))
        run.window, run.logged_at = [], run.step


class Validate(Callback):
    """Measures the averaged parameters on held-out data, and keeps the best.

    Args:
        at_start: Whether the model that training starts from counts, too.
        clear: Standard errors of the held-out examples' gains by which a model must be better than
            the start to replace it.
    """

    order = 20

    def __init__(self, *, at_start: bool = False, clear: float = 0.0):
        self.at_start, self.clear, self.losses_at_start = at_start, clear, None

    def during(self, run: Run) -> contextlib.AbstractContextManager[Any]:
        """Measures the start."""
        if self.at_start and run.objective.measure is not None:
            start = run.free.params, run.free.iterates, run.free.statistics
            found = self._measured(run, *start)
            self.losses_at_start = found.losses
            if run.best is None:
                run.keep(found, 0, start[0], start[2])
            elif run.best.losses is None:  # of a training that was resumed
                best = self._measured(run, run.best.ema, run.state.spectral, run.best.batch_stats)
                run.best = run.best._replace(losses=best.losses)
            if not run.step:
                run.record("validation", found.metrics)
                run.losses.append(found.loss)
                run.validated_at = 0
        return contextlib.nullcontext()

    def after_step(self, run: Run) -> None:
        """Validates where that is due."""
        if not run.is_validation_due:
            return
        if run.objective.measure is not None:
            state = run.state
            found = self._measured(run, state.ema, state.spectral, state.batch_stats)
            run.record("validation", found.metrics)
            run.losses.append(found.loss)
            is_better = run.best is None or found.loss < run.best.loss
            if is_better and (
                not self.clear or is_clearly_better(found.losses, self.losses_at_start, self.clear)
            ):
                run.keep(found, run.step, state.ema, state.batch_stats)
        run.validated_at = run.step

    def _measured(self, run: Run, *variables: Any) -> Any:
        assert run.objective.measure is not None
        with run.clock.validation():
            found = run.objective.measure(run.validated(*variables))
        check_finite(found.metrics, run.step, run.step)
        return found


def is_clearly_better(
    losses: np.ndarray | None, others: np.ndarray | None, clear: float = 1.0
) -> bool:
    """Whether examples lose less than with another model by so many standard errors, or no single
    losses are known.

    The best of many validations by few examples is often the one that suits these examples by
    chance. One example tells nothing (Breiman et al. 1984, sec. 3.4.3).
    """
    if losses is None or others is None:
        return True
    gains = others - losses
    return len(gains) > 1 and bool(gains.mean() > clear * gains.std(ddof=1) / math.sqrt(len(gains)))


class Patience(Callback):
    """Ends a training after so many validations without an improvement; 0 never does."""

    order = 30

    def __init__(self, validations: int = 10):
        self.validations = validations

    def after_step(self, run: Run) -> None:
        """Looks at the losses so far."""
        if not (self.validations and run.is_validated and run.losses):
            return
        since = len(run.losses) - 1 - int(np.argmin(run.losses))
        if since >= self.validations and run.step < run.horizon:
            run.end("validation no longer improved")


class Stop(Callback):
    """Ends a training after the step in which a signal came.

    Signals count from the second step on: before, there is nothing to keep, and they do what they
    did.

    Args:
        requests: What notes the signals, for a search of several trainings; by default Ctrl-C is
            noted at a prompt and in a notebook, and with ``raises`` SIGTERM everywhere, too.
        raises: Whether `Stopped` is raised at the end, after a checkpoint, unless somebody sits at
            a prompt.
    """

    order = 40

    def __init__(self, requests: StopRequests | None = None, *, raises: bool = False):
        self.requests, self.raises = requests, raises

    @contextlib.contextmanager
    def during(self, run: Run) -> Iterator[None]:
        """Listens from the first step on."""
        with contextlib.ExitStack() as self._stack:
            self._heard = self.requests
            yield
        received = run.received or (self.requests is not None and self.requests.received)
        if self.raises and received and received not in heard_in_memory():
            number, there = signal.Signals(received), f"after step {run.step} of {run.horizon}"
            raise Stopped(
                f"stopped by {number.name} {there}: the same command goes on from it", number
            )

    def after_step(self, run: Run) -> None:
        """Ends the training in all processes if one of them was told to stop."""
        if self._heard is None:
            consequence = "saving after this step" if self.raises else "ending after this step"
            heard = SIGNALS if self.raises else heard_in_memory()
            self._heard = self._stack.enter_context(StopRequests(consequence, heard))
        if parallel.num_processes() > 1 and run.step % AGREE_EVERY and run.logged_at != run.step:
            return  # all processes skip the same steps
        if received := parallel.largest(self._heard.received or 0):
            run.end(STOPPED, received)


class Call(Callback):
    """Calls ``function(step, model, metrics)`` at every validation, or as often without one, with
    the averaged model and the newest measurements; the training ends if it returns True.
    """

    order = 35

    def __init__(self, function: Callable[[int, Any, Mapping[str, float]], Any]):
        self.function = function

    def after_step(self, run: Run) -> None:
        """Calls the function."""
        if run.is_validated and self.function(run.step, run.model(), run.latest()):
            run.end("the callback ended it")


class Progress(Callback):
    """A line at the first step and at every validation.

    Args:
        say: Takes a line; by default it goes to stderr, with the seconds so far.
    """

    order = 80

    def __init__(self, say: Callable[[str], None] | None = None):
        self.say = say or Lines()

    def after_step(self, run: Run) -> None:
        """Says a line where there is something to say."""
        name = run.objective.name
        if run.step == run.first_step + 1:
            seconds, value = run.clock.to_first_step_s, run.first_value
            self.say(f"first step after {seconds:.0f} s: {name} {value:.4f}")
        if run.is_validated:
            split = "train" if run.objective.measure is None else "validation"
            value = next(r[name] for r in reversed(run.records) if r["split"] == split)
            shown = f"{name} {value:.4f}" if split == "train" else f"validation {name} {value:.4f}"
            left = run.clock.left(run.step, run.horizon)
            self.say(f"step {run.step} of {run.horizon}: {shown}, {left} left")


class Lines:
    """Lines of progress on stderr, each with the seconds since it was made."""

    def __init__(self):
        self._began = time.monotonic()

    def __call__(self, line: str) -> None:
        """Writes a line."""
        print(f"[{time.monotonic() - self._began:5.0f} s] {line}", file=sys.stderr, flush=True)
