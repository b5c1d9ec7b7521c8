"""Samples depend on the seed alone, not on devices, and say where their inverse failed."""

import jax
import kept
import numpy as np
import pytest

from iresnet_jax.bijections.residual import Solver
from iresnet_jax.evaluation import samples
from iresnet_jax.models.architecture import FlowSpec, StageSpec
from iresnet_jax.models.density import Density
from iresnet_jax.models.density_spec import DensitySpec

CONDITIONAL = DensitySpec(FlowSpec((2,), (StageSpec(1, hidden=(4,)),), context_dim=1))
DEVICE_ATOL = 1e-5  # ten times the tolerance of the solver, whose rounding depends on the share of a device
CONTEXTS = np.array([[-2.0], [3.0]], np.float32)
DRAWS = {  # model, options of a draw of 3, 2 at once, and those of `Density.sample` for both batches
    "labels": (kept.HYBRID, {"labels": [0, 2, 1]}, [{"labels": np.array(n)} for n in ([0, 2], [1, 0])]),
    "contexts": (CONDITIONAL, {"contexts": CONTEXTS}, [{"context": CONTEXTS}, {"context": CONTEXTS}]),
}
sample = jax.jit(Density.sample, static_argnums=2)


@pytest.mark.parametrize(("spec", "options", "batches"), DRAWS.values(), ids=DRAWS)
def test_two_devices_draw_the_samples_of_one(spec, options, batches):
    assert jax.local_device_count() == 2
    model, key = kept.model(spec), jax.random.key(3)
    parts = [sample(model, jax.random.fold_in(key, i), 2, **given) for i, given in enumerate(batches)]
    values, info = jax.tree.map(lambda *arrays: np.concatenate(arrays)[:3], *parts)
    drawn = samples.draw(model, 3, 2, seed=3, **options)
    assert drawn.values.dtype == values.dtype
    if spec.num_levels is None:
        np.testing.assert_allclose(drawn.values, values, rtol=0, atol=DEVICE_ATOL)
    else:  # rounding may cross the border of a level
        assert np.abs(drawn.values.astype(int) - values).max() <= 1
        assert np.mean(drawn.values != values) < 0.03
    np.testing.assert_array_equal(drawn.converged, info.converged)


def test_samples_depend_on_the_seed_alone_and_concentrate_at_low_temperature():
    model = kept.model(kept.POINTS)
    a, b, c = (samples.draw(model, 3, 2, seed=seed).values for seed in (0, 0, 1))
    np.testing.assert_array_equal(a, b)
    assert np.abs(a - c).max() > 0.1
    assert np.ptp(samples.draw(model, 3, 2, temperature=0.0).values, axis=0).max() == 0
    cold = samples.draw(kept.model(kept.HYBRID), 3, 2, temperature=0.0, labels=[0, 1, 0]).values
    np.testing.assert_array_equal(cold[0], cold[2])  # the mean of the prior of class 0
    assert np.any(cold[0] != cold[1])


def test_samples_of_images_are_levels_the_last_batch_is_cut_and_the_first_are_certified():
    model = kept.model(kept.IMAGES)
    drawn = samples.draw(model, 5, 3, num_certified=4)
    convergence, found = drawn.convergence, drawn.convergence.guarantee
    assert (drawn.values.shape, drawn.values.dtype) == ((5, *kept.SHAPE), np.uint8)
    assert (convergence.num, convergence.failed, found.num_examples, found.num_applied) == (5, (), 4, 4)
    assert found.max_data_bound < convergence.max_error_bound < 1e-4
    assert "guaranteed error of the inverse" in str(convergence)
    plain = samples.draw(model, 3, 3)
    np.testing.assert_array_equal(drawn.values[:3], plain.values)
    assert np.any(drawn.values[3:] != drawn.values[:2])  # another batch, other latents
    assert str(plain.convergence) == "samples: the inverse converged for 3 of 3"


def test_failed_inverses_are_counted_and_named():
    convergence = samples.draw(kept.model(kept.POINTS).with_(solver=Solver(max_evals=1)), 3, 2).convergence
    assert (convergence.fraction_converged, convergence.failed) == (0, (0, 1, 2))
    assert "did not converge for 3 of 3 samples, numbers 0, 1, 2." in str(convergence)


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        (kept.POINTS, {"num": 0}, "at least 1, got 0"),
        (kept.POINTS, {"seed": -1}, r"seed must lie in .* got -1"),
        (kept.POINTS, {"temperature": -0.5}, "temperature at least 0"),
        (kept.POINTS, {"labels": [0] * 4}, "one prior for all"),
        (kept.HYBRID, {"labels": [0]}, "a label for each of 4 samples, got 1"),
        (kept.HYBRID, {"labels": [0, 1, 2, 3]}, "there is no class 3"),
    ],
)
def test_mistakes_are_explained(spec, options, message):
    with pytest.raises(ValueError, match=message):
        samples.draw(kept.model(spec), options.pop("num", 4), 16, **options)
