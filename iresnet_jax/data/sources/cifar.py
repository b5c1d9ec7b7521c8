"""CIFAR-10 and CIFAR-100 in the binary version of their authors, as a folder or as the ``.tar.gz`` that they publish.

A record is the label (CIFAR-100: the coarse and the fine one) and 3 x 32 x 32 bytes, one colour plane after the other
(https://www.cs.toronto.edu/~kriz/cifar.html).
"""

import functools
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from iresnet_jax.data.sources.source import CHUNK, Chunk, Contents, Source, source_in_folder, source_of_file

_PIXELS = 3 * 32 * 32


class _Version(NamedTuple):
    files: dict[str, list[str]]
    num_classes: int
    label_bytes: int  # the last byte is the class


_CIFAR10 = _Version({"train": [f"data_batch_{i}.bin" for i in range(1, 6)], "test": ["test_batch.bin"]}, 10, 1)
_CIFAR100 = _Version({"train": ["train.bin"], "test": ["test.bin"]}, 100, 2)
_NAMES = {name for version in (_CIFAR10, _CIFAR100) for names in version.files.values() for name in names}


def source(path: Path, name: str) -> Source:
    """Finds CIFAR-10 or CIFAR-100: a folder with its ``.bin`` files, or ``cifar-10-binary.tar.gz`` itself.

    Raises:
        ValueError: If there is no such file or folder.
    """
    opener = functools.partial(_open, path)
    if path.is_file():
        return source_of_file(name, path, opener)
    if path.is_dir():
        return source_in_folder(name, path, _in_folder(path), opener)
    raise ValueError(f"there is no folder or file {path} for {name}: check the path")


def _open(path: Path) -> Contents:
    files = _from_archive(path) if path.is_file() else {p.name: p.read_bytes() for p in _in_folder(path)}
    version = _CIFAR100 if _CIFAR100.files["train"][0] in files else _CIFAR10
    if version is _CIFAR100 and any(name in files for name in _CIFAR10.files["train"]):
        raise ValueError(f"{path} holds both CIFAR-10 and CIFAR-100: give the folder of one of them")
    needed = [name for names in version.files.values() for name in names]
    if missing := [name for name in needed if name not in files]:
        raise ValueError(
            f"{path} lacks {', '.join(missing)}: the binary version of CIFAR is needed (cifar-10-binary.tar.gz), not python's"
        )
    record = version.label_bytes + _PIXELS
    for name in needed:
        if not files[name] or len(files[name]) % record:
            raise ValueError(
                f"{name} in {path} has {len(files[name])} bytes, not a multiple of {record}: it is damaged, fetch it again"
            )

    def chunks(split: str) -> Iterator[Chunk]:
        for name in version.files[split]:
            records = np.frombuffer(files[name], np.uint8).reshape(-1, record)
            for start in range(0, len(records), CHUNK):
                block = records[start : start + CHUNK]
                planes = block[:, version.label_bytes :].reshape(-1, 3, 32, 32)
                yield planes.transpose(0, 2, 3, 1), block[:, version.label_bytes - 1]

    num_examples = {split: sum(len(files[name]) for name in names) // record for split, names in version.files.items()}
    return Contents(num_examples, version.num_classes, chunks)


def _in_folder(path: Path) -> list[Path]:
    """Finds the files of either version in a folder or below it, as an archive is unpacked."""
    return [found for found in path.rglob("*.bin") if found.name in _NAMES and found.is_file()]


def _from_archive(path: Path) -> dict[str, bytes]:
    """Reads the ``.bin`` files of an archive into memory; nothing is unpacked to the disk."""
    files = {}
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                if member.isfile() and Path(member.name).name in _NAMES and (content := archive.extractfile(member)):
                    files[Path(member.name).name] = content.read()
    except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
        raise ValueError(f"{path} is not an intact archive: {error}; fetch it again") from None
    return files
