"""What the columns of a table hold: levels, numbers on a grid, continuous numbers, atoms; their
ends and heavy tails; and the distribution of each column by itself.

`describe` finds out once what all rows say. `fit_marginals` fits the map of every column to normal
scores, see `iresnet_jax.bijections.marginals`: shares of levels, or shares of repeated numbers
mixed with a kernel density, whose weights, widths and line are chosen by cross-validation. Or it
keeps columns on lines, where that is possible. NumPy computes all of it, in float64.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import scipy.stats
from jaxtyping import Float
from scipy.special import ndtr, ndtri

from iresnet_jax.bijections.bounded import Bounded
from iresnet_jax.bijections.marginals import Marginals
from iresnet_jax.models.columns import listed

FINEST_GRID = 2.0**-17  # least spacing of a grid (64 floats), relative to the largest number
MOST_CODES, EACH_CODE = 16, 5  # numbers that are levels: so many, in so many rows each
NUM_FOLDS, MOST_ROWS, MOST_TESTED = 5, 10_000, 80  # of rows that choose a column's smoothing
MOST_KERNELS = 200, 2000  # kernels while it is chosen, and afterwards
WIDTHS = (0.03, 0.07, 0.15, 0.3, 0.5, 0.9)  # of kernels, in units of the column's scale
WEIGHTS = (0.0, 0.3, 0.7, 0.9, 0.97)  # of repeated numbers beside the kernel density
MOST_HEAPS = 1024  # repeated numbers that knots stand around
# Weight of a broad normal distribution, of all columns together, which bounds the slope of scores;
# and how far kernels reach beyond the numbers, in units of their range.
BROAD, BEYOND = 0.003, 0.08
SPIKE = 0.05  # least share of a number whose mass is its share alone
FARTHEST = 9.0  # score of an end that no number is beyond
SCORES = np.linspace(-3.6, 3.6, 73)  # of knots
GAIN = 3.0  # nats by which levels must be likelier given those of another column

Rows = Float[np.ndarray, "_ d"]
Numbers = Float[np.ndarray, " _"]


class Kind(NamedTuple):
    """What one column holds.

    Attributes:
        values: See `values_of`.
        atoms: Values that many rows of a continuous column have.
        levels: Its levels if no other values exist; empty for numbers.
        low: End that the user gave, the first level, or 0 if no number is negative; minus infinity
            without any.
        high: End that the user gave, or the last level; infinite without any.
        is_given: Whether the user gave one.
        center, scale: See `Bounded`, of the line between given ends or of heavy tails.
        is_line: Whether the column can be a line: if no value but those of a grid has a mass of its
            own, and if continuous numbers are not negative only where a normal distribution of them
            would be, too.
    """

    values: Sequence[float]
    atoms: Sequence[float]
    levels: Sequence[float]
    low: float
    high: float
    is_given: bool
    center: float
    scale: float
    is_line: bool

    @property
    def spacing(self) -> float:
        """Distance of the numbers of a grid; 0 without one."""
        return 0.0 if len(self.values) != 2 else self.values[1] - self.values[0]

    @property
    def unit(self) -> float:
        """Unit of the likelihood of numbers on a grid: 1 for whole ones."""
        is_whole = all(value == round(value) for value in self.values)
        return 1.0 if is_whole or not self.spacing else self.spacing

    def cells(self, numbers: Numbers) -> tuple[Numbers, Numbers]:
        """Ends of the cells of numbers, which are equal for a continuous column; on a grid one
        float is the end of both its neighbours.
        """
        if not len(self.values):
            return numbers, numbers
        if self.spacing:
            place, first = np.rint((numbers - self.values[0]) / self.spacing), self.values[0]
            return first + (place - 0.5) * self.spacing, first + (place + 0.5) * self.spacing
        middles = np.convolve(self.values, [0.5, 0.5], "valid")
        place = np.searchsorted(middles, numbers)
        return np.append(-np.inf, middles)[place], np.append(middles, np.inf)[place]

    @property
    def grid(self) -> dict[str, Any]:
        """The numbers that exist, see `Marginals`."""
        column = {"least": self.low, "most": self.high, "spacing": self.spacing}
        column["origin"] = self.values[0] if self.spacing else 0
        return column | {"unit": math.log(self.unit)}

    def line(self, num: int) -> dict[str, Any]:
        """The flat column, see `Marginals`, with a reserved mass of ``1 / (num + 1)``."""
        rare = -np.inf if self.is_given else -math.log(num + 1)
        column = {"flat": 1, "center": self.center, "scale": self.scale, "reserved": [[0, rare]]}
        ends = {"low": self.low - self.spacing / 2, "high": self.high + self.spacing / 2}
        return column | self.grid | (ends if self.is_given else {})


def _kind(
    numbers: Numbers, eps: float, num_levels: int, low: float, high: float, *, has_tails: bool
) -> Kind:
    distinct, counts = np.unique(numbers, return_counts=True)
    if num_levels:
        levels = np.arange(num_levels, dtype=float).tolist()
        varies = len(distinct) > 1
        return Kind(
            (0.0, 1.0), [], levels, low, high, is_given=False, center=0.0, scale=0.0, is_line=varies
        )
    values = values_of(numbers, eps)
    atoms = atoms_of(numbers, values)
    are_codes = len(distinct) <= MOST_CODES and counts.min() >= EACH_CODE and len(values)
    levels = distinct.tolist() if are_codes or len(distinct) <= 2 else []
    is_given = bool(np.isfinite(low) or np.isfinite(high))
    is_positive = numbers.min() >= 0 and not is_given
    center, scale = tails_of(numbers) if has_tails and not is_given else (0.0, 0.0)
    if is_given:
        half = (values[1] - values[0]) / 2 if len(values) == 2 else 0.0
        scale = float(np.median(np.minimum(numbers - low, high - numbers))) + half
    elif levels:
        low, high = levels[0], levels[-1]
    elif is_positive:
        low = 0.0
    is_near_0 = has_tails and is_positive and numbers.mean() < 4 * numbers.std()
    is_grid = len(values) == 2 and len(distinct) > 1
    is_line = not atoms and (is_grid or not (len(values) or is_near_0))
    return Kind(values, atoms, levels, low, high, is_given, center, scale, is_line)


def describe(
    splits: Mapping[str, Rows],
    names: Sequence[Any] = (),
    *,
    levels: Sequence[int] = (),
    bounds: Any = None,
    has_tails: bool = True,
) -> tuple[Kind, ...]:
    """What each column holds.

    Args:
        splits: Rows by split, training rows first.
        names: Names of the columns in bounds and messages; by default their numbers.
        levels: Number of levels of each column, 0 for numbers; empty without booleans and
            categories.
        bounds: Dictionary of ends ``(low, high)`` of columns by name or number; None for no end.
        has_tails: Whether to look for heavy tails.
    """
    x = next(iter(splits.values()))
    names, levels = list(names) or list(range(x.shape[1])), levels or [0] * x.shape[1]
    low, high = ends_given(bounds or {}, names, levels)
    for split, rows in splits.items():
        outside = (rows < low.astype(rows.dtype)) | (rows > high.astype(rows.dtype))
        outside &= np.equal(levels, 0)
        for row, column in np.argwhere(outside)[:1].tolist():
            raise ValueError(
                f"{rows[row, column]:g} in row {row} of the split {split}, column "
                f"{names[column]!r}, is outside of its bounds {low[column]:g} and "
                f"{high[column]:g}: correct the value or the bounds"
            )
    eps, kinds = float(np.finfo(x.dtype).eps), []
    for name, numbers, num, *ends in zip(
        names, np.asarray(x, np.float64).T, levels, low, high, strict=True
    ):
        kind = _kind(numbers, eps, num, *ends, has_tails=has_tails)
        if kind.is_given and 0 < numbers.std() < 128 * eps * kind.scale:
            raise ValueError(
                f"{x.dtype} cannot tell the values of column {name!r} apart beside its bounds "
                f"{kind.low:g} and {kind.high:g}: give closer ones, or None in place of one"
            )
        kinds.append(kind)
    return tuple(kinds)


def notes_of(x: Rows, names: Sequence[Any], kinds: Sequence[Kind]) -> Iterator[str]:
    """What each column was taken for, in a line."""
    for i, (name, kind) in enumerate(zip(names, kinds, strict=True)):
        low, high = x[:, i].min(), x[:, i].max()
        same = [j for j in range(i) if np.array_equal(x[:, i], x[:, j])]
        what = "numbers" if not kind.spacing else f"multiples of {kind.spacing:g}"
        what = "whole numbers" if kind.spacing and kind.unit == 1 else what
        atoms = f", often {listed(kind.atoms)}" if len(kind.atoms) else ""
        if low == high:
            yield f"{name}: always {low:g}"
        elif same:
            yield f"{name}: a copy of {names[same[0]]}"
        elif kind.levels:
            yield f"{name}: {len(kind.levels)} levels"
        else:
            tails = ", heavy tails" if kind.scale and not kind.is_given else ""
            yield f"{name}: {what}, {low:g} to {high:g}{atoms}{tails}"


def values_of(numbers: Numbers, eps: float) -> Sequence[float]:
    """Values of a column that own cells: two values for a regular grid, all values seen if they
    repeat off a grid, otherwise none.

    Numbers on a grid are whole multiples of a power of 10, up to the relative rounding ``eps`` of
    floats, and the greatest common divisor of their differences is the spacing. If the spacing is
    no larger than the one of floats, there is no room for noise, and no value owns a cell. The cell
    of a constant has a width of 1, or of the constant if that is larger.
    """
    distinct, counts = np.unique(numbers, return_counts=True)
    largest = np.abs(distinct).max()
    if len(distinct) == 1:
        return distinct[0], distinct[0] + max(1.0, largest)
    digits = max(math.floor(-math.log10(FINEST_GRID * largest)), 0)
    multiples = distinct * 10.0**digits
    whole = np.rint(multiples)
    if (
        np.all(np.abs(multiples - whole) <= np.minimum(eps * np.abs(multiples), 2.0**-6))
        and np.abs(whole).max() < 2**53
    ):
        spacing = float(np.gcd.reduce(np.diff(whole).astype(np.int64))) / 10.0**digits
        if spacing <= eps * largest:
            return ()
        return distinct[0], distinct[0] + spacing
    rare = counts[~_is_often(counts)]  # frequent values may be atoms of a continuous column
    are_few = 1.5 * len(rare) <= rare.sum() or 2 * len(rare) <= len(distinct)
    # More than 1024 values are as good as continuous.
    return distinct.tolist() if are_few and len(distinct) <= 1024 else ()


def atoms_of(numbers: Numbers, values: Sequence[float]) -> list[float]:
    """Atoms of a column, at most 8.

    An atom has at least 10 rows and .5 % of all rows, and within a value's cell its density would
    exceed that of the other numbers, on average, by more than a factor of 8.
    """
    distinct, counts = np.unique(numbers, return_counts=True)
    spacing = np.min(np.diff(values)) if len(values) else 0.0

    def width(chosen):  # of the last one, if these alone are atoms, at the others' density
        others = np.repeat(np.delete(distinct, chosen), np.delete(counts, chosen))
        length = (np.quantile(others, 0.95) - np.quantile(others, 0.05)) / 0.9 + spacing
        return length * min(counts[chosen[-1]] / len(others), 100)

    chosen: list[int] = []
    for place in np.argsort(-counts, kind="stable")[: min(8, len(distinct) - 1)].tolist():
        if not _is_often(counts)[place] or width([*chosen, place]) <= 8 * spacing:
            break
        chosen.append(place)
    return distinct[chosen].tolist()


def _is_often(counts: np.ndarray) -> np.ndarray:
    return counts >= max(10, 0.005 * counts.sum())


def ends_given(
    bounds: Any, names: Sequence[Any], levels: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper ends of columns, from levels and from bounds by name or number; infinite
    without an end.
    """
    if not isinstance(bounds, Mapping):
        raise ValueError(f'bounds must be a dictionary such as {{"share": (0, 1)}}, got {bounds!r}')
    found = np.array([(0, num - 1) if num else (-np.inf, np.inf) for num in levels], float)
    for name, ends in bounds.items():
        column = names.index(name) if name in names else name
        if column not in range(len(names)):
            raise ValueError(
                f"bounds are for the columns {listed(names)}, by name or number, got {name!r}"
            )
        try:
            low, high = (
                float(none if end is None else end)
                for end, none in zip(ends, (-np.inf, np.inf), strict=True)
            )
        except (TypeError, ValueError):
            low = high = math.nan
        if not low < high:
            raise ValueError(
                f"bounds of column {name!r} must be two rising numbers, or None in "
                f"place of one, got {ends!r}"
            )
        found[int(column)] = low, high
    return found[:, 0], found[:, 1]


