"""Training: steps, a log of their means, validations, and an end by steps, time or patience."""

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, SupportsFloat

import jax
import numpy as np

from iresnet_jax.checked_dataclasses import Count, CountOrNone, Decay, NotNegative
from iresnet_jax.training import parallel
from iresnet_jax.training.step import Objective, TrainState

DEFAULT_STEPS = 1000  # updates of a run without a limit
# Updates that the schedule of a run of so many minutes is made for, and is stretched from; many, as
# a warm-up is some hundred.
STEPS_IN_TIME = 10_000
VALIDATIONS = 20  # of a run, where nothing else is said
LONGEST = 2**31 - 1  # updates, which a state can count
AHEAD = 2  # steps that may be queued behind the one that runs
# after training blew up
ADVICE = "train again with a lower learning rate, a longer warm-up or a smaller clip_norm"


@dataclass(frozen=True)
class TrainingConfig:
    """The run."""

    # Updates; warm-up and decay of the learning rate are fractions of them. 0 is 1000, or with
    # `minutes` as many as fit into them, with the schedule of 10,000 updates stretched over these.
    total_steps: CountOrNone = 0
    minutes: NotNegative = 0.0  # limit of the wall-clock time, compilation included; 0 is no limit
    # validations without an improvement after which training ends; 0 never ends it early
    patience: CountOrNone = 0
    batch_size: Count = 128  # examples of a step over all devices
    # parts of each device's share, computed one after the other to save memory
    num_parts: Count = 1
    # moving average of the parameters, which evaluation uses; 0 evaluates the parameters themselves
    ema_decay: Decay = 0.999
    actnorm_examples: Count = 1024  # training examples that ActNorm is fitted to
    # file or folder of a saved model with these stages, whose weights training starts from
    initial_model: str = ""
    log_every_steps: Count = 50  # steps whose means are a line of the log
    eval_every_steps: Count = 500  # steps between validations, each with a checkpoint
    eval_examples: Count = 2048  # largest number of validation examples
    # If validation shows that training exploits the truncation of its log-determinant,
    # logdet.num_terms is raised, up to this.
    max_num_terms: CountOrNone = 20
    # "auto" unrolls blocks on CPUs, where that is faster
    blocks: Literal["auto", "scan", "unroll"] = "auto"
    rematerialize: bool = False  # recompute blocks in the backward pass: less memory, more time
    # Precision of matrix products on accelerators; "tensorfloat32" is faster, but too coarse for
    # inverses.
    matmul_precision: Literal["float32", "tensorfloat32", "highest", "high", "default"] = "float32"

    @property
    def most_steps(self) -> float | int:
        """Largest number of updates."""
        return self.total_steps or (math.inf if self.minutes else DEFAULT_STEPS)

    @property
    def schedule_steps(self) -> int:
        """Updates that the schedule of the learning rate is made for; a run of another length
        stretches it.
        """
        return self.total_steps or (STEPS_IN_TIME if self.minutes else DEFAULT_STEPS)

    def check_splits(self, num_devices: int) -> None:
        """Raises ``ValueError`` unless a batch splits over devices and into parts."""
        size, num_parts = self.batch_size, self.num_parts
        if size % (num_devices * num_parts):
            raise ValueError(
                f"config.training.batch_size must be a multiple of {num_devices} devices times "
                f"{num_parts} parts, got {size}"
            )


class Best(NamedTuple):
    """The state that was best on validation.

    Attributes:
        loss: Number that it was chosen by.
        step: Updates that led to it.
        ema: Averaged parameters, on the host.
        batch_stats: Running averages of BatchNorm, on the host.
    """

    loss: float
    step: int
    ema: Any
    batch_stats: Any

    @classmethod
    def of(cls, state: TrainState, loss: float) -> "Best":
        """A copy of a state."""
        return cls(loss, int(state.step), *jax.device_get((state.ema, state.batch_stats)))


