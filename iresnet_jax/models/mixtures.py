"""Mixtures of normal distributions, as priors of latents: of vectors, of one vector's sizes, and
of every entry by itself.
"""

import contextlib
import math
import warnings
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Key
from numpy.typing import ArrayLike

from iresnet_jax.bijections.standardize import varies
from iresnet_jax.maths.platforms import floats
from iresnet_jax.pytrees import pytree

SIZES = (1, 2, 3, 4, 6, 8, 12, 16)  # numbers of components that a criterion chooses among


class Mixture:
    """A mixture whose components have the weights ``softmax(logits)``, over the last axis."""

    scored: ClassVar[tuple[str, ...]] = ("logits",)

    logits: Any

    @property
    def num_components(self) -> int:
        """Number of components."""
        return self.logits.shape[-1]


@pytree(arrays=("mean", "log_diagonal", "lower", "logits"))
class GaussianMixture(Mixture):
    r"""A mixture of normal distributions of vectors with full covariances.

        p(z) = sum_k w_k N(z; mean_k, (W_k^T W_k)^-1)

    The factor ``W_k`` of the precision is lower triangular, the inverse of the covariance's
    Cholesky factor, so that a density is a product and not a solve.

    Attributes:
        mean: The means, ``(k, d)``.
        log_diagonal: Logarithms of the diagonals of ``W_k``, ``(k, d)``.
        lower: Entries of ``W_k`` below the diagonals, ``(k, d, d)``; entries on and above the
            diagonals count as nothing.
        logits: ``w_k = softmax(logits)_k``.
    """

    mean: Any
    log_diagonal: Any
    lower: Any
    logits: Any

    @classmethod
    def standard(cls, num_dims: int, num_components: int) -> "GaussianMixture":
        """Components that are all standard normal and equally likely; training would not tell
        them apart.
        """
        zeros = floats(np.zeros((num_components, num_dims)))
        return cls(
            zeros,
            zeros,
            floats(np.zeros((num_components, num_dims, num_dims))),
            floats(np.zeros(num_components)),
        )

    @classmethod
    def fit(cls, z: ArrayLike, num_components: int) -> "GaussianMixture":
        """A mixture that latents are likely under, see `expectation_maximisation`."""
        z = np.asarray(z, np.float64)
        mean, std = z.mean(axis=0), np.where(varies(z), z.std(axis=0), 1)
        # Few steps are enough, as training goes on from them. A component's variance is at least a
        # millionth of all latents'.
        settings = {"reg_covar": 1e-6, "max_iter": 30, "random_state": 0}
        found = expectation_maximisation((z - mean) / std, num_components, **settings)
        covariances = found.covariances_ * np.outer(std, std)
        return cls.of(found.weights_, mean + std * found.means_, covariances)

    @classmethod
    def of(cls, weights: Any, means: Any, covariances: Any) -> "GaussianMixture":
        """The mixture with these weights ``(k,)``, means ``(k, d)`` and covariances."""
        factors = np.linalg.inv(np.linalg.cholesky(covariances))
        log_diagonal = np.log(np.diagonal(factors, axis1=1, axis2=2))
        return cls(*map(floats, (means, log_diagonal, np.tril(factors, -1), np.log(weights))))

    @classmethod
    def kernels(cls, z: Float[np.ndarray, "n d"]) -> "GaussianMixture":
        """A kernel density estimate: a spherical component for each latent.

        Bandwidths are ``h r^a``, with the distance r from a latent to its ``sqrt(n)``-th neighbour.
        The bandwidth h and the exponent a, which is 0 for equal bandwidths, are those under which
        latents are likeliest without their own component.
        """
        from scipy.spatial import KDTree
        from scipy.special import logsumexp

        num, num_dims = z.shape
        radius = KDTree(z).query(z, math.isqrt(num - 1) + 1)[0][:, -1]
        log_radius = np.log(np.maximum(radius, 1e-3 * np.median(radius) + 1e-12))
        some = np.unique(np.linspace(0, num - 1, 500).astype(int))
        squares = np.square(z).sum(axis=1)
        distances = np.maximum(squares[some, None] + squares - 2 * z[some] @ z.T, 0)
        distances[np.arange(len(some)), some] = np.inf
        found = []
        for exponent in (0.0, 0.5, 1.0):
            for bandwidth in np.geomspace(0.03, 3, 20):
                log_std = (
                    math.log(bandwidth) + exponent * log_radius + (1 - exponent) * log_radius.mean()
                )
                terms = -0.5 * distances * np.exp(-2 * log_std) - num_dims * log_std
                found.append((float(np.asarray(logsumexp(terms, axis=1)).mean()), log_std))
        _, log_std = max(found, key=lambda case: case[0])
        log_diagonal, lower = (
            np.repeat(-log_std[:, None], num_dims, axis=1),
            np.zeros((num, num_dims, num_dims)),
        )
        return cls(*map(floats, (z, log_diagonal, lower, np.zeros(num))))

    def log_prob(self, z: Float[Array, "b d"]) -> Float[Array, " b"]:
        """Log-density; natural log, exact."""
        t = jnp.einsum("kij,bkj->bki", self._factors, z[:, None] - self.mean[None])
        of_components = (
            self.logits[None]
            + jnp.sum(self.log_diagonal, axis=1)[None]
            - 0.5 * jnp.sum(jnp.square(t), axis=2)
        )
        total = jax.nn.logsumexp(of_components, axis=1) - jax.nn.logsumexp(self.logits)
        return total - 0.5 * self.mean.shape[1] * math.log(2 * math.pi)

    def sample(
        self, key: Key[Array, ""], shape: tuple[int], temperature: Any = 1.0
    ) -> Float[Array, "n d"]:
        """Draws ``mean_k + temperature * W_k^-1 e`` with ``k`` from the weights and ``e``
        standard normal.
        """
        num_components, num_dims = self.mean.shape
        key_label, key_noise = jax.random.split(key)
        labels = jax.random.categorical(key_label, self.logits, shape=shape)
        noise = jax.random.normal(key_noise, (*shape, num_dims), self.mean.dtype)
        identity = jnp.eye(num_dims, dtype=self.mean.dtype)
        # One after the other: batches of LAPACK's functions can dead-lock, see
        # `platforms.one_at_a_time`.
        scales = lax.map(
            lambda factor: jax.scipy.linalg.solve_triangular(factor, identity, lower=True),
            self._factors,
        )

        def with_component(drawn, component):  # one component at a time: (n, d, d) would be large
            k, mean, scale = component
            return jnp.where(
                (labels == k)[:, None], mean[None] + temperature * noise @ scale.T, drawn
            ), None

        return lax.scan(
            with_component, jnp.zeros_like(noise), (jnp.arange(num_components), self.mean, scales)
        )[0]

    @property
    def _factors(self) -> Float[Array, "k d d"]:
        """The factors ``W`` of the precisions."""
        return jnp.tril(self.lower, -1) + jax.vmap(jnp.diag)(jnp.exp(self.log_diagonal))