def tails_of(numbers: Numbers) -> tuple[float, float]:
    """Center and scale of the heavy tails of a column; the scale is 0 if asinh gains less than .05
    nats per row.
    """
    numbers = np.asarray(numbers, np.float64)
    low, center, high = np.quantile(numbers, (0.25, 0.5, 0.75)).tolist()
    scale = (high - low) / 2
    if scale == 0:
        return center, 0.0
    mapped, log_slopes = Bounded(-np.inf, np.inf, [center], [scale]).to_line(numbers[:, None], np)

    def log_likelihood(values):  # of a normal or logistic distribution with the same moments
        z = (values - values.mean()) / values.std()
        logpdfs = (
            scipy.stats.norm.logpdf(z),
            scipy.stats.logistic.logpdf(z, scale=math.sqrt(3) / math.pi),
        )
        return max(float(each.mean()) for each in logpdfs) - math.log(values.std())

    gain = log_likelihood(mapped[:, 0]) + log_slopes.mean() - log_likelihood(numbers)
    return center, scale if gain > 0.05 + 3 / math.sqrt(len(numbers)) else 0.0


# --------------------------------------------------------------------------- columns by themselves


class Choice(NamedTuple):
    """What cross-validation chose for a column of numbers, or for one of levels.

    Attributes:
        line: Its map to the line.
        width: Width of kernels, in units of the column's scale.
        weight: Weight of repeated numbers.
        broad: Weight of a broad normal distribution beside the kernels.
        parent: Place of the column that its levels depend on; -1 for none.
    """

    line: Any = None  # a `Bounded` of one column; none of levels
    width: float = 0.4
    weight: float = 0.0
    broad: float = BROAD
    parent: int = -1


