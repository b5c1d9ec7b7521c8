"""Which examples make up a batch, as a pure function of the step, and batches that are ready when their step begins.

A resumed run sees the very batches it would have seen: only the seed and the step decide about indices, and no checkpoint holds
the state of a data loader. A data set that fits is copied to every device once and indexed there: a step then costs the
transfer of its indices. Others are read from their memory map and copied. One thread makes the next batch while the step runs,
unless batches are so small, and for a single CPU, that a thread would take longer. All ways give the same batches.
"""

import functools
import itertools
import mmap
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Int

from iresnet_jax.training import parallel

_RESIDENT_SHARE = 1 / 8  # share of a device's memory that a data set may take
_QUICK_BYTES = 2**16  # of a batch, up to which it is made between two steps


def device_batches(
    examples: Any,
    *,
    seed: int,
    batch_size: int,
    first_step: int = 0,
    keep_on_device: bool | None = None,
) -> Iterator[Any]:
    """Yields the batches of training steps ``first_step``, ``first_step + 1`` and so on, without end.

    The seed and the step alone decide which examples a batch holds, see `batch_indices`. Close the iterator, or
    drop it, to end its thread, if it has one.

    Example::

        for batch in device_batches(images, seed=0, batch_size=128):  # (num_devices, 128 / num_devices, h, w, c)
            state, metrics = step(state, batch)

    Args:
        examples: Array, or pytree of arrays such as images and labels, with the examples along their first axis; None gives
            placeholders of the right number, for steps that draw their own examples.
        seed: Seed of the run, at least 0.
        batch_size: Examples in a batch over all processes and devices.
        first_step: Training step of the first batch.
        keep_on_device: Whether to copy all examples to the devices; by default `fits_on_device`.

    Returns:
        Iterator over pytrees like ``examples`` with arrays of shape ``(num_devices, share, ...)``, a share on each device.
        Small batches for a single CPU are arrays of NumPy, which steps take as well.

    Raises:
        ValueError: If the arrays differ in length, or a batch cannot be split evenly or exceeds the number of examples.
    """
    if examples is None:
        return itertools.repeat(parallel.shard(parallel.own_share(np.zeros(batch_size, np.float32))))
    lengths = {len(leaf) for leaf in jax.tree.leaves(examples)}
    if len(lengths) != 1:
        raise ValueError(f"all arrays must have the same number of examples along their first axis, got {sorted(lengths)}")
    num_examples, devices = lengths.pop(), jax.local_devices()

    def indices_of(step: int) -> np.ndarray:
        return parallel.own_share(batch_indices(seed, step, batch_size, num_examples))

    batch_indices(seed, first_step, batch_size, num_examples)  # mistakes raise at the call, not at the first batch
    parallel.check_divisible(batch_size, parallel.num_processes() * len(devices))

    mesh = Mesh(np.array(devices), ("batch",))
    split = NamedSharding(mesh, PartitionSpec("batch"))

    def share(rows: np.ndarray) -> np.ndarray:
        return rows.reshape(len(devices), -1, *rows.shape[1:]).astype(jax.dtypes.canonicalize_dtype(rows.dtype), copy=False)

    def of_host(step: int) -> Any:
        return jax.tree.map(lambda rows: share(rows[indices_of(step)]), examples)

    keep = fits_on_device(examples, devices) if keep_on_device is None else keep_on_device
    if not keep:
        if _is_quick(examples, batch_size, devices):
            return (of_host(step) for step in itertools.count(first_step))
        return _made_ahead(lambda step: jax.device_put(of_host(step), split), first_step)

    @functools.partial(jax.jit, out_shardings=split)
    def take(examples: Any, indices: jax.Array) -> Any:
        return jax.tree.map(lambda rows: jnp.take(rows, indices, axis=0, mode="clip"), examples)  # no checks, no filling

    resident = jax.device_put(examples, NamedSharding(mesh, PartitionSpec()))
    return _made_ahead(lambda step: take(resident, jax.device_put(share(indices_of(step).astype(np.int32)), split)), first_step)


def fits_on_device(examples: Any, devices: Sequence[Any]) -> bool:
    """Tells whether all examples may stay on each device: if they take no more than an eighth of its memory.

    The answer is no for CPUs, which have the examples in memory anyway, and for devices that do not tell how much they have.
    """
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(examples))
    limits = [(device.memory_stats() or {}).get("bytes_limit", 0) for device in devices if device.platform != "cpu"]
    return len(limits) == len(devices) and all(size <= _RESIDENT_SHARE * limit for limit in limits)


def _is_quick(examples: Any, num_rows: int, devices: Sequence[Any]) -> bool:
    """Whether a thread and a placed copy would take longer than a batch: few rows that are in memory, for a single CPU."""
    leaves = jax.tree.leaves(examples)
    is_alone = [device.platform for device in devices] == ["cpu"] and jax.process_count() == 1
    num_bytes = num_rows * sum(leaf.nbytes // len(leaf) for leaf in leaves)
    return is_alone and num_bytes <= _QUICK_BYTES and not any(map(_is_of_a_file, leaves))


def _is_of_a_file(array: Any) -> bool:
    """Whether an array is a view of a file, also where its type does not say so."""
    while array is not None and not isinstance(array, mmap.mmap):
        array = getattr(array, "base", None)
    return array is not None


def _made_ahead(make: Callable[[int], Any], first_step: int) -> Iterator[Any]:
    make = parallel.in_this_precision(make)
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="feed") as pool:
        upcoming = pool.submit(make, first_step)
        for step in itertools.count(first_step + 1):
            batch = upcoming.result()
            upcoming = pool.submit(make, step)
            yield batch


@functools.lru_cache(maxsize=4)  # consecutive steps share an epoch; a permutation of a large set is worth keeping
def _epoch_order(seed: int, epoch: int, num_examples: int) -> Int[np.ndarray, " n"]:
    order = np.random.default_rng(np.random.SeedSequence([seed, epoch])).permutation(num_examples)
    order = order.astype(np.int32) if num_examples < 2**31 else order
    order.flags.writeable = False  # shared by all callers
    return order


def batch_indices(seed: int, step: int, batch_size: int, num_examples: int) -> Int[np.ndarray, " b"]:
    """Returns the examples that training step ``step`` sees.

    Epoch ``e`` is a permutation of all examples drawn from ``(seed, e)`` and cut into ``num_examples // batch_size`` batches.
    The remainder of an epoch is dropped; as every epoch has its own order, no example is left out for good. Another release of
    NumPy may permute differently.

    Example::

        data.examples["train"][batch_indices(seed=0, step=1000, batch_size=128, num_examples=1257)]

    Args:
        seed: Seed of the run, at least 0.
        step: Training step, counted from 0 over all epochs.
        batch_size: Examples in a batch over all processes, from 1 to ``num_examples``.

    Returns:
        Indices in ``[0, num_examples)``, distinct within a batch and within an epoch; a read-only view.

    Raises:
        ValueError: If an argument is out of its range.
    """
    if not 1 <= batch_size <= num_examples:
        raise ValueError(
            f"batch_size must lie in [1, num_examples = {num_examples}], got {batch_size}: "
            "an epoch must hold at least one whole batch, so choose a smaller batch"
        )
    if seed < 0 or step < 0:
        raise ValueError(f"seed and step must not be negative, got seed {seed} and step {step}: count steps from 0")
    epoch, batch = divmod(step, num_examples // batch_size)
    return _epoch_order(seed, epoch, num_examples)[batch * batch_size : (batch + 1) * batch_size]
