"""A config and its data as arguments of `train`: the only file that knows configs and library."""

import dataclasses
import functools
import logging
import os
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from iresnet_jax.atomic_files import path_of
from iresnet_jax.data import augment
from iresnet_jax.data.dataset import DataSet
from iresnet_jax.maths import platforms
from iresnet_jax.maths.logdet_exact import ExactLogdet
from iresnet_jax.maths.machine import device_summary, prepare_backend
from iresnet_jax.models import saved
from iresnet_jax.models.classifier import ClassifierSpec
from iresnet_jax.models.free import Free, num_parameters
from iresnet_jax.models.initial import VECTORS, abstract, initial
from iresnet_jax.models.model import How
from iresnet_jax.models.saved import Spec, spec_of
from iresnet_jax.pytrees import tagged
from iresnet_jax.runs import hosts, run_folder
from iresnet_jax.runs.config import AugmentationConfig, Config, to_plain
from iresnet_jax.runs.metrics import Bar, Metrics
from iresnet_jax.runs.model_from_config import identity_context, load_data, model_spec
from iresnet_jax.training import classification, density, parallel
from iresnet_jax.training.callbacks import Callback, Stop, TimeLimit
from iresnet_jax.training.checkpoints import Checkpoints, Store
from iresnet_jax.training.optimizers import make_optimizer, make_schedule
from iresnet_jax.training.run import Objective
from iresnet_jax.training.step import Fixed, Step
from iresnet_jax.training.train import check_batch_size
from iresnet_jax.training.train import train as train_model

_VARIABLES = "params", "iterates", "statistics"  # of `Free`
_logger = logging.getLogger(__name__)