class Trainer:
    """A training run: its state, its steps, and when it logs, validates and ends.

    With a time limit, the number of updates is estimated after 2, 4, 8 and so on of them, at every
    line of the log, and at the last update that was estimated: time alone ends the run.

    Args:
        objective: What is trained.
        settings: Length of the run, and when it logs and validates.
        state: State to go on from; by default the first one of the objective.
        losses: Losses of the validations that led to this state.
        seconds_before: Seconds of training that led to this state, which count towards a time
            limit.
        seconds_of_steps: Longest time from the end of the first step on, whatever compiling takes.
        agree: ``estimated length -> length`` that counts, the same in all processes of a run.
        log: Takes the split, "train", "validation" or "timing", and the measurements of each line
            of the log.
        validated: Takes the loss of each validation, None without held-out data, when the state is
            worth keeping.
        say: Takes a line of progress at the first step and at every validation.

    Attributes:
        state: The state.
        step: Number of finished updates.
        horizon: Updates in the whole run, as far as is known.
        records: Measurements so far, as `History.from_records` takes them.
        losses: Loss of each held-out example at the last validation; None if it is not known.
    """

    def __init__(
        self,
        objective: Objective,
        settings: TrainingConfig,
        *,
        state: TrainState | None = None,
        losses: Iterable[float] = (),
        seconds_before: float | int = 0.0,
        seconds_of_steps: float | int = math.inf,
        agree: Callable[[int], int] = lambda horizon: horizon,
        log: Callable[[str, Mapping[str, float]], None] = lambda split, metrics: None,
        validated: Callable[[float | None], None] = lambda loss: None,
        say: Callable[[str], None] = lambda line: None,
    ):
        self._objective, self._settings, self._agree = objective, settings, agree
        self._log, self._validated, self._say = log, validated, say
        self._clock, self._seconds_of_steps = (
            Clock(60 * settings.minutes or math.inf, seconds_before),
            seconds_of_steps,
        )
        if state is None:
            state = objective.initial_state()._replace(horizon=np.int32(settings.schedule_steps))
        self.state, self.step, self.horizon = state, int(state.step), int(state.horizon)
        self.records: list[dict[str, Any]] = []
        self.losses: np.ndarray | None = None
        self._compiled_step = parallel.parallelize(objective.step_with(int(state.num_terms)))
        self._validate = None if objective.make_validation is None else objective.make_validation()
        self._first_step, self._losses = self.step, list(losses)
        self._validated_step = self.step if self.step else -1
        self._window: list[Any] = []  # metrics of the steps since the last line of the log
        self._timed_from = self.step, time.monotonic()

    def steps(self, batches: Iterator[Any]) -> Iterator[int]:
        """Takes steps until validation ends training or batches run out; logs and validates when
        that is due.

        Yields the number of finished updates after each step.
        """
        while not self._is_over and (batch := next(batches, None)) is not None:
            self._take_step(batch)
            taken, is_log_due = (
                self.step - self._first_step,
                self.step % self._settings.log_every_steps == 0,
            )
            if taken > 1 and (is_log_due or taken.bit_count() == 1 or self.step >= self.horizon):
                self._estimate_length()
            is_validation_due = self._is_validation_due
            if is_log_due or is_validation_due:
                self._log_means()
            if is_validation_due:
                self.validate()
            yield self.step

    # ------------------------------------------------------------------------------ what a run does

    def _take_step(self, batch: Any) -> None:
        """Updates the state by one batch: a `TrainingStep` on every device, through
        `parallel.parallelize`.
        """
        self.state, metrics = self._compiled_step(self.state, batch)
        self.step += 1
        self._window.append(metrics)
        if self.step == self._first_step + 1:  # compilation is over: time of steps starts here
            name = self._objective.name
            check_finite(jax.device_get(metrics), self.step - 1, self.step)
            seconds = self._clock.begin_steps(self.step, self._seconds_of_steps)
            self._timed_from = self.step, time.monotonic()
            self._record("timing", {"compile_seconds": seconds})
            self._say(f"first step after {seconds:.0f} s: {name} {float(metrics[name]):.4f}")
        # signals and time limits are of steps that are done
        jax.block_until_ready(self._window[-1 - AHEAD : -AHEAD])

    def _estimate_length(self) -> None:
        """Sets the updates of the whole run to those that a time limit allows."""
        if not self._clock.has_limit:
            return
        jax.block_until_ready(self.state)
        length = self.step + self._clock.steps_left(self.step)
        self.horizon = self._agree(
            int(max(min(length, self._settings.most_steps, LONGEST), self.step))
        )
        self.state = self.state._replace(horizon=np.int32(self.horizon))

    def _log_means(self) -> None:
        """Writes the means over the steps since the last line of the log."""
        means = self._checked_means()
        step, began = self._timed_from
        if self.step > step:
            means["seconds_per_step"] = (time.monotonic() - began) / (self.step - step)
        self._record("train", means)
        self._window, self._timed_from = [], (self.step, time.monotonic())

    def validate(self) -> None:
        """Measures the state on held-out data, hands it over, and goes on with the terms that
        the validation asks for.
        """
        name, loss = self._objective.name, None
        with self._clock.validation():
            if self._validate is None:
                shown = f"{name} {self.records[-1][name]:.4f}"
            else:
                found = self._validate(self.state)
                self.losses = found.losses
                check_finite(found.metrics, self.step, self.step)
                self._record("validation", found.metrics)
                if found.num_terms != int(self.state.num_terms):
                    self.state = self.state._replace(num_terms=np.int32(found.num_terms))
                    self._compiled_step = parallel.parallelize(
                        self._objective.step_with(found.num_terms)
                    )
                loss, shown = (
                    self._objective.selection(found.metrics),
                    f"validation {name} {found.metrics[name]:.4f}",
                )
                self._losses.append(loss)
            self._validated_step = self.step
            self._validated(loss)
        self._timed_from = self.step, time.monotonic()
        self._say(
            f"step {self.step} of {self.horizon}: {shown}, "
            f"{self._clock.left(self.step, self.horizon)} left"
        )

    def check(self) -> None:
        """Raises `BlowUpError` if a step since the last line of the log blew up."""
        if self._window:
            self._checked_means()

    def _checked_means(self) -> dict[str, float]:
        """Means over the steps since the last line of the log; `BlowUpError` if one of them blew
        up.
        """
        window = jax.device_get(self._window)
        means = {
            name: float(np.mean([metrics[name] for metrics in window], dtype=np.float64))
            for name in window[0]
        }
        check_finite(means, self.step - len(self._window), self.step)
        return means

    def _record(self, split: str, metrics: Mapping[str, SupportsFloat]) -> None:
        values = {name: float(value) for name, value in metrics.items()}
        self.records.append(
            {"step": self.step, "split": split, "wall_time_s": round(self.elapsed_s, 3), **values}
        )
        self._log(split, values)

    # --------------------------------------------------------------------------- where a run stands

    @property
    def elapsed_s(self) -> float:
        """Seconds of training so far."""
        return self._clock.elapsed_s

    @property
    def is_validated(self) -> bool:
        """Whether the last step has been validated."""
        return self.step == self._validated_step

    @property
    def is_logged(self) -> bool:
        """Whether the last step is in the log."""
        return not self._window

    @property
    def ended(self) -> str:
        """Why a run is over before all its steps; empty otherwise."""
        if not self._is_over or self.step >= self._settings.most_steps:
            return ""
        return "time was over" if self.step >= self.horizon else "validation no longer improved"

    @property
    def _is_over(self) -> bool:
        """Whether the last validation ended training: at the last step, out of time, or without
        improvement for too long.
        """
        if not self.is_validated or self.step >= self.horizon:
            return self.is_validated
        patience = self._settings.patience
        return (
            bool(patience)
            and len(self._losses) - 1 - int(np.argmin(self._losses or [0.0])) >= patience
        )

    @property
    def _is_validation_due(self) -> bool:
        """Whether to validate: at the last step, every so many steps, and with a time limit
        after a twentieth of the steps.
        """
        if self.step >= self.horizon or self.step % self._settings.eval_every_steps == 0:
            return True
        since = self.step - max(self._validated_step, self._first_step)
        return self._clock.has_limit and since >= self.horizon / VALIDATIONS


