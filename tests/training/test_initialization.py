"""ActNorm fitted by all devices is the one that a single device fits; a mixture is the prior
that latents have.
"""

import chex
import jax
import numpy as np
import pytest
import tiny_runs as runs

import iresnet_jax as ir
from iresnet_jax.data import load
from iresnet_jax.models import contractions
from iresnet_jax.models.priors import Gaussian
from iresnet_jax.runs.model_from_config import identity_context, model_spec
from iresnet_jax.runs.objective_from_config import build_objective
from iresnet_jax.training.constraint import Unconstrained, certified_model

# float32 means over the same numbers, summed in another order, and what blocks make of that
RTOL, ATOL = 1e-4, 1e-5
STAGES = (
    {"num_blocks": 1, "hidden": (3,), "kernel_sizes": (3, 3), "squeeze": 2, "factor_out": True},
    {"num_blocks": 1, "hidden": (3,)},
)
CASES = {
    "toy": (runs.TOY_CONFIG, {}),
    "hybrid": (runs.HYBRID_CONFIG, {"model.stages": STAGES}),
    "classifier": (runs.CLASSIFIER_CONFIG, {}),
}


def variables_of(name, **changes):
    source, own = CASES[name]
    config = runs.config_of(source, **own | changes)
    data = load(config.data.name)
    return jax.device_get(build_objective(config, data).initial_variables())


@pytest.mark.parametrize("name", ["hybrid", "classifier"])
def test_two_devices_fit_what_one_fits(name, monkeypatch):
    """ActNorm, statistics and priors; iterates of a norm that is no simple singular value are
    not unique.
    """
    assert jax.local_device_count() == 2
    found = variables_of(name)
    one = jax.local_devices()[:1]
    monkeypatch.setattr(jax, "local_device_count", lambda: 1)
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    monkeypatch.setattr(jax, "local_devices", lambda: one)
    expected = variables_of(name)
    chex.assert_trees_all_equal_shapes(found.pop("spectral"), expected.pop("spectral"))
    chex.assert_trees_all_close(found, expected, rtol=RTOL, atol=ATOL)


def test_examples_that_do_not_split_evenly_leave_some_out():
    found, expected = (
        variables_of("toy", **{"training.actnorm_examples": num}) for num in (33, 32)
    )
    chex.assert_trees_all_equal(found, expected)


def test_a_prior_with_components_is_the_one_that_latents_have():
    variables = variables_of("toy", **{"model.prior": "mixture", "model.prior_components": 3})
    config = runs.config_of(runs.TOY_CONFIG)
    data = load(config.data.name)
    model = ir.Density(
        model_spec(config, data),
        contractions.freeze(model_spec(config, data).flow, variables["params"]),
        {},
    )
    z = model.encode(data.held_out("test", 256))  # of modes that no single normal distribution has
    assert (
        np.mean(variables["params"]["prior"].log_prob(z))
        > np.mean(Gaussian.fit(z).log_prob(z)) + 0.1
    )


@pytest.mark.parametrize(
    ("name", "before", "now"),
    [
        ("hybrid", "uniform", "variational"),
        ("hybrid", "variational", "uniform"),
        ("classifier", "uniform", "uniform"),
    ],
)
def test_training_goes_on_from_a_saved_model(name, before, now, tmp_path):
    """All of it that the new one has, whatever the budget, the noise and the seed; what the
    model has not starts fresh.
    """
    source, own = CASES[name]
    config = runs.config_of(source, **own, **{"model.dequantization": before})
    data = load(config.data.name)
    variables = build_objective(config, data).initial_variables()
    saved = certified_model(model_spec(config, data), variables["params"], variables["batch_stats"])
    saved.save(tmp_path / "model.npz")
    now = {"seed": 1, "model.dequantization": now}
    changes = {**now, "model.coeff": 0.95, "training.initial_model": str(tmp_path / "model.npz")}
    found, fresh = variables_of(name, **changes), variables_of(name, **now)
    learned = {
        part: own
        for part, own in Unconstrained.of(saved).params.items()
        if jax.tree.leaves(fresh["params"].get(part))
    }
    learned = {part: own for part, own in learned.items() if jax.tree.leaves(own)}
    assert {"stage0", "stage1"} <= set(learned) or name == "classifier"
    chex.assert_trees_all_equal(found["params"], fresh["params"] | learned)
    chex.assert_trees_all_equal(
        found["batch_stats"], saved.statistics if name == "classifier" else {}
    )
    chex.assert_trees_all_equal_shapes_and_dtypes(found, fresh)
    others = [{"model.stages": ({"num_blocks": 3, "hidden": (4,)},)}]
    for other in [*others, *([{"preprocessing.transform": "logit"}] if name == "hybrid" else [])]:
        with pytest.raises(
            ValueError,
            match=f"initial_model: {tmp_path}.* has other stages, contexts, preprocessing",
        ):
            variables_of(name, **changes, **other)


def test_a_model_that_was_given_its_context_may_be_trained_under_it_again(tmp_path):
    config = runs.config_of(
        runs.DIGITS_CONFIG, **{"augmentation.transformations": ("left", "turn")}
    )
    data = load(config.data.name)
    variables = build_objective(config, data).initial_variables()
    saved = certified_model(
        model_spec(config, data), variables["params"], {}, given=identity_context(config)
    )
    saved.save(tmp_path / "model.npz")
    changes = {
        "augmentation.transformations": ("left", "turn"),
        "seed": 1,
        "training.initial_model": str(tmp_path),
    }
    found = build_objective(runs.config_of(runs.DIGITS_CONFIG, **changes), data).initial_variables()
    blocks, own = found["params"]["stage0"]["blocks"], saved.weights["stage0"].branch.weights
    for layer in own:
        np.testing.assert_array_equal(blocks[layer]["kernel"], own[layer]["kernel"])
        assert np.any(blocks[layer]["context"])  # fresh
