r"""Mixtures of scales, as priors of latents: one normal distribution at several sizes.

    p(z) = sum_k w_k N(z; mean, s_k^2 diag(std^2))

Examples whose sizes differ by orders of magnitude, as patches of images do in contrast, are likely under it before a flow has
learnt anything (scale mixtures of Gaussians: Wainwright and Simoncelli, 2000). A contraction would have to learn the sizes, and
independent entries with heavy tails have other level sets.
"""

import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key
from numpy.typing import ArrayLike

from iresnet_jax.checked_dataclasses import pytree
from iresnet_jax.maths.platforms import floats

STEPS = 30  # of expectation maximisation
SMALLEST = 1e-6  # of the scales and weights that it gives, and of the standard deviation of an entry


@pytree(arrays=("mean", "log_std", "log_scales", "logits"))
class ScaleMixture:
    """A normal distribution with independent entries, at several sizes.

    Attributes:
        mean: Mean of each entry, ``(d,)``.
        log_std: Logarithms of their standard deviations, ``(d,)``.
        log_scales: Logarithms of the factors ``s_k`` on all of them, ``(k,)``.
        logits: ``w_k = softmax(logits)_k``.
    """

    scored: ClassVar[tuple[str, ...]] = ("logits",)

    mean: Any
    log_std: Any
    log_scales: Any
    logits: Any

    @classmethod
    def standard(cls, num_dims: int, num_components: int) -> "ScaleMixture":
        """Scales that are all 1: a standard normal distribution, which training would leave one."""
        entries, scales = floats(np.zeros(num_dims)), floats(np.zeros(num_components))
        return cls(entries, entries, scales, scales)

    @classmethod
    def fit(cls, z: ArrayLike, num_components: int) -> "ScaleMixture":
        """Expectation maximisation from the quantiles of ``|t|`` in float64; 10,000 latents take a second or less."""
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
        return cls(floats(mean), floats(np.log(std)), floats(0.5 * np.log(variances)), floats(np.log(weights)))

    @property
    def num_components(self) -> int:
        """Number of components."""
        return len(self.logits)

    def log_prob(self, z: Float[Array, "b d"]) -> Float[Array, " b"]:
        """``log sum_k w_k s_k^-d exp(-|t|^2 / (2 s_k^2)) - sum log std - d log(2 pi) / 2``, ``t = (z - mean) / std``."""
        num_dims = len(self.mean)
        t = (z - self.mean[None]) * jnp.exp(-self.log_std[None])
        square = jnp.sum(jnp.square(t), axis=1, keepdims=True)
        constants = jax.nn.log_softmax(self.logits) - num_dims * self.log_scales
        of_scales = constants[None] - 0.5 * square * jnp.exp(-2 * self.log_scales[None])
        return jax.nn.logsumexp(of_scales, axis=1) - jnp.sum(self.log_std) - 0.5 * num_dims * math.log(2 * math.pi)

    def sample(self, key: Key[Array, ""], shape: tuple[int], temperature: Any = 1.0) -> Float[Array, "n d"]:
        """Draws ``mean + temperature * s_k * std * e`` with ``k`` from the weights and ``e`` standard normal."""
        key_scale, key_noise = jax.random.split(key)
        scales = jnp.exp(self.log_scales)[jax.random.categorical(key_scale, self.logits, shape=shape)]
        noise = jax.random.normal(key_noise, (*shape, len(self.mean)), self.mean.dtype)
        return self.mean[None] + temperature * scales[:, None] * jnp.exp(self.log_std)[None] * noise
