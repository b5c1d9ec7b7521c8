r"""Columns of vectors whose density is to be fitted: grids, intervals, and what has no density.

**Grids.** A column of few different values lies on a grid ``offset + k spacing``; so does one of whole numbers, by its type.
Values are spread over their cells, and an interval holds the cells of all values that were seen.

**Ends.** A continuous column may have hard ends, as numbers in [0, 1] have. `find_ends` compares each tail with a normal one,
the one through the k-th and the 2k-th value from the outermost one on. The normal tail puts n Phi(z) values beyond the
outermost one that was seen. For a normal density, or a heavier tail, this number exceeds E with a probability of about
``exp(-E)``. A column has hard ends if the number is at least 6 at either end and 20 at both together, for k = 80 and for k at
2.5, 5 and 10 % of the values. Fewer than about 1000 values cannot show it, and it takes some thousand where a density falls
to 0 in a straight line, as in a triangle.

**What has no density.** Constant columns, repeated values off any grid, one value that many rows have, and columns that are a
linear combination of others: the likelihood of such data has no ceiling.
"""

import collections
import dataclasses
import math
import statistics
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from iresnet_jax.bijections.transforms.bounded import FLOAT32_EDGE, Bounds
from iresnet_jax.bijections.transforms.dequantize import Grid
from iresnet_jax.data.dataset import DataSet
from iresnet_jax.models.columns import Column

REPEATS = 2.0  # examples for each distinct value of an entry from which it counts as one that takes few values
MOST_CELLS = 1024  # of whole numbers that are on a grid by their type, however few examples there are for each
OFF_GRID = 0.01  # steps that a value may be beside its grid
FINEST_GRID = 1e-4  # least spacing of a grid, in standard deviations of the entry
UNRESOLVED = 1e-5  # standard deviation relative to the mean below which float32 cannot tell values apart
FAINT = 1e-31  # standard deviation below which the digits of differences underflow in float32
NAMED = 5  # entries that a message names
COMMON, NOTED = 0.25, 0.05  # share of one value in a continuous column that is refused, and that is said
FAR = 1e4  # interquartile ranges from the median, from which a value is said to be one
WIDEST_EDGE = 0.02  # standard deviations of a column, near an end of its given bounds, in which all values count as one
INDEPENDENT = 1e-6  # standard deviations of a column that the others must leave unexplained
FEWEST_ROWS = 2000  # that show which columns may depend on others
TAILS = (0.025, 0.05, 0.1)  # shares of the values, from the outermost one on, that show a hard end
FEW_PLACES = 80  # values from the outermost one on that show it too: many values may hide a smooth tail at their end
EACH_END, BOTH_ENDS = 6.0, 20.0  # least numbers of values that a normal tail puts beyond the seen ends
PER_VALUE = 1e-3  # least such number at either end for each value
REACH = 20  # values at an end: twice the distance of this one from the last is how far beyond it the end may lie


class FarValueWarning(UserWarning):
    """One value is so far from all others that the scale of its column is its own."""