class Clock:
    """Time of a run, which starts when the clock is made.

    Args:
        limit_s: Limit on the seconds of training; infinite without one.
        seconds_before: Seconds of training before.
    """

    def __init__(self, limit_s: float | int, seconds_before: float | int):
        self._limit_s, self._seconds_before, self._began = limit_s, seconds_before, time.monotonic()
        self._first_step, self._steps_began = 0, self._began
        self._validation_s: float | None = None

    @property
    def elapsed_s(self) -> float:
        """Seconds of training so far."""
        return self._seconds_before + time.monotonic() - self._began

    @property
    def has_limit(self) -> bool:
        """Whether time may end the run."""
        return math.isfinite(self._limit_s)

    def begin_steps(self, step: int, most_seconds: float) -> float:
        """Starts the time of the steps behind this one, which have so many seconds at most; the
        seconds until now.
        """
        self._first_step, self._steps_began = step, time.monotonic()
        self._limit_s = min(self._limit_s, self.elapsed_s + most_seconds)
        return self._steps_began - self._began

    @contextlib.contextmanager
    def validation(self) -> Iterator[None]:
        """Measures the time of a validation, the body of ``with``; the first one compiles and
        does not count.
        """
        began = time.monotonic()
        yield
        seconds = time.monotonic() - began
        if self._validation_s is None:
            self._steps_began, seconds = self._steps_began + seconds, 0.0
        self._validation_s = seconds

    def steps_left(self, step: int) -> float:
        """Steps that the limit leaves time for before a last validation, at the rate of those so
        far.
        """
        return max(
            self._limit_s - self.elapsed_s - (self._validation_s or 0.0), 0.0
        ) / self._seconds_per_step(step)

    def left(self, step: int, horizon: int) -> str:
        """Predicted time until the last step, or until the limit if that comes first, such as
        1:05.
        """
        left_s = min(
            self._seconds_per_step(step) * (horizon - step), self._limit_s - self.elapsed_s
        )
        minutes, seconds = divmod(round(max(left_s, 0)), 60)
        return f"{minutes}:{seconds:02d}"

    def _seconds_per_step(self, step: int) -> float:
        return max(time.monotonic() - self._steps_began, 1e-9) / max(step - self._first_step, 1)


class BlowUpError(RuntimeError):
    """A measurement of training is NaN or infinite."""


def check_finite(metrics: Mapping[str, SupportsFloat], first_step: int, last_step: int) -> None:
    """Raises `BlowUpError` if a metric that was gathered over these steps is NaN or infinite."""
    bad = [name for name, value in metrics.items() if not math.isfinite(float(value))]
    if bad:
        raise BlowUpError(
            f"{', '.join(bad)} became non-finite between steps {first_step} and "
            f"{last_step}: {ADVICE}"
        )
