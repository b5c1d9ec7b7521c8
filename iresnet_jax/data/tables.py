"""Columns of vectors: values that own cells, atoms, ends and tails.

Columns of decimals, whole numbers among them, lie on a regular grid of cells, see `values_of`, and
so do levels of booleans and categories. Columns have the ends that the user gives, or the ends of
their levels; other columns have a map of their tails if these are heavy, see `tails_of`.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats
from jaxtyping import Float

from iresnet_jax.bijections.bounded import Bounded
from iresnet_jax.bijections.cells import Cells
from iresnet_jax.models.columns import listed

FINEST_GRID = 2.0**-17  # least spacing of a grid (64 floats), relative to the largest number

Rows = Float[np.ndarray, "_ d"]
Numbers = Float[np.ndarray, " n"]


class Table(NamedTuple):
    """Description of columns: their cells, the map of their ends and tails to the line, and
    sentences.
    """

    cells: Cells | None
    ends: Bounded | None = None
    notes: tuple[str, ...] = ()


def describe(
    splits: Mapping[str, Rows],
    names: Sequence[Any] = (),
    *,
    levels: Sequence[int] = (),
    bounds: Any = None,
    is_density: bool = True,
) -> Table:
    """Finds the cells and atoms of columns and, for a density, their ends and heavy tails.

    Args:
        splits: Rows by split, training rows first.
        names: Names of the columns in bounds and messages; by default their numbers.
        levels: Number of levels of each column, 0 for numbers; empty without booleans and
            categories.
        bounds: Dictionary of ends ``(low, high)`` of columns by name or number; None for no end.
        is_density: Whether to fit a density; otherwise only cells and atoms are found.
    """
    x = next(iter(splits.values()))
    names, levels = list(names) or list(range(x.shape[1])), levels or [0] * x.shape[1]
    values, atoms = [], []
    for numbers, num_levels in zip(np.asarray(x, np.float64).T, levels, strict=True):
        values.append(
            (0.0, 1.0) if num_levels else values_of(numbers, float(np.finfo(x.dtype).eps))
        )
        atoms.append({} if num_levels else atoms_of(numbers, values[-1]))
    cells = Cells.of(values, atoms) if any(map(len, values)) or any(atoms) else None
    if not is_density:
        return Table(cells)
    low, high = ends_given({} if bounds is None else bounds, names, levels)
    for split, rows in splits.items():
        outside = (rows < low.astype(rows.dtype)) | (rows > high.astype(rows.dtype))
        for row, column in np.argwhere(outside)[:1].tolist():
            raise ValueError(
                f"{rows[row, column]:g} in row {row} of the split {split}, column "
                f"{names[column]!r}, is outside of its bounds {low[column]:g} and "
                f"{high[column]:g}: correct the value or the bounds"
            )
    ends = _on_line(x, cells, low, high)
    is_bounded = np.isfinite(low) | np.isfinite(high)
    is_faint = np.std(x, axis=0, dtype=np.float64) < 128 * np.finfo(x.dtype).eps * np.asarray(
        ends.scale
    )
    for column in np.flatnonzero(is_bounded & is_faint & (np.ptp(x, axis=0) > 0)).tolist():
        raise ValueError(
            f"{x.dtype} cannot tell the values of column {names[column]!r} apart beside its bounds "
            f"{low[column]:g} and {high[column]:g}: give closer ones, or None in place of one"
        )
    heavy = np.isinf(low) & np.isinf(high) & (np.asarray(ends.scale) > 0)
    kinds = {
        "cells": map(len, values),
        "atoms": atoms,
        "hard ends": is_bounded,
        "heavy tails": heavy,
    }
    chosen = {
        kind: [name for name, has in zip(names, having, strict=True) if has]
        for kind, having in kinds.items()
    }
    notes = tuple(
        f"columns with {kind}: {listed(those)}" for kind, those in chosen.items() if those
    )
    return Table(cells, ends if chosen["hard ends"] or chosen["heavy tails"] else None, notes)


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


def atoms_of(numbers: Numbers, values: Sequence[float]) -> dict[float, float]:
    """Atoms of a column, at most 8, and each one's width on the line, which makes it as dense as
    the other numbers are on average.

    An atom has at least 10 rows and .5 % of all rows, and within a value's cell its density would
    exceed the others' by more than a factor of 8.
    """
    distinct, counts = np.unique(numbers, return_counts=True)
    spacing = np.min(np.diff(values)) if len(values) else 0.0

    def widths(chosen):  # if these values alone are atoms
        others = np.repeat(np.delete(distinct, chosen), np.delete(counts, chosen))
        length = (np.quantile(others, 0.95) - np.quantile(others, 0.05)) / 0.9 + spacing
        return length * np.minimum(counts[chosen] / len(others), 100)

    chosen: list[int] = []
    for place in np.argsort(-counts, kind="stable")[: min(8, len(distinct) - 1)].tolist():
        if not _is_often(counts)[place] or widths([*chosen, place])[-1] <= 8 * spacing:
            break
        chosen.append(place)
    return dict(zip(distinct[chosen].tolist(), widths(chosen).tolist(), strict=True))


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


def _on_line(x: Rows, cells: Cells | None, low: np.ndarray, high: np.ndarray) -> Bounded:
    """The map of ends, with all of their cells, and of heavy tails; it takes the median distance
    from a single end to 0.
    """
    line = x
    if cells is not None:
        line = np.asarray(jax.jit(cells.forward_and_logdet)(jnp.asarray(x), jax.random.key(0))[0])
        with jax.enable_x64():
            _, start, width, _ = map(np.asarray, cells.places(jnp.asarray([low, high])))
        low, high = start[0], start[1] + width[1]
    center, scale = np.array([tails_of(column) for column in line.T]).T
    distance = np.median(np.minimum(line - low, high - line), axis=0)
    is_bounded = np.isfinite(distance)
    return Bounded(
        low, high, np.where(is_bounded, 0, center), np.where(is_bounded, distance, scale)
    )


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
