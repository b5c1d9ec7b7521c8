"""Arrays in files: ``.npz`` and ``.npy`` of vectors and images, ``.csv`` of vectors.

A folder ``npy:FOLDER`` or ``csv:FOLDER`` holds one file per split, ``train.npy``,
``validation.npy``, ``test.npy``, and may hold ``train_labels.npy``, ``train_context.npy`` and so
on. A single file holds examples that are not split yet. In a table with a header the column
``label`` holds classes, and columns that begin with ``context`` are contexts.
"""

import csv
import math
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from iresnet_jax.data.arrays import Arrays, from_arrays
from iresnet_jax.data.dataset import SPLITS, DataSet
from iresnet_jax.models.columns import Column

_MISSING = {"", "na", "n/a", "nan", "null", "none", "?"}
# Names of the examples and labels of a split, by Keras and by MedMNIST.
_KEYS = {
    "train": (("x_train", "y_train"), ("train_images", "train_labels")),
    "validation": (
        ("x_validation", "y_validation"),
        ("x_val", "y_val"),
        ("val_images", "val_labels"),
    ),
    "test": (("x_test", "y_test"), ("test_images", "test_labels")),
}


def load_npz(
    path: Path, name: str, fractions: tuple[float, float], num_classes: int | None
) -> DataSet:
    """The data set of the arrays of an ``.npz`` file.

    The arrays are ``x``, ``y`` and ``context``, to be split, or ``x_train``, ``y_train``,
    ``context_train``, ``x_test`` and so on. Labels and contexts may be left out. The names of
    MedMNIST, ``train_images``, ``train_labels``, ``val_images`` and so on, are understood too.
    Images may lack the axis of channels.
    """
    arrays = _read(path, ".npz")

    def part(x: str, y: str) -> Arrays:
        ending = x.removeprefix("x") if x.startswith("x") else f"_{x.removesuffix('_images')}"
        examples = arrays.pop(x)
        examples = examples[..., None] if examples.ndim == 3 else examples
        return Arrays(examples, arrays.pop(y, None), arrays.pop(f"context{ending}", None))

    present = {
        split: [keys for keys in names if keys[0] in arrays] for split, names in _KEYS.items()
    }
    splits = {split: part(*keys[0]) for split, keys in present.items() if keys}
    if "x" not in arrays and not splits:
        raise ValueError(
            f"{path} holds {', '.join(sorted(arrays)) or 'nothing'}: the array x is "
            "needed, or x_train and x_test"
        )
    read = splits or part("x", "y")
    if arrays:
        raise ValueError(
            f"{path} holds {', '.join(sorted(arrays))}, which nothing reads beside "
            f"{' and '.join(splits) or 'x'}: leave it out, or call it x, y and context, or "
            "x_train, y_train, context_train, x_validation, x_test and so on"
        )
    return from_arrays(name, read, fractions=fractions, num_classes=num_classes)


def load_npy(
    path: Path, name: str, fractions: tuple[float, float], num_classes: int | None
) -> DataSet:
    """The data set of one ``.npy`` file, or of a folder with one per split."""

    def read(file: Path) -> Arrays:
        beside = {kind: file.with_name(f"{file.stem}_{kind}.npy") for kind in ("labels", "context")}
        others = {kind: _read(other, ".npy") for kind, other in beside.items() if other.is_file()}
        return Arrays(_read(file, ".npy"), **others)

    return from_arrays(
        name, _by_split(path, ".npy", read), fractions=fractions, num_classes=num_classes
    )


