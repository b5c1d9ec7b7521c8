"""Columns of tables: grids of whole numbers, intervals, and what has no density, each by name."""

import numpy as np
import pytest

from iresnet_jax.bijections.bounded import Bounds
from iresnet_jax.data.tables import check_density, describe, ends_given, find_grid
from iresnet_jax.models.columns import Column

RNG = np.random.default_rng(0)
NAMES = ["rent", "rest", "income"]
NORMAL = RNG.normal(size=(1500, 3))


def described(x, *names, **options):
    return describe({"train": x}, *names, **options)


def beside(column, num=1500):
    return np.stack([NORMAL[:num, 0], column, NORMAL[:num, 1]], axis=1).astype(np.float32)


# --- grids and intervals ---


def test_whole_numbers_lie_on_a_grid_by_their_type_and_keep_to_what_was_seen():
    ages = RNG.integers(18, 91, 100)
    x = beside(ages, 100)
    assert find_grid(x) is None  # hardly two examples for a value
    few = described(np.stack([ages, 2 * RNG.integers(0, 2, 100)], axis=1).astype(np.float32), is_whole=True)
    assert few.grid.spacing.tolist() == [1.0, 2.0]
    assert few.intervals == (Bounds(ages.min() - 0.5, ages.max() + 0.5), Bounds(-1.0, 3.0))
    assert "18 to 90 in steps of 1" in few.notes[0]


def test_a_grid_of_whole_numbers_may_lack_values():
    x = beside(RNG.choice([0, 4, 10, 14], 1500))
    assert find_grid(x).spacing[1] == 2


@pytest.mark.parametrize(("mean", "std", "digits", "num"), [(24, 4, 2, 5000), (5000, 900, 1, 100_000), (0, 1, 3, 9000)])
def test_decimals_lie_on_their_grid_though_float32_rounds_them(mean, std, digits, num):
    x = np.round(np.random.default_rng(0).normal(mean, std, (num, 1)), digits).astype(np.float32)
    x = np.append(x, [[x.max() + 1000 * 10.0**-digits]] * 2, axis=0).astype(np.float32)  # far from all others, but on the grid
    table = described(x)
    assert table.grid.spacing[0] == pytest.approx(10.0**-digits, rel=1e-6)
    assert not table.grid.off(x).any()


def test_so_they_do_where_each_is_taken():
    percentages = np.tile(np.arange(10_001), 2)[:, None].astype(np.float32) / np.float32(100)
    grid = find_grid(percentages)
    assert grid.spacing[0] == pytest.approx(0.01, rel=1e-7)
    assert not grid.off(percentages).any()


def test_given_bounds_are_by_name_or_number():
    share = RNG.random(1500)
    table = described(beside(share), NAMES, bounds={"rest": (0, 2), 2: (-9.0, 9.0)})
    assert table.intervals == (None, Bounds(0.0, 2.0), Bounds(-9.0, 9.0))
    assert described(beside(share), NAMES).intervals is None
    assert ends_given({1: (0, 2)}, [1, 0], 2) == {0: (0.0, 2.0)}  # columns of a data frame may be called by numbers
    wider = described(beside(RNG.integers(0, 3, 1500)), NAMES, bounds={1: (0, 4)})
    assert wider.intervals[1] == Bounds(-0.5, 4.5)


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ({"rset": (0, 1)}, r"columns 0 to 2, by the names 'rent', 'rest', 'income', got 'rset'"),
        ({"rest": 1.0}, "two numbers"),
        ({"rest": (1, 0)}, "the lower one first"),
        ({"rest": (0, float("inf"))}, "finite"),
        ({"rest": (0, 1e12)}, r"bounds 0 and 1e\+12 of column 1 \('rest'\) are so far apart"),
        ({"rest": (0.0, 0.5)}, r"in row \d+ of column 1 \('rest'\) is outside of its bounds 0 and 0.5"),
    ],
)
def test_bounds_that_do_not_fit_are_refused_by_name(bounds, message):
    with pytest.raises(ValueError, match=message):
        described(beside(np.linspace(0, 1, 1500)), NAMES, bounds=bounds)
    with pytest.raises(ValueError, match="so far apart"):
        described(beside(RNG.integers(0, 3, 1500)), NAMES, bounds={1: (0, 1e9)})
    with pytest.raises(ValueError, match="values of its grid"):
        described(beside(RNG.integers(0, 3, 1500)), NAMES, bounds={1: (-0.3, 4.0)})


