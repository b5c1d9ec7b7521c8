"""Densities of tables that take no training, in NumPy and scikit-learn, by the units of tables.py.

A column has one distribution: smoothed shares of levels, or shares of values mixed with a kernel
density. "independent" multiplies these; "copula" and "copula mixture" add a normal distribution or
a mixture of normals of the columns' normal scores; "normal" and "mixture" are such densities of the
columns themselves, with noise in the cells.

**Cells.** Values on a grid, and values that repeat, own cells that end half-way to their
neighbours. A value that many rows have is an atom: its cell is wider on the line on which densities
are, so that it is as dense there as the other numbers are.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.special import logsumexp, ndtr, ndtri
from sklearn.covariance import LedoitWolf
from sklearn.mixture import GaussianMixture

LOG_2PI = math.log(2 * math.pi)
EPS = float(np.finfo(np.float32).eps)  # numbers are those that float32 holds
FINEST_GRID = 2.0**-17  # least spacing of a grid, relative to the largest number
MOST_VALUES, MOST_ATOMS = 1024, 8
BANDWIDTHS, SHARES = (0.05, 0.1, 0.2, 0.4, 0.8), (0.0, 0.3, 0.7, 0.95)
WIDE, WIDE_SHARE = 5.0, 0.01  # standard deviations of a normal in each kernel density
COMPONENTS = (1, 2, 3, 4, 6, 8, 12, 16)
FOLDS, VALIDATED = 5, 1500  # most rows that choose a density


class Places(NamedTuple):
    """Cells of numbers on the line: start, width (0 of continuous ones) and the width that counts
    as 1 in the likelihood.
    """

    start: np.ndarray
    width: np.ndarray
    unit: np.ndarray

    def take(self, rows: np.ndarray) -> "Places":
        """Some of the rows."""
        return Places(*(part[rows] for part in self))

    def column(self, place: int) -> "Places":
        """One of the columns."""
        return Places(*(part[:, place] for part in self))

    def point(self, rng: np.random.Generator) -> np.ndarray:
        """A random point of each cell."""
        return self.start + self.width * rng.uniform(size=self.start.shape)

    @property
    def log_units(self) -> np.ndarray:
        """Sum over columns of the logarithms of the widths in their units."""
        has = self.width > 0
        return np.where(has, np.log(np.where(has, self.width / self.unit, 1)), 0).sum(axis=1)


class Kind(NamedTuple):
    """How the values of a column count.

    Attributes:
        levels: All levels of text or booleans; None of numbers, which must be those of float32.
        knots: Rising values that own cells, the last two of which go on as a grid; empty if the
            column is continuous.
        atoms: Values that many rows have.
        wider: Width by which the cell of each atom is wider on the line.
    """

    levels: tuple | None
    knots: np.ndarray
    atoms: np.ndarray
    wider: np.ndarray

    @classmethod
    def of(cls, series) -> "Kind":
        """The kind of a column of a data frame."""
        none = np.empty(0)
        if series.dtype.kind not in "iuf":
            return cls(tuple(sorted(set(series))), np.array([0.0, 1.0]), none, none)
        x = series.to_numpy(np.float32).astype(np.float64)
        knots = _knots(x)
        return cls(None, knots, *_atoms(x, knots))

    @property
    def is_whole(self) -> bool:
        """Whether a value counts as a probability, not one by the width of its cell."""
        return bool(np.all(self.knots == np.rint(self.knots)))

    def numbers(self, series) -> np.ndarray:
        """Values as numbers, levels as their places; -1 of unknown ones."""
        if self.levels is None:
            return series.to_numpy(np.float32).astype(np.float64)
        places = {level: place for place, level in enumerate(self.levels)}
        return np.array([places.get(value, -1) for value in series], float)

    def nearest(self, x: np.ndarray) -> np.ndarray:
        """The values in whose cells numbers lie."""
        return self._values(x)[1]

    def places(self, x: np.ndarray) -> Places:
        """The cells of numbers."""
        number, value, below, above = self._values(x)
        is_atom = number[:, None] == (of_atoms := self._values(self.atoms)[0])
        shift = ((of_atoms < number[:, None]) * self.wider).sum(axis=1)
        width = below + above + (is_atom * self.wider).sum(axis=1)
        return Places(
            value - below + shift, width, np.ones_like(x) if self.is_whole else below + above
        )

    def _values(self, x):
        """Number and value of the cell of each entry, and half the gaps below and above it."""
        if not len(self.knots):
            return x, x, np.zeros_like(x), np.zeros_like(x)
        knots, gaps = self.knots[:-1], np.diff(self.knots)
        last = len(gaps) - 1
        knot = np.clip(np.searchsorted(knots, x, side="right") - 1, 0, last)
        number = knot + np.floor((x - knots[knot]) / gaps[knot] + 0.5)
        knot = np.clip(number, 0, last).astype(int)
        below = gaps[np.clip(number - 1, 0, last).astype(int)]
        return number, knots[knot] + (number - knot) * gaps[knot], below / 2, gaps[knot] / 2


def _knots(x):
    """Two values of a grid, all values if they repeat, otherwise none."""
    values, counts = np.unique(x, return_counts=True)
    largest = np.abs(values).max()
    if len(values) == 1:
        return np.array([values[0], values[0] + max(1.0, largest)])
    scale = 10.0 ** max(math.floor(-math.log10(FINEST_GRID * largest)), 0)
    multiples, whole = values * scale, np.rint(values * scale)
    close = np.minimum(EPS * np.abs(multiples), 2.0**-6)
    if np.all(np.abs(multiples - whole) <= close) and np.abs(whole).max() < 2**53:
        spacing = float(np.gcd.reduce(np.diff(whole).astype(np.int64))) / scale
        on_grid = np.array([values[0], values[0] + spacing])
        return on_grid if spacing > EPS * largest else np.empty(0)
    rare = counts[counts < _often(len(x))]
    repeat = 1.5 * len(rare) <= rare.sum() or 2 * len(rare) <= len(values)
    return values if repeat and len(values) <= MOST_VALUES else np.empty(0)


def _often(num):
    return max(10, 0.005 * num)


def _atoms(x, knots):
    """Values that at least 10 rows and .5 % of them have, and how much wider their cells are."""
    values, counts = np.unique(x, return_counts=True)
    spacing, chosen, wider = np.diff(knots).min() if len(knots) else 0.0, [], np.empty(0)
    for place in np.argsort(-counts, kind="stable")[: min(MOST_ATOMS, len(values) - 1)]:
        those = [*chosen, place]
        others = np.repeat(np.delete(values, those), np.delete(counts, those))
        length = (np.quantile(others, 0.95) - np.quantile(others, 0.05)) / 0.9 + spacing
        widths = length * np.minimum(counts[those] / len(others), 100)
        if counts[place] < _often(len(x)) or widths[-1] <= 8 * spacing:
            break
        chosen, wider = those, widths
    return values[chosen], wider


def places_of(frame, kinds: Sequence[Kind]) -> Places:
    """Cells of all columns of a data frame."""
    columns = [
        kind.places(kind.numbers(frame[name])) for name, kind in zip(frame, kinds, strict=True)
    ]
    return Places(*(np.stack(part, axis=1) for part in zip(*columns, strict=True)))


class Marginal:
    """Distribution of one column, from the places of its training rows."""

    def __init__(self, train: Places, num_levels: int, rng: np.random.Generator):
        self.num_levels, self.train = num_levels, train
        if num_levels:
            counts = np.bincount(self._level(train), minlength=num_levels)
            self.shares = (counts + 0.5) / (counts.sum() + 0.5 * num_levels)
            return
        middle = train.start + train.width / 2
        self.std = float(np.std(middle)) or 1.0
        iqr = np.subtract(*np.quantile(middle, [0.75, 0.25])) / 1.35
        scale = min(self.std, iqr) if iqr > 0 else self.std
        rows, total = rng.permutation(len(middle)), {}
        shares = SHARES if (train.width > 0).any() else SHARES[:1]
        for fold in np.array_split(rows, FOLDS):
            others, held_out = train.take(np.setdiff1d(rows, fold)), train.take(fold)
            seen = self._seen(others, held_out)
            for bandwidth in BANDWIDTHS:
                kernel = self._kernel(others, held_out, bandwidth * scale + 1e-12 * self.std)
                for share in shares:
                    mass = np.log(np.maximum(share * seen + (1 - share) * kernel, 1e-300)).sum()
                    total[bandwidth, share] = total.get((bandwidth, share), 0) + mass
        bandwidth, self.share = max(total, key=total.__getitem__)
        self.bandwidth = bandwidth * scale + 1e-12 * self.std

    @staticmethod
    def _level(places):
        return np.rint(places.start + 0.5).astype(int)

    @staticmethod
    def _seen(train, places):
        """Shares of training rows with cells that have the same one."""
        before, here = _shares(train, places)
        return here - before

    def _kernel(self, train, places, bandwidth):
        """Kernel density: the mass of a cell, or the density where it has no width."""
        end = places.start + places.width
        middle, wide = train.start + train.width / 2, WIDE * self.std
        z = (places.start + places.width / 2)[:, None] - middle
        log_pdf = np.asarray(logsumexp(-0.5 * (z / bandwidth) ** 2, axis=1)) - 0.5 * LOG_2PI
        pdf = (1 - WIDE_SHARE) * np.exp(log_pdf) / (len(middle) * bandwidth)
        z = (places.start + places.width / 2 - np.median(middle)) / wide
        pdf += WIDE_SHARE * np.exp(-0.5 * z**2 - 0.5 * LOG_2PI) / wide
        found = pdf * np.where(places.width > 0, places.width, 1)
        broad = places.width > bandwidth / 2
        found[broad] = np.subtract(
            *(self._cdf(middle, ends[broad], bandwidth) for ends in (end, places.start))
        )
        return found

    def _cdf(self, middle, x, bandwidth):
        found = (1 - WIDE_SHARE) * ndtr((x[:, None] - middle) / bandwidth).mean(axis=1)
        return found + WIDE_SHARE * ndtr((x - np.median(middle)) / (WIDE * self.std))

    def log_prob(self, places: Places) -> np.ndarray:
        """Log-likelihood by unit."""
        if self.num_levels:
            return np.log(self.shares[self._level(places)])
        kernel = self._kernel(self.train, places, self.bandwidth)
        found = self.share * self._seen(self.train, places) + (1 - self.share) * kernel
        return np.log(np.maximum(found, 1e-300)) - np.where(
            places.width > 0, np.log(places.unit), 0
        )

    def score(self, places: Places, noise: np.ndarray) -> np.ndarray:
        """Normal scores, uniform on the range of the distribution function within a cell."""
        if self.num_levels:
            level = self._level(places)
            high = np.cumsum(self.shares)[level]
            low = high - self.shares[level]
        else:
            middle = self.train.start + self.train.width / 2
            ends = (
                self._cdf(middle, x, self.bandwidth)
                for x in (places.start, places.start + places.width)
            )
            low, high = (
                self.share * seen + (1 - self.share) * end
                for seen, end in zip(_shares(self.train, places), ends, strict=True)
            )
        return ndtri(np.clip(low + noise * (high - low), 1e-9, 1 - 1e-9))


def _shares(train, places):
    """Shares of the training rows with cells whose cells are below, and not above, each cell."""
    cells = np.sort(train.start[train.width > 0])
    tolerance = 1e-9 * np.maximum(1, np.abs(places.start))
    before = np.searchsorted(cells, places.start - tolerance)
    here = np.searchsorted(cells, places.start + tolerance)
    here = np.where(places.width > 0, here, before)
    return before / max(len(cells), 1), here / max(len(cells), 1)


def log_probs(
    train: Places, test: Places, kinds: Sequence[Kind], *, draws: int, seed: int = 0
) -> dict[str, np.ndarray]:
    """Log-likelihood of each test row under the five densities of the training rows.

    Args:
        train: Training rows.
        test: Test rows.
        kinds: Kinds of the columns.
        draws: Draws of the noise in cells, over which log-likelihoods are averaged.
        seed: Seed of all noise.
    """
    rng, num_columns = np.random.default_rng(seed), len(kinds)
    marginals = [
        Marginal(train.column(place), len(kind.levels or ()), rng)
        for place, kind in enumerate(kinds)
    ]
    independent = sum(each.log_prob(test.column(place)) for place, each in enumerate(marginals))

    def scores(places, seed):
        noise = np.random.default_rng(seed).uniform(size=places.start.shape)
        return np.stack(
            [
                each.score(places.column(place), noise[:, place])
                for place, each in enumerate(marginals)
            ],
            axis=1,
        )

    of_scores = scores(train, 1)
    copulas = LedoitWolf(assume_centered=True).fit(of_scores), mixture(of_scores)
    points = train.point(rng)
    mean, std = points.mean(axis=0), points.std(axis=0)
    std = np.where(std > 0, std, 1)
    points = (points - mean) / std
    densities = LedoitWolf().fit(points), mixture(points)
    found = {name: [] for name in ("copula", "copula mixture", "normal", "mixture")}
    for draw in range(draws):
        z = scores(test, 100 + draw)
        base = independent + 0.5 * (z**2).sum(axis=1) + 0.5 * num_columns * LOG_2PI
        found["copula"].append(base + normal_log_prob(copulas[0], z))
        found["copula mixture"].append(base + copulas[1].score_samples(z))
        z = (test.point(np.random.default_rng(200 + draw)) - mean) / std
        ratio = test.log_units - np.log(std).sum()
        found["normal"].append(ratio + normal_log_prob(densities[0], z))
        found["mixture"].append(ratio + densities[1].score_samples(z))
    means = {name: np.mean(of_draws, axis=0) for name, of_draws in found.items()}
    return {"independent": np.asarray(independent), **means}


def choose(train: Places, kinds: Sequence[Kind]) -> str:
    """The density that is likeliest in a cross-validation on the training rows."""
    rows, total = np.random.default_rng(3).permutation(len(train.start))[:VALIDATED], {}
    for fold in np.array_split(rows, FOLDS):
        others = train.take(np.setdiff1d(rows, fold))
        for name, values in log_probs(others, train.take(fold), kinds, draws=2).items():
            total[name] = total.get(name, 0.0) + values.sum()
    return max(total, key=total.__getitem__)


def normal_log_prob(fitted: LedoitWolf, z: np.ndarray) -> np.ndarray:
    """Log-density of a normal distribution with a shrunk covariance."""
    centered, precision = z - fitted.location_, np.asarray(fitted.precision_)
    squares = np.einsum("ij,jk,ik->i", centered, precision, centered)
    log_det = np.linalg.slogdet(precision)[1]
    return 0.5 * (log_det - squares - z.shape[1] * LOG_2PI)


def mixture(z: np.ndarray) -> GaussianMixture:
    """The mixture of normals with the best BIC."""
    num, dim = z.shape
    best, lowest = None, math.inf
    for covariance in ("full", "diag"):
        for components in COMPONENTS:
            many = covariance == "full" and components * dim * (dim + 1) / 2 > 4 * num
            if components > 1 and (many or components * 5 > num):
                continue
            fitted = GaussianMixture(
                components, covariance_type=covariance, reg_covar=1e-4, random_state=0
            ).fit(z)
            if (bic := fitted.bic(z)) < lowest:
                best, lowest = fitted, bic
    assert best is not None
    return best
