"""``log det(I + J)`` of a residual block from its full Jacobian."""

import math
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from iresnet_jax.maths.enclosures.upward_rounding import as_floats
from iresnet_jax.maths.logdet.estimator import Batch, Branch, Jacobian, LogdetEstimator, LogdetInfo
from iresnet_jax.maths.logdet.jacobian_products import Linearized, linearize

INVERSE_JACOBIANS = "inverse Jacobians"  # their name for a backward pass that chooses what to keep
COLUMNS_AT_ONCE = 64  # of a Jacobian that products with unit vectors give
SMALL = 32  # dimensions up to which elimination without exchanges of rows is the faster, see `log_abs_det`


def dense_logdet(branch: Branch | Linearized, x: Batch, *, jacobian: Jacobian | None = None) -> Float[Array, " b"]:
    """``log det(I + J)`` from the full Jacobian by elimination; exact to rounding, differentiable.

    Costs ``d`` Jacobian-vector products, or the closed form, and ``O(d^3)`` per example: for dimensions up to about a thousand.
    Up to `SMALL` rows are not exchanged, see `log_abs_det`.

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
    matrices = jnp.eye(num_dims, dtype=x.dtype)[None] + full
    return log_abs_det(matrices) if num_dims <= SMALL else jnp.linalg.slogdet(matrices)[1]


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
    r"""Sum of the logarithms of the pivots of Gaussian elimination without exchanges of rows, for all examples side by side.

    For ``|J|_2 < 1`` the symmetric part of ``I + J`` is positive definite. A Schur complement inherits that: its inverse is a
    diagonal block of the inverse. So all pivots are positive, and they are at least ``1 - |J|_2``, as the inverse of a pivot is
    at most ``|(I + J)^-1|``. The derivative is ``tr((I + J)^-1 dJ)``. LAPACK's batches of factorisations can dead-lock on
    several simulated CPU devices, which this cannot.
    """
    return eliminate(matrices)[0]


@log_abs_det.defjvp
def _derivative(primals, tangents):
    logdet, inverses = eliminate(*primals)
    inverses = checkpoint_name(inverses, INVERSE_JACOBIANS)
    return logdet, jnp.sum(jnp.swapaxes(inverses, 1, 2) * tangents[0], axis=(1, 2))


def eliminate(matrices: Float[Array, "b d d"]) -> tuple[Float[Array, " b"], Float[Array, "b d d"]]:
    """Logarithms of the pivots, summed, and the inverses, by Gauss-Jordan elimination as in `log_abs_det`.

    Examples are on the last axis meanwhile.
    """
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
