"""Columns of a data frame as numbers, and back: booleans and categories by their place in a list.

Data frames are those of pandas, and tables with a method ``to_pandas`` such as those of polars and
Arrow. pandas is imported only where one is given or made.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float


@dataclass(frozen=True)
class Column:
    """One column of a data frame.

    Attributes:
        name: Text or number, or a tuple of them where columns have names of several levels.
        dtype: Name of its type in pandas, which `table_of` gives back.
        categories: All categories, text or numbers, or both booleans; a value is its place among
            them. None of numbers.
        is_ordered: Whether a column of pandas' categories has an order.
    """

    name: Any
    dtype: str
    categories: tuple[Any, ...] | None = None
    is_ordered: bool = False

    def __post_init__(self):
        if isinstance(self.name, list):  # of a saved model, in JSON
            object.__setattr__(self, "name", tuple(self.name))


@runtime_checkable
class Frame(Protocol):
    """A data frame: its columns have names, and types of their own."""

    columns: Any


def columns_of(frame: Any) -> tuple[Column, ...]:
    """The columns of a data frame.

    Raises:
        ValueError: If there are none, or one holds missing values, or neither numbers nor
            categories; it names the column.
    """
    series = _series(frame)
    if not series:
        raise ValueError("the data frame has no columns: give at least one")
    if unnamed := [name for name in series if str(name).startswith("Unnamed: ")]:
        raise ValueError(
            f"column {unnamed[0]!r} holds row numbers of a written table: read it "
            "with index_col=0, or drop it"
        )
    return tuple(_column(name, values) for name, values in series.items())


def numbers_of(frame: Any, columns: tuple[Column, ...]) -> Float[np.ndarray, "n d"]:
    """A data frame as numbers, its columns found by name.

    Raises:
        ValueError: If a column is missing, unknown or there twice, or holds missing values or text.
    """
    series = _series(frame)
    names = [column.name for column in columns]
    if wrong := [name for name in (*names, *series) if (name in names) != (name in series)]:
        whose = "table" if wrong[0] in names else "model"
        raise ValueError(f"the {whose} has no column {wrong[0]!r}: the model takes {listed(names)}")
    return np.stack([_numbers(series[column.name], column) for column in columns], axis=1)


def table_of(x: Float[np.ndarray, "n d"], columns: tuple[Column, ...]) -> Any:
    """Numbers as a data frame of the columns' types: whole numbers and categories are the
    nearest ones that a type holds.
    """
    import pandas as pd

    if np.isnan(x).any():
        raise ValueError(
            "rows hold NaN, which whole numbers and categories cannot be: leave those rows out"
        )
    made = {}
    for numbers, column in zip(np.asarray(x, np.float64).T, columns, strict=True):
        values, dtype = numbers, pd.api.types.pandas_dtype(column.dtype)
        if column.categories is not None:
            codes = np.clip(np.rint(numbers), 0, len(column.categories) - 1).astype(int)
            values = pd.Categorical.from_codes(
                codes, list(column.categories), ordered=column.is_ordered
            )
        # a continuous density does not end where the type does
        elif pd.api.types.is_integer_dtype(dtype):
            info = np.iinfo(getattr(dtype, "numpy_dtype", dtype))
            values = np.rint(np.clip(numbers, info.min, np.nextafter(float(info.max), 0))).astype(
                info.dtype
            )
        made[column.name] = pd.Series(values).astype(column.dtype)  # pyright: ignore[reportArgumentType, reportCallIssue]
    return pd.DataFrame(made)


def listed(values: Iterable[Any]) -> str:
    """Values in a sentence, the first five of many."""
    values = list(values)
    more = f" and {len(values) - 5} more" if len(values) > 5 else ""
    return ", ".join(map(repr, values[:5])) + more


def _series(frame: Any) -> dict[Any, Any]:
    """The columns of a data frame by their names, if these differ and no value is missing."""
    frame = frame.to_pandas() if hasattr(frame, "to_pandas") else frame
    if not hasattr(frame, "iloc"):
        raise ValueError(
            "tables must be data frames of pandas, or have a method to_pandas, got a "
            f"{type(frame).__name__}"
        )
    names = list(frame.columns)
    if repeated := [name for name in names if names.count(name) > 1]:
        raise ValueError(
            f"column names must differ, and two columns are called {repeated[0]!r}: "
            "rename one of them"
        )
    try:
        json.dumps(names)
    except TypeError as error:
        raise ValueError(
            f"column names must be text or numbers ({error}): rename the columns"
        ) from None
    for place, name in enumerate(names):
        missing = np.asarray(frame.iloc[:, place].isna(), bool)
        if missing.any():
            raise ValueError(
                f"column {name!r} has {missing.sum()} missing values, the first in row "
                f"{missing.argmax()}: fill them in or "
                "drop their rows"
            )
    return {name: frame.iloc[:, place] for place, name in enumerate(names)}


def _column(name: Any, values: Any) -> Column:
    import pandas as pd

    check, dtype = pd.api.types, values.infer_objects().dtype
    if isinstance(dtype, pd.SparseDtype):  # comes back dense
        dtype = dtype.subtype
    if isinstance(dtype, pd.CategoricalDtype):
        categories = tuple(dtype.categories.tolist())
        if wrong := [each for each in categories if not isinstance(each, str | int | float)]:
            raise ValueError(
                f"categories must be text or numbers, and column {name!r} has "
                f"{wrong[0]!r}: convert it to text"
            )
        return Column(name, "category", categories, bool(dtype.ordered))
    if check.is_bool_dtype(dtype):
        return Column(name, str(dtype), (False, True))
    if check.is_integer_dtype(dtype) or check.is_float_dtype(dtype):
        return Column(name, str(dtype))
    if not all(isinstance(value, str) for value in values):
        raise ValueError(
            f"column {name!r} must hold numbers, booleans or text, got {dtype}: convert it to one "
            "of them, or drop it"
        )
    counts = values.value_counts()
    if (counts == 1).sum() > len(values) / 2 and len(values) > 2:
        raise ValueError(
            f"column {name!r} holds text, most of which occurs once, as names do: drop the column"
        )
    return Column(name, str(values.dtype), tuple(sorted(counts.index)))


def _numbers(values: Any, column: Column) -> Float[np.ndarray, " n"]:
    """The values of one column; categories by their places, -1 for one that is not known."""
    if column.categories is None:
        try:
            return values.to_numpy(np.float64)
        except (TypeError, ValueError):
            raise ValueError(
                f"column {column.name!r} must hold numbers, got {values.dtype}"
            ) from None
    places = {category: place for place, category in enumerate(column.categories)}
    return np.array([places.get(value, -1) for value in values], np.float64)
