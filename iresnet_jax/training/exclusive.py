"""One training at a time in a workdir."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def alone_in(workdir: Path) -> Iterator[None]:
    """Within ``with``, no other process enters this for the same folder; a process that dies lets go of it.

    Where the file system or the platform cannot lock, it does nothing.

    Raises:
        ValueError: If another process is in it.
    """
    try:
        import fcntl  # not on Windows

        descriptor = os.open(workdir, os.O_RDONLY)
    except (ImportError, OSError):
        yield
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise ValueError(
            f"another process is training in {workdir}: wait until it has ended, or choose another --workdir"
        ) from None
    except OSError:  # a file system without locks
        pass
    try:
        yield
    finally:
        os.close(descriptor)
