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


@runtime_checkable
class Frame(Protocol):
    """A data frame: its columns have names, and types of their own."""

    columns: Any


def columns_of(frame: Any) -> tuple[Column, ...]:
    """The columns of a data frame."""
    series = _series(frame)
    if unnamed := [name for name in series if str(name).startswith("Unnamed: ")]:
        raise ValueError(
            f"column {unnamed[0]!r} holds row numbers of a written table: read it "
            "with index_col=0, or drop it"
        )
    columns = tuple(_column(name, values) for name, values in series.items())
    for column in columns:
        try:
            json.dumps((column.name, column.categories))
        except TypeError as error:  # no file could hold the model
            raise ValueError(
                f"names and categories must be text or numbers, and column {column.name!r} has "
                f"others ({error}): convert it, or drop it"
            ) from None
    return columns


def numbers_of(frame: Any, columns: tuple[Column, ...]) -> Float[np.ndarray, "n d"]:
    """A data frame as numbers, its columns found by name; categories by their places, -1 for one
    that is not known.
    """
    series = _series(frame)
    return np.stack([_numbers(series[column.name], column) for column in columns], axis=1)


def table_of(x: Float[np.ndarray, "n d"], columns: tuple[Column, ...]) -> Any:
    """Numbers as a data frame of the columns' types: whole numbers and categories are the
    nearest ones that a type holds.
    """
    import pandas as pd

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
            values = np.rint(np.clip(numbers, info.min, np.nextafter(float(info.max), 0)))
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
    names = list(frame.columns)
    if repeated := [name for name in names if names.count(name) > 1]:
        raise ValueError(
            f"column names must differ, and two columns are called {repeated[0]!r}: "
            "rename one of them"
        )
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
        return Column(name, "category", tuple(dtype.categories.tolist()), bool(dtype.ordered))
    if check.is_bool_dtype(dtype):
        return Column(name, str(dtype), (False, True))
    if check.is_integer_dtype(dtype) or check.is_float_dtype(dtype):
        return Column(name, str(dtype))
    counts = values.value_counts()
    if (counts == 1).sum() > len(values) / 2 and len(values) > 2:
        raise ValueError(
            f"most values of column {name!r} occur once, as names do: drop the column, or convert "
            "it to numbers"
        )
    return Column(name, str(values.dtype), tuple(sorted(counts.index)))


def _numbers(values: Any, column: Column) -> Float[np.ndarray, " n"]:
    if column.categories is None:
        return values.to_numpy(np.float64)
    places = {category: place for place, category in enumerate(column.categories)}
    return np.array([places.get(value, -1) for value in values], np.float64)
