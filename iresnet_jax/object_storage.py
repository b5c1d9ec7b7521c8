"""Addresses of objects in buckets, such as ``gs://bucket/run/model.npz``, as paths; fsspec reaches
each storage.

An upload of an object is atomic for every reader, and replaces the previous object. Nothing else is
relied on: there are no folders, renames, appends or locks.
"""

import contextlib
import fnmatch
import functools
import io
import logging
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

BEAT_S = 5.0  # time between two signs of life of the process that holds a claim
PATIENCE_BEATS = 4  # beats without a sign of life after which a process counts as dead
RETRY_S = 600.0  # time for which an upload is retried while the storage cannot be reached
_PAUSE_S = 3.0  # time between two tries
_EXTRAS = {"gs": "gcs", "gcs": "gcs", "s3": "s3", "s3a": "s3"}

_logger = logging.getLogger(__name__)


@functools.cache
def _storage(scheme: str) -> Any:
    """The file system of fsspec that a scheme stands for, one for all threads; ``ValueError`` if
    there is none.
    """
    try:
        import fsspec

        # gcsfs logs tracebacks of errors that it raises.
        logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
        # Other processes write there, too.
        return fsspec.filesystem(scheme, use_listings_cache=False)
    except ImportError as error:
        advice = (
            f"pip install 'iresnet_jax[{_EXTRAS[scheme]}]'"
            if scheme in _EXTRAS
            else "pip install it"
        )
        raise ValueError(
            f"{scheme}:// needs a package that is not installed ({error}): {advice}"
        ) from None
    except ValueError as error:
        raise ValueError(
            f"{scheme}:// is no storage that fsspec knows ({error}): give a path, "
            "gs://... or s3://..."
        ) from None


class ObjectPath(type(Path())):
    """The address of an object, or of all objects below it, which stand for a folder.

    Names are joined and split as by `pathlib`. Only the methods below touch files. Objects are read
    and written whole. Methods raise ``PermissionError`` if the storage refuses the credentials, or
    there are none, and ``ConnectionError`` if it fails or cannot be reached.
    """

    def __str__(self) -> str:
        return super().__str__().replace(":/", "://", 1)  # pathlib keeps one slash of two

    @property
    def storage(self) -> Any:
        """The file system of fsspec that holds the object; ``ValueError`` if there is none on
        this machine.
        """
        return _storage(self.parts[0].removesuffix(":"))

    @contextlib.contextmanager
    def _reached(self, *, writing: bool = False) -> Iterator[Any]:
        """Yields the file system, whose errors become the ones that the class documents."""
        try:
            yield self.storage
        except FileExistsError:
            raise
        except FileNotFoundError as error:
            if not writing:
                raise FileNotFoundError(f"there is no {self}") from error
            message = (
                f"{self} cannot be written, there is no such bucket ({error}): make it, or "
                "correct its name"
            )
            raise OSError(message) from error
        except Exception as error:  # each storage has its own errors
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            if re.search(
                "credential|forbidden|permission", f"{type(error).__name__} {reason}", re.IGNORECASE
            ):
                message = (
                    f"{self} is refused ({reason}): check the credentials and what they permit"
                )
                raise PermissionError(message) from error
            message = (
                f"{self} cannot be reached ({reason}): check the connection and the address "
                "of the storage"
            )
            raise ConnectionError(message) from error

    def _info(self) -> dict[str, Any]:
        with self._reached() as storage, contextlib.suppress(FileNotFoundError):
            return storage.info(str(self))
        return {"type": None}

    def exists(self, **_: Any) -> bool:
        """Whether there is such an object, or any object below the address."""
        return self._info()["type"] is not None

    def is_dir(self, **_: Any) -> bool:
        """Whether there are objects below the address."""
        return self._info()["type"] == "directory"

    def is_file(self, **_: Any) -> bool:
        """Whether there is such an object."""
        return self._info()["type"] == "file"

    def glob(self, pattern: str, **_: Any) -> "Iterator[ObjectPath]":  # pyright: ignore[reportIncompatibleMethodOverride]
        """Objects one level below the address whose names match a pattern."""
        names: list[str] = []
        with self._reached() as storage, contextlib.suppress(FileNotFoundError):
            names += [
                found.rstrip("/").rpartition("/")[2]
                for found in storage.ls(str(self), detail=False)
            ]
        return (self / name for name in names if fnmatch.fnmatchcase(name, pattern))

    def mkdir(self, *_: Any, **__: Any) -> None:
        """Does nothing: the first object makes the folder, and buckets are made by their owner."""

    def open(
        self,
        mode: str = "r",
        buffering: int = -1,
        encoding: str | None = None,
        errors: Any = None,
        newline: Any = None,
    ):  # pyright: ignore[reportIncompatibleMethodOverride]
        """The content of an object as a file to read."""
        if mode not in ("r", "rb"):
            raise ValueError(
                f"{self} is opened for reading only, got the mode {mode!r}: use "
                "atomic_files.replacing"
            )
        with self._reached() as storage:
            # One request reads the whole object: several requests could combine an old object and
            # its successor.
            content = io.BytesIO(storage.cat_file(str(self), start=0))
        return (
            content
            if mode == "rb"
            else io.TextIOWrapper(content, encoding or "utf-8", errors, newline)
        )

    def unlink(self, missing_ok: bool = False) -> None:  # noqa: FBT001, FBT002 (the signature of pathlib)
        """Deletes an object."""
        with self._reached() as storage, contextlib.suppress(FileNotFoundError):
            storage.rm_file(str(self))

    def upload(self, file: Path) -> None:
        """Uploads a local file, and tries again for `RETRY_S` while the storage cannot be
        reached.
        """
        began = time.monotonic()
        while True:
            try:
                with self._reached(writing=True) as storage:
                    return storage.put_file(str(file), str(self))
            except ConnectionError as error:
                if time.monotonic() - began > RETRY_S:
                    raise
                _logger.warning("%s; trying again", error)
                time.sleep(_PAUSE_S)


