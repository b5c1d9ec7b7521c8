"""One file of decoded arrays: written whole or not at all, checked by SHA-256 when it is opened, then memory-mapped.

The file is a header of 4096 bytes and the arrays one after the other, each from a multiple of 4096 on. The header is three
lines, filled up with spaces: a magic word, the SHA-256 of the third line, and JSON with the position, type, shape and SHA-256
of each array, and facts about the data.
"""

import contextlib
import errno
import hashlib
import io
import json
import math
import os
import secrets
import shutil
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

_MAGIC = b"iresnet_jax arrays 1"
_ALIGNMENT = 4096
_ABANDONED_AFTER_S = 3600  # a living writer touches its temporary file far more often

Layout = dict[str, tuple[str, tuple[int, ...]]]  # {name of an array: (dtype, shape)}


class DamagedCacheError(ValueError):
    """A cache file is truncated or was altered."""


class Cached(NamedTuple):
    """The contents of a cache file.

    Attributes:
        facts: what was written beside the arrays.
        arrays: read-only views of the file.
    """

    facts: dict[str, Any]
    arrays: dict[str, np.ndarray]


def write(path: Path, facts: dict[str, Any], layout: Layout, pieces: Iterable[tuple[str, np.ndarray]]) -> None:
    """Writes a cache file.

    It goes to a temporary file beside it, is forced to the disk and renamed: whatever happens, there is either the whole file
    or what was there before. Several processes may write the same file at once; the last one wins.

    Args:
        path: where to.
        facts: JSON data to keep beside the arrays.
        layout: type and shape of each array.
        pieces: ``(name, rows)``, each array's rows in order and all of them.

    Raises:
        OSError: if it cannot be written, as on a full disk; one sentence, and no part of it is left behind.
    """
    offsets, size = _place(layout)
    written, digests = dict.fromkeys(layout, 0), {name: hashlib.sha256() for name in layout}
    temporary = path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with _explaining(path, size):
            _remove_abandoned(path)
            _check_room(path.parent, size)
            file = temporary.open("xb", buffering=0)
        with file:
            for name, rows in pieces:
                dtype, _ = layout[name]
                content = _bytes_of(np.ascontiguousarray(rows, dtype))
                digests[name].update(content)
                with _explaining(path, size):
                    _write_at(file, offsets[name] + written[name], content)
                written[name] += len(content)
            assert written == {name: _num_bytes(*spec) for name, spec in layout.items()}, (
                "a source's examples were not all written"
            )
            arrays = {
                name: {"dtype": dtype, "shape": shape, "offset": offsets[name], "sha256": digests[name].hexdigest()}
                for name, (dtype, shape) in layout.items()
            }
            with _explaining(path, size):
                _write_at(file, 0, _header({"facts": facts, "size": size, "arrays": arrays}))
                file.truncate(size)
                os.fsync(file.fileno())
        with _explaining(path, size):
            temporary.replace(path)
            _sync_folder(path.parent)
    except BaseException:  # an interrupt too
        temporary.unlink(missing_ok=True)
        raise


def read(path: Path) -> Cached | None:
    """Opens a cache file, checks all of it and maps it into memory.

    Returns:
        Its contents; None if there is no such file, or none that may be read.

    Raises:
        DamagedCacheError: if it is truncated or was altered.
    """
    try:
        file = path.open("rb")
    except OSError:
        return None
    with file:
        about = _parse_header(path, file.read(_ALIGNMENT))
        size = os.fstat(file.fileno()).st_size
        if size != about["size"]:
            raise DamagedCacheError(f"the cache {path} is truncated or altered: it has {size} of {about['size']} bytes")
        arrays = {}
        for name, array in about["arrays"].items():
            mapped = np.memmap(file, array["dtype"], "r", array["offset"], tuple(array["shape"]))
            arrays[name] = mapped.view(np.ndarray)
            if hashlib.sha256(_bytes_of(arrays[name])).hexdigest() != array["sha256"]:
                raise DamagedCacheError(f"the cache {path} is truncated or altered: {name} does not match its checksum")
    return Cached(about["facts"], arrays)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lets one process at a time work in a folder.

    This saves the others the work; the files are right without it. Where the file system cannot lock, it does nothing.
    """
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError, ImportError):
            import fcntl  # not on Windows

            descriptor = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, descriptor)  # which releases the lock, as the end of the process does
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield


def _num_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    return np.dtype(dtype).itemsize * math.prod(shape)


def _place(layout: Layout) -> tuple[dict[str, int], int]:
    """Where each array begins, and the size of the file."""
    offsets, end = {}, _ALIGNMENT
    for name, spec in layout.items():
        offsets[name] = -(-end // _ALIGNMENT) * _ALIGNMENT
        end = offsets[name] + _num_bytes(*spec)
    return offsets, end


def _header(about: dict[str, Any]) -> bytes:
    text = json.dumps(about).encode()
    header = b"\n".join([_MAGIC, hashlib.sha256(text).hexdigest().encode(), text])
    assert len(header) < _ALIGNMENT, "too many arrays for the header"
    return header.ljust(_ALIGNMENT - 1) + b"\n"


def _parse_header(path: Path, header: bytes) -> dict[str, Any]:
    lines = header.rstrip().split(b"\n")
    if len(lines) != 3 or lines[0] != _MAGIC or hashlib.sha256(lines[2]).hexdigest().encode() != lines[1]:
        raise DamagedCacheError(f"the cache {path} is truncated or altered: its header does not match its checksum")
    return json.loads(lines[2])


def _bytes_of(array: np.ndarray) -> memoryview:
    return array.reshape(-1).view(np.uint8).data


def _write_at(file: io.FileIO, offset: int, content: memoryview | bytes) -> None:
    """Writes without a buffer, whose leftover would fail once more when the file is closed."""
    file.seek(offset)
    while content:
        content = content[file.write(content) :]


def _check_room(folder: Path, size: int) -> None:
    """A full disk is better noticed before an hour of decoding than after it."""
    if shutil.disk_usage(folder).free < size:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _sync_folder(folder: Path) -> None:
    with contextlib.suppress(PermissionError):  # Windows has no descriptors of folders
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _remove_abandoned(path: Path) -> None:
    """Removes the temporary files of writers that were killed."""
    for temporary in path.parent.glob(f"{path.name}.*.tmp"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - temporary.stat().st_mtime > _ABANDONED_AFTER_S:
                temporary.unlink()


@contextlib.contextmanager
def _explaining(path: Path, size: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OSError(
            f"cannot write the cache {path} of {max(size / 1e6, 0.1):.1f} MB: {error.strerror or error}: "
            "make room, or set IRESNET_JAX_CACHE_DIR to a folder with room"
        ) from error
