"""Bijections as values: pure functions that close over their weights, and what is known of their errors.

Information adds up from one to the next: standard errors in quadrature, truncation bounds and evaluations by sum, and an
inverse's error bound grows by each map's ``Lip(F^-1)`` as the error of a later map's inverse passes through the earlier ones.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from iresnet_jax.bijections import actnorm, reshape, residual
from iresnet_jax.maths.inverse.fixed_point import Diagonal, FixedPointInfo, example_norm
from iresnet_jax.maths.logdet.estimator import LogdetEstimator, LogdetInfo, Trace

Forward = Callable[[Array, Array], tuple[Array, Array, LogdetInfo]]
Inverse = Callable[[Array, Array], tuple[Array, Array, LogdetInfo, FixedPointInfo]]


class Bijection(NamedTuple):
    """An invertible map of batches, on weights in its closure.

    Attributes:
        forward: ``x -> y``.
        forward_and_logdet: ``(x, key) -> (y, log|det dy/dx|, LogdetInfo)``; one key, or one an example.
        inverse: ``y -> (x, FixedPointInfo)``.
        inverse_and_logdet: ``(y, key) -> (x, log|det dx/dy|, LogdetInfo, FixedPointInfo)``.
        inverse_lipschitz: Upper bound of ``Lip(F^-1)``, if those of its parts are.
    """

    forward: Callable[[Array], Array]
    forward_and_logdet: Forward
    inverse: Callable[[Array], tuple[Array, FixedPointInfo]]
    inverse_and_logdet: Inverse
    inverse_lipschitz: float | Float[Array, ""]


class Solver(NamedTuple):
    """Settings of each block's inverse, see `fixed_point.invert_residual`.

    Attributes:
        atol: Tolerance of the preimage (Euclidean norm of an example).
        max_evals: Cap on evaluations of the branch.
        memory: Steps that Anderson's method remembers; 0 is plain Banach iteration.
        refine: Whether to go on in float64 from what float32 found, see `residual.inverse`.
        diagonal: Whether to use the diagonal of a branch's Jacobian, where it has a closed form.
    """

    atol: float = 1e-6
    max_evals: int = 2000
    memory: int = 4
    refine: bool = False
    diagonal: bool = True


def no_logdet_error(batch: Array) -> LogdetInfo:
    """The information of a log-determinant known exactly."""
    zeros = jnp.zeros(batch.shape[0], batch.dtype)
    return LogdetInfo(stderr=zeros, truncation_bound=zeros)


def no_inverse_error(batch: Array) -> FixedPointInfo:
    """The information of an inverse in closed form."""
    zeros = jnp.zeros(batch.shape[0], batch.dtype)
    nothing = jnp.zeros(batch.shape[0], jnp.int32)
    return FixedPointInfo(num_evals=nothing, residual=zeros, error_bound=zeros, converged=nothing == 0)


def add_logdet_info(a: LogdetInfo, b: LogdetInfo) -> LogdetInfo:
    """The information of a sum of two log-determinants with independent probes."""
    return LogdetInfo(jnp.sqrt(a.stderr**2 + b.stderr**2), a.truncation_bound + b.truncation_bound)


def follow_inverse_info(later: FixedPointInfo, own: FixedPointInfo, inverse_lipschitz) -> FixedPointInfo:
    """The information of ``F^-1`` applied to the result of an inverse that ended as `later` says."""
    inherited = jnp.where(later.error_bound > 0, inverse_lipschitz * later.error_bound, 0)  # infinity times no error is none
    return FixedPointInfo(
        num_evals=later.num_evals + own.num_evals,
        residual=jnp.maximum(later.residual, own.residual),
        error_bound=own.error_bound + inherited,
        converged=later.converged & own.converged,
    )


def fold_in(key: Key[Array, "..."], data: int | Array) -> Key[Array, "..."]:
    """``jax.random.fold_in`` for one key or one an example."""
    return jax.random.fold_in(key, data) if key.ndim == 0 else jax.vmap(lambda k: jax.random.fold_in(k, data))(key)


def exact_bijection(
    forward_and_logdet: Callable, inverse_and_logdet: Callable, inverse_lipschitz: float | Array = 1.0
) -> Bijection:
    """A bijection in closed form from ``x -> (y, logdet)`` and ``y -> (x, logdet)``."""

    def forward_with_info(x, key):
        del key
        return (*forward_and_logdet(x), no_logdet_error(x))

    def inverse_with_info(y, key):
        del key
        return (*inverse_and_logdet(y), no_logdet_error(y), no_inverse_error(y))

    return Bijection(
        forward=lambda x: forward_and_logdet(x)[0],
        forward_and_logdet=forward_with_info,
        inverse=lambda y: (inverse_and_logdet(y)[0], no_inverse_error(y)),
        inverse_and_logdet=inverse_with_info,
        inverse_lipschitz=inverse_lipschitz,
    )


def permutation_bijection(forward: Callable[[Array], Array], inverse: Callable[[Array], Array]) -> Bijection:
    """A bijection that moves entries around: volume preserving, an isometry."""

    def with_zero(function):
        return lambda x: (function(x), jnp.zeros(x.shape[0], x.dtype))

    return exact_bijection(with_zero(forward), with_zero(inverse))


def squeeze_bijection(factor: int) -> Bijection:
    """Space to depth, see `reshape.squeeze`."""
    return permutation_bijection(lambda x: reshape.squeeze(x, factor), lambda y: reshape.unsqueeze(y, factor))


def flatten_bijection(event_shape: tuple[int, ...]) -> Bijection:
    """Images of one shape as vectors."""
    return permutation_bijection(reshape.flatten, lambda z: reshape.unflatten(z, event_shape))


def actnorm_bijection(params: actnorm.ActNormParams) -> Bijection:
    """``y = (x + bias) exp(log_scale)`` by channel, see `actnorm`."""
    bijection = exact_bijection(
        lambda x: actnorm.forward_and_logdet(params, x),
        lambda y: actnorm.inverse_and_logdet(params, y),
        inverse_lipschitz=jnp.exp(-jnp.min(params.log_scale)),
    )

    def rounding(x):  # of y exp(-log_scale), whose size is that of x + bias, and of the difference
        eps = jnp.finfo(x.dtype).eps
        shifted = x + params.bias.reshape((1,) * (x.ndim - 1) + (-1,))
        return no_inverse_error(x)._replace(error_bound=eps * (4 * example_norm(shifted) + example_norm(x)))

    def inverse(y):
        x, _ = bijection.inverse(y)
        return x, rounding(x)

    def inverse_and_logdet(y, key):
        x, logdet, info, _ = bijection.inverse_and_logdet(y, key)
        return x, logdet, info, rounding(x)

    return bijection._replace(inverse=inverse, inverse_and_logdet=inverse_and_logdet)


def residual_bijection(
    branch: residual.Branch,
    lipschitz_bound: float | Float[Array, ""],
    estimator: LogdetEstimator,
    solver: Solver = Solver(),  # noqa: B008 (immutable)
    trace: Trace | None = None,
    at_zero: residual.AtZero | None = None,
    diagonal: Diagonal | None = None,
) -> Bijection:
    """``y = x + g(x)``, see `residual`.

    Args:
        branch: ``g``.
        lipschitz_bound: Upper bound of ``Lip(g)``.
        estimator: Of the log-determinant.
        solver: Of the inverse.
        trace: ``tr J_g``, if it has a closed form.
        at_zero: Gives ``g(0)``, if it is the same for all examples.
        diagonal: That of ``J_g``, if it has a closed form.
    """
    margin = jnp.maximum(1 - jnp.asarray(lipschitz_bound), 0)
    known = {"lipschitz_bound": lipschitz_bound, "at_zero": at_zero, "diagonal": diagonal if solver.diagonal else None}
    solve = solver._asdict() | known
    return Bijection(
        forward=lambda x: residual.forward(branch, x),
        forward_and_logdet=lambda x, key: residual.forward_and_logdet(
            branch, x, key, estimator, lipschitz_bound=lipschitz_bound, trace=trace
        ),
        inverse=lambda y: residual.inverse(branch, y, **solve),
        inverse_and_logdet=lambda y, key: residual.inverse_and_logdet(branch, y, key, estimator, trace=trace, **solve),
        inverse_lipschitz=1 / margin,
    )