@contextlib.contextmanager
def claimed(path: ObjectPath) -> Iterator[Callable[[], None]]:
    """Within ``with``, this process holds a claim: an object that it creates if absent, and changes
    as a sign of life.

    Another process takes over the claim of a dead process after `PATIENCE_BEATS` without a sign. A
    live process that could not reach the storage for so long may lose its claim without noticing at
    once.

    Yields:
        A function that raises ``OSError`` once another process has taken the claim.

    Raises:
        TimeoutError: If a live process holds the claim.
    """
    owner, ended, lost = secrets.token_hex(8), threading.Event(), threading.Event()

    def put(mode: str) -> None:
        with path._reached(writing=True) as storage:
            storage.pipe_file(str(path), f"{owner} {time.time()}\n".encode(), mode=mode)

    def held() -> bool:
        return path.read_bytes().startswith(owner.encode())

    def keep() -> None:
        while not lost.is_set() and not ended.wait(BEAT_S):
            try:
                if held():
                    put("overwrite")
                else:
                    lost.set()
            except FileNotFoundError:  # another process had the claim, and has released it
                lost.set()
            except OSError as error:
                _logger.warning("%s", error)

    def check() -> None:
        if lost.is_set():
            raise OSError(
                f"another process has taken over {path}: it trains there now, and this "
                "one has stopped"
            )

    _wait_for_the_dead(path)
    try:
        put("create")
    except FileExistsError:
        raise TimeoutError(f"another process holds {path}") from None
    keeper = threading.Thread(target=keep, daemon=True)
    keeper.start()
    try:
        yield check
    finally:
        ended.set()
        keeper.join()
        with contextlib.suppress(OSError):
            if held():
                path.unlink()


def _wait_for_the_dead(path: ObjectPath) -> None:
    """Removes a claim without a sign of life for `PATIENCE_BEATS`; with a sign, raises
    ``TimeoutError``.
    """
    with contextlib.suppress(FileNotFoundError):  # there is no claim, or it has been released
        before = path.read_bytes()
        _logger.info("%s is there: waiting to see whether its process lives", path)
        for _ in range(PATIENCE_BEATS):
            time.sleep(BEAT_S)
            if path.read_bytes() != before:
                raise TimeoutError(f"another process holds {path}")
        path.unlink()
