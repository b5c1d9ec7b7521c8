"""The 8x8 digits embedded in scikit-learn: a real image data set that needs no download.

1797 scans of handwritten digits with 17 grey levels (Alpaydin and Kaynak 1998, the test part of the UCI "optical recognition
of handwritten digits"). There is no customary split, so this file defines one and keeps it fixed for good.
"""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
from jaxtyping import Int, Integer, Num

from iresnet_jax.data.dataset import DataSet
from iresnet_jax.data.splits import by_digest

_SALT = "iresnet_jax/digits"  # part of the definition of the split: changing it invalidates every reported number


def split_indices(labels: Integer[np.ndarray, " n"]) -> dict[str, Int[np.ndarray, " _"]]:
    """Splits examples into 70 % train, 10 % validation and 20 % test, stratified by class.

    Order the examples by ``(label, SHA-256 of "iresnet_jax/digits:<index>")`` and deal them out in tens: positions 0 and 1 of
    every ten go to "test", position 2 to "validation", the rest to "train". Every class is thus divided to within two examples
    of its exact share, and the result depends on no random number generator, so on no version of NumPy.

    Args:
        labels: Class of each example, in the order of the source.

    Returns:
        Ascending indices of each split; together they hold every index once.
    """
    order = by_digest(len(labels), _SALT)
    dealt = order[np.argsort(labels[order], kind="stable")]
    place = np.arange(len(labels)) % 10
    chosen = {"train": place > 2, "validation": place == 2, "test": place < 2}
    return {split: np.sort(dealt[mask]) for split, mask in chosen.items()}


def load() -> DataSet:
    """Loads the digits: 1257 train, 180 validation and 360 test images with levels 0 to 16.

    Example::

        data = load()
        data.examples["test"].shape  # (360, 8, 8, 1)
    """
    table = _table()
    images, labels = table[:, :-1].reshape(-1, 8, 8, 1).astype(np.uint8), table[:, -1].astype(np.int32)
    splits = split_indices(labels)
    return DataSet.from_arrays(
        "digits",
        {split: images[indices] for split, indices in splits.items()},
        {split: labels[indices] for split, indices in splits.items()},
        num_levels=17,
        num_classes=10,
    )


def _table() -> Num[np.ndarray, "n 65"]:
    """Pixels and class of every digit, from scikit-learn's file without importing scikit-learn, which takes half a second."""
    package = find_spec("sklearn")
    file = Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz" if package and package.origin else None
    if file is not None and file.is_file():
        return np.loadtxt(file, delimiter=",")
    from sklearn.datasets import load_digits  # which knows where another version keeps it

    pixels, labels = load_digits(return_X_y=True)
    return np.column_stack([np.asarray(pixels), np.asarray(labels)])
