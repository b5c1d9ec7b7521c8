"""A config and its data as a model, an objective and arguments of `train`: the only file that knows
configs and library.
"""

import functools
import logging
import os
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from iresnet_jax.bijections.equalize import Equalize
from iresnet_jax.bijections.logit import Logit
from iresnet_jax.bijections.standardize import Center, Identity
from iresnet_jax.data import augment
from iresnet_jax.data.dataset import DataSet
from iresnet_jax.data.objectives import (
    classification_objective,
    density_objective,
    density_spec,
    fresh_model,
)
from iresnet_jax.maths import platforms
from iresnet_jax.models import saved
from iresnet_jax.models.architecture import FlowSpec
from iresnet_jax.models.classifier import ClassifierSpec
from iresnet_jax.models.columns import listed
from iresnet_jax.models.density_spec import Transform
from iresnet_jax.models.free import Free, abstract, num_parameters
from iresnet_jax.models.model import How
from iresnet_jax.models.priors import MIXTURES
from iresnet_jax.models.saved import Spec, spec_of
from iresnet_jax.pytrees import tagged
from iresnet_jax.runs import hosts, trained_run
from iresnet_jax.runs.config import (
    AugmentationConfig,
    Config,
    PreprocessingConfig,
    to_plain,
)
from iresnet_jax.runs.metrics import Bar, Metrics
from iresnet_jax.storage import path_of
from iresnet_jax.training import parallel
from iresnet_jax.training.callbacks import Progress, Stop, TimeLimit
from iresnet_jax.training.checkpoints import Checkpoints, Store
from iresnet_jax.training.objectives import Augment, Margin
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
        objective = _objective(config, data, spec)
        examples = None
        if not data.is_endless:
            x, labels, context = data.part("train")
            examples = (x, context) if config.objective == "density" else (x, labels)
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

    def free(self, *, from_model: bool = True) -> Free:
        """The model that training starts from: fresh weights, fitted to training data, or replaced
        by the weights of ``training.initial_model``.

        Args:
            from_model: Whether to read that file; a resumed training no longer needs it.
        """
        config, spec = self.config, self.spec
        path = config.training.initial_model if from_model else ""
        found = _of_model(path, spec) if path else {}
        free = fresh_model(
            self.data,
            spec,
            seed=config.seed,
            num=config.training.actnorm_examples,
            transformations=config.augmentation.transformations,
            constraint=config.constraint,
            last_scale=config.model.last_scale,
            sharpness=config.model.sharpness,
        )
        variables = _updated({name: getattr(free, name) for name in _VARIABLES}, found)
        return free.with_(how=self.how, **variables)


def train(config: Config, workdir: str | os.PathLike[str]) -> Any:
    """Trains the model of a config in a folder, or goes on from its newest checkpoint.

    A folder belongs to one config.

    Args:
        config: All settings, from `config.parse`.
        workdir: Folder of the run: config, model, metrics, checkpoints.

    Returns:
        The best model, certified.

    Raises:
        ValueError: If settings do not fit the data, or the folder belongs to another config or
            other data.
        RuntimeError: If training blows up before a model was validated.
        Stopped: On Ctrl-C or SIGTERM, with a checkpoint of the last step.
    """
    began, folder = time.monotonic(), path_of(workdir)
    platforms.prepare_backend(config.training.matmul_precision)
    data = config.data.load()
    if data.examples and len(data.examples.get("test", ())) < 2:
        raise ValueError(
            f"{data.name} has not the two test examples that a report needs: add a split called "
            "test or, where there are no splits, set data.test_fraction"
        )
    about = {"name": data.name, "fingerprint": data.fingerprint}
    hosts.agree_on({"config": to_plain(config), "data": about})

    def begin():  # runs in process 0, whose model the others receive
        spec = trained_run.begun(folder, config, data) or model_spec(config, data)
        return tagged(spec), bool(Store(folder).steps())

    plain, has_begun = parallel.from_first(begin)
    job = Job.of(config, data, spec_of(plain))
    examples = job.examples and job.examples[0]
    check_batch_size(config.training.batch_size, config.training.num_parts, examples)
    free = job.free(from_model=not has_begun and parallel.is_first())
    _logger.info("%d parameters on %s", num_parameters(free.params), platforms.device_summary())
    claim = lambda _: trained_run.claimed(folder, config, job.spec, data)  # noqa: E731
    watching = [
        Checkpoints(folder, claim),
        Metrics(folder),
        Stop(raises=True),
        Bar(),
        Progress(_logger.info),
        TimeLimit(config.training.minutes, began=began),
    ]
    model = train_model(
        free, job.objective, job.examples, callbacks=watching, progress=False, **job.arguments
    )
    return trained_run.finished(config, model)


# --- models ---------------------------------------------------------------------------------------


def model_spec(config: Config, data: DataSet) -> Spec:
    """The model of a data set, for any objective."""
    if misfit := _misfit(config, data):
        raise ValueError(misfit)
    settings, classifier, shape = config.model, config.classifier, data.event_shape
    is_classifier = config.objective == "classification"
    padded = (*shape[:2], shape[2] + classifier.pad_channels) if is_classifier else shape
    if settings.constants:
        mu, nu = settings.constants
        flow = FlowSpec.bilipschitz(padded, settings.stages, mu=mu, nu=nu)
    else:
        flow = FlowSpec(padded, settings.stages, settings.coeff, settings.budget)
    if is_classifier:
        height, width, channels = shape
        return ClassifierSpec(
            flow,
            (height, width, channels),
            data.num_classes or 0,
            data.num_levels or 0,
            pad_channels=classifier.pad_channels,
            mean=classifier.mean,
            std=classifier.std,
            constrained=config.constraint.norms != "none",
            head=classifier.head,
        )
    is_variational = settings.dequantization == "variational"
    return density_spec(
        data,
        replace(flow, noise=settings.noise if is_variational else None),
        prior=settings.prior,
        num_components=settings.prior_components or None,
        context_hidden=settings.context_hidden,
        transformations=config.augmentation.transformations,
        has_classes=config.objective == "hybrid",
        transform=_transform(config.preprocessing, data),
    )


