"""Priors of latents: independent normal or logistic distributions with learned means and scales, or mixtures of normals.

A prior is its name and its parameters, ``{"mean", "log_std"}`` of "gaussian" or ``{"mean", "log_scale"}`` of "logistic", one
each a dimension; those of "mixture" are in `mixtures`, and those of "scales" in `scales`. A prior of one's own has the name
"own" and is its own parameters: any pytree with ``log_prob(z) -> (b,)`` and ``sample(key, (n,)) -> (n, d)``, as distributions
of NumPyro and flowjax are.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from iresnet_jax.bijections.logit import log_logistic
from iresnet_jax.branches.own import Structure
from iresnet_jax.maths.platforms import floats
from iresnet_jax.models import mixtures, scales
from iresnet_jax.models.marginals import Marginals

SMALLEST_VARIANCE = 1e-4  # of latents within classes, whose whole variance is about 1 or more


class _Family(NamedTuple):
    """A location-scale family: the name of its scale; what its standard member has.

    Attributes:
        log_scale: Name of the logarithm of the scale among the parameters.
        log_density: Log-density of the standard member.
        draw: Draws of the standard member.
        std: Standard deviation of the standard member.
    """

    log_scale: str
    log_density: Callable[[Array], Array]
    draw: Callable[..., Array]
    std: float


PRIORS = {
    "gaussian": _Family(
        "log_std",
        lambda t: -0.5 * jnp.square(t) - 0.5 * math.log(2 * math.pi),
        jax.random.normal,
        1.0,
    ),
    "logistic": _Family(
        "log_scale",
        log_logistic,
        jax.random.logistic,
        math.pi / math.sqrt(3),
    ),
}
MIXTURE, SCALES = "mixture", "scales"
MIXTURES = {MIXTURE: mixtures, SCALES: scales}  # of a number of components
OWN = "own"
KINDS = (*PRIORS, *MIXTURES, OWN)


@jax.tree_util.register_pytree_with_keys_class
class OwnPrior:
    """A prior of one's own with its arrays of JAX apart from everything else, which is constant.

    Attributes:
        weights: Its arrays of floats, which are trained.
        structure: What is not.
    """

    def __init__(self, weights: Mapping[str, Any], structure: Structure):
        self.weights, self.structure = weights, structure

    @property
    def module(self) -> Any:
        """The prior as it was given, with the weights of now."""
        return self.structure.join(self.weights)

    def log_prob(self, z: Float[Array, "b d"]) -> Array:
        """Log-density, as the prior says it."""
        return self.module.log_prob(z)

    def sample(self, key: Key[Array, ""], shape: tuple[int, ...]) -> Array:
        """Draws, as the prior makes them."""
        return self.module.sample(key, shape)

    def tree_flatten_with_keys(self) -> Any:
        """The weights by their names."""
        names = sorted(self.weights)
        return [(jax.tree_util.DictKey(name), self.weights[name]) for name in names], (tuple(names), self.structure)

    @classmethod
    def tree_unflatten(cls, names_and_structure: Any, leaves: Any) -> "OwnPrior":
        """The prior of weights."""
        names, structure = names_and_structure
        return cls(dict(zip(names, leaves, strict=True)), structure)


def own(prior: Any) -> Any:
    """A prior of one's own as a pytree of arrays of floats: itself, or an `OwnPrior` if it has other leaves.

    As in branches of one's own, arrays of JAX are trained; arrays of NumPy, numbers and functions are constants.

    Raises:
        ValueError: If it has not the methods of a prior.
    """
    _check_own(prior)
    if isinstance(prior, Marginals):  # which has no constants
        prior = jax.tree.map(jnp.asarray, prior)
    structure, weights = Structure.of(prior)
    return prior if all(structure.names) else OwnPrior(weights, structure)


def _check_own(prior: Any) -> None:
    if not all(callable(getattr(prior, name, None)) for name in ("log_prob", "sample")):
        raise ValueError(
            "a prior of one's own has the methods log_prob(z) and sample(key, (n,)), got a "
            f"{type(prior).__name__}: give Density one, or another prior_family than 'own'"
        )


def log_prob(kind: str, params: Any, z: Float[Array, "b d"]) -> Float[Array, " b"]:
    r"""Log-density ``sum (log p(t) - log_scale)``, ``t = (z - mean) / scale``; natural log, exact.

    ``log p(t)`` is ``-t^2 / 2 - log(2 pi) / 2`` ("gaussian") or ``log sigmoid(t) + log sigmoid(-t)`` ("logistic", whose
    standard deviation is ``pi / sqrt(3)`` times its scale and whose tails are linear in ``|t|``). A "mixture" has the
    log-density of `mixtures.log_prob`, "scales" that of `scales.log_prob`, and one's own what it says.

    Args:
        kind: One of `KINDS`.
        params: Parameters of the prior.
        z: One row an example.

    Raises:
        ValueError: If the prior is unknown, or ``params`` and ``z`` differ in their number of dimensions.

    Example:
        >>> log_prob("gaussian", standard("gaussian", 48), z)
    """
    if kind in MIXTURES:
        return MIXTURES[kind].log_prob(params, z)
    if kind == OWN:
        _check_own(params)
        found = jnp.asarray(params.log_prob(z))
        if found.shape != z.shape[:1]:
            raise ValueError(
                f"log_prob of the prior must give one number for each of {len(z)} latents of {z.shape[1]} dimensions, got "
                f"shape {found.shape}: it is the density of whole vectors, with an event of one axis"
            )
        return found.astype(z.dtype)
    family = _family(kind)
    mean, log_scale = params["mean"], params[family.log_scale]
    if mean.shape != z.shape[1:] or log_scale.shape != z.shape[1:]:
        raise ValueError(
            f"the prior must have parameters of shape {z.shape[1:]} for z of shape {z.shape}, got {mean.shape} and "
            f"{log_scale.shape}: give every dimension its own"
        )
    t = (z - mean[None]) * jnp.exp(-log_scale[None])
    return jnp.sum(family.log_density(t) - log_scale[None], axis=1)


def sample(kind: str, params: Any, key: Key[Array, ""], n: int, temperature: float = 1.0) -> Float[Array, "{n} d"]:
    """Draws ``mean + temperature * scale * e`` with ``e`` from the standard member, of one component of a mixture.

    Args:
        kind: One of `KINDS`.
        params: Parameters of the prior.
        key: One typed key.
        n: Number of samples, at least 1.
        temperature: Factor on the scale, at least 0, where every sample is a mean. 1 samples the prior, and is all that a prior
            of one's own takes.

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
    if kind in MIXTURES:
        return MIXTURES[kind].sample(params, key, n, temperature)
    if kind == OWN:
        _check_own(params)
        if temperature != 1:
            raise ValueError(f"a prior of one's own has no temperature, got {temperature}: leave it at 1")
        drawn = jnp.asarray(params.sample(key, (n,)))
        if drawn.ndim != 2 or len(drawn) != n:
            raise ValueError(f"sample of the prior must give {n} latents as rows, got shape {drawn.shape}")
        return drawn
    family = _family(kind)
    mean, log_scale = params["mean"], params[family.log_scale]
    return mean[None] + temperature * jnp.exp(log_scale[None]) * family.draw(key, (n, *mean.shape), mean.dtype)


def standard(kind: str, num_dims: int, num_classes: int | None = None, num_components: int | None = None) -> dict[str, Array]:
    """Parameters of the standard member; with classes one for each, and ``class_logits`` of classes that are equally likely.

    Those of a mixture and of scales are of ``num_components`` components, all of which are standard normal.

    Raises:
        ValueError: If the prior is unknown.
    """
    if kind == OWN:
        raise ValueError("a prior of one's own has no standard member: give it to the model, as prior=...")
    if kind in MIXTURES and num_classes is None and num_components is not None:
        return MIXTURES[kind].standard(num_dims, num_components)
    zeros = floats(np.zeros(num_dims if num_classes is None else (num_classes, num_dims)))
    classes = {} if num_classes is None else {"class_logits": floats(np.zeros(num_classes))}
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
        "mean": floats(mean),
        family.log_scale: floats(log_std - math.log(family.std)),
        "class_logits": floats(np.log((counts + 1) / (counts.sum() + num_classes))),
    }


def _family(kind: str) -> _Family:
    if kind not in PRIORS:
        raise ValueError(
            f"prior must be one of {', '.join(KINDS)}, got {kind!r}; mixtures need num_components and take no classes"
        )
    return PRIORS[kind]
