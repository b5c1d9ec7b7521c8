r"""Exact ``log det(I + J)`` of a residual block, from its full Jacobian or from the stencil of a
branch of convolutions.

An output of convolutions depends on inputs at most ``reach`` pixels away. The Jacobian is then a
stencil: for each pixel one matrix of channels for each of its ``(2 reach + 1)^2`` neighbours.
Columns whose pixels are ``2 reach + 1`` rows or columns of the image apart share no row, so one
product with the sum of their unit vectors gives all of them (Curtis, Powell and Reid 1974): ``(2
reach + 1)^2 c`` products in place of ``h w c``.

With ``reach`` rows of pixels as a block, ``I + J`` is block tridiagonal, and elimination block by
block gives

    S_1 = A_11,    S_(i+1) = A_(i+1,i+1) - A_(i+1,i) S_i^-1 A_(i,i+1)
    log det(I + J) = sum_i log det S_i

in ``6 m^3`` operations for each block of ``m = reach w c`` rows; a dense matrix takes ``2/3 (h w
c)^3``. For ``|J|_2 < 1`` no rows need to be exchanged, see `log_abs_det`.
"""

import functools
import math
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from iresnet_jax.maths.logdet_estimator import (
    Batch,
    Branch,
    Jacobian,
    Linearized,
    LogdetEstimator,
    LogdetInfo,
    linearize,
)
from iresnet_jax.maths.upward_rounding import as_floats

INVERSE_JACOBIANS = "inverse Jacobians"  # their name, for backward passes that choose what to keep
COLUMNS_AT_ONCE = 64  # columns of a Jacobian that are computed together
SMALL = 32  # rows up to which a matrix is eliminated row by row, not by halves

MOST_ENTRIES = 2**24  # entries of blocks that are in memory together

# For each output pixel (h, w): neighbour's row and column (s, t), output and input channel.
Stencil = Float[Array, "b h w s t c c"]

# Accelerators' default precision would be coarser.
product = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)


def dense_logdet(
    branch: Branch | Linearized, x: Batch, *, jacobian: Jacobian | None = None
) -> Float[Array, " b"]:
    """``log det(I + J)`` from the full Jacobian by elimination; exact to rounding, differentiable.

    Costs ``d`` Jacobian-vector products, or the closed form, and ``O(d^3)`` per example: for
    dimensions up to about a thousand. Rows are not exchanged, which needs a contraction, see
    `log_abs_det`.

    Args:
        branch: ``g``, acting on each example alone, or linearised at ``x``.
        x: Where to evaluate.
        jacobian: ``x -> J (b, d, d)`` in closed form, if there is one.
    """
    x = as_floats(x)
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

    # Few columns are written out: XLA:CPU multiplies batches of matrices more slowly than matrices.
    if num_dims <= 4:
        columns = jnp.stack([column(direction) for direction in basis])
    else:
        columns = lax.map(column, basis, batch_size=min(COLUMNS_AT_ONCE, num_dims))
    return jnp.moveaxis(columns, 0, -1)


@jax.custom_jvp
def log_abs_det(matrices: Float[Array, "b d d"]) -> Float[Array, " b"]:
    r"""``log |det|`` of matrices ``I + J`` with ``|J|_2 < 1``, by elimination without exchanges of
    rows.

    The symmetric part of ``I + J`` is positive definite. A Schur complement inherits this, as its
    inverse is a diagonal block of ``(I + J)^-1``. So all pivots are positive. Each is at least ``1
    - |J|_2``, as its inverse is at most ``|(I + J)^-1|``. The derivative is ``tr((I + J)^-1 dJ)``.
    """
    return logdet_and_inverse(matrices)[0]


@log_abs_det.defjvp
def _derivative(primals, tangents):
    logdet, inverses = logdet_and_inverse(*primals)
    inverses = checkpoint_name(inverses, INVERSE_JACOBIANS)
    return logdet, jnp.sum(jnp.swapaxes(inverses, 1, 2) * tangents[0], axis=(1, 2))


def logdet_and_inverse(
    matrices: Float[Array, "b d d"],
) -> tuple[Float[Array, " b"], Float[Array, "b d d"]]:
    """Logarithm of the determinant and inverse of matrices as `log_abs_det` takes them, by halves.

    With ``[[A, B], [C, D]]`` and ``S = D - C A^-1 B`` the determinant is ``det A det S``. All but
    the smallest blocks are products of matrices, which wait for no thread as batches of LAPACK's
    factorisations do, see `platforms.one_at_a_time`.
    """
    num = matrices.shape[-1]
    if num <= SMALL:
        return eliminate(matrices)
    half = num // 2
    a, b, c, d = (
        matrices[:, i, j]
        for i in (slice(half), slice(half, None))
        for j in (slice(half), slice(half, None))
    )
    logdet_a, inverse = logdet_and_inverse(a)
    right, left = product(inverse, b), product(c, inverse)
    logdet_s, schur = logdet_and_inverse(d - product(c, right))
    corner = product(right, schur)
    whole = jnp.block([[inverse + product(corner, left), -corner], [-product(schur, left), schur]])
    return logdet_a + logdet_s, whole


