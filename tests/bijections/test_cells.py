"""Cells and atoms: noise within them, values that come back, and the unit of the number."""

import dataclasses

import jax
import jax.numpy as jnp
import kept
import numpy as np
import pytest
from scipy import stats

from iresnet_jax.bijections.cells import Cells
from iresnet_jax.models import preprocessing

SINGLE = 1e-5  # float32
# A regular grid, a continuous entry, values off any grid, a continuous entry with two atoms, and a
# grid with one.
CELLS = Cells.of(
    [(20.0, 21.0), (), (0.0, 1.0, 4.0, 5.0), (), (0.0, 0.05)],
    [{}, {}, {}, {0.0: 2.0, 1.0: 0.5}, {0.1: 3.0}],
)
SEEN = np.array(
    [[25, -0.3, 4, 0, 0.1], [17, 0.7, 0, 1, 0.05], [20, 9, 1, 0.5, -3.0], [21, 0, 7, -2.5, 0.15]],
    np.float32,
)


def test_values_are_spread_over_their_cells_and_come_back():
    x, bijection = np.repeat(SEEN, 500, axis=0), CELLS
    u, log_ratio, _ = jax.jit(bijection.forward_and_logdet)(x, jax.random.key(0))
    _, start, width, _ = map(np.asarray, jax.jit(CELLS.places)(x))
    noise = ((np.asarray(u, np.float64) - start) / np.where(width > 0, width, 1)).reshape(4, 500, 5)
    np.testing.assert_allclose(width[0], [1, 0, 2, 2, 3.05], rtol=SINGLE)
    # half-way, and the gaps go on
    np.testing.assert_allclose(np.asarray(start)[::500, 2], [2.5, -0.5, 0.5, 6.5])
    # what is above an atom moves up
    np.testing.assert_allclose(np.asarray(start)[::500, 3], [0, 3, 2.5, -2.5])
    for row, column in np.argwhere(width[::500] > 0):
        assert stats.kstest(noise[row, :, column], "uniform").pvalue > 1e-3
    assert np.all(noise.transpose(0, 2, 1)[width[::500] == 0] == 0)
    # An atom of a continuous entry and a whole number have a mass, and an atom of another grid a
    # mass by the spacing.
    expected = [2 * np.log(2) + np.log(3.05 / 0.05), np.log(0.5), np.log(2), 0]
    np.testing.assert_allclose(np.asarray(log_ratio)[::500], expected, rtol=SINGLE, atol=SINGLE)
    back, of_inverse, _, info = jax.jit(bijection.inverse_and_logdet)(u, jax.random.key(0))
    np.testing.assert_allclose(back, x, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(np.asarray(back)[:, 3], x[:, 3])
    np.testing.assert_allclose(of_inverse, -log_ratio, rtol=SINGLE, atol=SINGLE)
    assert np.all(info.error_bound == 0)
    np.testing.assert_allclose(
        jax.jit(lambda x: bijection.inverse(bijection.forward(x))[0])(SEEN),
        SEEN,
        rtol=1e-6,
        atol=1e-6,
    )


def test_noise_that_is_rounded_stays_in_its_cell():
    x = jnp.repeat(jnp.array([2024.0, 1e5, 4e6, 2**23 - 1.0]), 50_000)[:, None]
    bijection = Cells.of([(0.0, 1.0)])
    u, _, _ = jax.jit(bijection.forward_and_logdet)(x, jax.random.key(0))
    np.testing.assert_array_equal(jax.jit(bijection.inverse)(u)[0], x)


def test_other_numbers_count_as_the_value_whose_cell_they_lie_in():
    x = jnp.array([[20.4, 0.123, 2.4, 1e-3, 0.07], [-3.6, 5.0, 2.6, -1e-3, 9.01]], jnp.float32)
    back, _ = CELLS.inverse(CELLS.forward(x))
    np.testing.assert_allclose(
        back, [[20, 0.123, 1, 1e-3, 0.05], [-4, 5.0, 4, -1e-3, 9.0]], rtol=1e-4, atol=1e-6
    )


def test_a_density_bounds_the_number_of_its_values():
    """Uniform on [0, 3) in cells of width 1/2: every value has probability 1/6, 1/3 per unit,
    which the bound attains.
    """
    forward_and_logdet = jax.jit(Cells.of([(0.25, 0.75)]).forward_and_logdet)
    u, log_ratio, _ = forward_and_logdet(jnp.asarray([[0.25], [2.75]]), jax.random.key(0))
    inside = (u[:, 0] >= 0) & (u[:, 0] < 3)
    np.testing.assert_allclose(
        jnp.where(inside, -np.log(3), -np.inf) + log_ratio, np.log(1 / 6 / 0.5), rtol=1e-6
    )


@pytest.mark.parametrize("wrong", [(0.0,), (1.0, 0.0), (0.0, np.inf)])
def test_values_that_are_no_cells_are_refused(wrong):
    with pytest.raises(ValueError, match="two or more rising numbers"):
        Cells.of([wrong])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_numbers_of_16_bits_keep_their_cells(dtype):
    spec = dataclasses.replace(kept.POINTS, cells=Cells.of([(0.0, 1.0), ()]))
    x = jnp.array([[199.0, 0], [201, 0], [203, 0], [255, 0]], dtype)
    u = kept.dequantize(kept.model(spec), x, jax.random.key(5))
    np.testing.assert_array_equal(preprocessing.rounded(spec, u)[:, 0], [199, 201, 203, 255])


def test_noise_takes_one_key_or_one_an_example():
    forward, x = (
        jax.jit(Cells.of([(0.0, 1.0)]).forward_and_logdet),
        jnp.array([[3.0], [4.0], [5.0]]),
    )
    with pytest.raises(ValueError, match=r"one for each of 3 examples, got keys of shape \(1,\)"):
        forward(x, jax.random.split(jax.random.key(0), 1))
    np.testing.assert_array_equal(
        forward(x, jax.random.PRNGKey(0))[0], forward(x, jax.random.key(0))[0]
    )
