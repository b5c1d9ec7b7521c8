"""Images decoded once: every source is read through a cache that later runs only map into memory.

The cache lies next to the data, or under the user's cache folder where that is not writable: ``IRESNET_JAX_CACHE_DIR`` if it is
set, which then always holds, else ``$XDG_CACHE_HOME/iresnet_jax`` or ``~/.cache/iresnet_jax``. It may be deleted at any time.

It is a folder of ``.npy`` files. ``record.json`` beside them holds the type, shape and SHA-256 of each array, the number of
levels and classes, the fingerprint of these, and the state of the source files. Opening compares headers and file sizes with
the record; it reads no pixels.
"""

import contextlib
import errno
import hashlib
import itertools
import json
import logging
import math
import os
import secrets
import shutil
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from iresnet_jax.atomic_files import locked
from iresnet_jax.data import splits
from iresnet_jax.data.dataset import DataSet, Splits, describe, fingerprint_of
from iresnet_jax.data.sources.source import NUM_LEVELS, Source, checked

RECORD = "record.json"
FOLDER_VARIABLE = "IRESNET_JAX_CACHE_DIR"
_ABANDONED_AFTER_S = 3600  # a living writer touches its files far more often

Layout = dict[str, tuple[str, tuple[int, ...]]]  # type and shape of arrays by name

_log = logging.getLogger(__name__)


class DamagedCacheError(ValueError):
    """A cache is incomplete or was altered."""


def user_folder() -> Path:
    """The user's folder for what can be made again: ``$IRESNET_JAX_CACHE_DIR``, or ``iresnet_jax`` in their cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "iresnet_jax")
    return Path(os.environ.get(FOLDER_VARIABLE) or default).expanduser()


def load(source: Source) -> DataSet:
    """Maps a source's decoded images into memory, decoding them first if there is no valid cache of them.

    A cache that is incomplete, altered or made from other source files is made again. Of processes that start at once, the
    others wait for the first where the file system can lock, and else each decodes.

    Raises:
        ValueError: If the data are not images of one size with labels in range, in a training and a test split.
        OSError: If the cache cannot be written anywhere.
    """
    folders = _folders(source.cache_path)
    if found := _find(folders, source):
        return found
    folder = _first_writable(folders, source)
    with locked(folder):
        found = _find([folder], source, quiet=True)  # another process may have been first
        if found is None:
            _decode(source, folder)
            found = _find([folder], source)
    if found is None:
        raise OSError(f"the cache {folder} was replaced while it was written: is another program using the folder?")
    return found


def _folders(beside: Path) -> list[Path]:
    """Folders where the cache may lie, the preferred one first."""
    digest = hashlib.sha256(os.fsencode(beside.resolve())).hexdigest()[:12]
    elsewhere = user_folder() / "-".join([*beside.parent.parts[-2:], digest]).lstrip("/")
    return [elsewhere] if os.environ.get(FOLDER_VARIABLE) else [beside, elsewhere]


def _first_writable(folders: list[Path], source: Source) -> Path:
    for folder in folders:
        parent = folder.parent
        with contextlib.suppress(OSError):
            parent.mkdir(parents=True, exist_ok=True)
            # A folder without any permission to write was meant to stay as it is, even where root could.
            if os.access(parent, os.W_OK) and parent.stat().st_mode & 0o222:
                return folder
    tried = " and ".join(str(folder.parent) for folder in folders)
    raise OSError(f"cannot write the decoded images of {source.name} into {tried}: set {FOLDER_VARIABLE} to a writable folder")


def _read(folder: Path, source: Source) -> DataSet | None:
    """Maps a cache into memory; None if there is none, none that may be read, or one of other source files.

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
        if record["source_state"] != source.state:
            return None
        levels = {name: record[name] for name in ("num_levels", "num_classes")}
        if fingerprint_of(record["arrays"], **levels) != record["fingerprint"]:
            raise ValueError(f"{RECORD} does not match its fingerprint")
        arrays: dict[str, Splits] = {"examples": {}, "labels": {}}
        for name, expected in record["arrays"].items():
            path = folder / f"{name}.npy"
            array = np.load(path, mmap_mode="r", allow_pickle=False)  # refuses a file shorter than its header says
            if describe(array.dtype, array.shape, expected["sha256"]) != expected:
                raise ValueError(f"{path.name} holds {array.dtype} of shape {array.shape}")
            if path.stat().st_size != array.offset + array.nbytes:
                raise ValueError(f"{path.name} has {path.stat().st_size} bytes instead of {array.offset + array.nbytes}")
            split, kind = name.rsplit("_", 1)
            arrays[kind][split] = array.view(np.ndarray)
        if (folder / RECORD).read_bytes() != text:
            raise ValueError("it was replaced while it was read")
        return DataSet.from_arrays(source.name, **arrays, **levels, fingerprint=record["fingerprint"])
    except (AttributeError, EOFError, KeyError, OSError, TypeError, ValueError) as error:
        raise DamagedCacheError(f"the cache {folder} is incomplete or was altered: {type(error).__name__}: {error}") from None


