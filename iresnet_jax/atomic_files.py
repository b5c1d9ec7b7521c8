"""Paths that users name, files that are written atomically, and locks between processes.

The code of runs reads and writes only by the methods of paths: this file and `object_storage`
handle the differences between a disk and a bucket.
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

FOLDER_VARIABLE = "IRESNET_JAX_CACHE_DIR"


def user_folder() -> Path:
    """The user's folder for files that can be made again: ``$IRESNET_JAX_CACHE_DIR``, or
    ``iresnet_jax`` in their cache folder.
    """
    default = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "iresnet_jax")
    return Path(os.environ.get(FOLDER_VARIABLE) or default).expanduser()


def path_of(name: str | os.PathLike[str]) -> Path:
    """The path that a user names: on this machine, where ``~`` is the user's home, or in a bucket,
    such as ``gs://bucket/run``.
    """
    if not isinstance(name, str | os.PathLike):
        raise ValueError(f"a path must be a string such as 'runs/digits', got {name!r}")
    text = os.fspath(name)
    if not re.match(r"\w[\w+.-]*://", text):
        return Path(text).expanduser()
    path = ObjectPath(text)
    _ = path.storage  # raises if there is no such storage
    if str(path) != text.removesuffix("/"):
        raise ValueError(
            f"{text} has an empty name in it: give a path, or an address such as gs://bucket/run"
        )
    return path


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a path to write to, which takes the place of ``path`` at the end of ``with``.

    A reader finds the old file or a complete new one, even if the writer dies or several write at
    once. If the body raises, nothing new is left.
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
            raise  # the message says what to do
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
    """Yields a local folder for files that are appended to, and a function that publishes their
    content.

    On a disk this is the folder itself, and the content is visible at once. In a bucket the
    function uploads every file whole, so call it as rarely as larger files are written.
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
    writable, all may enter. In a bucket the file is a claim, see `object_storage.claimed`.

    Args:
        path: File or folder to lock; it need not exist.
        timeout_s: Seconds to wait for another process; negative waits for ever.

    Yields:
        A function that raises ``OSError`` once another process has taken the lock, which can only
        happen in a bucket.

    Raises:
        TimeoutError: If another process holds the lock longer than ``timeout_s``.
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
