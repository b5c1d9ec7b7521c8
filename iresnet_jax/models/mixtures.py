r"""Mixtures of normal distributions with full covariances, as priors of latents of vectors.

    p(z) = sum_k w_k N(z; mean_k, (W_k^T W_k)^-1)

The factor ``W_k`` of the precision is lower triangular, the inverse of the covariance's Cholesky factor, so that a density is a
product and not a solve.
"""

import math
import warnings
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key
from numpy.typing import ArrayLike

from iresnet_jax.checked_dataclasses import pytree
from iresnet_jax.maths.platforms import floats

SMALLEST_VARIANCE = 1e-6  # of a component, relative to that of all latents
STARTS, STEPS = 3, 30  # of expectation maximisation, from which training goes on


@pytree(arrays=("mean", "log_diagonal", "lower", "logits"))
class GaussianMixture:
    """A mixture of normal distributions.

    Attributes:
        mean: The means, ``(k, d)``.
        log_diagonal: Logarithms of the diagonals of ``W_k``, ``(k, d)``.
        lower: Entries of ``W_k`` below the diagonals, ``(k, d, d)``; entries on and above the diagonals count as nothing.
        logits: ``w_k = softmax(logits)_k``.
    """

    scored: ClassVar[tuple[str, ...]] = ("logits",)

    mean: Any
    log_diagonal: Any
    lower: Any
    logits: Any

    @classmethod
    def standard(cls, num_dims: int, num_components: int) -> "GaussianMixture":
        """Components that are all standard normal and equally likely; training would not tell them apart."""
        zeros = floats(np.zeros((num_components, num_dims)))
        return cls(zeros, zeros, floats(np.zeros((num_components, num_dims, num_dims))), floats(np.zeros(num_components)))

    @classmethod
    def fit(cls, z: ArrayLike, num_components: int) -> "GaussianMixture":
        """A mixture that latents are likely under, see `expectation_maximisation`.

        Raises:
            ValueError: If there are fewer latents than components.
        """
        z = np.asarray(z, np.float64)
        if len(z) < num_components:
            raise ValueError(f"a prior of {num_components} components needs as many examples, got {len(z)}: take fewer")
        mean, std = z.mean(axis=0), z.std(axis=0)
        std = np.where(std > 0, std, 1)
        settings = {"reg_covar": SMALLEST_VARIANCE, "max_iter": STEPS, "n_init": STARTS, "random_state": 0}
        found = expectation_maximisation((z - mean) / std, num_components, **settings)
        factors = np.linalg.inv(np.linalg.cholesky(found.covariances_ * np.outer(std, std)))
        log_diagonal = np.log(np.diagonal(factors, axis1=1, axis2=2))
        parts = mean + std * found.means_, log_diagonal, np.tril(factors, -1), np.log(found.weights_)
        return cls(*map(floats, parts))

    @property
    def num_components(self) -> int:
        """Number of components."""
        return len(self.logits)

    def log_prob(self, z: Float[Array, "b d"]) -> Float[Array, " b"]:
        """Log-density; natural log, exact."""
        t = jnp.einsum("kij,bkj->bki", self._factors, z[:, None] - self.mean[None])
        of_components = self.logits[None] + jnp.sum(self.log_diagonal, axis=1)[None] - 0.5 * jnp.sum(jnp.square(t), axis=2)
        total = jax.nn.logsumexp(of_components, axis=1) - jax.nn.logsumexp(self.logits)
        return total - 0.5 * self.mean.shape[1] * math.log(2 * math.pi)

    def sample(self, key: Key[Array, ""], shape: tuple[int], temperature: Any = 1.0) -> Float[Array, "n d"]:
        """Draws ``mean_k + temperature * W_k^-1 e`` with ``k`` from the weights and ``e`` standard normal."""
        num_components, num_dims = self.mean.shape
        key_label, key_noise = jax.random.split(key)
        labels = jax.random.categorical(key_label, self.logits, shape=shape)
        noise = jax.random.normal(key_noise, (*shape, num_dims), self.mean.dtype)
        identity = jnp.eye(num_dims, dtype=self.mean.dtype)
        # One after the other: batches of LAPACK's functions can dead-lock, see `platforms.one_at_a_time`.
        scales = jax.lax.map(lambda factor: jax.scipy.linalg.solve_triangular(factor, identity, lower=True), self._factors)

        def with_component(drawn, component):  # one component at a time: (n, d, d) would be large
            k, mean, scale = component
            return jnp.where((labels == k)[:, None], mean[None] + temperature * noise @ scale.T, drawn), None

        return jax.lax.scan(with_component, jnp.zeros_like(noise), (jnp.arange(num_components), self.mean, scales))[0]

    @property
    def _factors(self) -> Float[Array, "k d d"]:
        """The factors ``W`` of the precisions."""
        return jnp.tril(self.lower, -1) + jax.vmap(jnp.diag)(jnp.exp(self.log_diagonal))


def expectation_maximisation(z: ArrayLike, num_components: int, **settings: Any) -> Any:
    """scikit-learn's `GaussianMixture` of vectors, with its own settings."""
    from sklearn import mixture  # late: a second, which only mixtures need
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits

    # On one thread: matrices are small, and threads that wait for each other took ten times as long on two busy cores.
    with warnings.catch_warnings(action="ignore", category=ConvergenceWarning), threadpool_limits(1):
        return mixture.GaussianMixture(num_components, **settings).fit(z)
