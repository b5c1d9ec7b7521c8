"""Training: steps, a log of their means, validations, and an end by steps, time or patience."""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, SupportsFloat

import jax
import numpy as np

from iresnet_jax.checked_dataclasses import Count, CountOrNone, Decay, NotNegative
from iresnet_jax.training import parallel
from iresnet_jax.training.clock import Clock
from iresnet_jax.training.step import Objective, TrainingStep, TrainState

DEFAULT_STEPS = 1000  # updates of a run without a limit
# Updates that the schedule of a run of so many minutes is made for, and is stretched from; many, as a warm-up is some hundred.
STEPS_IN_TIME = 10_000
AHEAD = 2  # steps that may be queued behind the one that runs
ADVICE = "train again with a lower learning rate, a longer warm-up or a smaller clip_norm"  # after training blew up

CompiledStep = Callable[[Any, Any], tuple[Any, Any]]  # (state, batch of all devices) -> (state, metrics)


@dataclass(frozen=True)
class TrainingConfig:
    """The run."""

    # Updates; warm-up and decay of the learning rate are fractions of them. 0 is 1000, or with `minutes` as many as fit into
    # them, with the schedule of 10,000 updates stretched over these.
    total_steps: CountOrNone = 0
    minutes: NotNegative = 0.0  # limit of the wall-clock time, compilation included; 0 is no limit
    patience: CountOrNone = 0  # validations without an improvement after which training ends; 0 never ends it early
    batch_size: Count = 128  # examples of a step over all devices
    num_parts: Count = 1  # parts of each device's share, computed one after the other to save memory
    ema_decay: Decay = 0.999  # moving average of the parameters, which evaluation uses; 0 evaluates the parameters themselves
    actnorm_examples: Count = 1024  # training examples that ActNorm is fitted to
    log_every_steps: Count = 50
    eval_every_steps: Count = 500  # steps between validations, each with a checkpoint
    eval_examples: Count = 2048  # largest number of validation examples
    # If validation shows that training exploits the truncation of its log-determinant, logdet.num_terms is raised, up to this.
    max_num_terms: CountOrNone = 20
    blocks: Literal["auto", "scan", "unroll"] = "auto"  # "auto" unrolls blocks on CPUs, where that is faster
    rematerialize: bool = False  # recompute blocks in the backward pass: less memory, more time
    # Precision of matrix products on accelerators; "tensorfloat32" is faster, but too coarse for inverses.
    matmul_precision: Literal["float32", "tensorfloat32", "highest", "high", "default"] = "float32"

    @property
    def most_steps(self) -> float | int:
        """Largest number of updates."""
        return self.total_steps or (math.inf if self.minutes else DEFAULT_STEPS)

    @property
    def schedule_steps(self) -> int:
        """Updates that the schedule of the learning rate is made for; a run of another length stretches it."""
        return self.total_steps or (STEPS_IN_TIME if self.minutes else DEFAULT_STEPS)

    def check_splits(self, num_devices: int) -> None:
        """Raises ``ValueError`` unless a batch splits over devices and into parts."""
        size, num_parts = self.batch_size, self.num_parts
        if size % (num_devices * num_parts):
            raise ValueError(
                f"config.training.batch_size must be a multiple of {num_devices} devices times {num_parts} parts, got {size}"
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

    Args:
        objective: What is trained.
        settings: Length of the run, and when it logs and validates.
        state: State to go on from; by default the first one of the objective.
        losses: Losses of the validations that led to this state.
        seconds_before: Seconds of training that led to this state, which count towards a time limit.
        seconds_of_steps: Longest time from the end of the first step on, whatever compiling takes.
        compile_step: ``training step ->`` the step of all devices.
        agree: ``estimated length -> length`` that counts, the same in all processes of a run.
        log: Takes the split, "train", "validation" or "timing", and the measurements of each line of the log.
        validated: Takes the loss of each validation, None without held-out data, when the state is worth keeping.
        say: Takes a line of progress at the first step and at every validation.

    Attributes:
        state: The state.
        step: Number of finished updates.
        records: Measurements so far, as `History.from_records` takes them.
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
        compile_step: Callable[[TrainingStep], CompiledStep] = parallel.parallelize,
        agree: Callable[[int], int] = lambda horizon: horizon,
        log: Callable[[str, Mapping[str, float]], None] = lambda split, metrics: None,
        validated: Callable[[float | None], None] = lambda loss: None,
        say: Callable[[str], None] = lambda line: None,
    ):
        self._objective, self._settings, self._compile_step = objective, settings, compile_step
        self._log, self._validated, self._say = log, validated, say
        self.records: list[dict[str, Any]] = []
        first_step = 0 if state is None else int(state.step)
        self._clock = Clock(
            settings.minutes,
            first_step=first_step,
            most_steps=settings.most_steps,
            seconds_before=seconds_before,
            seconds_of_steps=seconds_of_steps,
            agree=agree,
        )
        if state is None:
            state = objective.initial_state()._replace(horizon=np.int32(settings.schedule_steps))
        self.state, self.step, self._losses = state, first_step, list(losses)
        parallel.check_equal_on_all_devices(state)
        self._use_terms(int(state.num_terms))
        self._validate = None if objective.make_validation is None else objective.make_validation()
        self._first_step, self._validated_step = self.step, -1 if self.step == 0 else self.step
        # A run that has ended stays ended; one with a time limit ends at the step that time turns out to allow.
        self._last_step = self.step if self.horizon <= self.step else settings.most_steps
        self._window: list[Any] = []  # metrics of the steps since the last line of the log
        self._window_began, self._timed_steps = time.monotonic(), 0

    def steps(self, batches: Iterator[Any]) -> Iterator[int]:
        """Takes steps until validation ends training or batches run out; logs and validates when that is due.

        Yields the number of finished updates after each step.
        """
        while not self._is_over and (batch := next(batches, None)) is not None:
            self.take_step(batch)
            if self._clock.is_over(self.step):
                self._last_step, self.state = self.step, self.state._replace(horizon=np.int32(self.step))
            is_validation_due = self._is_validation_due
            if self.step % self._settings.log_every_steps == 0 or is_validation_due or self._clock.is_estimate_due(self.step):
                self._log_means()
            if is_validation_due:
                self.validate()
            yield self.step

    # ------------------------------------------------------------------------------------------------ what a run does

    def take_step(self, batch: Any) -> None:
        """Updates the state by one batch: a `TrainingStep` on every device, through `parallel.parallelize`."""
        if not self._is_compiled and isinstance(self._compiled_step, parallel.ParallelStep):
            self._compiled_step.compile(self.state, batch)
        self.state, metrics = self._compiled_step(self.state, batch)
        self._window.append(metrics)
        jax.block_until_ready(self._window[-1 - AHEAD : -AHEAD])  # signals and time limits are of steps that are done
        self.step, self._timed_steps = self.step + 1, self._timed_steps + 1
        if not self._is_compiled:
            self._leave_out_compilation(metrics)

    def validate(self) -> None:
        """Measures the state on held-out data, hands it over, and goes on with the terms that the validation asks for."""
        parallel.check_equal_on_all_devices(self.state)
        name, loss = self._objective.name, None
        with self._clock.validation():
            if self._validate is None:
                shown = f"{name} {self.records[-1][name]:.4f}"
            else:
                found = self._validate(self.state)
                check_finite(found.metrics, self.step, self.step)
                self._record("validation", found.metrics)
                if found.num_terms != int(self.state.num_terms):
                    self.state = self.state._replace(num_terms=np.int32(found.num_terms))
                    self._use_terms(found.num_terms)
                loss, shown = self._objective.selection(found.metrics), f"validation {name} {found.metrics[name]:.4f}"
                self._losses.append(loss)
            self._validated_step = self.step
            self._validated(loss)
        self._window_began = time.monotonic()
        self._say(f"step {self.step} of {self.horizon}: {shown}, {self._clock.left(self.step, self.horizon)} left")

    def check_unvalidated(self) -> None:
        """Makes the state one to save between two validations; `BlowUpError` if the latest steps blew up."""
        if self._window:
            self._checked_means()
        if self._clock.has_limit and self.step >= self.horizon:  # its estimate was too low: the run is not over
            self.state = self.state._replace(horizon=np.int32(self.step + 1))
        parallel.check_equal_on_all_devices(self.state)

    def _use_terms(self, num_terms: int) -> None:
        """Switches to the program with this many terms of the log-determinant."""
        self._compiled_step = self._compile_step(self._objective.step_with(num_terms))
        self._is_compiled = False

    def _leave_out_compilation(self, metrics: Any) -> None:
        """Waits for the first step of a program, and starts the clocks behind it; `BlowUpError` if it blew up."""
        jax.block_until_ready(metrics)
        check_finite(metrics, self.step - 1, self.step)
        if self.step == self._first_step + 1:
            seconds, name = self._clock.begin_steps(), self._objective.name
            self._record("timing", {"compile_seconds": seconds})
            self._say(f"first step after {seconds:.0f} s: {name} {float(metrics[name]):.4f}")
        self._timed_steps, self._window_began, self._is_compiled = 0, time.monotonic(), True

    def _log_means(self) -> None:
        """Writes the means over the steps since the last line of the log."""
        means = self._checked_means()
        if self._timed_steps:
            means["seconds_per_step"] = (time.monotonic() - self._window_began) / self._timed_steps
        self._record("train", means)
        length = None if self._is_last_step else self._clock.length(self.step)
        if length is not None and length != self.horizon:
            self.state = self.state._replace(horizon=np.int32(length))
        self._window, self._timed_steps, self._window_began = [], 0, time.monotonic()

    def _checked_means(self) -> dict[str, float]:
        """Means over the steps since the last line of the log; `BlowUpError` if one of them blew up."""
        window = parallel.metrics_on_host(self._window)
        means = {name: float(np.mean([metrics[name] for metrics in window], dtype=np.float64)) for name in window[0]}
        check_finite(means, self.step - len(self._window), self.step)
        return means

    def _record(self, split: str, metrics: Mapping[str, SupportsFloat]) -> None:
        values = {name: float(value) for name, value in metrics.items()}
        self.records.append({"step": self.step, "split": split, "wall_time_s": round(self.elapsed_s, 3), **values})
        self._log(split, values)

    # ------------------------------------------------------------------------------------------------ where a run stands

    @property
    def horizon(self) -> int:
        """Updates in the whole run, as far as is known."""
        return int(self.state.horizon)

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
        return "time was over" if self._is_last_step else "validation no longer improved"

    @property
    def _is_over(self) -> bool:
        """Whether the last validation ended training: at the last step, out of time, or without improvement for too long."""
        if not self.is_validated or self._is_last_step:
            return self.is_validated
        patience = self._settings.patience
        return bool(patience) and len(self._losses) - 1 - int(np.argmin(self._losses or [0.0])) >= patience

    @property
    def _is_last_step(self) -> bool:
        return self.step >= self._last_step

    @property
    def _is_validation_due(self) -> bool:
        if self._is_last_step or self.step % self._settings.eval_every_steps == 0:
            return True
        return self._clock.is_validation_due(self.step, self._validated_step)


class BlowUpError(RuntimeError):
    """A measurement of training is NaN or infinite."""


def check_finite(metrics: Mapping[str, SupportsFloat], first_step: int, last_step: int) -> None:
    """Raises `BlowUpError` if a metric that was gathered over these steps is NaN or infinite."""
    bad = [name for name, value in metrics.items() if not math.isfinite(float(value))]
    if bad:
        raise BlowUpError(f"{', '.join(bad)} became non-finite between steps {first_step} and {last_step}: {ADVICE}")
