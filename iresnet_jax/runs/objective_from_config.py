"""Objectives from settings: the loss, the training step and the validation of a model."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from iresnet_jax.bijections.chain import Rematerialize
from iresnet_jax.data import augment
from iresnet_jax.data.dataset import DataSet
from iresnet_jax.maths import platforms
from iresnet_jax.models import saved
from iresnet_jax.models.classifier import Classifier, ClassifierSpec
from iresnet_jax.models.density import Density
from iresnet_jax.models.density_spec import DensitySpec
from iresnet_jax.models.saved import Spec
from iresnet_jax.runs.config import AugmentationConfig, Config
from iresnet_jax.runs.model_from_config import identity_context, model_spec
from iresnet_jax.training import classification, density, hybrid, initialization
from iresnet_jax.training.constraint import Unconstrained, training_constraint
from iresnet_jax.training.optimizers import make_optimizer, make_schedule
from iresnet_jax.training.step import Objective, TrainingStep, UpdateRule


def build_objective(config: Config, data: DataSet, spec: Spec | None = None) -> Objective:
    """The objective that ``config.objective`` names, for a model that is by default the one of the
    settings and the data.

    Raises:
        ValueError: If settings do not fit the data, or ``training.initial_model`` does not fit
            either.
    """
    spec = model_spec(config, data) if spec is None else spec
    if isinstance(spec, ClassifierSpec):
        loss, about = _classification(config, data, spec)
    else:
        loss, about = (_hybrid if config.objective == "hybrid" else _density)(config, data, spec)
        about |= {
            "make_validation": lambda: _validation(config, spec, data),
            "logdet": config.logdet,
        }
    found = _of_model(config.training.initial_model, spec) if config.training.initial_model else {}
    return Objective(
        training_step=_training_step(config, spec, loss),
        initial_variables=lambda: _updated(initial_variables(config, spec, data), found),
        seed=config.seed,
        **about,
    )


# Each gives the loss, and how an `Objective` measures it.


def _density(
    config: Config, data: DataSet, spec: DensitySpec
) -> tuple[Callable[..., Any], dict[str, Any]]:
    noise = config.augmentation.noise
    if noise and data.is_endless:
        raise ValueError(
            f"config.augmentation.noise is for continuous vectors of an array, and {data.name} has "
            "no end: set it to 0"
        )
    if noise:
        density.noise_scales(spec)  # raises where noise has no scale
    loss = density.make_loss(
        data.draw, noise=noise, transform=build_transformations(config.augmentation, data)
    )
    examples = None if data.is_endless else (data.examples["train"], data.contexts.get("train"))
    return loss, {
        "name": spec.metric,
        "selection": lambda held_out: held_out[spec.metric],
        "examples": examples,
    }


def _hybrid(
    config: Config, data: DataSet, spec: DensitySpec
) -> tuple[Callable[..., Any], dict[str, Any]]:
    change = build_augmentation(config.augmentation, data)
    loss = hybrid.make_loss(
        config.hybrid, label_smoothing=config.classifier.label_smoothing, augment=change
    )
    selection = lambda held_out: held_out["cross_entropy"]  # noqa: E731
    return loss, {
        "name": "accuracy",
        "selection": selection,
        "examples": (data.examples["train"], data.labels["train"]),
    }


def _classification(
    config: Config, data: DataSet, spec: ClassifierSpec
) -> tuple[Callable[..., Any], dict[str, Any]]:
    change, settings = build_augmentation(config.augmentation, data), config.classifier
    margin = classification.Margin(settings.margin, settings.temperature)
    smoothing, num_parts = settings.label_smoothing, config.training.num_parts
    loss = classification.make_loss(
        change, label_smoothing=smoothing, margin=margin, num_parts=num_parts
    )
    num = config.training.eval_examples
    return loss, {
        "name": "accuracy",
        "make_validation": lambda: classification.make_validation(
            spec,
            data.held_out("validation", num),
            data.held_out_labels("validation", num),
            constraint=config.constraint,
            batch_size=config.evaluation.batch_size,
            margin=margin,
        ),
        "selection": classification.selection,
        "examples": (data.examples["train"], data.labels["train"]),
    }


def _training_step(config: Config, spec: Spec, loss: Callable[..., Any]) -> TrainingStep:
    """The training step of a loss, with the model as training runs it."""
    training, num_parts, blocks = config.training, config.training.num_parts, config.training.blocks
    # A step of unrolled blocks is up to 1.7 times as fast on CPUs.
    unroll = platforms.platform() == "cpu" if blocks == "auto" else blocks == "unroll"
    # A scan writes all that it keeps into stacks, which takes longer than to recompute what is
    # elementwise.
    how: Rematerialize = (
        "elementwise" if config.logdet.kind == "exact" and not unroll else "nothing"
    )
    how = "blocks" if training.rematerialize else how
    if isinstance(spec, ClassifierSpec):
        # the loss itself computes parts
        model, num_parts = Classifier(spec, {}, {}, {}, unroll=unroll, rematerialize=how), 1
    else:
        spec = dataclasses.replace(spec, columns=None)  # which no program computes with
        model = Density(
            spec, {}, {}, estimator=config.logdet.build(), unroll=unroll, rematerialize=how
        )
    schedule = make_schedule(config.optimizer, training.schedule_steps)
    rule = UpdateRule(
        make_optimizer(config.optimizer), schedule, training.schedule_steps, training.ema_decay
    )
    return TrainingStep(model, loss, training_constraint(config.constraint, spec), rule, num_parts)


def _validation(config: Config, spec: DensitySpec, data: DataSet) -> density.Validation:
    num, seed = config.training.eval_examples, config.seed
    return density.Validation(
        spec,
        examples=data.held_out("validation", num, seed),
        contexts=data.held_out_contexts("validation", num),
        labels=data.held_out_labels("validation", num) if config.objective == "hybrid" else None,
        constraint=config.constraint,
        estimator=config.evaluation.logdet.build(),
        logdet=config.logdet,
        max_num_terms=config.training.max_num_terms,
        batch_size=config.evaluation.batch_size,
        seed=seed,
        given=identity_context(config),
        label_smoothing=config.classifier.label_smoothing,
    )


def initial_variables(config: Config, spec: Spec, data: DataSet) -> Any:
    """Fresh variables, fitted to training data as they are."""
    # which a model may have been given for good
    identity = identity_context(config) if spec.flow.context_dim else None

    def examples_of(key, num):
        x, context, labels = data.random_train(key, num)
        return x, context if identity is None else np.tile(identity, (len(x), 1)), labels

    return initialization.initial_variables(
        spec,
        config.seed,
        examples_of,
        actnorm_examples=config.training.actnorm_examples,
        constraint=config.constraint,
        last_scale=config.model.last_scale,
        sharpness=config.model.sharpness,
    )


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
    free, wanted = Unconstrained.of(model), initialization.abstract_variables(spec)
    found = {
        "params": free.params,
        "spectral": free.iterates,
        "batch_stats": getattr(model, "statistics", {}),
    }
    # of a file in another precision
    found = jax.tree.map(lambda leaf: leaf.astype(jnp.result_type(float)), found)
    if (
        own != flow
        or _inputs(model.spec) != _inputs(spec)
        or _shapes(_updated(wanted, found)) != _shapes(wanted)
    ):
        raise ValueError(
            f"config.training.initial_model: {path} has other stages, contexts, preprocessing, "
            "levels, columns or another "
            "prior than config and the data ask for"
        )
    return found


def _updated(variables: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    """Variables with what was found of them in their place."""
    return {
        name: _updated(own, found.get(name, {})) if isinstance(own, dict) else found.get(name, own)
        for name, own in variables.items()
    }


def _inputs(spec: Spec) -> Any:
    """What the numbers of an example mean to the flow."""
    columns = [column.name for column in getattr(spec, "columns", None) or ()]
    return type(getattr(spec, "transform", None)), spec.num_levels, columns


def _shapes(tree: Any) -> Any:
    return jax.tree.structure(tree), [np.shape(leaf) for leaf in jax.tree.leaves(tree)]


def build_augmentation(
    settings: AugmentationConfig, data: DataSet
) -> classification.Augment | None:
    """The random change of training images that ``config.augmentation`` describes; None for no
    change.

    Raises:
        ValueError: If images of this size cannot be changed like that.
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

    Raises:
        ValueError: If images of this size cannot be changed like that.
    """
    names = settings.transformations
    return _tried(functools.partial(augment.transformed, names=names), data) if names else None


def _tried(change: Callable[..., Any], data: DataSet) -> Callable[..., Any]:
    """A change of images, which has raised if their size does not allow it."""
    jax.eval_shape(change, jax.random.split(jax.random.key(0), 1), data.examples["train"][:1])
    return change
