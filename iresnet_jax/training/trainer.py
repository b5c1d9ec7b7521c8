"""Training in memory: steps, a log of their means, validations, and an end by steps, time, patience or request.

Measurements and the best state stay in memory; `runs.loop` writes them to disk.
"""

import concurrent.futures
import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, SupportsFloat

import jax
import numpy as np

from iresnet_jax.checked_dataclasses import Count, CountOrNone, Decay, NotNegative
from iresnet_jax.training import parallel
from iresnet_jax.training.step import Objective, TrainingStep, TrainState

VALIDATIONS = 20  # of a run, where nothing else is said
DEFAULT_STEPS = 1000  # updates of a run without a limit
# Updates that the schedule of a run of so many minutes is made for, and is stretched from; many, as a warm-up is some hundred.
STEPS_IN_TIME = 10_000
LONGEST = 2**31 - 1  # updates, which a state can count
AHEAD = 2  # steps that may be queued behind the one that runs
SOON = 5  # steps after which such a run first estimates its length
EARLY = 0.1  # share of the time for steps before which a run that has a number of steps estimates no other

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
    # Branches in bfloat16 in training steps. Parameters, norms and sums stay in float32, as does everything after training.
    bfloat16: bool = False
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


class Trainer:
    """A training run: state, log, clocks; `run` takes the steps.

    A run that keeps its state and its log elsewhere than in memory overrides `restored`, `record`, `store` and `elapsed_s`, one
    that is measured otherwise `measure`, and one of several processes `agreed`.

    Args:
        objective: What is trained.
        settings: Length of the run, and when it logs and validates.
        compile_step: ``training step ->`` the step of all devices; by default `parallel.parallelize`.
        say: Takes a line of progress at the first step and at every validation.

    Attributes:
        state: The state.
        step: Number of finished updates.
        records: Measurements so far, as `History.from_records` takes them.
        best: The state that was best on validation; None before the first validation.
    """

    advice = "train again with a lower learning rate, a longer warm-up or a smaller clip_norm"  # after a training blew up

    def __init__(
        self,
        objective: Objective,
        settings: TrainingConfig,
        *,
        compile_step: Callable[[TrainingStep], CompiledStep] | None = None,
        say: Callable[[str], None] = lambda line: None,
    ):
        self._started = time.monotonic()
        self._objective, self._settings, self._say = objective, settings, say
        self._compile_step = compile_step or parallel.parallelize
        self._limit_s = 60 * settings.minutes
        self.records: list[dict[str, Any]] = []
        self.best: Best | None = None
        self._use_terms(objective.num_terms)
        with meanwhile(lambda: compile_ahead(self._compiled_step, objective, settings.batch_size), say):
            self.state, self.step, self._losses = self.restored(objective.initial_state())
            parallel.check_equal_on_all_devices(self.state)
        # A run that has ended stays ended; one with a time limit ends at the step that time turns out to allow.
        self._last_step = self.step if self.horizon <= self.step else settings.most_steps
        if int(self.state.num_terms) != objective.num_terms:
            self._use_terms(int(self.state.num_terms))
        self._first_step, self._validated_step = self.step, -1 if self.step == 0 else self.step
        self._validate = objective.make_validation()
        self._validated_at = self._window_start = time.monotonic()
        self._validation_seconds = 0.0
        self._first_step_ended: float | None = None  # for the speed of a run with a time limit
        self._estimate = math.inf  # of the updates that a time limit allows
        self._window: list[Any] = []  # metrics of the steps since the last line of the log
        self._timed_steps = 0

    def run(self, batches: Iterator[Any], after_step: Callable[[], bool] = lambda: False) -> None:
        """Takes steps until validation ends training, batches run out, or ``after_step`` returns True."""
        while not self._is_over and (batch := next(batches, None)) is not None:
            self.take_step(batch)
            if self._limit_s and self._is_time_over:
                self._last_step, self.state = self.step, self.state._replace(horizon=np.int32(self.step))
            is_validation_due = self._is_validation_due
            if self.step % self._settings.log_every_steps == 0 or is_validation_due or self._is_estimate_due:
                self._log()
            if is_validation_due:
                self.validate()
            if after_step():
                return

    def end_within(self, seconds: float) -> None:
        """Brings the time limit forward to so many seconds from now, if it is later."""
        if math.isfinite(seconds):
            self._limit_s = min(self._limit_s or math.inf, self.elapsed_s + seconds)

    def take_step(self, batch: Any) -> None:
        """Updates the state by one batch: a `TrainingStep` on every device, through `parallel.parallelize`."""
        self.state, metrics = self._compiled_step(self.state, batch)
        self._window.append(metrics)
        jax.block_until_ready(self._window[-1 - AHEAD : -AHEAD])  # signals and time limits are of steps that are done
        if self._is_compiled:
            self._timed_steps += 1
        else:
            self._leave_out_compilation(metrics)
        self.step += 1

    # ------------------------------------------------------------------------------------------------ what a run keeps

    def restored(self, fresh: TrainState) -> tuple[TrainState, int, list[float]]:
        """The state to go on from, the number of updates that led to it, and the losses of the validations so far."""
        return fresh, 0, []

    def record(self, metrics: Mapping[str, SupportsFloat], split: str) -> None:
        """Keeps measurements."""
        values = {name: float(value) for name, value in metrics.items()}
        self.records.append({"step": self.step, "split": split, "wall_time_s": round(self.elapsed_s, 3), **values})

    def store(self, loss: float | None) -> None:
        """Stores the state if its validation loss is the lowest so far; the loss is None between validations."""
        if loss is not None and (self.best is None or loss < self.best.loss):
            self.best = Best(loss, self.step, *jax.device_get((self.state.ema, self.state.batch_stats)))

    @property
    def elapsed_s(self) -> float:
        """Seconds of training so far."""
        return time.monotonic() - self._started

    def agreed(self, horizon: int) -> int:
        """The estimate of the run's length that counts: all processes of a run need the same."""
        return horizon

    # ------------------------------------------------------------------------------------------------ where a run stands

    @property
    def horizon(self) -> int:
        """Updates in the whole run, as far as is known."""
        return int(self.state.horizon)

    @property
    def is_validated(self) -> bool:
        """Whether the last step has been validated."""
        return self.step == self._validated_step

    @property
    def _is_over(self) -> bool:
        """Whether the last validation ended training: at the last step, out of time, or without improvement for too long."""
        if not self.is_validated or self._is_last_step:
            return self.is_validated
        patience = self._settings.patience
        return bool(patience) and len(self._losses) - 1 - int(np.argmin(self._losses or [0.0])) >= patience

    @property
    def _is_validation_due(self) -> bool:
        if self._is_last_step or self.step % self._settings.eval_every_steps == 0:
            return True
        if not self._limit_s or not self._is_compiled:
            return False
        if parallel.num_processes() > 1:  # whose clocks differ: they have agreed on the estimate
            return self.step - max(self._validated_step, self._first_step) > self._estimate / VALIDATIONS
        whole = 60 * self._settings.minutes or self._limit_s  # of a shorter run, those of its steps are enough
        return time.monotonic() - self._validated_at > whole / VALIDATIONS

    @property
    def _is_last_step(self) -> bool:
        return self.step >= self._last_step

    @property
    def _is_time_over(self) -> bool:
        """Whether the time limit leaves no more than a validation."""
        if parallel.num_processes() > 1:
            return self.step >= self._estimate
        return self.elapsed_s + self._validation_seconds >= self._limit_s

    @property
    def _is_estimate_due(self) -> bool:
        return bool(self._limit_s) and self.step == self._first_step + SOON

    def _time_left(self) -> str:
        """Predicted time until the last step, or until the limit if that comes first, such as 1:05."""
        done = max(self.step - self._first_step - 1, 1)
        seconds_per_step = (time.monotonic() - (self._first_step_ended or self._started)) / done
        left = seconds_per_step * (self.horizon - self.step)
        if self._limit_s:
            left = min(left, self._limit_s - self.elapsed_s)
        minutes, seconds = divmod(round(max(left, 0)), 60)
        return f"{minutes}:{seconds:02d}"

    # ------------------------------------------------------------------------------------------------ what a run does

    def _use_terms(self, num_terms: int) -> None:
        """Switches to the program with this many terms of the log-determinant."""
        self._compiled_step = self._compile_step(self._objective.step_with(num_terms))
        self._is_compiled = False

    def _leave_out_compilation(self, metrics: Any) -> None:
        """Waits for the first step of a program, and starts the clocks behind it; `BlowUpError` if it blew up."""
        jax.block_until_ready(metrics)
        check_finite(metrics, self.step, self.step + 1, self.advice)
        if self.step == self._first_step:
            # compile time does not count towards the next validation
            self._first_step_ended = self._validated_at = time.monotonic()
            seconds = time.monotonic() - self._started
            self.record({"compile_seconds": seconds}, "timing")
            name = self._objective.name
            self._say(f"first step after {seconds:.0f} s: {name} {float(metrics[name]):.4f}")
        self._timed_steps, self._window_start, self._is_compiled = 0, time.monotonic(), True

    def _log(self) -> None:
        """Writes the means over the steps since the last line of the log."""
        means = self._checked_means()
        if self._timed_steps:
            means["seconds_per_step"] = (time.monotonic() - self._window_start) / self._timed_steps
        self.record(means, "train")
        if self._limit_s and not self._is_last_step:
            self._estimate_horizon()
        self._window, self._timed_steps, self._window_start = [], 0, time.monotonic()

    def _estimate_horizon(self) -> None:
        """Predicts how many steps the time limit leaves, from the time of those so far with their validations."""
        steps = self.step - self._first_step - 1
        if steps < 1 or self._first_step_ended is None:
            return
        seconds, left_s = time.monotonic() - self._first_step_ended, self._limit_s - self.elapsed_s
        most_steps, is_alone = self._settings.most_steps, parallel.num_processes() == 1  # others estimate at the same steps
        if is_alone and most_steps < LONGEST and seconds < EARLY * (seconds + left_s):
            return  # a short pause at its start does not change a run that has time for all its steps
        left = max(left_s - self._validation_seconds, 0.0) * steps / seconds
        horizon = min(self.step + max(int(left), 1), max(most_steps, self.step))
        self._estimate = self.agreed(int(min(horizon, LONGEST)))
        if self._estimate != self.horizon:
            self.state = self.state._replace(horizon=np.int32(self._estimate))

    def _checked_means(self) -> dict[str, float]:
        """Means over the steps since the last line of the log; `BlowUpError` if one of them blew up."""
        window = parallel.metrics_on_host(self._window)
        means = {name: float(np.mean([metrics[name] for metrics in window], dtype=np.float64)) for name in window[0]}
        check_finite(means, self.step - len(self._window), self.step, self.advice)
        return means

    def store_unvalidated(self) -> None:
        """Stores the state between two validations, unless the steps since the last line of the log blew up."""
        if self._window:
            self._checked_means()
        if self._limit_s and self.step >= self.horizon:  # its estimate was too low: the run is not over
            self.state = self.state._replace(horizon=np.int32(self.step + 1))
        self._store(None)

    def _store(self, loss: float | None) -> None:
        parallel.check_equal_on_all_devices(self.state)
        self.store(loss)
        self._window_start = time.monotonic()

    def validate(self) -> None:
        """Measures the state on held-out data, keeps it, and goes on with the terms that the validation asks for."""
        began = time.monotonic()
        loss, shown = self.measure()
        self._losses.append(loss)
        self._store(loss)
        self._validated_at = time.monotonic()
        self._validated_step, self._validation_seconds = self.step, self._validated_at - began
        self._say(f"step {self.step} of {self.horizon}: {shown}, {self._time_left()} left")

    def measure(self) -> tuple[float, str]:
        """Measures the state on held-out data: the number that the best state is chosen by, and what is shown of it."""
        found, name = self._validate(self.state), self._objective.name
        check_finite(found.metrics, self.step, self.step, self.advice)
        self.record(found.metrics, "validation")
        if found.num_terms != int(self.state.num_terms):
            self.state = self.state._replace(num_terms=np.int32(found.num_terms))
            self._use_terms(found.num_terms)
        return self._objective.selection(found.metrics), f"validation {name} {found.metrics[name]:.4f}"


