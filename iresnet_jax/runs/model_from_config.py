"""From a config to its data, and to the architecture and preprocessing of its model."""

from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from iresnet_jax.bijections.equalize import Equalize
from iresnet_jax.bijections.logit import Logit
from iresnet_jax.bijections.standardize import Center, Identity, Standardize, Whiten
from iresnet_jax.data import conditioned_on_labels, load
from iresnet_jax.data.dataset import DataSet
from iresnet_jax.data.tables import choose, fit_marginals
from iresnet_jax.models.architecture import FlowSpec
from iresnet_jax.models.classifier import ClassifierSpec
from iresnet_jax.models.contexts import ContextScale, ContextScores, linear_regression, scaled
from iresnet_jax.models.density_spec import DensitySpec, Transform
from iresnet_jax.models.saved import Spec
from iresnet_jax.runs.config import Config, DataConfig, ModelConfig, PreprocessingConfig


def load_data(settings: DataConfig, num_classes: int | None = None) -> DataSet:
    """The data that a config names; ``num_classes`` is an existing model's number of classes."""
    fractions = settings.validation_fraction, settings.test_fraction
    data = load(settings.name, fractions=fractions, num_classes=num_classes)
    return conditioned_on_labels(data) if settings.condition_on_labels else data


def model_spec(config: Config, data: DataSet) -> Spec:
    """The model of a data set, for any objective."""
    make = classifier_spec if config.objective == "classification" else density_spec
    return make(config, data)


def density_spec(config: Config, data: DataSet) -> DensitySpec:
    """The density of a data set, with a prior for every class if the objective is hybrid."""
    is_hybrid = config.objective == "hybrid"
    if is_hybrid and data.num_classes is None:
        raise ValueError(
            f"a hybrid needs labels, and {data.name} has none: choose another data.name"
        )
    if is_hybrid and data.context_dim:
        raise ValueError(
            f"a hybrid takes no contexts, and {data.name} has them: choose the objective density"
        )
    hidden = config.model.context_hidden
    if hidden and not data.context_dim:
        raise ValueError(
            f"config.model.context_hidden is a network on contexts, and {data.name} "
            "has none: leave it out"
        )
    transformations = config.augmentation.transformations
    if transformations and (
        data.num_levels is None or len(data.event_shape) != 3 or data.context_dim
    ):
        raise ValueError(
            "config.augmentation.transformations are for images of grey levels without contexts, "
            f"which {data.name} has not: leave them out"
        )
    if config.evaluation.num_importance_draws and data.num_levels is None and data.cells is None:
        raise ValueError(
            f"config.evaluation.num_importance_draws is for discrete data, and {data.name} is "
            "continuous: make it 0"
        )
    context_dim = len(transformations) or (hidden[-1] if hidden else data.context_dim)
    flow = build_flow_spec(config.model, data.event_shape, context_dim)
    # A network on contexts takes them scaled by `ContextScale`.
    context = None
    if data.contexts:
        rows, kinds = data.contexts["train"], data.context_kinds
        if hidden and any(kind.levels or len(kind.values) or kind.atoms for kind in kinds):
            columns = data.context_columns or [None] * len(kinds)
            nums = [len(column.categories or ()) if column else 0 for column in columns]
            num_levels = tuple(num if num > 2 else 0 for num in nums)
            context = ContextScores(fit_marginals(rows, kinds, choose(rows, kinds)), num_levels)
        else:
            context = (ContextScale.fit if hidden else Standardize.fit_contexts)(rows)
    return DensitySpec(
        flow=replace(
            flow, noise=config.model.noise if config.model.dequantization == "variational" else None
        ),
        prior_family=config.model.prior,
        transform=build_transform(config.preprocessing, data, context=context, by_class=is_hybrid),
        num_levels=data.num_levels,
        num_classes=data.num_classes if is_hybrid else None,
        cells=data.cells,
        columns=data.columns,
        context=context,
        context_columns=data.context_columns,
        num_components=config.model.prior_components or None,
        context_hidden=hidden,
    )


def identity_context(config: Config) -> np.ndarray | None:
    """Context of unchanged images if ``augmentation.transformations`` are contexts; None
    otherwise.
    """
    num = len(config.augmentation.transformations)
    return np.zeros(num, np.float32) if num else None


