"""The training loop: batches in, metrics and checkpoints out, and the same run again after an interruption.

A workdir belongs to one config. Running the same command again resumes from the newest intact checkpoint, and goes on bit for
bit as if it had not been stopped: batches and random numbers are functions of (seed, step). A run that is told to stop saves
the step it has reached; if that lies between two lines of its log, the next line averages over the steps after it. A run that
is killed loses the steps since its last checkpoint, which is at most `SAVE_SECONDS` and one step old.
"""

import concurrent.futures
import contextlib
import itertools
import json
import logging
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from iresnet_jax.data import conditioned_on_labels, load
from iresnet_jax.data.batches import device_batches
from iresnet_jax.data.dataset import DataSet
from iresnet_jax.json_dataclasses import checked, tagged, to_plain
from iresnet_jax.runs import allocator, hosts, run_folder
from iresnet_jax.runs.checkpoints import Checkpoints
from iresnet_jax.runs.compiled_steps import Programs, Step
from iresnet_jax.runs.config import Config, DataConfig, TrainingConfig
from iresnet_jax.runs.from_config import Spec, model_spec
from iresnet_jax.runs.hosts import Agreement, Wish, signal_of, wish_of
from iresnet_jax.runs.machine import device_summary, prepare_backend
from iresnet_jax.runs.metrics import MetricWriter, NoWriter, Progress, check_finite, read_metrics
from iresnet_jax.runs.signals import Stopped, StopRequests
from iresnet_jax.training import parallel
from iresnet_jax.training.initialization import num_parameters
from iresnet_jax.training.objectives import classification, hybrid, inversion, likelihood
from iresnet_jax.training.objectives.objective import Objective
from iresnet_jax.training.state import TrainState

OBJECTIVES = {
    "density": likelihood.objective,
    "classification": classification.objective,
    "hybrid": hybrid.objective,
    "inversion": inversion.objective,
}

_logger = logging.getLogger(__name__)

SAVE_SECONDS = 600.0  # between checkpoints, where validations are further apart
VALIDATIONS_IN_TIME = 20  # of a run with a time limit


def train(
    config: Config,
    workdir: str | os.PathLike[str],
    *,
    data: DataSet | None = None,
    say: Callable[[str], None] | None = None,
    programs: Programs | None = None,
) -> TrainState:
    """Trains for ``config.training.total_steps``, at most for ``minutes``, from where the workdir's newest checkpoint stands.

    Args:
        config: All settings, from `config.parse`.
        workdir: Folder of the run: config, model, metrics, checkpoints.
        data: The data; by default what ``config.data`` names.
        say: Takes a line of progress at every validation, for callers without a progress bar.
        programs: Compiled steps of earlier runs on arrays, to which this run adds its own; None compiles anew.

    Returns:
        The last state.

    Raises:
        ValueError: If settings contradict each other or the data, or the workdir belongs to another config or other data.
        RuntimeError: If training blows up; the last good checkpoint stays.
        Stopped: On Ctrl-C or SIGTERM, with a checkpoint of the last step.
    """
    workdir = Path(workdir)
    prepare_backend(config.training.matmul_precision)
    dataset = load_data(config.data) if data is None else data
    check_batch_size(config.training, dataset)
    _check_alike(config, dataset)
    checkpoints, agreement = Checkpoints(workdir), Agreement()
    spec, objective = _begin(workdir, config, dataset)
    compile_step = _step_compiler(config, spec, objective, agreement, None if dataset.is_endless else programs)
    with run_folder.alone_in(workdir) if hosts.is_first() else contextlib.nullcontext():
        return _train(config, workdir, objective, checkpoints, say, agreement, compile_step)


def _check_alike(config: Config, data: DataSet) -> None:
    """Raises ``ValueError`` if processes have different settings or data, or settings that only one process can keep."""
    hosts.agree_on("config", json.dumps(to_plain(config)))
    hosts.agree_on("data set", f"{data.name} of fingerprint {data.fingerprint}")
    if config.training.minutes and parallel.num_processes() > 1:
        raise ValueError(
            f"config.training.minutes must be 0 with {parallel.num_processes()} processes, whose clocks differ, got "
            f"{config.training.minutes}: give config.training.total_steps"
        )


