"""Folders of runs, files that are written whole, and work that one process at a time does.

The code of runs reads and writes by the methods of paths alone: another kind of storage is the business of this file.
"""

import contextlib
import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path


def local_folder(name: str | os.PathLike[str]) -> Path:
    """The path of a folder, where ``~`` is the user's home.

    Raises:
        ValueError: If it is no path, or an address, such as ``gs://bucket/run``.
    """
    if not isinstance(name, str | os.PathLike):
        raise ValueError(f"workdir must be the path of a folder, got {name!r}")
    if re.match(r"\w[\w+.-]*://", os.fspath(name)):
        raise ValueError(f"a workdir must be a folder of this machine, got {name}: train in a local one, then copy it")
    return Path(name).expanduser()


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a path to write to, which takes the place of ``path`` at the end of ``with``.

    Whatever happens to the writer, and however many write at once, a reader finds the old file or a new one. If the body
    raises, nothing new is left.

    Raises:
        OSError: If the file cannot be written; the message says where and why.
    """
    incoming = path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(4)}.incoming")
    try:
        yield incoming
        incoming.replace(path)
    except OSError as error:
        reason = error.strerror or str(error)
        message = f"{path} cannot be written ({reason}): choose a folder that exists, can be written to and has space left"
        raise OSError(message) from error
    finally:
        with contextlib.suppress(OSError):
            incoming.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(path: Path, *, timeout_s: float = -1) -> Iterator[None]:
    """Lets one process at a time into the ``with``, by a lock file ``.NAME.lock`` beside ``path``.

    A process that dies lets go of the lock. Where the file system cannot lock, or the folder is not writable, all may enter.

    Args:
        path: File or folder that the work is about; it need not exist.
        timeout_s: Seconds to wait for another process; negative waits for ever.

    Raises:
        TimeoutError: If another process holds the lock for longer.
    """
    from filelock import FileLock, Timeout  # this module is imported where only the pure functions are installed

    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(FileLock(path.with_name(f".{path.name}.lock"), timeout=timeout_s))
        except Timeout:
            raise
        except (OSError, NotImplementedError):
            pass
        yield
