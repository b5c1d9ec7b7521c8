"""CIFAR-10 and CIFAR-100 in the binary version of their authors, as a folder or as the ``.tar.gz`` that they publish.

A record is the label (CIFAR-100: the coarse and the fine one) and 3 x 32 x 32 bytes, one colour plane after the other
(https://www.cs.toronto.edu/~kriz/cifar.html).
"""

import tarfile
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from iresnet_jax.data.sources.source import Contents, Source, check_path

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
    if path.is_file():
        return Source.of_files(name, path, [path], lambda: _contents(name, path, _from_archive(path)))
    check_path(path, name, is_folder=True)
    # In the folder or below it, as an archive is unpacked.
    files = [found for found in path.rglob("*.bin") if found.name in _NAMES and found.is_file()]
    return Source.of_files(name, path, files, lambda: _contents(name, path, {file.name: file.read_bytes() for file in files}))


def _contents(name: str, path: Path, files: dict[str, bytes]) -> Contents:
    version = _CIFAR100 if _CIFAR100.files["train"][0] in files else _CIFAR10
    if version is _CIFAR100 and any(file in files for file in _CIFAR10.files["train"]):
        raise ValueError(f"{path} holds both CIFAR-10 and CIFAR-100: give the folder of one of them")
    size, images, labels = version.label_bytes + _PIXELS, {}, {}
    for split, needed in version.files.items():
        if missing := [file for file in needed if file not in files]:
            raise ValueError(
                f"{path} lacks {', '.join(missing)}: the binary version of CIFAR is needed, cifar-10-binary.tar.gz or its files"
            )
        for file in needed:
            if not files[file] or len(files[file]) % size:
                raise ValueError(
                    f"{file} in {path} has {len(files[file])} bytes, not a multiple of {size}: it is damaged, fetch it again"
                )
        records = np.frombuffer(b"".join(files[file] for file in needed), np.uint8).reshape(-1, size)
        images[split] = records[:, version.label_bytes :].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        labels[split] = records[:, version.label_bytes - 1]
    return Contents.of_arrays(name, images, labels, version.num_classes)


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
