r"""``log det(I + J)`` of a residual block as a series, truncated or cut at a random length; ``J``
is its branch's Jacobian.

    log det(I + J) = tr log(I + J) = sum_k (-1)^(k+1) tr(J^k) / k    (Behrmann et al. 2019, eq. 4)
    d log det(I + J) = tr((I + J)^-1 dJ) = sum_k (-1)^k tr(J^k dJ)   (Chen et al. 2019, Theorem 2)

Probes ``v`` with ``E[v v^T] = I`` estimate traces (Hutchinson). One chain of vector-Jacobian
products ``u_k = (J^T)^k v`` gives the terms ``<u_k, v>`` of the value. It also gives ``w = sum_k
(-1)^k u_k``: the gradient of ``<w, J v>`` with ``w`` and ``v`` fixed is the estimate's. The chain
is not differentiated, so memory does not depend on its length. Second derivatives are wrong for the
log-determinant. The estimate of ``tr J`` carries most of the variance; a closed form replaces it if
there is one. `logdet_krylov` needs fewer products.
"""

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from iresnet_jax.maths.keys import typed_key
from iresnet_jax.maths.logdet_estimator import (
    Branch,
    Keys,
    Linearized,
    ProbingEstimator,
    Scalar,
    Trace,
    draw_probes,
    jacobian_product,
    linearize,
    transposed_jacobian,
    with_gradient,
)
from iresnet_jax.maths.upward_rounding import euclidean_norm, lipschitz_at_least

_MOST_SUMMED = 10_000  # terms of the tail
# A larger mean would underflow in the table of a Poisson distribution's probabilities.
LARGEST_MEAN = 500.0


def truncation_bound(num_dims: int, lipschitz_bound: float, num_terms: int) -> float:
    """``d (-log(1 - L) - sum_{k<=n} L^k / k)``: a priori bound of the truncated series' error, in
    nats.

    It follows from ``|tr(J^k)| <= d L^k`` (Behrmann et al. 2019, Theorem 3). The tail is summed,
    which avoids cancellation.
    """
    bound, k, power = 0.0, num_terms + 1, lipschitz_bound ** (num_terms + 1)
    while (
        power > 1e-17 * bound * (1 - lipschitz_bound)
        and power > 0
        and k <= num_terms + _MOST_SUMMED
    ):
        bound, k, power = bound + power / k, k + 1, power * lipschitz_bound
    # Both bound the terms that are not summed.
    rest = min(power / (k * (1 - lipschitz_bound)), -math.log1p(-lipschitz_bound))
    return num_dims * (bound + rest) * (1 + 1e-11)  # for rounding