def _begin(workdir: Path, config: Config, data: DataSet) -> tuple[Spec, Objective]:
    """Takes the folder for this run and returns its model and objective; process 0 does, for all."""
    claimed: list[tuple[Spec, Objective]] = []

    def claim():
        run_folder.check_belongs_to(workdir, config)
        spec = run_folder.model_for(workdir, config, data)
        claimed.append((spec, build_objective(config, data, spec)))  # which raises before anything is written
        run_folder.claim(workdir, config, spec, data)
        return tagged(spec) if parallel.num_processes() > 1 else None

    plain = hosts.from_first(claim)
    if claimed:
        return claimed[0]
    spec = checked(Spec, plain, "model")
    return spec, build_objective(config, data, spec)


def _step_compiler(
    config: Config, spec: Spec, objective: Objective, agreement: Agreement, programs: Programs | None
) -> Callable[[int], Step]:
    """``num_terms ->`` the step for all devices; compiled at its first call, unless the programs have it."""

    def new(num_terms):
        return parallel.parallelize(agreement.wrap(objective.make_step(num_terms)))

    if programs is None:
        return new
    return lambda num_terms: programs.step(config, spec, num_terms, lambda: new(num_terms))


def _train(
    config: Config,
    workdir: Path,
    objective: Objective,
    checkpoints: Checkpoints,
    say: Callable[[str], None] | None,
    agreement: Agreement,
    compile_step: Callable[[int], Step],
) -> TrainState:
    with MetricWriter(workdir) if hosts.is_first() else NoWriter() as writer:
        # There is nothing to save until a step is done: a signal ends the process at once.
        trainer = _Trainer(config, objective, workdir, writer, checkpoints, say, agreement, compile_step)
        with Progress(trainer.horizon, trainer.step, shown=hosts.is_first()) as progress, StopRequests() as stop:
            feed = batches(config, objective.examples, trainer.step)
            is_shared = parallel.num_processes() > 1  # then a signal always waits for the step after which all stop
            while not trainer.is_over and (batch := next(feed, None)) is not None:
                trainer.take_step(batch, stop.received)
                stop.unsaved = True
                if trainer.step % config.training.log_every_steps == 0 or trainer.is_validation_due:
                    means = trainer.log()
                    progress.update(trainer.step, {objective.name: means[objective.name]})
                granted = trainer.granted(stop.received)
                received = signal_of(granted)
                if trainer.is_validation_due:
                    trainer.validate()
                    received = received if is_shared else stop.received
                    stop.unsaved = is_shared
                elif received or Wish.SAVE in granted:
                    trainer.save()
                    stop.unsaved = is_shared
                if received:
                    there = f"after step {trainer.step} of {trainer.horizon}"
                    raise Stopped(f"stopped by {received.name} {there}: the same command goes on from it", received)
    return trainer.state