def _find(folders: list[Path], source: Source, *, quiet: bool = False) -> DataSet | None:
    for folder in folders:
        try:
            if found := _read(folder, source):
                return found
        except DamagedCacheError as error:
            if not quiet:
                _log.warning("%s; %s is decoded again", error, source.name)
    return None


def _decode(source: Source, folder: Path) -> None:
    """Reads the source once, in pieces, and writes the cache."""
    from tqdm import tqdm  # needed here alone

    _log.info("decoding %s into %s", source.name, folder)
    contents = source.open()
    routes = splits.routes(contents.num_examples, source.name)
    chunks = checked(source.name, contents, routes)
    first = next(chunks)  # for the size of its images

    def pieces() -> Iterator[tuple[str, np.ndarray]]:
        for published, rows, images, labels in itertools.chain([first], chunks):
            progress.update(len(images))
            for split, mask in routes[published].items():
                yield f"{split}_examples", images[mask[rows]]
                if labels is not None:
                    yield f"{split}_labels", labels[mask[rows]]

    layout: Layout = {}
    for split, mask in (item for masks in routes.values() for item in masks.items()):
        layout[f"{split}_examples"] = "uint8", (int(mask.sum()), *first[2].shape[1:])
        if contents.num_classes is not None:
            layout[f"{split}_labels"] = "int32", (int(mask.sum()),)
    total = sum(contents.num_examples[published] for published in routes)
    with tqdm(total=total, desc=f"decoding {source.name}", unit=" images", leave=False, disable=None) as progress:
        _write(folder, source, layout, pieces(), contents.num_classes)


def _write(
    folder: Path, source: Source, layout: Layout, pieces: Iterable[tuple[str, np.ndarray]], num_classes: int | None
) -> None:
    """Writes a cache of pieces ``(name, rows)``, which together hold the rows of each array once, in order.

    The files are written into a temporary folder, forced to the disk, and the folder is renamed at the end: a writer that fails
    or is killed leaves the cache as it was. If several processes write the same data at once, the first to end wins.
    """
    size = sum(math.prod(shape) * np.dtype(dtype).itemsize for dtype, shape in layout.values())
    incoming = folder.with_name(f"{folder.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    digests = {name: hashlib.sha256() for name in layout}
    try:
        _remove_abandoned(folder)
        if shutil.disk_usage(folder.parent).free < size:  # better noticed before an hour of decoding than after it
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        incoming.mkdir()
        with contextlib.ExitStack() as stack:
            files = {name: stack.enter_context((incoming / f"{name}.npy").open("xb")) for name in layout}
            for name, (dtype, shape) in layout.items():
                header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(files[name], header)
            for name, rows in pieces:
                content = np.ascontiguousarray(rows, layout[name][0]).reshape(-1).view(np.uint8).data
                digests[name].update(content)
                files[name].write(content)
            arrays = {name: describe(*layout[name], digest.hexdigest()) for name, digest in digests.items()}
            levels = {"num_levels": NUM_LEVELS, "num_classes": num_classes}
            record = {"source_state": source.state, **levels, "arrays": arrays, "fingerprint": fingerprint_of(arrays, **levels)}
            files[RECORD] = stack.enter_context((incoming / RECORD).open("xb"))
            files[RECORD].write(json.dumps(record, indent=1).encode())
            for file in files.values():
                file.flush()
                os.fsync(file.fileno())
        _put_in_place(incoming, folder, source)
    except OSError as error:
        raise OSError(
            f"cannot write the cache {folder} of {max(size / 1e6, 0.1):.1f} MB: {error.strerror or error}: "
            f"make room, or set {FOLDER_VARIABLE} to a folder with room"
        ) from error
    finally:
        shutil.rmtree(incoming, ignore_errors=True)


def _put_in_place(incoming: Path, folder: Path, source: Source) -> None:
    with contextlib.suppress(DamagedCacheError):
        if _read(folder, source):
            return  # another process was faster
    shutil.rmtree(folder, ignore_errors=True)
    try:
        incoming.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise  # otherwise another process was faster by a moment


def _remove_abandoned(folder: Path) -> None:
    """Removes the temporary folders of writers that were killed."""
    for temporary in folder.parent.glob(f"{folder.name}.*.tmp"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - max(path.stat().st_mtime for path in (temporary, *temporary.iterdir())) > _ABANDONED_AFTER_S:
                shutil.rmtree(temporary)