def expectation_maximisation(
    z: ArrayLike, num_components: int, *, random_state: int, most_starts: int = 30, **settings: Any
) -> Any:
    """scikit-learn's `GaussianMixture` of vectors, with its own settings; the fewer vectors, the
    more starts.

    It is the likeliest one of all starts of which each component has more vectors than its mean and
    covariance have rows, if there is any: nothing is as likely as a component that has collapsed
    onto a few vectors, and other vectors are all but impossible then. A covariance that is singular
    at every start, in spite of ``reg_covar``, raises ``ValueError``.
    """
    from sklearn import mixture  # late: a second, which only mixtures need
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits

    num, found = np.shape(z)[0], []
    # another start whenever it is used
    settings["random_state"] = np.random.RandomState(random_state)
    # On one thread: matrices are small, and threads that wait for each other took ten times as long
    # on two busy cores.
    with (
        warnings.catch_warnings(action="ignore", category=ConvergenceWarning),
        threadpool_limits(1),
    ):
        for _ in range(min(max(10_000 // num, 2), most_starts)):
            with contextlib.suppress(ValueError):
                found.append(mixture.GaussianMixture(num_components, **settings).fit(z))
    if not found:
        raise ValueError(
            f"{num_components} components of {num} vectors have singular covariances, or are more "
            "than the vectors: take fewer"
        )
    least = np.shape(z)[1] + 1
    return max(found, key=lambda each: (min(each.weights_) * num > least, each.lower_bound_))


def fit_mixture(z: Float[np.ndarray, "n d"], covariance: str, num: int) -> Any:
    """scikit-learn's mixture of standardised vectors, with covariances that are "full" or
    "diag".
    """
    return expectation_maximisation(
        z, num, random_state=0, most_starts=1, covariance_type=covariance, reg_covar=1e-4
    )


def full(mixture: Any) -> Float[np.ndarray, "k d d"]:
    """The covariances of scikit-learn's mixture as matrices."""
    found = mixture.covariances_
    return found if found.ndim == 3 else found[:, :, None] * np.eye(found.shape[1])


def likeliest_size(z: Float[np.ndarray, "n d"]) -> tuple[str, int]:
    """Covariances and number of components by the Bayesian information criterion (Schwarz 1978)."""
    found = {("full", 1): np.inf}
    for covariance, parameters in (("full", z.shape[1] * (z.shape[1] + 1) / 2), ("diag", 0)):
        criteria = [np.inf]
        for num in SIZES:
            is_worse = len(criteria) > 2 and min(criteria[-2:]) > min(criteria)
            if is_worse or num * max(5, parameters / 4) > len(z):
                break
            with contextlib.suppress(ValueError):
                criteria.append(fit_mixture(z, covariance, num).bic(z))
                found[covariance, num] = criteria[-1]
    return min(found, key=lambda size: found[size])


@pytree(arrays=("mean", "log_std", "log_scales", "logits"))
class ScaleMixture(Mixture):
    """A normal distribution with independent entries at several sizes, ``p(z) = sum_k w_k N(z;
    mean, s_k^2 diag(std^2))``.

    Examples whose sizes differ by orders of magnitude, as patches of images do in contrast, are
    likely under it before a flow has learnt anything (scale mixtures of Gaussians: Wainwright and
    Simoncelli, 2000). A contraction would have to learn the sizes, and independent entries with
    heavy tails have other level sets.

    Attributes:
        mean: Mean of each entry, ``(d,)``.
        log_std: Logarithms of their standard deviations, ``(d,)``.
        log_scales: Logarithms of the factors ``s_k`` on all of them, ``(k,)``.
        logits: ``w_k = softmax(logits)_k``.
    """

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
        """Expectation maximisation from the quantiles of ``|t|`` in float64; 10,000 latents take
        a second or less.
        """
        smallest = 1e-6  # of scales, weights, and the standard deviation of an entry
        z = np.asarray(z, np.float64)
        num, num_dims = z.shape
        mean, std = z.mean(axis=0), np.maximum(z.std(axis=0), smallest)
        square = np.square((z - mean) / std).sum(axis=1)
        variances = np.quantile(
            square / num_dims, (np.arange(num_components) + 0.5) / num_components
        )
        weights = np.full(num_components, 1 / num_components)
        for _ in range(30):
            variances = np.maximum(variances, smallest**2)
            log_shares = (
                np.log(weights)
                - 0.5 * num_dims * np.log(variances)
                - 0.5 * square[:, None] / variances
            )
            shares = np.exp(log_shares - log_shares.max(axis=1, keepdims=True))
            shares /= shares.sum(axis=1, keepdims=True)
            counts = shares.sum(axis=0) + smallest
            variances, weights = square @ shares / (num_dims * counts), counts / counts.sum()
            # expected, of each example
            precisions = shares @ (1 / np.maximum(variances, smallest**2))
            mean = precisions @ z / precisions.sum()
            std = np.maximum(np.sqrt(precisions @ np.square(z - mean) / num), smallest)
            square = np.square((z - mean) / std).sum(axis=1)
        variances = np.maximum(variances, smallest**2)
        return cls(
            floats(mean),
            floats(np.log(std)),
            floats(0.5 * np.log(variances)),
            floats(np.log(weights)),
        )

    def log_prob(self, z: Float[Array, "b d"]) -> Float[Array, " b"]:
        """``log sum_k w_k s_k^-d exp(-|t|^2 / (2 s_k^2)) - sum log std - d log(2 pi) / 2``, ``t
        = (z - mean) / std``.
        """
        num_dims = len(self.mean)
        t = (z - self.mean[None]) * jnp.exp(-self.log_std[None])
        square = jnp.sum(jnp.square(t), axis=1, keepdims=True)
        constants = jax.nn.log_softmax(self.logits) - num_dims * self.log_scales
        of_scales = constants[None] - 0.5 * square * jnp.exp(-2 * self.log_scales[None])
        return (
            jax.nn.logsumexp(of_scales, axis=1)
            - jnp.sum(self.log_std)
            - 0.5 * num_dims * math.log(2 * math.pi)
        )

    def sample(
        self, key: Key[Array, ""], shape: tuple[int], temperature: Any = 1.0
    ) -> Float[Array, "n d"]:
        """Draws ``mean + temperature * s_k * std * e`` with ``k`` from the weights and ``e``
        standard normal.
        """
        key_scale, key_noise = jax.random.split(key)
        scales = jnp.exp(self.log_scales)[
            jax.random.categorical(key_scale, self.logits, shape=shape)
        ]
        noise = jax.random.normal(key_noise, (*shape, len(self.mean)), self.mean.dtype)
        return self.mean[None] + temperature * scales[:, None] * jnp.exp(self.log_std)[None] * noise


@pytree(arrays=("mean", "log_scale", "logits"))
class EntryMixtures(Mixture):
    """Independent entries that are mixtures each, ``p(z) = prod_j sum_k w_jk N(z_j; mean_jk,
    scale_jk^2)``.

    With ``c`` components an entry it has up to ``c^d`` modes, which a mixture of vectors could not
    list. All arrays are of shape ``(d, c)``.

    Attributes:
        mean: Mean of each component of each entry.
        log_scale: Logarithms of their standard deviations.
        logits: Their weights, ``softmax(logits)`` over the components of an entry.
    """

    mean: Any
    log_scale: Any
    logits: Any

    @classmethod
    def standard(cls, num_dims: int, num_components: int) -> "EntryMixtures":
        """Components that are all standard normal and equally likely."""
        zeros = floats(np.zeros((num_dims, num_components)))
        return cls(zeros, zeros, zeros)

    @classmethod
    def fit(cls, z: ArrayLike, num_components: int) -> "EntryMixtures":
        """Expectation maximisation for each entry by itself, from components at its quantiles."""
        z = np.asarray(z, jnp.result_type(float))
        places = (np.arange(num_components) + 0.5) / num_components
        std = z.std(axis=0)[:, None]
        start = np.quantile(z, places, axis=0).T
        zeros = jnp.zeros(start.shape)
        return _maximise(
            cls(jnp.asarray(start, z.dtype), zeros + np.log(std / num_components + 1e-12), zeros), z
        )

    def log_prob(self, z: Float[Array, "b d"]) -> Float[Array, " b"]:
        """Log-density; natural log, exact."""
        return jnp.sum(jax.nn.logsumexp(self._by_component(z), axis=2), axis=1)

    def sample(
        self, key: Key[Array, ""], shape: tuple[int], temperature: Any = 1.0
    ) -> Float[Array, "n d"]:
        """Draws ``mean_jk + temperature * scale_jk * e`` with ``k`` from the weights of entry
        ``j``, ``e`` standard normal.
        """
        key_component, key_noise = jax.random.split(key)
        num_dims, num_components = self.mean.shape
        component = jax.random.categorical(key_component, self.logits, shape=(*shape, num_dims))
        chosen = jax.nn.one_hot(component, num_components, dtype=self.mean.dtype)
        mean, scale = (
            jnp.einsum("ndc,dc->nd", chosen, part) for part in (self.mean, jnp.exp(self.log_scale))
        )
        return mean + temperature * scale * jax.random.normal(
            key_noise, (*shape, num_dims), self.mean.dtype
        )

    def _by_component(self, z: Float[Array, "b d"]) -> Float[Array, "b d c"]:
        """Log-density of each entry and component, weights included."""
        t = (z[:, :, None] - self.mean[None]) * jnp.exp(-self.log_scale)[None]
        constants = (
            jax.nn.log_softmax(self.logits, axis=1) - self.log_scale - 0.5 * math.log(2 * math.pi)
        )
        return constants[None] - 0.5 * jnp.square(t)


@jax.jit
def _maximise(start: EntryMixtures, z: Float[Array, "n d"]) -> EntryMixtures:
    least = jnp.square(1e-3 * jnp.std(z, axis=0))[:, None]  # variance of a component

    def step(_, now):
        shares = jax.nn.softmax(now._by_component(z), axis=2)
        counts = jnp.sum(shares, axis=0) + 1e-6
        mean = jnp.einsum("ndc,nd->dc", shares, z) / counts
        square = jnp.sum(shares * jnp.square(z[:, :, None] - mean[None]), axis=0) / counts
        return EntryMixtures(
            mean, 0.5 * jnp.log(jnp.maximum(square, least)), jnp.log(counts / len(z))
        )

    return lax.fori_loop(0, 200, step, start)
