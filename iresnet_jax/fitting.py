"""`fit`: a model of an array, with settings chosen from the array and the machine; the same code as ``train.py``."""

import dataclasses
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from iresnet_jax.bijections.transforms.standardize import Standardize, Whiten
from iresnet_jax.checked_dataclasses import to_plain
from iresnet_jax.data.dataset import DataSet
from iresnet_jax.data.given import data_of
from iresnet_jax.fit_arguments import checked_options, seed_of
from iresnet_jax.models import priors
from iresnet_jax.models.architecture import StageSpec
from iresnet_jax.models.classifier import Classifier
from iresnet_jax.models.density import Density
from iresnet_jax.models.history import History
from iresnet_jax.models.priors import PRIORS
from iresnet_jax.runs import run_folder, trained_run
from iresnet_jax.runs.compiled_steps import CompiledSteps
from iresnet_jax.runs.config import Config, parse, with_field
from iresnet_jax.runs.loop import batches, check_batch_size, train
from iresnet_jax.runs.machine import ignore_missing_tpu, keep_compiled_programs, prepare_backend, start_backend
from iresnet_jax.runs.metrics import read_metrics
from iresnet_jax.runs.model_from_config import data_on_the_line, model_spec
from iresnet_jax.runs.objective_from_config import build_objective
from iresnet_jax.runs.signals import Stopped, StopRequests, heard_in_memory, is_interactive
from iresnet_jax.training.constraint import certified_model
from iresnet_jax.training.trainer import Best, Trainer, TrainingConfig

DEFAULT_MINUTES = 3.0
FEW, FEW_STEPS = 2000, 1000  # vectors that make a small model, and its updates
NO_LIMIT = 1_000_000  # updates, more than a time limit allows
PATIENCE = 6  # validations, of which a whole run makes 20
PRIOR_EXAMPLES = 10_000  # that choose the prior
WHITENED_DIMS = 256  # at most: a matrix of the square of that many numbers belongs to the model
NOISE = 0.3  # standard deviations; validation chooses between it and none
HYBRID_WEIGHT = 0.1  # weight of a vector's log-likelihood beside the cross-entropy of its class
EXACT_DIMS = 32  # at most: no noise; steps at 10, 20, 30 dimensions take .3, .8, 1.6 times as long as with `KrylovLogdet`

Say = Callable[[str], None]  # takes a line of progress
_STEPS = CompiledSteps()  # compiled steps of earlier fits: folds of a cross-validation differ in their data alone