def choose(x: Rows, kinds: Sequence[Kind], *, lines: bool = False) -> list[Choice]:
    """What every fit to rows of this table goes by; with `lines` only of columns that are none."""
    parents = [-1] * len(kinds) if lines else _parents(x, kinds)
    return [
        Choice(parent=parent)
        if kind.levels or (lines and kind.is_line)
        else _smoothing(numbers, kind, BROAD / len(kinds))
        for numbers, kind, parent in zip(np.asarray(x, np.float64).T, kinds, parents, strict=True)
    ]


def fit_lines(x: Rows, kinds: Sequence[Kind], choices: Sequence[Choice] = ()) -> Marginals | None:
    """Columns on lines, and the scores of those that cannot be lines, as `fit_marginals` has them;
    None if nothing has mass, ends or heavy tails.
    """
    if all(
        kind.is_line and not len(kind.values) and not kind.is_given and not kind.scale
        for kind in kinds
    ):
        return None
    return fit_marginals(x, kinds, choices or choose(x, kinds, lines=True), lines=True)


def fit_marginals(
    x: Rows, kinds: Sequence[Kind], choices: Sequence[Choice] = (), *, lines: bool = False
) -> Marginals:
    """The map of every column to normal scores that is fitted to these rows."""
    x = np.asarray(x, np.float64)
    columns = []
    for numbers, kind, choice in zip(x.T, kinds, choices or choose(x, kinds), strict=True):
        if lines and kind.is_line:
            columns.append(kind.line(len(x)))
        elif kind.levels:
            of = -1 if lines else choice.parent  # which may be a line
            parent = None if of < 0 else (x[:, of], kinds[of])
            ends = {"low": kind.low, "high": kind.high, "least": kind.low, "most": kind.high}
            columns.append(_levels(numbers, kind, parent) | (ends if kind.is_given else {}))
            columns[-1]["parent"] = of
        else:
            columns.append(_numbers(numbers, kind, choice))
    return Marginals.of(columns)


