"""Samples are those of the model itself, by all devices, and say where their inverse failed."""

import jax
import jax.numpy as jnp
import kept
import numpy as np
import pytest

from iresnet_jax.bijections.residual import Solver
from iresnet_jax.evaluation import samples
from iresnet_jax.models.architecture import FlowSpec, StageSpec
from iresnet_jax.models.density import Density
from iresnet_jax.models.density_spec import DensitySpec

CONDITIONAL = DensitySpec(FlowSpec((2,), (StageSpec(1, hidden=(4,)),), context_dim=1))
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
    expected, info = Density.sample(model, jax.random.key(3), 3, **own)
    values, convergence = samples.draw(model, 3, 2, seed=3, **options)
    assert values.dtype == expected.dtype
    if spec.num_levels is None:
        np.testing.assert_allclose(values, expected, rtol=0, atol=DEVICE_ATOL)
    else:  # rounding may cross the border of a level
        assert np.abs(values.astype(int) - expected).max() <= 1
        assert np.mean(values != expected) < 0.03
    assert convergence.failed == tuple(np.flatnonzero(~info.converged))


def test_samples_concentrate_at_low_temperature():
    cold, _ = samples.draw(kept.model(kept.HYBRID), 3, 2, temperature=0.0, labels=[0, 1, 0])
    np.testing.assert_array_equal(cold[0], cold[2])  # the mean of the prior of class 0
    assert np.any(cold[0] != cold[1])


def test_samples_of_images_are_levels_and_the_first_are_certified():
    values, convergence = samples.draw(kept.model(kept.IMAGES), 5, 3, num_certified=4)
    found = convergence.guarantee
    assert (values.shape, values.dtype) == ((5, *kept.SHAPE), np.uint8)
    assert (convergence.num, convergence.failed, found.num_examples, found.num_applied) == (
        5,
        (),
        4,
        4,
    )
    assert found.max_data_bound < 1e-4
    assert "guaranteed error of the inverse" in str(convergence)


def test_failed_inverses_are_counted_and_named():
    _, convergence = samples.draw(kept.model(kept.POINTS).with_(solver=Solver(max_evals=1)), 3, 2)
    assert convergence.failed == (0, 1, 2)
    assert "did not converge for 3 of 3 samples, numbers 0, 1, 2." in str(convergence)
