r"""A verified lower bound of the least eigenvalue of the symmetric part of ``I + G``, for Jacobians
``G`` of layers.

For ``|G|_2 < 1`` the symmetric part of ``I + G`` is positive definite, and ``<x, (I + G) x> >=
lambda |x|^2`` gives ``|(I + G)^-1|_2 <= 1 / lambda`` with ``lambda`` the least eigenvalue of the
symmetric part.

If ``H - s I = L L^T + E`` for any matrix ``L``, then ``H >= s - |E|_2``, as ``L L^T`` is positive
semidefinite (Rump 2006). So a Cholesky factor ``L`` proves a bound, however it was computed:
products of ``L`` give ``E``, and the Frobenius norm of ``E`` bounds ``|E|_2``.

Jacobians of convolutions are matrices of few blocks: one block for each pair of image rows that see
each other. A layer with ``k`` taps joins a row with ``k`` rows, and a chain of layers reaches as
far as they do together. A dense layer is a matrix of one block. All arrays are NumPy's in float64;
what rounding contributes is bounded where they are used.
"""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from iresnet_jax.maths.convolution import Padding
from iresnet_jax.maths.upward_rounding import UP, U, gamma

Array = np.ndarray
_BELOW = (0.005, 0.05, 0.3)  # shares of the estimate to subtract, in the order of trials
_MOST_STEPS = 40  # of Lanczos' method


class RowBlocks(NamedTuple):
    """A matrix of blocks; missing blocks are zero.

    Attributes:
        blocks: The blocks ``(n_i, m_j)`` by their place ``(i, j)``.
        num_rows: Number of block rows.
    """

    blocks: dict[tuple[int, int], Float[Array, "n m"]]
    num_rows: int

    def __matmul__(self, other: "RowBlocks") -> "RowBlocks":
        columns = {k: [j for i, j in other.blocks if i == k] for k in range(other.num_rows)}
        product: dict[tuple[int, int], Array] = {}
        for (i, k), block in self.blocks.items():
            for j in columns[k]:
                product[i, j] = product.get((i, j), 0.0) + block @ other.blocks[k, j]
        return RowBlocks(product, self.num_rows)

    @property
    def transposed(self) -> "RowBlocks":
        """The transpose of a square matrix."""
        return RowBlocks({(j, i): block.T for (i, j), block in self.blocks.items()}, self.num_rows)

    def plus(self, other: "RowBlocks", factor: float) -> "RowBlocks":
        """The sum with a multiple of a matrix of as many rows."""
        blocks: dict[tuple[int, int], Any] = {
            place: self.blocks.get(place, 0.0) + factor * other.blocks.get(place, 0.0)
            for place in {*self.blocks, *other.blocks}
        }
        return RowBlocks(blocks, self.num_rows)

    @property
    def identity(self) -> "RowBlocks":
        """The identity, of the size of a square matrix."""
        own = {(i, i): np.eye(len(self.blocks[i, i])) for i in range(self.num_rows)}
        return RowBlocks(own, self.num_rows)

    @property
    def num_dims(self) -> int:
        """Number of rows, of a square matrix."""
        return sum(len(self.blocks[i, i]) for i in range(self.num_rows))

    def times(self, v: Float[Array, " d"]) -> Float[Array, " d"]:
        """The product of a square matrix with a vector."""
        ends = np.cumsum([0, *(len(self.blocks[i, i]) for i in range(self.num_rows))])
        parts = [slice(*pair) for pair in itertools.pairwise(ends)]
        image = np.zeros_like(v)
        for (i, j), block in self.blocks.items():
            image[parts[i]] += block @ v[parts[j]]
        return image

    def frobenius(self) -> float:
        """The Frobenius norm, to some units of rounding."""
        return float(np.sqrt(sum(np.vdot(block, block) for block in self.blocks.values())))


