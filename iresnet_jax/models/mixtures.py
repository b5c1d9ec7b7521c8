r"""Mixtures of normal distributions with full covariances, as priors of latents of vectors.

    p(z) = sum_k w_k N(z; mean_k, (W_k^T W_k)^-1)

The factor ``W_k`` of the precision is lower triangular, the inverse of the covariance's Cholesky factor, so that a density is a
product and not a solve. All parameters are free numbers, which training changes like any others:

    mean          (k, d)      the means
    log_diagonal  (k, d)      logarithms of the diagonals of W_k
    lower         (k, d, d)   what W_k has below its diagonal; entries on and above the diagonals count as nothing
    logits        (k,)        w_k = softmax(logits)_k

A component whose logit is `ABSENT` is no part of the mixture: its weight and its gradients are 0.
Mixtures of different sizes thereby run one compiled program.
"""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key
from numpy.typing import ArrayLike

from iresnet_jax.maths.platforms import floats

ABSENT = -(2.0**100)  # finite, as averages of parameters and files want it

Parameters = Mapping[str, Float[Array, "..."]]


def log_prob(params: Parameters, z: Float[Array, "b d"]) -> Float[Array, " b"]:
    """Log-density of the mixture; natural log, exact.

    Raises:
        ValueError: If the mixture and ``z`` differ in their number of dimensions.
    """
    mean, log_diagonal = params["mean"], params["log_diagonal"]
    if mean.shape[1:] != z.shape[1:]:
        raise ValueError(f"the mixture is one of {mean.shape[1]} dimensions, got z of shape {z.shape}")
    logits = _logits(params)
    t = jnp.einsum("kij,bkj->bki", _factors(params), z[:, None] - mean[None])
    of_components = logits[None] + jnp.sum(log_diagonal, axis=1)[None] - 0.5 * jnp.sum(jnp.square(t), axis=2)
    total = jax.nn.logsumexp(of_components, axis=1) - jax.nn.logsumexp(logits)
    return total - 0.5 * mean.shape[1] * math.log(2 * math.pi)


def sample(params: Parameters, key: Key[Array, ""], n: int, temperature: float = 1.0) -> Float[Array, "{n} d"]:
    """Draws ``mean_k + temperature * W_k^-1 e`` with ``k`` from the weights and ``e`` standard normal."""
    mean = params["mean"]
    key_label, key_noise = jax.random.split(key)
    labels = jax.random.categorical(key_label, _logits(params), shape=(n,))
    noise = jax.random.normal(key_noise, (n, mean.shape[1]), mean.dtype)
    identity = jnp.eye(mean.shape[1], dtype=mean.dtype)
    # One after the other: batches of LAPACK's functions can dead-lock, see `platforms.one_at_a_time`.
    scales = jax.lax.map(lambda factor: jax.scipy.linalg.solve_triangular(factor, identity, lower=True), _factors(params))

    def with_component(drawn, component):  # one component at a time: (n, d, d) would be large
        k, mean, scale = component
        return jnp.where((labels == k)[:, None], mean[None] + temperature * noise @ scale.T, drawn), None

    return jax.lax.scan(with_component, jnp.zeros_like(noise), (jnp.arange(len(mean)), mean, scales))[0]


def standard(num_dims: int, num_components: int) -> dict[str, Array]:
    """Parameters of components that are all standard normal and equally likely; training would not tell them apart."""
    zeros = floats(np.zeros((num_components, num_dims)))
    return {
        "mean": zeros,
        "log_diagonal": zeros,
        "lower": floats(np.zeros((num_components, num_dims, num_dims))),
        "logits": floats(np.zeros(num_components)),
    }


def mixture_of(
    means: ArrayLike,
    covariances: ArrayLike,
    weights: ArrayLike,
    num_components: int | None = None,
) -> dict[str, Array]:
    """Parameters of the mixture with these components.

    Args:
        means: Means of the components, ``(k, d)``.
        covariances: Their covariances, ``(k, d, d)``.
        weights: Their weights ``(k,)``, at least 0, up to a common factor; a component without weight is absent.
        num_components: Components of the result, filled up by absent ones; by default as many as are given.

    Raises:
        ValueError: If a covariance is not positive definite, weights are negative or all 0, or there are too many components.

    Example:
        >>> params = mixture_of([[0.0], [5.0]], [[[1.0]], [[0.25]]], [0.3, 0.7], num_components=4)
        >>> params["logits"].shape
        (4,)
    """
    means, covariances, weights = (np.asarray(given, np.float64) for given in (means, covariances, weights))
    if not (np.all(weights >= 0) and 0 < np.sum(weights) < np.inf):
        raise ValueError(f"weights of a mixture must be at least 0, and one of them positive, got {weights}")
    spare = 0 if num_components is None else num_components - len(means)
    if spare < 0:
        raise ValueError(f"the mixture has {len(means)} components, and {num_components} are allowed")
    try:
        factors = np.linalg.inv(np.linalg.cholesky(covariances))
    except np.linalg.LinAlgError:
        raise ValueError("covariances of a mixture must be positive definite: add a small multiple of the identity") from None
    with np.errstate(divide="ignore"):  # of weights that are 0
        logits = np.maximum(np.log(weights / np.sum(weights)), ABSENT)
    parts = {
        "mean": means,
        "log_diagonal": np.log(np.diagonal(factors, axis1=1, axis2=2)),
        "lower": np.tril(factors, -1),
        "logits": logits,
    }
    padded = {
        name: np.pad(part, [(0, spare)] + [(0, 0)] * (part.ndim - 1), constant_values=ABSENT if name == "logits" else 0)
        for name, part in parts.items()
    }
    return {name: floats(part) for name, part in padded.items()}


def _logits(params: Parameters) -> Float[Array, " k"]:
    """Logits of the components, ``-inf`` for those that are absent."""
    return jnp.where(params["logits"] > ABSENT, params["logits"], -jnp.inf)


def _factors(params: Parameters) -> Float[Array, "k d d"]:
    """The factors ``W`` of the precisions."""
    return jnp.tril(params["lower"], -1) + jax.vmap(jnp.diag)(jnp.exp(params["log_diagonal"]))