def fit(
    x: Any,
    labels: Any = None,
    *,
    context: Any = None,
    key: Any = None,
    minutes: float | int | None = None,
    steps: int | None = None,
    objective: str | None = None,
    architecture: Sequence[StageSpec] | None = None,
    validation_fraction: float = 0.1,
    validation: Any = None,
    bounds: Any = None,
    settings: Mapping[str, Any] | None = None,
    workdir: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Density | Classifier:
    """Trains a model of an array: the density of ``x``, the classes of ``x``, or the density of ``x`` given a context.

    Settings are chosen from the shape, the number and the kind of the examples. The loop is that of ``train.py``: a tenth of
    the examples validate, the parameters are averaged, training ends early once validation no longer improves, and the model is
    the best one on validation, certified. Floats are continuous; integer images are levels; integers, booleans and categories
    among the columns of vectors, and floats on a grid, are dequantised within the range that was seen. A density of fewer than
    2000 vectors is trained twice, with and without noise on the examples, which prevents overfitting, and validation chooses.
    Needs ``pip install 'iresnet_jax[train]'``.

    In a notebook and at Python's prompt, Ctrl-C ends training and gives the best model so far; a second one raises
    ``KeyboardInterrupt``. In a script the first one does. SIGTERM ends the process as without training. With ``workdir``, both
    save the step first, and the same call resumes from it.

    Args:
        x: Vectors ``(n, d)``, images ``(n, h, w, c)``, or a pandas data frame of numbers, booleans and categories.
        labels: Classes, integers from 0 on, one per example.
        context: Context vectors ``(n, k)``: the model is then ``p(x | context)``.
        key: Source of all randomness; key 0 by default.
        minutes: Longest time for training, compilation included; 3 by default. Fewer than 2000 vectors need less.
        steps: Number of updates instead of a time, in one run that can be repeated, to the last bit on one machine.
        objective: "density", "classification" or "hybrid" (both in one); by default "density" without labels, and with labels
            "classification" of images and "hybrid" of vectors.
        architecture: Stages of the flow.
        validation_fraction: Share of the examples that validates.
        validation: Examples that validate instead of a share of ``x``: an array like ``x``, or with labels or contexts
            ``(x, labels, context)``. The first 4096 count.
        bounds: Ends ``(low, high)`` of columns by name or number, for a density of vectors: samples stay between them. Without,
            `fit` looks for columns with hard ends and says so; ``{}`` leaves all continuous columns unbounded. Discrete columns
            keep to the range that was seen, or to a wider one that is given here.
        settings: Other settings of a config file by their names, such as ``{"optimizer.learning_rate": 1e-3}``.
        workdir: Folder for checkpoints and metrics, from which the same call resumes after an interruption; by default the
            model is trained in memory.
        progress: Whether lines of progress are written to stderr.

    Returns:
        The model, with what training saw in its ``history``.

    Raises:
        ValueError: If arrays or settings do not fit together, or an entry of ``x`` has no density; the message names it.

    Example:
        >>> model = fit(x, minutes=3)  # doctest: +SKIP
        >>> samples, info = model.sample(jax.random.key(1), 16)  # doctest: +SKIP
    """
    ignore_missing_tpu()
    start_backend()
    keep_compiled_programs()
    chosen = {"objective": objective, "minutes": minutes, "steps": steps, "architecture": architecture}
    options = checked_options(**chosen, validation_fraction=validation_fraction, settings=settings, workdir=workdir)
    fraction, seed = options["validation_fraction"], seed_of(key)
    data = data_of(
        x,
        labels,
        context,
        validation=validation,
        validation_fraction=fraction,
        bounds=bounds,
        is_density=labels is None or objective == "density",
    )
    config = choose_settings(data, **{name: options[name] for name in chosen}, seed=seed)
    config = with_settings(config, {"data.validation_fraction": fraction, **options["settings"]})
    say = _Lines(data, config) if progress else lambda line: None
    for note in data.notes:
        say(note)
    # A folder is of one run, so many steps are those of one, and a given noise is the one that is wanted.
    is_one = workdir is not None or steps is not None or "augmentation.noise" in (settings or {})
    if is_one or not _may_overfit(config, data):
        return _fit_one(config, data, workdir, say)[0]
    candidates = []
    for noise in (NOISE, 0.0):
        changes = {"augmentation.noise": noise, "training.minutes": config.training.minutes / 2}
        say(f"training with noise of {noise} standard deviations on the examples" if noise else "training without noise")
        model, was_stopped = _fit_one(with_settings(config, changes), data, None, say)
        candidates.append(model)
        if was_stopped:
            break
    return min(candidates, key=_validation_loss)


def _may_overfit(config: Config, data: DataSet) -> bool:
    """Whether validation chooses between training with noise and without: for densities of few vectors."""
    is_density = config.objective == "density" and len(data.event_shape) == 1 and not data.contexts
    return is_density and len(data.examples["train"]) < FEW


def _validation_loss(model: Any) -> float:
    return min(model.history.validation.get(model.spec.metric, [math.inf]))


def _fit_one(config: Config, data: DataSet, workdir: str | os.PathLike[str] | None, say: Say) -> tuple[Any, bool]:
    """The best model of one training run with its history, and whether a signal ended the run."""
    model, stopped = _fit_in_memory(config, data, say) if workdir is None else _fit_on_disk(config, data, Path(workdir), say)
    if stopped:
        say(f"{stopped}: the best model so far")
    return model, bool(stopped)


def _fit_in_memory(config: Config, data: DataSet, say: Say) -> tuple[Any, str]:
    prepare_backend(config.training.matmul_precision)
    check_batch_size(config.training, data)
    spec = model_spec(config, data)
    objective = build_objective(config, data, spec)
    trainer = Trainer(objective, config.training, compile_step=_STEPS.compiler(config, spec), say=say)
    with StopRequests("training ends after this step", heard_in_memory()) as stop:
        trainer.run(batches(config, objective.examples, 0), lambda: stop.received is not None)
    best = trainer.best or Best(math.inf, trainer.step, trainer.state.ema, trainer.state.batch_stats)
    params, batch_stats = jax.device_put((best.ema, best.batch_stats))
    model = certified_model(spec, params, batch_stats, config.evaluation.solver())
    stopped = f"stopped by {stop.received.name} after step {trainer.step} of {trainer.horizon}" if stop.received else ""
    return model.with_(history=History.from_records(trainer.records, best.step)), stopped


def _fit_on_disk(config: Config, data: DataSet, folder: Path, say: Say) -> tuple[Any, str]:
    if (folder / run_folder.CONFIG_FILE).exists():
        # The length first: other settings, such as the warm-up, follow from it.
        ours, theirs = (_length(each.training) for each in (config, run_folder.read_config(folder)))
        if ours != theirs:
            raise ValueError(f"{folder} holds a fit with {theirs}, got {ours}: give the same, or another workdir")
    stopped = ""
    try:
        train(config, folder, data=data, say=say, steps=_STEPS)
    except Stopped as error:
        if error.received == signal.SIGTERM:
            signal.raise_signal(signal.SIGTERM)  # ends the process, unless its owner handles it
        if error.received == signal.SIGTERM or not is_interactive():
            raise
        stopped = str(error).split(":")[0]
    run = trained_run.load(folder)
    return run.model.with_(history=History.from_records(read_metrics(folder), run.step)), stopped


def _length(settings: TrainingConfig) -> str:
    """The argument of `fit` that says when training ends."""
    return f"minutes={settings.minutes:g}" if settings.minutes else f"steps={settings.total_steps}"


def choose_settings(
    data: DataSet,
    *,
    objective: str | None = None,
    minutes: float | int | None = None,
    steps: int | None = None,
    architecture: Sequence[StageSpec] | None = None,
    seed: int = 0,
) -> Config:
    """The settings that `fit` trains with, for the shape, number and kind of examples.

    Args:
        data: The data.
        objective: "density", "classification" or "hybrid"; by default "density" without labels, and with labels
            "classification" of images and "hybrid" of vectors.
        minutes: Limit of the wall-clock time for training.
        steps: Updates instead of a time.
        architecture: Stages of the flow.
        seed: Seed of the run.

    Raises:
        ValueError: If they contradict the data.
    """
    is_vectors = len(data.event_shape) == 1
    objective = objective or ("density" if data.num_classes is None else "hybrid" if is_vectors else "classification")
    num = len(data.examples["train"])
    plain: dict[str, Any] = to_plain(Config())
    plain["seed"], plain["objective"] = seed, objective
    plain["data"]["name"] = data.name
    chosen = _for_vectors(data, objective) if is_vectors else _for_images(data)
    for name, values in chosen.items():
        plain[name] |= values
    if architecture is not None:
        plain["model"]["stages"] = [dataclasses.asdict(stage) for stage in architecture]
    batch_size = _even(min(plain["training"]["batch_size"], num))
    total = steps or (FEW_STEPS if is_vectors and num < FEW else NO_LIMIT)
    plain["optimizer"]["warmup_steps"] = total // 20
    plain["training"] |= {
        "batch_size": batch_size,
        "total_steps": total,
        "minutes": 0.0 if steps else (minutes or DEFAULT_MINUTES),
        "patience": PATIENCE,
        "eval_every_steps": max(total // 20, 1),
        "log_every_steps": 10,
        "eval_examples": 4096,
        "actnorm_examples": min(1024, num),
        # An average over a tenth of a short run, and never over more than some hundred steps.
        "ema_decay": 0.99 if total >= 1000 else 0.9,
    }
    return parse(plain)


def _for_vectors(data: DataSet, objective: str) -> dict[str, dict[str, Any]]:
    """Dense blocks. Few examples get a small model that starts as its prior, and few slow steps: they overfit soon."""
    x, dims = data.examples["train"], data.event_shape[0]
    few, conditional = len(x) < FEW, bool(data.contexts)
    # Priors of classes start from the covariance within. Else few examples do without, which estimate it badly: a table of 30
    # columns and 400 rows is 4 nats likelier (benchmarks/tabular.py).
    whiten = dims <= WHITENED_DIMS and not (few and objective == "density")
    transform = "whiten" if whiten else "standardize"
    is_plain = objective == "density" and not conditional
    prior = likelier_prior(data_on_the_line(data)[:PRIOR_EXAMPLES], transform) if is_plain else "gaussian"
    stage = {"num_blocks": 4 if few else 20, "hidden": (32 if few else 128,), "activation": "clipswish"}
    is_exact = dims <= EXACT_DIMS
    exact = {"kind": "exact"} if is_exact else {"kind": "krylov", "num_terms": min(6, dims)}
    if few:
        rate = 1e-2 if conditional else 3e-3
    else:
        # 2e-2 was likelier than 1e-2 and 4e-2 on validation points of ridges (benchmarks/tabular.py), before "sharp" was there.
        rate = 2e-2 if is_plain and is_exact else 1e-2
    return {
        "model": {"stages": [stage], "coeff": 0.97, "prior": prior, "last_scale": 0.1 if few else 1.0, "sharp": not few},
        "preprocessing": {"transform": transform},
        "logdet": exact,
        "hybrid": {"weight": HYBRID_WEIGHT, "fitted_priors": True},
        "evaluation": {"logdet": {"kind": "exact"}} if dims <= WHITENED_DIMS else {},
        "optimizer": {
            "name": "muon",
            "learning_rate": rate,
            "momentum": 0.95,
            "nesterov": True,
        },
        "training": {"batch_size": 64 if few else 128 if is_exact else 256, "blocks": "scan"},
    }


def likelier_prior(x: Float[np.ndarray, "n d"], transform: str) -> str:
    """The prior under which preprocessed examples are likelier, before any training of the flow: "logistic" for heavy tails."""
    fitted = Whiten.fit(x) if transform == "whiten" else Standardize.fit(x)
    found = _mean_log_probs(fitted.bijection().forward(jnp.asarray(x, jnp.float32)))
    return max(PRIORS, key=lambda kind: float(found[kind]))


@jax.jit
def _mean_log_probs(z: Float[Array, "n d"]) -> dict[str, Float[Array, ""]]:
    """Mean log-density of latents under each prior of variance 1."""
    found = {}
    for kind, family in PRIORS.items():
        scale = {family.log_scale: jnp.full(z.shape[1], -math.log(family.std))}
        found[kind] = jnp.mean(priors.log_prob(kind, {"mean": jnp.zeros(z.shape[1]), **scale}, z))
    return found


def _for_images(data: DataSet) -> dict[str, dict[str, Any]]:
    """Convolutional blocks on squeezed images, a stage for each halving, down to 4 x 4 pixels or fewer."""
    height, width, _ = data.event_shape
    stages, side = [], min(height, width)
    while side % 2 == 0 and height % 2 == 0 and width % 2 == 0 and side >= 8 and len(stages) < 3:
        side, height, width = side // 2, height // 2, width // 2
        stages.append({"num_blocks": 6, "hidden": (48,), "kernel_sizes": (3, 3), "squeeze": 2, "activation": "clipswish"})
    stages = stages or [{"num_blocks": 8, "hidden": (48,), "kernel_sizes": (3, 3), "activation": "clipswish"}]
    continuous = data.num_levels is None
    return {
        "model": {"stages": stages, "coeff": 0.95},
        "preprocessing": {"transform": "standardize" if continuous else "logit"},
        "logdet": {"kind": "krylov", "num_terms": 6},
        "optimizer": {"name": "muon", "learning_rate": 1e-2, "momentum": 0.95, "nesterov": True},
        "training": {"batch_size": 64},
    }


def with_settings(config: Config, settings: Mapping[str, Any]) -> Config:
    """The config with other values, such as ``{"optimizer.learning_rate": 1e-3}``.

    Raises:
        ValueError: If there is no such field, or it cannot hold the value.
    """
    plain = to_plain(config)
    for name, value in settings.items():
        plain = with_field(plain, name, lambda _, value=value: value)
    return parse(plain)


def _even(batch_size: int) -> int:
    devices = jax.local_device_count()
    return max(batch_size // devices, 1) * devices


class _Lines:
    """Lines of progress on stderr."""

    def __init__(self, data: DataSet, config: Config):
        self._began = time.monotonic()
        train, validation = len(data.examples["train"]), len(data.examples["validation"])
        self(f"fit: {train} examples of shape {data.event_shape} to train on, {validation} to validate; {config.objective}")

    def __call__(self, line: str) -> None:
        print(f"[{time.monotonic() - self._began:5.0f} s] {line}", file=sys.stderr, flush=True)
