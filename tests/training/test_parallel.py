"""A step on one device, on two and under vmap is the same; which examples make a batch."""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from iresnet_jax.training import parallel
from iresnet_jax.training.parallel import (
    AXIS,
    example_keys,
    over_batches,
    parallelize,
    shard,
)

RTOL = 1e-5  # float32 means over the same numbers, summed in another order


def noisy_regression_step(state, seed, batch):
    """One gradient step whose loss draws a random number for every example."""

    def loss_fn(weights):
        key = jax.random.fold_in(jax.random.key(seed), state["step"])
        keys = example_keys(key, len(batch["x"]))
        noise = jax.vmap(lambda key: jax.random.normal(key, ()))(keys)
        errors = batch["x"] @ weights - batch["y"] + noise
        return jax.lax.pmean(jnp.mean(errors**2), AXIS)

    loss, grads = jax.value_and_grad(loss_fn)(state["weights"])
    grads = jax.lax.pmean(grads, AXIS)
    return {"weights": state["weights"] - 0.1 * grads, "step": state["step"] + 1}, {"loss": loss}


def simulate(step_fn):
    in_axes = (None, None, 0)
    return jax.jit(jax.vmap(step_fn, axis_name=AXIS, in_axes=in_axes, out_axes=(None, None)))


def initial_state():
    return {"weights": jnp.zeros(3), "step": jnp.zeros((), jnp.int32)}


@pytest.fixture(scope="module")
def batches():
    rng = np.random.default_rng(0)
    return [
        {"x": np.float32(rng.normal(size=(8, 3))), "y": np.float32(rng.normal(size=8))}
        for _ in range(3)
    ]


def run(step, batches, num_devices):
    state, losses = initial_state(), []
    for batch in batches:
        state, metrics = step(state, np.uint32(7), shard(batch, num_devices=num_devices))
        losses.append(float(metrics["loss"]))
    return jax.device_get(state), losses


def test_one_device_two_devices_and_vmap_agree(batches):
    assert jax.local_device_count() == 2
    reference, reference_losses = run(parallelize(noisy_regression_step), batches, 1)
    assert reference["step"] == 3
    assert np.abs(reference["weights"]).min() > 0
    for step, num_devices in (
        (parallelize(noisy_regression_step), 2),
        (simulate(noisy_regression_step), 1),
        (simulate(noisy_regression_step), 2),
    ):
        state, losses = run(step, batches, num_devices)
        np.testing.assert_allclose(losses, reference_losses, rtol=RTOL)
        np.testing.assert_allclose(state["weights"], reference["weights"], rtol=RTOL)


def test_the_state_is_donated_and_the_step_compiled_once(batches):
    traces = []

    def counted_step(state, seed, batch):
        traces.append(seed)
        return noisy_regression_step(state, seed, batch)

    step, state = parallelize(counted_step), initial_state()
    for seed, batch in enumerate(batches):  # other seeds share the program
        old = state
        # warnings are errors: donation that cannot be used would be one
        state, _ = jax.block_until_ready(step(state, np.uint32(seed), shard(batch)))
    assert len(traces) == 1
    assert old["weights"].is_deleted()


@pytest.mark.parametrize(("batch_size", "sizes"), [(6, [4, 4]), (7, [8]), (100, [8])])
def test_an_evaluation_returns_examples_in_their_order_and_keeps_the_state(batch_size, sizes):
    x, state = np.arange(14, dtype=np.float32).reshape(7, 2), jnp.float32(10.0)

    def evaluate(state, batch):
        return {"sum": state + batch.sum(axis=1), "same": batch}

    def batch_of(places):
        found.append(len(places))
        return x[places]

    found = []
    outputs = over_batches(evaluate, state, batch_of, len(x), batch_size)
    assert found == sizes
    np.testing.assert_array_equal(outputs["sum"], 10 + x.sum(axis=1))
    np.testing.assert_array_equal(outputs["same"], x)
    assert not state.is_deleted()


def test_example_keys_do_not_depend_on_the_number_of_devices():
    key = jax.random.key(3)
    expected = np.stack([jax.random.key_data(jax.random.fold_in(key, i)) for i in range(6)])
    assert len(np.unique(expected, axis=0)) == 6

    def keys_of(state, batch):
        return jax.random.key_data(example_keys(key, len(batch)))

    np.testing.assert_array_equal(over_batches(keys_of, 0, lambda places: places, 6, 6), expected)


IMAGES = np.random.default_rng(0).integers(0, 256, (50, 4, 3, 2), np.uint8)
LABELS = np.arange(50, dtype=np.int32)


def epochs_are_permutations(batch_of_step, batch_size, num_examples, num_epochs=3):
    """True if no example comes twice within an epoch and only the remainder is missing."""
    steps = num_examples // batch_size
    for epoch in range(num_epochs):
        seen = np.concatenate([batch_of_step(epoch * steps + step) for step in range(steps)])
        if (
            len(np.unique(seen)) != steps * batch_size
            or seen.min() < 0
            or seen.max() >= num_examples
        ):
            return False
    return True


@given(
    seed=st.integers(0, 2**40),
    share=st.integers(1, 7),
    count=st.integers(1, 4),
    extra=st.integers(0, 30),
)
def test_every_epoch_is_a_permutation_that_processes_share(seed, share, count, extra):
    size = share * count
    of_step = functools.partial(
        parallel.batch_indices, seed, batch_size=size, num_examples=size + extra
    )
    assert epochs_are_permutations(of_step, size, size + extra)
    whole, parts = of_step(5), []
    for process in range(count):
        with mock.patch.multiple(
            jax, process_count=lambda: count, process_index=lambda process=process: process
        ):
            parts.append(parallel.own_share(whole))
    assert {len(part) for part in parts} == {share}
    np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_batches_differ_between_epochs_and_seeds():
    epochs = [parallel.batch_indices(0, epoch, 50, 50) for epoch in range(4)]
    seeds = [parallel.batch_indices(seed, 0, 50, 50) for seed in range(1, 4)]
    assert len({order.tobytes() for order in epochs + seeds}) == 7


def test_batches_are_those_of_the_seed_and_step_a_share_for_each_device():
    """Also from a step on, in a new process, which knows nothing of the order."""
    orders = [parallel.batch_indices(3, step, 8, 50).copy() for step in range(15)][4:]
    parallel._epoch_order.cache_clear()
    found = parallel.device_batches(
        (IMAGES, LABELS, LABELS / 2), seed=3, batch_size=8, first_step=4
    )
    for indices, (images, labels, numbers) in zip(orders, found, strict=False):
        np.testing.assert_array_equal(images, IMAGES[indices].reshape(2, 4, 4, 3, 2))
        np.testing.assert_array_equal(labels, LABELS[indices].reshape(2, 4))
        assert (images.dtype, labels.dtype, numbers.dtype) == (np.uint8, np.int32, np.float32)
