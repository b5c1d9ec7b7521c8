"""Batches on their way from the host's memory to the devices."""

import itertools
import threading

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from iresnet_jax.data import device_batches
from iresnet_jax.data.batches import batch_indices
from iresnet_jax.training import parallel

IMAGES = np.random.default_rng(0).integers(0, 256, (50, 4, 3, 2), np.uint8)
LABELS = np.arange(50, dtype=np.int32)
both_ways = pytest.mark.parametrize("keep_on_device", [True, False], ids=["on device", "streamed"])


def take(iterator, num):
    batches = list(itertools.islice(iterator, num))
    iterator.close()
    return batches


@both_ways
def test_batches_are_those_of_the_seed_and_step_a_share_on_each_device(keep_on_device):
    options = {"seed": 3, "batch_size": 8, "keep_on_device": keep_on_device}
    for step, batch in enumerate(take(device_batches.device_batches((IMAGES, LABELS), **options), 15)):
        images, labels = batch
        indices = batch_indices(3, step, 8, 50)
        np.testing.assert_array_equal(images, IMAGES[indices].reshape(2, 4, 4, 3, 2))
        np.testing.assert_array_equal(labels, LABELS[indices].reshape(2, 4))
        assert (images.dtype, labels.dtype) == (jnp.uint8, jnp.int32)
        assert [shard.device for shard in images.addressable_shards] == jax.local_devices()
        assert [shard.data.shape for shard in images.addressable_shards] == [(1, 4, 4, 3, 2)] * 2


@both_ways
def test_resumed_at_a_step_the_batches_are_the_same(keep_on_device):
    options = {"seed": 0, "batch_size": 8, "keep_on_device": keep_on_device}
    whole = take(device_batches.device_batches(IMAGES, **options), 12)
    resumed = take(device_batches.device_batches(IMAGES, first_step=7, **options), 5)
    for expected, batch in zip(whole[7:], resumed, strict=True):
        np.testing.assert_array_equal(batch, expected)


@both_ways
@pytest.mark.parametrize("process_count", [2, 4])
def test_hosts_together_hold_the_batch_of_one(keep_on_device, process_count):
    options = {"seed": 1, "batch_size": 16, "keep_on_device": keep_on_device}
    [alone] = take(device_batches.device_batches(IMAGES, first_step=5, **options), 1)
    shares = []
    for index in range(process_count):
        of_process = device_batches.device_batches(
            IMAGES, first_step=5, process_index=index, process_count=process_count, **options
        )
        shares.append(np.asarray(take(of_process, 1)[0]).reshape(-1, 4, 3, 2))
    np.testing.assert_array_equal(np.concatenate(shares), np.asarray(alone).reshape(-1, 4, 3, 2))


@given(
    shares=st.integers(1, 5), count=st.integers(1, 5), seed=st.integers(0, 99), step=st.integers(0, 99), extra=st.integers(0, 9)
)
def test_shares_of_processes_make_up_the_batch(shares, count, seed, step, extra):
    size = shares * count
    parts = [batch_indices(seed, step, size, size + extra, process_index=index, process_count=count) for index in range(count)]
    assert {len(part) for part in parts} == {shares}
    np.testing.assert_array_equal(np.concatenate(parts), batch_indices(seed, step, size, size + extra))


def test_one_device_of_several():
    [device] = jax.local_devices()[1:]
    [batch] = take(device_batches.device_batches(IMAGES, seed=0, batch_size=5, devices=[device]), 1)
    assert batch.shape == (1, 5, 4, 3, 2)
    assert batch.devices() == {device}


@both_ways
def test_batches_go_into_the_parallel_step_as_they_are(keep_on_device):
    def add(total, batch):
        total = total + jax.lax.psum(batch.sum(), parallel.AXIS)
        return total, total

    chex.clear_trace_counter()
    step = parallel.parallelize(chex.assert_max_traces(add, n=1))
    total = jnp.zeros((), jnp.int32)
    options = {"seed": 0, "batch_size": 10, "keep_on_device": keep_on_device}
    for batch in take(device_batches.device_batches(LABELS, **options), 5):  # an epoch
        total, _ = step(total, batch)
        jax.block_until_ready(total)
    assert total == LABELS.sum()


def test_the_next_batch_is_made_while_the_step_runs():
    made, waiting = [], threading.Event()

    def make(step):
        made.append((step, threading.current_thread() is threading.main_thread()))
        if step == 1:
            waiting.set()
        return step

    batches = device_batches._made_ahead(make, 0)
    assert next(batches) == 0
    assert waiting.wait(timeout=60)  # step 1 was made without being asked for ...
    assert made == [(0, False), (1, False)]  # ... and no more than that
    assert next(batches) == 1
    batches.close()


def feeding_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("feed")]


def test_a_closed_or_dropped_iterator_ends_its_thread():
    assert not feeding_threads()
    batches = device_batches.device_batches(IMAGES, seed=0, batch_size=8)
    next(batches)
    assert len(feeding_threads()) == 1
    batches.close()
    assert not feeding_threads()
    batches = device_batches.device_batches(IMAGES, seed=0, batch_size=8)
    next(batches)
    del batches
    assert not feeding_threads()


def test_failure_to_read_reaches_the_training_loop():
    def make(step):
        if step == 2:
            raise OSError("the disk is gone")
        return step

    batches = device_batches._made_ahead(make, 0)
    assert [next(batches), next(batches)] == [0, 1]
    with pytest.raises(OSError, match="the disk is gone"):
        next(batches)


class Device:
    def __init__(self, platform, limit):
        self.platform, self._limit = platform, limit

    def memory_stats(self):
        return self._limit and {"bytes_limit": self._limit}


def test_what_fits_on_a_device():
    big = np.broadcast_to(np.uint8(0), (1000, 1000))
    assert device_batches.fits_on_device(big, [Device("gpu", 8_000_000)])
    assert not device_batches.fits_on_device((big, big), [Device("gpu", 8_000_000)])
    assert not device_batches.fits_on_device(big, [Device("gpu", 8_000_000), Device("gpu", 7_000_000)])
    assert not device_batches.fits_on_device(big, [Device("gpu", None)])
    assert not device_batches.fits_on_device(IMAGES, jax.local_devices())  # of the CPU


def test_impossible_feeds_are_refused_at_the_call():
    with pytest.raises(ValueError, match=r"must have the same number of examples along their first axis, got \[49, 50\]"):
        device_batches.device_batches((IMAGES, LABELS[1:]), seed=0, batch_size=8)
    with pytest.raises(
        ValueError, match=r"the 7 examples of a process cannot be split evenly over its 2 devices: .* multiple of 2"
    ):
        device_batches.device_batches(IMAGES, seed=0, batch_size=7)
    with pytest.raises(ValueError, match=r"a batch of 10 examples cannot be shared evenly by 4 processes: .* a multiple of 4"):
        device_batches.device_batches(IMAGES, seed=0, batch_size=10, process_count=4)
    with pytest.raises(ValueError, match=r"process_index must lie in \[0, process_count = 2\), got 2"):
        device_batches.device_batches(IMAGES, seed=0, batch_size=8, process_index=2, process_count=2)
    with pytest.raises(ValueError, match=r"batch_size must lie in \[1, num_examples = 50\], got 52"):
        device_batches.device_batches(IMAGES, seed=0, batch_size=52)
