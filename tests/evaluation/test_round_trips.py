"""Round trips are within their bound, or said not to be; samples are those of the model."""

import jax
import jax.numpy as jnp
import kept
import numpy as np
import pytest

import iresnet_jax as ir
from iresnet_jax.evaluation import round_trips
from iresnet_jax.evaluation.round_trips import draw, reconstruct


def test_reconstructions_are_exact_to_rounding_within_their_bound_and_certified_from_the_first():
    images, _ = kept.images(20)
    originals, reconstructions, summary = reconstruct(
        kept.model(kept.IMAGES), images, 8, 0, num_certified=12
    )
    refined, found = summary.refined, summary.guarantee
    assert summary.fraction_converged == summary.fraction_within_bound == 1
    assert refined.fraction_converged == refined.fraction_within_bound == 1
    assert 0 < refined.max_euclidean_error < 1e-6 * summary.max_euclidean_error
    assert refined.max_error_bound < 1e-6 * summary.max_error_bound
    assert summary.num_examples == 20
    assert summary.max_abs_error <= summary.max_euclidean_error <= summary.max_error_bound < 1e-3
    np.testing.assert_array_equal(np.floor(256 * originals), images)
    levels = np.floor(256 * reconstructions)
    assert (levels != images).mean() < 1e-3  # noise may fall next to the border of its cell
    assert 1 < summary.mean_evals < 200
    assert str(summary).startswith("inverse: inverted; 20 of 20 test examples came back")
    assert summary.warnings() == []

    assert (found.num_examples, found.num_applied, found.reason) == (12, 12, "")
    assert 0 < found.max_error <= found.max_bound <= summary.max_error_bound
    assert f"(measured: {found.max_error:.2g})" in str(summary)
    assert 0 < found.max_data_bound < 1e-4
    assert summary.max_data_error == np.abs(reconstructions - originals).max()
    assert f"largest error {summary.max_data_error:.2g} in the units" in summary.headline
    assert "decoding the latents of the first 12 examples errs by" in summary.headline
    assert found.fraction_certain > 0.9
    assert "of 12 examples by the theorem for the whole flow" in str(summary)


def test_an_inverse_that_is_stopped_too_early_is_said_to_be():
    points = np.asarray(jax.random.normal(jax.random.key(0), (3, 2)))
    model = kept.model(kept.POINTS).with_(solver=ir.Solver(max_evals=1))
    *_, summary = reconstruct(model, points, 2, 0)
    assert "NOT INVERTED; 0 of 3" in str(summary)
    assert "did not converge for 100 % of the examples" in str(summary)
    _, convergence = draw(model, 3, 2)
    assert convergence.failed == (0, 1, 2)


def test_the_number_of_certified_examples_follows_from_their_cost():
    small, large = (
        kept.POINTS.flow,
        ir.FlowSpec((32, 32, 3), (ir.StageSpec(48, hidden=(8,), kernel_sizes=(3, 3)),)),
    )
    assert round_trips.affordable(small, 10.0) == round_trips.MOST_CERTIFIED
    assert round_trips.affordable(small, 1e-6) == 1
    assert round_trips.affordable(large, 1e9) == 0


CONDITIONAL = ir.DensitySpec(ir.FlowSpec((2,), (ir.StageSpec(1, hidden=(4,)),), context_dim=1))
# ten times the tolerance of the solver, whose rounding depends on the share of a device
DEVICE_ATOL = 1e-5
CONTEXTS = np.array([[-2.0], [3.0]], np.float32)
DRAWS = {  # model, options of a draw of 3, and those of `Density.sample`
    "labels": (kept.HYBRID, {"labels": [0, 2, 1]}, {"labels": jnp.array([0, 2, 1])}),
    "contexts": (CONDITIONAL, {"contexts": CONTEXTS}, {"context": CONTEXTS[[0, 1, 0]]}),
}


@pytest.mark.parametrize(("spec", "options", "own"), DRAWS.values(), ids=DRAWS)
def test_two_devices_draw_the_samples_of_the_model(spec, options, own):
    assert jax.local_device_count() == 2
    model = kept.model(spec)
    expected, info = ir.Density.sample(model, jax.random.key(3), 3, **own)
    values, convergence = draw(model, 3, 2, seed=3, **options)
    assert values.dtype == expected.dtype
    if spec.num_levels is None:
        np.testing.assert_allclose(values, expected, rtol=0, atol=DEVICE_ATOL)
    else:  # rounding may cross the border of a level
        assert np.abs(values.astype(int) - expected).max() <= 1
        assert np.mean(values != expected) < 0.03
    assert convergence.failed == tuple(np.flatnonzero(~info.converged))
