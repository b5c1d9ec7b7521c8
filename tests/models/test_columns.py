"""Columns of data frames as numbers and back, in their own types, and what a frame may not hold."""

import json

import numpy as np
import pandas as pd
import pytest

from iresnet_jax.models.columns import Column, Frame, columns_of, numbers_of, table_of
from iresnet_jax.pytrees import from_tagged, tagged

FRAME = pd.DataFrame(
    {
        "flag": [True, False, True],
        "consent": pd.array([True, False, False], dtype="boolean"),
        "age": np.array([20, 30, 40], np.int16),
        "children": pd.array([0, 1, 2], dtype="Int64"),
        "height": np.array([1.5, 2.0, 1.75], np.float32),
        "share": pd.array([0.25, 0.5, 0.75], dtype="Float64"),
        "size": pd.Categorical(["S", "L", "S"], categories=["S", "M", "L"], ordered=True),
        "grade": pd.Categorical([3, 1, 2]),
        "city": ["Oslo", "Bern", "Oslo"],
        "code": pd.Series(["x", "y", "x"], dtype=object),
    }
)
COLUMNS = columns_of(FRAME)


def test_a_frame_becomes_numbers_and_comes_back_in_its_types():
    numbers = numbers_of(FRAME, COLUMNS)
    np.testing.assert_array_equal(numbers[0], [1, 1, 20, 0, 1.5, 0.25, 0, 2, 1, 0])
    back = table_of(numbers + np.array([0.3, -0.3, 0.4, 0.4, 0, 0, 0.4, -0.4, 0.3, 0.3]), COLUMNS)
    pd.testing.assert_frame_equal(back, FRAME)


@pytest.mark.parametrize("dtype", ["uint16", "UInt32", "uint64", "int64"])
def test_integers_stay_within_their_type(dtype):
    """A continuous density of many integers goes on beyond the ends of a type."""
    [column] = columns_of(pd.DataFrame({"count": pd.Series([1, 2]).astype(dtype)}))
    found = table_of(np.array([[-3.0], [2.6], [1e20]]), (column,))["count"]
    assert found.dtype == dtype
    assert found[1] == 3
    assert found[0] == (0 if "u" in dtype.lower() else -3)
    assert found[2] > 2**15


@pytest.mark.parametrize("names", [["a", 1], [("a", 1), ("a", 2)], [("a", "x"), ("b", "x")]])
def test_names_come_back_as_they_were(names):
    frame = pd.DataFrame(
        np.eye(2),
        columns=pd.MultiIndex.from_tuples(names) if isinstance(names[0], tuple) else names,
    )
    columns = from_tagged(json.loads(json.dumps(tagged(columns_of(frame)))), {"Column": Column})
    pd.testing.assert_frame_equal(table_of(numbers_of(frame, columns), columns), frame)


def test_frames_of_other_packages_are_converted_by_themselves():
    class Table:
        columns = tuple(FRAME)

        def to_pandas(self):
            return FRAME

    assert isinstance(Table(), Frame)
    assert columns_of(Table()) == COLUMNS
    np.testing.assert_array_equal(numbers_of(Table(), COLUMNS), numbers_of(FRAME, COLUMNS))


def test_columns_are_found_by_name_and_unknown_categories_have_no_place():
    np.testing.assert_array_equal(
        numbers_of(FRAME[FRAME.columns[::-1]], COLUMNS), numbers_of(FRAME, COLUMNS)
    )
    found = numbers_of(FRAME.assign(city=["Oslo", "Rome", "Oslo"]), COLUMNS)
    assert found[:, [column.name for column in COLUMNS].index("city")].tolist() == [1, -1, 1]
