"""The processes of one run: how they find one another, agree, and end together.

A run on many hosts is the same command on each of them. `initialize` joins the processes before JAX touches a device. What one
process alone may do, process 0 does; `from_first` hands its result, or its failure, to all. A thread in each process watches
the others: if one fails, is stopped or does not answer, the rest end with a sentence that names it, instead of waiting in a
reduction for ever. All of this goes through the key-value store of JAX's coordinator, which process 0 hosts.

In a process on its own everything here does nothing, or the obvious.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from iresnet_jax.runs import interruption
from iresnet_jax.training import parallel

INITIALIZATION_S = 300  # at most, until all processes have come
LOST_S = 30.0  # without a sign of life, after which a process is taken for lost
SHUTDOWN_S = 60  # at most, until all processes have reached the end
WAIT_S = 3600.0  # at most, for what process 0 does alone; whether it lives is the watcher's business
LOST = 75  # exit status: "try again later" among those of sysexits.h

_FAILED = 2  # exit status, as of a mistake in a process on its own
_OF_TRANSPORTS = ("Gloo", "NCCL", "RCCL", "collective", "coordination service", "UNAVAILABLE", "DEADLINE_EXCEEDED")
_BEAT_S = 1.0
_DONE, _UNREACHABLE = "done", "process 0, which coordinates the others, cannot be reached"
_BEATS, _ENDS, _RESULTS = "iresnet/beats/", "iresnet/ends/", "iresnet/results/"
_FAILURES = {kind.__name__: kind for kind in (ValueError, RuntimeError, OSError)}
_numbers = itertools.count()  # of results, in the same order in all processes
_watcher: _Watcher | None = None


def initialize(coordinator_address: str | None = None, num_processes: int | None = None, process_id: int | None = None) -> None:
    """Joins this process to the others of its run, before anything else of JAX is called.

    Arguments that are not given come from the environment, as JAX detects it: TPU pods, SLURM, Open MPI, Kubernetes. A process
    that finds no others stays on its own.

    Args:
        coordinator_address: ``host:port`` of process 0; by default ``JAX_COORDINATOR_ADDRESS``.
        num_processes: Number of processes.
        process_id: Number of this process, from 0.

    Raises:
        ValueError: If arguments are missing or do not fit together.
        RuntimeError: If the other processes do not come in time.
    """
    global _watcher
    coordinator_address = coordinator_address or os.environ.get("JAX_COORDINATOR_ADDRESS")
    given = {"coordinator_address": coordinator_address, "num_processes": num_processes, "process_id": process_id}
    detected = _detected_processes()
    if detected is None and any(value is not None for value in given.values()):
        if missing := [f"--{name}" for name, value in given.items() if value is None]:
            raise ValueError(f"several processes need {' and '.join(missing)} too: no cluster was detected that tells them")
    count = detected if num_processes is None else num_processes
    if count is None or (count == 1 and coordinator_address is None):
        return
    if count < 1 or (process_id is not None and not 0 <= process_id < count):
        raise ValueError(f"--process_id must lie in [0, {count}) and --num_processes be positive, got {process_id} and {count}")
    # JAX's own handler of SIGTERM is native and would silence `interruption`, which hears Ctrl-C and SIGTERM alike.
    jax.config.update("jax_enable_preemption_service", val=False)
    try:
        jax.distributed.initialize(
            coordinator_address,
            num_processes,
            process_id,
            initialization_timeout=INITIALIZATION_S,
            shutdown_timeout_seconds=SHUTDOWN_S,
        )
    except Exception as error:  # whatever the transport raises
        raise RuntimeError(
            f"the {count} processes of this run could not meet ({' '.join(str(error).split())[:200]}): start the same command "
            "on all of them, with one --coordinator_address that all can reach and a --process_id each"
        ) from error
    _wait_before_aborting()
    _watcher = _Watcher(_client(), jax.process_index(), jax.process_count())


def _wait_before_aborting() -> None:
    """Makes a thread that aborts this process sleep first, as JAX's do where process 0 is gone: the watcher can say so.

    No Python runs in such a thread, so the handler is ``sleep`` of the C library, which takes the number of the signal for
    seconds: six. Then ``abort`` ends the process as ever; a SIGABRT that another process sends is only waited for.
    """
    if os.name == "posix":
        _handle_aborts(ctypes.cast(ctypes.CDLL(None).sleep, ctypes.c_void_p))


def _handle_aborts(handler: ctypes.c_void_p) -> None:
    library = ctypes.CDLL(None)
    library.signal.argtypes, library.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    library.signal(signal.SIGABRT, handler)


def is_shared() -> bool:
    """Whether `initialize` has joined this process to others; asking starts no backend."""
    return _watcher is not None


def is_first() -> bool:
    """Whether this process writes logs, checkpoints and reports: process 0, and any process on its own."""
    return jax.process_index() == 0


def from_first(produce: Callable[[], Any]) -> Any:
    """What a function returns, or raises, in process 0, in all processes, which all have to call this.

    Args:
        produce: Function whose result JSON can hold. ``ValueError``, ``RuntimeError`` and ``OSError`` reach all processes.
    """
    if jax.process_count() == 1:
        return produce()
    key = f"{_RESULTS}{next(_numbers)}"
    if not is_first():
        found = json.loads(_wait_for(key))
        if "failure" in found:
            raise _FAILURES[found["kind"]](f"process 0: {found['failure']}")
        return found["result"]
    try:
        result = produce()
    except tuple(_FAILURES.values()) as error:
        kind = next(name for name, kind in _FAILURES.items() if isinstance(error, kind))
        _client().key_value_set(key, json.dumps({"kind": kind, "failure": str(error)}))
        raise
    _client().key_value_set(key, json.dumps({"result": result}))
    return result


def broadcast(tree: Any) -> Any:
    """Arrays of process 0, bit for bit, in all processes; the others pass arrays of the same shapes and dtypes."""
    if jax.process_count() == 1:
        return tree
    # As bytes: a sum with zeros, by which values travel, would make -0.0 of 0.0.
    arrays = jax.tree.map(np.asarray, tree)
    received = multihost_utils.broadcast_one_to_all(jax.tree.map(lambda leaf: leaf.reshape(-1).view(np.uint8), arrays))
    return jax.tree.map(lambda leaf, sent: np.array(sent).view(leaf.dtype).reshape(leaf.shape), arrays, received)


def agree_on(name: str, value: str) -> None:
    """Raises a ValueError, in all processes, if a text that all must have alike differs between them.

    Args:
        name: What it is, for the message.
        value: The text in this process.
    """
    if jax.process_count() == 1:
        return
    number = next(_numbers)
    _client().key_value_set(f"{_RESULTS}{number}/{jax.process_index()}", value)
    values = [_wait_for(f"{_RESULTS}{number}/{process}") for process in range(jax.process_count())]
    for process, other in enumerate(values):
        if other != values[0]:
            raise ValueError(f"process {process} has another {name} than process 0: {other[:80]} instead of {values[0][:80]}")


@contextlib.contextmanager
def ending_together() -> Iterator[None]:
    """Within ``with``, all processes run; behind it, each goes on with its own devices.

    A process that is told to stop leaves by `Stopped` like all others. One that fails says why and ends, and the others end
    with a sentence about it. Where a reduction broke, another process has failed or is gone: this one waits until its watcher
    knows which.
    """
    try:
        yield
    except interruption.Stopped:
        _leave()
        raise
    except Exception as error:
        if _watcher is None:
            raise
        if not isinstance(error, tuple(_FAILURES.values())) or any(sign in str(error) for sign in _OF_TRANSPORTS):
            time.sleep(LOST_S + 10 * _BEAT_S)  # the watcher ends the process
        _end(" ".join(str(error).split()))
    else:
        _leave()


def _end(reason: str) -> None:
    """Ends this process after a failure. To leave Python in an orderly way would wait for the others."""
    assert _watcher is not None
    interruption.say(f"error: {reason}")
    _watcher.announce(f"failed: {reason}", _FAILED)
    sys.stdout.flush()
    os._exit(_FAILED)


def _leave() -> None:
    """Waits for all processes to get here and parts from them."""
    global _watcher
    if _watcher is None:
        return
    _watcher.stop()
    _watcher = None
    jax.distributed.shutdown()
    if os.name == "posix":
        _handle_aborts(ctypes.c_void_p(signal.SIG_DFL))
    parallel.go_on_alone()


class _Watcher:
    """Threads that show the other processes that this one lives, and end it with a sentence if one of them does not."""

    def __init__(self, client: Any, index: int, count: int):
        self._client, self._index, self._count = client, index, count
        self._stopped, self._heard_at = threading.Event(), time.monotonic()
        self._ending = threading.Lock()  # only the first thread that finds a reason to end says it
        self._thread = threading.Thread(target=self._watch, name="processes", daemon=True)
        threading.Thread(target=self._watch_the_store, name="coordinator", daemon=True).start()
        interruption.before_leaving(lambda number: self.announce(f"was stopped by {signal.Signals(number).name}", 128 + number))
        self._thread.start()

    def announce(self, reason: str, status: int) -> None:
        """Writes why this process ends, for the others; gives up after some seconds, as the coordinator may be gone."""
        if self._stopped.is_set():
            return
        self._stopped.set()
        text = json.dumps({"reason": reason, "status": status})
        thread = threading.Thread(target=self._set, args=(f"{_ENDS}{self._index}", text), daemon=True)
        thread.start()
        thread.join(2.0)
        self._let_others_read()

    def _let_others_read(self) -> None:
        """Waits in process 0, with which the store ends: JAX then aborts the other processes, in its own words."""
        if self._index == 0:
            time.sleep(3 * _BEAT_S)

    def stop(self) -> None:
        """Ends the watch once all processes are done, or this process if one of them failed on its way there."""
        self._set(f"{_ENDS}{self._index}", _DONE)
        for process in range(self._count):
            if _wait_for(f"{_ENDS}{process}") != _DONE:
                self._thread.join()  # which ends this process
        self._stopped.set()
        self._thread.join()

    def _watch(self) -> None:
        beats, seen = itertools.count(), {process: ("", time.monotonic()) for process in range(self._count)}
        while not self._stopped.wait(_BEAT_S):
            try:
                self._client.key_value_set(f"{_BEATS}{self._index}", str(next(beats)), allow_overwrite=True)
                counts = dict(self._client.key_value_dir_get(_BEATS))
                ends = dict(self._client.key_value_dir_get(_ENDS))
            except Exception:  # whatever the transport raises
                self._end(_UNREACHABLE, LOST)
                return
            self._heard_at = now = time.monotonic()
            for process in range(self._count):
                if (text := ends.get(f"{_ENDS}{process}", _DONE)) != _DONE:
                    end = json.loads(text)
                    self._end(f"process {process} {end['reason']}", end["status"])
                    return
                count = counts.get(f"{_BEATS}{process}", "")
                if count != seen[process][0] or f"{_ENDS}{process}" in ends:
                    seen[process] = (count, now)
                elif process != self._index and now - seen[process][1] > LOST_S:
                    self._end(f"process {process} has given no sign of life for {LOST_S:.0f} s", LOST)
                    return

    def _watch_the_store(self) -> None:
        """Ends this process if the store, which has no deadlines, does not answer: its host hangs, or its process is gone."""
        checked_at = time.monotonic()
        while not self._stopped.wait(_BEAT_S):
            now = time.monotonic()
            suspended_s = now - checked_at - _BEAT_S
            if suspended_s > 0.8 * LOST_S:  # the others count from the last sign of life, which may be some beats older
                self._end(f"this process was suspended for {suspended_s:.0f} s, and the others have given it up", LOST)
            elif suspended_s > 10 * _BEAT_S:
                self._heard_at = now
            elif now - self._heard_at > LOST_S or (now - self._heard_at > 2 * _BEAT_S and _is_gone(_coordinator())):
                self._end(_UNREACHABLE, LOST)
            checked_at = now

    def _end(self, reason: str, status: int) -> None:
        """Ends this process, which may be waiting in native code for one that is gone."""
        with self._ending:
            if self._stopped.is_set():
                return
            interruption.say(f"{reason}: the same command on all processes, or on fewer, goes on from the last checkpoint")
            self._let_others_read()
            sys.stdout.flush()
            os._exit(status)

    def _set(self, key: str, value: str) -> None:
        with contextlib.suppress(Exception):
            self._client.key_value_set(key, value, allow_overwrite=True)


def _wait_for(key: str) -> str:
    """The value that a process sets."""
    try:
        return _client().blocking_key_value_get(key, int(1000 * WAIT_S))
    except Exception as error:
        raise RuntimeError(
            f"another process did not answer within {WAIT_S:.0f} s: {' '.join(str(error).split())[:200]}"
        ) from error


def _client() -> Any:
    """The key-value store, which JAX has no public name for."""
    from jax._src.distributed import global_state

    return global_state.client


def _coordinator() -> str:
    """``host:port`` of the store, which JAX has no public name for either."""
    from jax._src.distributed import global_state

    return global_state.coordinator_address or ""


def _is_gone(address: str) -> bool:
    """Whether a host answers that nothing listens at its port; silence says nothing."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_BEAT_S).close()
    except ConnectionRefusedError:
        return True
    except (OSError, ValueError):
        return False
    return False


def _detected_processes() -> int | None:
    """Number of processes of the cluster that JAX detects; None outside of clusters."""
    from jax._src.clusters import ClusterEnv

    for cluster in ClusterEnv._cluster_types:
        # Any container of Kubernetes looks like one of its clusters; those of an indexed job have a number.
        if cluster.opt_in_only_method or (cluster.__name__ == "K8sCluster" and "JOB_COMPLETION_INDEX" not in os.environ):
            continue
        if cluster.is_env_present():
            return cluster.get_process_count()
    return None
