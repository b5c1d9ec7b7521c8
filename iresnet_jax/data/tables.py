r"""Columns of vectors: grids, intervals, and what has no density.

**Grids.** A column of few different values lies on a grid ``offset + k spacing``; so does one of whole numbers, by its type.
Values are spread over their cells.

**Intervals.** A column whose density is to be fitted keeps to the ends that are given, to its levels if it is a boolean or a
category, and else to the cells of all values that were seen if it lies on a grid.

**What has no density.** Constant columns, repeated values off any grid, one value that many rows have, and columns that are a
linear combination of others: the likelihood of such data has no ceiling.
"""

import collections
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from iresnet_jax.bijections.bounded import Bounds
from iresnet_jax.bijections.dequantize import Grid
from iresnet_jax.models.columns import NAMED, Column, listed

REPEATS = 2.0  # examples for each distinct value of an entry from which it counts as one that takes few values
MOST_CELLS = 1024  # of whole numbers that are on a grid by their type, however few examples there are for each
OFF_GRID = 0.01  # steps that a value may be beside its grid
FINEST_GRID = 1e-4  # least spacing of a grid, in standard deviations of the entry
UNRESOLVED = 1e-5  # standard deviation relative to the mean below which float32 cannot tell values apart
FAINT = 1e-31  # standard deviation below which the digits of differences underflow in float32
COMMON, NOTED = 0.25, 0.05  # share of one value in a continuous column that is refused, and that is said
AT_AN_END = 0.005  # share of values that may be an end of their bounds, as single precision rounds close ones to it
COARSEST = 0.02  # standard deviations of a column that single precision must resolve at an end of its given bounds
INDEPENDENT = 1e-6  # standard deviations of a column that the others must leave unexplained
FEWEST_ROWS = 2000  # that show which columns may depend on others

Rows = Float[np.ndarray, "_ d"]


class Table(NamedTuple):
    """Columns of vectors as they were found.

    Attributes:
        grid: Grids of columns that take few values, or whole numbers; None if there are none.
        intervals: Intervals of the columns, None for one that may be any number; None without any.
        notes: Sentences on them.
    """

    grid: Grid | None
    intervals: tuple[Bounds | None, ...] | None = None
    notes: tuple[str, ...] = ()


def describe(
    splits: Mapping[str, Rows],
    names: Sequence[Any] = (),
    *,
    columns: Sequence[Column] | None = None,
    is_whole: bool = False,
    bounds: Any = None,
    is_density: bool = True,
) -> Table:
    """Finds the grids of columns and, where their density is to be fitted, their intervals.

    Args:
        splits: Rows by split, those to train with first.
        names: Names of the columns, by which bounds and messages speak of them; none of an array.
        columns: Columns of a data frame.
        is_whole: Whether all entries of an array are whole numbers by its type.
        bounds: Dictionary of ends ``(low, high)`` of columns by name or number.
        is_density: Whether a density is to be fitted; otherwise columns have grids alone.

    Raises:
        ValueError: If a column has no density, or a value is off its grid or out of its bounds; the message names it.
    """
    x, names = next(iter(splits.values())), list(names)
    grid = find_grid(x, names, columns, is_whole=is_whole)
    if grid is not None:
        for split, rows in splits.items():
            _check_on_grid(grid, rows, names, split)
    if not is_density:
        return Table(grid)
    notes = check_density(x, names, grid)
    given = ends_given({} if bounds is None else bounds, names, x.shape[1])
    levels = {place: column.num_levels for place, column in enumerate(columns or ()) if column.num_levels is not None}
    ends = {**{column: (0.0, num - 1.0) for column, num in levels.items()}, **given}
    intervals = [_interval(splits, column, names, grid, ends.get(column)) for column in range(x.shape[1])]
    for column, (low, high) in given.items():
        found, step = intervals[column], 0.0 if grid is None else float(grid.spacing[column])
        assert found is not None
        if found.resolution > (step / 4 or COARSEST * x[:, column].std()):
            raise ValueError(
                f"bounds {low:g} and {high:g} of {_named([column], names)} are so far apart that single precision cannot "
                "tell values near an end from each other: narrow them, or leave them out"
            )
    if grid is not None:
        on_grid = [column for column, step in enumerate(np.asarray(grid.spacing)) if step > 0]
        first, step = intervals[on_grid[0]], float(grid.spacing[on_grid[0]])
        assert first is not None
        example = f"from {first.low + step / 2:g} to {first.high - step / 2:g} in steps of {step:g}"
        notes = [f"discrete: {_named(on_grid, names)}; the first {example}", *notes]
    return Table(grid, tuple(intervals) if any(intervals) else None, tuple(notes))


