"""What is trained on a data set: the density's spec, a fresh model, and the objective."""

import functools
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from iresnet_jax.bijections.marginals import before
from iresnet_jax.bijections.standardize import Standardize, Whiten
from iresnet_jax.data import augment
from iresnet_jax.data.dataset import DataSet
from iresnet_jax.data.tables import choose, fit_marginals
from iresnet_jax.maths.logdet_config import LogdetConfig
from iresnet_jax.maths.logdet_estimator import LogdetEstimator
from iresnet_jax.models.architecture import FlowSpec
from iresnet_jax.models.contexts import ContextScale, ContextScores, linear_regression, scaled
from iresnet_jax.models.density_spec import DensitySpec, Transform
from iresnet_jax.models.free import Free
from iresnet_jax.models.initial import VECTORS, initial
from iresnet_jax.training import classification, density
from iresnet_jax.training.run import Objective

# --- models ---------------------------------------------------------------------------------------


def density_spec(
    data: DataSet,
    flow: FlowSpec,
    *,
    prior: str = "gaussian",
    num_components: int | None = None,
    transform: Transform | str,
    context_hidden: tuple[int, ...] = (),
    transformations: tuple[str, ...] = (),
    has_classes: bool = False,
) -> DensitySpec:
    """The density of a data set, whose preprocessing is fitted to the training examples.

    Args:
        data: The data.
        flow: The flow, whose length of contexts follows from data and ``context_hidden``.
        prior: Family of the prior.
        num_components: Its components, of a family that has them.
        transform: Preprocessing behind the marginals of columns, or "standardize" or "whiten":
            given contexts or classes, by the covariance of what a regression on them leaves.
        context_hidden: Widths of a network on contexts.
        transformations: Changes of images that are contexts in training.
        has_classes: Whether each class has a prior.
    """
    context = None
    if data.contexts:
        rows, kinds = data.contexts["train"], data.context_kinds
        if context_hidden and any(kind.levels or len(kind.values) or kind.atoms for kind in kinds):
            columns = data.context_columns or [None] * len(kinds)
            nums = [len(column.categories or ()) if column else 0 for column in columns]
            num_levels = tuple(num if num > 2 else 0 for num in nums)
            context = ContextScores(fit_marginals(rows, kinds, choose(rows, kinds)), num_levels)
        else:  # a network takes contexts scaled by `ContextScale`
            context = (ContextScale.fit if context_hidden else Standardize.fit_contexts)(rows)
    if transform == "standardize":
        transform = Standardize.fit(data_on_the_line(data))
    elif transform == "whiten":
        line = data_on_the_line(data)
        transform = Whiten.fit(line, _residuals(line, data, context, by_class=has_classes))
    cells, preprocessing = before(data.marginals, transform)
    width = len(transformations) or (context_hidden[-1] if context_hidden else data.context_dim)
    return DensitySpec(
        replace(flow, context_dim=width),
        prior_family=prior,
        transform=preprocessing,
        num_levels=data.num_levels,
        num_classes=data.num_classes if has_classes else None,
        cells=cells,
        columns=data.columns,
        context=context,
        context_columns=data.context_columns,
        num_components=num_components,
        context_hidden=context_hidden,
    )


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
    if data.marginals is None:
        return examples
    noise = np.random.default_rng(0).random(examples.shape)
    return data.marginals.placed(examples.astype(np.float64), noise, np)[0]


def fresh_model(
    data: DataSet,
    spec: Any,
    *,
    seed: int,
    num: int,
    transformations: tuple[str, ...] = (),
    **options: Any,
) -> Free:
    """A model with fresh weights, fitted to ``num`` random training examples, of vectors to 20,000
    at least; ``options`` are those of `initial`.
    """
    num = max(num, VECTORS) if len(spec.flow.event_shape) == 1 else num
    key = jax.random.fold_in(jax.random.key(np.uint32(seed)), 2**31)
    key, key_data = jax.random.split(key)
    x, labels, context = data.random_train(key_data, num)
    if transformations and spec.flow.context_dim:
        context = np.tile(unchanged(transformations), (len(x), 1))
    return initial(spec, key, x, context=context, labels=labels, **options)


def unchanged(transformations: tuple[str, ...]) -> Float[np.ndarray, " k"]:
    """The context of an image that no transformation has changed."""
    return np.zeros(len(transformations), np.float32)


# --- objectives -----------------------------------------------------------------------------------


def density_objective(
    data: DataSet,
    spec: DensitySpec,
    *,
    logdet: LogdetConfig,
    estimator: LogdetEstimator,
    num: int,
    batch_size: int,
    seed: int,
    noise: float = 0.0,
    transformations: tuple[str, ...] = (),
    hybrid: density.HybridConfig | None = None,
    label_smoothing: float = 0.0,
    augmentation: classification.Augment | None = None,
) -> Objective:
    """Likelihood, or with ``hybrid`` its sum with the cross-entropy of labels, measured on ``num``
    validation examples by an estimator of its own; other arguments are those of
    `density.make_loss`, `density.make_hybrid_loss` and `density.measure`.
    """
    if hybrid is not None:
        smoothing = label_smoothing
        loss = density.make_hybrid_loss(hybrid, label_smoothing=smoothing, augment=augmentation)
    else:
        if noise:
            density.noise_scales(spec)  # raises if noise has no scale
        change = functools.partial(augment.transformed, names=transformations)
        changed = change if transformations else None
        loss = density.make_loss(data.draw, noise=noise, transform=changed)

    held_out = functools.cache(lambda: data.held_out("validation", num, seed))

    def measure(model):
        model = model.given(unchanged(transformations)) if transformations else model
        examples, labels, contexts = held_out()
        return density.measure(
            model.with_(estimator=estimator),
            examples,
            contexts=contexts,
            labels=None if hybrid is None else labels,
            logdet=logdet,
            batch_size=batch_size,
            seed=seed,
            label_smoothing=label_smoothing,
        )

    return Objective(loss, spec.metric if hybrid is None else "accuracy", measure)


def classification_objective(
    data: DataSet,
    *,
    num: int,
    batch_size: int,
    augmentation: classification.Augment | None = None,
    label_smoothing: float = 0.0,
    margin: classification.Margin = classification.Margin(),
    num_parts: int = 1,
) -> Objective:
    """Cross-entropy of labels, measured on ``num`` validation images; arguments are those of
    `classification.make_loss` and `classification.measure`.
    """
    loss = classification.make_loss(
        augmentation, label_smoothing=label_smoothing, margin=margin, num_parts=num_parts
    )

    def measure(model):
        images, labels, _ = data.held_out("validation", num)
        return classification.measure(model, images, labels, batch_size, margin)

    return Objective(loss, "accuracy", measure)
