r"""Approximate inverses of the Jacobians along a trajectory, their products, and bounds of how wrong each may be.

Everything is computed in float64 and bounded with its own rounding: a sum of ``n`` products in any order errs by at most
``gamma_n |A| |B|`` entry by entry, ``gamma_n = n u / (1 - n u)`` and ``u = 2^-53`` (Higham 2002, sec. 3.5), and so by
``gamma_n |A|_F |B|_F`` in the norm. No solver is trusted. Results are what `shadowing` takes.

A step acts on some coordinates of a vector of ``d`` and leaves the others alone, as behind a multi-scale split.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from iresnet_jax.maths.upward_rounding import UP, frobenius_bound, gamma


class Inverses(NamedTuple):
    """Approximate inverses of a group of matrices of one size.

    Attributes:
        forward: The matrices that were inverted, ``M_t``.
        matrices: ``R_t``.
        norms: Bounds of ``|R_t|_2``.
        defects: Bounds of ``|R_t J_t - I|_2`` for every ``J_t`` within the given distance of the matrix that was inverted.
        jacobians: Bounds of ``|J_t|_2``.
    """

    forward: Float[Array, "k d d"]
    matrices: Float[Array, "k d d"]
    norms: Float[Array, " k"]
    defects: Float[Array, " k"]
    jacobians: Float[Array, " k"]


class ProductTables(NamedTuple):
    """Norms of computed products ``P_{s,t} = R_s ... R_t``, and what rounding contributed.

    Attributes:
        norms: Bounds of ``|P_{s,t}|_2``.
        rounding: Bounds of ``|P_{s,t} - P_{s,t-1} R_t|_2``.
    """

    norms: Float[Array, "r t"]
    rounding: Float[Array, "r t"]


def norm_bound(matrix: Float[Array, "n m"]) -> Float[Array, ""]:
    """Bound of the 2-norm: ``|A|_2^2 <= |A^T A|_F``, close to it where few singular values are large."""
    size = frobenius_bound(matrix)
    gram = frobenius_bound(matrix.T @ matrix) + gamma(matrix.shape[0] + 2) * size**2
    return jnp.minimum(size, jnp.sqrt(gram) * UP)


def invert(matrix: Float[Array, "d d"], distance: Float[Array, ""]) -> Inverses:
    """An approximate inverse, verified.

    Args:
        matrix: ``M``.
        distance: Bound of ``|M - J|_2``.
    """
    d = len(matrix)
    inverse = jnp.linalg.inv(matrix)
    size, own = frobenius_bound(inverse), frobenius_bound(matrix)
    norm = norm_bound(inverse)
    defect = frobenius_bound(inverse @ matrix - jnp.eye(d)) + gamma(d + 2) * (size * own + d**0.5)
    return Inverses(matrix, inverse, norm, (defect + norm * distance) * UP, (norm_bound(matrix) + distance) * UP)


def product_tables(
    matrices: Sequence[Float[Array, "_ _ _"]],
    active: Sequence[Int[Array, " _"]],
    num_dims: int,
    num_rows: int,
) -> ProductTables:
    """Norms of products of the steps' matrices, from each of the first rows on.

    Args:
        matrices: Approximate inverses ``R_t`` of the steps, a group for each set of coordinates.
        active: Coordinates that each group acts on.
        num_dims: Length of the whole vector.
        num_rows: Rows ``s`` to compute: one product of matrices for each ``t >= s``, and one more for its norm.
    """
    starts = np.cumsum([0, *(len(group) for group in matrices)])
    num = int(starts[-1])

    def row(s, tables):
        state = (jnp.eye(num_dims), jnp.asarray(num_dims**0.5), tables)
        for group, entries, start, end in zip(matrices, active, starts[:-1], starts[1:], strict=True):

            def step(t, state, group=group, entries=entries, start=int(start)):
                product, size, tables = state
                matrix = group[t - start]
                rounding = gamma(len(entries)) * size * frobenius_bound(matrix) * UP
                product = product.at[:, entries].set(product[:, entries] @ matrix)
                norms, roundings = tables
                tables = ProductTables(norms.at[s, t].set(norm_bound(product)), roundings.at[s, t].set(rounding))
                return product, frobenius_bound(product), tables

            state = lax.fori_loop(jnp.maximum(s, start), end, step, state)
        return state[-1]

    empty = jnp.zeros((num_rows, num))
    return lax.fori_loop(0, num_rows, row, ProductTables(empty, empty))


def solve_backward(
    inverses: Sequence[Inverses], active: Sequence[Int[Array, " _"]], residuals: Float[Array, "t d"]
) -> Float[Array, "t d"]:
    """The correction ``e_t = R_t (e_{t+1} - r_t)`` of every point of a trajectory, ``e_T = 0``: a Newton step."""
    ends = np.cumsum([len(group.norms) for group in inverses])
    later, corrections = jnp.zeros(residuals.shape[1]), []
    for group, entries, end in reversed(list(zip(inverses, active, ends, strict=True))):

        def step(later, own, entries=entries):
            inverse, r = own
            now = later.at[entries].set(inverse @ (later - r)[entries])
            return now, now

        own = (group.matrices, residuals[end - len(group.norms) : end])
        later, found = lax.scan(step, later, own, reverse=True)
        corrections.append(found)
    return jnp.concatenate(corrections[::-1])


def invert_group(matrices: Float[Array, "k d d"], distances: Float[Array, " k"]) -> Inverses:
    """`invert` of each matrix."""
    return lax.map(lambda own: invert(*own), (matrices, jnp.asarray(distances)))
