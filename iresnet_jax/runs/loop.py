"""Training that writes to a folder and resumes from it.

A workdir belongs to one config. Running the same command again resumes from the newest intact checkpoint, and goes on bit for
bit as if it had not been stopped: batches and random numbers are functions of (seed, step). A run that is told to stop saves
the step it has reached; the first log line after a resume then averages only the steps since. A run that is killed loses the
steps since its last checkpoint. Between validations, a checkpoint follows the first log line after `SAVE_SECONDS`: lost are at
most the steps of that time and ``log_every_steps`` more, with several processes another three, until they have agreed to save.
"""

import contextlib
import logging
import os
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, SupportsFloat

from iresnet_jax.checked_dataclasses import checked, tagged, to_plain
from iresnet_jax.data.batches import device_batches
from iresnet_jax.data.dataset import DataSet
from iresnet_jax.models.saved import Spec
from iresnet_jax.runs import allocator, hosts, run_folder
from iresnet_jax.runs.checkpoints import Checkpoints
from iresnet_jax.runs.compiled_steps import CompiledSteps
from iresnet_jax.runs.config import Config
from iresnet_jax.runs.hosts import Agreement, Wish
from iresnet_jax.runs.machine import device_summary, prepare_backend
from iresnet_jax.runs.metrics import MetricWriter, Progress, read_metrics
from iresnet_jax.runs.model_from_config import load_data, model_spec
from iresnet_jax.runs.objective_from_config import build_objective
from iresnet_jax.runs.signals import Stopped, StopRequests
from iresnet_jax.training import parallel
from iresnet_jax.training.initialization import num_parameters
from iresnet_jax.training.step import Objective, TrainingStep, TrainState
from iresnet_jax.training.trainer import CompiledStep, Trainer, TrainingConfig

_logger = logging.getLogger(__name__)
SAVE_SECONDS = 600.0  # between checkpoints, where validations are further apart


