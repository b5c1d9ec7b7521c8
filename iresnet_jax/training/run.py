"""A training on its way: what it minimises, where it stands, and how long it has taken."""

import contextlib
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, SupportsFloat

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from iresnet_jax.maths import platforms
from iresnet_jax.models.free import Free
from iresnet_jax.models.model import History
from iresnet_jax.training import parallel
from iresnet_jax.training.step import Fixed, Keys, Loss, State

LossFunction = Callable[[Any, Any, Array], Any]  # (model, batch, key) -> loss, or loss and metrics

LONGEST = 2**31 - 1  # updates, which a state can count
VALIDATIONS = 20  # of a training, where nothing else is said
VALIDATED_AT_ONCE = 1024  # examples
AHEAD = 2  # steps that may be queued behind the one that runs
ADVICE = "train again with a lower learning rate, a longer warm-up or a smaller clip_norm"


class Measured(NamedTuple):
    """What a model does on held-out data.

    Attributes:
        metrics: Means over the held-out examples, for the log.
        loss: Number that the best model has least of.
        losses: Loss of each example; None if only the mean is known.
    """

    metrics: Mapping[str, float]
    loss: float
    losses: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class Objective:
    """A loss that sees the keys of a step, and how a model is measured.

    Attributes:
        loss: ``(model, batch, keys) -> Loss``.
        name: Metric that is shown, such as "bits_per_dim".
        measure: ``model -> Measured`` on held-out data; None if there are none.
    """

    loss: Callable[[Any, Any, Keys], Loss]
    name: str = "loss"
    measure: Callable[[Any], Measured] | None = None

    @classmethod
    def of(cls, loss: LossFunction, validation: Any, seed: int, *, has_data: bool) -> "Objective":
        """The objective of a loss ``(model, batch, key)``, measured by the same random numbers
        every time.
        """

        def of_batch(model: Any, batch: Any, keys: Keys) -> Loss:
            return Loss(*_value_and_metrics(loss, model, batch if has_data else None, keys.device))

        if validation is None:
            return cls(of_batch)
        key, num = jax.random.key(seed), parallel.num_rows(validation)
        compiled = jax.jit(functools.partial(_value_and_metrics, loss))

        def measure(model: Any) -> Measured:
            totals: dict[str, float] = {}
            for start in range(0, num, VALIDATED_AT_ONCE):
                rows = slice(start, start + VALIDATED_AT_ONCE)
                batch = jax.tree.map(lambda leaf, rows=rows: jnp.asarray(leaf[rows]), validation)
                _, means = compiled(model, batch, jax.random.fold_in(key, start))
                for name, mean in means.items():
                    share = float(mean) * parallel.num_rows(batch) / num
                    totals[name] = totals.get(name, 0.0) + share
            return Measured(totals, totals["loss"])

        return cls(of_batch, measure=measure)


def _value_and_metrics(
    loss: LossFunction, model: Any, batch: Any, key: Array
) -> tuple[Array, dict[str, Any]]:
    found = loss(model, batch, key)
    value, metrics = found if isinstance(found, tuple) else (found, {})
    return value, {**metrics, "loss": value}


class Best(NamedTuple):
    """The best validated variables, on the host.

    Attributes:
        loss: Number that they were chosen by.
        step: Updates that led to them.
        ema: Averaged parameters.
        batch_stats: Running averages of BatchNorm.
        losses: Loss of each held-out example; None if it is not known.
    """

    loss: float
    step: int
    ema: Any
    batch_stats: Any
    losses: np.ndarray | None = None