def classifier_spec(config: Config, data: DataSet) -> ClassifierSpec:
    """The classifier of a data set."""
    if data.num_classes is None:
        raise ValueError(
            f"classification needs labelled images, and {data.name} has none: choose "
            "another data.name"
        )
    if data.context_dim:
        raise ValueError(
            f"classification takes no contexts, and {data.name} has them: choose the "
            "objective density"
        )
    settings = config.classifier
    if len(data.event_shape) != 3:
        raise ValueError(
            f"classification is for images, and {data.name} has vectors: choose the "
            "objective hybrid"
        )
    if data.num_levels is None:
        raise ValueError(
            f"classification is for images of integer grey levels, and {data.name} "
            "has floats: make them integers"
        )
    height, width, channels = data.event_shape
    return ClassifierSpec(
        flow=build_flow_spec(config.model, (height, width, channels + settings.pad_channels)),
        image_shape=(height, width, channels),
        num_classes=data.num_classes,
        num_levels=data.num_levels,
        pad_channels=settings.pad_channels,
        mean=settings.mean,
        std=settings.std,
        constrained=config.constraint.norms != "none",
        head=settings.head,
    )


def build_flow_spec(
    settings: ModelConfig, event_shape: tuple[int, ...], context_dim: int = 0
) -> FlowSpec:
    """The architecture for examples of one shape, with contexts of some length."""
    if settings.constants:
        mu, nu = settings.constants
        return FlowSpec.bilipschitz(
            event_shape, settings.stages, mu=mu, nu=nu, context_dim=context_dim
        )
    return FlowSpec(
        tuple(event_shape), settings.stages, settings.coeff, settings.budget, context_dim
    )


def build_transform(
    settings: PreprocessingConfig,
    data: DataSet,
    *,
    context: Any = None,
    by_class: bool = False,
) -> Transform:
    """The preprocessing of a data set; "equalize" counts the levels of its training images.

    Args:
        settings: The kind of preprocessing.
        data: The data.
        context: Scale of contexts; with contexts, "whiten" uses the covariance of residuals of a
            regression on them.
        by_class: Whether "whiten" uses the covariance within classes.
    """
    kind, then = settings.transform, Identity()
    if kind in ("standardize", "whiten"):
        if data.num_levels is not None or data.is_endless:
            raise ValueError(
                f"preprocessing.transform {kind} is for arrays of continuous data, not {data.name}"
            )
        if kind == "whiten" and len(data.event_shape) != 1:
            raise ValueError(
                f"preprocessing.transform whiten is for vectors, and {data.name} has "
                "images: standardize them"
            )
        line = data_on_the_line(data)
        if kind == "standardize":
            then = Standardize.fit(line)
        else:
            then = Whiten.fit(line, _residuals(line, data, context, by_class=by_class))
    if kind in ("none", "standardize", "whiten"):
        return then if data.ends is None else replace(data.ends, then=then)
    if data.num_levels is None:
        raise ValueError(
            f"preprocessing.transform {kind} is for data with grey levels, which {data.name} has "
            "not: set it to standardize, whiten or none"
        )
    if kind == "center":
        return Center()
    if kind == "logit":
        return Logit(settings.alpha)
    images = data.examples["train"]
    return Equalize.fit(images, data.num_levels, entrywise=settings.entrywise, alpha=settings.alpha)


def _residuals(
    line: np.ndarray, data: DataSet, context: Any, *, by_class: bool
) -> Float[np.ndarray, "n d"] | None:
    """Examples minus their class mean, or minus the prediction of a linear regression on contexts;
    None without either.
    """
    centred = line - line.mean(axis=0, dtype=np.float64)
    if by_class:
        labels = data.labels["train"]
        for label in np.unique(labels):
            centred[labels == label] -= centred[labels == label].mean(axis=0)
        return centred
    if context is None:
        return None
    c = np.asarray(scaled(context, jnp.asarray(data.contexts["train"], float)))
    return centred - c @ linear_regression(c, centred)


def data_on_the_line(data: DataSet) -> np.ndarray:
    """Training examples for standardize and whiten: on the line, with fixed noise in their
    cells.
    """
    examples = np.asarray(data.examples["train"])
    if data.cells is not None:
        noise = np.random.default_rng(0).random(examples.shape)
        examples = data.cells.placed(examples.astype(np.float64), noise, np)[0]
    return examples if data.ends is None else data.ends.to_line(examples.astype(np.float64), np)[0]
