"""Decoded arrays in a folder of ``.npy`` files: written whole or not at all, checked and memory-mapped when they are opened.

``record.json`` beside them holds the type, shape and SHA-256 of each array, the number of levels and classes, the fingerprint
of these, and the state of the source files. Opening compares headers and file sizes with the record; it reads no pixels.
"""

import contextlib
import errno
import hashlib
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

from iresnet_jax.data.dataset import describe, fingerprint_of

RECORD = "record.json"
FOLDER_VARIABLE = "IRESNET_JAX_CACHE_DIR"
_ABANDONED_AFTER_S = 3600  # a living writer touches its files far more often


def user_folder() -> Path:
    """The user's folder for what can be made anew: ``$IRESNET_JAX_CACHE_DIR``, or ``iresnet_jax`` in their cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "iresnet_jax")
    return Path(os.environ.get(FOLDER_VARIABLE) or default).expanduser()


class DamagedCacheError(ValueError):
    """A cache is incomplete or was altered."""


class Facts(NamedTuple):
    """What a cache says about its arrays.

    Attributes:
        source_state: State of the files that the arrays were decoded from, see `sources.source.state_of`.
        num_levels: Grey levels.
        num_classes: Classes; None without labels.
    """

    source_state: str
    num_levels: int
    num_classes: int | None


class Layout(NamedTuple):
    """Type and shape of an array that will be written."""

    dtype: str
    shape: tuple[int, ...]


class Cached(NamedTuple):
    """Contents of a cache: the facts, the data's fingerprint, and read-only memory maps by name."""

    facts: Facts
    fingerprint: str
    arrays: dict[str, np.ndarray]


def write(folder: Path, facts: Facts, layout: dict[str, Layout], pieces: Iterable[tuple[str, np.ndarray]]) -> None:
    """Writes a cache.

    The files are written into a temporary folder, forced to the disk, and the folder is renamed at the end: a writer that fails
    or is killed leaves the cache as it was. If several processes write the same data at once, the first to end wins.

    Args:
        folder: Folder of the cache, which need not exist.
        pieces: Pairs ``(name, rows)``; together they hold the rows of each array once, in order.

    Raises:
        OSError: If the cache cannot be written, as on a full disk: one sentence, and no part of it is left behind.
    """
    size = sum(np.dtype(dtype).itemsize * math.prod(shape) for dtype, shape in layout.values())
    incoming = folder.with_name(f"{folder.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    digests = {name: hashlib.sha256() for name in layout}
    try:
        with contextlib.ExitStack() as stack:
            with _explaining(folder, size):
                if folder.exists() and not folder.is_dir():  # somebody's file
                    raise OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
                _remove_abandoned(folder)
                if shutil.disk_usage(folder.parent).free < size:  # better noticed before an hour of decoding than after it
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                incoming.mkdir()
                # Without a buffer, whose leftover would fail once more when the file is closed.
                files = {name: stack.enter_context((incoming / f"{name}.npy").open("xb", buffering=0)) for name in layout}
                for name, (dtype, shape) in layout.items():
                    header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
                    np.lib.format.write_array_header_1_0(files[name], header)
            for name, rows in pieces:
                content = np.ascontiguousarray(rows, layout[name].dtype).reshape(-1).view(np.uint8).data
                digests[name].update(content)
                with _explaining(folder, size):
                    _write_all(files[name], content)
            with _explaining(folder, size):
                for file in files.values():
                    os.fsync(file.fileno())
        arrays = {name: describe(_map(incoming, name), digests[name].hexdigest()) for name in layout}
        record = {**facts._asdict(), "arrays": arrays, "fingerprint": _fingerprint(facts, arrays)}
        with _explaining(folder, size):
            with (incoming / RECORD).open("xb", buffering=0) as file:
                _write_all(file, json.dumps(record, indent=1).encode())
                os.fsync(file.fileno())
            _put_in_place(incoming, folder, facts)
    finally:
        shutil.rmtree(incoming, ignore_errors=True)


def read(folder: Path) -> Cached | None:
    """Opens a cache and maps it into memory.

    Returns:
        Contents of the cache; None if there is none, or none that may be read.

    Raises:
        DamagedCacheError: If a file is missing, does not have the size and header that the record says, or the record does not
            match its own fingerprint.
    """
    try:
        text = (folder / RECORD).read_bytes()
    except OSError:
        return None
    try:
        record = json.loads(text)
        facts = Facts(*(record[name] for name in Facts._fields))
        if _fingerprint(facts, record["arrays"]) != record["fingerprint"]:
            raise ValueError(f"{RECORD} does not match its fingerprint")
        arrays = {}
        for name, expected in record["arrays"].items():
            arrays[name] = _map(folder, name)
            if describe(arrays[name], expected["sha256"]) != expected:
                raise ValueError(f"{name}.npy holds {arrays[name].dtype} of shape {arrays[name].shape}")
        if (folder / RECORD).read_bytes() != text:
            raise ValueError("it was replaced while it was read")
    except (AttributeError, EOFError, KeyError, OSError, TypeError, ValueError) as error:
        problem = f"{RECORD} lacks {error}" if isinstance(error, KeyError) else error
        raise DamagedCacheError(f"the cache {folder} is incomplete or was altered: {problem}") from None
    return Cached(facts, record["fingerprint"], arrays)


def _fingerprint(facts: Facts, arrays: dict[str, Any]) -> str:
    return fingerprint_of(arrays, num_levels=facts.num_levels, num_classes=facts.num_classes)


def _map(folder: Path, name: str) -> np.ndarray:
    """Maps an array: NumPy refuses a file shorter than its header says, and this function a longer one."""
    path = folder / f"{name}.npy"
    array = np.load(path, mmap_mode="r", allow_pickle=False)
    expected = array.offset + array.nbytes
    if path.stat().st_size != expected:
        raise ValueError(f"{path.name} has {path.stat().st_size} bytes instead of {expected}")
    return array.view(np.ndarray)


def _write_all(file: Any, content: memoryview | bytes) -> None:
    while content:
        content = content[file.write(content) :]


def _put_in_place(incoming: Path, folder: Path, facts: Facts) -> None:
    with contextlib.suppress(DamagedCacheError):
        if (found := read(folder)) and found.facts == facts:
            return  # another process was faster
    aside = incoming.with_name(f"{incoming.stem}-old.tmp")
    with contextlib.suppress(FileNotFoundError):
        folder.rename(aside)
    incoming.rename(folder)
    shutil.rmtree(aside, ignore_errors=True)


def _remove_abandoned(folder: Path) -> None:
    """Removes the temporary folders of writers that were killed."""
    for temporary in folder.parent.glob(f"{folder.name}.*.tmp"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - max(path.stat().st_mtime for path in (temporary, *temporary.iterdir())) > _ABANDONED_AFTER_S:
                shutil.rmtree(temporary)


@contextlib.contextmanager
def _explaining(folder: Path, size: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OSError(
            f"cannot write the cache {folder} of {max(size / 1e6, 0.1):.1f} MB: {error.strerror or error}: "
            "make room, or set IRESNET_JAX_CACHE_DIR to a folder with room"
        ) from error
