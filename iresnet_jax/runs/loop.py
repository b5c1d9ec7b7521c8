"""Training that writes to a folder and resumes from it.

A workdir belongs to one config. Running the same command again resumes from the newest intact
checkpoint, and goes on bit for bit as if it had not been stopped: batches and random numbers are
functions of (seed, step). A run that is told to stop saves the step it has reached; the first log
line after a resume then averages only the steps since. A run that is killed loses the steps since
its last checkpoint. Between validations, a checkpoint follows the first log line after
`SAVE_SECONDS`: lost are at most the steps of that time and ``log_every_steps`` more.
"""

import contextlib
import logging
import os
import signal
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np

from iresnet_jax.atomic_files import path_of
from iresnet_jax.checked_dataclasses import checked, tagged, to_plain
from iresnet_jax.data.batches import device_batches
from iresnet_jax.data.dataset import DataSet
from iresnet_jax.models.saved import Spec
from iresnet_jax.runs import hosts, run_folder
from iresnet_jax.runs.background import Background
from iresnet_jax.runs.checkpoints import Checkpoints
from iresnet_jax.runs.config import Config
from iresnet_jax.runs.machine import device_summary, prepare_backend, return_freed_memory
from iresnet_jax.runs.metrics import MetricWriter, Progress
from iresnet_jax.runs.model_from_config import load_data, model_spec
from iresnet_jax.runs.objective_from_config import build_objective
from iresnet_jax.runs.signals import Stopped, StopRequests
from iresnet_jax.training import parallel
from iresnet_jax.training.initialization import num_parameters
from iresnet_jax.training.step import Objective, TrainState
from iresnet_jax.training.trainer import BlowUpError, Trainer, TrainingConfig

_logger = logging.getLogger(__name__)
SAVE_SECONDS = 600.0  # between checkpoints, where validations are further apart
SAVE = 1  # wish of a process to save, below the numbers of the signals that it may get


def train(
    config: Config,
    workdir: str | os.PathLike[str],
    *,
    data: DataSet | None = None,
    say: Callable[[str], None] | None = None,
) -> TrainState:
    """Starts from the newest checkpoint, if any, and trains to ``total_steps`` or until ``minutes``
    have passed.

    Args:
        config: All settings, from `config.parse`.
        workdir: Folder of the run: config, model, metrics, checkpoints.
        data: The data; by default what ``config.data`` names.
        say: Takes a line of progress at every validation; by default the log, beside a bar on a
            terminal.

    Returns:
        The last state.

    Raises:
        ValueError: If settings contradict each other or the data, or the workdir belongs to another
            config or other data.
        RuntimeError: If training blows up; the last good checkpoint stays.
        Stopped: On Ctrl-C or SIGTERM, with a checkpoint of the last step.
    """
    # 1. Data and folder. All processes of a run have one config and one data set; the first one
    # writes.
    workdir, settings = path_of(workdir), config.training
    prepare_backend(settings.matmul_precision)
    dataset = load_data(config.data) if data is None else data
    if data is None and dataset.examples and len(dataset.examples.get("test", ())) < 2:
        raise ValueError(
            f"{dataset.name} has not the two test examples that a report needs: add a split called "
            "test or, where there are no "
            "splits, set data.test_fraction"
        )
    check_batch_size(settings, dataset)
    hosts.agree_on(
        "run",
        {
            "config": to_plain(config),
            "data": {"name": dataset.name, "fingerprint": dataset.fingerprint},
        },
    )

    with contextlib.ExitStack() as stack:
        # 2. Model and objective. From here on the folder is this run's alone.
        objective, check_claim = _claim(workdir, config, dataset, stack)

        # 3. Newest checkpoint, or the first state.
        began = time.monotonic()  # a limit on time counts what every start does anew
        state, losses, seconds_before, writer = _newest(workdir, objective, stack)

        # 4. Every n steps: log, validate and save.
        saved_at, stop = time.monotonic(), StopRequests()
        background, checkpoints = stack.enter_context(Background()), Checkpoints(workdir)

        def log(split: str, metrics: Mapping[str, float]) -> None:
            if writer is not None:
                background(check_claim)
                background(writer.write, trainer.records[-1])
            if split == "train":
                progress.update(
                    trainer.step, trainer.horizon, {objective.name: metrics[objective.name]}
                )

        def save(loss: float | None = None) -> None:
            nonlocal saved_at
            if writer is not None:
                background.wait()  # for the one before: memory holds one copy of the state
                state = jax.tree.map(np.array, jax.device_get(trainer.state._replace(constants={})))
                background(check_claim)
                # first, so that a checkpoint has the measurements that led to it
                background(writer.publish)
                background(checkpoints.save, trainer.step, state, metric=loss)
            saved_at = time.monotonic()

        trainer = Trainer(
            objective,
            settings,
            state=state,
            losses=losses,
            seconds_before=seconds_before + time.monotonic() - began,
            agree=lambda horizon: hosts.from_first(lambda: horizon),  # by the clock of process 0
            log=log,
            validated=save,
            say=say or (lambda line: _logger.info("%s", line)),
        )
        progress = stack.enter_context(
            Progress(trainer.horizon, trainer.step, shown=hosts.is_first() and say is None)
        )

        # 5. One batch after the other; stop if somebody asked any of the processes.
        first_step = trainer.step
        batches = device_batches(
            objective.examples,
            seed=config.seed,
            batch_size=settings.batch_size,
            first_step=first_step,
        )
        try:
            for step in trainer.steps(batches):
                # until now there was nothing to save: signals ended the process
                if step == first_step + 1:
                    stack.enter_context(stop)
                    return_freed_memory()  # of the compiler
                if (
                    parallel.num_processes() > 1
                    and step % hosts.AGREE_EVERY
                    and not trainer.is_logged
                ):
                    continue
                is_save_due = trainer.is_logged and time.monotonic() - saved_at > SAVE_SECONDS
                wish = hosts.largest(stop.received or (SAVE if is_save_due else 0))
                if wish and not trainer.is_validated:
                    trainer.check()
                    save()
                if wish > SAVE:
                    hosts.from_first(background.wait)
                    received, there = (
                        signal.Signals(wish),
                        f"after step {step} of {trainer.horizon}",
                    )
                    raise Stopped(
                        f"stopped by {received.name} {there}: the same command goes on from it",
                        received,
                    )
        except BlowUpError as error:
            if writer is not None:
                background(writer.publish)  # measurements before it tell what went wrong
            raise BlowUpError(
                f"{error}, in another workdir; the old workdir keeps its checkpoints"
            ) from error
        hosts.from_first(background.wait)
        return trainer.state