def load_csv(
    path: Path, name: str, fractions: tuple[float, float], num_classes: int | None
) -> DataSet:
    """The data set of one table of numbers separated by commas, or of a folder with one per
    split.
    """
    headers = []

    def read(file: Path) -> Arrays:
        header, numbers = _read_table(file)
        headers.append(header)
        if headers[0] != header:
            raise ValueError(
                f"{file} has the columns {header}, and the tables before it {headers[0]}: give all "
                "the same"
            )
        labels = [i for i, column in enumerate(header) if column == "label"]
        context = [i for i, column in enumerate(header) if column.startswith("context")]
        x = np.delete(numbers, labels + context, axis=1)
        classes = numbers[:, labels[0]] if labels else None
        if classes is not None:
            if np.any(classes % 1):
                raise ValueError(
                    f"the column label of {file} must hold whole numbers, got "
                    f"{classes[classes % 1 > 0][0]:g}"
                )
            classes = classes.astype(np.int64)
        return Arrays(x, classes, numbers[:, context] if context else None)

    arrays = _by_split(path, ".csv", read)
    header = headers[0] if headers else []
    named = (name for name in header if name != "label" and not name.startswith("context"))
    columns = tuple(Column(name, "float64") for name in named) or None
    return from_arrays(name, arrays, fractions=fractions, columns=columns, num_classes=num_classes)


def _by_split(
    path: Path, ending: str, read: Callable[[Path], Arrays]
) -> Arrays | dict[str, Arrays]:
    if not path.is_dir():
        return read(path)
    files = {split: path / f"{split}{ending}" for split in SPLITS}
    beside = ("", "_labels", "_context") if ending == ".npy" else ("",)
    known = {split + end for split in SPLITS for end in beside}
    if other := sorted({each.stem for each in path.glob(f"[!.]*{ending}")} - known):
        raise ValueError(
            f"{path} holds {other[0]}{ending}, which nothing reads: call it {', '.join(SPLITS)}"
            f"{' or, say, train_labels or train_context' if ending == '.npy' else ''}, or move it "
            "elsewhere"
        )
    return {split: read(file) for split, file in files.items() if file.is_file()}


def _read(path: Path, ending: str) -> Any:
    """The array of an ``.npy`` file, or the dictionary of an ``.npz`` file."""
    try:
        with path.open("rb") as file:
            found = np.load(file, allow_pickle=False)
            return dict(found) if ending == ".npz" else found
    # `TypeError` means that the file is a single array.
    except (EOFError, MemoryError, TypeError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(
            f"{path} is not an intact {ending} file of plain arrays: {error}"
        ) from None


def _read_table(path: Path) -> tuple[list[str], np.ndarray]:
    """The column names, empty without a header, and the numbers of a table."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            lines = [line for line in csv.reader(file) if line]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is no table in UTF-8: {error}") from None
    if len(lines) > 1 and len(lines[0]) > 1 and lines[0] == [str(i) for i in range(len(lines[0]))]:
        raise ValueError(
            f"the first line of {path} numbers the columns, as the header that pandas writes for "
            "an array: write it with header=False, or name the columns; a row of data with these "
            "numbers can stand further down"
        )
    header = (
        [column.strip() for column in lines[0]] if lines and None in map(_number, lines[0]) else []
    )
    if len(set(header)) < len(header):
        raise ValueError(
            f"two columns of {path} have the same name, of {header}: rename one of them"
        )
    if "" in header:
        raise ValueError(
            f"column {header.index('') + 1} of {path} has no name, as the row numbers that pandas "
            "writes: write the table with index=False, or name the column"
        )
    if typo := next((cell for cell in header if (_number(cell) or 0) % 1), None):
        raise ValueError(
            f"the first line of {path} holds {typo} beside other text: correct it, or "
            "name all columns in words"
        )
    rows = lines[1:] if header else lines
    if not rows:
        raise ValueError(f"{path} has no rows: it needs a row of numbers an example")
    numbers = np.empty((len(rows), len(lines[0])))
    for i, row in enumerate(rows):
        if len(row) != len(lines[0]):
            raise ValueError(
                f"row {i + 1} of {path} has {len(row)} columns, the first line "
                f"{len(lines[0])}: complete it"
            )
        for j, text in enumerate(row):
            number = _number(text)
            if number is None or not math.isfinite(number):
                where = f"row {i + 1}, column {header[j] if header else j + 1} of {path}"
                raise ValueError(
                    f"{where} holds {text!r}, no finite number: fill it in, or drop "
                    "the row or column"
                )
            numbers[i, j] = number
    return header, numbers


def _number(text: str) -> float | None:
    """The number in a cell, NaN where it is missing; None for other text."""
    try:
        return math.nan if text.strip().lower() in _MISSING else float(text)
    except ValueError:
        return None