class Clock:
    """Time of a training, which starts when the clock is made.

    Attributes:
        made: Reading of ``time.monotonic`` when it was made.
        began: The same less the seconds of training before that, which count.
        limit_s: Limit on the seconds of training.
        to_first_step_s: Time until the first step had ended, mostly compilation.
        compiling_s: The sum of these over all processes of a training that was resumed.
    """

    def __init__(self):
        self.made = self.began = time.monotonic()
        self.limit_s, self.to_first_step_s, self.compiling_s = math.inf, 0.0, 0.0
        self._first_step, self._steps_began, self._timed_from = 0, self.made, (0, self.made)
        self._validation_s: float | None = None

    @property
    def elapsed_s(self) -> float:
        """Seconds of training so far."""
        return time.monotonic() - self.began

    def begin_steps(self, step: int) -> None:
        """Starts the time of the steps behind this one, at which compilation is over."""
        self._first_step, self._steps_began = step, time.monotonic()
        self._timed_from = step, self._steps_began
        self.to_first_step_s = self._steps_began - self.made
        self.compiling_s += self.to_first_step_s

    def seconds_per_step(self, step: int) -> dict[str, float]:
        """Seconds of a step since the last call or validation; none without steps since."""
        (before, began), self._timed_from = self._timed_from, (step, time.monotonic())
        return (
            {"seconds_per_step": (time.monotonic() - began) / (step - before)}
            if (step > before)
            else {}
        )

    @contextlib.contextmanager
    def validation(self) -> Iterator[None]:
        """Measures the time of a validation, the body of ``with``; the first one compiles and does
        not count.
        """
        began = time.monotonic()
        yield
        seconds = time.monotonic() - began
        if self._validation_s is None:
            self._steps_began, seconds = self._steps_began + seconds, 0.0
        self._validation_s = seconds
        self._timed_from = self._timed_from[0], time.monotonic()

    def steps_left(self, step: int) -> float:
        """Steps that the limit leaves time for before a last validation, at the rate so far."""
        left_s = max(self.limit_s - self.elapsed_s - (self._validation_s or 0.0), 0.0)
        return left_s / self._seconds_per_step(step)

    def left(self, step: int, horizon: int) -> str:
        """Predicted time until the last step, or until the limit if it comes first, such as
        1:05.
        """
        left_s = min(self._seconds_per_step(step) * (horizon - step), self.limit_s - self.elapsed_s)
        minutes, seconds = divmod(round(max(left_s, 0)), 60)
        return f"{minutes}:{seconds:02d}"

    def _seconds_per_step(self, step: int) -> float:
        return max(time.monotonic() - self._steps_began, 1e-9) / max(step - self._first_step, 1)


