"""Arrays in files: ``.npz`` and ``.npy`` of vectors, continuous images or images of integer levels, ``.csv`` of vectors.

A folder ``npy:FOLDER`` or ``csv:FOLDER`` holds a file a split, ``train.npy``, ``validation.npy``, ``test.npy``, and may hold
``train_labels.npy`` and ``train_context.npy`` and so on. A single file holds examples that are not split yet. In a table with a
header the column ``label`` holds classes, and columns that begin with ``context`` are contexts.
"""

import csv
import math
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from iresnet_jax.data import cache
from iresnet_jax.data.arrays import Arrays, from_arrays
from iresnet_jax.data.dataset import DataSet
from iresnet_jax.data.sources.source import Contents, Source, check_path

_SPLITS = ("train", "validation", "test")
_LABEL, _CONTEXT = "label", "context"
_MISSING = {"", "na", "n/a", "nan", "null", "none", "?"}
# Names that the examples and labels of a split may have: those of Keras and of MedMNIST.
_KEYS = {
    "train": (("x_train", "y_train"), ("train_images", "train_labels")),
    "validation": (("x_validation", "y_validation"), ("x_val", "y_val"), ("val_images", "val_labels")),
    "test": (("x_test", "y_test"), ("test_images", "test_labels")),
}


def load_npz(path: Path, name: str, fractions: tuple[float, float]) -> DataSet:
    """The data set of the arrays of an ``.npz`` file.

    Images of 8 bits, ``x_train`` and ``x_test`` of shape (n, h, w) or (n, h, w, c), are decoded once. Labels ``y_train`` and
    ``y_test``, integers of shape (n,) or (n, 1), may be left out, and ``x_validation``, ``y_validation`` may be added. The
    names of MedMNIST, ``train_images``, ``train_labels``, ``val_images`` and so on, are understood too.

    Other arrays are ``x``, ``y`` and ``context``, to be split, or have those names with ``context_train`` and so on.

    Raises:
        ValueError: If there is no such file, or its arrays do not make up a data set.
    """
    check_path(path, name, is_folder=False)
    if _holds_images(path):
        return cache.load(Source.of_files(name, path, [path], lambda: _image_contents(path, name)))
    arrays = _read_npz(path)

    def part(x: str, y: str) -> Arrays:
        ending = x.removeprefix("x") if x.startswith("x") else f"_{x.removesuffix('_images')}"
        return Arrays(arrays[x], arrays.get(y), arrays.get(f"context{ending}"))

    splits = {split: part(*keys) for split, names in _KEYS.items() for keys in names if keys[0] in arrays}
    return from_arrays(name, part("x", "y") if "x" in arrays else splits, fractions=fractions)


def load_npy(path: Path, name: str, fractions: tuple[float, float]) -> DataSet:
    """The data set of one ``.npy`` file, or of a folder with one per split.

    Raises:
        ValueError: If there is none, or it is damaged, or the arrays do not make up a data set.
    """

    def read(file: Path) -> Arrays:
        beside = {kind: file.with_name(f"{file.stem}_{kind}.npy") for kind in ("labels", "context")}
        return Arrays(_read_npy(file), **{kind: _read_npy(other) for kind, other in beside.items() if other.is_file()})

    return from_arrays(name, _by_split(path, name, ".npy", read), fractions=fractions)


def load_csv(path: Path, name: str, fractions: tuple[float, float]) -> DataSet:
    """The data set of one table of numbers separated by commas, or of a folder with one per split.

    Raises:
        ValueError: If there is none, a number is missing or none, or the table does not make up a data set.
    """
    headers = []

    def read(file: Path) -> Arrays:
        header, numbers = _read_table(file)
        headers.append(header)
        if headers[0] != header:
            raise ValueError(f"{file} has the columns {header}, and the tables before it {headers[0]}: give all the same")
        labels = [i for i, column in enumerate(header) if column == _LABEL]
        context = [i for i, column in enumerate(header) if column.startswith(_CONTEXT)]
        x = np.delete(numbers, labels + context, axis=1)
        classes = numbers[:, labels[0]] if labels else None
        if classes is not None:
            if np.any(classes % 1):
                raise ValueError(f"the column {_LABEL} of {file} must hold whole numbers, got {classes[classes % 1 > 0][0]:g}")
            classes = classes.astype(np.int64)
        return Arrays(x, classes, numbers[:, context] if context else None)

    arrays = _by_split(path, name, ".csv", read)
    named = [column for column in headers[0] if column != _LABEL and not column.startswith(_CONTEXT)] if headers else []
    return from_arrays(name, arrays, fractions=fractions, column_names=named)


