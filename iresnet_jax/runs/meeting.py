"""How the processes of a run meet before JAX joins them: who is missing, or came twice, is said in a sentence.

JAX's own start ends a process that waits in vain by an abort of native code, and healthy processes if another one has the
number of one of them. So process 0 first listens itself where JAX's coordinator will, the others say who they are, and it tells
all of them to go on once everybody is there. Nothing of this outlives the start.
"""

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterable
from typing import Any, BinaryIO

from iresnet_jax.runs import signals

PATIENCE_S = 10.0  # before a process that waits says for whom, and for which a port may be busy with a run that just ended
_RETRY_S = 0.2
_ANSWER_S = 5.0  # at most, until a program that listens answers; another program may wait for ever
_LONGEST = 4096  # bytes of a message
_ADVICE = "start the same command on all of them, with one --coordinator_address that all can reach and a --process_id each"


def meet(address: str, num_processes: int, process: int, timeout_s: float) -> None:
    """Returns when all processes of a run have called this.

    Args:
        address: ``host:port`` of process 0.
        num_processes: Number of processes.
        process: Number of this process, from 0.
        timeout_s: Seconds to wait for the others.

    Raises:
        ValueError: If the address is none.
        RuntimeError: If others do not come in time, one comes twice, or the port serves something else.
    """
    host, port = _parsed(address)
    if num_processes > 1:
        if process == 0:
            _receive(port, num_processes, timeout_s)
        else:
            _report((host, port), {"process": process, "of": num_processes}, timeout_s)


def _parsed(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ValueError(f"--coordinator_address must be HOST:PORT of process 0, such as node1:1234, got {address!r}")
    return host.strip("[]"), int(port)


# ------------------------------------------------------------------------------------------------------- process 0


def _receive(port: int, num_processes: int, timeout_s: float) -> None:
    """Waits for all other processes and answers them."""
    present: dict[int, socket.socket] = {}
    began, is_told = time.monotonic(), False
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(_listen(port))
        while len(present) < num_processes - 1:
            present = {process: connection for process, connection in present.items() if not _is_closed(connection)}
            waited, why = time.monotonic() - began, None
            if waited > PATIENCE_S and not is_told:
                is_told = True
                signals.say(f"waiting at port {port} for {_missing(present, num_processes)}, at most {timeout_s:.0f} s")
            if waited > timeout_s:
                why = f"{_missing(present, num_processes)} did not come to port {port} within {timeout_s:.0f} s: {_ADVICE}"
            with contextlib.suppress(TimeoutError):
                connection = stack.enter_context(server.accept()[0])
                connection.settimeout(_ANSWER_S)
                with connection.makefile("rb") as lines:
                    who = _hear(lines)
                process, of = who.get("process"), who.get("of")
                if not isinstance(process, int):
                    connection.close()  # another program asks what is here
                    continue
                if of != num_processes:
                    why = f"process {process} was told --num_processes {of}, and process 0 {num_processes}: give all the same"
                elif process in present:
                    why = f"two processes have --process_id {process}: give each of {num_processes} its own"
                _send(connection, {"refused": why} if why else {"waiting": True})
                present.setdefault(process, connection)
            if why:
                for connection in present.values():
                    _send(connection, {"refused": why})
                raise RuntimeError(why)
        for connection in present.values():
            _send(connection, {"go": True})


def _missing(present: Iterable[int], num_processes: int) -> str:
    absent = sorted({*range(1, num_processes)} - {*present})
    names = ", ".join(map(str, absent[:8])) + (f" and {len(absent) - 8} more" if len(absent) > 8 else "")
    return f"process{'es' if len(absent) > 1 else ''} {names} of {num_processes}"


def _listen(port: int) -> socket.socket:
    """A socket that listens where JAX's coordinator will."""
    given = os.environ.get("JAX_COORDINATOR_BIND_ADDRESS", "").rpartition(":")[0].strip("[]")
    both = not given and socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both or ":" in given else socket.AF_INET
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            server = socket.create_server((given, port), family=family, dualstack_ipv6=both)
        except OSError as error:
            if time.monotonic() > deadline:
                raise RuntimeError(
                    f"process 0 cannot listen at port {port} ({error.strerror}): end what does, which may be another process 0 "
                    "of this run, or give all processes a --coordinator_address with another port"
                ) from None
            time.sleep(_RETRY_S)
        else:
            server.settimeout(_RETRY_S)
            return server


# ------------------------------------------------------------------------------------------------------ the others


def _report(address: tuple[str, int], who: dict[str, Any], timeout_s: float) -> None:
    """Tells process 0 who is there and waits until all are."""
    place, began, strange_since, is_told = f"{address[0]}:{address[1]}", time.monotonic(), None, False
    while True:
        try:
            if _is_admitted(address, who, timeout_s):
                return
            reason = "another program listens there, or a run that goes on already"
            strange_since = strange_since or time.monotonic()
        except OSError as error:
            reason, strange_since = error.strerror or "no answer", None
        now = time.monotonic()
        if now - began > timeout_s or (strange_since and now - strange_since > PATIENCE_S):
            raise RuntimeError(f"process 0 was not met at {place} within {now - began:.0f} s ({reason}): {_ADVICE}")
        if now - began > PATIENCE_S and not is_told:
            is_told = True
            signals.say(f"waiting for process 0 at {place}, at most {timeout_s:.0f} s ({reason})")
        time.sleep(_RETRY_S)


def _is_admitted(address: tuple[str, int], who: dict[str, Any], timeout_s: float) -> bool:
    """Whether process 0 says that all are there; False if what listens is no process 0 that waits.

    Raises:
        OSError: If nothing listens.
        RuntimeError: If process 0 refuses to go on, in its words.
    """
    with socket.create_connection(address, timeout=_ANSWER_S) as connection, connection.makefile("rb") as lines:
        _send(connection, who)
        answer = _hear(lines)
        if "waiting" in answer:
            connection.settimeout(timeout_s + _ANSWER_S)
            answer = _hear(lines)
            if not answer:
                raise RuntimeError("process 0 has ended while it waited for other processes: see what it said")
        if "refused" in answer:
            raise RuntimeError(answer["refused"])
        return "go" in answer


# -------------------------------------------------------------------------------------------------------- messages


def _send(connection: socket.socket, message: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):  # who is gone is missed later
        connection.sendall(json.dumps(message).encode() + b"\n")


def _hear(lines: BinaryIO) -> dict[str, Any]:
    """One message; an empty one if none comes in time, as from another program."""
    try:
        message = json.loads(lines.readline(_LONGEST))
    except (OSError, ValueError):
        return {}
    return message if isinstance(message, dict) else {}


def _is_closed(connection: socket.socket) -> bool:
    connection.settimeout(0)
    try:
        return not connection.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return False
    except OSError:
        return True
