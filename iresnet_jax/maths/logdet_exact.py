"""``log det(I + J)`` of a residual block from its full Jacobian."""

import functools
import math
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from iresnet_jax.maths.jacobian_products import Linearized, linearize
from iresnet_jax.maths.logdet_estimator import Batch, Branch, Jacobian, LogdetEstimator, LogdetInfo
from iresnet_jax.maths.upward_rounding import as_floats

INVERSE_JACOBIANS = "inverse Jacobians"  # their name for a backward pass that chooses what to keep
COLUMNS_AT_ONCE = 64  # of a Jacobian that products with unit vectors give
SMALL = 32  # rows up to which a matrix is eliminated row by row, not by halves

product = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)  # accelerators' default would be coarser


def dense_logdet(branch: Branch | Linearized, x: Batch, *, jacobian: Jacobian | None = None) -> Float[Array, " b"]:
    """``log det(I + J)`` from the full Jacobian by elimination; exact to rounding, differentiable.

    Costs ``d`` Jacobian-vector products, or the closed form, and ``O(d^3)`` per example: for dimensions up to about a thousand.
    Rows are not exchanged, which needs a contraction, see `log_abs_det`.

    Args:
        branch: ``g``, acting on each example alone, or linearised at ``x``.
        x: Where to evaluate.
        jacobian: ``x -> J (b, d, d)`` in closed form, if there is one.
    """
    x = as_floats(x, "x")
    num_dims = math.prod(x.shape[1:])
    if not len(x):
        return jnp.zeros(0, x.dtype)
    full = _by_columns(branch, x) if jacobian is None else jacobian(x)
    return log_abs_det(jnp.eye(num_dims, dtype=x.dtype)[None] + full)


def _by_columns(branch: Branch | Linearized, x: Float[Array, "b ..."]) -> Float[Array, "b d d"]:
    """The Jacobian from its products with the unit vectors."""
    num_dims = math.prod(x.shape[1:])
    basis = jnp.eye(num_dims, dtype=x.dtype).reshape(num_dims, 1, *x.shape[1:])
    at = linearize(branch, x)

    def column(direction):
        return at.push(jnp.broadcast_to(direction, x.shape)).reshape(len(x), num_dims)

    if num_dims <= 4:  # few: written out, since XLA:CPU multiplies batches of matrices more slowly than matrices
        columns = jnp.stack([column(direction) for direction in basis])
    else:
        columns = lax.map(column, basis, batch_size=min(COLUMNS_AT_ONCE, num_dims))
    return jnp.moveaxis(columns, 0, -1)


@jax.custom_jvp
def log_abs_det(matrices: Float[Array, "b d d"]) -> Float[Array, " b"]:
    r"""``log |det|`` of matrices ``I + J`` with ``|J|_2 < 1``, by elimination without exchanges of rows.

    The symmetric part of ``I + J`` is positive definite. A Schur complement inherits that: its inverse is a diagonal block of
    the inverse. So all pivots are positive, and they are at least ``1 - |J|_2``, as the inverse of a pivot is at most
    ``|(I + J)^-1|``. The derivative is ``tr((I + J)^-1 dJ)``.
    """
    return logdet_and_inverse(matrices)[0]


@log_abs_det.defjvp
def _derivative(primals, tangents):
    logdet, inverses = logdet_and_inverse(*primals)
    inverses = checkpoint_name(inverses, INVERSE_JACOBIANS)
    return logdet, jnp.sum(jnp.swapaxes(inverses, 1, 2) * tangents[0], axis=(1, 2))


def logdet_and_inverse(matrices: Float[Array, "b d d"]) -> tuple[Float[Array, " b"], Float[Array, "b d d"]]:
    """Logarithm of the determinant and inverse of matrices as `log_abs_det` takes them, by halves.

    With ``[[A, B], [C, D]]`` and ``S = D - C A^-1 B`` the determinant is ``det A det S``. All but the smallest blocks are
    products of matrices, which wait for no thread as LAPACK's batches of factorisations do, see `platforms.one_at_a_time`.
    """
    num = matrices.shape[-1]
    if num <= SMALL:
        return eliminate(matrices)
    half = num // 2
    a, b, c, d = (matrices[:, i, j] for i in (slice(half), slice(half, None)) for j in (slice(half), slice(half, None)))
    logdet_a, inverse = logdet_and_inverse(a)
    right, left = product(inverse, b), product(c, inverse)
    logdet_s, schur = logdet_and_inverse(d - product(c, right))
    corner = product(right, schur)
    whole = jnp.block([[inverse + product(corner, left), -corner], [-product(schur, left), schur]])
    return logdet_a + logdet_s, whole


def eliminate(matrices: Float[Array, "b d d"]) -> tuple[Float[Array, " b"], Float[Array, "b d d"]]:
    """Result of `logdet_and_inverse`, row by row: Gauss-Jordan elimination with the examples on the last axis."""
    num_dims = matrices.shape[-1]

    def step(k, carry):
        logdet, rest = carry
        is_pivot = (jnp.arange(num_dims) == k)[:, None]
        row, column = (lax.dynamic_index_in_dim(rest, k, axis, keepdims=False) for axis in (0, 1))
        pivot = lax.dynamic_index_in_dim(row, k, 0, keepdims=False)
        row = jnp.where(is_pivot, 1, row) / pivot[None]
        others = jnp.where(is_pivot[None], 0, rest) - column[:, None] * row[None]
        return logdet + jnp.log(jnp.abs(pivot)), jnp.where(is_pivot[:, None], row[None], others)

    start = jnp.zeros(len(matrices), matrices.dtype), jnp.moveaxis(matrices, 0, -1)
    logdet, inverses = lax.fori_loop(0, num_dims, step, start)
    return logdet, jnp.moveaxis(inverses, -1, 0)


@jax.tree_util.register_static
@dataclass(frozen=True)
class ExactLogdet(LogdetEstimator):
    """`dense_logdet`, or a shorter way where a branch has one, as an estimator without randomness and without error."""

    unbiased: ClassVar[bool] = True

    def _estimate(self, branch, x, key, lipschitz_bound, trace, jacobian, logdet):
        del key, lipschitz_bound, trace
        if logdet is None:
            value = dense_logdet(branch, x, jacobian=jacobian)
        else:
            value = logdet(x)
        zeros = jnp.zeros_like(value)
        return value, LogdetInfo(zeros, zeros)