def train(
    config: Config,
    workdir: str | os.PathLike[str],
    *,
    data: DataSet | None = None,
    say: Callable[[str], None] | None = None,
    steps: CompiledSteps | None = None,
) -> TrainState:
    """Starts from the newest checkpoint, if any, and trains to ``total_steps`` or until ``minutes`` have passed.

    Args:
        config: All settings, from `config.parse`.
        workdir: Folder of the run: config, model, metrics, checkpoints.
        data: The data; by default what ``config.data`` names.
        say: Takes a line of progress at every validation; by default the log, beside a bar on a terminal.
        steps: Compiled steps of earlier runs, to which this run adds its own; None compiles all.

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
    if data is None and dataset.examples and "test" not in dataset.examples:
        raise ValueError(
            f"{dataset.name} has no test examples, which the report is on: add them, or set aside some with data.test_fraction"
        )
    check_batch_size(config.training, dataset)
    _check_alike(config, dataset)
    checkpoints = Checkpoints(workdir)
    with contextlib.ExitStack() as stack:
        spec, objective = _begin(workdir, config, dataset, stack)
        writer = stack.enter_context(MetricWriter(workdir)) if hosts.is_first() else None
        # until a step is done there is nothing to save: signals end the process
        compile_step = None if steps is None else steps.compiler(config, spec)
        trainer = _TrainerOnDisk(objective, config.training, workdir, writer, checkpoints, compile_step, say)
        progress = stack.enter_context(Progress(trainer.horizon, trainer.step, shown=hosts.is_first() and say is None))
        trainer.watch(stack.enter_context(StopRequests()), progress)
        batches = device_batches(
            objective.examples, seed=config.seed, batch_size=config.training.batch_size, first_step=trainer.step
        )
        trainer.run(batches, trainer.heed_requests)
        return trainer.state


def check_batch_size(settings: TrainingConfig, data: DataSet) -> None:
    """Raises ``ValueError`` unless a batch splits over devices and into parts, and is no larger than the training data."""
    settings.check_splits(parallel.all_devices())
    if data.examples and (size := settings.batch_size) > (num := len(data.examples["train"])):
        raise ValueError(f"config.training.batch_size must be at most {num}, the training examples of {data.name}, got {size}")


def _check_alike(config: Config, data: DataSet) -> None:
    """Raises ``ValueError`` if processes have different settings or data."""
    hosts.agree_on("config", to_plain(config))
    hosts.agree_on("data set", {"name": data.name, "fingerprint": data.fingerprint})


def _begin(workdir: Path, config: Config, data: DataSet, stack: contextlib.ExitStack) -> tuple[Spec, Objective]:
    """Process 0 claims the folder, for as long as the stack lasts alone, and makes the model; the others receive it."""
    claimed: list[tuple[Spec, Objective]] = []

    def claim():
        run_folder.check_belongs_to(workdir, config)
        spec = run_folder.model_of_run(workdir, data) or model_spec(config, data)
        claimed.append((spec, build_objective(config, data, spec)))  # which raises before anything is written
        workdir.mkdir(parents=True, exist_ok=True)
        stack.enter_context(run_folder.alone_in(workdir))
        run_folder.check_belongs_to(workdir, config)  # another process may have claimed it meanwhile,
        run_folder.model_of_run(workdir, data)  # for other data
        run_folder.claim(workdir, config, spec, data)
        return tagged(spec) if parallel.num_processes() > 1 else None

    plain = hosts.from_first(claim)
    if claimed:
        return claimed[0]
    spec = checked(Spec, plain, "model")
    return spec, build_objective(config, data, spec)


class _TrainerOnDisk(Trainer):
    """A run that writes to a folder, saves when told to stop, and agrees with other processes, if any, when to save or stop."""

    advice = f"{Trainer.advice}, in another workdir; the old workdir keeps its checkpoints"

    def __init__(
        self,
        objective: Objective,
        settings: TrainingConfig,
        workdir: Path,
        writer: MetricWriter | None,
        checkpoints: Checkpoints,
        compile_step: Callable[[TrainingStep], CompiledStep] | None,
        say: Callable[[str], None] | None,
    ):
        self._workdir, self._writer, self._checkpoints = workdir, writer, checkpoints
        self._progress: Progress | None = None
        self._written = 0  # when the folder's files were
        self._agreement = Agreement(self._wishes) if parallel.num_processes() > 1 else None
        if self._agreement is not None:
            compile_step = self._agreement.parallelize
        super().__init__(objective, settings, compile_step=compile_step, say=say or (lambda line: _logger.info("%s", line)))
        self._saved_at = time.monotonic()
        if self.step:
            _logger.info("resuming from step %d of %d", self.step, self.horizon)

    def watch(self, stop: StopRequests, progress: Progress) -> None:
        """From now on signals are noted, and the bar shows where the run stands."""
        self._stop, self._progress = stop, progress

    def restored(self, fresh: TrainState) -> tuple[TrainState, int, list[float]]:
        """The newest checkpoint of process 0, or the fresh state, equal on all devices, and what was measured until then."""
        _logger.info("%d parameters on %s", num_parameters(fresh.params), device_summary())
        found: list[tuple[TrainState, int]] = []

        def restore():
            self._written = run_folder.written_at(self._workdir)
            found.append(self._checkpoints.restore_latest(fresh._replace(constants={})) or (fresh, 0))
            step = found[0][1]
            assert self._writer is not None  # process 0 has one
            self._writer.truncate_after(step)
            records = [record for record in read_metrics(self._workdir) if record["split"] == "validation"]
            return step, [self._objective.selection(record) for record in records]

        step, losses = hosts.from_first(restore)
        newest = found[0][0]._replace(constants=fresh.constants) if found else fresh
        state = hosts.broadcast(newest)  # a fresh state, too: hosts round differently
        allocator.return_freed_memory()  # restoring leaves fragments that steps could not use
        return state, step, losses

    def take_step(self, batch: Any) -> None:
        """Updates the state by one batch; from then on there is something to save."""
        super().take_step(batch)
        self._stop.unsaved = True

    def record(self, metrics: Mapping[str, SupportsFloat], split: str) -> None:
        """Writes measurements and shows those of steps."""
        if self._writer is not None:
            self._writer.write(self.step, metrics, split=split)
        if split == "train" and self._progress is not None:
            self._progress.update(self.step, self.horizon, {self._objective.name: metrics[self._objective.name]})

    @property
    def elapsed_s(self) -> float:
        """Seconds of training so far, over all processes of the run."""
        return super().elapsed_s if self._writer is None else self._writer.elapsed_s

    def agreed(self, horizon: int) -> int:
        """The estimate of process 0, whose clock counts."""
        return hosts.from_first(lambda: horizon)

    def store(self, loss: float | None) -> None:
        """Writes a checkpoint."""
        if hosts.is_first():
            run_folder.check_is_there(self._workdir, self._written)
            self._checkpoints.save(self.step, self.state._replace(constants={}), metric=loss)
        self._saved_at = time.monotonic()
        # With several processes a signal always waits for the step after which all stop.
        self._stop.unsaved = parallel.num_processes() > 1

    def heed_requests(self) -> bool:
        """After a step: saves and raises `Stopped` if some process was told to stop, or saves if that is due."""
        granted = self._wishes() if self._agreement is None else self._agreement.granted()
        received = next((signal.Signals[wish.name] for wish in (Wish.SIGTERM, Wish.SIGINT) if wish in granted), None)
        if (received or Wish.SAVE in granted) and not self.is_validated:
            self.store_unvalidated()
        if received:
            there = f"after step {self.step} of {self.horizon}"
            raise Stopped(f"stopped by {received.name} {there}: the same command goes on from it", received)
        return False

    def _wishes(self) -> set[Wish]:
        """To stop at a signal, and to save if a line of the log has just been written and the last checkpoint is old."""
        is_save_due = not self._window and time.monotonic() - self._saved_at > SAVE_SECONDS
        stop = set() if self._stop.received is None else {Wish[self._stop.received.name]}
        return stop | ({Wish.SAVE} if is_save_due else set())