class _Trainer:
    """A run between two steps: its state, what it has not logged yet, and its clocks."""

    def __init__(
        self,
        config: Config,
        objective: Objective,
        workdir: Path,
        writer: MetricWriter | NoWriter,
        checkpoints: Checkpoints,
        say: Callable[[str], None] | None,
        agreement: Agreement,
        compile_step: Callable[[int], Step],
    ):
        self._started = time.monotonic()
        self._settings, self._objective, self._writer, self._checkpoints = config.training, objective, writer, checkpoints
        self._say, self._agreement, self._compile_step = say, agreement, compile_step
        self._limit_s = 60 * config.training.minutes
        self._parallel_step = compile_step(objective.num_terms)
        with _meanwhile(lambda: _compile_ahead(self._parallel_step, objective, config.training.batch_size)):
            fresh = objective.initial_state()
            _logger.info("%d parameters on %s", num_parameters(fresh.params), device_summary())
            self.state, self.step = self._restored(fresh)
            parallel.check_equal_on_all_devices(self.state)
        allocator.return_freed_memory()  # which steps would not find use for, in its fragments
        self._first_step, self._validated_step = self.step, -1 if self.step == 0 else self.step
        if self.step:
            _logger.info("resuming from step %d of %d", self.step, self.horizon)
        writer.truncate_after(self.step)
        self._losses = hosts.from_first(
            lambda: [objective.loss(record) for record in read_metrics(workdir) if record["split"] == "validation"]
        )
        self._validate = objective.make_validation()
        self._saved_at = self._validated_at = time.monotonic()
        self._validation_seconds = 0.0
        self._first_step_ended: float | None = None  # for the speed of a run with a time limit
        self._window: list[Any] = []  # metrics of the steps since the last line of the log
        self._is_compiled = False
        if int(self.state.num_terms) != objective.num_terms:
            self._compile_later()

    def _restored(self, fresh: TrainState) -> tuple[TrainState, int]:
        """The newest checkpoint of process 0, or the fresh state; equal on all devices."""
        found: list[tuple[TrainState, int]] = []

        def restore():
            found.append(self._checkpoints.restore_latest(fresh) or (fresh, 0))
            return found[0][1]

        step = hosts.from_first(restore)
        return hosts.broadcast(found[0][0] if found else fresh), step  # a fresh state, too: hosts round differently

    def _compile_later(self) -> None:
        self._parallel_step = self._compile_step(int(self.state.num_terms))
        self._is_compiled = False

    def take_step(self, batch: Any, received: signal.Signals | None) -> None:
        """Updates the state by one batch; the first call compiles, which the times of the log leave out.

        Args:
            received: Signal that asks this process to stop.
        """
        self.state, metrics = self._agreement.take(self._parallel_step, self.state, batch, self._wishes(received))
        self._window.append(metrics)
        if self._is_compiled:
            self._timed_steps += 1
        else:
            jax.block_until_ready(metrics)
            if self.step == self._first_step:
                self._first_step_ended = self._validated_at = time.monotonic()  # compiling is no time without validation
                seconds = time.monotonic() - self._started
                self._writer.write(self.step, {"compile_seconds": seconds}, split="timing")
                if self._say:
                    value = float(metrics[self._objective.name])
                    self._say(f"first step after {seconds:.0f} s: {self._objective.name} {value:.4f}")
            self._timed_steps, self._window_start, self._is_compiled = 0, time.monotonic(), True
        self.step += 1

    @property
    def horizon(self) -> int:
        """Updates in the whole run, as far as is known."""
        return int(self.state.horizon)

    @property
    def is_over(self) -> bool:
        """Whether the last validation ended training: at the last step, out of time, or without improvement for too long."""
        patience = self._settings.patience
        is_stale = bool(patience) and len(self._losses) - 1 - int(np.argmin(self._losses or [0.0])) >= patience
        return self.step == self._validated_step and (is_stale or self._is_last_step)

    @property
    def is_validation_due(self) -> bool:
        """Whether this is a step behind which the state is validated."""
        if self._is_last_step or self.step % self._settings.eval_every_steps == 0:
            return True
        since = time.monotonic() - self._validated_at
        return bool(self._limit_s) and self._is_compiled and since > self._limit_s / VALIDATIONS_IN_TIME

    @property
    def _is_last_step(self) -> bool:
        if self.step >= self._settings.total_steps:
            return True
        is_late = self._writer.elapsed_s + self._validation_seconds >= self._limit_s
        return bool(self._limit_s) and is_late and self.step > self._first_step

    def granted(self, received: signal.Signals | None) -> set[Wish]:
        """What all processes do after this step."""
        return self._agreement.granted(self._wishes(received))

    def _wishes(self, received: signal.Signals | None) -> set[Wish]:
        """To stop at a signal, and to save if a line of the log has just been written and the last checkpoint is old."""
        is_save_due = not self._window and time.monotonic() - self._saved_at > SAVE_SECONDS
        return wish_of(received) | ({Wish.SAVE} if is_save_due else set())

    def log(self) -> dict[str, float]:
        """Writes the means over the steps since the last line of the log, and returns them."""
        means = self._checked_means()
        if self._timed_steps:
            means["seconds_per_step"] = (time.monotonic() - self._window_start) / self._timed_steps
        self._writer.write(self.step, means)
        if self._limit_s:
            self._estimate_horizon()
        self._window, self._timed_steps, self._window_start = [], 0, time.monotonic()
        return means

    def _estimate_horizon(self) -> None:
        """Predicts how many steps the time limit leaves, from the time of those so far with their validations."""
        steps = self.step - self._first_step - 1
        if steps < 1 or self._first_step_ended is None:
            return
        seconds_per_step = (time.monotonic() - self._first_step_ended) / steps
        left = max(self._limit_s - self._writer.elapsed_s - self._validation_seconds, 0.0) / seconds_per_step
        horizon = min(self.step + max(int(left), 1), max(self._settings.total_steps, self.step))
        self.state = self.state._replace(horizon=jnp.int32(horizon))

    def _checked_means(self) -> dict[str, float]:
        window = jax.device_get(self._window)
        means = {name: float(np.mean([metrics[name] for metrics in window], dtype=np.float64)) for name in window[0]}
        check_finite(means, self.step - len(self._window), self.step)
        return means

    def validate(self) -> None:
        """Measures the state on held-out data, lets the objective adapt it, and saves it."""
        began = time.monotonic()
        held_out = self._validate(self.state)
        check_finite(held_out.metrics, self.step, self.step)
        self._writer.write(self.step, held_out.metrics, split="validation")
        adapted = self._objective.adapt(self.state, held_out)
        if int(adapted.num_terms) != int(self.state.num_terms):
            self.state = adapted
            self._compile_later()
        self._losses.append(self._objective.loss(held_out.metrics))
        self._save(self._losses[-1])
        self._validated_at, self._validated_step = time.monotonic(), self.step
        self._validation_seconds = self._validated_at - began
        name, value = self._objective.name, held_out.metrics[self._objective.name]
        line = f"step {self.step} of {self.horizon}: validation {name} {value:.4f}"
        _logger.info("%s", line)
        if self._say:
            self._say(f"{line}, {self._time_left()} left")

    def _time_left(self) -> str:
        """Predicted time until the last step, or until the limit if that comes first, such as 1:05."""
        done = max(self.step - self._first_step - 1, 1)
        seconds_per_step = (time.monotonic() - (self._first_step_ended or self._started)) / done
        left = seconds_per_step * (self.horizon - self.step)
        if self._limit_s:
            left = min(left, self._limit_s - self._writer.elapsed_s)
        minutes, seconds = divmod(round(max(left, 0)), 60)
        return f"{minutes}:{seconds:02d}"

    def save(self) -> None:
        """Saves the state between two validations, unless the steps since the last line of the log blew up."""
        if self._window:
            self._checked_means()
        self._save(None)

    def _save(self, metric: float | None) -> None:
        parallel.check_equal_on_all_devices(self.state)
        if hosts.is_first():
            self._checkpoints.save(self.step, self.state, metric=metric)
        self._window_start = self._saved_at = time.monotonic()