def _by_split(path: Path, name: str, ending: str, read: Callable[[Path], Arrays]) -> Arrays | dict[str, Arrays]:
    if not path.is_dir():
        check_path(path, name, is_folder=False)
        return read(path)
    files = {split: path / f"{split}{ending}" for split in _SPLITS}
    return {split: read(file) for split, file in files.items() if file.is_file()}


def _holds_images(path: Path) -> bool:
    """Tells by the header of an array whether a file holds images of 8 bits in splits, or nothing that is known."""
    try:
        with zipfile.ZipFile(path) as archive:
            known = [name for name in ("x.npy", "x_train.npy", "train_images.npy") if name in archive.namelist()]
            if not known or known[0] == "x.npy":
                return not known
            with archive.open(known[0]) as member:
                version = np.lib.format.read_magic(member)
                read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                shape, _, dtype = read(member)
                return dtype == np.uint8 and len(shape) > 2
    except (EOFError, ValueError, zipfile.BadZipFile, zlib.error):  # `_read_npz` says what is wrong
        return True


def _image_contents(path: Path, name: str) -> Contents:
    arrays, images, labels = _read_npz(path), {}, {}
    for split, keys in _KEYS.items():
        for of_images, of_labels in keys:
            if of_images in arrays:
                images[split] = arrays[of_images]
                if of_labels in arrays:
                    found = arrays[of_labels]
                    labels[split] = found[:, 0] if found.shape[1:] == (1,) else found
    if not images:
        raise ValueError(
            f"{path} holds {', '.join(sorted(arrays)) or 'nothing'}: x_train and x_test are needed, and y_train and y_test"
        )
    return Contents.of_arrays(name, images, labels)


def _read_npz(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:  # which np.load leaves open when it fails
            return dict(np.load(file, allow_pickle=False))
    except (EOFError, MemoryError, TypeError, ValueError, zipfile.BadZipFile, zlib.error) as error:  # TypeError: one array
        raise ValueError(f"{path} is not an intact .npz file of plain arrays: {error}") from None


def _read_npy(path: Path) -> np.ndarray:
    try:
        return np.load(path, allow_pickle=False)
    except (EOFError, MemoryError, OSError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not an intact .npy file of a plain array: {error}") from None


def _read_table(path: Path) -> tuple[list[str], np.ndarray]:
    """The column names, empty without a header, and the numbers of a table."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            lines = [line for line in csv.reader(file) if line]
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8: save it as UTF-8") from None
    except csv.Error as error:
        raise ValueError(f"{path} is no table: {error}; look for a quotation mark without a second one") from None
    header = [column.strip() for column in lines[0]] if lines and None in map(_number, lines[0]) else []
    if "" in header:
        raise ValueError(
            f"column {header.index('') + 1} of {path} has no name, as the row numbers that pandas writes: write the table with "
            "index=False, or name the column"
        )
    rows = lines[1:] if header else lines
    if not rows:
        raise ValueError(f"{path} has no rows: it needs a row of numbers an example")
    numbers = np.empty((len(rows), len(lines[0])))
    for i, row in enumerate(rows):
        if len(row) != len(lines[0]):
            raise ValueError(f"row {i + 1} of {path} has {len(row)} columns, the first line {len(lines[0])}: complete it")
        for j, text in enumerate(row):
            number = _number(text)
            if number is None or not math.isfinite(number):
                where = f"row {i + 1}, column {header[j] if header else j + 1} of {path}"
                raise ValueError(f"{where} holds {text!r}, no finite number: fill it in, or drop the row or column")
            numbers[i, j] = number
    return header, numbers


def _number(text: str) -> float | None:
    """The number in a cell, NaN where it is missing; None for other text."""
    try:
        return math.nan if text.strip().lower() in _MISSING else float(text)
    except ValueError:
        return None
