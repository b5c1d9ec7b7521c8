r"""A prior of independent entries, each of which is a mixture of normal distributions in one dimension.

    p(z) = prod_j sum_k w_jk N(z_j; mean_jk, scale_jk^2)

With ``c`` components an entry it has up to ``c^d`` modes, which a mixture of vectors could not list.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Key

STEPS = 200  # of expectation maximisation
SMALLEST_SCALE = 1e-3  # of a component, in standard deviations of its entry


@functools.partial(jax.tree_util.register_dataclass, data_fields=["mean", "log_scale", "logits"], meta_fields=[])
@dataclass(frozen=True)
class Marginals:
    """A prior of one's own for densities of vectors, see `priors`; all that it holds is trained, floats of shape (d, c).

    Attributes:
        mean: Mean of each component of each entry.
        log_scale: Logarithms of their standard deviations.
        logits: Their weights, ``softmax(logits)`` over the components of an entry.
    """

    mean: Any
    log_scale: Any
    logits: Any

    @classmethod
    def standard(cls, num_dims: int, num_components: int) -> "Marginals":
        """Components that are all standard normal and equally likely."""
        zeros = jnp.zeros((num_dims, num_components))
        return cls(zeros, zeros, zeros)

    @classmethod
    def fit(cls, z: Float[np.ndarray, "n d"], num_components: int) -> "Marginals":
        """Expectation maximisation for each entry by itself, from components at its quantiles."""
        z = np.asarray(z, jnp.result_type(float))
        places = (np.arange(num_components) + 0.5) / num_components
        std = z.std(axis=0)[:, None]
        start = np.quantile(z, places, axis=0).T
        zeros = jnp.zeros(start.shape)
        return _maximise(cls(jnp.asarray(start, z.dtype), zeros + np.log(std / num_components + 1e-12), zeros), z)

    def log_prob(self, z: Float[Array, "b d"]) -> Float[Array, " b"]:
        """Log-density; natural log, exact."""
        return jnp.sum(jax.nn.logsumexp(self._by_component(z), axis=2), axis=1)

    def sample(self, key: Key[Array, ""], shape: tuple[int, ...]) -> Float[Array, "n d"]:
        """Draws; differentiable in means and scales."""
        key_component, key_noise = jax.random.split(key)
        num_dims = len(self.mean)
        component = jax.random.categorical(key_component, self.logits, shape=(*shape, num_dims))
        chosen = jax.nn.one_hot(component, self.mean.shape[1], dtype=self.mean.dtype)
        mean, scale = (jnp.einsum("ndc,dc->nd", chosen, part) for part in (self.mean, jnp.exp(self.log_scale)))
        return mean + scale * jax.random.normal(key_noise, (*shape, num_dims), self.mean.dtype)

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
