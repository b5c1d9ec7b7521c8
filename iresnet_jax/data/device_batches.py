"""Batches of training examples on the devices, ready when the step that needs them begins.

A data set that fits is copied to every device once and indexed there: a step then costs the transfer of its indices. Others are
read from their memory map and copied. Both give the same batches, and one thread makes the next of them while the step runs.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from iresnet_jax.data.batches import batch_indices

_RESIDENT_SHARE = 1 / 8  # share of a device's memory that a data set may take


def device_batches(
    examples: Any,
    *,
    seed: int,
    batch_size: int,
    first_step: int = 0,
    process_index: int | None = None,
    process_count: int | None = None,
    devices: Sequence[Any] | None = None,
    keep_on_device: bool | None = None,
) -> Iterator[Any]:
    """Yields the batches of training steps ``first_step``, ``first_step + 1`` and so on, without end.

    The seed and the step alone decide which examples a batch holds, see `batch_indices`. Close the iterator, or drop it, to end
    its thread.

    Example::

        for batch in device_batches(images, seed=0, batch_size=128):  # (num_devices, 128 / num_devices, h, w, c)
            state, metrics = step(state, batch)

    Args:
        examples: Array, or pytree of arrays such as images and labels, with the examples along their first axis.
        seed: Seed of the run, at least 0.
        batch_size: Examples in a batch over all processes and devices.
        first_step: Training step of the first batch.
        process_index: Index of this process; by default that of JAX.
        process_count: Number of processes that share a batch; by default that of JAX.
        devices: Devices for this process's share of a batch; by default all its devices.
        keep_on_device: Whether to copy all examples to the devices; by default `fits_on_device`.

    Returns:
        Iterator over pytrees like ``examples`` with arrays of shape ``(num_devices, share, ...)``, a share on each device.

    Raises:
        ValueError: If the arrays differ in length, or a batch cannot be split evenly or exceeds the number of examples.
    """
    lengths = {len(leaf) for leaf in jax.tree.leaves(examples)}
    if len(lengths) != 1:
        raise ValueError(f"all arrays must have the same number of examples along their first axis, got {sorted(lengths)}")
    num_examples = lengths.pop()
    devices = list(jax.local_devices() if devices is None else devices)
    index = jax.process_index() if process_index is None else process_index
    count = jax.process_count() if process_count is None else process_count

    def indices_of(step: int) -> np.ndarray:
        return batch_indices(seed, step, batch_size, num_examples, process_index=index, process_count=count)

    share = len(indices_of(first_step))  # mistakes raise at the call, not at the first batch
    if share % len(devices):
        raise ValueError(
            f"the {share} examples of a process cannot be split evenly over its {len(devices)} devices: "
            f"choose a batch_size that is a multiple of {len(devices) * count}"
        )
    mesh = Mesh(np.array(devices), ("batch",))
    split = NamedSharding(mesh, PartitionSpec("batch"))

    def place(batch: Any) -> Any:
        return jax.device_put(jax.tree.map(lambda rows: rows.reshape(len(devices), -1, *rows.shape[1:]), batch), split)

    keep = fits_on_device(examples, devices) if keep_on_device is None else keep_on_device
    if not keep:
        return _made_ahead(lambda step: place(jax.tree.map(lambda rows: rows[indices_of(step)], examples)), first_step)
    resident = jax.device_put(examples, NamedSharding(mesh, PartitionSpec()))
    take = jax.jit(_take, out_shardings=split)
    return _made_ahead(lambda step: take(resident, place(indices_of(step).astype(np.int32))), first_step)


def fits_on_device(examples: Any, devices: Sequence[Any]) -> bool:
    """Tells whether all examples may stay on each device: if they take no more than an eighth of its memory.

    The answer is no for CPUs, which have the examples in memory anyway, and for devices that do not tell how much they have.
    """
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(examples))
    limits = [(device.memory_stats() or {}).get("bytes_limit", 0) for device in devices if device.platform != "cpu"]
    return len(limits) == len(devices) and all(size <= _RESIDENT_SHARE * limit for limit in limits)


def _take(examples: Any, indices: jax.Array) -> Any:
    return jax.tree.map(lambda rows: jnp.take(rows, indices, axis=0, mode="clip"), examples)  # "clip": no checks, no filling


def _made_ahead(make: Callable[[int], Any], first_step: int) -> Iterator[Any]:
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="feed") as pool:
        upcoming = pool.submit(make, first_step)
        for step in itertools.count(first_step + 1):
            batch = upcoming.result()
            upcoming = pool.submit(make, step)
            yield batch