@dataclass(frozen=True)
class Table:
    """What is known of the columns of vectors whose density is to be fitted, and then what was seen.

    Attributes:
        columns: Columns of the data frame; None for an array.
        whole: Whether all entries are whole numbers by the type of the array.
        bounds: Dictionary of ends ``(low, high)`` of columns by name or number; None looks for hard ends.
        grid: Grids that were seen.
        intervals: Intervals of the entries.
        notes: Sentences on them.
    """

    columns: tuple[Column, ...] | None = None
    whole: bool = False
    bounds: Any = None
    grid: Grid | None = None
    intervals: tuple[Bounds | None, ...] | None = None
    notes: tuple[str, ...] = ()

    def described(
        self, x: Float[np.ndarray, "n d"], names: Sequence[str] = (), held_out: Float[np.ndarray, "m d"] | None = None
    ) -> "Table":
        """The table with its grids, intervals and notes.

        Args:
            x: All rows, or those to train with.
            held_out: Rows that were given to validate with: they belong to the range that was seen.
            names: Names of the columns, by which bounds and messages speak of them; none of an array.

        Raises:
            ValueError: If a column has no density, or a value outside of its bounds; the message names it.
        """
        names = list(names)
        whole = np.full(x.shape[1], self.whole)
        if self.columns is not None:
            whole = np.array([column.is_discrete for column in self.columns])
        grid = find_grid(x, names, whole)
        if self.columns is not None:
            _check_categories(self.columns, grid)
        check_density(x, names, grid)
        everything = x if held_out is None else np.concatenate([x, held_out])
        check_on_grid(grid, x, names)
        if held_out is not None:
            check_on_grid(grid, held_out, names, "validation row {}")
        given = ends_given({} if self.bounds is None else self.bounds, names, x.shape[1])
        ends = find_ends(everything, grid) if self.bounds is None else {}
        ends_of = {**ends, **given}
        intervals = [_interval(everything, column, names, grid, ends_of.get(column), len(x)) for column in range(x.shape[1])]
        for column, (low, high) in given.items():
            bounds, step = intervals[column], 0.0 if grid is None else grid.spacing[column]
            assert bounds is not None
            if bounds.edge > (step / 4 or WIDEST_EDGE * x[:, column].std()):
                raise ValueError(
                    f"bounds {low:g} and {high:g} of {_named([column], names)} are so far apart that single precision cannot "
                    "tell values near an end from each other: narrow them, or leave them out"
                )
        notes = [*_notes_on_grid(names, grid, intervals), *_notes_on_values(x, names, grid)]
        notes += [
            f"{_named([column], names)} has hard ends: a density on [{low:g}, {high:g}]; bounds={{}} leaves it unbounded"
            for column, (low, high) in ends.items()
        ]
        return dataclasses.replace(self, grid=grid, intervals=tuple(intervals) if any(intervals) else None, notes=tuple(notes))

    def added_to(self, data: DataSet) -> DataSet:
        """The data set with the intervals of its entries and what was seen."""
        return dataclasses.replace(data, bounds=self.intervals, notes=self.notes)


# ---------------------------------------------------------------------------------------------------------------- grids


def check_on_grid(grid: Grid | None, x: np.ndarray, names: Sequence[str], row_is: str = "row {}") -> None:
    """Raises ``ValueError`` if a value is between those of its column's grid; ``row_is`` says which row it is in."""
    if grid is not None and (off := grid.off(x)).any():
        row, column = np.argwhere(off)[0].tolist()
        raise ValueError(
            f"{x[row, column]:g} in {row_is.format(row)} is not on the grid of {_named([column], names)}: "
            f"{grid.offset[column]:g} and steps of {grid.spacing[column]:g}; give all values as one array, or round this one"
        )


def find_grid(x: np.ndarray, column_names: Sequence[str] = (), whole: Bool[np.ndarray, " d"] | None = None) -> Grid | None:
    """The grid on which entries of vectors lie that take few values; None if all are continuous.

    An entry counts as one that takes few values if there are at least `REPEATS` examples for each of them, or if it holds whole
    numbers by its type and their grid has at most `MOST_CELLS`.

    Args:
        x: Vectors ``(n, d)``.
        column_names: Names of the entries, for messages.
        whole: Entries that are whole numbers by their type.

    Raises:
        ValueError: If entries are constant, repeat values that are on no grid, or have differences that float32 cannot hold.
    """
    refused = collections.defaultdict(list)
    offset, spacing = np.zeros(x.shape[1]), np.zeros(x.shape[1])
    for column, values in enumerate(np.asarray(x, np.float64).T):
        distinct = np.unique(values)
        if len(distinct) < 2:
            refused["an entry that is constant in single precision has no density: drop {}"].append(column)
            continue
        if distinct.std() < UNRESOLVED * abs(distinct.mean()):
            refused["single precision cannot tell values apart so far from 0: subtract the mean of {}"].append(column)
            continue
        if distinct.std() < FAINT:
            refused["single precision rounds differences so small to 0: divide {} by its standard deviation"].append(column)
            continue
        step = _step(distinct)
        is_few = len(values) >= REPEATS * len(distinct)
        if whole is not None and whole[column] and step is not None:
            is_few |= np.ptp(distinct) < MOST_CELLS * step
        if not is_few:
            continue
        least = max(FINEST_GRID * values.std(), 4 * FLOAT32_EDGE * np.abs(distinct).max())
        if step is not None and step >= least:
            offset[column], spacing[column] = distinct[0], step
        else:
            refused[
                "a density of few values on no regular grid would grow without bound: "
                "add noise of the size of their rounding to {}, or drop it"
            ].append(column)
    for problem, columns in refused.items():
        raise ValueError(problem.format(_named(columns, column_names)))
    return Grid(tuple(offset.tolist()), tuple(spacing.tolist())) if spacing.any() else None


