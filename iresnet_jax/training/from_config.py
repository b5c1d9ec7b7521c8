"""What settings stand for: the model of some data, the constraint, the solver, the optimizer."""

from collections.abc import Callable
from typing import Any

import optax

from iresnet_jax.bijections.residual import Solver
from iresnet_jax.bijections.transforms.equalize import Equalize, entry_shares, level_frequencies
from iresnet_jax.bijections.transforms.logit import Center, Identity, Logit
from iresnet_jax.data.dataset import DataSet
from iresnet_jax.models import flow
from iresnet_jax.models.architecture import FlowSpec
from iresnet_jax.models.classifier import ClassifierSpec
from iresnet_jax.models.density import DensitySpec, Transform
from iresnet_jax.training.config import (
    Config,
    ConstraintConfig,
    EvaluationConfig,
    ModelConfig,
    OptimizerConfig,
    PreprocessingConfig,
)
from iresnet_jax.training.optimizers import make_optimizer, make_schedule

Spec = DensitySpec | ClassifierSpec
Constrain = Callable[[Any, Any], flow.Constrained]  # (params, spectral) -> constrained weights


def build_flow_spec(settings: ModelConfig, event_shape: tuple[int, ...]) -> FlowSpec:
    """The architecture for examples of one shape.

    Raises:
        ValueError: If stages do not fit that shape.
    """
    return FlowSpec(tuple(event_shape), settings.stages, coeff=settings.coeff, budget=settings.budget)


def density_spec(config: Config, data: DataSet) -> DensitySpec:
    """The density of a data set, with a prior for every class if the objective is hybrid.

    Raises:
        ValueError: If the data have no labels that it needs, or settings do not fit them.
    """
    if config.objective == "hybrid" and data.num_classes is None:
        raise ValueError(f"a hybrid needs labelled images, and {data.name} has none: choose another data.name")
    return DensitySpec(
        flow=build_flow_spec(config.model, data.event_shape),
        prior=config.model.prior,
        transform=build_transform(config.preprocessing, data),
        num_levels=data.num_levels,
        num_classes=data.num_classes if config.objective == "hybrid" else None,
    )


def build_transform(settings: PreprocessingConfig, data: DataSet) -> Transform:
    """The preprocessing of a data set; "equalize" counts the levels of its training images.

    Raises:
        ValueError: If it needs integer levels that the data do not have.
    """
    if settings.transform == "none":
        return Identity()
    if data.num_levels is None:
        raise ValueError(
            f"preprocessing.transform {settings.transform} is for data with grey levels, which {data.name} has not: "
            "set it to none"
        )
    if settings.transform == "center":
        return Center()
    if settings.transform == "logit":
        return Logit(settings.alpha)
    images = data.examples["train"]
    frequencies = level_frequencies(images, data.num_levels)
    return Equalize(frequencies, entry_shares(images, frequencies) if settings.entrywise else None, settings.alpha)


def classifier_spec(config: Config, data: DataSet) -> ClassifierSpec:
    """The classifier of a data set.

    Raises:
        ValueError: If the data have no labels, or settings do not fit them.
    """
    if data.num_classes is None:
        raise ValueError(f"classification needs labelled images, and {data.name} has none: choose another data.name")
    settings = config.classifier
    height, width, channels = data.event_shape
    return ClassifierSpec(
        flow=build_flow_spec(config.model, (height, width, channels + settings.pad_channels)),
        image_shape=(height, width, channels),
        num_classes=data.num_classes,
        num_levels=data.num_levels or 256,
        pad_channels=settings.pad_channels,
        mean=settings.mean,
        std=settings.std,
        constrained=config.constraint.norms != "none",
        normalization=settings.normalization,
    )


def model_spec(config: Config, data: DataSet) -> Spec:
    """The model of a data set, whatever the objective."""
    return classifier_spec(config, data) if config.objective == "classification" else density_spec(config, data)


def build_constraint(settings: ConstraintConfig, spec: FlowSpec, *, training: bool) -> Constrain:
    """``(params, spectral) -> Constrained``, for training steps or for validation."""
    if settings.norms == "certified":
        squarings, twists = settings.num_squarings, settings.twists
        return lambda params, spectral: flow.constrain_certified(spec, params, spectral, num_squarings=squarings, twists=twists)
    if settings.norms == "estimated":
        num_steps, rtol = settings.num_steps if training else None, settings.rtol
        return lambda params, spectral: flow.constrain(spec, params, spectral, num_steps=num_steps, rtol=rtol)
    return lambda params, spectral: flow.unconstrained(spec, params, spectral)


def build_solver(settings: EvaluationConfig) -> Solver:
    """The solver of inverses."""
    return Solver(atol=settings.inverse_atol)


def unroll(blocks: str) -> bool:
    """Whether ``training.blocks`` writes blocks out instead of scanning over them."""
    return flow.unroll_by_default() if blocks == "auto" else blocks == "unroll"


def build_schedule(settings: OptimizerConfig, total_steps: int) -> optax.Schedule:
    """The learning rate by step; a warm-up longer than the run is cut to it."""
    return make_schedule(
        schedule=settings.schedule,
        learning_rate=settings.learning_rate,
        total_steps=total_steps,
        warmup_steps=min(settings.warmup_steps, total_steps),
        final_fraction=settings.final_fraction,
        boundaries=settings.boundaries,
        decay_factor=settings.decay_factor,
    )


def build_optimizer(settings: OptimizerConfig, total_steps: int) -> optax.GradientTransformation:
    """The update rule with its learning rate."""
    return make_optimizer(
        name=settings.name,
        learning_rate=build_schedule(settings, total_steps),
        weight_decay=settings.weight_decay,
        momentum=settings.momentum,
        nesterov=settings.nesterov,
        b1=settings.b1,
        b2=settings.b2,
        clip_norm=settings.clip_norm,
    )
