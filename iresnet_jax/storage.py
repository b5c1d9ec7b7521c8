"""Paths that users name, on disks and in buckets: files that are written whole, and locks between
processes.

The code of runs reads and writes by the methods of paths and the functions below. Drivers of fsspec
reach each storage. An upload of an object is atomic for every reader and replaces the previous
object; nothing else is relied on: there are no folders, renames, appends or locks in a bucket.
"""

import contextlib
import fnmatch
import io
import logging
import os
import re
import secrets
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

RETRY_S = 600.0  # time for which a training asks again while its storage cannot be reached
_PAUSE_S = 3.0  # time between two tries

_Result = TypeVar("_Result")
_logger = logging.getLogger(__name__)


def user_folder() -> Path:
    """The user's folder for files that can be made again: ``$IRESNET_JAX_CACHE_DIR``, or
    ``iresnet_jax`` in their cache folder.
    """
    default = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "iresnet_jax")
    return Path(os.environ.get("IRESNET_JAX_CACHE_DIR") or default).expanduser()


def path_of(name: str | os.PathLike[str]) -> Path:
    """The path that a user names: on this machine, where ``~`` is the user's home, or in a bucket,
    such as ``gs://bucket/run``.
    """
    text = os.fspath(name)
    if not re.match(r"\w[\w+.-]*://", text):
        return Path(text).expanduser()
    path = ObjectPath(text)
    if str(path) != text.removesuffix("/"):
        raise ValueError(
            f"{text} has an empty name in it: give a path, or an address such as gs://bucket/run"
        )
    try:
        _ = path.storage
    except ImportError as error:
        raise ValueError(
            f"{text} needs a package that is not installed ({error}): for gs:// pip install "
            "'iresnet_jax[gcs]', for s3:// 'iresnet_jax[s3]'"
        ) from None
    return path


class ObjectPath(type(Path())):
    """The address of an object, or of all objects below it, which stand for a folder.

    Names are joined and split as by `pathlib`. Only the methods below touch files, and objects are
    read whole. They raise ``ConnectionError`` if the storage fails or cannot be reached, which says
    nothing about the object.
    """

    def __str__(self) -> str:
        return super().__str__().replace(":/", "://", 1)  # pathlib keeps one slash of two

    @property
    def storage(self) -> Any:
        """The file system of fsspec that holds the object."""
        import fsspec  # of the extras for buckets

        # Other processes write there, too.
        return fsspec.filesystem(self.parts[0].removesuffix(":"), use_listings_cache=False)

    def ask(self, method: str, *arguments: Any, **options: Any) -> Any:
        """Calls a method of the file system."""
        try:
            return getattr(self.storage, method)(*arguments, **options)
        except (FileNotFoundError, PermissionError) as error:
            raise type(error)(f"{self}: {error}") from error
        except Exception as error:  # each storage has its own errors
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise ConnectionError(
                f"{self} cannot be reached ({reason}): check connection, address and credentials"
            ) from error

    def _type(self) -> str | None:
        with contextlib.suppress(FileNotFoundError):
            return self.ask("info", str(self))["type"]

    def exists(self, **_: Any) -> bool:
        """Whether there is such an object, or any object below the address."""
        return self._type() is not None

    def is_dir(self, **_: Any) -> bool:
        """Whether there are objects below the address."""
        return self._type() == "directory"

    def is_file(self, **_: Any) -> bool:
        """Whether there is such an object."""
        return self._type() == "file"

    def glob(self, pattern: str, **_: Any) -> "Iterator[ObjectPath]":  # pyright: ignore[reportIncompatibleMethodOverride]
        """Objects one level below the address whose names match a pattern."""
        listed: list[str] = []
        with contextlib.suppress(FileNotFoundError):
            listed = self.ask("ls", str(self), detail=False)
        names = (address.rstrip("/").rpartition("/")[2] for address in listed)
        return (self / name for name in names if fnmatch.fnmatchcase(name, pattern))

    def mkdir(self, *_: Any, **__: Any) -> None:
        """Does nothing: the first object makes the folder, and buckets are made by their owner."""

    def open(self, mode: str = "r", *_: Any, encoding: str | None = None, **__: Any):  # pyright: ignore[reportIncompatibleMethodOverride]
        """The content of an object as a file to read."""
        assert mode in ("r", "rb"), "objects are written by `replacing`"
        # One request reads the whole object: several could combine an old object and its successor.
        content = io.BytesIO(self.ask("cat_file", str(self), start=0))
        return content if mode == "rb" else io.TextIOWrapper(content, encoding or "utf-8")

    def unlink(self, missing_ok: bool = False) -> None:  # noqa: FBT001, FBT002 (the signature of pathlib)
        """Deletes an object."""
        with contextlib.suppress(FileNotFoundError):
            self.ask("rm_file", str(self))

    def upload(self, file: Path) -> None:
        """Uploads a local file."""
        _patiently(lambda: self.ask("put_file", str(file), str(self)))


def _patiently(request: Callable[[], _Result]) -> _Result:
    """The result of a request, which is repeated for `RETRY_S` while the storage cannot be
    reached.
    """
    began = time.monotonic()
    while time.monotonic() - began < RETRY_S:
        try:
            return request()
        except ConnectionError as error:
            _logger.warning("%s; trying again", error)
            time.sleep(_PAUSE_S)
    return request()


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
        raise OSError(f"{path} cannot be written ({error.strerror or error})") from error
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
    writable, all may enter. In a bucket nobody can tell whether a process lives: each that enters
    takes the lock over from the one before.

    Args:
        path: File or folder to lock; it need not exist.
        timeout_s: Seconds to wait for another process; negative waits for ever.

    Yields:
        A function to call before anything is written: it raises ``OSError`` once another process
        has taken the lock over.

    Raises:
        TimeoutError: If another process holds the lock longer than ``timeout_s``.
    """
    lock = path.with_name(f".{path.name}.lock")
    if isinstance(lock, ObjectPath):
        with _claimed(lock) as check:
            yield check
        return
    from filelock import FileLock, Timeout  # late: it imports asyncio

    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(FileLock(lock, timeout=timeout_s))
        except Timeout:
            raise
        except (OSError, NotImplementedError):
            pass
        yield lambda: None


@contextlib.contextmanager
def _claimed(path: ObjectPath) -> Iterator[Callable[[], None]]:
    """Within ``with``, an object names this process as the owner, until another one does so."""
    owner = secrets.token_hex(8).encode()

    def is_held() -> bool:
        try:
            return path.read_bytes() == owner
        except FileNotFoundError:  # another process had the claim, and has released it
            return False

    def check() -> None:
        if not _patiently(is_held):
            raise OSError(
                f"another process has taken over {path}: it trains there now, and this one has "
                "stopped"
            )

    path.ask("pipe_file", str(path), owner)
    try:
        yield check
    finally:
        with contextlib.suppress(OSError):
            if is_held():
                path.unlink()