def _codes(numbers: Numbers, kind: Kind) -> np.ndarray:
    """Places of numbers among levels, their number for others."""
    levels = np.asarray(kind.levels)
    place = np.minimum(np.searchsorted(levels, numbers), len(levels) - 1)
    return np.where(levels[place] == numbers, place, len(levels))


def _levels(numbers: Numbers, kind: Kind, parent: tuple[Numbers, Kind] | None) -> dict[str, Any]:
    """Shares of levels, for each level of the parent."""
    num = len(kind.levels)
    row = np.zeros(len(numbers), int) if parent is None else _codes(*parent)
    rows = 1 if parent is None else len(parent[1].levels) + 1
    counts = np.zeros((rows, num + 1))
    np.add.at(counts, (row, _codes(numbers, kind)), 1)
    counts = counts[:, :num]
    counts = np.where(counts.sum(axis=1, keepdims=True) > 0, counts, counts.sum(axis=0))
    total = counts.sum(axis=1, keepdims=True)
    ends = np.concatenate([np.zeros((rows, 1)), np.cumsum(counts, axis=1)], axis=1)
    with np.errstate(divide="ignore"):
        scores = normal_scores(ends / total, (total - ends) / total)
    lacking = np.sum(counts == 0, axis=1) + 1
    each = -np.log(total[:, 0] + 1)
    return {
        **{"values": kind.levels, "units": log_units(kind.levels), "has_levels": 1},
        **{"lower": scores[:, :-1], "upper": scores[:, 1:]},
        "reserved": np.stack([np.log(total[:, 0]) + each, each - np.log(lacking)], axis=1),
    }


