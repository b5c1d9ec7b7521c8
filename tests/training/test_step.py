"""One training step: the same on one device and on two in parts."""

import functools

import chex
import jax
import numpy as np
import pytest
import tiny_runs as runs

from iresnet_jax.data import load
from iresnet_jax.runs.objective_from_config import build_objective
from iresnet_jax.training import parallel

# The same sums in another order, in float32; Adam divides by the root of tiny second moments, which
# magnifies their rounding.
RTOL, ATOL = 1e-4, 1e-5
# What compiles fastest: one block without a loop over blocks, and, but for one of them, plain
# gradient descent.
DENSE = {"model.stages": ({"num_blocks": 1, "hidden": (4,)},), "training.blocks": "unroll"}
CONVOLUTIONS = {"num_blocks": 1, "hidden": (2,), "kernel_sizes": (3, 1), "squeeze": 2}
CASES = {
    "density": (runs.TOY_CONFIG, {**DENSE, "logdet.kind": "series", "logdet.num_terms": 2}),
    "hybrid": (
        runs.HYBRID_CONFIG,
        {
            **DENSE,
            "augmentation.crop_padding": 1,
            "optimizer.name": "sgd",
            "model.dequantization": "uniform",
        },
    ),
    "classifier": (runs.CLASSIFIER_CONFIG, {**DENSE, "model.stages": (CONVOLUTIONS,)}),
}


def objective_of(name, **changes):
    source, own = CASES[name]
    config = runs.config_of(source, **own, **changes)
    return build_objective(config, load(config.data.name)), config.training.batch_size


@functools.cache
def start_of(name):
    """The first state and batch of a case, as NumPy arrays, which no step can take away."""
    objective, size = objective_of(name)
    rows = np.zeros(size, np.float32) if objective.examples is None else objective.examples
    return jax.device_get(runs.random_state(objective)), jax.tree.map(
        lambda rows: rows[:size], rows
    )


def after_two_steps(name, num_shares, mapped, **changes):
    """The state and the metrics after two steps with the batch in so many shares."""
    (state, batch), step = start_of(name), mapped(objective_of(name, **changes)[0].training_step)
    for _ in range(2):
        state, metrics = step(state, parallel.shard(batch, num_devices=num_shares))
    return jax.device_get((state, metrics))


def vmapped(step):
    return jax.jit(
        jax.vmap(step, axis_name=parallel.AXIS, in_axes=(None, 0), out_axes=(None, None))
    )


@pytest.mark.parametrize("name", CASES)
def test_parts_on_two_devices_train_like_the_whole_on_one(name):
    assert jax.local_device_count() == 2
    whole, parts = (
        after_two_steps(name, 1, vmapped),
        after_two_steps(name, 2, parallel.parallelize, **{"training.num_parts": 4}),
    )
    chex.assert_trees_all_close(parts, whole, rtol=RTOL, atol=ATOL)


def test_parts_take_the_memory_of_one():
    def temporary_bytes(num_parts):
        config = runs.config_of(
            runs.CLASSIFIER_CONFIG, **{"training.batch_size": 512, "training.num_parts": num_parts}
        )
        objective = build_objective(config, load(config.data.name))
        step = parallel.for_devices(objective.training_step, jax.devices()[:1])
        compiled = step.lower(objective.abstract_state(), objective.abstract_batch(512)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary_bytes(8) < temporary_bytes(1) / 4


def test_without_a_constraint_no_norm_is_measured():
    for norms, measured in (("none", False), ("estimated", True)):
        objective, size = objective_of("classifier", **{"constraint.norms": norms})
        step = parallel.for_devices(objective.training_step, jax.devices()[:1])
        _, metrics = jax.eval_shape(
            step, objective.abstract_state(), objective.abstract_batch(size)
        )
        assert ({"max_sigma", "max_lipschitz"} <= set(metrics)) == measured
