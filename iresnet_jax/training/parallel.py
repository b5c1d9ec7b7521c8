"""Data parallelism over the devices of all processes: the only file that mentions ``jax.pmap``.

A step is written for one device and its share of the batch: it differentiates the loss of that
share, then averages gradients and metrics over ``AXIS`` with ``jax.lax.pmean``. Its results under
``jax.pmap`` (many devices) and ``jax.vmap(..., axis_name=AXIS)`` (one device, in tests) are equal.
The state goes in and out without a device axis. If a ``pmean`` is forgotten, pmap returns the first
device's value and vmap raises: test every step under both.

Devices are in the order of their processes, so a process's share of a batch is contiguous. A
process that has parted from the others (`hosts.ending_together`) goes on with its own devices.

Batches are pure functions of seed and step, so that a resumed run sees the very batches it would
have seen. They are arrays of NumPy: JAX runs steps asynchronously, and the host takes the next
batch from memory or from the map of a file while the devices are at work on the last one.
"""

import functools
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Array, Int, PRNGKeyArray, Shaped

from iresnet_jax.maths import platforms

AXIS = "batch"
FAILURES = ValueError, RuntimeError, OSError  # of process 0, which all processes hear of
_is_alone = False


def parallelize(step_fn: Callable[[Any, Any, Any], tuple[Any, Any]]) -> Callable[..., Any]:
    """Compiles a training step for all devices of all processes, once for each shape of batches.

    Args:
        step_fn: ``(state, fixed, batch) -> (state, metrics)`` on one device's share of the batch.
            All it returns must be equal on all devices: ``pmean`` the loss, the gradients and all
            statistics over ``AXIS``.

    Returns:
        The same function for this process's share of a batch, from `shard`. It donates the state
        that it is given; ``fixed`` is what no step changes.

    Example:
        >>> def step_fn(state, fixed, batch):
        ...     return state + fixed, {"mean": jax.lax.pmean(batch.mean(), AXIS)}
        >>> step = parallelize(step_fn)
        >>> state, metrics = step(jnp.zeros(()), 1.0, shard(np.ones((8, 2), np.float32)))
    """
    mapped = jax.pmap(
        step_fn,
        axis_name=AXIS,
        in_axes=(None, None, 0),
        out_axes=(None, None),
        donate_argnums=(0,),
        devices=_devices(),
    )
    programs: dict[Any, Any] = {}

    def step(state: Any, fixed: Any, batch: Any) -> tuple[Any, Any]:
        shapes = tuple((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(batch))
        if shapes not in programs:
            programs[shapes] = mapped
            # placed where a step returns it, as a program is for one placement
            state, fixed = on_local_devices((state, fixed), num_devices=shapes[0][0][0])
            # ``pmap`` takes no options of the compiler, and what it compiles no shares of processes
            if jax.process_count() == 1:
                lowered = mapped.lower(state, fixed, batch)
                options = platforms.compile_options()
                programs[shapes] = lowered.compile(compiler_options=options)
        outputs = programs[shapes](state, fixed, batch)
        if jax.local_device_count() > 1 and jax.default_backend() == "cpu":
            # Threads are as many as the devices. One that waits in a reduction and one that waits
            # for the step before its own leave none to go on (jaxlib 0.10): a step must end before
            # the next one is queued.
            jax.block_until_ready(outputs)
        return outputs

    return step


def for_devices(step_fn: Callable[[Any, Any, Any], Any], devices: Sequence[Any]) -> Any:
    """The mapping of `parallelize` for devices that this process need not have, of whole batches:
    to trace and compile.

    ``pmap`` lowers for devices of this process alone, and does not say what it traced.
    """
    mesh = jax.sharding.Mesh(np.array(devices), (AXIS,))
    split, whole = jax.sharding.PartitionSpec(AXIS), jax.sharding.PartitionSpec()
    # With `check_vma`, gradients by the replicated state would come summed over devices already.
    mapped = jax.shard_map(
        step_fn,
        mesh=mesh,
        in_specs=(whole, whole, split),
        out_specs=(whole, whole),
        check_vma=False,
    )
    return jax.jit(mapped, donate_argnums=0)


def num_processes() -> int:
    """Processes that share a batch."""
    return 1 if _is_alone else jax.process_count()


def all_devices() -> int:
    """Devices that share a batch, over all processes."""
    return jax.local_device_count() if _is_alone else jax.device_count()


def go_on_alone() -> None:
    """From now on this process uses its own devices only; see `hosts.ending_together`."""
    global _is_alone
    _is_alone = jax.process_count() > 1


def _devices() -> tuple[Any, ...] | None:
    """All devices by process, or those of a process that is alone; None, JAX's own choice, where
    there is one process.
    """
    if jax.process_count() == 1:
        return None
    if _is_alone:
        return tuple(jax.local_devices())
    return tuple(sorted(jax.devices(), key=lambda device: (device.process_index, device.id)))


def own_share(indices: Any) -> Any:
    """This process's share of the places of a batch: contiguous, in the order of the processes."""
    count = num_processes()
    return (
        indices
        if count == 1
        else indices.reshape(count, -1, *indices.shape[1:])[jax.process_index()]
    )


def shard(batch: Any, *, num_devices: int | None = None) -> Any:
    """Splits a batch into a contiguous share for each device: ``(n, ...)`` becomes ``(num_devices,
    n / num_devices, ...)``.

    Args:
        batch: Pytree of arrays whose first axis counts the same ``n`` examples.
        num_devices: Devices to use, from the first; all local ones by default.
    """
    num = jax.local_device_count() if num_devices is None else num_devices
    return jax.tree.map(lambda leaf: leaf.reshape((num, -1, *leaf.shape[1:])), batch)


def num_rows(x: Any) -> int:
    """Examples in a pytree of arrays."""
    return len(jax.tree.leaves(x)[0])


# ---------------------------------------------------------------------------- batches of a training


def device_batches(
    examples: Any, *, seed: int, batch_size: int, first_step: int = 0
) -> Iterator[Any]:
    """Yields the batches of training steps ``first_step``, ``first_step + 1`` and so on, without
    end.

    Example::

        # (num_devices, 128 / num_devices, h, w, c)
        for batch in device_batches(images, seed=0, batch_size=128):
            state, metrics = step(state, fixed, batch)

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
    """
    if examples is None:
        return itertools.repeat(shard(own_share(np.zeros(batch_size, np.float32))))

    def batch(step: int) -> Any:
        rows = own_share(batch_indices(seed, step, batch_size, num_rows(examples)))
        taken = jax.tree.map(lambda leaf: leaf[rows], examples)
        return shard(jax.tree.map(lambda leaf: leaf.astype(_dtype_in_jax(leaf), copy=False), taken))

    return map(batch, itertools.count(first_step))


def abstract_batch(examples: Any, batch_size: int) -> Any:
    """Shapes and dtypes of a batch before it is split."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((batch_size, *leaf.shape[1:]), _dtype_in_jax(leaf)),
        examples,
    )


def _dtype_in_jax(leaf: Any) -> Any:
    return jax.dtypes.canonicalize_dtype(leaf.dtype)  # float32 for float64, unless that is enabled


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
    """Places of the examples that a training step sees, of all processes; read-only.

    Epoch ``e`` is a permutation of all examples drawn from ``(seed, e)`` and cut into
    ``num_examples // batch_size`` batches. The remainder of an epoch is dropped; as every epoch has
    its own order, no example is left out for good. Another release of NumPy may permute
    differently.
    """
    epoch, batch = divmod(step, num_examples // batch_size)
    return _epoch_order(seed, epoch, num_examples)[batch * batch_size : (batch + 1) * batch_size]


# ------------------------------------------------------------------------------------- evaluations


def over_batches(
    evaluate: Callable[[Any, Any], Any],
    state: Any,
    batch_of: Callable[[np.ndarray], Any],
    num_examples: int,
    batch_size: int,
) -> Any:
    """Evaluates all examples by all devices; the same function twice compiles once.

    Args:
        evaluate: ``(state, batch) -> outputs`` on one device's share of a batch; the first axis of
            every output counts its examples.
        state: What the evaluation takes beside examples, such as a model. It is not donated.
        batch_of: Function that makes a pytree of the examples in given places, such as `rows_of`
            arrays.
        num_examples: Number of all examples.
        batch_size: Most examples at once, rounded up to a multiple of the number of devices;
            batches are equally large.

    Returns:
        The outputs of all examples in order, on the host.
    """
    num_devices, is_shared = all_devices(), num_processes() > 1
    num_batches = -(-num_examples // batch_size)
    size = -(-num_examples // (num_batches * num_devices)) * num_devices
    mapped, state = _mapped_eval(evaluate, _devices(), is_shared), on_local_devices(state)
    parts = []
    for first in range(0, num_examples, size):
        # the last batch is filled up
        places = np.minimum(np.arange(first, first + size), num_examples - 1)
        outputs = jax.device_get(mapped(state, shard(batch_of(own_share(places)))))
        if not is_shared:
            outputs = jax.tree.map(lambda leaf: leaf.reshape((-1, *leaf.shape[2:])), outputs)
        parts.append(outputs)
    return jax.tree.map(lambda *values: np.concatenate(values)[:num_examples], *parts)


def rows_of(*arrays: Any) -> Callable[[np.ndarray], tuple[Any, ...]]:
    """Function that gives the rows of arrays in given places; None stays None."""
    return lambda places: jax.tree.map(lambda array: array[places], arrays)


@functools.lru_cache(maxsize=64)
def _mapped_eval(fn, devices, is_shared):
    if not is_shared:
        return jax.pmap(fn, axis_name=AXIS, in_axes=(None, 0), out_axes=0, devices=devices)

    def gathered(state, batch):  # a process can read the outputs of its own devices only
        return jax.lax.all_gather(fn(state, batch), AXIS, tiled=True)

    return jax.pmap(gathered, axis_name=AXIS, in_axes=(None, 0), out_axes=None, devices=devices)


def example_keys(key: PRNGKeyArray, local_batch_size: int) -> Shaped[Array, "b ..."]:
    """A random key for each example in a step, the same for any number of devices: ``fold_in(key,
    place in the whole batch)``.

    Args:
        key: Key of the step, equal on all devices, such as ``fold_in(run_key, step)``.
        local_batch_size: Examples on one device.
    """
    first = jax.lax.axis_index(AXIS) * local_batch_size
    return jax.vmap(lambda place: jax.random.fold_in(key, place))(
        first + jnp.arange(local_batch_size)
    )


def on_first_device(tree: Any) -> Any:
    """Arrays that are equal on all devices, on the first one alone: what follows is then
    computed once.
    """
    return jax.device_put(tree, jax.local_devices()[0])


def on_local_devices(tree: Any, *, num_devices: int | None = None) -> Any:
    """Arrays on each device of this process, or on its first ``num_devices``; an evaluation has
    to copy a state that is not.
    """
    placement = _replicated(jax.local_device_count() if num_devices is None else num_devices)

    def placed(leaf):  # no alias, which a step could not free
        is_there = getattr(leaf, "sharding", None) == placement
        return leaf if is_there else jax.device_put(leaf, placement, may_alias=False)

    return jax.tree.map(placed, tree)


@functools.cache
def _replicated(num_devices: int) -> jax.sharding.NamedSharding:
    mesh = jax.sharding.Mesh(np.array(jax.local_devices()[:num_devices]), (AXIS,))
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())


# ------------------------------------------------------------------ what processes do together


def is_first() -> bool:
    """Whether this process writes logs, checkpoints and reports: process 0, and any process on
    its own.
    """
    return jax.process_index() == 0


def from_first(produce: Callable[[], Any]) -> Any:
    """Calls a function in process 0 and gives its result, or error, to all processes, which all
    have to call this.

    Args:
        produce: Function whose result JSON can hold. Its `FAILURES` are a ``RuntimeError`` in
            the other processes.
    """
    if jax.process_count() == 1:
        return produce()
    own, failure = {}, None
    if is_first():
        try:
            own["result"] = produce()
        except FAILURES as error:
            own["failure"], failure = str(error), error
    found = json.loads(texts_of_all(json.dumps(own))[0])
    if failure is not None:
        raise failure
    if "failure" in found:
        raise RuntimeError(f"process 0: {found['failure']}")
    return found["result"]


def broadcast(tree: Any) -> Any:
    """Arrays of process 0, bit for bit, in all processes; the others pass arrays of the same
    shapes and dtypes.
    """
    if jax.process_count() == 1:
        return tree
    # As bytes: a sum with zeros, by which values travel, would make -0.0 of 0.0.
    arrays = jax.tree.map(np.asarray, tree)
    received = multihost_utils.broadcast_one_to_all(
        jax.tree.map(lambda leaf: leaf.reshape(-1).view(np.uint8), arrays)
    )
    return jax.tree.map(
        lambda leaf, sent: np.array(sent).view(leaf.dtype).reshape(leaf.shape), arrays, received
    )


def largest(number: int) -> int:
    """The largest of the numbers of all processes, which all have to call this."""
    return (
        number
        if jax.process_count() == 1
        else int(np.max(multihost_utils.process_allgather(np.int32(number))))
    )


def texts_of_all(text: str) -> list[str]:
    """The texts of all processes, in their order."""
    own = text.encode()
    rows = multihost_utils.process_allgather(np.frombuffer(own.ljust(largest(len(own))), np.uint8))
    return [np.asarray(row).tobytes().decode().rstrip(" ") for row in rows]
