r"""The monotone block ``F = (I - g)(I + g)^-1`` with ``Lip(g) < 1`` (Ahn et al. 2022, "Invertible Monotone Operators").

With factors of ``sqrt(2)``, which make it an isometry for ``g = 0`` and symmetric in ``x`` and ``y``:

    w + g(w) = sqrt(2) x,    y = sqrt(2) w - x = (w - g(w)) / sqrt(2).

As ``w - g(w) = sqrt(2) y`` and ``x = sqrt(2) w - y``, the inverse is the block of ``-g``. Each way takes one solve, that of a
residual block's inverse. Jacobians at ``w`` give

    J_F = (I - J)(I + J)^-1,    log det J_F = log det(I - J) - log det(I + J) = -2 sum_(k odd) tr(J^k) / k.

**Bounds.** For two inputs, ``2 <dx, dy> = <dw + dg, dw - dg> = |dw|^2 - |dg|^2 >= 0``: ``F`` is monotone. As
``|dw + dg| >= (1 - L) |dw|`` and ``|dw - dg| <= (1 + L) |dw|``, both ``Lip(F)`` and ``Lip(F^-1)`` are at most
``(1 + L)/(1 - L)``; a residual block stretches by at most ``1 + L < 2``. An error of ``w`` is ``sqrt(2)`` times as large in
``y``.

Derivatives are those of the exact ``w`` (implicit function theorem), by weights and inputs, see `fixed_point.invert_residual`.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from iresnet_jax.bijections import residual
from iresnet_jax.bijections.bijection import Bijection
from iresnet_jax.bijections.residual import Solver
from iresnet_jax.branches.branch import AnyBranch
from iresnet_jax.maths.inverse.fixed_point import FixedPointInfo, broadcast_to_examples, example_norm
from iresnet_jax.maths.lipschitz_bounds import monotone_block_bounds
from iresnet_jax.maths.logdet.estimator import LogdetEstimator, LogdetInfo

SQRT2 = math.sqrt(2)


class Resolved(NamedTuple):
    """A solved block.

    Attributes:
        y: Output.
        w: Where the branch stands, ``w + g(w) = sqrt(2) x``.
        info: How the solve ended; ``error_bound`` is that of ``y``.
    """

    y: Float[Array, "b ..."]
    w: Float[Array, "b ..."]
    info: FixedPointInfo


def resolve(branch: AnyBranch, x: Float[Array, "b ..."], solver: Solver = Solver()) -> Resolved:
    """``y = F(x)`` with ``w`` and the verdict of its solve; the inverse is ``resolve(-branch, y)``.

    Args:
        branch: ``g``.
        x: Inputs.
        solver: Settings of the solve; ``atol`` is the tolerance of ``w``.
    """
    w, info = residual.inverse(branch, SQRT2 * x, solver)
    y = SQRT2 * w - x
    rounding = 2 * jnp.finfo(w.dtype).eps * (2 * example_norm(w) + example_norm(x))  # of the products by sqrt(2) and the sum
    return Resolved(y, w, info._replace(error_bound=SQRT2 * info.error_bound + rounding))


def forward(branch: AnyBranch, x: Float[Array, "b ..."], solver: Solver = Solver()) -> tuple[Array, Array]:
    """``y = F(x)``, NaN for an example whose solve did not converge, and ``w``."""
    y, w, info = resolve(branch, x, solver._replace(refine=False))
    return jnp.where(broadcast_to_examples(info.converged, y), y, jnp.nan), w


def logdet(
    branch: AnyBranch, w: Float[Array, "b ..."], key: Key[Array, "..."] | None, estimator: LogdetEstimator
) -> tuple[Float[Array, " b"], LogdetInfo]:
    """``log det(I - J) - log det(I + J)`` at ``w``; one key, or one per example."""
    with jax.named_scope(residual.LOG_DETERMINANT):
        return estimator(branch, w, key, **known(branch))


def known(branch: AnyBranch) -> dict[str, Any]:
    """What a branch knows for the estimate of its block's log-determinant, as an estimator takes it."""
    above, below = branch.logdet, (-branch).logdet
    exact = None if above is None or below is None else lambda w: below(w) - above(w)
    return {**residual.known(branch), "logdet": exact, "quotient": True}


def monotone_bijection(branch: AnyBranch, estimator: LogdetEstimator, solver: Solver = Solver()) -> Bijection:
    """The monotone block as a bijection, ``Lip(F)`` and ``Lip(F^-1)`` at most ``(1 + L)/(1 - L)``.

    The way forward has no place for a verdict: an example whose solve does not converge is NaN there. The log-determinant is
    that at the computed ``w``.

    Args:
        branch: ``g``.
        estimator: Log-determinant.
        solver: Settings of both solves; ``refine`` concerns the inverse.
    """

    def forward_and_logdet(x, key):
        y, w = forward(branch, x, solver)
        return (y, *logdet(branch, w, key, estimator))

    def inverse(y):
        x, _, info = resolve(-branch, y, solver)
        return x, info

    def inverse_and_logdet(y, key):
        x, w, info = resolve(-branch, y, solver)
        value, logdet_info = logdet(branch, w, key, estimator)
        return x, -value, logdet_info, info

    return Bijection(
        forward=lambda x: forward(branch, x, solver)[0],
        forward_and_logdet=forward_and_logdet,
        inverse=inverse,
        inverse_and_logdet=inverse_and_logdet,
        inverse_lipschitz=monotone_block_bounds(jnp.asarray(branch.lipschitz_bound)).inverse,
    )
