"""``log det(I + J)`` of a residual block as a power series cut at a random length: without a bias (Chen et al. 2019)."""

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from iresnet_jax.maths.logdet.estimator import Keys, ProbingEstimator, typed_key
from iresnet_jax.maths.logdet.hutchinson_series import remainder_factor, weighted_series

LARGEST_MEAN = 500.0  # number of terms beyond which the table of a Poisson distribution would underflow


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["length"],
    meta_fields=["distribution", "parameter", "num_exact_terms", "num_probes", "probe", "exact_trace"],
)
@dataclass(frozen=True)
class RouletteLogdet(ProbingEstimator):
    r"""The power series cut at a random length, terms reweighted so that the expectation does not feel it.

    With ``m = num_exact_terms`` and a random ``n``, terms ``k <= m + n`` are kept and term ``k > m`` is divided by
    ``P(n >= k - m)`` (Chen et al. 2019, Theorem 1 and eq. 7): each term's expected weight is 1, in the value and in the
    gradient. The table of weights ends where ``P(n >= j)`` falls under 1e-12, after 20 terms for the defaults: the expectation
    is the series up to there, and ``info.truncation_bound`` bounds the rest a priori. The tail of a Poisson distribution falls
    faster than any ``L^k``, so its rare long draws weigh much and few samples show too small a standard error; a geometric
    one with ``1 - parameter > L^2`` has finite variance.

    Attributes:
        distribution: "poisson" with mean ``parameter``, or "geometric", ``P(n >= j) = (1 - parameter)^j``.
        parameter: Mean of the Poisson, or stopping probability of the geometric distribution.
        num_exact_terms: Terms that are always computed and have weight 1. More of them make the estimate steadier.
        length: A length fixed by `fix_length`; None draws one for each example if the call is given a key an example, one for
            the batch if it is given one key.
    """

    distribution: str = "poisson"
    parameter: float = 2.0
    num_exact_terms: int = 2
    length: Any = None  # Int[Array, ""] | None, or what stands for an array where JAX rebuilds pytrees

    unbiased: ClassVar[bool] = True

    def __post_init__(self):
        if self.distribution not in ("poisson", "geometric"):
            raise ValueError(f"distribution must be poisson or geometric, got {self.distribution!r}")
        if self.distribution == "geometric" and not 0 < self.parameter < 1:
            raise ValueError(f"the geometric distribution's parameter must lie in (0, 1), got {self.parameter}")
        if not 0 < self.parameter <= LARGEST_MEAN:
            raise ValueError(f"the Poisson distribution's parameter must lie in (0, {LARGEST_MEAN:g}], got {self.parameter}")
        if self.num_exact_terms < 0:
            raise ValueError(f"num_exact_terms must not be negative, got {self.num_exact_terms}")

    def survival(self) -> Float[np.ndarray, " j"]:
        """``P(n >= j)`` for ``j = 1, 2, ...``, in float64, down to 1e-12."""
        if self.distribution == "geometric":
            count = int(np.ceil(np.log(1e-12) / np.log1p(-self.parameter)))
            return (1 - self.parameter) ** np.arange(1, max(count, 1) + 1)
        mass, masses = np.exp(-self.parameter), []
        while len(masses) <= self.parameter or mass > 1e-25:
            masses.append(mass)
            mass *= self.parameter / len(masses)
        tail = np.cumsum(masses[::-1])[::-1][1:]  # summed from the small end: no cancellation
        return tail[tail > 1e-12]

    def weights(self) -> Float[np.ndarray, " k"]:
        """The weight of each term ``k = 1, 2, ...`` when it is kept."""
        return np.concatenate([np.ones(self.num_exact_terms), 1 / self.survival()])

    def draw_length(self, key: Keys) -> Int[Array, ""]:
        """A random number of terms, exact ones included."""
        if self.distribution == "poisson":
            n = jax.random.poisson(key, self.parameter)
        else:
            n = jax.random.geometric(key, self.parameter) - 1  # JAX counts the trials, we count the failures
        return self.num_exact_terms + jnp.minimum(n, len(self.survival())).astype(jnp.int32)

    def fix_length(self, key: Keys) -> "RouletteLogdet":
        """Draws the length now, to be shared by all blocks, examples and devices of a step."""
        return replace(self, length=self.draw_length(typed_key(key)))

    def _samples(self, branch, x, key, lipschitz_bound, trace):
        key = typed_key(key)
        keys = jax.vmap(jax.random.split)(key) if key.ndim else jax.random.split(key)
        key_length, key_probe = keys[..., 0], keys[..., 1]
        length = self.length
        if length is None:
            length = jax.vmap(self.draw_length)(key_length) if key.ndim else self.draw_length(key_length)
        weights = self.weights()
        n, probes = len(weights), self._draw_probes(key_probe, x)
        samples, _ = weighted_series(branch, x, probes, jnp.asarray(weights, x.dtype), length, trace=trace)
        bound = math.prod(x.shape[1:]) * remainder_factor(lipschitz_bound, n, n + 1, x.dtype)
        return samples, jnp.full(len(x), bound)
