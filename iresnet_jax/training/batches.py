"""Which examples make up a batch, as a pure function of the step, and the batches themselves.

A resumed run sees the very batches it would have seen: only the seed and the step decide about
indices, and no checkpoint holds the state of a data loader. Batches are arrays of NumPy, taken from
the host's memory or from the map of a file. JAX runs steps asynchronously, so the host takes the
next batch while the devices are at work on the last one.
"""

import functools
import itertools
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from iresnet_jax.training import parallel


def device_batches(
    examples: Any, *, seed: int, batch_size: int, first_step: int = 0
) -> Iterator[Any]:
    """Yields the batches of training steps ``first_step``, ``first_step + 1`` and so on, without
    end.

    The seed and the step alone decide which examples a batch holds, see `batch_indices`.

    Example::

        # (num_devices, 128 / num_devices, h, w, c)
        for batch in device_batches(images, seed=0, batch_size=128):
            state, metrics = step(state, batch)

    Args:
        examples: Array, or pytree of arrays such as images and labels, with the examples along
            their first axis; None gives placeholders of the right number, for steps that draw their
            own examples.
        seed: Seed of the run, at least 0.
        batch_size: Examples in a batch over all processes and devices, a multiple of their number.
        first_step: Training step of the first batch.

    Returns:
        Iterator over pytrees like ``examples`` with arrays of shape ``(num_devices, share, ...)``,
        in the types that JAX has.

    Raises:
        ValueError: If a batch exceeds the number of examples.
    """
    if examples is None:
        return itertools.repeat(
            parallel.shard(parallel.own_share(np.zeros(batch_size, np.float32)))
        )
    num_examples, num_devices = len(jax.tree.leaves(examples)[0]), jax.local_device_count()
    # mistakes raise at the call, not at the first batch
    batch_indices(seed, first_step, batch_size, num_examples)

    def batch(step: int) -> Any:
        rows = parallel.own_share(batch_indices(seed, step, batch_size, num_examples))
        return jax.tree.map(lambda leaf: share(leaf[rows]), examples)

    def share(rows: np.ndarray) -> np.ndarray:
        dtype = jax.dtypes.canonicalize_dtype(rows.dtype)
        return rows.reshape(num_devices, -1, *rows.shape[1:]).astype(dtype, copy=False)

    return map(batch, itertools.count(first_step))


# consecutive steps share an epoch; a permutation of a large set is worth keeping
@functools.lru_cache(maxsize=4)
def _epoch_order(seed: int, epoch: int, num_examples: int) -> Int[np.ndarray, " n"]:
    order = np.random.default_rng(np.random.SeedSequence([seed, epoch])).permutation(num_examples)
    order = order.astype(np.int32) if num_examples < 2**31 else order
    order.flags.writeable = False  # shared by all callers
    return order


def batch_indices(
    seed: int, step: int, batch_size: int, num_examples: int
) -> Int[np.ndarray, " b"]:
    """Returns the examples that training step ``step`` sees.

    Epoch ``e`` is a permutation of all examples drawn from ``(seed, e)`` and cut into
    ``num_examples // batch_size`` batches. The remainder of an epoch is dropped; as every epoch has
    its own order, no example is left out for good. Another release of NumPy may permute
    differently.

    Args:
        seed: Seed of the run, at least 0.
        step: Training step, counted from 0 over all epochs.
        batch_size: Examples in a batch over all processes, from 1 to ``num_examples``.

    Returns:
        Indices in ``[0, num_examples)``, distinct within a batch and within an epoch; a read-only
        view.

    Raises:
        ValueError: If an argument is out of its range.
    """
    if not 1 <= batch_size <= num_examples:
        raise ValueError(
            f"batch_size must lie in [1, num_examples = {num_examples}], got {batch_size}: "
            "an epoch must hold at least one whole batch, so choose a smaller batch"
        )
    epoch, batch = divmod(step, num_examples // batch_size)
    return _epoch_order(seed, epoch, num_examples)[batch * batch_size : (batch + 1) * batch_size]