def check_batch_size(settings: TrainingConfig, data: DataSet) -> None:
    """Raises ``ValueError`` unless a batch splits over devices and into parts, and is no larger
    than the training data.
    """
    settings.check_splits(parallel.all_devices())
    if data.examples and (size := settings.batch_size) > (num := len(data.examples["train"])):
        raise ValueError(
            f"config.training.batch_size must be at most {num}, the training examples "
            f"of {data.name}, got {size}"
        )


def _claim(
    workdir: Path, config: Config, data: DataSet, stack: contextlib.ExitStack
) -> tuple[Objective, Callable[[], None]]:
    """Process 0 claims the folder, until the stack ends, and makes the model; the others receive
    it.

    The function that comes with it raises ``OSError`` once another process has taken the folder.
    """
    made, checks = list[Objective](), list[Callable[[], None]]()
    # from a checkpoint or from process 0
    without_start = replace(config, training=replace(config.training, initial_model=""))

    def claim():
        run_folder.check_belongs_to(workdir, config)
        spec = run_folder.model_of_run(workdir, data) or model_spec(config, data)
        settings = without_start if Checkpoints(workdir).steps() else config
        # which raises before anything is written
        made.append(build_objective(settings, data, spec))
        checks.append(stack.enter_context(run_folder.claimed(workdir, config, spec, data)))
        return tagged(spec) if parallel.num_processes() > 1 else None

    plain = hosts.from_first(claim)
    objective = (
        made[0] if made else build_objective(without_start, data, checked(Spec, plain, "model"))
    )
    return objective, next(iter(checks), lambda: None)


def _newest(
    workdir: Path, objective: Objective, stack: contextlib.ExitStack
) -> tuple[TrainState, list[float], float, MetricWriter | None]:
    """The newest checkpoint of process 0 or the first state, losses and seconds that led to it,
    and in process 0 the log.
    """
    fresh = objective.initial_state()
    _logger.info("%d parameters on %s", num_parameters(fresh.params), device_summary())
    states, writers = [fresh], []

    def restore():
        if found := Checkpoints(workdir).restore(fresh._replace(constants={})):
            for note in found.notes:
                warnings.warn(note, stacklevel=2)
            states.append(found.state._replace(constants=fresh.constants))
        writers.append(stack.enter_context(MetricWriter(workdir, int(states[-1].step))))
        kept = writers[0].kept
        losses = [objective.selection(record) for record in kept if record["split"] == "validation"]
        return losses, max((record["wall_time_s"] for record in kept), default=0.0)

    losses, seconds = hosts.from_first(restore)
    state = hosts.broadcast(states[-1])  # a fresh state, too: hosts round differently
    if int(state.step):
        _logger.info("resuming from step %d of %d", state.step, state.horizon)
    return state, losses, seconds, next(iter(writers), None)
