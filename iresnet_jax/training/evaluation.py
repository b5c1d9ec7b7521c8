"""Any evaluation of examples, one device's share at a time, on all devices."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from iresnet_jax.data.batches import eval_batches
from iresnet_jax.training import parallel


def over_batches(
    evaluate: Callable[[Any, Any], Any],
    weights: Any,
    batch_of: Callable[[np.ndarray], Any],
    num_examples: int,
    batch_size: int,
    *,
    num_devices: int | None = None,
) -> Any:
    """Runs a parallel evaluation over all examples.

    Args:
        evaluate: From `parallel.parallelize_eval`.
        weights: Its first argument.
        batch_of: The batch of examples by their places, as a pytree.
        num_examples: How many there are.
        batch_size: At most as many at once; rounded up to a multiple of the number of devices.
        num_devices: Devices to use, from the first; all local ones by default.

    Returns:
        The outputs of all examples in order, on the host.
    """
    parts = []
    for indices, mask in eval_batches(num_examples, even_batch_size(batch_size, num_examples)):
        batch = parallel.shard(batch_of(indices), num_devices=num_devices)
        outputs = parallel.unshard(evaluate(weights, batch))
        parts.append(jax.tree.map(lambda values, mask=mask: values[mask], outputs))
    return jax.tree.map(lambda *values: np.concatenate(values), *parts)


def even_batch_size(batch_size: int, num_examples: int) -> int:
    """The least multiple of the number of devices that holds a batch, or all examples if they are fewer."""
    size, multiple = min(batch_size, num_examples), jax.local_device_count()
    return -(-size // multiple) * multiple
