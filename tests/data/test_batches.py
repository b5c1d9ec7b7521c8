"""Which examples make up a batch, and batches on their way from the host's memory to the devices."""

import functools
import itertools
import threading
from unittest import mock

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from iresnet_jax.data import batches
from iresnet_jax.training import parallel

IMAGES = np.random.default_rng(0).integers(0, 256, (50, 4, 3, 2), np.uint8)
LABELS = np.arange(50, dtype=np.int32)
both_ways = pytest.mark.parametrize("keep_on_device", [True, False], ids=["on device", "streamed"])


# Indices ------------------------------------------------------------------------------------------------------------------


def epochs_are_permutations(batch_of_step, batch_size, num_examples, num_epochs=3):
    """True if no example comes twice within an epoch and only the remainder is missing."""
    steps = num_examples // batch_size
    for epoch in range(num_epochs):
        seen = np.concatenate([batch_of_step(epoch * steps + step) for step in range(steps)])
        if len(np.unique(seen)) != steps * batch_size or seen.min() < 0 or seen.max() >= num_examples:
            return False
    return True


@given(seed=st.integers(0, 2**40), share=st.integers(1, 7), count=st.integers(1, 4), extra=st.integers(0, 30))
def test_every_epoch_is_a_permutation_that_processes_share(seed, share, count, extra):
    size = share * count
    of_step = functools.partial(batches.batch_indices, seed, batch_size=size, num_examples=size + extra)
    assert epochs_are_permutations(of_step, size, size + extra)
    whole, parts = of_step(5), []
    for process in range(count):
        with mock.patch.multiple(jax, process_count=lambda: count, process_index=lambda process=process: process):
            parts.append(parallel.own_share(whole))
    assert {len(part) for part in parts} == {share}
    np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_permutation_check_rejects_draws_with_replacement():
    rng = np.random.default_rng(0)
    assert not epochs_are_permutations(lambda step: rng.integers(0, 50, 10), 10, 50)


def test_batches_differ_between_epochs_and_seeds_and_cannot_be_changed():
    epochs = [batches.batch_indices(0, epoch, 50, 50) for epoch in range(4)]
    seeds = [batches.batch_indices(seed, 0, 50, 50) for seed in range(1, 4)]
    assert len({order.tobytes() for order in epochs + seeds}) == 7
    with pytest.raises(ValueError, match="read-only"):
        epochs[0][0] = 1


# On devices ---------------------------------------------------------------------------------------------------------------


def take(iterator, num):
    found = list(itertools.islice(iterator, num))
    iterator.close()
    return found


@both_ways
def test_batches_are_those_of_the_seed_and_step_a_share_on_each_device(keep_on_device):
    """Also from a step on, as a resumed run has them in a new process, which knows nothing of the order."""
    options = {"seed": 3, "batch_size": 8, "keep_on_device": keep_on_device, "first_step": 4}
    orders = [batches.batch_indices(3, step, 8, 50).copy() for step in range(15)][4:]
    batches._epoch_order.cache_clear()
    found = take(batches.device_batches((IMAGES, LABELS), **options), 11)
    for indices, (images, labels) in zip(orders, found, strict=True):
        np.testing.assert_array_equal(images, IMAGES[indices].reshape(2, 4, 4, 3, 2))
        np.testing.assert_array_equal(labels, LABELS[indices].reshape(2, 4))
        assert (images.dtype, labels.dtype) == (jnp.uint8, jnp.int32)
        assert [shard.device for shard in images.addressable_shards] == jax.local_devices()
        assert [shard.data.shape for shard in images.addressable_shards] == [(1, 4, 4, 3, 2)] * 2


