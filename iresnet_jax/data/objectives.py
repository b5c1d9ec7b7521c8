"""What is trained on a data set: the density's spec, a fresh model, and the objective."""

import functools
import logging
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
from iresnet_jax.models.classifier import apply_head, cross_entropy
from iresnet_jax.models.contexts import ContextScale, ContextScores, linear_regression, scaled
from iresnet_jax.models.density_spec import DensitySpec, Transform
from iresnet_jax.models.free import VECTORS, Free, initial
from iresnet_jax.training import parallel
from iresnet_jax.training.objectives import (
    Augment,
    HybridConfig,
    Margin,
    classify,
    density_loss,
    evaluate_examples,
    hybrid_loss,
    measure_classes,
    noise_scales,
)
from iresnet_jax.training.run import Measured, Objective
from iresnet_jax.training.step import Loss

REFERENCE_TERMS = 60  # of the series: at an eigenvalue of -.9 they leave .0002 of -2.3
ALARMING_BIAS = 0.01  # beyond it a warning is logged
WARNING = (
    "on validation data the log-determinant of training reads %s lower by %.3f than one that is "
    "not cut off: training "
    "exploited what its %d terms cut off; start with a larger logdet.num_terms, lower model.coeff "
    "or use logdet.kind = roulette"
)
_logger = logging.getLogger(__name__)

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
    hybrid: HybridConfig | None = None,
    label_smoothing: float = 0.0,
    augmentation: Augment | None = None,
) -> Objective:
    """Likelihood, or with ``hybrid`` its sum with the cross-entropy of labels.

    Measured are the mean of every term of held-out data, and the loss of each example. Training may
    learn to widen the gap between a log-determinant that is cut off and the true one, and nothing
    else shows it before the loss on held-out data rises. ``training_bias`` shows it: the objective
    by the log-determinant of training less the objective by `REFERENCE_TERMS` terms of the series,
    on one batch with the same noise and probes.

    Args:
        data: The data.
        spec: The density.
        logdet: Log-determinant of training.
        estimator: Log-determinant of validation.
        num: Validation examples that are measured, at most.
        batch_size: Most of them at once.
        seed: Seed of noise and probes.
        noise: See `density_loss`.
        transformations: Names of random changes of images, of which the model is told by contexts.
        hybrid: Weight of the likelihood beside the cross-entropy.
        label_smoothing: See `hybrid_loss`, also for ``augmentation``.
    """
    if hybrid is not None:
        loss = hybrid_loss(hybrid, label_smoothing=label_smoothing, augment=augmentation)
    else:
        if noise:
            noise_scales(spec)  # raises if noise has no scale
        change = functools.partial(augment.transformed, names=transformations)
        changed = change if transformations else None
        loss = density_loss(data.draw, noise=noise, transform=changed)

    held_out = functools.cache(lambda: data.held_out("validation", num, seed))

    def measure(model):
        model = model.given(unchanged(transformations)) if transformations else model
        (examples, labels, contexts), key = held_out(), jax.random.key(seed)

        def evaluated(estimator, examples, contexts):
            own = model.with_(estimator=estimator)
            return evaluate_examples(own, examples, key, batch_size, contexts=contexts)

        outputs = evaluated(estimator, examples, contexts)
        del outputs["truncation_bound"]
        means = {name: float(np.mean(values, dtype=np.float64)) for name, values in outputs.items()}
        losses, chosen_by = outputs[spec.metric], spec.metric
        if hybrid is not None:
            logits = classify(model, examples, labels, batch_size)["logits"]
            smoothed = functools.partial(cross_entropy, label_smoothing=label_smoothing)
            losses = np.asarray(smoothed(jnp.asarray(logits), jnp.asarray(labels)))
            means["accuracy"] = float(np.mean(logits.argmax(axis=1) == labels))
            means["cross_entropy"], chosen_by = float(losses.mean()), "cross_entropy"
        if not logdet.build().unbiased:
            # examples spread over all, as they are in files' order
            rows = np.unique(np.linspace(0, len(examples) - 1, batch_size, dtype=int))
            some = parallel.rows_of(examples, contexts)(rows)
            without_cut = replace(logdet, kind="series").build(REFERENCE_TERMS)
            cut, reference = (
                evaluated(each, *some)[spec.metric].astype(np.float64)
                for each in (logdet.build(), without_cut)
            )
            means["training_bias"] = bias = float((cut - reference).mean())
            if bias < -ALARMING_BIAS:
                _logger.warning(WARNING, spec.metric, -bias, logdet.num_terms)
        return Measured(means, means[chosen_by], losses)

    return Objective(loss, spec.metric if hybrid is None else "accuracy", measure)


def classification_objective(
    data: DataSet,
    *,
    num: int,
    batch_size: int,
    augmentation: Augment | None = None,
    label_smoothing: float = 0.0,
    margin: Margin = Margin(),
    num_parts: int = 1,
) -> Objective:
    """Cross-entropy of labels, by BatchNorm's statistics of the batch on all devices; measured as
    `measure_classes` does.

    Args:
        data: The data.
        num: Validation images that are measured, at most.
        batch_size: Most of them at once.
        augmentation: Random change of the images; None classifies them as they are.
        label_smoothing: Smoothing of the labels, see `classifier.cross_entropy`.
        margin: Margin by which images are to be classified.
        num_parts: Equal parts of the batch whose features are computed one after the other, and
            again in the backward pass, so that no more than the arrays of one are in memory at a
            time. The head's statistics are those of the whole batch, so the step itself must not
            split it.
    """

    def loss(model, batch, keys):
        images, labels = batch
        changed = images if augmentation is None else augmentation(keys.examples, images)
        x = model.preprocess(changed)
        if num_parts == 1:
            features = model.features_of_input(x)
        else:
            parts = x.reshape(num_parts, -1, *x.shape[1:])
            features = jax.lax.map(jax.checkpoint(model.features_of_input), parts)
            features = features.reshape(-1, *features.shape[2:])
        statistics = model.spec.statistics_of(features, axis_name=parallel.AXIS)
        logits = apply_head(model.head, statistics, features)
        seen = margin.apply(model, logits, labels)
        value = jnp.mean(cross_entropy(seen, labels, label_smoothing=label_smoothing))
        accuracy = jnp.mean(jnp.argmax(logits, axis=1) == labels)
        return Loss(value, {"loss": value, "accuracy": accuracy}, statistics)

    def measure(model):
        images, labels, _ = data.held_out("validation", num)
        return measure_classes(model, images, labels, batch_size, margin)

    return Objective(loss, "accuracy", measure)