def eliminate(matrices: Float[Array, "b d d"]) -> tuple[Float[Array, " b"], Float[Array, "b d d"]]:
    """Result of `logdet_and_inverse`, row by row: Gauss-Jordan elimination with the examples on
    the last axis.
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
    """`dense_logdet`, or a branch's own faster method, as an estimator without random error."""

    unbiased: ClassVar[bool] = True

    def _estimate(self, branch, x, key, lipschitz_bound, trace, jacobian, logdet):
        del key, lipschitz_bound, trace
        if logdet is None:
            value = dense_logdet(branch, x, jacobian=jacobian)
        else:
            value = logdet(x)
        zeros = jnp.zeros_like(value)
        return value, LogdetInfo(zeros, zeros)


def stencil_by_products(branch: Branch, x: Float[Array, "b h w c"], reach: int) -> Stencil:
    """The Jacobian of a branch, which takes zeros beyond the border of an image.

    Args:
        branch: ``g``, acting on each example alone.
        x: Where to evaluate.
        reach: Pixels from an output to the furthest input that it depends on, by row or by column.
    """
    h, w, c = x.shape[1:]
    s, t = min(2 * reach + 1, h), min(2 * reach + 1, w)
    rows, columns = (np.arange(n)[None] % k == np.arange(k)[:, None] for n, k in ((h, s), (w, t)))
    probes = np.einsum("sh,tw,kc->stkhwc", rows, columns, np.eye(c)).reshape(-1, 1, h, w, c)
    _, push = jax.linearize(branch, x)
    products = jax.vmap(lambda v: push(jnp.broadcast_to(v, x.shape)))(jnp.asarray(probes, x.dtype))
    # (b, h, w, s, t, c, c)
    products = jnp.moveaxis(products.reshape(s, t, c, *x.shape), (3, 4, 5), (0, 1, 2))
    offsets = np.arange(-reach, reach + 1)
    for axis, (n, k) in enumerate(((h, s), (w, t))):
        source = np.arange(n)[:, None] + offsets[None]  # (place, neighbour)
        index = np.where((source >= 0) & (source < n), source % k, 0)
        shape = [1] * products.ndim
        shape[axis + 1], shape[axis + 3] = index.shape
        products = jnp.take_along_axis(products, jnp.asarray(index.reshape(shape)), axis=axis + 3)
    return products


def stencil_logdet(stencil: Stencil) -> Float[Array, " b"]:
    """``log det(I + J)`` of the Jacobian with this stencil, ``|J|_2 < 1``; neighbours beyond the
    border are ignored.

    Exact to rounding, and differentiable.
    """
    h, w, s, _, c, _ = stencil.shape[1:]
    rows = _block_rows(h, s // 2)
    at_once = max(MOST_ENTRIES // (3 * -(-h // rows) * (rows * w * c) ** 2), 1)
    if len(stencil) <= at_once:
        return _block_elimination(*_blocks(stencil))
    return lax.map(
        lambda one: _block_elimination(*_blocks(one[None]))[0], stencil, batch_size=at_once
    )


def _block_rows(height, reach):
    return min(max(reach, 1), height)


def _blocks(stencil):
    """The blocks ``(i, b, m, m)`` of ``I + J`` below the diagonal, on it and above it; ones on
    the diagonal fill the last.
    """
    b, h, w, s, t, c, _ = stencil.shape
    rows = _block_rows(h, s // 2)
    number = -(-h // rows)
    # (b, output row, neighbour's row, output column, neighbour's column, ...)
    wide = jnp.swapaxes(stencil, 2, 3)
    # Row q of a matrix (w, t), padded to w + t entries and read in rows of w + t - 1, moves to the
    # right by q.
    wide = jnp.pad(wide, ((0, 0),) * 4 + ((0, w), (0, 0), (0, 0))).reshape(
        b, h, s, w * (w + t), c, c
    )
    wide = wide[:, :, :, : w * (w + t - 1)].reshape(b, h, s, w, w + t - 1, c, c)[
        :, :, :, :, t // 2 : t // 2 + w
    ]
    # (output row, neighbour's row, b, output column and channel, input's)
    wide = jnp.transpose(wide, (1, 2, 0, 3, 6, 4, 5))
    wide = jnp.pad(
        wide.reshape(h, s, b, w * c, w * c),
        ((0, number * rows - h), (0, 0), (0, 0), (0, 0), (0, 0)),
    )
    wide = wide.reshape(number, rows, s, b, w * c, w * c)
    first = rows * np.arange(number)

    def block(shift):
        lines = []
        for u in range(rows):
            line = []
            for v in range(rows):
                neighbour, source = shift * rows + v - u + s // 2, first + shift * rows + v
                if 0 <= neighbour < s:
                    inside = jnp.asarray((source >= 0) & (source < h), wide.dtype).reshape(
                        -1, 1, 1, 1
                    )
                    line.append(wide[:, u, neighbour] * inside)
                else:
                    line.append(jnp.zeros_like(wide[:, 0, 0]))
            lines.append(jnp.concatenate(line, axis=-1))
        return jnp.concatenate(lines, axis=-2)

    return block(-1), block(0) + jnp.eye(rows * w * c, dtype=wide.dtype)[None, None], block(1)


def _block_elimination(below, diagonal, above):
    def step(carry, blocks):
        logdet, correction = carry
        next_below, own, right = blocks
        found, inverse = logdet_and_inverse(own - correction)
        return (logdet + found, product(next_below, product(inverse, right))), None

    start = jnp.zeros(diagonal.shape[1], diagonal.dtype), jnp.zeros_like(diagonal[0])
    (logdet, correction), _ = lax.scan(step, start, (below[1:], diagonal[:-1], above[:-1]))
    return logdet + logdet_and_inverse(diagonal[-1] - correction)[0]
