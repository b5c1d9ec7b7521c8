r"""``log det(I + J)`` of a residual block, ``J`` the Jacobian of its branch: exact, or as a truncated series.

    log det(I + J) = tr log(I + J) = sum_k (-1)^(k+1) tr(J^k) / k            (Behrmann et al. 2019, eq. 4)
    d log det(I + J) = tr((I + J)^-1 dJ) = sum_k (-1)^k tr(J^k dJ)            (Chen et al. 2019, Theorem 2)

Traces are estimated with probes ``v``, ``E[v v^T] = I`` (Hutchinson). One chain of vector-Jacobian products
``u_k = (J^T)^k v`` serves both: ``<u_k, v>`` for the value, ``w = sum_k (-1)^k u_k`` for the gradient, which is that of
``<w, J v>`` with ``w`` and ``v`` held fixed. The chain is not differentiated, so memory does not depend on its length, and
the value is always the series'. Every example keeps its own cotangent. Second derivatives are not those of the log-det.
Where ``tr J`` is known in closed form, it takes the place of its estimate, which carries most of the variance. The module
`roulette` has the series without a bias, `krylov` what needs fewer products.

The estimators are settings with one pure call, ``estimator(branch, x, key, lipschitz_bound=L) -> (logdet, info)``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, Key

from iresnet_jax.maths.rounding import at_least

Branch = Callable[[Array], Array]
Trace = Callable[[Array], Array]
PROBES = ("rademacher", "gaussian")


class LogdetInfo(NamedTuple):
    """What is known about the error of a log-determinant, for every example, in nats.

    Attributes:
        stderr: Standard error over the probes; 0 if exact, infinite if a single probe says nothing about it.
        truncation_bound: Upper bound of what the terms that were left out could add to this estimate; rigorous if the
            Lipschitz bound is. 0 if exact, infinite without a Lipschitz bound below 1.
    """

    stderr: Float[Array, " b"]
    truncation_bound: Float[Array, " b"]


@runtime_checkable
class LogdetEstimator(Protocol):
    """Estimates ``log det(I + J)`` of a branch at every example of a batch.

    Attributes:
        unbiased: Whether nothing is cut off: the mean over probes, and random lengths, is the log-determinant.
    """

    unbiased: ClassVar[bool]

    def fix_length(self, key: Key[Array, ""]) -> "LogdetEstimator":
        """The estimator with its random length, if it has one, drawn once for all blocks, examples and devices."""
        ...

    def __call__(
        self,
        branch: Branch,
        x: Float[Array, "b ..."],
        key: Key[Array, "..."],
        *,
        lipschitz_bound: float | Float[Array, ""] | None = None,
        trace: Trace | None = None,
    ) -> tuple[Float[Array, " b"], LogdetInfo]:
        """The log-determinant and what is known about its error.

        Args:
            branch: ``g``, acting on each example alone.
            x: Where to evaluate.
            key: Of the probes, one or one an example.
            lipschitz_bound: Upper bound of ``Lip(g)``, for the truncation bound.
            trace: ``x -> tr J (b,)`` in closed form, if there is one.
        """
        ...


def draw_probes(
    key: Key[Array, "..."], x: Float[Array, "b ..."], num_probes: int, probe: str = "rademacher"
) -> Float[Array, "p b ..."]:
    """Probes with independent entries of mean 0 and variance 1.

    Args:
        key: One key, or one for each example; the latter gives an example the same probes in whatever batch it stands.
        x: The batch, for shape and type.
        num_probes: Probes for each example.
        probe: "rademacher" (signs; least variance among entry-wise independent probes) or "gaussian".

    Raises:
        ValueError: If the probe's name is unknown or ``num_probes`` is not positive.
    """
    if probe not in PROBES:
        raise ValueError(f"probe must be one of {', '.join(PROBES)}, got {probe!r}")
    if num_probes < 1:
        raise ValueError(f"num_probes must be at least 1, got {num_probes}")
    draw = jax.random.rademacher if probe == "rademacher" else jax.random.normal
    if key.ndim == 0:
        return draw(key, (num_probes, *x.shape), x.dtype)
    return jax.vmap(lambda k: draw(k, (num_probes, *x.shape[1:]), x.dtype), out_axes=1)(key)


def exact_logdet(branch: Branch, x: Float[Array, "b ..."], *, columns_at_once: int = 64) -> Float[Array, " b"]:
    """``log det(I + J)`` from the full Jacobian by LU factorisation; exact to rounding, differentiable.

    Costs ``d`` Jacobian-vector products and ``O(d^3)`` an example: for dimensions up to about a thousand.

    Args:
        branch: ``g``, acting on each example alone.
        x: Where to evaluate.
        columns_at_once: Jacobian columns computed side by side; less saves memory.
    """
    num_dims = x[0].size
    basis = jnp.eye(num_dims, dtype=x.dtype).reshape(num_dims, 1, *x.shape[1:])

    def column(direction):
        return jax.jvp(branch, (x,), (jnp.broadcast_to(direction, x.shape),))[1].reshape(len(x), num_dims)

    if num_dims <= 4:  # few: written out, since XLA:CPU multiplies batches of matrices more slowly than matrices
        columns = jnp.stack([column(direction) for direction in basis])
    else:
        columns = lax.map(column, basis, batch_size=min(columns_at_once, num_dims))
    jacobian = jnp.moveaxis(columns, 0, -1)
    return jnp.linalg.slogdet(jnp.eye(num_dims, dtype=x.dtype)[None] + jacobian)[1]


def truncation_bound(num_dims: int, lipschitz_bound: float, num_terms: int) -> float:
    """``d (-log(1 - L) - sum_{k<=n} L^k / k)``: a priori bound of the truncated series' error, in nats.

    Since ``|tr(J^k)| <= d L^k`` (Behrmann et al. 2019, Theorem 3). Computed as the sum of the tail, without cancellation.
    """
    if not 0 <= lipschitz_bound < 1:
        raise ValueError(f"lipschitz_bound must lie in [0, 1), got {lipschitz_bound}: the series only converges there")
    bound, k, power = 0.0, num_terms + 1, lipschitz_bound ** (num_terms + 1)
    while power > 1e-17 * bound * (1 - lipschitz_bound) and power > 0:
        bound, k, power = bound + power / k, k + 1, power * lipschitz_bound
    return num_dims * bound


def weighted_series(
    branch: Branch,
    x: Float[Array, "b ..."],
    probes: Float[Array, "p b ..."],
    weights: Float[Array, " n"],
    length: int | Int[Array, ""] | Int[Array, " b"],
    *,
    trace: Trace | None = None,
    unroll: bool = False,
) -> tuple[Float[Array, "p b"], Float[Array, "p b"]]:
    r"""``sum_{k <= length} weights[k-1] (-1)^(k+1)/k <v, J^k v>`` for every probe, with the matching Neumann gradient.

    With all weights 1 this is the truncated series. The gradient is ``sum_k weights[k] (-1)^k <v, J^k dJ v>``, the
    derivative of the same truncated sum of traces in expectation over probes.

    Args:
        branch: ``g``, acting on each example alone. May close over traced parameters.
        x: Where to evaluate.
        probes: ``v``; the columns of ``sqrt(d) I`` as probes make the mean over them the exact trace.
        weights: One weight a term, at least ``length`` of them.
        length: Number of terms: static, or traced (then one compiled loop serves every length), or one an example.
        trace: ``x -> tr J (b,)``, exact and differentiable, to stand for the first term, whose weight must be 1 in expectation.
        unroll: Write the terms out instead of looping; needs a static length.

    Returns:
        The estimates, and ``|v| |J^T^n v|`` at each example's last term, from which the remainder is bounded.
    """
    pull = transposed_jacobian(branch, x, len(probes))
    example_axes = tuple(range(2, probes.ndim))
    weights = jnp.asarray(weights, x.dtype)
    if trace is not None:
        weights = weights.at[0].set(0)
    length = jnp.asarray(length) if not isinstance(length, int) else length
    per_example = isinstance(length, jax.Array) and length.ndim == 1

    def expand(a):  # (b,) or () against (p, b, ...)
        return a if jnp.ndim(a) == 0 else a.reshape(1, -1, *(1,) * (probes.ndim - 2))

    def term(k, carry):
        u, value, neumann, tail = carry
        weight = weights[k - 1]
        if per_example:
            weight = jnp.where(k <= length, weight, 0)
        sign = jnp.where(k % 2 == 1, 1, -1).astype(x.dtype)
        neumann = neumann + expand(sign * weight) * u
        u = pull(u)
        contribution = jnp.sum(u * probes, axis=example_axes)
        norm = jnp.sqrt(jnp.sum(u**2, axis=example_axes))
        coefficient = sign * weight / k
        if per_example:
            value = value + coefficient[None] * contribution
            tail = jnp.where((k <= length)[None], norm, tail)
        else:
            value, tail = value + coefficient * contribution, norm
        return u, value, neumann, tail

    zeros = jnp.zeros(probes.shape[:2], x.dtype)
    probe_norm = jnp.sqrt(jnp.sum(probes**2, axis=example_axes))
    carry = (probes, zeros, jnp.zeros_like(probes), probe_norm)
    if isinstance(length, int):
        if not 0 <= length <= len(weights):
            raise ValueError(f"length must lie between 0 and the number of weights {len(weights)}, got {length}")
        carry = lax.fori_loop(1, length + 1, term, carry, unroll=unroll and length > 0)
    else:
        longest = jnp.max(length)
        carry = lax.while_loop(
            lambda c: c[0] <= longest, lambda c: (c[0] + 1, term(c[0], c[1])), (jnp.ones_like(longest), carry)
        )[1]
    _, value, neumann, tail = lax.stop_gradient(carry)

    value = with_gradient(branch, x, probes, value, neumann)
    return value if trace is None else value + trace(x)[None], tail * probe_norm


def transposed_jacobian(branch: Branch, x: Float[Array, "b ..."], num_probes: int) -> Callable[[Array], Array]:
    """``u -> J^T u`` for ``u`` of shape ``(p, b, ...)``, of which nothing is differentiated."""
    pure_branch, parameters = jax.closure_convert(branch, x)
    frozen = lax.stop_gradient(parameters)
    _, pullback = jax.vjp(lambda x: pure_branch(x, *frozen), lax.stop_gradient(x))
    return _over_probes(lambda u: pullback(u)[0], num_probes)


def with_gradient(
    branch: Branch,
    x: Float[Array, "b ..."],
    probes: Float[Array, "p b ..."],
    value: Float[Array, "p b"],
    w: Float[Array, "p b ..."],
) -> Float[Array, "p b"]:
    """``value`` with the gradient of ``<w, J v>``, in which ``w`` and the probes ``v`` are held fixed."""
    pushed = _over_probes(lambda v: jax.jvp(branch, (x,), (v,))[1], len(probes))(probes)
    surrogate = jnp.sum(lax.stop_gradient(w) * pushed, axis=tuple(range(2, probes.ndim)))
    return lax.stop_gradient(value) + (surrogate - lax.stop_gradient(surrogate))


def _over_probes(function, num_probes):
    """``vmap`` without a batch axis for a single probe, which would cost."""
    return jax.vmap(function) if num_probes > 1 else lambda v: function(v[0])[None]


def mean_and_stderr(samples: Float[Array, "p b"]) -> tuple[Float[Array, " b"], Float[Array, " b"]]:
    """Mean over probes, and its standard error: infinite for a single probe, which says nothing about it."""
    mean = jnp.mean(samples, axis=0)
    if len(samples) == 1:
        return mean, jnp.full_like(mean, jnp.inf)
    return mean, lax.stop_gradient(jnp.std(samples, axis=0, ddof=1)) / np.sqrt(len(samples)).astype(samples.dtype)


def remainder_factor(lipschitz_bound, num_terms, power, dtype):
    """``L^p / ((n + 1)(1 - L))``, at least ``sum_{k>n} L^(k - n - 1 + p) / k``; infinite without a bound below 1."""
    ell = lax.stop_gradient(at_least(jnp.inf if lipschitz_bound is None else lipschitz_bound, dtype))
    contraction = ell < 1
    return jnp.where(contraction, ell**power / ((num_terms + 1) * jnp.where(contraction, 1 - ell, 1)), jnp.inf)


@dataclass(frozen=True)
class ExactLogdet:
    """`exact_logdet` as an estimator; the key is not used."""

    columns_at_once: int = 64

    unbiased: ClassVar[bool] = True

    def fix_length(self, key: Key[Array, ""]) -> "ExactLogdet":
        """Nothing is random here."""
        del key
        return self

    def __call__(
        self,
        branch: Branch,
        x: Float[Array, "b ..."],
        key: Key[Array, "..."] | None = None,
        *,
        lipschitz_bound: float | Float[Array, ""] | None = None,
        trace: Trace | None = None,
    ) -> tuple[Float[Array, " b"], LogdetInfo]:
        """The log-determinant, without error."""
        del key, lipschitz_bound, trace
        zeros = jnp.zeros(len(x), x.dtype)
        return exact_logdet(branch, x, columns_at_once=self.columns_at_once), LogdetInfo(zeros, zeros)


@dataclass(frozen=True)
class SeriesLogdet:
    r"""The power series cut after ``num_terms`` terms (Behrmann et al. 2019, Algorithm 2): biased by at most its bound.

    The bound that `info` reports is a posteriori: the remainder of one probe's series is

    ``|sum_{k>n} (-1)^(k+1)/k v^T J^k v| <= |v| |(J^T)^n v| sum_{k>n} L^(k-n)/k <= |v| |(J^T)^n v| L / ((n+1)(1-L))``.

    Attributes:
        num_terms: Terms of the series; the authors use 5.
        num_probes: Probes for each example.
        probe: Distribution of the probes.
        unroll: Write the terms out instead of looping over them.
        exact_trace: Whether a trace in closed form stands for the first term where there is one.
    """

    num_terms: int = 5
    num_probes: int = 1
    probe: str = "rademacher"
    unroll: bool = False
    exact_trace: bool = True

    unbiased: ClassVar[bool] = False

    def __post_init__(self):
        if self.num_terms < 1:
            raise ValueError(f"num_terms must be at least 1, got {self.num_terms}")

    def fix_length(self, key: Key[Array, ""]) -> "SeriesLogdet":
        """Nothing but the probes is random here."""
        del key
        return self

    def __call__(
        self,
        branch: Branch,
        x: Float[Array, "b ..."],
        key: Key[Array, "..."],
        *,
        lipschitz_bound: float | Float[Array, ""] | None = None,
        trace: Trace | None = None,
    ) -> tuple[Float[Array, " b"], LogdetInfo]:
        """The truncated estimate, its standard error over probes and the bound of its remainder."""
        n = self.num_terms
        probes = draw_probes(key, x, self.num_probes, self.probe)
        trace = trace if self.exact_trace else None
        samples, tail = weighted_series(branch, x, probes, jnp.ones(n, x.dtype), n, trace=trace, unroll=self.unroll)
        logdet, stderr = mean_and_stderr(samples)
        bound = remainder_factor(lipschitz_bound, n, 1, x.dtype) * jnp.mean(tail, axis=0)
        return logdet, LogdetInfo(stderr, bound)
