"""IDX files, the format of MNIST and its relatives (Fashion-MNIST, KMNIST, EMNIST), plain or compressed with gzip.

A file is two zero bytes, a byte for the type (8: unsigned byte), a byte for the number of dimensions, each dimension as a
big-endian 32-bit integer, and then the bytes (http://yann.lecun.com/exdb/mnist).
"""

import gzip
import math
import zlib
from pathlib import Path

import numpy as np

from iresnet_jax.data.sources.source import Contents, Source, check_path

_PREFIXES = {"train": ("train",), "test": ("t10k", "test")}  # how the customary file names begin
_KINDS = {"images": 3, "labels": 1}  # and the dimensions that they mention
_UNSIGNED_BYTE = 8


def source(folder: Path, name: str) -> Source:
    """Finds the IDX files in a folder: ``train-images-idx3-ubyte``, ``train-labels-idx1-ubyte``, ``t10k-...``, or with ``.gz``.

    Raises:
        ValueError: If the folder does not hold one file of each.
    """
    check_path(folder, name, is_folder=True)
    files = {kind: {split: _find(folder, split, kind, name) for split in _PREFIXES} for kind in _KINDS}

    def opened() -> Contents:
        images, labels = ({split: read(path) for split, path in files[kind].items()} for kind in _KINDS)
        return Contents.of_arrays(name, images, labels)

    return Source.of_files(name, folder, [path for of_kind in files.values() for path in of_kind.values()], opened)


def read(path: Path) -> np.ndarray:
    """Reads one IDX file of unsigned bytes.

    Raises:
        ValueError: If it is truncated, too long, not an IDX file or not of unsigned bytes.
    """
    content = path.read_bytes()
    if content[:2] == b"\x1f\x8b":
        try:
            content = gzip.decompress(content)
        except (EOFError, OSError, zlib.error) as error:
            raise ValueError(f"{path} is not an intact gzip file: {error}; fetch it again") from None
    if len(content) < 4 or content[:2] != b"\0\0":
        raise ValueError(f"{path} is not an IDX file: it must begin with two zero bytes; fetch it again")
    kind, start = content[2], 4 + 4 * content[3]
    if kind != _UNSIGNED_BYTE:
        raise ValueError(
            f"{path} holds values of IDX type {kind}: only unsigned bytes (type {_UNSIGNED_BYTE}) are images or labels"
        )
    if len(content) < start:
        raise ValueError(f"{path} is truncated within its header: fetch it again")
    shape = np.frombuffer(content[4:start], ">u4").tolist()
    if len(content) - start != math.prod(shape):
        raise ValueError(
            f"{path} should hold {' x '.join(map(str, shape))} = {math.prod(shape)} bytes after its header "
            f"but holds {len(content) - start}: fetch it again"
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def _find(folder: Path, split: str, kind: str, name: str) -> Path:
    """Finds a file of a split, the unpacked one where its archive lies beside it."""
    names = [f"{prefix}-{kind}" for prefix in _PREFIXES[split]]
    endings = "-ubyte", "-ubyte.gz"
    found = {path for of_name in names for path in folder.glob(f"*{of_name}?idx?-ubyte*") if path.name.endswith(endings)}
    found -= {path for path in found if path.suffix == ".gz" and path.with_suffix("") in found}
    if len(found) != 1:
        those = ", ".join(sorted(path.name for path in found)) or "none"
        raise ValueError(
            f"{name} needs one file {' or '.join(names)}-idx{_KINDS[kind]}-ubyte[.gz] in {folder} for its {split} split, "
            f"found {those}"
        )
    return found.pop()
