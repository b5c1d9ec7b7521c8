"""IDX files, the format of MNIST and its relatives (Fashion-MNIST, KMNIST, EMNIST), plain or compressed with gzip.

A file is two zero bytes, a byte for the type (8: unsigned byte), a byte for the number of dimensions, each dimension as a
big-endian 32-bit integer, and then the bytes (http://yann.lecun.com/exdb/mnist).
"""

import functools
import gzip
import math
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from iresnet_jax.data.sources.source import CHUNK, Chunk, Contents, Source, check_is_folder, source_in_folder

_PREFIXES = {"train": ("train",), "test": ("t10k", "test")}  # how the customary file names begin
_UNSIGNED_BYTE = 8


def source(folder: Path, name: str) -> Source:
    """Finds the IDX files in a folder: ``train-images-idx3-ubyte``, ``train-labels-idx1-ubyte``, ``t10k-...``, or with ``.gz``.

    Raises:
        ValueError: If the folder does not hold one file of each.
    """
    check_is_folder(folder, name)
    files = {(split, kind): _find(folder, split, kind, name) for split in _PREFIXES for kind in ("images", "labels")}
    return source_in_folder(name, folder, files.values(), functools.partial(_open, files))


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
    kind, num_dimensions = content[2], content[3]
    if kind != _UNSIGNED_BYTE:
        raise ValueError(
            f"{path} holds values of IDX type {kind}: only unsigned bytes (type {_UNSIGNED_BYTE}) are images or labels"
        )
    start = 4 + 4 * num_dimensions
    if len(content) < start:
        raise ValueError(f"{path} is truncated within its header: fetch it again")
    shape = struct.unpack(f">{num_dimensions}I", content[4:start])
    if len(content) - start != math.prod(shape):
        raise ValueError(
            f"{path} should hold {' x '.join(map(str, shape))} = {math.prod(shape)} bytes after its header "
            f"but holds {len(content) - start}: fetch it again"
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def _find(folder: Path, split: str, kind: str, name: str) -> Path:
    names = [f"{prefix}-{kind}" for prefix in _PREFIXES[split]]
    found = {
        p.name: p for n in names for p in folder.glob(f"*{n}?idx?-ubyte*") if p.name.removesuffix(".gz").endswith("-ubyte")
    }
    plain = [path for file, path in found.items() if not (file.endswith(".gz") and file.removesuffix(".gz") in found)]
    if len(plain) != 1:
        those = ", ".join(sorted(path.name for path in plain)) or "none"
        digit = 3 if kind == "images" else 1
        raise ValueError(
            f"{name} needs one file {' or '.join(names)}-idx{digit}-ubyte[.gz] in {folder} for its {split} split, found {those}"
        )
    return plain[0]


def _open(files: dict[tuple[str, str], Path]) -> Contents:
    labels = {split: read(files[split, "labels"]) for split in _PREFIXES}
    images = {split: read(files[split, "images"]) for split in _PREFIXES}
    for split in _PREFIXES:
        if images[split].ndim not in (3, 4) or labels[split].ndim != 1:
            raise ValueError(
                f"{files[split, 'images']} and {files[split, 'labels']} should have 3 (or 4) dimensions and 1, "
                f"but have {images[split].ndim} and {labels[split].ndim}: are they images and labels?"
            )

    def chunks(split: str) -> Iterator[Chunk]:
        for start in range(0, len(images[split]), CHUNK):
            rows = slice(start, start + CHUNK)
            block = images[split][rows]
            yield block if block.ndim == 4 else block[..., None], labels[split][rows]

    num_classes = 1 + int(labels["train"].max(initial=0))
    return Contents({split: len(images[split]) for split in _PREFIXES}, num_classes, chunks)
