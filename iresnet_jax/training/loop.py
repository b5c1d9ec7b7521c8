"""The training loop: batches in, metrics and checkpoints out, and the same run again after an interruption.

A workdir belongs to one config. Running the same command again resumes from the newest intact checkpoint, and goes on bit for
bit as if it had not been stopped: batches and random numbers are functions of (seed, step).
"""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging

from iresnet_jax import density, model
from iresnet_jax.data import feed
from iresnet_jax.training import config as config_lib
from iresnet_jax.training import parallel, run, state
from iresnet_jax.training.checkpoint import Checkpoints
from iresnet_jax.training.density import make_evaluation, make_step
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
    source = run.load_source(config.data.name, config.data.data_dir)
    spec = run.density_spec(config, source)
    parallel.check_global_batch_size(settings.batch_size)
    unroll = run.unroll(config)
    estimator = config_lib.build_estimator(config.logdet)
    optimizer = config_lib.build_optimizer(config.optimizer, settings.total_steps)
    claim_workdir(workdir, config_lib.to_plain(config))

    started = time.monotonic()
    fresh = state.create(run.initial_variables(config, spec, source), optimizer)
    checkpoints = Checkpoints(workdir)
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
        num_power_steps=config.spectral.num_steps,
        ema_decay=settings.ema_decay,
        unroll=unroll,
        rematerialize=settings.rematerialize,
        draw=source.draw,
    )
    parallel_step = parallel.parallelize(step_fn)
    validate = Validation(config, spec, source, unroll=unroll)
    with MetricWriter(workdir) as writer, Progress(settings.total_steps, first_step) as progress:
        writer.truncate_after(first_step)
        window: list[Any] = []
        window_start = time.monotonic()
        for step, batch in zip(range(first_step, settings.total_steps), batches(config, source, first_step), strict=False):
            current, metrics = parallel_step(current, batch)
            if step == first_step:
                jax.block_until_ready(metrics)
                compile_seconds = time.monotonic() - started
                writer.write(step, {"compile_seconds": compile_seconds}, split="timing")
                window_start = time.monotonic()
            else:
                window.append(metrics)
            done = step + 1
            last = done == settings.total_steps
            evaluate = last or done % settings.eval_every_steps == 0
            if window and (evaluate or done % settings.log_every_steps == 0):
                means = mean_over_window(jax.device_get(window))
                check_finite(means, done - len(window), done)
                means["seconds_per_step"] = (time.monotonic() - window_start) / len(window)
                writer.write(done, means)
                progress.update(done, {density.objective_name(spec): means[density.objective_name(spec)]})
                window, window_start = [], time.monotonic()
            if evaluate:
                held_out = validate(current)
                check_finite(held_out, done, done)
                writer.write(done, held_out, split="validation")
                checkpoints.save(done, current, metric=held_out[density.objective_name(spec)])
                window_start = time.monotonic()
    return current


class Validation:
    """Mean objective of held-out data under the averaged parameters, norms iterated to their tolerance."""

    def __init__(self, config: Any, spec: density.DensitySpec, source: run.Source, *, unroll: bool):
        estimator = config_lib.build_estimator(config.evaluation.logdet)
        self._spec, self._seed = spec, config.seed
        self._examples = source.held_out("validation", config.training.eval_examples, config.seed)
        rtol = config.spectral.rtol
        self._constrain = jax.jit(lambda params, spectral: model.constrain(spec.flow, params, spectral, rtol=rtol).weights)
        self._evaluate = parallel.parallelize_eval(make_evaluation(spec, estimator, unroll=unroll))
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
    evaluate: Any, weights: Any, examples: np.ndarray, key: jax.Array, batch_size: int
) -> dict[str, np.ndarray]:
    """Runs a parallel evaluation over all examples; example ``i`` has the key ``fold_in(key, i)`` whatever the batches."""
    fold = jax.jit(jax.vmap(jax.random.fold_in, in_axes=(None, 0)))
    parts = []
    for indices, mask in feed.eval_batches(len(examples), batch_size):
        batch = parallel.shard((examples[indices], fold(key, indices)))
        outputs = parallel.unshard(evaluate(weights, batch))
        parts.append(jax.tree.map(lambda values, mask=mask: values[mask], outputs))
    return jax.tree.map(lambda *values: np.concatenate(values), *parts)


def batches(config: Any, source: run.Source, first_step: int) -> Iterator[Any]:
    """The batch of every step from ``first_step`` on, split over the local devices; placeholders for endless data."""
    size = config.training.batch_size
    if source.images is None:
        placeholder = parallel.shard(np.zeros(size, np.float32))
        while True:
            yield placeholder
    images = source.images.images["train"]
    step = first_step
    while True:
        yield parallel.shard(images[feed.batch_indices(config.seed, step, size, len(images))])
        step += 1


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
