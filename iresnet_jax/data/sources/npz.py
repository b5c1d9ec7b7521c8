"""Arrays of images in one ``.npz`` file, under the names of Keras (``x_train``, ``y_train``) or MedMNIST (``train_images``)."""

import functools
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from iresnet_jax.data.sources.source import CHUNK, Chunk, Contents, Source, check_is_file, source_of_file

# Names that the images and labels of a split may have.
_KEYS = {
    "train": (("x_train", "y_train"), ("train_images", "train_labels")),
    "validation": (("x_validation", "y_validation"), ("x_val", "y_val"), ("val_images", "val_labels")),
    "test": (("x_test", "y_test"), ("test_images", "test_labels")),
}


def source(path: Path, name: str) -> Source:
    """Finds the images in an ``.npz`` file: ``x_train`` and ``x_test``, each uint8 of shape (n, h, w) or (n, h, w, c).

    Labels ``y_train`` and ``y_test``, integers of shape (n,) or (n, 1), may be left out, and ``x_validation``, ``y_validation``
    may be added. The names of MedMNIST, ``train_images``, ``train_labels``, ``val_images`` and so on, are understood too.

    Raises:
        ValueError: If there is no such file.
    """
    check_is_file(path, name)
    return source_of_file(name, path, functools.partial(_open, path))


def continuous_arrays(path: Path, name: str) -> dict[str, Any] | None:
    """The arrays of a file that does not hold images of 8 bits in splits; None for one that does."""
    check_is_file(path, name)
    header = _header(path, ("x", "x_train", "train_images"))
    if header is None or (header[1] == np.uint8 and len(header[2]) > 2 and header[0] != "x"):
        return None
    return _load(path)


def _header(path: Path, names: tuple[str, ...]) -> tuple[str, np.dtype, tuple[int, ...]] | None:
    """Name, type and shape of the first of these arrays that a file has, without reading it; None of a file without any."""
    try:
        with zipfile.ZipFile(path) as archive:
            for name in names:
                if f"{name}.npy" in archive.namelist():
                    with archive.open(f"{name}.npy") as member:
                        version = np.lib.format.read_magic(member)
                        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                        shape, _, dtype = read(member)
                        return name, dtype, shape
    except (EOFError, ValueError, zipfile.BadZipFile, zlib.error):  # `_load` says what is wrong
        return None
    return None


def _open(path: Path) -> Contents:
    arrays = _load(path)
    images, labels = {}, {}
    for split, choices in _KEYS.items():
        for of_images, of_labels in choices:
            if of_images in arrays:
                images[split] = _as_images(arrays[of_images], f"{of_images} of {path}")
                if of_labels in arrays:
                    labels[split] = _as_labels(arrays[of_labels], len(images[split]), f"{of_labels} of {path}")
    if not images:
        raise ValueError(
            f"{path} holds {', '.join(sorted(arrays)) or 'nothing'}: x_train and x_test are needed, and y_train and y_test"
        )
    if labels and "train" in images and "train" not in labels:
        raise ValueError(
            f"{path} holds labels of {', '.join(labels)} and none of its training images: add y_train or drop them"
        )

    def chunks(split: str) -> Iterator[Chunk]:
        for start in range(0, len(images[split]), CHUNK):
            rows = slice(start, start + CHUNK)
            yield images[split][rows], labels[split][rows] if split in labels else None

    num_classes = 1 + int(labels["train"].max(initial=0)) if "train" in labels else None
    return Contents({split: len(array) for split, array in images.items()}, num_classes, chunks)


def _load(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:  # which np.load leaves open when it fails
            return dict(np.load(file, allow_pickle=False))
    except (EOFError, TypeError, ValueError, zipfile.BadZipFile, zlib.error) as error:  # TypeError: a single array
        raise ValueError(f"{path} is not an intact .npz file of plain arrays: {error}") from None


def _as_images(array: np.ndarray, where: str) -> np.ndarray:
    if array.dtype != np.uint8 or array.ndim not in (3, 4):
        raise ValueError(
            f"{where} must be uint8 with levels 0 to 255 of shape (n, h, w) or (n, h, w, c), "
            f"got {array.dtype} of shape {array.shape}: convert it first"
        )
    return array if array.ndim == 4 else array[..., None]


def _as_labels(array: np.ndarray, num_images: int, where: str) -> np.ndarray:
    if not np.issubdtype(array.dtype, np.integer) or array.size != num_images:
        raise ValueError(
            f"{where} must hold one integer for each of {num_images} images, got {array.dtype} of shape {array.shape}"
        )
    return array.reshape(-1)
