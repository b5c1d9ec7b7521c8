"""Integers and the unit interval: exact cells, uniform noise, and the bound of likelihoods."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, stats

from iresnet_jax.bijections.dequantize import (
    Dequantize,
    cell_centers,
    cells,
    dequantize,
    quantize,
)
from iresnet_jax.models.priors import Logistic

# Compiled: one operation at a time, each is a program of its own.
spread, levels_of = jax.jit(dequantize, static_argnums=2), jax.jit(quantize, static_argnums=1)
P_VALUE = 1e-3  # fixed seeds: a correct sampler passes or fails once and for all


@pytest.mark.parametrize("num_levels", [2, 17, 255, 256])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_every_edge_of_every_cell_returns_its_level(x64, num_levels, dtype):
    """No float of a cell may leave it: 0 and almost 1 as noise are the extremes."""
    smallest, largest = cells(num_levels, np.dtype(dtype))
    levels = np.arange(num_levels)
    assert largest[-1] < 1
    # no gap, no overlap
    np.testing.assert_array_equal(smallest[1:], np.nextafter(largest[:-1], np.ones((), dtype)))
    for edges in (smallest, largest):
        np.testing.assert_array_equal(levels_of(edges, num_levels), levels)


def test_noise_is_uniform_and_the_highest_level_stays_below_one_in_float32():
    x, key = jnp.full((64, 2**14), 255, jnp.uint8), jax.random.key(0)
    y = spread(key, x)
    assert y.dtype == jnp.float32
    assert y.max() < 1
    np.testing.assert_array_equal(levels_of(y), x)
    naive = (x.astype(jnp.float32) + jax.random.uniform(key, x.shape)) / 256
    assert naive.max() == 1  # on these very numbers, so the test can fail
    assert stats.kstest(256 * np.asarray(y[0], np.float64) - 255, "uniform").pvalue > P_VALUE


def test_a_key_for_each_example_makes_its_noise_independent_of_the_batch():
    keys = jax.random.split(jax.random.key(0), 4)
    x = jnp.asarray(np.random.default_rng(0).integers(256, size=(4, 3, 2)), jnp.uint8)
    y = spread(keys, x)
    np.testing.assert_array_equal(spread(keys[2:], x[2:]), y[2:])
    noise = 256 * np.asarray(y) - np.asarray(x)
    assert len(np.unique(noise)) == noise.size


def test_levels_out_of_range_become_nan_and_samples_out_of_range_are_clipped():
    y = dequantize(jax.random.key(0), jnp.array([[-1, 0, 31, 32]]), 32)
    np.testing.assert_array_equal(np.isnan(y), [[True, False, False, True]])
    x = quantize(jnp.array([-jnp.inf, -0.1, 1.0, 7.0]), 32)
    np.testing.assert_array_equal(x, [0, 0, 31, 31])


def test_its_log_determinant_is_the_volume_of_the_cells():
    x = jnp.asarray(np.random.default_rng(0).integers(17, size=(3, 2, 2, 1)), jnp.uint8)
    bijection = Dequantize(17)
    u, logdet, _ = jax.jit(bijection.forward_and_logdet)(x, jax.random.key(0))
    np.testing.assert_allclose(logdet, -4 * np.log(17), rtol=1e-6)
    back, inverse_logdet, *_ = jax.jit(bijection.inverse_and_logdet)(u, jax.random.key(0))
    np.testing.assert_array_equal(back, x)
    np.testing.assert_array_equal(inverse_logdet, -logdet)


def test_uniform_dequantisation_bounds_the_discrete_bits_from_above(x64):
    """Logistic density on [0, 1) x num_levels, whose cells have a closed-form probability."""
    num_levels, scale = 8, 0.07
    prior = Logistic(jnp.asarray([0.45]), jnp.log(jnp.asarray([scale])))
    log_prob = jax.jit(prior.log_prob)
    edges = stats.logistic(0.45, scale).cdf(np.arange(num_levels + 1) / num_levels)
    probabilities = np.diff(edges)
    for level in range(num_levels):
        x = jnp.full((4000, 1), level, jnp.uint8)
        y = spread(jax.random.key(level), x, num_levels).astype(jnp.float64)
        bits = -np.asarray(log_prob(y)) / np.log(2) + np.log2(num_levels)
        # Jensen's gap in closed form, by quadrature over the cell.
        density = stats.logistic(0.45, scale).logpdf
        low, high = level / num_levels, (level + 1) / num_levels
        mean_log = num_levels * integrate.quad(density, low, high)[0]
        exact_bound = -mean_log / np.log(2) + np.log2(num_levels)
        assert exact_bound > -np.log2(probabilities[level])
        standard_error = bits.std() / np.sqrt(bits.size)
        assert standard_error < 0.05
        assert abs(bits.mean() - exact_bound) < 5 * standard_error


def test_every_8_bit_level_has_its_centre_and_no_other_number_has_one():
    levels = jnp.arange(256, dtype=jnp.uint8)
    for num_levels, known in ((256, 256), (17, 17)):
        centers = np.asarray(jax.jit(cell_centers, static_argnums=1)(levels, num_levels))
        np.testing.assert_allclose(
            centers[:known], (np.arange(known) + 0.5) / num_levels, rtol=1e-6
        )
        assert np.isnan(centers[known:]).all()
        np.testing.assert_array_equal(levels_of(centers[:known], num_levels), levels[:known])
    assert np.isnan(cell_centers(jnp.array([-1, 256]))).all()