# ---------------------------------------------------------------------------------------------------------------- grids


def _check_on_grid(grid: Grid, x: Rows, names: Sequence[Any], split: str) -> None:
    """Raises ``ValueError`` if a value is between those of its column's grid."""
    if (off := grid.off(x)).any():
        row, column = np.argwhere(off)[0].tolist()
        raise ValueError(
            f"{x[row, column]:g} in {_row(row, split)} is not on the grid of {_named([column], names)}: "
            f"{grid.offset[column]:g} and steps of {grid.spacing[column]:g}; give all values as one array, or round this one"
        )


def find_grid(
    x: Rows, names: Sequence[Any] = (), columns: Sequence[Column] | None = None, *, is_whole: bool = False
) -> Grid | None:
    """The grid on which entries of vectors lie that take few values; None if all are continuous.

    An entry counts as one that takes few values if there are at least `REPEATS` examples for each of them, or if it holds whole
    numbers by its type and their grid has at most `MOST_CELLS`. Levels of booleans and categories are a grid.

    Args:
        x: Vectors ``(n, d)``.
        names: Names of the entries, for messages.
        columns: Columns of a data frame.
        is_whole: Whether all entries of an array are whole numbers by its type.

    Raises:
        ValueError: If entries are constant, repeat values that are on no grid, have differences that float32 cannot hold, or
            are categories of hardly any example each.
    """
    refused = collections.defaultdict(list)
    offset, spacing = np.zeros(x.shape[1]), np.zeros(x.shape[1])
    for column, values in enumerate(np.asarray(x, np.float64).T):
        known = columns[column] if columns is not None else None
        distinct = np.unique(values)
        if len(distinct) < 2 or distinct.std() < max(UNRESOLVED * abs(distinct.mean()), FAINT):
            refused[
                "single precision cannot tell the values of {} apart: drop it if it is constant, "
                "else subtract its mean and divide by its standard deviation"
            ].append(column)
            continue
        is_few = len(values) >= REPEATS * len(distinct)
        if known is not None and known.num_levels is not None:
            if known.kind == "category" and not is_few:
                refused["categories must have 2 rows each on average: join some categories of {}, or drop it"].append(column)
            spacing[column] = 1.0
            continue
        step = _step(distinct)
        if step is not None and (is_whole if known is None else known.is_discrete):
            is_few |= np.ptp(distinct) < MOST_CELLS * step
        if not is_few:
            continue
        least = max(FINEST_GRID * values.std(), 2.0**-19 * np.abs(distinct).max())
        if step is not None and step >= least:
            offset[column], spacing[column] = distinct[0], step
        else:
            refused[
                "a density of few values on no regular grid would grow without bound: "
                "add noise of the size of their rounding to {}, or drop it"
            ].append(column)
    for problem, places in refused.items():
        raise ValueError(problem.format(_named(places, names)))
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


# ------------------------------------------------------------------------------------------------------------ intervals


