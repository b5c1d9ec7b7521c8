"""Samples depend on the seed alone, not on devices, and say where their inverse failed."""

import jax
import kept
import numpy as np
import pytest

from iresnet_jax.bijections.residual import Solver
from iresnet_jax.evaluation import samples
from iresnet_jax.models.architecture import FlowSpec, StageSpec
from iresnet_jax.models.density import Density, DensitySpec

CONDITIONAL = DensitySpec(FlowSpec((2,), (StageSpec(1, hidden=(4,)),), context_dim=1))
DEVICE_ATOL = 1e-5  # ten times the tolerance of the solver, whose rounding depends on the share of a device
CONTEXTS = np.array([[-2.0], [3.0]], np.float32)
DRAWS = {  # options of a draw, at most 2 at once, and those of `Density.sample` for each batch
    "one": (kept.POINTS, 1, {}, [{}]),
    "odd": (kept.POINTS, 3, {}, [{}, {}]),
    "labels": (kept.HYBRID, 3, {"labels": [0, 2, 1]}, [{"labels": np.array(n)} for n in ([0, 2], [1, 0])]),
    "contexts": (CONDITIONAL, 3, {"contexts": CONTEXTS}, [{"context": CONTEXTS}, {"context": CONTEXTS}]),
}
sample = jax.jit(Density.sample, static_argnums=2)


@pytest.mark.parametrize(("spec", "num", "options", "batches"), DRAWS.values(), ids=DRAWS)
def test_two_devices_draw_the_samples_of_one(spec, num, options, batches):
    assert jax.local_device_count() == 2
    model, key, at_once = kept.model(spec), jax.random.key(3), min(num, 2)
    parts = [sample(model, jax.random.fold_in(key, i), at_once, **given) for i, given in enumerate(batches)]
    values, info = jax.tree.map(lambda *arrays: np.concatenate(arrays)[:num], *parts)
    drawn = samples.draw(model, num, 2, seed=3, **options)
    assert drawn.values.dtype == values.dtype
    if spec.num_levels is None:
        np.testing.assert_allclose(drawn.values, values, rtol=0, atol=DEVICE_ATOL)
    else:  # rounding may cross the border of a level
        assert np.abs(drawn.values.astype(int) - values).max() <= 1
        assert np.mean(drawn.values != values) < 0.03
    np.testing.assert_array_equal(drawn.converged, info.converged)


def test_samples_depend_on_the_seed_alone_and_concentrate_at_low_temperature():
    model = kept.model(kept.POINTS)
    a, b, c = (samples.draw(model, 4, 16, seed=seed).values for seed in (0, 0, 1))
    np.testing.assert_array_equal(a, b)
    assert np.abs(a - c).max() > 0.1
    assert np.ptp(samples.draw(model, 4, 16, temperature=0.0).values, axis=0).max() == 0


def test_samples_of_images_are_levels_and_the_last_batch_is_cut():
    model = kept.model(kept.IMAGES)
    drawn = samples.draw(model, 7, 5)
    assert (drawn.values.shape, drawn.values.dtype) == ((7, *kept.SHAPE), np.uint8)
    assert drawn.quality.num == 7
    assert drawn.quality.failed == ()
    assert 0 < drawn.quality.max_error_bound < 1e-4
    np.testing.assert_array_equal(drawn.values[:5], samples.draw(model, 5, 5).values)
    assert np.any(drawn.values[5:] != drawn.values[:2])  # another batch, other latents


def test_labels_choose_the_prior_of_each_sample():
    model = kept.model(kept.HYBRID)
    cold = samples.draw(model, 5, 3, temperature=0.0, labels=[0, 1, 2, 1, 0]).values
    np.testing.assert_array_equal(cold[0], cold[4])
    np.testing.assert_array_equal(cold[1], cold[3])
    assert np.any(cold[0] != cold[1])


def test_failed_inverses_are_counted_and_named():
    quality = samples.draw(kept.model(kept.POINTS).with_(solver=Solver(max_evals=1)), 3, 16).quality
    assert (quality.fraction_converged, quality.failed) == (0, (0, 1, 2))
    assert "did not converge for 3 of 3 samples, numbers 0, 1, 2." in str(quality)


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        (kept.POINTS, {"num": 0}, "number of samples must be at least 1, got 0"),
        (kept.POINTS, {"seed": -1}, "seed must not be negative, got -1"),
        (kept.POINTS, {"temperature": -0.5}, "temperature must be at least 0, got -0.5"),
        (kept.POINTS, {"labels": [0] * 4}, "this density has one prior for all"),
        (kept.HYBRID, {"labels": [0]}, "there must be a label for each of 4 samples, got 1"),
        (kept.HYBRID, {"labels": [0, 1, 2, 3]}, "there is no class 3: classes are 0 to 2"),
    ],
)
def test_mistakes_are_explained(spec, options, message):
    with pytest.raises(ValueError, match=message):
        samples.draw(kept.model(spec), options.pop("num", 4), 16, **options)
