"""What settings stand for: the model of some data, the constraint, the solver, the optimizer."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax

from iresnet_jax.bijections.chain import Rematerialize
from iresnet_jax.bijections.residual import Solver
from iresnet_jax.bijections.transforms.equalize import Equalize, entry_shares, level_frequencies
from iresnet_jax.bijections.transforms.logit import Center, Identity, Logit
from iresnet_jax.bijections.transforms.standardize import Standardize, Whiten
from iresnet_jax.data.dataset import DataSet
from iresnet_jax.data.measurements import Measurement
from iresnet_jax.models import flow
from iresnet_jax.models.architecture import FlowSpec
from iresnet_jax.models.classifier import ClassifierSpec
from iresnet_jax.models.density import DensitySpec, Transform
from iresnet_jax.models.reconstructor import ReconstructorSpec, block_coeff
from iresnet_jax.runs.config import (
    Config,
    ConstraintConfig,
    EvaluationConfig,
    InverseProblemConfig,
    ModelConfig,
    OptimizerConfig,
    PreprocessingConfig,
)
from iresnet_jax.training import parallel
from iresnet_jax.training.optimizers import make_optimizer, make_schedule

Spec = DensitySpec | ClassifierSpec | ReconstructorSpec
SCALE_EXAMPLES = 10_000  # of a simulator, whose mean and standard deviation become the scale of its data
Constrain = Callable[[Any, Any], flow.Constrained]  # (params, spectral) -> constrained weights


def build_flow_spec(settings: ModelConfig, event_shape: tuple[int, ...], context_dim: int = 0) -> FlowSpec:
    """The architecture for examples of one shape, with contexts of some length.

    Raises:
        ValueError: If stages do not fit that shape.
    """
    if settings.budget != "network":
        return FlowSpec(tuple(event_shape), settings.stages, settings.coeff, settings.budget, context_dim)
    coeff = block_coeff(settings.coeff, sum(stage.num_blocks for stage in settings.stages))
    return FlowSpec(tuple(event_shape), settings.stages, coeff, "block", context_dim)


def density_spec(config: Config, data: DataSet) -> DensitySpec:
    """The density of a data set, with a prior for every class if the objective is hybrid.

    Raises:
        ValueError: If the data have no labels that it needs, or settings do not fit them.
    """
    if config.objective == "hybrid" and data.num_classes is None:
        raise ValueError(f"a hybrid needs labelled images, and {data.name} has none: choose another data.name")
    if config.objective == "hybrid" and data.context_dim:
        raise ValueError(f"a hybrid takes no contexts, and {data.name} has them: choose the objective density")
    return DensitySpec(
        flow=build_flow_spec(config.model, data.event_shape, data.context_dim),
        prior_family=config.model.prior,
        transform=build_transform(config.preprocessing, data, by_class=config.objective == "hybrid"),
        num_levels=data.num_levels,
        num_classes=data.num_classes if config.objective == "hybrid" else None,
        grid=data.grid,
        context=_context_scale(data),
    )


def _context_scale(data: DataSet) -> Standardize | None:
    """The standard scale of contexts; entries that are constant keep their own."""
    if not data.context_dim:
        return None
    contexts = np.asarray(_to_scale_by(data)[1], np.float64)
    scale = contexts.std(axis=0)
    return Standardize(tuple(contexts.mean(axis=0).tolist()), tuple(np.where(scale > 0, scale, 1).tolist()))


def _to_scale_by(data: DataSet) -> tuple[Any, Any]:
    """The training examples and contexts, or some of a simulator, always the same."""
    if data.is_endless:
        return data.random_train(jax.random.key(0), SCALE_EXAMPLES)
    return data.examples["train"], data.contexts.get("train")


def build_transform(settings: PreprocessingConfig, data: DataSet, *, by_class: bool = False) -> Transform:
    """The preprocessing of a data set; "equalize" counts the levels of its training images.

    Args:
        by_class: Whether "whiten" is by the covariance within classes.

    Raises:
        ValueError: If it needs integer levels that the data do not have.
    """
    if settings.transform == "none":
        return Identity()
    if settings.transform in ("standardize", "whiten"):
        if data.num_levels is not None or data.toy is not None:
            raise ValueError(f"preprocessing.transform {settings.transform} is for arrays of continuous data, not {data.name}")
        if settings.transform == "whiten" and len(data.event_shape) != 1:
            raise ValueError(f"preprocessing.transform whiten is for vectors, and {data.name} has images: standardize them")
        examples, _ = _to_scale_by(data)
        if settings.transform == "standardize":
            return Standardize.fit(np.asarray(examples))
        return Whiten.fit(np.asarray(examples), data.labels["train"] if by_class else None)
    if data.num_levels is None:
        raise ValueError(
            f"preprocessing.transform {settings.transform} is for data with grey levels, which {data.name} has not: "
            "set it to standardize, whiten or none"
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
    if data.context_dim:
        raise ValueError(f"classification takes no contexts, and {data.name} has them: choose the objective density")
    settings = config.classifier
    if len(data.event_shape) != 3:
        raise ValueError(f"classification is for images, and {data.name} has vectors: choose the objective hybrid")
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


def reconstructor_spec(config: Config, data: DataSet) -> ReconstructorSpec:
    """The reconstructor of the images of a data set.

    Raises:
        ValueError: If the data are no images of grey levels, or settings do not fit them.
    """
    if data.num_levels is None or len(data.event_shape) != 3 or data.context_dim:
        raise ValueError(
            f"the objective inversion is for images of grey levels without contexts, which {data.name} has not: choose "
            "another data.name"
        )
    flow_spec = build_flow_spec(config.model, data.event_shape)
    return ReconstructorSpec(flow_spec, data.num_levels, constrained=config.constraint.norms != "none")


def build_measurement(settings: InverseProblemConfig) -> Measurement:
    """How the objective "inversion" measures images."""
    return Measurement(settings.width, settings.noise)


def model_spec(config: Config, data: DataSet) -> Spec:
    """The model of a data set, whatever the objective."""
    if config.objective == "inversion":
        return reconstructor_spec(config, data)
    return classifier_spec(config, data) if config.objective == "classification" else density_spec(config, data)


def build_constraint(settings: ConstraintConfig, spec: FlowSpec, *, training: bool) -> Constrain:
    """``(params, spectral) -> Constrained``, for training steps or for validation."""
    if settings.norms == "certified":
        squarings, twists = settings.num_squarings, settings.twists
        return lambda params, spectral: flow.constrain_certified(spec, params, spectral, num_squarings=squarings, twists=twists)
    if settings.norms == "estimated":
        if not training:
            return lambda params, spectral: flow.constrain(spec, params, spectral, rtol=settings.rtol)
        return lambda params, spectral: flow.constrain(
            spec, params, spectral, num_steps=settings.num_steps, over_blocks=parallel.shared_vmap
        )
    return lambda params, spectral: flow.unconstrained(spec, params, spectral)


@functools.lru_cache(maxsize=64)
def compiled_constraint(settings: ConstraintConfig, spec: FlowSpec) -> Constrain:
    """`build_constraint` for validation: one function for all that has one architecture, which shares its program."""
    return jax.jit(build_constraint(settings, spec, training=False))


def build_solver(settings: EvaluationConfig) -> Solver:
    """The solver of inverses."""
    return Solver(atol=settings.inverse_atol)


def unroll(blocks: str) -> bool:
    """Whether ``training.blocks`` writes blocks out instead of scanning over them."""
    return flow.unroll_by_default() if blocks == "auto" else blocks == "unroll"


def rematerialize(config: Config) -> Rematerialize:
    """What a backward pass computes anew: what the config says, and "elementwise" at least for exact log-dets in a scan.

    A scan writes all that it keeps into stacks, which takes longer than to recompute what is elementwise.
    """
    if config.training.rematerialize:
        return "blocks"
    is_exact = config.logdet.kind == "exact"
    return "elementwise" if is_exact and not unroll(config.training.blocks) else "nothing"


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


@functools.lru_cache(maxsize=64)
def build_optimizer(settings: OptimizerConfig) -> optax.GradientTransformation:
    """The update rule at a learning rate of 1, which `build_schedule` sets; one object for equal settings."""
    return make_optimizer(
        name=settings.name,
        learning_rate=1.0,
        weight_decay=settings.weight_decay,
        momentum=settings.momentum,
        nesterov=settings.nesterov,
        b1=settings.b1,
        b2=settings.b2,
        clip_norm=settings.clip_norm,
    )