class Job(NamedTuple):
    """The model, the loss and the data that a config describes.

    Attributes:
        config: All settings.
        spec: The model.
        objective: Loss and measurement.
        examples: Pytree of arrays that batches are taken from; None for endless data, whose steps
            draw examples.
        data: The data.
    """

    config: Config
    spec: Spec
    objective: Objective
    examples: Any
    data: DataSet

    @classmethod
    def of(cls, config: Config, data: DataSet, spec: Spec | None = None) -> "Job":
        """The job of a config; by default settings and data determine the model."""
        spec = model_spec(config, data) if spec is None else spec
        if isinstance(spec, ClassifierSpec):
            objective = _classification(config, data)
        else:
            objective = (_hybrid if config.objective == "hybrid" else _density)(config, data, spec)
        if data.is_endless:
            examples = None
        elif config.objective == "density":
            examples = data.examples["train"], data.contexts.get("train")
        else:
            examples = data.examples["train"], data.labels["train"]
        return cls(config, spec, objective, examples, data)

    @property
    def how(self) -> How:
        """How the model runs in training."""
        is_classifier = isinstance(self.spec, ClassifierSpec)
        return How(estimator=None if is_classifier else self.config.logdet.build())

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments of `train`."""
        training = self.config.training
        unroll = training.blocks == "unroll"
        if training.blocks == "auto":  # unrolled steps are up to 1.7 times as fast on CPUs
            unroll = platforms.platform() == "cpu"
        is_exact = self.config.logdet.kind == "exact" and self.how.estimator is not None
        of_scan = "elementwise" if is_exact and not unroll else "nothing"
        return {
            "key": self.config.seed,
            "steps": training.total_steps or None,
            "minutes": training.minutes or None,
            "batch_size": training.batch_size,
            "optimizer": make_optimizer(self.config.optimizer),
            "schedule": make_schedule(self.config.optimizer, training.schedule_steps),
            "schedule_steps": training.schedule_steps,
            "ema_decay": training.ema_decay,
            # The loss of a classifier computes parts itself.
            "num_parts": 1 if isinstance(self.spec, ClassifierSpec) else training.num_parts,
            "unroll": unroll,
            "rematerialize": "blocks" if training.rematerialize else of_scan,
            "patience": training.patience,
            "every": training.eval_every_steps,
            "log_every": training.log_every_steps,
            "matmul_precision": training.matmul_precision,
        }

    def step(self) -> tuple[Step, Fixed]:
        """The step of `train` and its constant part, for programs that are only compiled here."""
        own = self.arguments
        names = "optimizer", "schedule", "schedule_steps", "ema_decay", "num_parts"
        step = Step(self.objective.loss, *(own[name] for name in names))
        free = Free({}, {}, {}, self.spec, self.how, self.config.constraint)
        how = {name: own[name] for name in ("unroll", "rematerialize")}
        return step, Fixed.of(self.config.seed, free, **how)

    def free(self, *, from_model: bool = True, prior: Any = None) -> Free:
        """The model that training starts from: fresh weights, fitted to training data, or replaced
        by the weights of ``training.initial_model``.

        Args:
            from_model: Whether to read that file; a resumed training no longer needs it.
            prior: Prior to begin with; by default one of the model's family is fitted.
        """
        config, spec = self.config, self.spec
        path = config.training.initial_model if from_model else ""
        found = _of_model(path, spec) if path else {}
        num = config.training.actnorm_examples
        num = max(num, VECTORS) if len(spec.flow.event_shape) == 1 else num
        seed = jax.random.key(np.uint32(config.seed))
        key, key_data = jax.random.split(jax.random.fold_in(seed, 2**31))
        x, context, labels = jax.tree.map(np.asarray, self.data.random_train(key_data, num))
        # A model may have been given its context for good.
        identity = identity_context(config) if spec.flow.context_dim else None
        free = initial(
            spec,
            key,
            x,
            context=context if identity is None else np.tile(identity, (len(x), 1)),
            labels=labels,
            prior=prior,
            constraint=config.constraint,
            last_scale=config.model.last_scale,
            sharpness=config.model.sharpness,
        )
        variables = _updated({name: getattr(free, name) for name in _VARIABLES}, found)
        return free.with_(how=self.how, **variables)

    def finish(self, model: Any) -> Any:
        """The model that is kept, with the settings of the evaluation."""
        return finished(self.config, model)


def finished(config: Config, model: Any) -> Any:
    """The kept form of a trained model, which takes no transformations as contexts."""
    identity = identity_context(config)
    model = model.with_(solver=config.evaluation.solver())
    if not isinstance(model.spec, ClassifierSpec):
        model = model.with_(estimator=ExactLogdet())
    return model if identity is None else model.given(identity)


def train(
    config: Config,
    workdir: str | os.PathLike[str],
    *,
    data: DataSet | None = None,
    callbacks: tuple[Callback, ...] = (),
) -> Any:
    """Trains the model of a config in a folder, or goes on from its newest checkpoint.

    A folder belongs to one config.

    Args:
        config: All settings, from `config.parse`.
        workdir: Folder of the run: config, model, metrics, checkpoints.
        data: The data; by default the data set of ``config.data``.
        callbacks: Further callbacks.

    Returns:
        The best model, certified.

    Raises:
        ValueError: If settings contradict each other or the data, or the folder belongs to another
            config or other data.
        RuntimeError: If training blows up before a model was validated.
        Stopped: On Ctrl-C or SIGTERM, with a checkpoint of the last step.
    """
    began, folder = time.monotonic(), path_of(workdir)
    prepare_backend(config.training.matmul_precision)
    dataset = load_data(config.data) if data is None else data
    if data is None and dataset.examples and len(dataset.examples.get("test", ())) < 2:
        raise ValueError(
            f"{dataset.name} has not the two test examples that a report needs: add a split called "
            "test or, where there are no splits, set data.test_fraction"
        )
    about = {"name": dataset.name, "fingerprint": dataset.fingerprint}
    hosts.agree_on("run", {"config": to_plain(config), "data": about})

    specs: list[Spec] = []

    def begin():  # runs in process 0, whose model the others receive
        run_folder.check_belongs_to(folder, config)
        specs.append(run_folder.model_of_run(folder, dataset) or model_spec(config, dataset))
        has_begun = bool(Store(folder).steps())
        return [tagged(specs[0]) if parallel.num_processes() > 1 else None, has_begun]

    plain, has_begun = parallel.from_first(begin)
    job = Job.of(config, dataset, specs[0] if specs else spec_of(plain))
    examples = job.examples and job.examples[0]
    check_batch_size(config.training.batch_size, config.training.num_parts, examples)
    free = job.free(from_model=not has_begun and parallel.is_first())
    _logger.info("%d parameters on %s", num_parameters(free.params), device_summary())
    claim = lambda _: run_folder.claimed(folder, config, job.spec, dataset)  # noqa: E731
    watching = [
        *(Checkpoints(folder, claim), Metrics(folder), Stop(raises=True), Bar()),
        TimeLimit(config.training.minutes, began=began),
        *callbacks,
    ]
    model = train_model(
        free, job.objective, job.examples, callbacks=watching, progress=False, **job.arguments
    )
    return job.finish(model)


# Each function returns the loss and the measurement of an objective.


def _density(config: Config, data: DataSet, spec: Any) -> Objective:
    noise = config.augmentation.noise
    if noise and data.is_endless:
        raise ValueError(
            f"config.augmentation.noise is for continuous vectors of an array, and {data.name} has "
            "no end: set it to 0"
        )
    if noise:
        density.noise_scales(spec)  # raises if noise has no scale
    loss = density.make_loss(
        data.draw, noise=noise, transform=build_transformations(config.augmentation, data)
    )
    return Objective(loss, spec.metric, _measure(config, data))


def _hybrid(config: Config, data: DataSet, spec: Any) -> Objective:
    loss = density.make_hybrid_loss(
        config.hybrid,
        label_smoothing=config.classifier.label_smoothing,
        augment=build_augmentation(config.augmentation, data),
    )
    return Objective(loss, "accuracy", _measure(config, data))


def _measure(config: Config, data: DataSet) -> Callable[[Any], Any]:
    num, seed = config.training.eval_examples, config.seed

    @functools.cache
    def held_out():
        is_hybrid = config.objective == "hybrid"
        return {
            "examples": data.held_out("validation", num, seed),
            "contexts": data.held_out_contexts("validation", num),
            "labels": data.held_out_labels("validation", num) if is_hybrid else None,
        }

    def measure(model):
        return density.measure(
            finished(config, model).with_(estimator=config.evaluation.logdet.build()),
            **held_out(),
            logdet=config.logdet,
            batch_size=config.evaluation.batch_size,
            seed=seed,
            label_smoothing=config.classifier.label_smoothing,
        )

    return measure


def _classification(config: Config, data: DataSet) -> Objective:
    settings, num = config.classifier, config.training.eval_examples
    margin = classification.Margin(settings.margin, settings.temperature)
    loss = classification.make_loss(
        build_augmentation(config.augmentation, data),
        label_smoothing=settings.label_smoothing,
        margin=margin,
        num_parts=config.training.num_parts,
    )

    def measure(model):
        images, labels = data.held_out("validation", num), data.held_out_labels("validation", num)
        return classification.measure(model, images, labels, config.evaluation.batch_size, margin)

    return Objective(loss, "accuracy", measure)


def _of_model(path: str, spec: Spec) -> dict[str, Any]:
    """The variables of a saved model, whatever its budget and dequantisation, for a model of
    these stages.
    """
    model, _ = saved.read(path)
    own, flow = model.spec.flow, spec.flow
    context_dim = own.context_dim or flow.context_dim  # a model may have been given its context
    own = dataclasses.replace(
        own, coeff=flow.coeff, budget=flow.budget, noise=flow.noise, context_dim=context_dim
    )
    wanted, found = (
        {name: getattr(free, name) for name in _VARIABLES}
        for free in (abstract(spec), Free.of(model))
    )
    # The file may have another precision.
    found = jax.tree.map(lambda leaf: leaf.astype(jnp.result_type(float)), found)
    if (
        own != flow
        or _inputs(model.spec) != _inputs(spec)
        or _shapes(_updated(wanted, found)) != _shapes(wanted)
    ):
        raise ValueError(
            f"config.training.initial_model: {path} has other stages, contexts, preprocessing, "
            "levels, columns or another prior than config and the data ask for"
        )
    return found


def _updated(variables: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    """Variables, replaced by those that were found."""
    return {
        name: _updated(own, found.get(name, {})) if isinstance(own, dict) else found.get(name, own)
        for name, own in variables.items()
    }


def _inputs(spec: Spec) -> Any:
    """The meaning of an example's numbers to the flow."""
    columns = [column.name for column in getattr(spec, "columns", None) or ()]
    return type(getattr(spec, "transform", None)), spec.num_levels, columns