def log_units(values: Sequence[float] | Numbers) -> np.ndarray:
    """Logarithms of the units of listed values: 1 for whole numbers, else the widths of cells."""
    if len(values) < 2 or all(value == round(value) for value in values):
        return np.zeros(len(values))
    edges, gaps = np.convolve(values, [0.5, 0.5], "valid"), np.diff(values)
    return np.log(np.diff([edges[0] - gaps[0], *edges, edges[-1] + gaps[-1]]))


def normal_scores(below: Any, above: Any) -> Any:
    """Scores of probabilities below and above, of which the smaller one is precise."""
    return np.where(below < above, ndtri(below), -ndtri(above))


def _parents(x: Rows, kinds: Sequence[Kind]) -> list[int]:
    """For each column the column whose levels make its own likelier, left one out; parents have no
    parents.
    """
    some = [i for i, kind in enumerate(kinds) if 1 < len(kind.levels) <= MOST_CODES * 2]
    codes = {i: _codes(np.asarray(x[:, i], np.float64), kinds[i]) for i in some}
    alone = {i: _left_one_out(codes[i], np.zeros_like(codes[i])) for i in some}
    gains = {
        (_left_one_out(codes[i], codes[j]) - alone[i], i, j) for i in some for j in some if i != j
    }
    parents = [-1] * len(kinds)
    for gain, i, j in sorted(gains, reverse=True):
        if gain > GAIN and parents[i] < 0 and parents[j] < 0 and i not in parents:
            parents[i] = j
    return parents


def _left_one_out(codes: np.ndarray, given: np.ndarray) -> float:
    """Log-likelihood of levels given others, each by all other rows, as `_levels` has it."""
    counts = np.zeros((given.max() + 1, codes.max() + 1))
    np.add.at(counts, (given, codes), 1)
    others, total = counts - 1, np.maximum(counts.sum(axis=1, keepdims=True), 1)
    lacking = np.sum(counts == 0, axis=1, keepdims=True) + 2
    each = np.where(others > 0, others, 1 / lacking) / total
    return float(np.sum(counts * np.log(each)))


class _Kernels:
    """A kernel density of numbers on a line, which ends a little beyond them, and a broad normal
    distribution of a small weight, the last of the kernels.
    """

    def __init__(self, numbers: Numbers, kind: Kind, choice: Choice, most: int):
        order = np.sort(numbers)
        order = order[np.linspace(0, len(order) - 1, min(len(order), most)).astype(int)]
        # a column may be constant in a fold
        reach = max(BEYOND * (order[-1] - order[0]), kind.spacing / 2) or 1.0
        low, high = kind.low - kind.spacing / 2, kind.high + kind.spacing / 2
        ends = np.clip([order[0] - reach, order[-1] + reach], low, high)
        on_line = _on(choice.line, np.concatenate([order, ends, [max(low, -1e300)]]))[0]
        centers, self.ends, num = on_line[:-3], on_line[-3:-1], len(order)
        # an end that the user gave is infinitely far on its line
        self.lowest = on_line[-1] if np.isfinite(low) and not kind.is_given else -np.inf
        self.middle, self.broad = np.mean(centers[[0, -1]]), 0.75 * np.ptp(centers) or 1.0
        self.width = choice.width * _scale(centers)
        self.centers = np.append(centers, self.middle)
        self.widths = np.append(np.full(num, self.width), self.broad)
        self.low = np.append(np.full(num, self.ends[0]), self.lowest)
        self.high = np.append(np.full(num, self.ends[1]), np.inf)
        self.cut = ndtr(self._away(self.low)), ndtr(-self._away(self.high))
        inside = 1 - self.cut[0] - self.cut[1]
        inside[:num] = inside[:num].mean()
        self.weights = np.append(np.full(num, (1 - choice.broad) / num), choice.broad) / inside

    def _away(self, y: Any) -> Any:
        return (y - self.centers) / self.widths

    def shares(self, y: Any) -> tuple[Any, Any]:
        """Probabilities below and above, of which the smaller one is precise."""
        is_low = y < self.middle
        side, cut = np.where(is_low, 1, -1)[:, None], np.where(is_low[:, None], *self.cut)
        away = self._away(np.clip(y[:, None], self.low, self.high))
        smaller = np.clip((ndtr(side * away) - cut) @ self.weights, 0, 1)
        return np.where(is_low, smaller, 1 - smaller), np.where(is_low, 1 - smaller, smaller)

    def mass(self, low: Any, high: Any) -> Any:
        """Probability between places."""
        (below, above), (below_high, above_high) = self.shares(low), self.shares(high)
        return np.where(below < 0.5, below_high - below, above - above_high)

    def density(self, y: Any) -> Any:
        """Density on the line."""
        y = y[:, None]
        heights = np.exp(-0.5 * self._away(y) ** 2) / self.widths
        is_inside = (y >= self.low) & (y <= self.high)
        return np.where(is_inside, heights, 0) @ self.weights / math.sqrt(2 * math.pi)