class BlowUpError(RuntimeError):
    """A measurement of training is NaN or infinite."""


def check_finite(metrics: Mapping[str, SupportsFloat], first_step: int, last_step: int, advice: str) -> None:
    """Raises `BlowUpError` if a metric that was gathered over these steps is NaN or infinite."""
    bad = [name for name, value in metrics.items() if not math.isfinite(float(value))]
    if bad:
        raise BlowUpError(f"{', '.join(bad)} became non-finite between steps {first_step} and {last_step}: {advice}")


@contextlib.contextmanager
def meanwhile(function: Callable[[], None], say: Callable[[str], None]) -> Iterator[None]:
    """Runs a function in a thread of its own beside the body of ``with``, and raises what it raises."""
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        done = pool.submit(parallel.in_this_precision(function))
        try:
            yield
            done.result()
        except KeyboardInterrupt:
            if not done.done():
                say("ending with the compilation of the training step, which cannot be interrupted")
            raise


def compile_ahead(step: CompiledStep, objective: Objective, batch_size: int) -> None:
    """Compiles a step for the objective's first state; steps of several processes, which meet in it, compile when called."""
    if parallel.num_processes() == 1 and isinstance(step, parallel.ParallelStep):
        step.compile(objective.abstract_state(), jax.eval_shape(parallel.shard, objective.abstract_batch(batch_size)))
