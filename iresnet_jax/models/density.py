"""A density model: data, made continuous, through a residual flow into a simple prior; and everything asked of it.

    log p(x) = log p_Z(F(t(x))) + log|det dF| + log|det dt|          (change of variables; Behrmann et al. 2019, eq. 3)

``t`` maps pixels to where the flow starts: centred, through a logit, or through the histogram of the training data and a
logit. All functions are pure; weights are those of `model.constrain`.

With a prior for every class the model is one of images and labels, which classifies by Bayes' rule (Izmailov et al. 2020):

    p_Z(z) = sum_y p(y) p_Z(z | y),    p(y | x) = p(y) p_Z(F(t(x)) | y) / p_Z(F(t(x)))

as the determinants are the same for all classes.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, Num

from iresnet_jax.bijections import bijection as bijections
from iresnet_jax.bijections import equalize as histogram
from iresnet_jax.bijections import likelihood
from iresnet_jax.maths.inverse.fixed_point import FixedPointInfo
from iresnet_jax.maths.lipschitz import BiLipschitz, model_bounds
from iresnet_jax.maths.logdet.estimator import LogdetEstimator, LogdetInfo
from iresnet_jax.maths.logdet.exact import ExactLogdet
from iresnet_jax.models import flow as model

TRANSFORMS = ("center", "logit", "equalize", "none")
PRIORS = {
    "gaussian": (likelihood.GaussianPrior, likelihood.gaussian_log_prob, likelihood.gaussian_sample),
    "logistic": (likelihood.LogisticPrior, likelihood.logistic_log_prob, likelihood.logistic_sample),
}


class LogProb(NamedTuple):
    """A log-likelihood and its terms, in nats, one an example.

    Attributes:
        log_prob: Log density of the continuous data.
        log_prior: Of the latents.
        log_det: Of the flow.
        log_det_transform: Of the preprocessing.
        info: What is known about the error of ``log_det``.
        log_prior_by_class: See `log_prior_by_class`; None without classes.
    """

    log_prob: Float[Array, " b"]
    log_prior: Float[Array, " b"]
    log_det: Float[Array, " b"]
    log_det_transform: Float[Array, " b"]
    info: LogdetInfo
    log_prior_by_class: Float[Array, "b k"] | None = None


@dataclass(frozen=True)
class DensitySpec:
    """The model without its weights.

    Attributes:
        flow: The flow's architecture.
        prior: "gaussian" or "logistic".
        transform: "center", "logit", "equalize" (see `histogram`; a logit follows), or "none".
        alpha: Of the logit, keeps it finite.
        num_levels: Grey levels of the data; None for continuous data.
        frequencies: Of the grey levels in the training data, for "equalize".
        shares: Of the commonest of them, one for each entry of an example in their order; None takes the same for all.
        num_classes: Classes that have a prior each, at least 2; None for one prior of all.
    """

    flow: model.FlowSpec
    prior: str = "gaussian"
    transform: str = "center"
    alpha: float = 0.05
    num_levels: int | None = 256
    frequencies: tuple[float, ...] | None = None
    shares: tuple[float, ...] | None = None
    num_classes: int | None = None

    def __post_init__(self):
        if self.num_classes is not None and self.num_classes < 2:
            raise ValueError(f"num_classes must be at least 2, got {self.num_classes}: the data set needs labels")
        if self.prior not in PRIORS:
            raise ValueError(f"prior must be one of {', '.join(PRIORS)}, got {self.prior!r}")
        if self.transform not in TRANSFORMS:
            raise ValueError(f"preprocessing.transform must be one of {', '.join(TRANSFORMS)}, got {self.transform!r}")
        if self.transform == "logit" and self.num_levels is None:
            raise ValueError(
                "preprocessing.transform logit is for data with grey levels, which points have not: set it to none"
            )
        if self.transform == "equalize" and (self.num_levels is None or len(self.frequencies or ()) != self.num_levels):
            raise ValueError(
                f"preprocessing.transform equalize needs data with grey levels and the frequency of each: "
                f"got {self.num_levels} levels and {len(self.frequencies or ())} frequencies"
            )
        if self.shares is not None and len(self.shares) != math.prod(self.flow.event_shape):
            raise ValueError(f"there must be a share for each entry of {self.flow.event_shape}, got {len(self.shares)}")


def to_continuous(spec: DensitySpec, key: Key[Array, "..."], x: Num[Array, "b ..."]) -> Float[Array, "b ..."]:
    """Data as points of [0, 1): uniform noise fills each grey level; continuous data is left alone."""
    if spec.num_levels is None:
        return x
    return likelihood.dequantize(key, x, spec.num_levels)


def cell_centers(spec: DensitySpec, x: Num[Array, "b ..."]) -> Float[Array, "b ..."]:
    """Data as points of [0, 1) without noise, for what should not depend on it: each grey level at the middle of its cell."""
    return x if spec.num_levels is None else (x.astype(jnp.result_type(float)) + 0.5) / spec.num_levels


def transform(spec: DensitySpec, x: Float[Array, "b ..."]) -> tuple[Float[Array, "b ..."], Float[Array, " b"]]:
    """``t(x)`` and its log-determinant."""
    if spec.transform == "center":
        return likelihood.center_forward_and_logdet(x)
    if spec.transform == "logit":
        return likelihood.logit_forward_and_logdet(x, spec.alpha)
    if spec.transform == "equalize":
        u, logdet = histogram.equalize_forward_and_logdet(x, *_histogram(spec))
        y, logdet_logit = likelihood.logit_forward_and_logdet(u, spec.alpha)
        return y, logdet + logdet_logit
    return x, jnp.zeros(x.shape[0], x.dtype)


def transform_bounds(spec: DensitySpec) -> BiLipschitz:
    """Bounds of ``Lip(t)`` and ``Lip(t^-1)`` on [0, 1].

    The logit's slope ``(1 - 2 alpha) / (s (1 - s))`` with ``s`` in ``[alpha, 1 - alpha]`` lies between its values at the middle
    and at the ends, and the histogram's between those of its cells; the others shift at most.
    """
    if spec.transform not in ("logit", "equalize"):
        return model_bounds([])
    slope = 1 - 2 * spec.alpha
    scales = [jnp.log(jnp.array([slope / (spec.alpha * (1 - spec.alpha)), 4 * slope]))]
    if spec.transform == "equalize":
        scales.append(jnp.log(jnp.array(histogram.all_slopes(*_histogram(spec)))))
    return model_bounds([], scales)


def untransform(spec: DensitySpec, y: Float[Array, "b ..."]) -> Float[Array, "b ..."]:
    """``t^-1(y)``."""
    if spec.transform == "center":
        return likelihood.center_inverse_and_logdet(y)[0]
    if spec.transform == "logit":
        return likelihood.logit_inverse_and_logdet(y, spec.alpha)[0]
    if spec.transform == "equalize":
        u, _ = likelihood.logit_inverse_and_logdet(y, spec.alpha)
        return histogram.equalize_inverse_and_logdet(u, *_histogram(spec))[0]
    return y


def _histogram(spec: DensitySpec) -> tuple[tuple[float, ...], np.ndarray | None]:
    assert spec.frequencies is not None  # DensitySpec has checked it
    shares = None if spec.shares is None else np.reshape(spec.shares, spec.flow.event_shape)
    return spec.frequencies, shares


def log_prob(
    spec: DensitySpec,
    weights: Any,
    prior: Any,
    x: Float[Array, "b ..."],
    key: Key[Array, "..."],
    estimator: LogdetEstimator = ExactLogdet(),  # noqa: B008 (immutable)
    *,
    context: Float[Array, "b k"] | None = None,
    unroll: bool = False,
    rematerialize: bool = False,
) -> LogProb:
    """The log-likelihood of continuous data.

    Args:
        spec: The model.
        weights: The flow's constrained weights.
        prior: The prior's parameters.
        x: Continuous data, from `to_continuous`.
        key: For the probes; one, or one an example.
        estimator: Log-determinant of the blocks.
        context: The examples' contexts: then this is ``log p(x | context)``.
        unroll: See `model.bijection`.
        rematerialize: See `model.bijection`.
    """
    y, log_det_transform = transform(spec, x)
    bijection = model.bijection(spec.flow, weights, estimator, context=context, unroll=unroll, rematerialize=rematerialize)
    z, log_det, info = bijection.forward_and_logdet(y, key)
    if spec.num_classes is None:
        parameters, log_density, _ = PRIORS[spec.prior]
        by_class, log_prior = None, log_density(parameters(**prior), z)
    else:
        by_class = log_prior_by_class(spec, prior, z)
        log_prior = jax.nn.logsumexp(by_class, axis=1)
    return LogProb(log_prior + log_det + log_det_transform, log_prior, log_det, log_det_transform, info, by_class)


def log_prior_by_class(spec: DensitySpec, prior: Any, z: Float[Array, "b d"]) -> Float[Array, "b k"]:
    """``log p(y) + log p_Z(z | y)`` for every class ``y``: logits of the classes, whose log-sum-exp is the prior.

    Args:
        spec: The model, with classes.
        prior: The prior's parameters, one row a class, and ``class_logits`` of ``p(y)``.
        z: Latents.

    Raises:
        ValueError: If the model has one prior for all.
    """
    check_classes(spec)
    _, log_density, _ = PRIORS[spec.prior]
    of_classes = jax.vmap(lambda component: log_density(component, z), out_axes=1)(_components(spec, prior))
    return of_classes + jax.nn.log_softmax(prior["class_logits"])[None]


def class_log_probs(
    spec: DensitySpec,
    weights: Any,
    prior: Any,
    x: Float[Array, "b ..."],
    *,
    unroll: bool = False,
    rematerialize: bool = False,
) -> Float[Array, "b k"]:
    """``log p(y | x)`` for every class ``y`` by Bayes' rule: one pass through the flow, no determinants.

    Args:
        spec: The model, with classes.
        weights: The flow's constrained weights.
        prior: The prior's parameters.
        x: Continuous data, from `to_continuous` or `cell_centers`.
        unroll: See `model.bijection`.
        rematerialize: See `model.bijection`.

    Raises:
        ValueError: If the model has one prior for all.
    """
    check_classes(spec)
    z = encode(spec, weights, x, unroll=unroll, rematerialize=rematerialize)
    return jax.nn.log_softmax(log_prior_by_class(spec, prior, z))


def check_classes(spec: DensitySpec) -> None:
    """Raises ``ValueError`` in one sentence unless every class has its own prior."""
    if spec.num_classes is None:
        raise ValueError("this density has one prior for all: classes take images with labels and objective = hybrid")


def _components(spec: DensitySpec, prior: Mapping[str, Array]) -> Any:
    """The parameters of the classes' priors, stacked."""
    parameters, _, _ = PRIORS[spec.prior]
    return parameters(**{name: prior[name] for name in parameters._fields})