def _transform(settings: PreprocessingConfig, data: DataSet) -> Transform | str:
    """The preprocessing of a config; "standardize" and "whiten" are fitted later."""
    if settings.transform == "none":
        return Identity()
    if settings.transform == "center":
        return Center()
    if settings.transform == "logit":
        return Logit(settings.alpha)
    if settings.transform == "equalize":
        images, num_levels = data.examples["train"], data.num_levels or 0
        how = {"entrywise": settings.entrywise, "alpha": settings.alpha}
        return Equalize.fit(images, num_levels, **how)
    return settings.transform


def _misfit(config: Config, data: DataSet) -> str:
    """What of the settings is for other data; empty if nothing is."""
    objective, augmentation = config.objective, config.augmentation
    are_levels, are_images = data.num_levels is not None, len(data.event_shape) == 3
    transform = config.preprocessing.transform
    of_levels = transform in ("center", "logit", "equalize")
    is_fitted = transform in ("standardize", "whiten")
    if objective != "density" and (data.num_classes is None or data.context_dim):
        return f"{objective} needs labels, and no contexts, which {data.name} has not"
    if objective == "classification" and not (are_levels and are_images):
        return f"classification is for images of integer grey levels, which {data.name} has not"
    if objective != "classification" and (
        (of_levels and not are_levels) or (is_fitted and (are_levels or data.is_endless))
    ):
        return (
            f"config.preprocessing.transform {transform} is for data with grey levels if it is "
            "center, logit or equalize, and for arrays of continuous data if it is standardize or "
            f"whiten: {data.name} is neither"
        )
    if (config.model.prior in MIXTURES) != (config.model.prior_components > 0):
        return f"config.model.prior_components is for the priors {listed(MIXTURES)}, and for these"
    if config.model.prior in MIXTURES and objective != "density":
        return f"config.model.prior {config.model.prior} is for the objective density"
    if config.model.context_hidden and not data.context_dim:
        return f"config.model.context_hidden is a network on contexts, and {data.name} has none"
    if augmentation.transformations and (
        objective != "density" or not (are_levels and are_images) or data.context_dim
    ):
        return "config.augmentation.transformations are for densities of levels without contexts"
    if (augmentation.crop_padding or augmentation.flip) and (
        objective == "density" or not are_images
    ):
        return "crops and flips of config.augmentation are for images that are classified"
    if augmentation.noise and (objective != "density" or data.is_endless):
        return "config.augmentation.noise is for densities of arrays"
    return ""


# --- objectives -----------------------------------------------------------------------------------


def _objective(config: Config, data: DataSet, spec: Spec) -> Objective:
    common: dict[str, Any] = {
        "num": config.training.eval_examples,
        "batch_size": config.evaluation.batch_size,
        "augmentation": build_augmentation(config.augmentation),
        "label_smoothing": config.classifier.label_smoothing,
    }
    if isinstance(spec, ClassifierSpec):
        margin = Margin(config.classifier.margin, config.classifier.temperature)
        parts = config.training.num_parts
        return classification_objective(data, margin=margin, num_parts=parts, **common)
    return density_objective(
        data,
        spec,
        logdet=config.logdet,
        estimator=config.evaluation.logdet.build(),
        seed=config.seed,
        noise=config.augmentation.noise,
        transformations=config.augmentation.transformations,
        hybrid=config.hybrid if config.objective == "hybrid" else None,
        **common,
    )


def _of_model(path: str, spec: Spec) -> dict[str, Any]:
    """The variables of a saved model, whatever its budget and dequantisation, for a model of
    these stages.
    """
    model, _ = saved.read(path)
    wanted, found = (
        {name: getattr(free, name) for name in _VARIABLES}
        for free in (abstract(spec), Free.of(model))
    )
    # The file may have another precision.
    found = jax.tree.map(lambda leaf: leaf.astype(jnp.result_type(float)), found)
    shapes, of_found = (jax.tree.map(jnp.shape, each) for each in (wanted, _updated(wanted, found)))
    if shapes != of_found or _meaning(model.spec) != _meaning(spec):
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


def _meaning(spec: Spec) -> tuple[Any, ...]:
    """What the variables of a model compute, beside their shapes, and from which numbers."""
    flow, transform = spec.flow, getattr(spec, "transform", None)
    columns = [column.name for column in getattr(spec, "columns", None) or ()]
    return flow.event_shape, flow.stages, flow.scale, type(transform), spec.num_levels, columns


def build_augmentation(settings: AugmentationConfig) -> Augment | None:
    """The random change of training images that ``config.augmentation`` describes; None for no
    change.
    """
    if not settings.crop_padding:
        return augment.random_flip if settings.flip else None
    change = augment.crop_and_flip if settings.flip else augment.random_crop
    return functools.partial(change, padding=settings.crop_padding)