def _shapes(tree: Any) -> Any:
    return jax.tree.structure(tree), [np.shape(leaf) for leaf in jax.tree.leaves(tree)]


def build_augmentation(
    settings: AugmentationConfig, data: DataSet
) -> classification.Augment | None:
    """The random change of training images that ``config.augmentation`` describes; None for no
    change.
    """
    if not settings.crop_padding and not settings.flip:
        return None
    if len(data.event_shape) != 3:
        raise ValueError(
            f"crops and flips of config.augmentation are for images, and {data.name} "
            "has vectors: leave them out"
        )
    if not settings.crop_padding:
        return augment.random_flip
    change = augment.crop_and_flip if settings.flip else augment.random_crop
    return _tried(functools.partial(change, padding=settings.crop_padding), data)


def build_transformations(settings: AugmentationConfig, data: DataSet) -> Callable[..., Any] | None:
    """``(keys, images) -> (images, contexts)`` of ``config.augmentation.transformations``; None for
    none.
    """
    names = settings.transformations
    return _tried(functools.partial(augment.transformed, names=names), data) if names else None


def _tried(change: Callable[..., Any], data: DataSet) -> Callable[..., Any]:
    """A change of images, after a trial that raises if their size does not allow it."""
    jax.eval_shape(change, jax.random.split(jax.random.key(0), 1), data.examples["train"][:1])
    return change
