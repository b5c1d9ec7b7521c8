"""Where examples come from: `load` returns images and toys by name as a `DataSet`.

======================  ===========================================================================
``digits``              8x8 images embedded in scikit-learn
``moons`` ``rings``     2-D toy densities, listed in `toys`
``mnist`` ``cifar10``   any image classification data set of TensorFlow Datasets by its name
                        there, such as ``downsampled_imagenet/32x32`` or ``mnist:3.0.1``;
                        downloaded once if TensorFlow is installed
``idx:FOLDER``          IDX files as MNIST is published, ``train-images-idx3-ubyte.gz`` etc.
``cifar:FOLDER``        the binary version of CIFAR-10 or CIFAR-100, from its unpacked archive
``npz:FILE``            arrays ``x_train``, ``y_train``, ``x_test``, ``y_test``, or ``x`` alone,
                        to be split; images of 8 bits or floats, with contexts
                        ``context_train`` or ``context``
``npy:PATH`` ``csv:``   vectors, and as ``npy:`` images of floats or integer levels, from one file
                        to be split, or from a folder with ``train.npy``, ``validation.npy``,
                        ``test.npy``; ``train_labels.npy``, ``train_context.npy`` and so on belong
                        to them, and in a table the columns ``label`` and ``context...``
``folder:FOLDER``       image files ``train/CLASS/NAME.png``, ``test/CLASS/NAME.png``
======================  ===========================================================================

Pixels stay integers until the model dequantises them, so ``num_levels`` and bits per dimension
always belong together. Images of TFDS and image files are decoded once (`images.decoded`).
`dataset` says how the validation split is made.
"""

import csv
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from iresnet_jax.data import images
from iresnet_jax.data.arrays import Arrays, from_arrays
from iresnet_jax.data.dataset import SPLITS, DataSet
from iresnet_jax.data.toys import TOYS, Toy
from iresnet_jax.models.columns import Column
from iresnet_jax.storage import path_of

__all__ = ["DataSet", "Toy", "conditioned_on_labels", "load", "padded"]

_Given = Arrays | dict[str, Arrays]


def load(
    name: str, *, fractions: tuple[float, float] = (0.1, 0.1), num_classes: int | None = None
) -> DataSet:
    """Loads a data set or toy by its name.

    Example::

        data = load("digits")
        data.examples["train"].shape  # (1257, 8, 8, 1)
        load("moons").held_out("test", 1000).x.shape  # (1000, 2)
        load("fashion_mnist")  # in $TFDS_DATA_DIR, else ~/tensorflow_datasets
        load("idx:~/mnist")

    Args:
        name: Name as in the table above.
        fractions: Shares for validation and test, for a file whose arrays are not split.
        num_classes: Number of classes of arrays in a file; by default the labels' classes, without
            gaps.
    """
    if name in TOYS:
        return DataSet(name, generator=TOYS[name])
    if name == "digits":
        return images.load_digits()
    kind, colon, path = name.partition(":")
    if colon and kind in _ARRAYS:
        arrays, columns = _ARRAYS[kind](path_of(path))
        return from_arrays(
            name, arrays, fractions=fractions, columns=columns, num_classes=num_classes
        )
    if colon and kind in _IMAGES:
        return _IMAGES[kind](Path(path).expanduser(), name)
    if (found := images.load_tfds(name)) is None:
        raise ValueError(
            f"unknown data set {name!r}: known are the images digits, "
            f"{', '.join(images.CUSTOMARY)} and others of TFDS, the toys {', '.join(TOYS)}, "
            f"and own data as {', '.join(f'{kind}:PATH' for kind in [*_IMAGES, *_ARRAYS])}"
        )
    return found


def conditioned_on_labels(data: DataSet) -> DataSet:
    """The data set with each example's class, as a one-hot vector, for its context."""
    if data.num_classes is None or data.contexts:
        problem = "contexts already" if data.contexts else "no labels"
        raise ValueError(
            f"data.condition_on_labels makes contexts of labels, and {data.name} has "
            f"{problem}: switch it off"
        )
    vectors = np.eye(data.num_classes, dtype=np.float32)
    contexts = {split: vectors[labels] for split, labels in data.labels.items()}
    return dataclasses.replace(data, contexts=contexts)


def padded(data: DataSet, padding: int, copies: int) -> DataSet:
    """The images with ``padding`` pixels of zeros on each side and ``copies`` copies of their
    channels.
    """
    if len(data.event_shape) != 3:
        raise ValueError(f"data.padding and data.copies are for images, which {data.name} has not")
    sides = (0, 0), (padding, padding), (padding, padding), (0, 0)
    examples = {
        split: np.tile(np.pad(images, sides), (1, 1, 1, copies))
        for split, images in data.examples.items()
    }
    return dataclasses.replace(data, examples=examples, fingerprint="")


# Arrays in files ----------------------------------------------------------------------------------


def _loaded(path: Path) -> Any:
    """The array of an ``.npy`` file, or the arrays of an ``.npz`` file by name."""
    with path.open("rb") as file:
        found = np.load(file)
        return found if isinstance(found, np.ndarray) else dict(found)


