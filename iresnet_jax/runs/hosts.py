"""Processes of one run: they find one another, agree, end together, and say why in a sentence.

A run on many hosts is the same command on each of them. `initialize` joins the processes before JAX
touches a device. `training.parallel` has their common work in a training. JAX's coordinator, in
process 0, watches the processes: if one fails, is stopped or does not answer, JAX ends the rest,
which would otherwise wait in a reduction for ever.

In a single process these functions do nothing, or the obvious.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax

from iresnet_jax.pytrees import first_difference
from iresnet_jax.training import parallel, signals

INITIALIZATION_S = 300  # longest wait until all processes have joined
LOST_S = 30  # time without a sign of life after which a process counts as lost
SHUTDOWN_S = 60  # longest wait until all processes have reached the end
# Exit status of a process that lost another one: "try again later" in sysexits.h.
LOST = 75

FAILED = 2  # exit status
LONGEST = 600  # characters of a message
_LAST_WORDS_S = 3.0  # time for other failing processes to report before process 0 ends them
_TRANSPORTS = "Gloo|NCCL|RCCL|collective|coordination service|UNAVAILABLE|DEADLINE_EXCEEDED"


def initialize(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> None:
    """Joins this process to the others of its run, before anything else of JAX is called.

    Arguments that are not given come from the environment, as JAX detects it: TPU pods, SLURM, Open
    MPI, Kubernetes. A process that finds no others stays single.

    Args:
        coordinator_address: ``host:port`` of process 0; by default ``JAX_COORDINATOR_ADDRESS``.
        num_processes: Number of processes.
        process_id: Number of this process, from 0.

    Raises:
        ValueError: If arguments are missing, in the words of JAX.
        RuntimeError: If the other processes do not come in time.
    """
    coordinator_address = coordinator_address or os.environ.get("JAX_COORDINATOR_ADDRESS")
    is_given = any(value is not None for value in (coordinator_address, num_processes, process_id))
    # JAX's native handler of SIGTERM would silence `signals`, which handles Ctrl-C and SIGTERM.
    jax.config.update("jax_enable_preemption_service", val=False)
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
    except (ValueError, RuntimeError) as error:
        # There is no cluster, or JAX has already started, for example in a notebook.
        is_single = "be defined" in str(error) or "must be called before" in str(error)
        if is_given or not is_single:
            raise


def _is_single() -> bool:
    """Whether a scheduler has started only this process, with all devices of its host."""
    # Variables of schedulers that JAX detects: numbers of processes, and those of Kubernetes.
    for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE"):
        if name in os.environ:
            return os.environ[name] == "1"
    is_shared = {"JOB_COMPLETION_INDEX", "TPU_WORKER_HOSTNAMES"} & os.environ.keys()
    return "KUBERNETES_SERVICE_HOST" in os.environ and not is_shared


def is_shared() -> bool:
    """Whether `initialize` has joined this process to others; asking starts no backend."""
    return jax.distributed.is_initialized()


def agree_on(value: Any) -> None:
    """Raises a ValueError in all processes if JSON data of a run differ between them."""
    if jax.process_count() == 1:
        return
    first, *others = map(json.loads, parallel.texts_of_all(json.dumps(value)))
    for process, other in enumerate(others, start=1):
        where = f"in process {process}", "in process 0"
        if difference := first_difference(other, first, "run", where):
            raise ValueError(f"all processes need the same run: {difference}")


@contextlib.contextmanager
def ending_together() -> Iterator[None]:
    """Within ``with``, all processes run together; after it, each goes on with its own devices.

    A process that is told to stop leaves by `Stopped` like all others. A process that fails says
    why and ends at once: an orderly exit from Python would wait for the others. JAX then ends the
    others, unless a broken reduction shows them first that a process is gone.
    """
    try:
        yield
    except Exception as error:
        if not is_shared():
            raise
        reason = " ".join(str(error).split())
        is_lost = re.search(_TRANSPORTS, reason)
        if not isinstance(error, parallel.FAILURES):
            traceback.print_exc()
        elif is_lost:
            signals.say(
                "another process has failed or cannot be reached, and its own output says why: "
                "start all processes again by the same command, which goes on from the last "
                f"checkpoint ({reason[:200]})"
            )
        else:
            signals.say(f"error: {reason}")
        sys.stdout.flush()
        if parallel.is_first():
            time.sleep(_LAST_WORDS_S)
        os._exit(LOST if is_lost else FAILED)
    finally:  # waits until all processes get here
        if is_shared():
            jax.distributed.shutdown()
            parallel.go_on_alone()


def explain_failures(command: Callable[[], int], *, debug: bool = False) -> int:
    """Runs a command and returns its exit status; failures and warnings are shown as one sentence
    each on stderr.

    ``ValueError``, ``RuntimeError`` and ``OSError`` are failures that a user can fix and give
    status 2. `Stopped` gives the status of a process that its signal ends, such as 143. Other
    exceptions are bugs and pass through; with ``debug``, failures pass through, too. JAX's messages
    about accelerators that this machine does not have are silenced.
    """
    logging.getLogger("jax").setLevel(logging.WARNING)
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: print(
            f"warning: {message}", file=sys.stderr
        )
        try:
            return command()
        except signals.Stopped as stopped:
            print(stopped, file=sys.stderr)
            return stopped.status
        except (ModuleNotFoundError, ValueError, RuntimeError, OSError) as error:
            text = " ".join(str(error).split()) or type(error).__name__
            if isinstance(error, ModuleNotFoundError):
                text = f"there is no package {error.name}: pip install 'iresnet_jax[train]'"
                debug = debug or (error.name or "").startswith("iresnet_jax")
            if debug:
                raise
            if "RESOURCE_EXHAUSTED" in text:
                text = (
                    "the device is out of memory: lower training.batch_size or "
                    f"evaluation.batch_size or --num, or raise training.num_parts ({text})"
                )
            # Messages of compilers contain whole programs.
            more = " ... (--debug shows all)" if len(text) > LONGEST else ""
            print(f"error: {text[:LONGEST]}{more}", file=sys.stderr)
            return FAILED