def _step(distinct: np.ndarray) -> float | None:
    """Spacing of the grid on which values lie, up to the rounding of their decimals; None if there is none."""
    gaps = np.diff(distinct)
    if not np.any(distinct % 1) and np.abs(distinct).max() < 2**53:
        return float(np.gcd.reduce(gaps.astype(np.int64)))
    last = step = gaps.min()
    rounding = np.finfo(np.float32).eps * np.abs(distinct).max()  # of a gap
    spans = [distinct[2**i] - distinct[0] for i in range(len(gaps).bit_length())]
    for gap in np.unique([*gaps, *spans, np.ptp(distinct)]):  # the larger, the more exactly it tells the step
        steps = np.round(gap / step)
        if abs(gap / step - steps) > min(OFF_GRID + steps * rounding / last, 0.25):
            return None
        last, step = gap, gap / steps
    places = (distinct - distinct[0]) / step
    return float(step) if np.abs(places - np.round(places)).max() <= OFF_GRID else None


def _check_categories(columns: Sequence[Column], grid: Grid | None) -> None:
    """Raises ``ValueError`` if a column has so many categories that they cannot be counted."""
    for place, column in enumerate(columns):
        if column.categories is not None and (grid is None or not grid.spacing[place]):
            raise ValueError(
                f"column {column.name!r} has {len(column.categories)} categories, too many for its rows and more than "
                f"{MOST_CELLS}: drop it, or join categories"
            )


# -------------------------------------------------------------------------------------------------------------- intervals


def find_ends(x: Float[np.ndarray, "n d"], grid: Grid | None) -> dict[int, tuple[float, float]]:
    """Hard ends of continuous columns that have them on both sides, see the module.

    An end is the roundest number between the outermost value and a reach further out, which is twice its distance from the
    twentieth value. If that number is no rounder than chance gives, the end is the farthest of these.
    """
    found = {}
    for column in range(x.shape[1]):
        if grid is not None and grid.spacing[column] > 0:
            continue
        values = np.sort(np.asarray(x[:, column], np.float64))
        places = [FEW_PLACES, *(round(share * len(values)) for share in TAILS)]
        beyond = np.array([[_expected_beyond(side, k) for k in places] for side in (values, -values[::-1])])
        is_cut = beyond[:, 1:].min() >= PER_VALUE * len(values)  # a tail of many values, less smooth than it looks nearby
        if is_cut and beyond.min() >= EACH_END and beyond.min(axis=1).sum() >= BOTH_ENDS:
            found[column] = (0.0 - _end(-values), 0.0 + _end(values[::-1]))
    return found


def _expected_beyond(values: Float[np.ndarray, " n"], k: int) -> float:
    """Number of values that a normal tail, through the k-th and the 2k-th value from the least on, puts below the least one."""
    num = len(values)
    if k < 2 or 2 * k > num or values[2 * k - 1] == values[k - 1]:
        return 0.0
    normal = statistics.NormalDist()
    first, second = (normal.inv_cdf((place - 0.5) / num) for place in (k, 2 * k))
    steps = (values[k - 1] - values[0]) / (values[2 * k - 1] - values[k - 1])
    return num * normal.cdf(first - (second - first) * steps)


def _end(descending: Float[np.ndarray, " n"]) -> float:
    """Where values end whose largest ones are given, the largest first."""
    last, reach = float(descending[0]), 2 * float(descending[0] - descending[REACH - 1])
    if reach == 0:  # many values are the last one
        return last
    exponent = math.ceil(math.log10(abs(last) + reach)) + 1
    while 10.0**exponent >= 4 * reach:
        rounded = math.ceil(last / 10.0**exponent) * 10.0**exponent
        if rounded <= last + reach:
            return round(rounded, max(0, -exponent))
        exponent -= 1
    return last + reach


