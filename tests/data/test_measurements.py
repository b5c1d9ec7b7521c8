"""Measured images: the blur against its definition and the cosine transform, and noise that comes from its keys alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import fft

from iresnet_jax.data.measurements import Measurement, blur_matrix

SAME = 1e-12  # the same sums in another order, float64


@pytest.mark.parametrize(("size", "width"), [(8, 1.0), (7, 0.4), (3, 5.0), (1, 2.0)])
def test_the_blur_is_the_gaussian_on_mirrored_pixels(size, width):
    row = np.random.default_rng(0).normal(size=size)
    reach = 12 * int(np.ceil(width))
    mirrored = np.pad(row, reach, mode="symmetric")
    weights = np.exp(-((np.arange(-reach, reach + 1) / width) ** 2) / 2)
    expected = np.convolve(mirrored, weights / weights.sum(), mode="valid")
    np.testing.assert_allclose(blur_matrix(size, width) @ row, expected, atol=SAME)


@pytest.mark.parametrize(("size", "width"), [(8, 1.0), (28, 1.5)])
def test_the_blur_is_symmetric_and_positive_with_the_eigenvectors_of_the_cosine_transform(size, width):
    matrix, basis = blur_matrix(size, width), fft.dct(np.eye(size), axis=0, norm="ortho")
    np.testing.assert_allclose(matrix, matrix.T, atol=SAME)
    in_basis = basis @ matrix @ basis.T
    eigenvalues = np.diag(in_basis)
    np.testing.assert_allclose(in_basis, np.diag(eigenvalues), atol=SAME)
    assert 0 < eigenvalues.min() < 0.1  # the problem is ill-posed
    np.testing.assert_allclose(eigenvalues.max(), 1, atol=SAME)


def test_images_are_blurred_along_both_axes_and_every_channel_by_itself(x64):
    x = np.random.default_rng(0).normal(size=(2, 5, 4, 3))
    found = Measurement(width=0.8, noise=0.1).exact(jnp.asarray(x))
    expected = np.einsum("ij,bjkc,lk->bilc", blur_matrix(5, 0.8), x, blur_matrix(4, 0.8))
    np.testing.assert_allclose(found, expected, atol=SAME)
    np.testing.assert_array_equal(Measurement(width=0.0, noise=0.0).exact(jnp.asarray(x)), x)


def test_noise_has_its_standard_deviation_and_depends_on_the_example_alone():
    measurement, x = Measurement(width=1.0, noise=0.05), jnp.zeros((40, 8, 8, 1))
    y = measurement.held_out(x, 0, "test")
    assert abs(float(y.std()) / 0.05 - 1) < 5 / np.sqrt(2 * y.size)
    np.testing.assert_array_equal(measurement.held_out(x[:3], 0, "test"), y[:3])
    for other in (measurement.held_out(x, 1, "test"), measurement.held_out(x, 0, "validation")):
        assert abs(float(np.mean(other * y))) < 5 * 0.05**2 / np.sqrt(y.size)
    first, second = measurement.draw(jax.random.split(jax.random.key(0)), x[:2])
    assert not bool(jnp.any(first == second))


@pytest.mark.parametrize(("width", "noise"), [(-1.0, 0.1), (1.0, -0.1), (float("inf"), 0.1)])
def test_a_measurement_that_cannot_be_is_refused(width, noise):
    with pytest.raises(ValueError, match="at least 0 and finite"):
        Measurement(width, noise)
