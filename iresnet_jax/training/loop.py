"""The training loop: batches in, metrics and checkpoints out, and the same run again after an interruption.

A workdir belongs to one config. Running the same command again resumes from the newest intact checkpoint, and goes on bit for
bit as if it had not been stopped: batches and random numbers are functions of (seed, step). A run that is told to stop saves
the step it has reached (where that lies between two lines of its log, the next averages over what is left); one that is killed
loses what came after the last validation, and hardly more than `SAVE_SECONDS`.
"""

import itertools
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from iresnet_jax.data.device_batches import device_batches
from iresnet_jax.files import replacing
from iresnet_jax.training import config as config_lib
from iresnet_jax.training import exclusive, parallel, run, state
from iresnet_jax.training.checkpoints import Checkpoints
from iresnet_jax.training.interruption import Stopped, StopRequests
from iresnet_jax.training.metrics import MetricWriter, Progress, check_finite
from iresnet_jax.training.objectives import classification, hybrid
from iresnet_jax.training.objectives import likelihood as density
from iresnet_jax.training.objectives.objective import Objective

OBJECTIVES = {"density": density.objective, "classification": classification.objective, "hybrid": hybrid.objective}

SAVE_SECONDS = 600.0  # between checkpoints, where validations are further apart


def train(config: Any, workdir: str | os.PathLike[str]) -> state.TrainState:
    """Trains to ``config.training.total_steps``, from where the workdir's newest checkpoint stands.

    Args:
        config: All settings; see `config.default_config`.
        workdir: Folder of the run: config, metrics, checkpoints.

    Returns:
        The last state.

    Raises:
        ValueError: If settings contradict each other or the workdir belongs to another config.
        RuntimeError: If training blows up; the last good checkpoint stays.
        Stopped: On Ctrl-C or SIGTERM, with a checkpoint of the last step.
    """
    workdir = Path(workdir)
    settings = config.training
    config_lib.check_settings(config)
    run.prepare_backend(config)
    source = run.load_source(config.data.name, config.data.data_dir)
    parallel.check_global_batch_size(settings.batch_size)
    objective = build_objective(config, source)
    claim_workdir(workdir, config_lib.to_plain(config))
    with exclusive.alone_in(workdir):
        return _train(config, workdir, objective)


def _train(config: Any, workdir: Path, objective: Objective) -> state.TrainState:
    settings = config.training
    started = time.monotonic()
    fresh = state.create(objective.initial_variables(), objective.optimizer, num_terms=objective.num_terms)
    checkpoints = Checkpoints(workdir)
    logging.info("%s: %d parameters on %s", workdir, run.num_parameters(fresh.params), run.device_summary())
    restored = checkpoints.restore_latest(fresh)
    current, first_step = restored or (fresh, 0)
    if first_step:
        logging.info("resuming from step %d of %d", first_step, settings.total_steps)
    parallel_step = parallel.parallelize(objective.make_step(int(current.num_terms)))
    validate = objective.make_validation()
    with MetricWriter(workdir) as writer, Progress(settings.total_steps, first_step) as progress, StopRequests() as stop:
        writer.truncate_after(first_step)
        window: list[Any] = []
        timed_steps, window_start, compiled = 0, time.monotonic(), False
        saved_at = time.monotonic()
        feed = batches(config, objective.examples, first_step)
        for step, batch in zip(range(first_step, settings.total_steps), feed, strict=False):
            current, metrics = parallel_step(current, batch)
            window.append(metrics)
            timed_steps += 1
            if not compiled:
                jax.block_until_ready(metrics)
                if step == first_step:
                    writer.write(step, {"compile_seconds": time.monotonic() - started}, split="timing")
                timed_steps, window_start, compiled = 0, time.monotonic(), True
            done = step + 1
            evaluate = done == settings.total_steps or done % settings.eval_every_steps == 0
            if evaluate or done % settings.log_every_steps == 0:
                means = mean_over_window(jax.device_get(window))
                check_finite(means, done - len(window), done)
                if timed_steps:
                    means["seconds_per_step"] = (time.monotonic() - window_start) / timed_steps
                writer.write(done, means)
                progress.update(done, {objective.name: means[objective.name]})
                window, timed_steps, window_start = [], 0, time.monotonic()
            if evaluate:
                held_out = validate(current)
                check_finite(held_out, done, done)
                writer.write(done, held_out, split="validation")
                num_terms = int(held_out.get("num_terms", int(current.num_terms)))
                if num_terms != int(current.num_terms):
                    current = current._replace(num_terms=jnp.int32(num_terms))
                    parallel_step, compiled = parallel.parallelize(objective.make_step(num_terms)), False
                checkpoints.save(done, current, metric=objective.loss(held_out))
                name = objective.name
                logging.info("step %d of %d: validation %s %.4f", done, settings.total_steps, name, held_out[name])
                window_start = saved_at = time.monotonic()
            elif stop.received or (not window and time.monotonic() - saved_at > SAVE_SECONDS):
                if window:
                    check_finite(mean_over_window(jax.device_get(window)), done - len(window), done)
                checkpoints.save(done, current)
                window_start = saved_at = time.monotonic()
            if stop.received:
                there = f"after step {done} of {settings.total_steps}"
                raise Stopped(f"stopped by {stop.received.name} {there}: the same command goes on from it", stop.received)
    return current


def build_objective(config: Any, source: run.Source) -> Objective:
    """What ``config.objective`` names, for the data of a run.

    Raises:
        ValueError: If there is none of that name, or settings do not fit it.
    """
    if config.objective not in OBJECTIVES:
        raise ValueError(f"objective must be one of {', '.join(OBJECTIVES)}, got {config.objective!r}")
    return OBJECTIVES[config.objective](config, source)


def batches(config: Any, examples: Any, first_step: int) -> Iterator[Any]:
    """The batch of every step from ``first_step`` on, split over the local devices; placeholders for endless data."""
    size = config.training.batch_size
    if examples is None:
        placeholder = parallel.shard(np.zeros(size, np.float32))
        return itertools.repeat(placeholder)
    return device_batches(examples, seed=config.seed, batch_size=size, first_step=first_step)


def mean_over_window(metrics: list[dict[str, Any]]) -> dict[str, float]:
    """The mean of every metric over some steps, in float64."""
    return {name: float(np.mean([m[name] for m in metrics], dtype=np.float64)) for name in metrics[0]}


def claim_workdir(workdir: Path, config: dict[str, Any]) -> None:
    """Writes ``config.json`` into a new workdir, or checks that the one there is the same.

    Raises:
        ValueError: If it differs; names the first difference.
    """
    path = workdir / run.CONFIG_FILE
    if path.exists():
        try:
            theirs = config_lib.with_later_defaults(json.loads(path.read_text()))
        except (json.JSONDecodeError, KeyError, TypeError):
            raise ValueError(f"{path} is damaged: restore it, or choose another --workdir") from None
        if difference := config_lib.first_difference(config, theirs):
            raise ValueError(f"{workdir} holds a run with another config: {difference}; choose another --workdir or delete it")
        return
    workdir.mkdir(parents=True, exist_ok=True)
    with replacing(path) as incoming:
        incoming.write_text(json.dumps(config, indent=2) + "\n")