def _lines(numbers: Numbers, kind: Kind) -> list[Bounded]:
    """Lines that a column may lie on: the one between its ends, or the numbers themselves, and
    asinh around the median and around 0.
    """

    def line(low=-np.inf, high=np.inf, center=0.0, scale=0.0):
        return Bounded([low], [high], [center], [scale])

    if kind.is_given:
        low, high = kind.low - kind.spacing / 2, kind.high + kind.spacing / 2
        return [line(low, high, 0, np.median(np.minimum(numbers - low, high - numbers)))]
    low, center, high = np.quantile(numbers, (0.25, 0.5, 0.75)).tolist()
    found = [line(), line(center=center, scale=(high - low) / 2 or numbers.std())]
    positive = numbers[numbers > 0]
    if kind.low == 0 and len(positive):
        found.append(line(scale=max(np.quantile(positive, 0.05), kind.spacing)))
    return found


def _on(line: Bounded, numbers: Any) -> tuple[Any, Any]:
    """Numbers on a line, and ``log dy/dx``."""
    with np.errstate(invalid="ignore"):  # of infinite ends of cells
        y, log_slopes = line.to_line(np.reshape(numbers, (-1, 1)), np)
    return y.reshape(np.shape(numbers)), log_slopes.reshape(np.shape(numbers))


def _scale(y: Numbers) -> float:
    iqr = np.subtract(*np.quantile(y, [0.75, 0.25])) / 1.35
    std = float(y.std())
    return float(min(std, iqr) if iqr > 0 else std) or 1.0


def _smoothing(numbers: Numbers, kind: Kind, broad: float) -> Choice:
    """Line, width of kernels and weight of repeated numbers that held-out rows are likeliest
    under.
    """
    rows = np.random.default_rng(0).permutation(_rest(numbers, kind))[:MOST_ROWS]
    if len(rows) < 2 * NUM_FOLDS:
        return Choice(_lines(numbers, kind)[0], broad=broad)
    weights = np.array(WEIGHTS if len(kind.values) else (0.0,))
    found = []
    for line in _lines(numbers, kind):
        total = np.zeros((len(WIDTHS), len(weights)))
        for fold in range(NUM_FOLDS):
            is_test = np.arange(len(rows)) % NUM_FOLDS == fold
            tested = rows[is_test][:MOST_TESTED]
            at, log_slopes = _on(line, tested)
            low, high = (_on(line, end)[0] for end in kind.cells(tested))
            seen = np.mean(rows[~is_test] == tested[:, None], axis=1)
            for i, width in enumerate(WIDTHS):
                choice = Choice(line, width, broad=broad)
                kernels = _Kernels(rows[~is_test], kind, choice, MOST_KERNELS[0])
                density = kernels.density(at) * np.exp(log_slopes)
                mass = kernels.mass(low, high) if len(kind.values) else density
                mixed = weights * seen[:, None] + (1 - weights) * mass[:, None]
                total[i] += np.log(np.maximum(mixed, 1e-30)).sum(axis=0)
        i, j = np.unravel_index(total.argmax(), total.shape)
        found.append((total.max(), Choice(line, WIDTHS[i], float(weights[j]), broad)))
    return max(found, key=lambda each: each[0])[1]


