r"""A prior of independent entries, each of which is a mixture of normal distributions in one dimension.

    p(z) = prod_j sum_k w_jk N(z_j; mean_jk, scale_jk^2)

With ``c`` components an entry it has up to ``c^d`` modes, which a mixture of vectors could not list.
"""

import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Key
from numpy.typing import ArrayLike

from iresnet_jax.checked_dataclasses import pytree
from iresnet_jax.maths.platforms import floats

STEPS = 200  # of expectation maximisation
SMALLEST_SCALE = 1e-3  # of a component, in standard deviations of its entry


@pytree(arrays=("mean", "log_scale", "logits"))
class Marginals:
    """Independent entries that are mixtures each; all arrays are of shape ``(d, c)``.

    Attributes:
        mean: Mean of each component of each entry.
        log_scale: Logarithms of their standard deviations.
        logits: Their weights, ``softmax(logits)`` over the components of an entry.
    """

    scored: ClassVar[tuple[str, ...]] = ("logits",)

    mean: Any
    log_scale: Any
    logits: Any

    @classmethod
    def standard(cls, num_dims: int, num_components: int) -> "Marginals":
        """Components that are all standard normal and equally likely."""
        zeros = floats(np.zeros((num_dims, num_components)))
        return cls(zeros, zeros, zeros)

    @classmethod
    def fit(cls, z: ArrayLike, num_components: int) -> "Marginals":
        """Expectation maximisation for each entry by itself, from components at its quantiles."""
        z = np.asarray(z, jnp.result_type(float))
        places = (np.arange(num_components) + 0.5) / num_components
        std = z.std(axis=0)[:, None]
        start = np.quantile(z, places, axis=0).T
        zeros = jnp.zeros(start.shape)
        return _maximise(cls(jnp.asarray(start, z.dtype), zeros + np.log(std / num_components + 1e-12), zeros), z)

    @property
    def num_components(self) -> int:
        """Number of components."""
        return self.logits.shape[1]

    def log_prob(self, z: Float[Array, "b d"]) -> Float[Array, " b"]:
        """Log-density; natural log, exact."""
        return jnp.sum(jax.nn.logsumexp(self._by_component(z), axis=2), axis=1)

    def sample(self, key: Key[Array, ""], shape: tuple[int], temperature: Any = 1.0) -> Float[Array, "n d"]:
        """Draws ``mean_jk + temperature * scale_jk * e`` with ``k`` from the weights of entry ``j``, ``e`` standard normal."""
        key_component, key_noise = jax.random.split(key)
        num_dims, num_components = self.mean.shape
        component = jax.random.categorical(key_component, self.logits, shape=(*shape, num_dims))
        chosen = jax.nn.one_hot(component, num_components, dtype=self.mean.dtype)
        mean, scale = (jnp.einsum("ndc,dc->nd", chosen, part) for part in (self.mean, jnp.exp(self.log_scale)))
        return mean + temperature * scale * jax.random.normal(key_noise, (*shape, num_dims), self.mean.dtype)

    def _by_component(self, z: Float[Array, "b d"]) -> Float[Array, "b d c"]:
        """Log-density of each entry and component, weights included."""
        t = (z[:, :, None] - self.mean[None]) * jnp.exp(-self.log_scale)[None]
        constants = jax.nn.log_softmax(self.logits, axis=1) - self.log_scale - 0.5 * math.log(2 * math.pi)
        return constants[None] - 0.5 * jnp.square(t)


@jax.jit
def _maximise(start: Marginals, z: Float[Array, "n d"]) -> Marginals:
    least = jnp.square(SMALLEST_SCALE * jnp.std(z, axis=0))[:, None]

    def step(_, now):
        shares = jax.nn.softmax(now._by_component(z), axis=2)
        counts = jnp.sum(shares, axis=0) + 1e-6
        mean = jnp.einsum("ndc,nd->dc", shares, z) / counts
        square = jnp.sum(shares * jnp.square(z[:, :, None] - mean[None]), axis=0) / counts
        return Marginals(mean, 0.5 * jnp.log(jnp.maximum(square, least)), jnp.log(counts / len(z)))

    return lax.fori_loop(0, STEPS, step, start)
