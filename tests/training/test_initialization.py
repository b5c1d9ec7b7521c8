"""Training starts from fitted priors, or from a saved model."""

import chex
import jax
import numpy as np
import pytest
import tiny_runs as runs

from iresnet_jax.data import load
from iresnet_jax.models.free import Free
from iresnet_jax.models.priors import Gaussian
from iresnet_jax.runs.job import Job

STAGES = (
    {"num_blocks": 1, "hidden": (3,), "kernel_sizes": (3, 3), "squeeze": 2, "factor_out": True},
    {"num_blocks": 1, "hidden": (3,)},
)
CASES = {
    "toy": (runs.TOY_CONFIG, {}),
    "hybrid": (runs.HYBRID_CONFIG, {"model.stages": STAGES}),
    "classifier": (runs.CLASSIFIER_CONFIG, {}),
}


def start_of(name, **changes):
    """What training starts from."""
    source, own = CASES[name]
    config = runs.config_of(source, **own | changes)
    return Job.of(config, load(config.data.name)).free()


def test_a_prior_with_components_is_the_one_that_latents_have():
    model = start_of("toy", **{"model.prior": "mixture", "model.prior_components": 3}).certified()
    # of modes that no single normal distribution has
    z = model.encode(load("moons").held_out("test", 256).x)
    assert np.mean(model.prior.log_prob(z)) > np.mean(Gaussian.fit(z).log_prob(z)) + 0.1


@pytest.mark.parametrize(
    ("name", "before", "now"),
    [
        pytest.param("hybrid", "uniform", "variational", marks=pytest.mark.slow),
        pytest.param("hybrid", "variational", "uniform", marks=pytest.mark.slow),
        ("classifier", "uniform", "uniform"),
    ],
)
def test_training_goes_on_from_a_saved_model(name, before, now, tmp_path):
    """All of it that the new model has; what it has not starts fresh."""
    saved = start_of(name, **{"model.dequantization": before}).certified()
    saved.save(tmp_path / "model.npz")
    now = {"seed": 1, "model.dequantization": now}
    changes = {**now, "model.coeff": 0.95, "training.initial_model": str(tmp_path / "model.npz")}
    found, fresh = start_of(name, **changes), start_of(name, **now)
    learned = {
        part: own
        for part, own in Free.of(saved).params.items()
        if jax.tree.leaves(fresh.params.get(part))
    }
    learned = {part: own for part, own in learned.items() if jax.tree.leaves(own)}
    assert {"stage0", "stage1"} <= set(learned) or name == "classifier"
    chex.assert_trees_all_equal(found.params, fresh.params | learned)
    chex.assert_trees_all_equal(found.statistics, saved.statistics if name == "classifier" else {})
    for ours, its in ((found.params, fresh.params), (found.iterates, fresh.iterates)):
        chex.assert_trees_all_equal_shapes_and_dtypes(ours, its)
    others = [{"model.stages": ({"num_blocks": 3, "hidden": (4,)},)}]
    for other in [*others, *([{"preprocessing.transform": "logit"}] if name == "hybrid" else [])]:
        with pytest.raises(
            ValueError,
            match=f"initial_model: {tmp_path}.* has other stages, contexts, preprocessing",
        ):
            start_of(name, **changes, **other)