def ends_given(bounds: Any, names: Sequence[str], num: int) -> dict[int, tuple[float, float]]:
    """Ends ``(low, high)`` by the number of the column, of bounds by name or number.

    Raises:
        ValueError: If there is no such column, or its ends are not two numbers in order.
    """
    if not isinstance(bounds, Mapping):
        raise ValueError(f'bounds must be a dictionary such as {{"share": (0, 1)}}, got {bounds!r}')
    found = {}
    for name, ends in bounds.items():
        column = names.index(str(name)) if str(name) in names else name
        if isinstance(column, bool) or not isinstance(column, int | np.integer) or not 0 <= column < num:
            known = f"the names {', '.join(map(repr, names))}" if names else "numbers"
            raise ValueError(f"bounds are for columns 0 to {num - 1}, by {known}, got {name!r}")
        try:
            low, high = map(float, ends)
        except (TypeError, ValueError):
            raise ValueError(f"bounds of column {name!r} must be two numbers (low, high), got {ends!r}") from None
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise ValueError(f"bounds of column {name!r} must be finite, the lower one first, got {low:g} and {high:g}")
        found[int(column)] = (low, high)
    return found


def _interval(
    x: Float[np.ndarray, "n d"],
    column: int,
    names: Sequence[str],
    grid: Grid | None,
    ends: tuple[float, float] | None,
    num_train: int,
) -> Bounds | None:
    """The interval of one column: of given or found ends, or of the cells that were seen; None for none."""
    values = x[:, column]
    step, offset = (0.0, 0.0) if grid is None else (grid.spacing[column], grid.offset[column])
    if ends is None and not step:
        return None
    low, high = (float(values.min()), float(values.max())) if ends is None else ends
    if step and ends is not None and np.any(np.abs((np.array(ends) - offset) / step % 1 - 0.5) < 0.49):
        raise ValueError(
            f"bounds of {_named([column], names)} must be values of its grid, {offset:g} and steps of {step:g}, got {ends}"
        )
    out = (values < values.dtype.type(low)) | (values > values.dtype.type(high))
    if out.any():
        row = int(out.argmax())
        raise ValueError(
            f"{values[row]:g} in {_row(row, num_train)} of {_named([column], names)} is outside of its bounds {low:g} and "
            f"{high:g}: correct the value or the bounds"
        )
    return Bounds.of(low - step / 2, high + step / 2, step or None)


# -------------------------------------------------------------------------------------------------- what has no density


def check_density(x: Float[np.ndarray, "n d"], names: Sequence[str] = (), grid: Grid | None = None) -> None:
    """Raises ``ValueError`` if the likelihood of vectors has no ceiling, or one value hides all others; warns of far ones.

    Args:
        x: Vectors without constant entries.
        names: Names of the entries, for messages.
        grid: Entries that lie on a grid.
    """
    spacing = np.zeros(x.shape[1]) if grid is None else np.asarray(grid.spacing)
    for column in np.flatnonzero(spacing == 0).tolist():
        values, name = np.asarray(x[:, column], np.float64), _named([column], names)
        value, share = _commonest(values)
        if share > COMMON and share * len(values) > 1:
            raise ValueError(
                f"{share:.0%} of {name} are {value:g}, where a density would grow without bound: add noise, or model the rows "
                "with and without this value apart"
            )
        quarter, median, three_quarters = np.quantile(values, (0.25, 0.5, 0.75))
        distances = np.abs(values - median)
        row, spread = int(distances.argmax()), three_quarters - quarter
        if distances[row] <= FAR * spread:
            continue
        far = f"{values[row]:g} in row {row} of {name} is {distances[row] / spread:.0e} interquartile ranges from the median"
        if spread < UNRESOLVED * values.std():
            raise ValueError(f"{far}: beside it single precision cannot tell the others apart; correct it or drop the row")
        warnings.warn(f"{far} and decides its scale: correct it or drop the row if it is wrong", FarValueWarning, stacklevel=2)
    if sentence := _dependence(x, names, spacing):
        raise ValueError(sentence)


