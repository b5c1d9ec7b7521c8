"""One training step: the same on one device and on two in parts."""

import functools

import chex
import jax
import numpy as np
import pytest
import tiny_runs as runs

from iresnet_jax.data import load
from iresnet_jax.runs.job import Job
from iresnet_jax.training import parallel
from iresnet_jax.training.step import abstract_state

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


def job_of(name, **changes):
    source, own = CASES[name]
    config = runs.config_of(source, **own, **changes)
    return Job.of(config, load(config.data.name))


@functools.cache
def start_of(name):
    """The first state and batch of a case, as NumPy arrays, which no step can take away."""
    job = job_of(name)
    size = job.config.training.batch_size
    rows = np.zeros(size, np.float32) if job.examples is None else job.examples
    return jax.device_get(runs.random_state(job)), jax.tree.map(lambda rows: rows[:size], rows)


def after_two_steps(name, num_shares, mapped, **changes):
    """The state and the metrics after two steps with the batch in so many shares."""
    (state, batch), (step, fixed) = start_of(name), job_of(name, **changes).step()
    mapped_step = mapped(step)
    for _ in range(2):
        state, metrics = mapped_step(state, fixed, parallel.shard(batch, num_devices=num_shares))
    return jax.device_get((state, metrics))


def vmapped(step):
    return jax.jit(
        jax.vmap(step, axis_name=parallel.AXIS, in_axes=(None, None, 0), out_axes=(None, None))
    )


def on_one_device(job, method):
    """What a method of the mapped step makes of the shapes of its arguments."""
    step, fixed = job.step()
    state = abstract_state(job.spec, step.optimizer)
    batch = parallel.abstract_batch(job.examples, job.config.training.batch_size)
    mapped = parallel.for_devices(step, jax.devices()[:1])
    return getattr(mapped, method)(state, fixed, batch)


@pytest.mark.parametrize("name", CASES)
def test_parts_on_two_devices_train_like_the_whole_on_one(name):
    assert jax.local_device_count() == 2
    whole, parts = (
        after_two_steps(name, 1, vmapped),
        after_two_steps(name, 2, parallel.parallelize, **{"training.num_parts": 4}),
    )
    chex.assert_trees_all_close(parts, whole, rtol=RTOL, atol=ATOL)


def test_without_a_constraint_no_norm_is_measured():
    for norms, measured in (("none", False), ("estimated", True)):
        _, metrics = on_one_device(
            job_of("classifier", **{"constraint.norms": norms}), "eval_shape"
        )
        assert ({"max_sigma", "max_lipschitz"} <= set(metrics)) == measured
