"""Unbiased estimates of ``log det(I + J)`` of a residual block: the power series cut at a random length (Chen et al. 2019)."""

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from iresnet_jax.maths.keys import typed_key
from iresnet_jax.maths.logdet_estimator import Keys, ProbingEstimator
from iresnet_jax.maths.logdet_series import remainder_factor, weighted_series

LARGEST_MEAN = 500.0  # a Poisson distribution with a larger mean would underflow in the table of its probabilities


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["length"],
    meta_fields=["distribution", "parameter", "num_exact_terms", "num_probes", "probe", "exact_trace"],
)
@dataclass(frozen=True)
class RouletteLogdet(ProbingEstimator):
    r"""The power series cut at a random length, with weights that keep its expectation.

    With ``m = num_exact_terms`` and a random ``n``, terms ``k <= m + n`` are kept and term ``k > m`` is divided by
    ``P(n >= k - m)`` (Chen et al. 2019, Theorem 1 and eq. 7). So each term has the expected weight 1, in the value and in the
    gradient. The table of weights ends where ``P(n >= j)`` falls under 1e-12 (geometric: 1e-9), after 20 terms for the
    defaults. The expectation is the series up to this term, and ``info.truncation_bound`` bounds the later terms a priori.

    The tail of a Poisson distribution falls faster than any ``L^k``: its rare long draws have large weights, and a standard
    error computed without them is too small. A geometric distribution with ``1 - parameter > L^2`` has finite variance.

    Attributes:
        distribution: "poisson" with mean ``parameter``, or "geometric", ``P(n >= j) = (1 - parameter)^j``.
        parameter: Mean of the Poisson distribution, or stopping probability of the geometric one.
        num_exact_terms: Terms that are always computed and have weight 1; more of them reduce the variance.
        length: Length from `fix_length`. None draws one length for each key of a call: for each example, or for the batch.
    """

    distribution: str = "poisson"
    parameter: float = 2.0
    num_exact_terms: int = 2
    length: Any = None  # Int[Array, ""] | None, or a placeholder for the array that JAX puts into pytrees

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
        """``P(n >= j)`` for ``j = 1, 2, ...``, in float64, down to 1e-12 ("poisson") or 1e-9."""
        if self.distribution == "geometric":
            count = int(np.ceil(np.log(1e-9) / np.log1p(-self.parameter)))
            return (1 - self.parameter) ** np.arange(1, max(count, 1) + 1)
        mass, masses = np.exp(-self.parameter), []
        while len(masses) <= self.parameter or mass > 1e-25:
            masses.append(mass)
            mass *= self.parameter / len(masses)
        tail = np.cumsum(masses[::-1])[::-1][1:]  # summed from the small end: no cancellation
        return tail[tail > 1e-12]

    def weights(self) -> Float[np.ndarray, " k"]:
        """Weights of the terms ``k = 1, 2, ...`` that are kept."""
        return np.concatenate([np.ones(self.num_exact_terms), 1 / self.survival()])

    def draw_length(self, key: Keys) -> Int[Array, ""]:
        """A random number of terms, exact ones included."""
        if self.distribution == "poisson":
            # JAX draws means of 10 or more by a rejection in which every length has a chance of 2^-23, smaller ones exactly.
            parts = math.ceil(self.parameter / 9)
            n = jnp.sum(jax.random.poisson(key, self.parameter / parts, (parts,) if parts > 1 else ()))
        else:
            # JAX counts the trials, we count the failures. It draws nothing that has a chance below 2^-23: lengths of a chance
            # of 2^-10 go on by a second draw, as a geometric distribution has no memory.
            first, second = jax.random.geometric(key, self.parameter, (2,)) - 1
            enough = math.ceil(math.log(2**-10) / math.log1p(-self.parameter))
            n = jnp.where(first < enough, first, enough + second)
        return self.num_exact_terms + jnp.minimum(n, len(self.survival())).astype(jnp.int32)

    def fix_length(self, key: Keys) -> "RouletteLogdet":
        """The estimator with a length drawn once for all blocks, examples and devices."""
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