def objective(spec: DensitySpec, log_prob: Float[Array, " b"]) -> Float[Array, " b"]:
    """What is minimised and reported: bits/dim of images, nats of continuous data."""
    if spec.num_levels is None:
        return -log_prob
    return likelihood.bits_per_dim(log_prob, spec.flow.num_dims, spec.num_levels)


def objective_scale(spec: DensitySpec) -> float:
    """The size in the objective's unit of one nat of log-likelihood."""
    return 1.0 if spec.num_levels is None else 1.0 / (spec.flow.num_dims * math.log(2))


def objective_name(spec: DensitySpec) -> str:
    """The objective's name in logs: ``bits_per_dim`` or ``nll``."""
    return "nll" if spec.num_levels is None else "bits_per_dim"


def encode(
    spec: DensitySpec,
    weights: Any,
    x: Float[Array, "b ..."],
    *,
    context: Float[Array, "b k"] | None = None,
    unroll: bool = False,
    rematerialize: bool = False,
) -> Float[Array, "b d"]:
    """The latents of continuous data."""
    bijection = model.bijection(spec.flow, weights, context=context, unroll=unroll, rematerialize=rematerialize)
    return bijection.forward(transform(spec, x)[0])


def decode(
    spec: DensitySpec,
    weights: Any,
    z: Float[Array, "b d"],
    solver: bijections.Solver = bijections.Solver(),  # noqa: B008 (immutable)
    *,
    context: Float[Array, "b k"] | None = None,
    unroll: bool = False,
) -> tuple[Float[Array, "b ..."], FixedPointInfo]:
    """Continuous data of latents, and how the inverse ended; its error bound is that of the flow, before ``t^-1``."""
    y, info = model.bijection(spec.flow, weights, solver=solver, context=context, unroll=unroll).inverse(z)
    return untransform(spec, y), info


