r"""Mixtures of scales, as priors of latents: one normal distribution at several sizes.

    p(z) = sum_k w_k N(z; mean, s_k^2 diag(std^2))

Examples whose sizes differ by orders of magnitude, as patches of images do in contrast, are likely under it before a flow has
learnt anything (scale mixtures of Gaussians: Wainwright and Simoncelli, 2000). A contraction would have to learn the sizes, and
independent entries with heavy tails have other level sets. All parameters are free numbers, which training changes:

    mean, log_std         (d,)
    log_scales, logits    (k,)   s_k = exp(log_scales)_k and w_k = softmax(logits)_k
"""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from iresnet_jax.maths.platforms import floats

STEPS = 30  # of expectation maximisation
SMALLEST = 1e-6  # of the scales and weights that it gives, and of the standard deviation of an entry

Parameters = Mapping[str, Float[Array, "..."]]


def log_prob(params: Parameters, z: Float[Array, "b d"]) -> Float[Array, " b"]:
    r"""Log-density; natural log, exact.

    With ``t = (z - mean) / std`` it is ``log sum_k w_k s_k^-d exp(-|t|^2 / (2 s_k^2)) - sum log std - d log(2 pi) / 2``.

    Raises:
        ValueError: If the prior and ``z`` differ in their number of dimensions.
    """
    mean, log_std, log_scales = params["mean"], params["log_std"], params["log_scales"]
    if mean.shape != z.shape[1:]:
        raise ValueError(f"the mixture of scales is one of {len(mean)} dimensions, got z of shape {z.shape}")
    square = jnp.sum(jnp.square((z - mean[None]) * jnp.exp(-log_std[None])), axis=1, keepdims=True)
    constants = jax.nn.log_softmax(params["logits"]) - len(mean) * log_scales
    of_scales = constants[None] - 0.5 * square * jnp.exp(-2 * log_scales[None])
    return jax.nn.logsumexp(of_scales, axis=1) - jnp.sum(log_std) - 0.5 * len(mean) * math.log(2 * math.pi)


def sample(params: Parameters, key: Key[Array, ""], n: int, temperature: float = 1.0) -> Float[Array, "{n} d"]:
    """Draws ``mean + temperature * s_k * std * e`` with ``k`` from the weights and ``e`` standard normal."""
    mean, std = params["mean"], jnp.exp(params["log_std"])
    key_scale, key_noise = jax.random.split(key)
    scales = jnp.exp(params["log_scales"])[jax.random.categorical(key_scale, params["logits"], shape=(n,))]
    return mean[None] + temperature * scales[:, None] * std[None] * jax.random.normal(key_noise, (n, len(mean)), mean.dtype)


def standard(num_dims: int, num_components: int) -> dict[str, Array]:
    """Parameters of so many scales that are all 1: a standard normal distribution, which training would leave one."""
    entries, scales = floats(np.zeros(num_dims)), floats(np.zeros(num_components))
    return {"mean": entries, "log_std": entries, "log_scales": scales, "logits": scales}


def fitted(z: Float[np.ndarray, "n d"], num_components: int) -> dict[str, Array]:
    """Parameters that latents are likely under, by expectation maximisation from the quantiles of ``|t|`` in float64.

    Args:
        z: Latents, as many as 10,000 of which take a second of one core or less.
        num_components: Number of scales.
    """
    z = np.asarray(z, np.float64)
    num, num_dims = z.shape
    mean, std = z.mean(axis=0), np.maximum(z.std(axis=0), SMALLEST)
    square = np.square((z - mean) / std).sum(axis=1)
    variances = np.quantile(square / num_dims, (np.arange(num_components) + 0.5) / num_components)
    weights = np.full(num_components, 1 / num_components)
    for _ in range(STEPS):
        variances = np.maximum(variances, SMALLEST**2)
        log_shares = np.log(weights) - 0.5 * num_dims * np.log(variances) - 0.5 * square[:, None] / variances
        shares = np.exp(log_shares - log_shares.max(axis=1, keepdims=True))
        shares /= shares.sum(axis=1, keepdims=True)
        counts = shares.sum(axis=0) + SMALLEST
        variances, weights = square @ shares / (num_dims * counts), counts / counts.sum()
        precisions = shares @ (1 / np.maximum(variances, SMALLEST**2))  # expected, of each example
        mean = precisions @ z / precisions.sum()
        std = np.maximum(np.sqrt(precisions @ np.square(z - mean) / num), SMALLEST)
        square = np.square((z - mean) / std).sum(axis=1)
    variances = np.maximum(variances, SMALLEST**2)
    found = {"mean": mean, "log_std": np.log(std), "log_scales": 0.5 * np.log(variances), "logits": np.log(weights)}
    return {name: floats(part) for name, part in found.items()}