def layer_blocks(
    kernel: Float[Array, "..."], in_shape: Sequence[int], padding: Padding
) -> RowBlocks:
    """The matrix of a linear layer, with entries of images in the order ``(h, w, c)``.

    Args:
        kernel: ``(kh, kw, cin, cout)`` of a convolution without stride, ``(cin, cout)`` of a dense
            layer.
        in_shape: Shape of one input.
        padding: Padding of a convolution.
    """
    if kernel.ndim == 2:
        return RowBlocks({(0, 0): np.ascontiguousarray(kernel.T)}, 1)
    height, width, _ = in_shape
    num_taps, num_taps_across, cin, cout = kernel.shape
    blocks: dict[tuple[int, int], Array] = {}
    for up in range(num_taps):
        across = np.zeros((width, cout, width, cin))
        for left in range(num_taps_across):
            for place in range(width):
                source = place + left - (num_taps_across - 1) // 2
                if padding == "CIRCULAR" or 0 <= source < width:
                    across[place, :, source % width] += kernel[up, left].T
        across = across.reshape(width * cout, width * cin)
        for row in range(height):
            source = row + up - (num_taps - 1) // 2
            if padding == "CIRCULAR" or 0 <= source < height:
                place = row, source % height
                blocks[place] = blocks.get(place, 0.0) + across
    return RowBlocks(blocks, height)


def behind_activation(
    layer: RowBlocks, slopes: Float[Array, "..."], num_channels: int
) -> RowBlocks:
    """``W D`` of a layer and the Jacobian ``D`` of the activation in front, which may make several
    channels from one.

    Args:
        layer: ``W``, whose inputs are the activation's outputs.
        slopes: Slope of every output of the activation, copies of all channels one after the other.
        num_channels: Channels in front of the activation.
    """
    by_row = slopes.reshape(layer.num_rows, -1)
    blocks = {}
    for (i, j), block in layer.blocks.items():
        scaled = block * by_row[j]
        copies = slopes.shape[-1] // num_channels
        if copies > 1:
            scaled = (
                scaled.reshape(len(block), -1, copies, num_channels)
                .sum(axis=2)
                .reshape(len(block), -1)
            )
        blocks[i, j] = scaled
    return RowBlocks(blocks, layer.num_rows)


def identity_and_symmetric_part(matrix: RowBlocks) -> RowBlocks:
    """``I + (G + G^T) / 2`` of a square matrix; each entry rounds twice at most."""
    return matrix.identity.plus(matrix, 0.5).plus(matrix.transposed, 0.5)


def least_eigenvalue_estimate(matrix: RowBlocks) -> tuple[float, float]:
    """Lanczos' estimate of the least eigenvalue of a symmetric matrix, and the residual of its
    eigenvector; neither is guaranteed.
    """
    from scipy.linalg import eigh_tridiagonal  # late: training never needs it

    num_dims = matrix.num_dims
    start = np.random.default_rng(0).normal(size=num_dims)
    vectors, diagonal, beside = [start / np.linalg.norm(start)], [], []
    for _ in range(min(_MOST_STEPS, num_dims)):
        image = matrix.times(vectors[-1])
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
    values, small = eigh_tridiagonal(diagonal, beside[:-1], select="i", select_range=(0, 0))
    return float(values[0]), float(abs(small[-1, 0]) * beside[-1])


def least_eigenvalue_bound(matrix: RowBlocks, at_least: float) -> float:
    """A verified lower bound of the least eigenvalue, near to it where Lanczos' method finds it.

    Args:
        matrix: A symmetric matrix.
        at_least: A known lower bound, returned where no greater one is found.
    """
    estimate, residual = least_eigenvalue_estimate(matrix)
    for below in _BELOW:
        shift = estimate - min(residual, below * abs(estimate)) - below * abs(estimate)
        if shift > at_least and (bound := _bound_at(matrix, shift)) > at_least:
            return bound
    return at_least


def _bound_at(matrix: RowBlocks, shift: float) -> float:
    """``s - |E|`` with the factor of ``H - s I``, for matrices within two roundings of the given
    entries; -inf if there is no factor.
    """
    shifted, num_dims = matrix.plus(matrix.identity, -shift), matrix.num_dims
    try:
        factor = cholesky(shifted)
    except np.linalg.LinAlgError:
        return -np.inf
    rest = shifted.plus(factor @ factor.transposed, -1.0)
    size, of_factor = matrix.frobenius() * UP, factor.frobenius() * UP
    rounding = (
        gamma(num_dims + 4) * (size + abs(shift) * num_dims**0.5 + of_factor**2) + 4 * U * size
    )
    return float(shift * (1 - 4 * U) - (rest.frobenius() + rounding) * UP)


def cholesky(matrix: RowBlocks) -> RowBlocks:
    """The lower triangular factor ``L`` with ``L L^T`` near the matrix, of which only the lower
    half is read; NumPy's ``LinAlgError`` if the matrix is not positive definite to rounding.
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