def test_a_value_that_repeats_at_an_end_of_its_bounds_is_refused():
    x = RNG.beta(2, 2, (1500, 2))
    x[3:18, 1] = 0.0
    with pytest.raises(ValueError, match=r"column 1 repeats at the end 0 of its bounds, in 15 rows such as row 3: .* widen"):
        described(x, bounds={1: (0, 1)})
    x[4:18, 1] = 0.5 + np.arange(14) / 100
    assert described(x, bounds={1: (0, 1)}).intervals == (None, Bounds(0.0, 1.0))


def test_rows_to_validate_with_belong_to_the_range_and_lie_on_the_grid():
    x, held_out = beside(RNG.integers(0, 3, 1500)), beside(np.array([2, 5]), 2)
    assert describe({"train": x, "validation": held_out}, NAMES).intervals[1] == Bounds(-0.5, 5.5)
    with pytest.raises(ValueError, match=r"2.5 in row 0 of the split validation is not on the grid of column 1 \('rest'\)"):
        describe({"train": x, "validation": held_out + np.float32(0.5)}, NAMES)
    with pytest.raises(ValueError, match=r"5 in row 1 of the split validation of column 1"):
        describe({"train": x, "validation": held_out}, NAMES, bounds={1: (0, 4)})
    same = RNG.random((300, 2)).astype(np.float32)
    assert describe({"train": same, "validation": same}).grid is None


def test_booleans_and_categories_keep_to_their_levels_whether_seen_or_not():
    columns = Column("flag", "boolean", "bool"), Column("size", "category", "category", ("S", "M", "L"))
    x = np.stack([RNG.integers(0, 2, 50), 2 * RNG.integers(0, 2, 50)], axis=1).astype(np.float32)
    found = described(x, columns=columns)
    assert found.grid.spacing.tolist() == [1.0, 1.0]
    assert found.intervals == (Bounds(-0.5, 1.5), Bounds(-0.5, 2.5))
    names = Column("name", "category", "str", tuple(map(str, range(400))))
    with pytest.raises(ValueError, match=r"2 rows each .* join some categories of column 0 \('name'\), or drop it"):
        described(np.arange(400.0)[:, None], ["name"], columns=[names])


# --- what has no density ---


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            NORMAL[:, :2] @ [1.0, 1.0],
            r"column 0 \('rent'\), column 1 \('rest'\),.*drop it",
        ),
        (NORMAL[:, 1], r"column 1 \('rest'\),"),
    ],
)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_dependent_columns_are_refused_by_name(columns, message, dtype):
    x = np.stack([NORMAL[:, 0], NORMAL[:, 1], columns], axis=1).astype(dtype)
    with pytest.raises(ValueError, match=r"column 2 \('income'\) is a linear combination of " + message):
        check_density(x, NAMES)
    noise = 1e-3 * np.random.default_rng(0).normal(size=(1500, 3))
    check_density((x + noise).astype(dtype), NAMES)


def test_columns_that_agree_in_most_rows_are_independent():
    x = np.tile(NORMAL, (4, 1))
    x[::3, 2] = x[::3, 0]
    x[:5000, 2] = x[:5000, 0]
    check_density(x, NAMES)


def test_a_sum_with_a_whole_number_is_refused_and_whole_numbers_may_depend_on_each_other():
    counts = RNG.integers(0, 9, 1500)
    x = np.stack([counts, NORMAL[:, 0], NORMAL[:, 0] + counts], axis=1).astype(np.float32)
    with pytest.raises(ValueError, match="column 2 is a linear combination of column 0, column 1,"):
        check_density(x, (), find_grid(x))
    x = np.stack([counts, counts, 9 - counts], axis=1).astype(np.float32)
    check_density(x, (), find_grid(x))


def test_three_different_values_are_no_repeated_ones():
    check_density(np.array([[0.1, 2.0], [0.7, 1.0], [-1.2, 5.0]], np.float32))


def test_one_value_that_many_rows_have_is_refused_or_said():
    spiked = np.where(np.arange(1500) % 5 < 2, 0, NORMAL[:, 2])
    with pytest.raises(ValueError, match=r"40% of column 1 \('rest'\) are 0"):
        check_density(beside(spiked), NAMES)
    rare = np.where(np.arange(1500) % 10 == 0, 0, NORMAL[:, 2])
    [note] = described(beside(rare), NAMES).notes
    assert "though 10% of its values are 0" in note


def test_a_value_beside_which_single_precision_loses_all_others_is_refused_by_row_and_column():
    x = beside(NORMAL[:, 2])
    x[17, 1] = 1e5
    assert check_density(x, NAMES) == []
    x[17, 1] = 1e12
    with pytest.raises(ValueError, match=r"1e\+12 in row 17 of column 1 \('rest'\).* drop the row"):
        check_density(x, NAMES)
