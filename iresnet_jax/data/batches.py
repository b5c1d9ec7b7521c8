"""Which examples make up a batch, as a pure function of the step: a resumed run sees the very batches it would have seen.

Only indices are decided here, on the host; nothing is stored between calls, so no checkpoint holds the state of a data loader.
"""

import functools

import numpy as np
from jaxtyping import Int


@functools.lru_cache(maxsize=4)  # consecutive steps share an epoch; a permutation of a large set is worth keeping
def _epoch_order(seed: int, epoch: int, num_examples: int) -> Int[np.ndarray, " n"]:
    order = np.random.default_rng(np.random.SeedSequence([seed, epoch])).permutation(num_examples)
    order.flags.writeable = False  # shared by all callers
    return order


def batch_indices(
    seed: int, step: int, batch_size: int, num_examples: int, *, process_index: int = 0, process_count: int = 1
) -> Int[np.ndarray, " b"]:
    """Returns the examples that training step ``step`` sees, or one process's share of them.

    Epoch ``e`` is a permutation of all examples drawn from ``(seed, e)`` and cut into ``num_examples // batch_size`` batches.
    The remainder of an epoch is dropped; as every epoch is permuted anew, no example is left out for good. Another release of
    NumPy may permute differently. Processes take contiguous shares of the batch in the order of their index, so the whole batch
    is the same on any number of hosts.

    Example::

        data.examples["train"][batch_indices(seed=0, step=1000, batch_size=128, num_examples=1257)]

    Args:
        seed: Seed of the run, at least 0.
        step: Training step, counted from 0 over all epochs.
        batch_size: Examples in a batch over all processes, from 1 to ``num_examples``.
        num_examples: Number of examples in the training split.
        process_index: Process whose share is returned, as ``jax.process_index()``.
        process_count: Number of processes that share a batch, as ``jax.process_count()``; it must divide ``batch_size``.

    Returns:
        Indices in ``[0, num_examples)``, distinct within a batch and within an epoch; a read-only view.

    Raises:
        ValueError: If ``batch_size`` does not lie in ``[1, num_examples]`` or cannot be shared evenly, ``process_index`` does
            not lie in ``[0, process_count)``, or ``seed`` or ``step`` is negative.
    """
    if not 1 <= batch_size <= num_examples:
        raise ValueError(
            f"batch_size must lie in [1, num_examples = {num_examples}], got {batch_size}: "
            "an epoch must hold at least one whole batch, so choose a smaller batch"
        )
    if seed < 0 or step < 0:
        raise ValueError(f"seed and step must not be negative, got seed {seed} and step {step}: count steps from 0")
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index must lie in [0, process_count = {process_count}), got {process_index}")
    if batch_size % process_count:
        raise ValueError(
            f"a batch of {batch_size} examples cannot be shared evenly by {process_count} processes: "
            f"choose a batch_size that is a multiple of {process_count}"
        )
    epoch, batch = divmod(step, num_examples // batch_size)
    share = batch_size // process_count
    start = batch * batch_size + process_index * share
    return _epoch_order(seed, epoch, num_examples)[start : start + share]