def ends_given(bounds: Any, names: Sequence[Any], num: int) -> dict[int, tuple[float, float]]:
    """Ends ``(low, high)`` by the number of the column, of bounds by name or number.

    Raises:
        ValueError: If there is no such column, or its ends are not two numbers in order.
    """
    if not isinstance(bounds, Mapping):
        raise ValueError(f'bounds must be a dictionary such as {{"share": (0, 1)}}, got {bounds!r}')
    found = {}
    for name, ends in bounds.items():
        column = names.index(name) if name in names else name
        if isinstance(column, bool) or not isinstance(column, int | np.integer) or not 0 <= column < num:
            known = f"the names {listed(names)}" if names else "numbers"
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
    splits: Mapping[str, Rows], column: int, names: Sequence[Any], grid: Grid | None, ends: tuple[float, float] | None
) -> Bounds | None:
    """The interval of one column: of its ends, or of the cells that were seen; None for none."""
    step, offset = (0.0, 0.0) if grid is None else (float(grid.spacing[column]), float(grid.offset[column]))
    if ends is None:
        if not step:
            return None
        seen = np.concatenate([rows[:, column] for rows in splits.values()])
        ends = float(seen.min()), float(seen.max())
    elif step and np.any(np.abs((np.array(ends) - offset) / step % 1 - 0.5) < 0.49):
        raise ValueError(
            f"bounds of {_named([column], names)} must be values of its grid, {offset:g} and steps of {step:g}, got {ends}"
        )
    low, high = ends
    for split, rows in splits.items():
        values = rows[:, column]
        out = (values < values.dtype.type(low)) | (values > values.dtype.type(high))
        if out.any():
            row = int(out.argmax())
            raise ValueError(
                f"{values[row]:g} in {_row(row, split)} of {_named([column], names)} is outside of its bounds {low:g} and "
                f"{high:g}: correct the value or the bounds"
            )
        for end in ends if not step else ():
            at_end = np.flatnonzero(np.asarray(values, np.float32) == np.float32(end))
            if len(at_end) > max(1, AT_AN_END * len(values)):
                raise ValueError(
                    f"{_named([column], names)} repeats at the end {end:g} of its bounds, in {len(at_end)} rows such as "
                    f"{_row(int(at_end[0]), split)}: a density has no value there twice; widen the bounds, add noise, or model "
                    "these rows apart"
                )
    return Bounds(low - step / 2, high + step / 2)


# -------------------------------------------------------------------------------------------------- what has no density


def check_density(x: Rows, names: Sequence[Any] = (), grid: Grid | None = None) -> list[str]:
    """Raises ``ValueError`` if the likelihood of vectors has no ceiling, or one value hides all others.

    Args:
        x: Vectors without constant entries.
        names: Names of the entries, for messages.
        grid: Entries that lie on a grid.

    Returns:
        Sentences on values that many rows of a continuous column have.
    """
    notes = []
    spacing = np.zeros(x.shape[1]) if grid is None else np.asarray(grid.spacing)
    for column in np.flatnonzero(spacing == 0).tolist():
        values, name = np.asarray(x[:, column], np.float64), _named([column], names)
        distinct, counts = np.unique(values, return_counts=True)
        value, share = distinct[counts.argmax()], counts.max() / len(values)
        if share > COMMON and counts.max() > 1:
            raise ValueError(
                f"{share:.0%} of {name} are {value:g}, where a density would grow without bound: add noise, or model the rows "
                "with and without this value apart"
            )
        if share > NOTED:
            notes.append(f"{name} counts as continuous, though {share:.0%} of its values are {value:g}")
        quarter, median, three_quarters = np.quantile(values, (0.25, 0.5, 0.75))
        if three_quarters - quarter < UNRESOLVED * values.std():
            row = int(np.abs(values - median).argmax())
            raise ValueError(
                f"{values[row]:g} in row {row} of {name} is so far from the others that single precision cannot tell these "
                "apart: correct it or drop the row"
            )
    if sentence := _dependence(x, names, spacing):
        raise ValueError(sentence)
    return notes


def _dependence(x: Rows, names: Sequence[Any], spacing: Float[np.ndarray, " d"]) -> str:
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
        found = _named([int(order[place])], names)
        combined = _named(order[np.flatnonzero(np.abs(others) > 1e-3)].tolist(), names)
        return f"{found} is a linear combination of {combined}, so the likelihood has no ceiling: drop it"
    return ""


# ------------------------------------------------------------------------------------------------------------- sentences


def _named(columns: Sequence[int], names: Sequence[Any]) -> str:
    """Columns in a sentence, the first of many."""
    named = [f"column {column}" + (f" ({names[column]!r})" if len(names) else "") for column in columns]
    more = f" and {len(columns) - NAMED} more" if len(columns) > NAMED else ""
    return ", ".join(named[:NAMED]) + more


def _row(row: int, split: str) -> str:
    return f"row {row}" if split == "train" else f"row {row} of the split {split}"