@contextlib.contextmanager
def _meanwhile(function: Callable[[], None]) -> Iterator[None]:
    """Runs a function in a thread of its own beside the body of ``with``, and raises what it raises."""
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        done = pool.submit(function)
        yield
        done.result()


def _compile_ahead(step: Step, objective: Objective, batch_size: int) -> None:
    """Compiles a step for the objective's first state; steps of several processes, which meet in it, compile when called."""
    if parallel.num_processes() == 1 and isinstance(step, parallel.ParallelStep):
        batch = abstract_batch(objective.examples, batch_size)
        step.compile(objective.abstract_state(), jax.eval_shape(parallel.shard, batch))


def abstract_batch(examples: Any, batch_size: int) -> Any:
    """Shapes and dtypes of a batch; placeholders for endless data, which has no examples."""
    if examples is None:
        return jax.ShapeDtypeStruct((batch_size,), np.float32)
    return jax.tree.map(lambda rows: jax.ShapeDtypeStruct((batch_size, *rows.shape[1:]), rows.dtype), examples)


def load_data(settings: DataConfig) -> DataSet:
    """The data that a config names."""
    fractions = settings.validation_fraction, settings.test_fraction
    data = load(settings.name, settings.data_dir, fractions=fractions)
    return conditioned_on_labels(data) if settings.condition_on_labels else data


def check_batch_size(settings: TrainingConfig, data: DataSet) -> None:
    """Raises ``ValueError`` unless a batch splits over devices and into parts, and is no larger than the training data."""
    batch_size, num_parts = settings.batch_size, settings.num_parts
    parallel.check_global_batch_size(batch_size)
    if (share := batch_size // parallel.all_devices()) % num_parts:
        raise ValueError(
            f"config.training.num_parts must divide the {share} examples that a device has of a batch, got {num_parts}"
        )
    if data.examples and batch_size > (num := len(data.examples["train"])):
        raise ValueError(
            f"config.training.batch_size must be at most {num}, the training examples of {data.name}, got {batch_size}"
        )


def build_objective(config: Config, data: DataSet, spec: Spec | None = None) -> Objective:
    """What ``config.objective`` names, for a model that is by default the one of the settings and the data.

    Raises:
        ValueError: If settings do not fit the data.
    """
    return OBJECTIVES[config.objective](config, data, model_spec(config, data) if spec is None else spec)


def batches(config: Config, examples: Any, first_step: int) -> Iterator[Any]:
    """This process's share of the batch of every step from ``first_step`` on; placeholders for endless data."""
    size = config.training.batch_size
    if examples is None:
        return itertools.repeat(parallel.shard(parallel.own_share(np.zeros(size, np.float32))))
    return device_batches(examples, seed=config.seed, batch_size=size, first_step=first_step)
