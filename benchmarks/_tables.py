"""Data sets of vectors for the comparison of densities, as arrays that all models share.

Every data set is drawn anew for each seed, and is then the same for all models: split,
dequantisation noise and all.

"patches": 8 x 8 grey pixels from scikit-learn's two photographs. A photograph is cut into 70 tiles
of 61 x 64 pixels; four fifths of the tiles train, a tenth validates, a tenth tests, and patches lie
within a tile, so that no pixel is in two splits. Grey levels are whole numbers; each patch gets
uniform noise of one level and is divided by 256, its mean is subtracted, and the last pixel, which
the others determine, is left out: 63 dimensions (as BSDS300 in Papamakarios et al. 2017). Test
patches are in the order of their places, as neighbours resemble each other and errors have to be
taken over groups of them.

"breast_cancer", "wine", "diabetes": the features of scikit-learn's tables, 70 % of the rows to
train and 15 % each to validate and to test. Their numbers are rounded, some to a few values such as
sex and age: each column gets uniform noise of the width of the grid that most of its values lie on,
see `grid_width`. Column s5 of diabetes is the logarithm of a whole number; that number gets the
noise.

"ridges": 6 dimensions with a known density, see `Ridges`.

"spiral_1500" and the like: so many rows of an array of known density, see `_synthetic`, a tenth of
which validate.

"bsds300": 63 dimensions, the benchmark of the literature from a folder of its three splits, see
`configs/bsds300.py`. The first examples of the other splits validate and test; a seed draws
nothing.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from _synthetic import SYNTHETIC
from scipy.stats import norm
from sklearn import datasets

SIDE, TILE = 8, (61, 64)  # pixels
ON_GRID = 0.8  # share of a column's values that a grid must hold
LOGARITHMS = {"diabetes": [8]}  # columns that are logarithms of whole numbers


# examples of the sets that there is no end of
PATCHES = {"train": 100_000, "validation": 10_000, "test": 10_000}
RIDGES = {"train": 20_000, "validation": 5_000, "test": 10_000}
BSDS300 = {"train": 1_000_000, "validation": 10_000, "test": 20_000}  # at most
SYNTHETIC_TEST = 10_000
QUICK = {"train": 3_000, "validation": 400, "test": 400}


class Table(NamedTuple):
    """A data set, standardised by the mean and standard deviation of its training examples.

    Attributes:
        train: Training examples, float32.
        validation: Examples for hyper-parameters and early stopping.
        test: Examples for the number that is reported.
        log_det: Log-determinant of the standardisation: added to a log-density, it gives nats in
            the data's own units.
        true_log_prob: Log-density of the test examples in the data's own units, where it is known.
        bounds: Ends of columns of `raw` that are known.
        raw: Training, validation and test examples as they were drawn, before noise on columns of
            whole numbers; None without.
    """

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray
    log_det: float
    true_log_prob: np.ndarray | None = None
    raw: tuple[np.ndarray, ...] | None = None
    bounds: Mapping[int, tuple[float, float]] | None = None


class Ridges:
    """A chain of six numbers, each on one of two ridges that wind around the one before, turned as
    a whole.

    ``u_1 ~ N(0, 1)`` and ``u_{i+1} = 1.5 sin(2 u_i) + b_i + .3 exp(.5 cos(3 u_i)) z_i`` with ``b_i
    = -1, 1`` by equal chances and normal ``z_i``; ``x = Q u`` for a fixed rotation ``Q``, which
    leaves the density as it is.
    """

    dims = 6
    rotation = np.linalg.qr(np.random.default_rng(6).normal(size=(6, 6)))[0]

    @classmethod
    def sample(cls, rng, num):
        """Draws examples."""
        u = np.empty((num, cls.dims))
        u[:, 0] = rng.normal(size=num)
        for i in range(1, cls.dims):
            mean, scale = cls._ridge(u[:, i - 1])
            u[:, i] = mean + rng.choice([-1.0, 1.0], size=num) + scale * rng.normal(size=num)
        return u @ cls.rotation.T

    @classmethod
    def log_prob(cls, x):
        """The log-density."""
        u = x @ cls.rotation
        total = norm.logpdf(u[:, 0])
        for i in range(1, cls.dims):
            mean, scale = cls._ridge(u[:, i - 1])
            sides = [norm.logpdf((u[:, i] - mean - side) / scale) for side in (-1.0, 1.0)]
            total += np.logaddexp(*sides) - np.log(2 * scale)
        return total

    @staticmethod
    def _ridge(before):
        return 1.5 * np.sin(2 * before), 0.3 * np.exp(0.5 * np.cos(3 * before))


def load(name: str, seed: int, *, quick: bool, bsds300: Path | None = None) -> Table:
    """The data set of a seed, which chooses split, noise and what is drawn; quick ones have fewer
    patches and ridges.

    Args:
        name: One of `NAMES`.
        seed: The seed.
        quick: Whether few examples do.
        bsds300: Folder of "bsds300".
    """
    rng = np.random.default_rng([NAMES.index(name), seed])
    if name == "patches":
        luma = [
            np.round(image @ [0.299, 0.587, 0.114])
            for image in datasets.load_sample_images().images
        ]  # whole levels
        levels = cut(luma, rng, QUICK if quick else PATCHES)
        return standardized(*(centred(part, rng) for part in levels))
    if name == "ridges":
        drawn = [Ridges.sample(rng, num) for num in (QUICK if quick else RIDGES).values()]
        return standardized(*drawn)._replace(true_log_prob=Ridges.log_prob(drawn[2]))
    if name == "bsds300":
        assert bsds300 is not None
        sizes = QUICK if quick else BSDS300
        return standardized(
            *(
                np.load(bsds300 / f"{split}.npy", mmap_mode="r")[:most]
                for split, most in sizes.items()
            )
        )
    if name not in TABLES:
        kind, size = name.rsplit("_", 1)
        return _synthetic(kind, int(size), rng)
    x = getattr(datasets, f"load_{name}")(**{"scaled": False} if name == "diabetes" else {}).data
    x = rng.permutation(dequantized(x, rng, LOGARITHMS.get(name, [])))
    return standardized(*np.split(x, [round(0.7 * len(x)), round(0.85 * len(x))]))


TABLES = ("breast_cancer", "wine", "diabetes")
NUM_ROWS = (200, 1500, 20_000)  # of arrays of known density
NAMES = (
    "patches",
    *TABLES,
    "ridges",
    *(f"{kind}_{size}" for size in NUM_ROWS for kind in SYNTHETIC),
    "bsds300",
)


def _synthetic(kind: str, num: int, rng: np.random.Generator) -> Table:
    """Rows of an array of known density; columns of whole numbers get uniform noise of width 1."""
    array = SYNTHETIC[kind]
    drawn = array.sample(rng, num + SYNTHETIC_TEST)
    raw = tuple(np.split(drawn, [num - num // 10, num]))
    noise = np.zeros(drawn.shape)
    noise[:, array.discrete] = rng.random((len(drawn), len(array.discrete))) - 0.5
    table = standardized(*np.split(drawn + noise, [num - num // 10, num]))
    table = table._replace(true_log_prob=array.log_prob(raw[2]))
    return table._replace(raw=raw, bounds=array.bounds) if array.discrete else table


def standardized(train: np.ndarray, validation: np.ndarray, test: np.ndarray) -> Table:
    """Splits with the scale of the training examples taken out."""
    mean, std = train.mean(axis=0), train.std(axis=0)
    parts = [((part - mean) / std).astype(np.float32) for part in (train, validation, test)]
    return Table(*parts, log_det=-float(np.log(std).sum()))


def cut(
    images: Sequence[np.ndarray], rng: np.random.Generator, sizes: Mapping[str, int]
) -> list[np.ndarray]:
    """Patches ``(n, 64)`` for each split, from tiles of its own; those of the test in the order
    of their places.
    """
    tiles = [
        image[top : top + TILE[0], left : left + TILE[1]]
        for image in images
        for top in range(0, image.shape[0] - TILE[0] + 1, TILE[0])
        for left in range(0, image.shape[1] - TILE[1] + 1, TILE[1])
    ]
    order, tenth, parts = rng.permutation(len(tiles)), len(tiles) // 10, []
    for chosen, num in zip(np.split(order, [-2 * tenth, -tenth]), sizes.values(), strict=True):
        windows = [
            np.lib.stride_tricks.sliding_window_view(tiles[place], (SIDE, SIDE)) for place in chosen
        ]
        found = np.concatenate([window.reshape(-1, SIDE * SIDE) for window in windows])
        is_test = len(parts) == 2
        places = (
            np.sort(rng.choice(len(found), num, replace=False))
            if is_test
            else rng.permutation(len(found))[:num]
        )
        parts.append(found[places])
    return parts


def centred(levels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Patches of continuous grey between 0 and 1 less their mean, without the last pixel."""
    grey = (levels + rng.random(levels.shape)) / 256
    return (grey - grey.mean(axis=1, keepdims=True))[:, :-1]


def dequantized(x: np.ndarray, rng: np.random.Generator, logarithms: Sequence[int]) -> np.ndarray:
    """A table whose columns have noise of the width of their grid."""
    x = np.array(x, np.float64)
    x[:, logarithms] = np.round(np.exp(x[:, logarithms]))
    x += [grid_width(column) for column in x.T] * (rng.random(x.shape) - 0.5)
    x[:, logarithms] = np.log(x[:, logarithms])
    return x


def grid_width(values: np.ndarray) -> float:
    """The widest of the steps 1, 2 and 5 times powers of ten whose multiples are at least 80 %
    of the values.
    """
    for step in (digit * 10.0**power for power in range(3, -9, -1) for digit in (5, 2, 1)):
        multiples = values / step
        if (
            step < np.ptp(values) * 2
            and np.mean(np.abs(multiples - np.round(multiples)) < 1e-3) >= ON_GRID
        ):
            return step
    raise ValueError("the values lie on no decimal grid")
