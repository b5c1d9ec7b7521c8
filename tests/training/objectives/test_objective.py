"""A batch in parts, one after the other, trains like the whole batch at once."""

import chex
import jax
import pytest
import tiny_runs as runs

from iresnet_jax.data import load
from iresnet_jax.runs import loop
from iresnet_jax.training import parallel

ROUNDING_RTOL, ROUNDING_ATOL = 1e-4, 1e-5  # the same sums in another order, in float32
CASES = {
    "conditional": (runs.TOY_CONFIG, {"logdet.kind": "roulette", "data.name": "sbi_two_moons"}),
    "hybrid": (runs.HYBRID_CONFIG, {"augmentation.crop_padding": 1}),
    "classifier": (runs.CLASSIFIER_CONFIG, {}),
    "reconstructor": (runs.INVERSION_CONFIG, {}),
}


def after_steps(name, num_parts, num_steps=2):
    """The state and the metrics after a few steps of two devices."""
    source, changes = CASES[name]
    config = runs.config_of(source, **{"training.num_parts": num_parts, **changes})
    objective = loop.build_objective(config, load(config.data.name))
    current, feed = objective.initial_state(), loop.batches(config, objective.examples, 0)
    step = parallel.parallelize(objective.make_step(objective.num_terms))
    for _ in range(num_steps):
        current, metrics = step(current, next(feed))
    return jax.device_get((current, metrics))


@pytest.mark.parametrize("name", CASES)
def test_parts_train_like_the_whole(name):
    assert jax.local_device_count() == 2
    whole, parts = after_steps(name, 1), after_steps(name, 4)
    chex.assert_trees_all_close(whole, parts, rtol=ROUNDING_RTOL, atol=ROUNDING_ATOL)


@pytest.mark.parametrize("name", ["hybrid", "classifier"])
def test_parts_take_the_memory_of_one(name):
    def temporary_bytes(num_parts):
        changes = {"training.batch_size": 512, "training.num_parts": num_parts}
        config = runs.config_of(runs.CONFIGS[name], **changes)
        objective = loop.build_objective(config, load(config.data.name))
        step, current = objective.make_step(objective.num_terms), objective.initial_state()
        batch = jax.tree.map(lambda rows: rows[:512], objective.examples)
        compiled = parallel.for_devices(step, jax.devices()[:1]).lower(current, batch).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary_bytes(8) < temporary_bytes(1) / 4


def test_a_run_goes_on_with_other_parts(tmp_path):
    short = {"training.total_steps": 4, "training.eval_every_steps": 2}
    loop.train(runs.config_of(runs.TOY_CONFIG, **short), tmp_path)
    (tmp_path / "checkpoints" / "4.npz").unlink()
    ended = loop.train(runs.config_of(runs.TOY_CONFIG, **short, **{"training.num_parts": 2}), tmp_path)
    assert int(ended.step) == 4


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("toy", {"training.num_parts": 3}, r"num_parts must divide the 8 examples that a device has of a batch, got 3"),
        (
            "classifier",
            {"training.num_parts": 2, "classifier.normalization": "batchnorm", "constraint.norms": "none"},
            "BatchNorm in the branches needs the whole batch at once: set training.num_parts to 1",
        ),
    ],
    ids=["indivisible", "batchnorm"],
)
def test_mistakes_are_answered_in_a_sentence(name, changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        loop.train(runs.config_of(runs.CONFIGS[name], **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()
