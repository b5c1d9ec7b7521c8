"""Paths of files that users name, files that are written whole, and work that one process at a time
does.

The code of runs reads and writes by the methods of paths alone: what differs between a disk and a
bucket is the business of this file and of `object_storage`.
"""

import contextlib
import os
import re
import secrets
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from iresnet_jax import object_storage
from iresnet_jax.object_storage import ObjectPath


def path_of(name: str | os.PathLike[str]) -> Path:
    """The path that a user names: on this machine, where ``~`` is the user's home, or in a bucket,
    as ``gs://bucket/run``.

    Raises:
        ValueError: If it is neither, or the package that reaches such addresses is not installed.
    """
    if not isinstance(name, str | os.PathLike):
        raise ValueError(f"a path must be a string such as 'runs/digits', got {name!r}")
    text = os.fspath(name)
    if not re.match(r"\w[\w+.-]*://", text):
        return Path(text).expanduser()
    path = ObjectPath(text)
    _ = path.storage  # raises if there is none
    if str(path) != text.removesuffix("/"):
        raise ValueError(
            f"{text} has an empty name in it: give a path, or an address such as gs://bucket/run"
        )
    return path


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a path to write to, which takes the place of ``path`` at the end of ``with``.

    Whatever happens to the writer, and however many write at once, a reader finds the old file or a
    new one. If the body raises, nothing new is left.

    Raises:
        OSError: If the file cannot be written; the message says where and why.
    """
    folder = Path(tempfile.gettempdir()) if isinstance(path, ObjectPath) else path.parent
    incoming = folder / f"{path.name}.{os.getpid()}-{secrets.token_hex(4)}.incoming"
    try:
        yield incoming
        if isinstance(path, ObjectPath):
            path.upload(incoming)
        else:
            incoming.replace(path)
    except OSError as error:
        if isinstance(path, ObjectPath):
            raise  # its sentence says what to do
        reason = error.strerror or str(error)
        message = (
            f"{path} cannot be written ({reason}): choose a folder that exists, can be "
            "written to and has space left"
        )
        raise OSError(message) from error
    finally:
        with contextlib.suppress(OSError):
            incoming.unlink(missing_ok=True)


@contextlib.contextmanager
def growing(folder: Path) -> Iterator[tuple[Path, Callable[[], None]]]:
    """Yields a local folder of files that are appended to, and a function that shows what is in
    them to all.

    On a disk this is the folder itself, and all see it at once. In a bucket the function puts every
    file whole, so it is to be called as rarely as larger files are written.
    """
    if not isinstance(folder, ObjectPath):
        yield folder, lambda: None
        return
    with tempfile.TemporaryDirectory() as here:

        def publish() -> None:
            for file in filter(Path.is_file, Path(here).rglob("*")):
                (folder / file.relative_to(here)).upload(file)

        yield Path(here), publish


@contextlib.contextmanager
def locked(path: Path, *, timeout_s: float = -1) -> Iterator[Callable[[], None]]:
    """Lets one process at a time into the ``with``, by a lock file ``.NAME.lock`` beside ``path``.

    A process that dies lets go of the lock. Where the file system cannot lock, or the folder is not
    writable, all may enter. In a bucket the file is a claim, which `object_storage.claimed`
    explains.

    Args:
        path: File or folder that the work is about; it need not exist.
        timeout_s: Seconds to wait for another process; negative waits for ever.

    Yields:
        A function that raises ``OSError`` once another process has taken the lock, which happens in
        a bucket alone.

    Raises:
        TimeoutError: If another process holds the lock for longer.
    """
    from filelock import FileLock, Timeout  # late: it imports asyncio

    lock = path.with_name(f".{path.name}.lock")
    with contextlib.ExitStack() as stack:
        if isinstance(lock, ObjectPath):
            yield stack.enter_context(object_storage.claimed(lock))
            return
        try:
            stack.enter_context(FileLock(lock, timeout=timeout_s))
        except Timeout:
            raise
        except (OSError, NotImplementedError):
            pass
        yield lambda: None
