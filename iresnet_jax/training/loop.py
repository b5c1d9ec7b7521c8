"""The training loop: batches in, metrics and checkpoints out, and the same run again after an interruption.

A workdir belongs to one config. Running the same command again resumes from the newest intact checkpoint, and goes on bit for
bit as if it had not been stopped: batches and random numbers are functions of (seed, step).
"""

import itertools
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging

from iresnet_jax import density
from iresnet_jax.data import device_feed, feed
from iresnet_jax.training import config as config_lib
from iresnet_jax.training import parallel, run, state
from iresnet_jax.training.checkpoint import Checkpoints
from iresnet_jax.training.density import evaluation_keys, make_evaluation, make_step
from iresnet_jax.training.metrics import MetricWriter, Progress, check_finite


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
    """
    workdir = Path(workdir)
    settings = config.training
    run.apply_matmul_precision(config)
    source = run.load_source(config.data.name, config.data.data_dir)
    spec = run.density_spec(config, source)
    parallel.check_global_batch_size(settings.batch_size)
    unroll = run.unroll(config)
    estimator = config_lib.build_estimator(config.logdet)
    optimizer = config_lib.build_optimizer(config.optimizer, settings.total_steps)
    claim_workdir(workdir, config_lib.to_plain(config))

    objective = density.objective_name(spec)
    started = time.monotonic()
    fresh = state.create(run.initial_variables(config, spec, source), optimizer)
    checkpoints = Checkpoints(workdir)
    logging.info("%s: %d parameters on %s", workdir, run.num_parameters(fresh.params), run.device_summary())
    restored = checkpoints.restore_latest(fresh)
    current, first_step = restored or (fresh, 0)
    if first_step:
        logging.info("resuming from step %d of %d", first_step, settings.total_steps)
    step_fn = make_step(
        spec,
        estimator,
        optimizer,
        config_lib.build_schedule(config.optimizer, settings.total_steps),
        seed=config.seed,
        constrain=config_lib.build_constraint(config.constraint, spec.flow, training=True),
        ema_decay=settings.ema_decay,
        unroll=unroll,
        rematerialize=settings.rematerialize,
        draw=source.draw,
    )
    parallel_step = parallel.parallelize(step_fn)
    validate = Validation(config, spec, source)
    with MetricWriter(workdir) as writer, Progress(settings.total_steps, first_step) as progress:
        writer.truncate_after(first_step)
        window: list[Any] = []
        timed_steps, window_start = 0, time.monotonic()
        for step, batch in zip(range(first_step, settings.total_steps), batches(config, source, first_step), strict=False):
            current, metrics = parallel_step(current, batch)
            window.append(metrics)
            timed_steps += 1
            if step == first_step:
                jax.block_until_ready(metrics)
                writer.write(step, {"compile_seconds": time.monotonic() - started}, split="timing")
                timed_steps, window_start = 0, time.monotonic()
            done = step + 1
            evaluate = done == settings.total_steps or done % settings.eval_every_steps == 0
            if evaluate or done % settings.log_every_steps == 0:
                means = mean_over_window(jax.device_get(window))
                check_finite(means, done - len(window), done)
                if timed_steps:
                    means["seconds_per_step"] = (time.monotonic() - window_start) / timed_steps
                writer.write(done, means)
                progress.update(done, {objective: means[objective]})
                window, timed_steps, window_start = [], 0, time.monotonic()
            if evaluate:
                held_out = validate(current)
                check_finite(held_out, done, done)
                writer.write(done, held_out, split="validation")
                checkpoints.save(done, current, metric=held_out[objective])
                logging.info("step %d of %d: validation %s %.4f", done, settings.total_steps, objective, held_out[objective])
                window_start = time.monotonic()
    return current


class Validation:
    """Mean objective of held-out data under the averaged parameters, norms iterated to their tolerance."""

    def __init__(self, config: Any, spec: density.DensitySpec, source: run.Source):
        estimator = config_lib.build_estimator(config.evaluation.logdet)
        self._spec, self._seed = spec, config.seed
        self._examples = source.held_out("validation", config.training.eval_examples, config.seed)
        constrain = config_lib.build_constraint(config.constraint, spec.flow, training=False)
        self._constrain = jax.jit(lambda params, spectral: constrain(params, spectral).weights)
        self._evaluate = parallel.parallelize_eval(make_evaluation(spec, estimator))
        self._batch_size = round_up(min(config.evaluation.batch_size, len(self._examples)), jax.local_device_count())

    def __call__(self, current: state.TrainState) -> dict[str, float]:
        """The mean of every term."""
        weights = self._constrain(current.ema, current.spectral)
        outputs = evaluate_examples(
            self._evaluate, (weights, current.ema["prior"]), self._examples, jax.random.key(self._seed), self._batch_size
        )
        del outputs["truncation_bound"]
        return {name: float(np.mean(values, dtype=np.float64)) for name, values in outputs.items()}


def evaluate_examples(
    evaluate: Any,
    weights: Any,
    examples: np.ndarray,
    key: jax.Array,
    batch_size: int,
    *,
    draw: tuple[int, int] = (0, 0),
    num_devices: int | None = None,
) -> dict[str, np.ndarray]:
    """Runs a parallel evaluation over all examples.

    Args:
        evaluate: From `make_evaluation`, for all devices.
        weights: Constrained weights and the prior's parameters.
        examples: The data.
        key: Of the evaluation; an example's random numbers depend on it, its place and the draw, and not on the batches.
        batch_size: A multiple of the number of devices.
        draw: Counts the noise draws, and the probe draws of each.
        num_devices: Devices to use, from the first; all local ones by default.
    """
    parts = []
    for indices, mask in feed.eval_batches(len(examples), batch_size):
        batch = parallel.shard((examples[indices], *evaluation_keys(key, indices, *draw)), num_devices=num_devices)
        outputs = parallel.unshard(evaluate(weights, batch))
        parts.append(jax.tree.map(lambda values, mask=mask: values[mask], outputs))
    return jax.tree.map(lambda *values: np.concatenate(values), *parts)


def batches(config: Any, source: run.Source, first_step: int) -> Iterator[Any]:
    """The batch of every step from ``first_step`` on, split over the local devices; placeholders for endless data."""
    size = config.training.batch_size
    if source.images is None:
        placeholder = parallel.shard(np.zeros(size, np.float32))
        return itertools.repeat(placeholder)
    return device_feed.batches(source.images.images["train"], seed=config.seed, batch_size=size, first_step=first_step)


def mean_over_window(metrics: list[dict[str, Any]]) -> dict[str, float]:
    """The mean of every metric over some steps, in float64."""
    return {name: float(np.mean([m[name] for m in metrics], dtype=np.float64)) for name in metrics[0]}


def claim_workdir(workdir: Path, config: dict[str, Any]) -> None:
    """Writes ``config.json`` into a new workdir, or checks that the one there is the same.

    Raises:
        ValueError: If it differs; names the first difference.
    """
    path = workdir / "config.json"
    if path.exists():
        try:
            theirs = json.loads(path.read_text())
        except json.JSONDecodeError:
            raise ValueError(f"{path} is damaged: restore it, or choose another --workdir") from None
        if difference := config_lib.first_difference(config, theirs):
            raise ValueError(f"{workdir} holds a run with another config: {difference}; choose another --workdir or delete it")
        return
    workdir.mkdir(parents=True, exist_ok=True)
    incoming = path.with_suffix(".incoming")
    incoming.write_text(json.dumps(config, indent=2) + "\n")
    incoming.replace(path)


def round_up(size: int, multiple: int) -> int:
    """The least multiple that is at least ``size``."""
    return -(-size // multiple) * multiple
