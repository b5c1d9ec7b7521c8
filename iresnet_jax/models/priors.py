"""Priors of latents: independent normal or logistic distributions with learned means and scales, or a mixture of normals.

A prior is its name and its parameters, ``{"mean", "log_std"}`` of "gaussian" or ``{"mean", "log_scale"}`` of "logistic", one
each a dimension; those of "mixture" are in `mixtures`.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from iresnet_jax.bijections.transforms.logit import log_logistic
from iresnet_jax.maths.enclosures.ball_arithmetic import LOG_2PI, Ball, exp, joined, log_sum_exp, softplus
from iresnet_jax.models import mixtures
from iresnet_jax.models.mixtures import Parameters

SMALLEST_VARIANCE = 1e-4  # of latents within classes, whose whole variance is about 1 or more


class _Family(NamedTuple):
    """A location-scale family: the name of its scale; what its standard member has.

    Attributes:
        log_scale: Name of the logarithm of the scale among the parameters.
        log_density: Log-density of the standard member.
        enclosure: The same of balls, with guaranteed errors.
        draw: Draws of the standard member.
        std: Standard deviation of the standard member.
    """

    log_scale: str
    log_density: Callable[[Array], Array]
    enclosure: Callable[[Ball], Ball]
    draw: Callable[..., Array]
    std: float


PRIORS = {
    "gaussian": _Family(
        "log_std",
        lambda t: -0.5 * jnp.square(t) - 0.5 * math.log(2 * math.pi),
        lambda t: -(t * t + LOG_2PI) * Ball.of(0.5),
        jax.random.normal,
        1.0,
    ),
    "logistic": _Family(
        "log_scale",
        log_logistic,
        lambda t: -(softplus(t) + softplus(-t)),
        jax.random.logistic,
        math.pi / math.sqrt(3),
    ),
}
MIXTURE = "mixture"
KINDS = (*PRIORS, MIXTURE)


def log_prob(kind: str, params: Parameters, z: Float[Array, "b d"]) -> Float[Array, " b"]:
    r"""Log-density ``sum (log p(t) - log_scale)``, ``t = (z - mean) / scale``; natural log, exact.

    ``log p(t)`` is ``-t^2 / 2 - log(2 pi) / 2`` ("gaussian") or ``log sigmoid(t) + log sigmoid(-t)`` ("logistic", whose
    standard deviation is ``pi / sqrt(3)`` times its scale and whose tails are linear in ``|t|``). A "mixture" has the
    log-density of `mixtures.log_prob`.

    Args:
        kind: "gaussian", "logistic" or "mixture".
        params: Parameters of the prior.
        z: One row an example.

    Raises:
        ValueError: If the prior is unknown, or ``params`` and ``z`` differ in their number of dimensions.

    Example:
        >>> log_prob("gaussian", standard("gaussian", 48), z)
    """
    if kind == MIXTURE:
        return mixtures.log_prob(params, z)
    family = _family(kind)
    mean, log_scale = params["mean"], params[family.log_scale]
    if mean.shape != z.shape[1:] or log_scale.shape != z.shape[1:]:
        raise ValueError(
            f"the prior must have parameters of shape {z.shape[1:]} for z of shape {z.shape}, got {mean.shape} and "
            f"{log_scale.shape}: give every dimension its own"
        )
    t = (z - mean[None]) * jnp.exp(-log_scale[None])
    return jnp.sum(family.log_density(t) - log_scale[None], axis=1)


def enclose_log_prob(kind: str, params: Mapping[str, Any], z: Ball) -> Ball:
    """`log_prob` with guaranteed errors: balls for latents in balls; parameters count as the numbers that they are.

    Args:
        kind: "gaussian", "logistic" or "mixture".
        params: Parameters of the prior; with ``class_logits`` those of the classes' priors, whose mixture it is.
        z: Latents ``(b, d)``.

    Raises:
        ValueError: If the prior is unknown.
    """
    if kind == MIXTURE:
        return mixtures.enclose_log_prob(params, z)
    family = _family(kind)
    own = {name: Ball.of(np.asarray(values, np.float64)) for name, values in params.items()}

    def of_class(mean, log_scale):
        return (family.enclosure((z - mean) * exp(-log_scale)) - log_scale).sum()

    if "class_logits" not in own:
        return of_class(own["mean"], own[family.log_scale])
    logits, classes = own["class_logits"], []
    for i in range(len(logits.radius)):
        mean, log_scale, logit = (part.map(lambda a, i=i: a[i]) for part in (own["mean"], own[family.log_scale], logits))
        classes.append(of_class(mean, log_scale) + logit)
    return log_sum_exp(joined(functools.partial(np.stack, axis=-1), classes)) - log_sum_exp(logits)


def sample(kind: str, params: Parameters, key: Key[Array, ""], n: int, temperature: float = 1.0) -> Float[Array, "{n} d"]:
    """Draws ``mean + temperature * scale * e`` with ``e`` from the standard member, of one component of a mixture.

    Args:
        kind: "gaussian", "logistic" or "mixture".
        params: Parameters of the prior.
        key: One typed key.
        n: Number of samples, at least 1.
        temperature: Factor on the scale, at least 0, where every sample is a mean. 1 samples the prior.

    Raises:
        ValueError: If the prior is unknown, or ``n`` or ``temperature`` is out of range.

    Example:
        >>> z = sample("logistic", standard("logistic", 48), jax.random.key(0), 64, temperature=0.7)
    """
    if n < 1 or not temperature >= 0:
        raise ValueError(
            f"n must be at least 1 and temperature at least 0, got {n} and {temperature}: "
            "a temperature below 1 concentrates the samples, 0 gives the mean"
        )
    if kind == MIXTURE:
        return mixtures.sample(params, key, n, temperature)
    family = _family(kind)
    mean, log_scale = params["mean"], params[family.log_scale]
    return mean[None] + temperature * jnp.exp(log_scale[None]) * family.draw(key, (n, *mean.shape), mean.dtype)


def standard(kind: str, num_dims: int, num_classes: int | None = None, num_components: int | None = None) -> dict[str, Array]:
    """Parameters of the standard member; with classes one for each, and ``class_logits`` of classes that are equally likely.

    Those of a mixture are of ``num_components`` components, all of which are standard normal.

    Raises:
        ValueError: If the prior is unknown.
    """
    if kind == MIXTURE and num_components is not None:
        return mixtures.standard(num_dims, num_components)
    zeros = jnp.zeros(num_dims if num_classes is None else (num_classes, num_dims))
    classes = {} if num_classes is None else {"class_logits": jnp.zeros(num_classes)}
    return {"mean": zeros, _family(kind).log_scale: zeros, **classes}


def of_classes(kind: str, z: Float[np.ndarray, "n d"], labels: Int[np.ndarray, " n"], num_classes: int) -> dict[str, Array]:
    """Parameters of priors of classes from the moments of their latents.

    All classes share the variance within classes, as in linear discriminant analysis: one for each, of few examples, makes
    posteriors overconfident. A class without examples has the mean of all. Frequencies count one more example a class.

    Args:
        kind: "gaussian" or "logistic".
        z: Latents.
        labels: Class of each, from 0 to ``num_classes - 1``.
        num_classes: Number of classes.

    Raises:
        ValueError: If the prior is unknown.
    """
    z = np.asarray(z, np.float64)
    counts = np.bincount(labels, minlength=num_classes)
    mean = np.stack([z[labels == label].mean(axis=0) if counts[label] else z.mean(axis=0) for label in range(num_classes)])
    within = np.square(z - mean[labels]).mean(axis=0)
    log_std = np.tile(0.5 * np.log(np.maximum(within, SMALLEST_VARIANCE)), (num_classes, 1))
    family = _family(kind)
    return {
        "mean": jnp.asarray(mean, jnp.float32),
        family.log_scale: jnp.asarray(log_std - math.log(family.std), jnp.float32),
        "class_logits": jnp.asarray(np.log((counts + 1) / (counts.sum() + num_classes)), jnp.float32),
    }


def _family(kind: str) -> _Family:
    if kind not in PRIORS:
        raise ValueError(
            f"prior must be one of {', '.join(KINDS)}, got {kind!r}; a mixture needs num_components and takes no classes"
        )
    return PRIORS[kind]
