r"""Jacobians of convolutions as matrices of few blocks: one block for each pair of image rows that see each other.

A layer with ``k`` taps joins a row of the image with ``k`` rows, and a chain of layers reaches as far as they do together. A
Jacobian is banded so, and its products and factorisations need far fewer operations than those of a dense matrix. A dense
layer is a matrix of one block. All arrays are NumPy's in float64; what rounding contributes is bounded where they are used.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from iresnet_jax.maths.convolution import Padding

Array = np.ndarray


class RowBlocks(NamedTuple):
    """A matrix of blocks, those that are missing being zero.

    Attributes:
        blocks: The blocks ``(n_i, m_j)`` by their place ``(i, j)``.
        num_rows: Number of block rows.
    """

    blocks: dict[tuple[int, int], Float[Array, "n m"]]
    num_rows: int

    def columns_of(self, i: int) -> list[int]:
        """Places of the blocks in a block row, in order."""
        return sorted(column for row, column in self.blocks if row == i)

    def __matmul__(self, other: "RowBlocks") -> "RowBlocks":
        by_row = {j: other.columns_of(j) for j in range(other.num_rows)}
        product: dict[tuple[int, int], Array] = {}
        for (i, k), block in self.blocks.items():
            for j in by_row[k]:
                part = block @ other.blocks[k, j]
                product[i, j] = product[i, j] + part if (i, j) in product else part
        return RowBlocks(product, self.num_rows)

    def frobenius(self) -> float:
        """The Frobenius norm, to some units of rounding."""
        return float(np.sqrt(sum(np.vdot(block, block) for block in self.blocks.values())))

    def dense(self) -> Float[Array, "n m"]:
        """The matrix."""
        rows, columns = ({place[axis]: block.shape[axis] for place, block in self.blocks.items()} for axis in (0, 1))
        return np.block(
            [
                [self.blocks.get((i, j), np.zeros((rows[i], columns[j]))) for j in range(max(columns) + 1)]
                for i in range(self.num_rows)
            ]
        )


def layer_blocks(kernel: Float[Array, "..."], in_shape: Sequence[int], padding: Padding) -> RowBlocks:
    """The matrix of a linear layer, with entries of images in the order ``(h, w, c)``.

    Args:
        kernel: ``(kh, kw, cin, cout)`` of a convolution without stride, ``(cin, cout)`` of a dense layer.
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
                blocks[place] = blocks[place] + across if place in blocks else across
    return RowBlocks(blocks, height)


def behind_activation(layer: RowBlocks, slopes: Float[Array, "..."], num_channels: int) -> RowBlocks:
    """``W D`` of a layer and the Jacobian ``D`` of the activation in front, which may make several channels of one.

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
            scaled = scaled.reshape(len(block), -1, copies, num_channels).sum(axis=2).reshape(len(block), -1)
        blocks[i, j] = scaled
    return RowBlocks(blocks, layer.num_rows)


def identity_and_symmetric_part(matrix: RowBlocks) -> RowBlocks:
    """``I + (G + G^T) / 2`` of a square matrix; each entry rounds twice at most."""
    blocks = {}
    for i, j in {*matrix.blocks, *((j, i) for i, j in matrix.blocks)}:
        there, back = matrix.blocks.get((i, j)), matrix.blocks.get((j, i))
        both = [part for part in (there, None if back is None else back.T) if part is not None]
        blocks[i, j] = sum(both[1:], both[0]) * 0.5
    for i in range(matrix.num_rows):
        blocks[i, i] = blocks[i, i] + np.eye(len(blocks[i, i]))
    return RowBlocks(blocks, matrix.num_rows)
