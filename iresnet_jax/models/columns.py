"""Columns of a data frame as numbers, and back: booleans, integers, floats, and categories by their place in a list.

Data frames are those of pandas, and tables with a method ``to_pandas`` such as those of polars and Arrow. pandas is imported
only where one is given or made.
"""

import json
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float

NAMED = 5  # columns or categories that a message names


@dataclass(frozen=True)
class Column:
    """One column of a data frame.

    Attributes:
        name: Text or number, or a tuple of them where columns have names of several levels.
        kind: What it holds.
        dtype: Name of its type in pandas, which `table_of` gives back.
        categories: All categories, text or numbers; a value is its place among them.
        is_ordered: Whether a column of pandas' categories has an order.
    """

    name: Any
    kind: Literal["boolean", "integer", "float", "category"]
    dtype: str
    categories: tuple[Any, ...] | None = None
    is_ordered: bool = False

    def __post_init__(self):
        if isinstance(self.name, list):  # of a saved model, in JSON
            object.__setattr__(self, "name", tuple(self.name))

    @property
    def num_levels(self) -> int | None:
        """Number of values of a boolean or of categories, ``0`` to ``num_levels - 1``; None of other numbers."""
        return 2 if self.kind == "boolean" else len(self.categories) if self.categories is not None else None


@runtime_checkable
class Frame(Protocol):
    """A data frame: its columns have names, and types of their own."""

    columns: Any


def columns_of(frame: Any) -> tuple[Column, ...]:
    """The columns of a data frame.

    Raises:
        ValueError: If there are none, or one holds missing values, or neither numbers nor categories; it names the column.
    """
    frame = _as_pandas(frame)
    names = _names(frame)
    if not names:
        raise ValueError("the data frame has no columns: give at least one")
    if unnamed := [name for name in names if str(name).startswith("Unnamed: ")]:
        raise ValueError(
            f"column {unnamed[0]!r} holds the row numbers of a written table: read it with index_col=0, or drop it"
        )
    return tuple(_column(name, frame.iloc[:, place]) for place, name in enumerate(names))


def _as_pandas(frame: Any) -> Any:
    frame = frame.to_pandas() if hasattr(frame, "to_pandas") else frame
    if not hasattr(frame, "iloc"):
        raise ValueError(f"tables must be data frames of pandas, or have a method to_pandas, got a {type(frame).__name__}")
    return frame


def _names(frame: Any) -> list[Any]:
    names = list(frame.columns)
    if repeated := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"column names must differ, and two columns are called {repeated[0]!r}: rename one of them")
    try:
        json.dumps(names)
    except TypeError as error:
        raise ValueError(f"column names must be text or numbers ({error}): rename the columns") from None
    return names


def numbers_of(frame: Any, columns: tuple[Column, ...]) -> Float[np.ndarray, "n d"]:
    """A data frame as numbers, its columns found by name.

    Raises:
        ValueError: If a column is missing, unknown or there twice, or holds missing values, text or an unknown category.
    """
    frame = _as_pandas(frame)
    places = {name: place for place, name in enumerate(_names(frame))}
    names = [column.name for column in columns]
    if lacking := [name for name in names if name not in places]:
        raise ValueError(f"the table has no column {lacking[0]!r}: the model takes {listed(names)}")
    if unknown := [name for name in places if name not in names]:
        raise ValueError(f"the model knows no column {unknown[0]!r}: drop it, the model takes {listed(names)}")
    return np.stack([_numbers(frame.iloc[:, places[column.name]], column) for column in columns], axis=1)


