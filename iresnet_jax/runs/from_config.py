"""What settings stand for: the data, their model, its objective."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from iresnet_jax.bijections.chain import Rematerialize
from iresnet_jax.bijections.residual import Solver
from iresnet_jax.bijections.transforms.bounded import Bounded
from iresnet_jax.bijections.transforms.equalize import Equalize, entry_shares, level_frequencies
from iresnet_jax.bijections.transforms.logit import Center, Identity, Logit
from iresnet_jax.bijections.transforms.standardize import Standardize, Whiten
from iresnet_jax.data import augment, conditioned_on_labels, load
from iresnet_jax.data.dataset import DataSet
from iresnet_jax.data.measurements import Measurement
from iresnet_jax.data.toys import Toy
from iresnet_jax.models import flow
from iresnet_jax.models.architecture import FlowSpec
from iresnet_jax.models.classifier import Classifier, ClassifierSpec
from iresnet_jax.models.density import Density, DensitySpec, Transform
from iresnet_jax.models.reconstructor import Reconstructor, ReconstructorSpec, block_coeff
from iresnet_jax.models.saved import Spec
from iresnet_jax.runs.config import (
    AugmentationConfig,
    Config,
    DataConfig,
    EvaluationConfig,
    InverseProblemConfig,
    ModelConfig,
    PreprocessingConfig,
)
from iresnet_jax.training import initialization
from iresnet_jax.training.constraint import training_constraint
from iresnet_jax.training.objectives import classification, density, hybrid, inversion
from iresnet_jax.training.objectives.objective import Objective
from iresnet_jax.training.optimizers import make_optimizer, make_schedule
from iresnet_jax.training.step import TrainingStep, UpdateRule

SCALE_EXAMPLES = 10_000  # of a simulator, whose mean and standard deviation become the scale of its data


def load_data(settings: DataConfig) -> DataSet:
    """The data that a config names."""
    fractions = settings.validation_fraction, settings.test_fraction
    data = load(settings.name, settings.data_dir, fractions=fractions)
    return conditioned_on_labels(data) if settings.condition_on_labels else data


# ------------------------------------------------------------------------------------------------------------ the model


def model_spec(config: Config, data: DataSet) -> Spec:
    """The model of a data set, whatever the objective.

    Raises:
        ValueError: If settings do not fit the data.
    """
    if config.objective == "inversion":
        return reconstructor_spec(config, data)
    return classifier_spec(config, data) if config.objective == "classification" else density_spec(config, data)


def density_spec(config: Config, data: DataSet) -> DensitySpec:
    """The density of a data set, with a prior for every class if the objective is hybrid."""
    is_hybrid = config.objective == "hybrid"
    if is_hybrid and data.num_classes is None:
        raise ValueError(f"a hybrid needs labelled images, and {data.name} has none: choose another data.name")
    if is_hybrid and data.context_dim:
        raise ValueError(f"a hybrid takes no contexts, and {data.name} has them: choose the objective density")
    return DensitySpec(
        flow=build_flow_spec(config.model, data.event_shape, data.context_dim),
        prior_family=config.model.prior,
        transform=build_transform(config.preprocessing, data, by_class=is_hybrid),
        num_levels=data.num_levels,
        num_classes=data.num_classes if is_hybrid else None,
        grid=data.grid,
        columns=data.columns,
        context=_context_scale(data),
    )


def classifier_spec(config: Config, data: DataSet) -> ClassifierSpec:
    """The classifier of a data set."""
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
    """The reconstructor of the images of a data set."""
    if data.num_levels is None or len(data.event_shape) != 3 or data.context_dim:
        raise ValueError(
            f"the objective inversion is for images of grey levels without contexts, which {data.name} has not: choose "
            "another data.name"
        )
    flow_spec = build_flow_spec(config.model, data.event_shape)
    return ReconstructorSpec(flow_spec, data.num_levels, constrained=config.constraint.norms != "none")


def build_flow_spec(settings: ModelConfig, event_shape: tuple[int, ...], context_dim: int = 0) -> FlowSpec:
    """The architecture for examples of one shape, with contexts of some length."""
    if settings.budget != "network":
        return FlowSpec(tuple(event_shape), settings.stages, settings.coeff, settings.budget, context_dim)
    coeff = block_coeff(settings.coeff, sum(stage.num_blocks for stage in settings.stages))
    return FlowSpec(tuple(event_shape), settings.stages, coeff, "block", context_dim)


def build_transform(settings: PreprocessingConfig, data: DataSet, *, by_class: bool = False) -> Transform:
    """The preprocessing of a data set; "equalize" counts the levels of its training images.

    Args:
        settings: The kind of preprocessing.
        data: The data.
        by_class: Whether "whiten" is by the covariance within classes.

    Raises:
        ValueError: If it needs integer levels that the data do not have.
    """
    if data.bounds is not None:
        line = data_on_the_line(data)
        fits = {"none": lambda: Identity(), "standardize": lambda: Standardize.fit(line), "whiten": lambda: Whiten.fit(line)}
        if settings.transform not in fits:
            raise ValueError(f"preprocessing.transform {settings.transform} is for images, not {data.name}: standardize it")
        return Bounded(data.bounds, fits[settings.transform]())
    kind = settings.transform
    if kind == "none":
        return Identity()
    if kind in ("standardize", "whiten"):
        if data.num_levels is not None or isinstance(data.generator, Toy):
            raise ValueError(f"preprocessing.transform {kind} is for arrays of continuous data, not {data.name}")
        if kind == "whiten" and len(data.event_shape) != 1:
            raise ValueError(f"preprocessing.transform whiten is for vectors, and {data.name} has images: standardize them")
        examples = data_on_the_line(data)
        if kind == "standardize":
            return Standardize.fit(examples)
        return Whiten.fit(examples, data.labels["train"] if by_class else None)
    if data.num_levels is None:
        raise ValueError(
            f"preprocessing.transform {kind} is for data with grey levels, which {data.name} has not: "
            "set it to standardize, whiten or none"
        )
    if kind == "center":
        return Center()
    if kind == "logit":
        return Logit(settings.alpha)
    images = data.examples["train"]
    frequencies = level_frequencies(images, data.num_levels)
    return Equalize(frequencies, entry_shares(images, frequencies) if settings.entrywise else None, settings.alpha)


def data_on_the_line(data: DataSet) -> np.ndarray:
    """Training examples, or some of a simulator, as standardize and whiten see them.

    Entries within bounds are mapped onto the real line, those on a grid with noise in their cells, always the same.
    """
    examples = np.asarray(_to_scale_by(data)[0])
    if data.bounds is None:
        return examples
    spacing = np.zeros(examples.shape[1]) if data.grid is None else np.asarray(data.grid.spacing)
    noise = spacing * (np.random.default_rng(0).random(examples.shape) - 0.5)
    return Bounded(data.bounds).to_line(examples + noise, np)[0]


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
        return data.random_train(jax.random.key(0), SCALE_EXAMPLES)[:2]
    return data.examples["train"], data.contexts.get("train")


def build_solver(settings: EvaluationConfig) -> Solver:
    """The solver of inverses."""
    return Solver(atol=settings.inverse_atol)


# -------------------------------------------------------------------------------------------------------- the objective


def build_objective(config: Config, data: DataSet, spec: Spec | None = None) -> Objective:
    """What ``config.objective`` names, for a model that is by default the one of the settings and the data.

    Raises:
        ValueError: If settings do not fit the data.
    """
    spec = model_spec(config, data) if spec is None else spec
    if isinstance(spec, ClassifierSpec):
        return _classification(config, data, spec)
    if isinstance(spec, ReconstructorSpec):
        return _inversion(config, data, spec)
    return _hybrid(config, data, spec) if config.objective == "hybrid" else _density(config, data, spec)


def _density(config: Config, data: DataSet, spec: DensitySpec) -> Objective:
    loss = density.make_loss(data.draw, density.noise_scales(config.augmentation.noise, spec))
    return Objective(
        name=spec.metric,
        step=_step(config, spec, loss),
        make_validation=lambda: density.Validation(spec, **_held_out(config, data)),
        selection=lambda held_out: held_out[spec.metric],
        examples=None if data.is_endless else (data.examples["train"], data.contexts.get("train")),
        logdet=config.logdet,
        initial_variables=lambda: initial_variables(config, spec, data),
    )


def _hybrid(config: Config, data: DataSet, spec: DensitySpec) -> Objective:
    loss = hybrid.make_loss(
        config.hybrid, label_smoothing=config.classifier.label_smoothing, augment=build_augmentation(config.augmentation, data)
    )
    weight = float(config.hybrid.weight_of_step()(config.training.total_steps))
    return Objective(
        name="accuracy",
        step=_step(config, spec, loss),
        make_validation=lambda: hybrid.Validation(_held_out_labels(config, data), spec, **_held_out(config, data)),
        selection=lambda held_out: held_out["cross_entropy"] + weight * held_out[spec.metric],
        examples=(data.examples["train"], data.labels["train"]),
        logdet=config.logdet,
        initial_variables=lambda: initial_variables(config, spec, data),
    )


def _classification(config: Config, data: DataSet, spec: ClassifierSpec) -> Objective:
    training = config.training
    loss = classification.make_loss(
        build_augmentation(config.augmentation, data),
        label_smoothing=config.classifier.label_smoothing,
        num_parts=training.num_parts,
    )
    return Objective(
        name="accuracy",
        step=_step(config, spec, loss, num_parts=1),  # the loss itself computes parts
        make_validation=lambda: classification.Validation(
            spec,
            data.held_out("validation", training.eval_examples),
            _held_out_labels(config, data),
            constraint=config.constraint,
            batch_size=config.evaluation.batch_size,
        ),
        selection=classification.selection,
        examples=(data.examples["train"], data.labels["train"]),
        initial_variables=lambda: initial_variables(config, spec, data),
    )


def _inversion(config: Config, data: DataSet, spec: ReconstructorSpec) -> Objective:
    settings, measurement = config.inverse_problem, build_measurement(config.inverse_problem)

    def make_validation():
        x = np.asarray(Reconstructor(spec, {}).preprocess(data.held_out("validation", config.training.eval_examples)))
        return inversion.Validation(
            spec,
            x,
            measurement.held_out(x, config.seed, "validation"),
            constraint=config.constraint,
            solver=build_solver(config.evaluation),
            forward_share=settings.forward_share,
            batch_size=config.evaluation.batch_size,
        )

    return Objective(
        name="loss",
        step=_step(config, spec, inversion.make_loss(measurement.draw, forward_share=settings.forward_share)),
        make_validation=make_validation,
        selection=lambda held_out: held_out["relative_error"],
        examples=data.examples["train"],
        initial_variables=lambda: initial_variables(config, spec, data),
    )


def _step(config: Config, spec: Spec, loss: Callable[..., Any], num_parts: int | None = None) -> TrainingStep:
    """The training step of a loss, with the model as training runs it."""
    training, how = config.training, {"unroll": unroll(config), "rematerialize": rematerialize(config)}
    if isinstance(spec, ReconstructorSpec):
        model = Reconstructor(spec, {}, solver=Solver(atol=config.inverse_problem.training_atol), **how)
    elif isinstance(spec, ClassifierSpec):
        model = Classifier(spec, {}, {}, {}, bfloat16=training.bfloat16, **how)
    else:
        model = Density(spec, {}, {}, estimator=config.logdet.build(), bfloat16=training.bfloat16, **how)
    schedule = make_schedule(config.optimizer, training.total_steps)
    rule = UpdateRule(make_optimizer(config.optimizer), schedule, training.total_steps, training.ema_decay)
    constrain = training_constraint(config.constraint, spec)
    return TrainingStep(model, loss, constrain, rule, config.seed, num_parts or training.num_parts)


def unroll(config: Config) -> bool:
    """Whether ``training.blocks`` writes blocks out instead of scanning over them."""
    blocks = config.training.blocks
    return flow.unroll_by_default() if blocks == "auto" else blocks == "unroll"


def rematerialize(config: Config) -> Rematerialize:
    """What a backward pass computes anew: what the config says, and "elementwise" at least for exact log-dets in a scan.

    A scan writes all that it keeps into stacks, which takes longer than to recompute what is elementwise.
    """
    if config.training.rematerialize:
        return "blocks"
    return "elementwise" if config.logdet.kind == "exact" and not unroll(config) else "nothing"


def _held_out(config: Config, data: DataSet) -> dict[str, Any]:
    """What a validation of a density measures, and how."""
    num, seed = config.training.eval_examples, config.seed
    return {
        "examples": data.held_out("validation", num, seed),
        "contexts": data.held_out_contexts("validation", num, seed),
        "constraint": config.constraint,
        "estimator": config.evaluation.logdet.build(),
        "logdet": config.logdet,
        "max_num_terms": config.training.max_num_terms,
        "batch_size": config.evaluation.batch_size,
        "seed": seed,
    }


def _held_out_labels(config: Config, data: DataSet) -> Any:
    return data.labels["validation"][: config.training.eval_examples]


def initial_variables(config: Config, spec: Spec, data: DataSet) -> Any:
    """Fresh variables, fitted to training data."""
    return initialization.initial_variables(
        spec,
        config.seed,
        lambda key: data.random_train(key, config.training.actnorm_examples),
        constraint=config.constraint,
        last_scale=config.model.last_scale,
        sharp=config.model.sharp,
        fitted_priors=config.hybrid.fitted_priors,
    )


def build_measurement(settings: InverseProblemConfig) -> Measurement:
    """How the objective "inversion" measures images."""
    return Measurement(settings.width, settings.noise)


def build_augmentation(settings: AugmentationConfig, data: DataSet) -> classification.Augment | None:
    """The random change of training images that ``config.augmentation`` describes; None for no change.

    Raises:
        ValueError: If images of this size cannot be changed like that.
    """
    padding = settings.crop_padding
    if not padding and not settings.flip:
        return None

    def augment_images(keys, images):
        if not padding:
            return augment.random_flip(keys, images)
        change = augment.crop_and_flip if settings.flip else augment.random_crop
        return change(keys, images, padding=padding)

    keys, one = jax.random.split(jax.random.key(0), 1), data.examples["train"][:1]
    jax.eval_shape(augment_images, keys, one)
    return augment_images