def _read_npz(path: Path) -> tuple[_Given, None]:
    """The arrays ``x``, ``y`` and ``context``, or ``x_train``, ``y_train``, ``context_train`` and
    so on, or ``train_images`` and ``train_labels`` as MedMNIST has them.

    Labels and contexts may be left out. Images may lack the axis of channels.
    """
    arrays = _loaded(path)

    def part(x: str, y: str, context: str) -> Arrays:
        examples = arrays.pop(x)
        examples = examples[..., None] if examples.ndim == 3 else examples
        return Arrays(examples, arrays.pop(y, None), arrays.pop(context, None))

    splits: dict[str, Arrays] = {}
    for name in ("train", "validation", "val", "test"):
        split = "validation" if name == "val" else name
        for x, y in ((f"x_{name}", f"y_{name}"), (f"{name}_images", f"{name}_labels")):
            if x in arrays and split not in splits:
                splits[split] = part(x, y, f"context_{name}")
    read = part("x", "y", "context") if "x" in arrays and not splits else splits
    if arrays:
        raise ValueError(
            f"{path} holds {', '.join(sorted(arrays))}, which nothing reads beside "
            f"{' and '.join(splits) or 'x'}: leave it out, or call it x, y and context, or "
            "x_train, y_train, context_train, x_validation, x_test and so on"
        )
    return read, None


def _read_npy(path: Path) -> tuple[_Given, None]:
    def read(file: Path) -> Arrays:
        beside = {kind: file.with_name(f"{file.stem}_{kind}.npy") for kind in ("labels", "context")}
        others = {kind: _loaded(other) for kind, other in beside.items() if other.is_file()}
        return Arrays(_loaded(file), **others)

    return _by_split(path, ".npy", read, beside=("_labels", "_context")), None


def _read_csv(path: Path) -> tuple[_Given, tuple[Column, ...] | None]:
    headers = []

    def read(file: Path) -> Arrays:
        header, numbers = _read_table(file)
        headers.append(header)
        if headers[0] != header:
            raise ValueError(
                f"{file} has the columns {header}, and the tables before it {headers[0]}: give all "
                "the same"
            )
        contexts = [column.startswith("context") for column in header]
        labels = [column == "label" for column in header]
        if not header:
            return Arrays(numbers)
        x = numbers[:, ~np.logical_or(contexts, labels)]
        classes = numbers[:, labels].ravel() if any(labels) else None
        if classes is not None and np.all(classes % 1 == 0):
            classes = classes.astype(np.int64)
        return Arrays(x, classes, numbers[:, contexts] if any(contexts) else None)

    arrays = _by_split(path, ".csv", read)
    names = [n for n in (headers or [[]])[0] if n != "label" and not n.startswith("context")]
    return arrays, tuple(Column(name, "float64") for name in names) or None


def _by_split(
    path: Path, ending: str, read: Callable[[Path], Arrays], beside: tuple[str, ...] = ()
) -> _Given:
    """The content of a file, or of the files of a folder by split."""
    if not path.is_dir():
        return read(path)
    known = [split + end for split in SPLITS for end in ("", *beside)]
    if other := sorted({each.stem for each in path.glob(f"[!.]*{ending}")} - {*known}):
        raise ValueError(
            f"{path} holds {other[0]}{ending}, which nothing reads: call it one of "
            f"{', '.join(known)}, or move it elsewhere"
        )
    files = {split: path / f"{split}{ending}" for split in SPLITS}
    return {split: read(file) for split, file in files.items() if file.is_file()}


def _read_table(path: Path) -> tuple[list[str], np.ndarray]:
    """The column names, empty without a header, and the numbers of a table."""
    with path.open(encoding="utf-8-sig") as file:
        lines = [line for line in file.read().splitlines() if line]
    first = [cell.strip() for cell in next(csv.reader(lines[:1]), [])]
    numbers = [cell for cell in first if _is_number(cell)]
    # A fraction is no name: NumPy names the cell beside it that is no number.
    is_data = len(numbers) == len(first) or not all(map(str.isdigit, numbers))
    header = [] if is_data else first
    if len(first) > 1 and first == [str(i) for i in range(len(first))]:
        raise ValueError(
            f"the first line of {path} numbers the columns, as the header that pandas writes for "
            "an array: write it with header=False, or name the columns; a row of data with these "
            "numbers can stand further down"
        )
    if len(set(header)) < len(header) or "" in header:
        raise ValueError(
            f"{path} has the columns {header}: give each a name of its own; pandas writes row "
            "numbers, which have none, unless index=False"
        )
    rows = lines[1:] if header else lines
    return header, np.loadtxt(rows, delimiter=",", quotechar='"', comments=None, ndmin=2)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


_IMAGES = {"idx": images.load_idx, "cifar": images.load_cifar, "folder": images.load_folder}
_ARRAYS = {"npz": _read_npz, "npy": _read_npy, "csv": _read_csv}