@dataclass(eq=False)
class Run:
    """A training on its way, as callbacks see it.

    Attributes:
        free: The model that training starts from.
        objective: Loss and measurement.
        program: The step, for all devices, see `parallel.parallelize`.
        state: The state, see `State`.
        fixed: What no step changes.
        most: Largest number of updates.
        horizon: Updates in the whole training, as far as is known.
        every: Steps between validations.
        log_every: Steps between lines of the log.
        batch_size: Examples of a step over all devices.
        data: Pytree of arrays that batches are taken from; None without.
        step: Finished updates.
        first_step: Those of them that were there when this process began.
        records: Measurements so far: dictionaries with "step", "split" and "wall_time_s".
        losses: Loss of every validation.
        best: The best validated variables so far.
        window: Metrics of the steps since the last line of the log.
        listeners: Functions that are called with every record.
        clock: Time of the training.
        validated_at: Step of the last validation.
        logged_at: Step of the last line of the log.
        first_value: The loss that is shown, of the first step of this process.
        ended: Why it is over before its last step; None while it is not.
        received: Number of the signal that ended it, or 0.
    """

    free: Free
    objective: Objective
    program: Callable[[State, Fixed, Any], tuple[State, dict[str, Any]]]
    state: State
    fixed: Fixed
    most: int
    horizon: int
    every: int
    log_every: int
    batch_size: int
    data: Any
    step: int = 0
    first_step: int = 0
    records: list[dict[str, Any]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    best: Best | None = None
    window: list[Any] = field(default_factory=list)
    listeners: list[Callable[[Mapping[str, Any]], None]] = field(default_factory=list)
    clock: Clock = field(default_factory=Clock)
    validated_at: int = -1
    logged_at: int = -1
    first_value: float = math.nan
    ended: str | None = None
    received: int = 0

    def take(self, batch: Any) -> None:
        """Takes a step; few are queued, so that signals and time limits are of steps that are
        done.
        """
        self.state, metrics = self.program(self.state, self.fixed, batch)
        self.step += 1
        self.window.append(metrics)
        if self.step == self.first_step + 1:  # compilation is over
            found = jax.device_get(metrics)
            check_finite(found, self.step - 1, self.step)
            self.clock.begin_steps(self.step)
            self.first_value = float(found[self.objective.name])
            self.record("timing", {"compile_seconds": self.clock.to_first_step_s})
            platforms.return_freed_memory()  # of the compiler
        jax.block_until_ready(self.window[-1 - AHEAD : -AHEAD])

    @property
    def is_log_due(self) -> bool:
        """Whether the last step ends a line of the log."""
        return self.step % self.log_every == 0 or self.is_validation_due

    @property
    def is_validation_due(self) -> bool:
        """Whether to validate: at the last step, every so many steps, and with a time limit after a
        twentieth of them, or a line of the log if that is longer.
        """
        if self.step >= self.horizon or self.step % self.every == 0:
            return True
        since = self.step - max(self.validated_at, self.first_step)
        is_late = since >= max(self.horizon / VALIDATIONS, self.log_every)
        return math.isfinite(self.clock.limit_s) and is_late

    @property
    def is_validated(self) -> bool:
        """Whether the last step has been validated, or would be if there were held-out data."""
        return self.validated_at == self.step

    def validated(self, ema: Any, spectral: Any, batch_stats: Any) -> Any:
        """The model of averaged parameters, norms iterated to their tolerance."""
        return self.free.validated(*parallel.on_first_device((ema, spectral, batch_stats)))

    def model(self) -> Any:
        """The model of the averaged parameters of the last step."""
        return self.validated(self.state.ema, self.state.spectral, self.state.batch_stats)

    def means(self) -> dict[str, float]:
        """Means over the steps since the last line of the log; `BlowUpError` if one blew up."""
        window = jax.device_get(self.window)
        means = {
            name: float(np.mean([metrics[name] for metrics in window], dtype=np.float64))
            for name in (window[0] if window else ())
        }
        check_finite(means, self.step - len(window), self.step)
        return means

    def record(self, split: str, values: Mapping[str, SupportsFloat]) -> None:
        """Appends measurements to the records, and tells who listens."""
        about = {"step": self.step, "split": split, "wall_time_s": round(self.clock.elapsed_s, 3)}
        self.records.append(about | {name: float(values[name]) for name in values} | about)
        for listener in self.listeners:
            listener(self.records[-1])

    def latest(self) -> dict[str, float]:
        """The newest measurements by name, those of validation with a prefix."""
        found: dict[str, float] = {}
        for record in self.records:
            prefix = "validation_" if record["split"] == "validation" else ""
            names = record.keys() - {"step", "split", "wall_time_s"}
            found |= {f"{prefix}{name}": record[name] for name in names}
        return found

    def keep(self, found: Measured, step: int, ema: Any, batch_stats: Any) -> None:
        """Makes validated variables the best ones, on the host."""
        ema, batch_stats = jax.device_get((ema, batch_stats))
        self.best = Best(found.loss, step, ema, batch_stats, found.losses)

    def stretch(self, horizon: int) -> None:
        """Sets the updates of the whole training, over which the schedule is stretched."""
        self.horizon, self.state = horizon, self.state._replace(horizon=np.int32(horizon))

    def resume(self, state: State, best: tuple[Any, ...] | None, about: Mapping[str, Any]) -> None:
        """Goes on from a state that was saved, with the fields of its `Best`, and with what `about`
        said of the training then.
        """
        self.state, self.best = state, None if best is None else Best(*best)
        self.step = self.first_step = int(state.step)
        self.horizon = int(state.horizon)
        self.losses, self.records = list(about["losses"]), list(about["records"])
        self.clock.began -= about["seconds"]
        self.clock.compiling_s = about["compiling_s"]
        self.ended = about["ended"]

    def about(self) -> dict[str, Any]:
        """What a checkpoint says of the training beside its state, as JSON data."""
        return {
            "losses": self.losses[:],
            "records": self.records[:],
            "seconds": self.clock.elapsed_s,
            "compiling_s": self.clock.compiling_s,
            "ended": None if self.received else self.ended,
        }

    def end(self, why: str, received: int = 0) -> None:
        """Ends the training after this step."""
        self.ended, self.received = why, received

    def result(self) -> Any:
        """The best validated model, or the last one, certified, with its history."""
        state = self.state
        kept = self.best or Best(math.nan, self.step, state.ema, state.batch_stats)
        variables = jax.device_put(jax.device_get((kept.ema, kept.batch_stats)))
        is_short = self.horizon < self.most and self.step >= self.horizon
        history = dataclasses.replace(
            History.from_records(self.records, kept.step),
            ended=self.ended or ("time was over" if is_short else ""),
            loss=kept.loss,
            losses=kept.losses,
            num_steps=self.step,
            seconds=self.clock.elapsed_s - self.clock.compiling_s,
        )
        return self.free.certified(*variables).with_(history=history)


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
