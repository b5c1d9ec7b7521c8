r"""``log|det J|`` with a guaranteed error, from a triangular factorisation that need not be right.

**Setting.** ``J`` is an exact ``d x d`` matrix with ``|J^-1|_2 <= beta``; ``J = I + J_g`` has ``beta = 1 / (1 - Lip(g))``.
``A`` is what was computed of it, ``|J - A|_2 <= eps``. ``L`` and ``U`` are any triangular matrices, ``L`` with a unit diagonal,
``P`` is any permutation, and ``E = P A - L U`` says how well they factorise ``A``.

**Theorem.** Let ``m = beta (eps + |E|_F) < 1``. Then

    | log|det J| - sum_i log|u_ii| | <= beta (d eps + sqrt(d) |E|_F) / (1 - m).

*Proof.* ``P^T L U = A - P^T E = J - G`` with ``G = (J - A) + P^T E``. Hence ``|det J| |det(I - J^-1 G)| = |det(L U)|``, which
is ``prod |u_ii|``. Let ``lambda_i`` be the eigenvalues of ``M = J^-1 G``. They satisfy ``|lambda_i| <= |M|_2 <= m < 1``, hence

    | log|1 - lambda_i| | <= -log(1 - |lambda_i|) <= |lambda_i| / (1 - m).

Their sum is at most that of the singular values of ``M`` (Weyl 1949), ``sum |lambda_i| <= |M|_* <= beta |G|_*``, and
``|G|_* <= d |J - A|_2 + sqrt(d) |E|_F``. Adding up the logarithms gives the bound.

LAPACK's factorisation is a guess that is verified: ``E`` is computed in float64, and what its rounding may be, up to
``gamma_n (|L|_F |U|_F + |A|_F)`` (Higham 2002, sec. 3.5), is added to its norm. A bad factorisation makes the error large and
never wrong. Logarithms of pivots are those of `ball_arithmetic`.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from iresnet_jax.maths.enclosures import ball_arithmetic
from iresnet_jax.maths.enclosures.ball_arithmetic import Ball
from iresnet_jax.maths.enclosures.upward_rounding import UP, frobenius_bound, gamma


class Factors(NamedTuple):
    """What a triangular factorisation says of a determinant.

    Attributes:
        pivots: Diagonal of ``U``.
        residual: Bound of ``|P A - L U|_F``; infinite if ``P`` is no permutation.
    """

    pivots: Float[Array, "... d"]
    residual: Float[Array, "..."]


def factorize(matrix: Float[Array, "d d"]) -> Factors:
    """A triangular factorisation of a float64 matrix, verified."""
    d = len(matrix)
    packed, _, permutation = lax.linalg.lu(matrix)
    lower, upper = jnp.tril(packed, -1) + jnp.eye(d), jnp.triu(packed)
    rounding = gamma(d + 2) * (frobenius_bound(lower) * frobenius_bound(upper) + frobenius_bound(matrix))
    residual = (frobenius_bound(matrix[permutation] - lower @ upper) + rounding) * UP
    permutes = jnp.all(jnp.sort(permutation) == jnp.arange(d))
    return Factors(jnp.diagonal(upper), jnp.where(permutes, residual, jnp.inf))


@np.errstate(all="ignore")
def log_abs_det(factors: Factors, distance: Float[np.ndarray, "..."], inverse_norm: Float[np.ndarray, "..."]) -> Ball:
    """``log|det J|`` by the module's theorem; unknown where it does not apply.

    Args:
        factors: Verified factors of ``A``, of any leading axes.
        distance: Bounds ``eps`` of ``|J - A|_2``.
        inverse_norm: Bounds ``beta`` of ``|J^-1|_2``.
    """
    pivots, residual = (np.asarray(part, np.float64) for part in factors)
    d = pivots.shape[-1]
    size = inverse_norm * (distance + residual) * UP
    trace_norm = inverse_norm * (d * distance + np.sqrt(d) * residual) * UP
    error = np.where(size < 1, trace_norm / np.where(size < 1, 1 - size, 1) * UP, np.inf)
    return ball_arithmetic.log(Ball.of(np.abs(pivots))).sum().widened(error)
