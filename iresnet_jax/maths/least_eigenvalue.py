r"""Least eigenvalue of a symmetric matrix: an estimate by Lanczos' method, and a verified lower bound of it.

If ``H - s I = L L^T + E`` for any matrix ``L``, then ``H >= s - |E|_2``, as ``L L^T`` is positive semidefinite (Rump 2006). A
Cholesky factor proves a bound so, and nothing is assumed of how it was computed: ``E`` is computed from it by products, and its
Frobenius norm bounds ``|E|_2``.

For ``|G|_2 < 1`` the symmetric part of ``I + G`` is positive definite, and ``<x, (I + G) x> >= lambda |x|^2`` gives
``|(I + G)^-1|_2 <= 1 / lambda`` with the least eigenvalue ``lambda`` of that part.
"""

import itertools
from collections.abc import Callable, Iterable

import numpy as np
from jaxtyping import Float

from iresnet_jax.maths.row_blocks import RowBlocks
from iresnet_jax.maths.upward_rounding import UP, U, gamma

Array = np.ndarray
_BELOW = (0.005, 0.05, 0.3)  # of the estimate by which bounds are tried below it
_MOST_STEPS = 40  # of Lanczos' method


def least_eigenvalue_estimate(apply: Callable[[Array], Array], num_dims: int) -> tuple[float, float]:
    """Lanczos' estimate of the least eigenvalue of a symmetric map, and the residual of its eigenvector; guaranteed is neither.

    Args:
        apply: The map of vectors ``(d,)``.
        num_dims: ``d``.
    """
    rng = np.random.default_rng(0)
    start = rng.normal(size=num_dims)
    vectors, diagonal, beside = [start / np.linalg.norm(start)], [], []
    for _ in range(min(_MOST_STEPS, num_dims)):
        image = apply(vectors[-1])
        diagonal.append(float(vectors[-1] @ image))
        for _ in range(2):  # orthogonal to all vectors so far, twice for rounding
            basis = np.array(vectors)
            image = image - basis.T @ (basis @ image)
        beside.append(float(np.linalg.norm(image)))
        if beside[-1] <= 1e-12:
            break
        vectors.append(image / beside[-1])
    if not np.all(np.isfinite(diagonal)):
        return np.nan, np.nan
    values, small = np.linalg.eigh(np.diag(diagonal) + np.diag(beside[:-1], -1))  # which reads the lower half
    return float(values[0]), float(abs(small[-1, 0]) * beside[-1])


def least_eigenvalue_bound(matrix: RowBlocks, at_least: float) -> float:
    """A verified lower bound of the least eigenvalue, near to it where Lanczos' method finds it.

    Args:
        matrix: A symmetric matrix.
        at_least: A known lower bound, returned where no greater one is found.
    """
    estimate, residual = least_eigenvalue_estimate(_product(matrix), _num_dims(matrix))
    size = abs(estimate)
    shifts = (estimate - min(residual, below * size) - below * size for below in _BELOW)
    return _first_bound(matrix, (shift for shift in shifts if shift > at_least), at_least)


def _first_bound(matrix: RowBlocks, shifts: Iterable[float], known: float) -> float:
    """The bound at the first of some shifts where it is greater than what is known; what is known if there is none."""
    return next((bound for shift in shifts if (bound := _bound_at(matrix, shift)) > known), known)


def _bound_at(matrix: RowBlocks, shift: float) -> float:
    """``s - |E|`` with the factor of ``H - s I``, for matrices within two roundings of the given entries; no factor is -inf."""
    shifted = {place: block for place, block in matrix.blocks.items() if place[0] >= place[1]}
    for i in range(matrix.num_rows):
        shifted[i, i] = shifted[i, i] - shift * np.eye(len(shifted[i, i]))
    try:
        factor = cholesky(RowBlocks(shifted, matrix.num_rows))
    except np.linalg.LinAlgError:
        return -np.inf
    rows = [factor.columns_of(i) for i in range(matrix.num_rows)]
    total, num_dims = 0.0, _num_dims(matrix)
    for i in range(matrix.num_rows):
        for j in range(i + 1):
            common = [k for k in rows[j] if k in rows[i]]
            if not common and (i, j) not in shifted:
                continue
            rest = shifted.get((i, j), 0.0) - sum(factor.blocks[i, k] @ factor.blocks[j, k].T for k in common)
            total += (1 if i == j else 2) * float(np.vdot(rest, rest))
    size, of_factor = matrix.frobenius() * UP, factor.frobenius() * UP
    rounding = gamma(num_dims + 4) * (size + abs(shift) * num_dims**0.5 + of_factor**2) + 4 * U * size
    return float(shift * (1 - 4 * U) - (np.sqrt(total) + rounding) * UP)


def cholesky(matrix: RowBlocks) -> RowBlocks:
    """The lower triangular factor ``L`` with ``L L^T`` near the matrix, of which the lower half is read.

    Raises:
        LinAlgError: If the matrix is not positive definite to rounding.
    """
    factor: dict[tuple[int, int], Array] = {}
    inverses: list[Array] = []
    for i in range(matrix.num_rows):
        for j in range(i + 1):
            own = matrix.blocks.get((i, j))
            for k in range(j):
                if (i, k) in factor and (j, k) in factor:
                    part = factor[i, k] @ factor[j, k].T
                    own = -part if own is None else own - part
            if own is None:
                continue
            if i == j:
                factor[i, i] = np.linalg.cholesky(own)
                if i + 1 < matrix.num_rows:
                    inverses.append(np.linalg.inv(factor[i, i]).T)
            else:
                factor[i, j] = own @ inverses[j]
    return RowBlocks(factor, matrix.num_rows)


def _product(matrix: RowBlocks) -> Callable[[Array], Array]:
    ends = np.cumsum([0, *(len(matrix.blocks[i, i]) for i in range(matrix.num_rows))])
    columns = [matrix.columns_of(i) for i in range(matrix.num_rows)]
    wide = [np.hstack([matrix.blocks[i, j] for j in columns[i]]) for i in range(matrix.num_rows)]

    def apply(v: Float[Array, " d"]) -> Float[Array, " d"]:
        parts = [v[start:end] for start, end in itertools.pairwise(ends)]
        return np.concatenate([rows @ np.concatenate([parts[j] for j in own]) for rows, own in zip(wide, columns, strict=True)])

    return apply


def _num_dims(matrix: RowBlocks) -> int:
    return sum(len(matrix.blocks[i, i]) for i in range(matrix.num_rows))
