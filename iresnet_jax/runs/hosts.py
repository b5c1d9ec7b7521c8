"""Processes of one run: they find one another, agree, and end together.

A run on many hosts is the same command on each of them. `initialize` joins the processes before JAX
touches a device. What one process alone may do, process 0 does; `from_first` hands its result, or
its failure, to all. What one process alone knows, such as that it was told to stop, `largest` tells
all. JAX's coordinator, in process 0, watches them: if one fails, is stopped or does not answer, JAX
ends the rest, instead of letting them wait in a reduction for ever.

In a process on its own everything here does nothing, or the obvious.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from iresnet_jax.checked_dataclasses import first_difference
from iresnet_jax.runs import signals
from iresnet_jax.training import parallel

INITIALIZATION_S = 300  # at most, until all processes have come
LOST_S = 30  # without a sign of life, after which a process is taken for lost
SHUTDOWN_S = 60  # at most, until all processes have reached the end
# exit status of a process that lost another one: "try again later" among those of sysexits.h
LOST = 75
AGREE_EVERY = 10  # steps after which processes ask each other whether to stop, at the latest

_FAILED = 2  # exit status, as of a mistake in a process on its own
_LAST_WORDS_S = 3.0  # in which processes that fail alike say so before JAX ends them with process 0
_FAILURES = {kind.__name__: kind for kind in (ValueError, RuntimeError, OSError)}
_TRANSPORTS = (
    "Gloo",
    "NCCL",
    "RCCL",
    "collective",
    "coordination service",
    "UNAVAILABLE",
    "DEADLINE_EXCEEDED",
)
# what schedulers that JAX detects call the number of processes
_COUNTS = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")
_POD, _SHARED_PODS = "KUBERNETES_SERVICE_HOST", ("JOB_COMPLETION_INDEX", "TPU_WORKER_HOSTNAMES")


def initialize(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> None:
    """Joins this process to the others of its run, before anything else of JAX is called.

    Arguments that are not given come from the environment, as JAX detects it: TPU pods, SLURM, Open
    MPI, Kubernetes. A process that finds no others stays on its own.

    Args:
        coordinator_address: ``host:port`` of process 0; by default ``JAX_COORDINATOR_ADDRESS``.
        num_processes: Number of processes.
        process_id: Number of this process, from 0.

    Raises:
        ValueError: If arguments are missing or do not fit together.
        RuntimeError: If the other processes do not come in time.
    """
    coordinator_address = coordinator_address or os.environ.get("JAX_COORDINATOR_ADDRESS")
    is_given = any(value is not None for value in (coordinator_address, num_processes, process_id))
    # JAX's own handler of SIGTERM is native and would silence `signals`, which hears Ctrl-C and
    # SIGTERM alike.
    jax.config.update("jax_enable_preemption_service", val=False)
    if num_processes is not None and process_id is not None and not 0 <= process_id < num_processes:
        raise ValueError(
            f"--process_id must lie in [0, {num_processes}), the --num_processes, got {process_id}"
        )
    try:
        jax.distributed.initialize(
            coordinator_address,
            num_processes,
            process_id,
            cluster_detection_method="deactivate" if not is_given and _is_single() else None,
            initialization_timeout=INITIALIZATION_S,
            heartbeat_timeout_seconds=LOST_S,
            shutdown_timeout_seconds=SHUTDOWN_S,
        )
    except ValueError as error:
        # otherwise nothing is given and no cluster is there
        if is_given or "be defined" not in str(error):
            needed = (
                "--coordinator_address, --num_processes and --process_id, where no cluster is "
                "detected that tells them"
            )
            raise ValueError(f"several processes need {needed}: {error}") from None
    except Exception as error:  # whatever the transport raises
        # JAX has started, as in a notebook
        if not is_given and "must be called before" in str(error):
            return
        raise RuntimeError(
            f"the processes of this run could not meet ({' '.join(str(error).split())[:200]}): "
            "start the same command "
            "on all of them, with one --coordinator_address that all can reach and a --process_id "
            "each"
        ) from error


def _is_single() -> bool:
    """Whether a scheduler has started this process alone, with all devices of its host."""
    counts = [os.environ[name] for name in _COUNTS if name in os.environ]
    if counts:
        return counts[0] == "1"
    return _POD in os.environ and not any(name in os.environ for name in _SHARED_PODS)


def is_shared() -> bool:
    """Whether `initialize` has joined this process to others; asking starts no backend."""
    return jax.distributed.is_initialized()


def is_first() -> bool:
    """Whether this process writes logs, checkpoints and reports: process 0, and any process on
    its own.
    """
    return jax.process_index() == 0


def from_first(produce: Callable[[], Any]) -> Any:
    """Calls a function in process 0 and gives its result, or error, to all processes, which all
    have to call this.

    Args:
        produce: Function whose result JSON can hold. ``ValueError``, ``RuntimeError`` and
            ``OSError`` reach all processes.
    """
    if jax.process_count() == 1:
        return produce()
    own, failure = {}, None
    if is_first():
        try:
            own["result"] = produce()
        except tuple(_FAILURES.values()) as error:
            own["kind"] = next(name for name, kind in _FAILURES.items() if isinstance(error, kind))
            own["failure"], failure = str(error), error
    found = json.loads(_of_all(json.dumps(own))[0])
    if failure is not None:
        raise failure
    if "failure" in found:
        raise _FAILURES[found["kind"]](f"process 0: {found['failure']}")
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


def agree_on(name: str, value: Any) -> None:
    """Raises a ValueError, in all processes, if JSON data that all must have alike differ between
    them.

    Args:
        name: What they are, for the message.
        value: The data in this process.
    """
    if jax.process_count() == 1:
        return
    first, *others = map(json.loads, _of_all(json.dumps(value)))
    for process, other in enumerate(others, start=1):
        if difference := first_difference(
            other, first, name, (f"in process {process}", "in process 0")
        ):
            raise ValueError(f"all processes need the same {name}: {difference}")


def largest(number: int) -> int:
    """The largest of the numbers of all processes, which all have to call this."""
    return (
        number
        if jax.process_count() == 1
        else int(np.max(multihost_utils.process_allgather(np.int32(number))))
    )


def _of_all(text: str) -> list[str]:
    """The texts of all processes, in their order."""
    own = text.encode()
    rows = multihost_utils.process_allgather(np.frombuffer(own.ljust(largest(len(own))), np.uint8))
    return [np.asarray(row).tobytes().decode().rstrip(" ") for row in rows]


@contextlib.contextmanager
def ending_together() -> Iterator[None]:
    """Within ``with``, all processes run; behind it, each goes on with its own devices.

    A process that is told to stop leaves by `Stopped` like all others. One that fails says why and
    ends at once: to leave Python in an orderly way would wait for the others. JAX then ends these,
    unless they notice first, by a reduction that broke, that another process is gone.
    """
    try:
        yield
    except signals.Stopped:
        _leave()
        raise
    except Exception as error:
        if not is_shared():
            raise
        reason, is_lost = (
            " ".join(str(error).split()),
            any(sign in str(error) for sign in _TRANSPORTS),
        )
        if not isinstance(error, tuple(_FAILURES.values())):
            traceback.print_exc()
        elif is_lost:
            advice = (
                "the same command on all processes, or on fewer, goes on from the last checkpoint"
            )
            signals.say(
                "another process has failed or cannot be reached, see what it said: "
                f"{advice} ({reason[:200]})"
            )
        else:
            signals.say(f"error: {reason}")
        sys.stdout.flush()
        if is_first():
            time.sleep(_LAST_WORDS_S)
        os._exit(LOST if is_lost else _FAILED)
    else:
        _leave()


def _leave() -> None:
    """Waits for all processes to get here and parts from them."""
    if is_shared():
        jax.distributed.shutdown()
        parallel.go_on_alone()