def _rest(numbers: Numbers, kind: Kind) -> Numbers:
    """Numbers without spikes and atoms; of continuous ones each once, as equal numbers are
    likeliest under kernels without a width.
    """
    if not len(kind.values):
        return np.setdiff1d(numbers, kind.atoms)
    values, counts = np.unique(numbers, return_counts=True)
    return numbers[~np.isin(numbers, values[counts > SPIKE * len(numbers)])]


def _numbers(numbers: Numbers, kind: Kind, choice: Choice) -> dict[str, Any]:
    """The spline of a column of numbers, and its atoms."""
    line, num, rest = choice.line, len(numbers), _rest(numbers, kind)
    values, counts = np.unique(numbers, return_counts=True)
    of_spikes = num / (num + 1)
    shares = counts / num * np.where(np.isin(values, rest), choice.weight, of_spikes)
    is_heap = (shares > 0) & (shares >= np.sort(shares)[-MOST_HEAPS:][0])
    heaps, shares, count = values[is_heap], shares[is_heap], np.arange(np.sum(is_heap))
    kernels = _Kernels(rest if len(rest) > 1 else numbers, kind, choice, MOST_KERNELS[1])

    def scores_at(places, num_below):  # with so many repeated numbers below
        below, above = kernels.shares(_on(line, places)[0])
        step, rest = np.append(0, np.cumsum(shares)), 1 - shares.sum()
        found = step[num_below] + rest * below, step[-1] - step[num_below] + rest * above
        return np.clip(normal_scores(*found), -FARTHEST, FARTHEST)

    low, high = kind.cells(heaps)
    lower, upper = scores_at(low, count), scores_at(high, count + 1)
    if len(kind.values) > 2:
        lower[0], upper[-1] = -np.inf, np.inf
        column = {"values": heaps, "units": log_units(heaps), "has_levels": 2}
        return column | {"lower": [lower], "upper": [upper]}
    # Knots stand at quantiles of the kernel density, and on both sides of each repeated number.
    ends, lowest = kernels.ends, kernels.lowest
    fine = np.unique(np.concatenate([np.linspace(ends[0], ends[1], 512), kernels.centers[::8]]))
    at = np.interp(SCORES, normal_scores(*kernels.shares(fine)), fine)
    far = kernels.middle + np.array([-2, -1, 1, 2]) * kernels.broad
    if np.isfinite(lowest):  # where scores fall without end
        near = (kernels.centers[0] - lowest) * 10.0 ** -np.arange(7)
        far = np.concatenate([np.maximum(far, lowest), lowest + near, [lowest]])
    at = np.concatenate([ends, at, far])[:, None]
    knots = kind.cells(line.from_line(at, np)[0][:, 0])[0]
    places = np.concatenate([knots, low, high])
    num_below = np.concatenate([np.searchsorted(heaps, knots), count, count + 1])
    places, num_below = np.unique([places, num_below], axis=1)
    at, scores = _on(line, places)[0], scores_at(places, num_below.astype(int))
    least = np.cumsum(2.0**-20 * (1 + abs(scores)))  # which single precision tells apart
    scores = np.maximum.accumulate(scores - least) + least
    slopes = (1 - shares.sum()) * kernels.density(at) * np.exp(0.5 * scores**2)
    limits = 1e-6 / kernels.broad, 1e3 / kernels.width
    slopes = np.clip(slopes * math.sqrt(2 * math.pi), *limits)
    for end, inner in ((0, 1), (-1, -2)):
        if abs(scores[end]) > FARTHEST - 1 and at[end] != at[inner]:
            slopes[end] = (scores[end] - scores[inner]) / (at[end] - at[inner])
    names = "low", "high", "center", "scale"
    column = {name: np.asarray(getattr(line, name))[0] for name in names} | kind.grid
    column |= {"at": at, "to": scores, "slopes": slopes}
    if np.isfinite(kind.low) and not kind.is_given:
        column |= {"reserved": [[math.log(of_spikes), -math.log(num + 1)]]}
    if not kind.spacing and len(heaps):
        lower[heaps <= kind.low], upper[heaps >= kind.high] = -np.inf, np.inf
        column |= {"values": heaps, "units": 0 * heaps, "lower": [lower], "upper": [upper]}
    return column