def table_of(x: Float[np.ndarray, "n d"], columns: tuple[Column, ...]) -> Any:
    """Numbers as a data frame of the columns' types: whole numbers and categories are the nearest ones that a type holds."""
    import pandas as pd

    made = {}
    for values, column in zip(np.asarray(x, np.float64).T, columns, strict=True):
        if column.categories is not None:
            codes = np.clip(np.rint(values), 0, len(column.categories) - 1).astype(int)
            categories = list(column.categories)
            if column.dtype == "category":
                made[column.name] = pd.Series(pd.Categorical.from_codes(codes, categories, ordered=column.is_ordered))
                continue
            values = np.array(categories, object)[codes]
        elif column.kind != "float":
            values = np.rint(values) > 0 if column.kind == "boolean" else _whole(values, column.dtype)
        made[column.name] = pd.Series(values).astype(column.dtype)  # pyright: ignore[reportArgumentType, reportCallIssue]
    return pd.DataFrame(made)


def _whole(values: Float[np.ndarray, " n"], dtype: str) -> np.ndarray:
    """The nearest integers that a type of pandas holds: a continuous density does not end where the type does."""
    import pandas as pd

    known: Any = pd.api.types.pandas_dtype(dtype)
    integers = np.dtype(getattr(known, "numpy_dtype", known))
    info = np.iinfo(integers if integers.kind in "iu" else np.int64)  # Python's integers are objects
    return np.rint(np.clip(values, info.min, np.nextafter(float(info.max), 0))).astype(info.dtype)


def _column(name: Any, series: Any) -> Column:
    import pandas as pd

    check, dtype = pd.api.types, series.dtype
    if isinstance(dtype, pd.SparseDtype):  # comes back dense
        dtype = dtype.subtype
    _check_complete(series, name)
    if isinstance(dtype, pd.CategoricalDtype):
        return Column(name, "category", "category", _plain(list(dtype.categories), name), bool(dtype.ordered))
    known = series.infer_objects().dtype if check.is_object_dtype(dtype) else dtype
    if check.is_bool_dtype(known):
        return Column(name, "boolean", str(dtype))
    if check.is_integer_dtype(known):
        return Column(name, "integer", str(dtype))
    if check.is_float_dtype(known):
        return Column(name, "float", str(dtype))
    if not all(isinstance(value, str) for value in series):
        raise ValueError(
            f"column {name!r} must hold numbers, booleans or text, got {dtype}: convert it to one of them, or drop it"
        )
    return Column(name, "category", str(dtype), _plain(sorted(set(series)), name))


def _numbers(series: Any, column: Column) -> Float[np.ndarray, " n"]:
    """The values of one column; categories by their places."""
    _check_complete(series, column.name)
    if column.categories is None:
        try:
            return series.to_numpy(np.float64)
        except (TypeError, ValueError):
            raise ValueError(f"column {column.name!r} must hold numbers, got {series.dtype}") from None
    places: dict[Hashable, int] = {category: place for place, category in enumerate(column.categories)}
    codes = [places.get(value, -1) for value in series]
    if -1 in codes:
        row = codes.index(-1)
        raise ValueError(
            f"{series.iloc[row]!r} in row {row} of column {column.name!r} is none of the categories of the model: these are "
            f"{listed(column.categories)}"
        )
    return np.array(codes, np.float64)


def listed(values: Sequence[Any]) -> str:
    """Values in a sentence, the first of many."""
    more = f" and {len(values) - NAMED} more" if len(values) > NAMED else ""
    return ", ".join(map(repr, values[:NAMED])) + more


def _check_complete(series: Any, name: Any) -> None:
    missing = np.asarray(series.isna(), bool)
    if missing.any():
        raise ValueError(
            f"column {name!r} has {missing.sum()} missing values, the first in row {missing.argmax()}: fill them in or drop "
            "their rows"
        )


def _plain(categories: list[Any], name: Any) -> tuple[Any, ...]:
    values = [value.item() if isinstance(value, np.generic) else value for value in categories]
    if wrong := [value for value in values if not isinstance(value, str | int | float)]:
        raise ValueError(f"categories must be text or numbers, and column {name!r} has {wrong[0]!r}: convert it to text")
    return tuple(values)
