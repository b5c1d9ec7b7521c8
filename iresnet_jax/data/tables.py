r"""Columns of vectors: which values own cells, which are atoms, and what ends or tails columns have.

**Cells.** Columns of decimals, whole numbers among them, lie on a regular grid, see `values_of`; so do levels of booleans and
categories. Other values of a column that takes few of them are a knot each.

**Atoms** are values that many rows have and for which the line has no room: those of continuous columns, and of columns with
cells those that are far more frequent than others, such as zeros among amounts, see `atoms_of`.

**Ends** are those that the user gives, and the levels of booleans and categories. Other columns have none, and a map of their
tails where these are heavy, see `tails_of`.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats
from jaxtyping import Float

from iresnet_jax.bijections.bounded import Asinh, Bounded, Bounds
from iresnet_jax.bijections.cells import Cells
from iresnet_jax.models.columns import NAMED, listed

REPEATS = 1.5  # rows for each distinct value of a column from which it takes few values
MOST_KNOTS = 1024  # values of a column off any grid that own cells: more are as good as continuous
FINEST_GRID = 2.0**-17  # of the largest number: the least spacing of a grid, of 64 floats or more
FEWEST_ROWS, LEAST_SHARE = 10, 0.005  # that an atom has
MOST_ATOMS = 8  # of a column
CROWDED = 8.0  # times the mean density of the others, in which the cell of an atom would be
WIDEST = 100.0  # an atom in the lengths of what the others take
UNRESOLVED = 1e-5  # standard deviation relative to the mean below which float32 cannot tell values apart
FAINT = 1e-31  # standard deviation below which the digits of differences underflow in float32
HEAVIER = 0.05  # nats a row by which a column must be likelier with a map of its tails

Rows = Float[np.ndarray, "_ d"]


class Table(NamedTuple):
    """Columns of vectors as they were found.

    Attributes:
        cells: Columns whose values own cells, and atoms; None if there are none.
        ends: Intervals of columns on the line, or maps of their heavy tails, None of a column without; None without any.
        notes: Sentences on them.
    """

    cells: Cells | None
    ends: tuple[Bounds | Asinh | None, ...] | None = None
    notes: tuple[str, ...] = ()


def describe(
    splits: Mapping[str, Rows],
    names: Sequence[Any] = (),
    *,
    levels: Sequence[int | None] = (),
    bounds: Any = None,
    is_density: bool = True,
) -> Table:
    """Finds the cells and atoms of columns and, where their density is to be fitted, their ends and heavy tails.

    Args:
        splits: Rows by split, those to train with first.
        names: Names of the columns, by which bounds and messages speak of them; none of an array.
        levels: Number of levels of each column, None of numbers; none without booleans and categories.
        bounds: Dictionary of ends ``(low, high)`` of columns by name or number.
        is_density: Whether a density is to be fitted; otherwise columns have cells and atoms alone.

    Raises:
        ValueError: If single precision cannot tell values apart, or a value is out of its bounds; the message names it.
    """
    x, names = next(iter(splits.values())), list(names)
    values, atoms = [], []
    for column, numbers in enumerate(np.asarray(x, np.float64).T):
        if 0 < np.ptp(numbers) and numbers.std() < max(UNRESOLVED * abs(numbers.mean()), FAINT):
            raise ValueError(
                f"single precision cannot tell the values of {_named(column, names)} apart: subtract its mean, and divide "
                "by its standard deviation"
            )
        is_level = bool(levels) and levels[column] is not None
        values.append((0.0, 1.0) if is_level else values_of(numbers, float(np.finfo(x.dtype).eps)))
        atoms.append({} if is_level else atoms_of(numbers, values[-1]))
    cells = Cells.of(values, atoms) if any(map(len, values)) or any(atoms) else None
    if not is_density:
        return Table(cells)
    given = ends_given({} if bounds is None else bounds, names, x.shape[1])
    ends = {**{column: (0.0, num - 1.0) for column, num in enumerate(levels) if num is not None}, **given}
    line = x
    if cells is not None:
        line = np.asarray(jax.jit(cells.bijection().forward_and_logdet)(jnp.asarray(x), jax.random.key(0))[0])
    found = [_on_line(cells, i, ends[i]) if i in ends else tails_of(of_line) for i, of_line in enumerate(line.T)]
    for column, (low, high) in ends.items():
        _check_inside(splits, column, names, low, high)
    return Table(cells, tuple(found) if any(found) else None, tuple(_notes(values, atoms, found, names)))


# ------------------------------------------------------------------------------------------------------ cells and atoms


def values_of(numbers: Float[np.ndarray, " n"], eps: float) -> Sequence[float]:
    """Values of a column that own cells: two of a regular grid, those that were seen off a grid, none of others.

    A grid is one of decimals: all numbers are whole multiples of a power of 10, up to the rounding of floats, and the greatest
    common divisor of their differences is the spacing. A constant column has a cell of width 1.

    Args:
        numbers: The column.
        eps: Relative rounding of its floats.
    """
    distinct, counts = np.unique(numbers, return_counts=True)
    largest = np.abs(distinct).max()
    if len(distinct) == 1:
        return distinct[0], distinct[0] + max(1.0, largest)
    digits = max(math.floor(-math.log10(FINEST_GRID * largest)), 0)
    multiples = distinct * 10.0**digits
    whole = np.rint(multiples)
    if np.all(np.abs(multiples - whole) <= np.minimum(eps * np.abs(multiples), 2.0**-6)) and np.abs(whole).max() < 2**53:
        spacing = float(np.gcd.reduce(np.diff(whole).astype(np.int64))) / 10.0**digits
        return distinct[0], distinct[0] + spacing
    is_rare = counts < max(FEWEST_ROWS, LEAST_SHARE * len(numbers))  # others may be atoms of a continuous column
    are_few = REPEATS * is_rare.sum() <= counts[is_rare].sum() or 2 * is_rare.sum() <= len(distinct)
    return distinct.tolist() if are_few and len(distinct) <= MOST_KNOTS else ()


def atoms_of(numbers: Float[np.ndarray, " n"], values: Sequence[float]) -> dict[float, float]:
    """Atoms of a column, and the width by which the line makes room for each: as dense as the other numbers are on average."""
    distinct, counts = np.unique(numbers, return_counts=True)
    spacing = np.min(np.diff(values)) if len(values) else 0.0
    shares = counts / len(numbers)

    def wanted(chosen):  # widths of these and of no others
        others = np.repeat(np.delete(distinct, chosen), np.delete(counts, chosen))
        if not len(others):
            return np.zeros(len(chosen))
        length = (np.quantile(others, 0.95) - np.quantile(others, 0.05)) / 0.9 + spacing
        return length * np.minimum(shares[chosen] * len(numbers) / len(others), WIDEST)

    chosen: list[int] = []
    for place in np.argsort(-counts, kind="stable")[:MOST_ATOMS].tolist():
        is_often = counts[place] >= max(FEWEST_ROWS, LEAST_SHARE * len(numbers))
        if not is_often or wanted([*chosen, place])[-1] <= CROWDED * spacing:
            break
        chosen.append(place)
    return dict(zip(distinct[chosen].tolist(), wanted(chosen).tolist(), strict=True))


# --------------------------------------------------------------------------------------------------------- ends and tails


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


def _on_line(cells: Cells | None, column: int, ends: tuple[float, float]) -> Bounds:
    """The interval on the line that holds the ends, with all of their cells."""
    if cells is None:
        return Bounds(*ends)
    with jax.enable_x64():
        _, start, width, _ = cells.places(jnp.broadcast_to(jnp.asarray(ends)[:, None], (2, cells.num_entries)))
    return Bounds(float(start[0, column]), float(start[1, column] + width[1, column]))


def tails_of(numbers: Float[np.ndarray, " n"]) -> Asinh | None:
    """The map of the tails of a column about its median; None where a normal or a logistic distribution has such tails."""
    numbers = np.asarray(numbers, np.float64)
    low, center, high = np.quantile(numbers, (0.25, 0.5, 0.75)).tolist()
    if not low < high:
        return None
    found = Asinh(center, (high - low) / 2)
    mapped, log_slopes = Bounded.of((found,)).to_line(numbers[:, None], np)

    def log_likelihood(values):  # by moments
        z = (values - values.mean()) / values.std()
        logpdfs = scipy.stats.norm.logpdf(z), scipy.stats.logistic.logpdf(z, scale=math.sqrt(3) / math.pi)
        return max(float(each.mean()) for each in logpdfs) - math.log(values.std())

    gain = log_likelihood(mapped[:, 0]) + log_slopes.mean() - log_likelihood(numbers)
    return found if gain > HEAVIER + 3 / math.sqrt(len(numbers)) else None


def _check_inside(splits: Mapping[str, Rows], column: int, names: Sequence[Any], low: float, high: float) -> None:
    """Raises ``ValueError`` if a value is out of its bounds."""
    for split, rows in splits.items():
        values = rows[:, column]
        out = (values < values.dtype.type(low)) | (values > values.dtype.type(high))
        if out.any():
            row = int(out.argmax())
            where = f"row {row}" if split == "train" else f"row {row} of the split {split}"
            raise ValueError(
                f"{values[row]:g} in {where} of {_named(column, names)} is outside of its bounds {low:g} and {high:g}: correct "
                "the value or the bounds"
            )


# ------------------------------------------------------------------------------------------------------------- sentences


def _notes(values: Sequence[Any], atoms: Sequence[Any], ends: Sequence[Any], names: Sequence[Any]) -> list[str]:
    """Sentences on what columns were taken for, each about the columns of one kind."""
    kinds = {
        "with cells": [column for column, known in enumerate(values) if len(known)],
        "with atoms": [column for column, found in enumerate(atoms) if found],
        "between hard ends": [column for column, found in enumerate(ends) if isinstance(found, Bounds)],
        "with heavy tails": [column for column, found in enumerate(ends) if isinstance(found, Asinh)],
    }
    return [f"{kind}: {_listed(columns, names)}" for kind, columns in kinds.items() if columns]


def _listed(columns: Sequence[int], names: Sequence[Any]) -> str:
    """Columns in a sentence, the first of many."""
    more = f" and {len(columns) - NAMED} more" if len(columns) > NAMED else ""
    return ", ".join(_named(column, names) for column in columns[:NAMED]) + more


def _named(column: int, names: Sequence[Any]) -> str:
    return f"column {column}" + (f" ({names[column]!r})" if len(names) else "")
