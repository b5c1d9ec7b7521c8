"""Round trips are exact to rounding and within their bound, in both precisions, or said not to be."""

import jax
import kept
import numpy as np
import pytest

from iresnet_jax.bijections.residual import Solver
from iresnet_jax.evaluation.inversion import REFINED_ATOL, reconstruct, round_trip

DEVICE_ATOL = 1e-5, 1e-12  # ten times the tolerance of the solver in float32, and in float64
EXACT_RTOL = 1e-12  # the same float64 numbers


@pytest.mark.parametrize("spec", [kept.IMAGES, kept.CLASSIFIER], ids=["density", "classifier"])
def test_reconstructions_are_exact_to_rounding_and_within_their_bound(spec):
    images, _ = kept.images(70)
    result = reconstruct(kept.model(spec), images, 32, 0)  # three batches, the last one not full
    summary = result.summary
    assert result.trip.converged.all()
    assert (result.trip.euclidean_error <= result.trip.error_bound).all()
    assert result.refined.converged.all()
    assert (result.refined.euclidean_error <= result.refined.error_bound).all()
    assert result.refined.error_bound.max() < 1e-6 * result.trip.error_bound.max()
    assert 0 < result.refined.euclidean_error.max() < 1e-6 * result.trip.euclidean_error.max()
    assert summary.num_examples == 70
    assert summary.max_abs_error <= summary.max_euclidean_error <= summary.max_error_bound < 1e-3
    error = np.abs(result.originals - result.reconstructions).max()
    is_density = spec is kept.IMAGES
    np.testing.assert_allclose(summary.max_grey_level_error, (256 if is_density else 255) * error, rtol=EXACT_RTOL)
    levels = np.floor(256 * result.reconstructions) if is_density else np.rint(255 * result.reconstructions)
    assert (levels != images).mean() < 1e-3  # noise may fall next to the border of its cell
    if is_density:
        assert summary.max_padding_residual is None
    else:
        assert summary.max_padding_residual < 1e-5
    assert 1 < summary.mean_evals < 200
    assert str(summary).startswith("inverse: inverted; 70 of 70 test examples converged")
    assert summary.warnings() == []


def test_two_devices_invert_as_one_does_in_both_precisions():
    assert jax.local_device_count() == 2
    points = np.asarray(jax.random.normal(jax.random.key(1), (3, 2)))
    model, run, trips = kept.model(kept.POINTS), jax.jit(round_trip), []
    trips.append(run(model, points)[1])
    with jax.enable_x64(True):
        refined = model.with_(solver=model.solver._replace(atol=REFINED_ATOL, refine=True))
        trips.append(jax.device_get(run(refined, points.astype(np.float64))[1]))
    for num in (1, 3):  # at most 2 at once
        result = reconstruct(model, points[:num], 2, 0)
        assert result.summary.num_examples == num
        np.testing.assert_allclose(result.reconstructions, points[:num], rtol=0, atol=DEVICE_ATOL[0])
        for trip, expected, atol in zip((result.trip, result.refined), trips, DEVICE_ATOL, strict=True):
            for name, found in trip._asdict().items():
                assert found.dtype == getattr(expected, name).dtype
                if name != "num_evals":  # which depend on rounding
                    np.testing.assert_allclose(found, getattr(expected, name)[:num], rtol=0, atol=atol, err_msg=name)


def test_the_originals_are_the_data_and_their_noise_is_of_the_seed():
    images, _ = kept.images(32)
    model = kept.model(kept.IMAGES)
    first, again, other = (reconstruct(model, images, 32, seed).originals for seed in (0, 0, 1))
    np.testing.assert_array_equal(np.floor(256 * first), images)
    np.testing.assert_array_equal(first, again)
    assert (first != other).all()


def test_an_inverse_that_is_stopped_too_early_is_said_to_be():
    points = np.asarray(jax.random.normal(jax.random.key(0), (3, 2)))
    result = reconstruct(kept.model(kept.POINTS).with_(solver=Solver(max_evals=1)), points, 32, 0)
    assert result.summary.max_grey_level_error is None
    assert "NOT INVERTED; 0 of 3" in str(result.summary)
    [warning] = [warning for warning in result.summary.warnings() if "did not converge" in warning]
    assert "for 100 % of the examples" in warning