def _dependence(x: np.ndarray, names: Sequence[str], spacing: Float[np.ndarray, " d"]) -> str:
    """Says which continuous column is a linear combination of others; "" if none is.

    Columns on a grid may depend on each other: their values have probabilities.
    """
    order = np.argsort(spacing == 0, kind="stable")  # columns on a grid first
    stride = max(1, len(x) // max(FEWEST_ROWS, 2 * x.shape[1]))  # some rows from everywhere show what all then confirm
    rows = np.asarray(x[::stride], np.float64)[:, order]
    scale = rows.std(axis=0)
    if len(rows) < x.shape[1] + 2 or not np.all(scale > 0):
        return ""
    center = rows.mean(axis=0)
    z = (rows - center) / scale
    rounding = np.finfo(x.dtype).eps * np.abs(rows).max(axis=0) / scale
    left = np.abs(np.diag(np.linalg.qr(z, mode="r"))) / math.sqrt(len(z))  # unexplained by the columns before
    for place in np.flatnonzero(left <= np.maximum(INDEPENDENT, 2 * rounding.max())).tolist():
        if spacing[order[place]] > 0:
            continue
        others = np.linalg.lstsq(z[:, :place], z[:, place])[0]
        known = (x[:, order[: place + 1]] - center[: place + 1]) / scale[: place + 1]
        unexplained = np.std(known[:, place] - known[:, :place] @ others)
        if unexplained > max(INDEPENDENT, 2 * math.hypot(rounding[place], np.linalg.norm(others * rounding[:place]))):
            continue
        factors = -others * scale[place] / scale[:place]
        terms = [_named([int(order[place])], names)]
        terms += [
            f"{'-' if factors[i] < 0 else '+'} {_factor(abs(factors[i]))}{_named([int(order[i])], names)}"
            for i in np.flatnonzero(np.abs(others) > 1e-3).tolist()
        ]
        return f"{' '.join(terms)} is constant, so the likelihood has no ceiling: drop one of these columns"
    return ""


def _factor(size: float) -> str:
    return "" if f"{size:.4g}" == "1" else f"{size:.4g} x "


def _commonest(values: np.ndarray) -> tuple[float, float]:
    distinct, counts = np.unique(values, return_counts=True)
    return float(distinct[counts.argmax()]), float(counts.max() / len(values))


# ------------------------------------------------------------------------------------------------------------- sentences


def _named(columns: Sequence[int], names: Sequence[str]) -> str:
    """Columns in a sentence, the first of many."""
    named = [f"column {column}" + (f" ({names[column]!r})" if len(names) else "") for column in columns]
    more = f" and {len(columns) - NAMED} more" if len(columns) > NAMED else ""
    return ", ".join(named[:NAMED]) + more


def _row(row: int, num_train: int) -> str:
    """A row in a sentence, of the rows to train with and, behind them, those to validate with."""
    return f"row {row}" if row < num_train else f"validation row {row - num_train}"


def _notes_on_grid(names: Sequence[str], grid: Grid | None, intervals: Sequence[Bounds | None]) -> list[str]:
    """What is said of columns on a grid."""
    if grid is None:
        return []
    on_grid = [column for column, step in enumerate(grid.spacing) if step > 0]
    first = on_grid[0]
    bounds, step = intervals[first], grid.spacing[first]
    assert bounds is not None
    example = f"{bounds.low + step / 2:g} to {bounds.high - step / 2:g} in steps of {step:g}"
    several = f"; the first from {example}" if len(on_grid) > 1 else f" from {example}"
    return [f"discrete within the range that was seen: {_named(on_grid, names)}{several}"]


def _notes_on_values(x: np.ndarray, names: Sequence[str], grid: Grid | None) -> list[str]:
    """What is said of values that many rows of a continuous column have."""
    notes = []
    for column in range(x.shape[1]):
        value, share = _commonest(x[:, column])
        if share > NOTED and (grid is None or grid.spacing[column] == 0):
            notes.append(f"{_named([column], names)} counts as continuous, though {share:.0%} of its values are {value:g}")
    return notes
