"""Which examples make up a batch, and batches on their way from the host's memory to the
devices.
"""

import functools
from unittest import mock

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from iresnet_jax.training import batches, parallel

IMAGES = np.random.default_rng(0).integers(0, 256, (50, 4, 3, 2), np.uint8)
LABELS = np.arange(50, dtype=np.int32)


# Indices ------------------------------------------------------------------------------------------


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
        batches.batch_indices, seed, batch_size=size, num_examples=size + extra
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


def test_batches_differ_between_epochs_and_seeds_and_cannot_be_changed():
    epochs = [batches.batch_indices(0, epoch, 50, 50) for epoch in range(4)]
    seeds = [batches.batch_indices(seed, 0, 50, 50) for seed in range(1, 4)]
    assert len({order.tobytes() for order in epochs + seeds}) == 7
    with pytest.raises(ValueError, match="read-only"):
        epochs[0][0] = 1


# Batches ------------------------------------------------------------------------------------------


def test_batches_are_those_of_the_seed_and_step_a_share_for_each_device():
    """Also from a step on, as a resumed run has them in a new process, which knows nothing of
    the order.
    """
    orders = [batches.batch_indices(3, step, 8, 50).copy() for step in range(15)][4:]
    batches._epoch_order.cache_clear()
    found = batches.device_batches((IMAGES, LABELS, LABELS / 2), seed=3, batch_size=8, first_step=4)
    for indices, (images, labels, numbers) in zip(orders, found, strict=False):
        np.testing.assert_array_equal(images, IMAGES[indices].reshape(2, 4, 4, 3, 2))
        np.testing.assert_array_equal(labels, LABELS[indices].reshape(2, 4))
        assert (images.dtype, labels.dtype, numbers.dtype) == (np.uint8, np.int32, np.float32)


def test_a_batch_of_more_than_all_examples_is_refused_at_the_call():
    with pytest.raises(ValueError, match=r"\[1, num_examples = 50\], got 52"):
        batches.device_batches(IMAGES, seed=0, batch_size=52)
