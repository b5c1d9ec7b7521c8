"""Banded Jacobians of convolutions and verified least eigenvalues, against dense matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from iresnet_jax.maths import least_eigenvalue
from iresnet_jax.maths.convolution import conv
from iresnet_jax.maths.least_eigenvalue import (
    RowBlocks,
    behind_activation,
    identity_and_symmetric_part,
    layer_blocks,
)

LAYERS = {
    "3 taps": ((3, 3, 2, 3), (5, 4, 2), "SAME"),
    "1 tap": ((1, 1, 2, 3), (3, 2, 2), "SAME"),
    "2 taps": ((2, 2, 2, 2), (4, 3, 2), "SAME"),
    "torus": ((3, 3, 1, 2), (4, 5, 1), "CIRCULAR"),
    "taps that meet": ((5, 5, 1, 1), (3, 3, 1), "CIRCULAR"),
}


def dense(matrix):
    """The matrix of its blocks."""
    rows, columns = (
        {place[axis]: block.shape[axis] for place, block in matrix.blocks.items()}
        for axis in (0, 1)
    )
    return np.block(
        [
            [
                matrix.blocks.get((i, j), np.zeros((rows[i], columns[j])))
                for j in range(max(columns) + 1)
            ]
            for i in range(matrix.num_rows)
        ]
    )


@pytest.mark.parametrize("name", LAYERS)
def test_blocks_of_convolutions_against_their_products_with_unit_vectors(name):
    kernel_shape, in_shape, padding = LAYERS[name]
    kernel = np.random.default_rng(0).normal(size=kernel_shape)
    with jax.enable_x64(True):
        unit = jnp.eye(int(np.prod(in_shape))).reshape(-1, *in_shape)
        columns = np.asarray(conv(unit, jnp.asarray(kernel), padding=padding)).reshape(
            len(unit), -1
        )
    np.testing.assert_allclose(
        dense(layer_blocks(kernel, in_shape, padding)), columns.T, rtol=0, atol=1e-13
    )


def random_blocks(rng, num_rows, size, reach):
    """A banded matrix, and the same one dense."""
    blocks = {
        (i, j): rng.normal(size=(size, size))
        for i in range(num_rows)
        for j in range(num_rows)
        if abs(i - j) <= reach
    }
    return RowBlocks(blocks, num_rows)


def test_products_and_slopes_against_dense_matrices():
    rng = np.random.default_rng(1)
    one, other = random_blocks(rng, 5, 4, 1), random_blocks(rng, 5, 4, 2)
    np.testing.assert_allclose(dense(one @ other), dense(one) @ dense(other), atol=1e-13)
    np.testing.assert_allclose(one.frobenius(), np.linalg.norm(dense(one)), rtol=1e-14)
    slopes = rng.normal(size=(5, 1, 4))
    scaled = behind_activation(one, slopes, 2)  # each channel becomes two
    first, second = (np.diag(slopes[..., copy : copy + 2].ravel()) for copy in (0, 2))
    by_copy = dense(one).reshape(20, 5, 2, 2)
    wanted = by_copy[:, :, 0].reshape(20, 10) @ first + by_copy[:, :, 1].reshape(20, 10) @ second
    np.testing.assert_allclose(dense(scaled), wanted, atol=1e-13)
    symmetric = identity_and_symmetric_part(one)
    np.testing.assert_allclose(
        dense(symmetric), np.eye(20) + (dense(one) + dense(one).T) / 2, atol=1e-14
    )


@pytest.mark.parametrize("reach", [0, 1, 2, 4])
def test_least_eigenvalues_are_bounded_from_below_and_nearly_reached(reach):
    rng = np.random.default_rng(2)
    for scale in (0.01, 0.05, 0.1):
        matrix = random_blocks(rng, 5, 8, reach)
        symmetric = identity_and_symmetric_part(
            RowBlocks({place: scale * b for place, b in matrix.blocks.items()}, 5)
        )
        least = np.linalg.eigvalsh(dense(symmetric))[0]
        bound = least_eigenvalue.least_eigenvalue_bound(symmetric, -10.0)
        assert bound <= least
        assert bound >= least - 0.02 * abs(least) - 1e-12
        # what is known already
        assert least_eigenvalue.least_eigenvalue_bound(symmetric, 1.0) == 1.0


@pytest.mark.parametrize("wrong", ["estimate too large", "factor"])
def test_neither_the_estimate_nor_the_factor_is_trusted(monkeypatch, wrong):
    symmetric = identity_and_symmetric_part(random_blocks(np.random.default_rng(3), 4, 6, 1))
    symmetric = RowBlocks({place: 0.1 * block for place, block in symmetric.blocks.items()}, 4)
    least = np.linalg.eigvalsh(dense(symmetric))[0]
    right = least_eigenvalue.least_eigenvalue_bound(symmetric, least - 1)
    assert least - 0.01 <= right <= least
    if wrong == "factor":
        own = least_eigenvalue.cholesky
        monkeypatch.setattr(
            least_eigenvalue,
            "cholesky",
            lambda matrix: RowBlocks(
                {place: 1.01 * block for place, block in own(matrix).blocks.items()}, 4
            ),
        )
    else:
        monkeypatch.setattr(
            least_eigenvalue, "least_eigenvalue_estimate", lambda *_: (least + 0.1, 0.0)
        )
    assert least_eigenvalue.least_eigenvalue_bound(symmetric, least - 1) < right - 0.01


def test_a_matrix_of_no_numbers_proves_nothing():
    matrix = RowBlocks({(0, 0): np.full((3, 3), np.nan)}, 1)
    assert least_eigenvalue.least_eigenvalue_bound(matrix, 0.25) == 0.25