def weighted_series(
    branch: Branch | Linearized,
    x: Float[Array, "b ..."],
    probes: Float[Array, "p b ..."],
    weights: Float[Array, " n"],
    length: int | Int[Array, ""] | Int[Array, " b"],
    *,
    trace: Trace | None = None,
) -> tuple[Float[Array, "p b"], Float[Array, "p b"]]:
    r"""``sum_{k <= length} weights[k-1] (-1)^(k+1)/k <v, J^k v>`` for every probe, with the
    matching Neumann gradient.

    With all weights 1 this is the truncated series. The gradient is ``sum_k weights[k] (-1)^k <v,
    J^k dJ v>``. In expectation over probes it is the derivative of the value.

    Args:
        branch: ``g``, acting on each example alone, or linearised at ``x``. May close over traced
            parameters.
        x: Where to evaluate.
        probes: ``v``; with the columns of ``sqrt(d) I`` as probes the mean over them is the exact
            trace.
        weights: One weight per term, at least ``length`` weights.
        length: Number of terms. A static number from 1 on, a traced one (one compiled loop then
            serves every length), or one per example.
        trace: ``x -> tr J (b,)``, exact and differentiable; replaces the first term, whose weight
            must be 1 in expectation.

    Returns:
        The estimates, and ``|v| |J^T^n v|`` with ``n`` terms of a static number, for the bound of
        the remainder; infinite for other numbers.
    """
    at = linearize(branch, x)
    pushed, pull = jacobian_product(at, probes), transposed_jacobian(at, len(probes))
    weights = jnp.asarray(weights, x.dtype)
    lengths = jnp.broadcast_to(jnp.asarray(length), (len(x),))
    example_axes = tuple(range(2, probes.ndim))
    if trace is not None:
        weights = weights.at[0].set(0)

    def signed(k):  # of every example, 0 beyond its last term
        sign = jnp.where(k % 2 == 1, 1, -1).astype(x.dtype)
        return sign * jnp.where(k <= lengths, weights[k - 1], 0)

    def of_examples(factors, u):
        return factors.reshape(1, -1, *(1,) * (probes.ndim - 2)) * u

    def dot(a, b):
        return jnp.sum(a * b, axis=example_axes)

    def term(k, carry):
        u, value, neumann = carry
        neumann = neumann + of_examples(signed(k), u)
        u = pull(u)
        return u, value + (signed(k) / k)[None] * dot(u, probes), neumann

    carry = (probes, jnp.zeros(probes.shape[:2], x.dtype), jnp.zeros_like(probes))
    if isinstance(length, int):
        u, value, neumann = lax.fori_loop(1, length, term, carry)
        # <J^T u, v> = <u, J v>, which the gradient needs anyway: only the bound takes another
        # product
        neumann = neumann + of_examples(signed(length), u)
        value = value + (signed(length) / length)[None] * dot(u, pushed)
        tail = euclidean_norm(pull(u), example_axes)
    else:
        _, value, neumann = lax.fori_loop(1, jnp.max(lengths, initial=0) + 1, term, carry)
        tail = jnp.full_like(value, jnp.inf)
    value, neumann, tail = lax.stop_gradient((value, neumann, tail))
    value = with_gradient(value, pushed, neumann)
    return value if trace is None else value + trace(x)[None], tail * euclidean_norm(
        probes, example_axes
    )


def remainder_factor(
    lipschitz_bound: Scalar, num_terms: int, power: int, dtype: Any
) -> Float[Array, ""]:
    """``L^p / ((n + 1)(1 - L)) >= sum_{k>n} L^(k - n - 1 + p) / k`` with ``p = power``; infinite
    for ``L >= 1``.
    """
    ell = lax.stop_gradient(lipschitz_at_least(lipschitz_bound, dtype))
    contraction = ell < 1
    return jnp.where(
        contraction, ell**power / ((num_terms + 1) * jnp.where(contraction, 1 - ell, 1)), jnp.inf
    )


