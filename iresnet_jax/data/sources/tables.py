"""Arrays of vectors or of continuous images in files: ``.npy``, ``.npz`` and ``.csv``, read into memory whole.

A folder ``npy:FOLDER`` or ``csv:FOLDER`` holds a file a split, ``train.npy``, ``validation.npy``, ``test.npy``, and may hold
``train_labels.npy`` and ``train_context.npy`` and so on. A single file holds examples that are not split yet. In a table with a
header the column ``label`` holds classes, and columns that begin with ``context`` are contexts.
"""

import csv
import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np

from iresnet_jax.data.arrays import Arrays, from_arrays
from iresnet_jax.data.dataset import DataSet
from iresnet_jax.data.splits import validation_mask

SPLITS = ("train", "validation", "test")
_LABEL, _CONTEXT = "label", "context"


def load_npy(path: Path, name: str, fractions: tuple[float, float]) -> DataSet:
    """The data set of one ``.npy`` file, or of a folder with one a split.

    Raises:
        ValueError: If there is none, or it is damaged, or the arrays do not make up a data set.
    """

    def read(file: Path) -> Arrays:
        beside = {kind: file.with_name(f"{file.stem}_{kind}.npy") for kind in ("labels", "context")}
        extra = {kind: _npy(other) for kind, other in beside.items() if other.is_file()}
        return Arrays(_npy(file), **extra)

    return from_arrays(name, _by_split(path, ".npy", read), fractions=fractions)


def load_csv(path: Path, name: str, fractions: tuple[float, float]) -> DataSet:
    """The data set of one table of numbers separated by commas, or of a folder with one a split.

    Raises:
        ValueError: If there is none, a number is missing or none, or the table does not make up a data set.
    """
    headers = []

    def read(file: Path) -> Arrays:
        header, numbers = _table(file)
        headers.append(header)
        if headers[0] != header:
            raise ValueError(f"{file} has the columns {header}, and the tables before it {headers[0]}: give all the same")
        context = [i for i, column in enumerate(header) if column.startswith(_CONTEXT)]
        labels = [i for i, column in enumerate(header) if column == _LABEL]
        entries = [i for i in range(numbers.shape[1]) if i not in (*context, *labels)]
        classes = None
        if labels:
            classes = numbers[:, labels[0]]
            if np.any(classes != np.round(classes)):
                raise ValueError(f"the column {_LABEL} of {file} must hold whole numbers, got {classes[classes % 1 > 0][0]:g}")
            classes = classes.astype(np.int64)
        return Arrays(numbers[:, entries], classes, numbers[:, context] if context else None)

    arrays = _by_split(path, ".csv", read)
    named = [column for column in headers[0] if column != _LABEL and not column.startswith(_CONTEXT)]
    return from_arrays(name, arrays, fractions=fractions, column_names=named)


def load_npz(arrays: dict[str, np.ndarray], path: Path, name: str, fractions: tuple[float, float]) -> DataSet:
    """The data set of arrays ``x``, ``y`` and ``context`` of an ``.npz`` file, or ``x_train``, ``y_train`` and so on.

    Raises:
        ValueError: If it has neither, or they do not make up a data set.
    """
    if "x" in arrays:
        return from_arrays(name, Arrays(arrays["x"], arrays.get("y"), arrays.get("context")), fractions=fractions)
    parts = {
        split: Arrays(arrays[f"x_{split}"], arrays.get(f"y_{split}"), arrays.get(f"context_{split}"))
        for split in SPLITS
        if f"x_{split}" in arrays
    }
    return from_arrays(name, _with_validation(parts, path), fractions=fractions)


def _by_split(path: Path, ending: str, read: Callable[[Path], Arrays]) -> Arrays | dict[str, Arrays]:
    if path.is_dir():
        files = {split: path / f"{split}{ending}" for split in SPLITS}
        return _with_validation({split: read(file) for split, file in files.items() if file.is_file()}, path)
    if not path.is_file():
        raise ValueError(f"the file {path} does not exist: check the path")
    return read(path)


def _with_validation(parts: dict[str, Arrays], path: Path) -> dict[str, Arrays]:
    """The splits with a validation split, carved from the training examples where there is none."""
    if "train" not in parts:
        raise ValueError(f"{path} has no training examples: it needs train, validation and test, or x alone")
    if "validation" in parts:
        return parts
    train = parts["train"]
    chosen = validation_mask(len(train.x))
    return {**parts, "train": train.take(~chosen), "validation": train.take(chosen)}


def _npy(path: Path) -> np.ndarray:
    try:
        return np.load(path, allow_pickle=False)
    except (EOFError, OSError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not an intact .npy file of a plain array: {error}") from None


def _table(path: Path) -> tuple[list[str], np.ndarray]:
    """The column names, empty without a header, and the numbers of a table."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            lines = [line for line in csv.reader(file) if line]
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8: save it as UTF-8") from None
    if not lines:
        raise ValueError(f"{path} is empty: it needs a row of numbers an example")
    header = [] if all(map(_is_number_or_missing, lines[0])) else [column.strip() for column in lines[0]]
    rows = lines[1:] if header else lines
    for number, row in enumerate(rows, start=1):
        if len(row) != len(lines[0]):
            raise ValueError(f"row {number} of {path} has {len(row)} columns, the first line {len(lines[0])}: complete it")
        for column, text in enumerate(row):
            if not _is_number(text):
                which = f"{column + 1} ({header[column]!r})" if header else column + 1
                problem = (
                    f"holds {text!r}, which is no number"
                    if text.strip() and text.strip().lower() not in _MISSING
                    else "is missing"
                )
                raise ValueError(f"row {number}, column {which} of {path} {problem}: fill it in, or drop the row or column")
    if not rows:
        raise ValueError(f"{path} has a header and no rows: it needs a row of numbers an example")
    return header, np.array(list(itertools.chain.from_iterable(rows)), dtype=np.float64).reshape(len(rows), -1)


_MISSING = ("", "na", "n/a", "nan", "null", "none", "?")


def _is_number(text: str) -> bool:
    try:
        return bool(np.isfinite(float(text)))
    except ValueError:
        return False


def _is_number_or_missing(text: str) -> bool:
    return _is_number(text) or text.strip().lower() in _MISSING