def test_small_batches_for_one_cpu_are_made_where_they_are_taken(monkeypatch, tmp_path):
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:1])
    step = jax.pmap(lambda total, batch: total + batch.sum(), in_axes=(None, 0), out_axes=None, devices=jax.devices()[:1])
    total, found = jnp.zeros((), jnp.int32), take(batches.device_batches((IMAGES, LABELS), seed=3, batch_size=10), 5)
    for number, (images, labels) in enumerate(found):
        indices = batches.batch_indices(3, number, 10, 50)
        np.testing.assert_array_equal(images, IMAGES[indices][None])
        assert type(images) is type(labels) is np.ndarray
        total = step(total, labels)
    assert total == LABELS.sum()
    [batch] = take(batches.device_batches(np.ones(50), seed=0, batch_size=10), 1)
    assert batch.dtype == np.float32  # as one on a device
    np.save(tmp_path / "images.npy", IMAGES)
    of_a_file = np.load(tmp_path / "images.npy", mmap_mode="r")
    many = np.repeat(IMAGES, 400, axis=1)
    for slow in ({"examples": of_a_file}, {"examples": np.asarray(of_a_file)}, {"examples": many}):
        [batch] = take(batches.device_batches(**{"examples": IMAGES, "seed": 0, "batch_size": 10, **slow}), 1)
        assert isinstance(batch, jax.Array)


@both_ways
def test_batches_go_into_the_parallel_step_as_they_are(keep_on_device):
    def add(total, batch):
        total = total + jax.lax.psum(batch.sum(), parallel.AXIS)
        return total, total

    chex.clear_trace_counter()
    step = parallel.parallelize(chex.assert_max_traces(add, n=1))
    total = jnp.zeros((), jnp.int32)
    for batch in take(batches.device_batches(LABELS, seed=0, batch_size=10, keep_on_device=keep_on_device), 5):  # an epoch
        total, _ = step(total, batch)
        jax.block_until_ready(total)
    assert total == LABELS.sum()


def test_the_next_batch_is_made_while_the_step_runs_and_its_failure_reaches_the_loop():
    made, waiting = [], threading.Event()

    def make(step):
        made.append((step, threading.current_thread() is threading.main_thread()))
        if step == 1:
            waiting.set()
        if step == 2:
            raise OSError("the disk is gone")
        return step

    iterator = batches._made_ahead(make, 0)
    assert next(iterator) == 0
    assert waiting.wait(timeout=60)  # step 1 was made without being asked for ...
    assert made == [(0, False), (1, False)]  # ... and no more than that
    assert next(iterator) == 1
    with pytest.raises(OSError, match="the disk is gone"):
        next(iterator)


def test_a_closed_or_dropped_iterator_ends_its_thread():
    def threads():
        return [thread for thread in threading.enumerate() if thread.name.startswith("feed")]

    for end in (lambda iterator: iterator.close(), lambda iterator: None):
        iterator = batches.device_batches(IMAGES, seed=0, batch_size=8)
        next(iterator)
        assert len(threads()) == 1
        end(iterator)
        del iterator
        assert not threads()


class Device:
    def __init__(self, platform, limit):
        self.platform, self._limit = platform, limit

    def memory_stats(self):
        return self._limit and {"bytes_limit": self._limit}


def test_what_fits_on_a_device():
    big = np.broadcast_to(np.uint8(0), (1000, 1000))
    assert batches.fits_on_device(big, [Device("gpu", 8_000_000)])
    assert not batches.fits_on_device((big, big), [Device("gpu", 8_000_000)])
    assert not batches.fits_on_device(big, [Device("gpu", 8_000_000), Device("gpu", 7_000_000)])
    assert not batches.fits_on_device(big, [Device("gpu", None)])
    assert not batches.fits_on_device(IMAGES, jax.local_devices())  # of the CPU


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"examples": (IMAGES, LABELS[1:])}, r"same number of examples .* got \[49, 50\]"),
        ({"batch_size": 7}, "7 examples .* over 2 devices: .* multiple of 2"),
        ({"batch_size": 6, "processes": 2}, "6 examples .* over 4 devices: .* multiple of 4"),
        ({"batch_size": 52}, r"\[1, num_examples = 50\], got 52"),
        ({"batch_size": 0}, "got 0"),
        ({"first_step": -1}, "got seed 0 and step -1"),
        ({"seed": -2}, "got seed -2 and step 0"),
    ],
)
def test_impossible_feeds_are_refused_at_the_call(options, message, monkeypatch):
    monkeypatch.setattr(parallel, "num_processes", lambda: options.get("processes", 1))
    own = {name: value for name, value in options.items() if name != "processes"}
    with pytest.raises(ValueError, match=message):
        batches.device_batches(**{"examples": IMAGES, "seed": 0, "batch_size": 8, **own})