@jax.tree_util.register_static
@dataclass(frozen=True)
class SeriesLogdet(ProbingEstimator):
    r"""The power series cut after ``num_terms`` terms (Behrmann et al. 2019, Algorithm 2).

    Its bias is at most ``info.truncation_bound``, the mean over probes of the a posteriori bound

    ``|sum_{k>n} (-1)^(k+1)/k v^T J^k v| <= |v| |(J^T)^n v| sum_{k>n} L^(k-n)/k <= |v| |(J^T)^n v| L
    / ((n+1)(1-L))``.

    Attributes:
        num_terms: Terms of the series; the authors use 5.
    """

    num_terms: int = 5

    unbiased: ClassVar[bool] = False

    def _samples(self, branch, x, key, lipschitz_bound, trace):
        probes, n = draw_probes(key, x, self.num_probes), self.num_terms
        samples, tail = weighted_series(branch, x, probes, jnp.ones(n, x.dtype), n, trace=trace)
        factor = remainder_factor(lipschitz_bound, n, 1, x.dtype)
        # An infinite factor counts where the tail is 0, too.
        return samples, jnp.where(jnp.isfinite(factor), factor * jnp.mean(tail, axis=0), jnp.inf)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["length"],
    meta_fields=["distribution", "parameter", "num_exact_terms", "num_probes", "exact_trace"],
)
@dataclass(frozen=True)
class RouletteLogdet(ProbingEstimator):
    r"""The power series cut at a random length, with weights that keep its expectation.

    With ``m = num_exact_terms`` and a random ``n``, terms ``k <= m + n`` are kept and term ``k >
    m`` is divided by ``P(n >= k - m)`` (Chen et al. 2019, Theorem 1 and eq. 7). So each term has
    the expected weight 1, in the value and in the gradient. The table of weights ends where ``P(n
    >= j)`` falls under 1e-12 (geometric: 1e-9), after 20 terms for the defaults. The expectation is
    the series up to this term, and ``info.truncation_bound`` bounds the later terms a priori.

    The tail of a Poisson distribution falls faster than any ``L^k``: its rare long draws have large
    weights, and a standard error computed without them is too small. A geometric distribution with
    ``1 - parameter > L^2`` has finite variance.

    Attributes:
        distribution: "poisson" with mean ``parameter``, or "geometric", ``P(n >= j) = (1 -
            parameter)^j``.
        parameter: Mean of the Poisson distribution, or stopping probability of the geometric one.
        num_exact_terms: Terms that are always computed and have weight 1; more of them reduce the
            variance.
        length: Length from `fix_length`. None draws one length for each key of a call: for each
            example, or for the batch.
    """

    distribution: str = "poisson"
    parameter: float = 2.0
    num_exact_terms: int = 2
    # Int[Array, ""] | None, or a placeholder for the array that JAX puts into pytrees
    length: Any = None

    unbiased: ClassVar[bool] = True

    def __post_init__(self):
        end = {"poisson": LARGEST_MEAN, "geometric": 1.0}[self.distribution]
        if not 0 < self.parameter < end:
            raise ValueError(
                f"the parameter of a {self.distribution} length must lie in (0, {end:g}), got "
                f"{self.parameter}"
            )

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
            # JAX draws exactly for means below 10. For larger means its rejection sampler gives
            # every length a probability of at least 2^-23.
            parts = math.ceil(self.parameter / 9)
            n = jnp.sum(
                jax.random.poisson(key, self.parameter / parts, (parts,) if parts > 1 else ())
            )
        else:
            # JAX counts trials, this counts failures. JAX never draws lengths of probability below
            # 2^-23. So a draw that reaches a length of probability 2^-10 is continued by a second
            # draw, as a geometric distribution has no memory.
            first, second = jax.random.geometric(key, self.parameter, (2,)) - 1
            enough = math.ceil(math.log(2**-10) / math.log1p(-self.parameter))
            n = jnp.where(first < enough, first, enough + second)
        return self.num_exact_terms + jnp.minimum(n, len(self.survival())).astype(jnp.int32)

    def fix_length(self, key: Keys) -> "RouletteLogdet":
        """The estimator with a length drawn once for all blocks, examples and devices."""
        return replace(self, length=self.draw_length(typed_key(key)))

    def _samples(self, branch, x, key, lipschitz_bound, trace):
        keys = jax.vmap(jax.random.split)(key) if key.ndim else jax.random.split(key)
        key_length, key_probe = keys[..., 0], keys[..., 1]
        length = self.length
        if length is None:
            length = (
                jax.vmap(self.draw_length)(key_length) if key.ndim else self.draw_length(key_length)
            )
        weights = self.weights()
        n, probes = len(weights), draw_probes(key_probe, x, self.num_probes)
        samples, _ = weighted_series(
            branch, x, probes, jnp.asarray(weights, x.dtype), length, trace=trace
        )
        bound = math.prod(x.shape[1:]) * remainder_factor(lipschitz_bound, n, n + 1, x.dtype)
        return samples, jnp.full(len(x), bound)
