r"""Norms of matrices from above, by Gram iteration that carries its own rounding bound (Delattre et
al. 2023).

For any matrix, ``|M|_2^2 = |M M*|_2``. So with ``M_0 = M``, ``N_i = M_i / s_i`` and
``M_{i+1} = N_i N_i*``,

    ``|M_i|_2 = s_i |M_{i+1}|_2^{1/2}``   and, at the end,   ``|M_t|_2 <= |M_t|_F``.

Unwinding the ``t`` roots gives a bound that is too large by a factor of at most
``rank^(2^-(t+1))``. The ``s_i`` are powers of two, so dividing is exact.

**Rounding.** Let ``u`` be half of machine epsilon and ``gamma_n = n u / (1 - n u)``. A
floating-point inner product of length ``d`` summed in blocks of ``b`` is off by at most ``gamma_{b
+ d/b}`` times the sum of the absolute products, in any order within and across blocks (Higham 2002,
sec. 3.1). So with ``N = A + iB`` and ``H = |A| + |B|`` the computed ``N N*``, two real products, is
off by at most ``gamma H H^T`` entry by entry, and also by at most ``sqrt(2) gamma |N|_F^2`` in the
Frobenius norm (``gamma |N|_F^2`` if ``B = 0``). The error's spectral norm is at most the Frobenius
bound, and at most the largest row sum of ``gamma H H^T``; with ``e_i`` the smaller of the two,

    ``|M_i|_2 <= s_i (|M_{i+1}|_2 + e_i)^{1/2}``   with the computed ``M_{i+1}``,

and these are the roots that are unwound.

The scalar operations left over (two roundings a level, halved by every root) are covered by a
factor ``1 + 8 eps``. The arithmetic assumed is IEEE with true float32 products
(``Precision.HIGHEST``; CPUs and GPUs). Measured up to 512 channels, rounding and the slack of
"exact" together cost at most 6e-4 in float32 (2.5e-4 for random weights) and 2e-12 in float64.
"""

import math

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from iresnet_jax.maths.upward_rounding import gamma, power_of_two

# "exact" squares until the rank factor is below 1 + _EXACT_SLACK eps: 1.2e-4 or 2.3e-13
_EXACT_SLACK = 2.0**10
MARGIN = 1.01  # covers the rounding of the rounding terms themselves, up to 5e4 rows in float32
_BLOCK = 32  # shortest block of a blocked inner product


def norm_bound(matrix: Float[Array, "parts r d"], num_squarings: int | None) -> Float[Array, ""]:
    """Bounds the largest singular value of one matrix from above, rounding included;
    differentiable.

    Args:
        matrix: One part, or the real and the imaginary part, with ``r <= d`` rows; entries of
            moderate size.
        num_squarings: How often the Gram matrix is squared; None squares until the slack is 1.2e-4
            in float32, 2.3e-13 in float64.
    """
    eps = float(jnp.finfo(matrix.dtype).eps)
    parts, rows, _ = matrix.shape
    if num_squarings is None:
        slack = _EXACT_SLACK * eps
        num_squarings = max(0, math.ceil(math.log2(max(math.log(rows), slack) / slack)) - 2)

    def descend(matrix, _=None):
        scale = power_of_two(frobenius(matrix))
        matrix = matrix / scale
        return _gram(matrix), (scale, _gram_error(matrix))

    def ascend(bound, level):
        scale, error = level
        return scale * _safe_sqrt(bound + error), None

    first, first_level = descend(matrix)
    last, levels = lax.scan(descend, first, length=num_squarings)
    bound = frobenius(last) * (1 + gamma(parts * (rows + 1) + rows + 4, matrix.dtype))
    bound, _ = lax.scan(ascend, bound, levels, reverse=True)
    bound, _ = ascend(bound, first_level)
    return bound * (1 + 8 * eps)


def _gram(matrix):
    """``M M*`` in blocked inner products, for a matrix given by its one or two parts."""
    parts, rows, _ = matrix.shape
    right = jnp.concatenate(list(matrix), axis=-1)
    left = right
    if parts == 2:
        left = jnp.concatenate([right, jnp.concatenate([matrix[1], -matrix[0]], axis=-1)])
    block, num_blocks = _blocks(matrix)
    pad = ((0, 0), (0, block * num_blocks - right.shape[1]))
    left, right = (
        jnp.moveaxis(jnp.pad(x, pad).reshape(-1, num_blocks, block), 1, 0) for x in (left, right)
    )

    def add_block(total, pair):
        return total + jnp.matmul(pair[0], pair[1].T, precision=lax.Precision.HIGHEST), None

    # A loop: the compiler may merge a sum over a batched product into one long inner product.
    total = jnp.matmul(left[0], right[0].T, precision=lax.Precision.HIGHEST)
    if num_blocks > 1:
        total, _ = lax.scan(add_block, total, (left[1:], right[1:]))
    return total.reshape(parts, rows, rows)


def _blocks(matrix):
    """Block length and number of blocks of the inner products in `_gram`."""
    inner = matrix.shape[0] * matrix.shape[2]
    block = min(inner, max(_BLOCK, math.isqrt(inner)))
    return block, -(-inner // block)


def _gram_error(matrix):
    """Bound of ``|fl(M M*) - M M*|_2`` for `_gram`, as a constant: ``e_i`` in the module's
    docstring.
    """
    matrix = lax.stop_gradient(matrix)
    absolute = jnp.sum(jnp.abs(matrix), axis=0)
    row_sums = absolute @ jnp.sum(absolute, axis=0)
    squared = math.sqrt(matrix.shape[0]) * jnp.square(frobenius(matrix))
    return (
        MARGIN * gamma(sum(_blocks(matrix)), matrix.dtype) * jnp.minimum(squared, jnp.max(row_sums))
    )


def frobenius(matrix: Float[Array, "... d"]) -> Float[Array, ""]:
    """Frobenius norm in two stages, so that it rounds like a sum of rows + columns terms;
    gradient 0 at 0.
    """
    rows = lax.optimization_barrier(jnp.sum(jnp.square(matrix), axis=-1))
    return _safe_sqrt(jnp.sum(rows))


def _safe_sqrt(x):
    zero = x == 0
    return jnp.where(zero, 0, jnp.sqrt(jnp.where(zero, 1, x)))