def sample(
    spec: DensitySpec,
    weights: Any,
    prior: Any,
    key: Key[Array, ""],
    num: int,
    *,
    temperature: float = 1.0,
    solver: bijections.Solver = bijections.Solver(),  # noqa: B008 (immutable)
    context: Float[Array, "n k"] | None = None,
    labels: Int[Array, " n"] | None = None,
    unroll: bool = False,
) -> tuple[Float[Array, "n ..."], FixedPointInfo]:
    """Samples: latents from the prior through the inverse.

    Args:
        spec: The model.
        weights: The flow's constrained weights.
        prior: The prior's parameters.
        key: Of the latents.
        num: Samples.
        temperature: Factor on the prior's scale; 1 samples the model.
        solver: Of the inverse.
        context: One a sample.
        labels: A class for each sample, where classes have priors; drawn from ``p(y)`` by default. Others than there are, which
            cannot be refused under ``jit``, give NaN, and an inverse that did not converge.
        unroll: See `model.bijection`.

    Returns:
        Continuous data, and how the inverse ended.

    Raises:
        ValueError: If there are labels and no priors of their own, they are no integers or not as many as samples, or another
            number is out of range.
    """
    z = _sample_prior(spec, prior, key, num, temperature, labels)
    return decode(spec, weights, z, solver, context=context, unroll=unroll)


def _sample_prior(spec, prior, key, num, temperature, labels):
    parameters, _, draw = PRIORS[spec.prior]
    if spec.num_classes is None:
        if labels is not None:
            check_classes(spec)
        return draw(parameters(**prior), key, num, temperature)
    if num < 1:
        raise ValueError(f"the number of samples must be at least 1, got {num}")
    key_label, key_noise = jax.random.split(key)
    drawn = jax.random.categorical(key_label, prior["class_logits"], shape=(num,))
    labels = drawn if labels is None else jnp.asarray(labels)
    if labels.shape != (num,) or not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(f"labels must be {num} integers, one a sample, got {labels.dtype} of shape {labels.shape}")
    components = jax.tree.map(lambda stacked: stacked[labels], _components(spec, prior))
    one = jax.vmap(lambda component, key: draw(component, key, 1, temperature)[0])
    known = (labels >= 0) & (labels < spec.num_classes)
    return jnp.where(known[:, None], one(components, jax.random.split(key_noise, num)), jnp.nan)
