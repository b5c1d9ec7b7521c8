"""Columns of tables: grids of whole numbers, intervals, hard ends, and what has no density, each by name."""

import numpy as np
import pytest

from iresnet_jax.bijections.transforms.bounded import Bounds
from iresnet_jax.data.tables import FarValueWarning, Table, check_density, ends_given, find_ends, find_grid

RNG = np.random.default_rng(0)
NAMES = ["rent", "rest", "income"]
NORMAL = RNG.normal(size=(1500, 3))


def beside(column, num=1500):
    return np.stack([NORMAL[:num, 0], column, NORMAL[:num, 1]], axis=1).astype(np.float32)


# --- grids and intervals ---


def test_whole_numbers_lie_on_a_grid_by_their_type_and_keep_to_what_was_seen():
    ages = RNG.integers(18, 91, 100)
    x = beside(ages, 100)
    assert find_grid(x) is None  # hardly two examples for a value
    few = Table(whole=True).described(np.stack([ages, 2 * RNG.integers(0, 2, 100)], axis=1).astype(np.float32))
    assert few.grid.spacing == (1.0, 2.0)
    assert few.intervals == (Bounds.of(ages.min() - 0.5, ages.max() + 0.5, 1.0), Bounds.of(-1.0, 3.0, 2.0))
    assert "18 to 90 in steps of 1" in few.notes[0]


def test_a_grid_of_whole_numbers_may_lack_values():
    x = beside(RNG.choice([0, 4, 10, 14], 1500))
    assert find_grid(x).spacing[1] == 2


@pytest.mark.parametrize(
    ("mean", "std", "digits", "num"), [(170, 10, 1, 5000), (24, 4, 2, 5000), (5000, 900, 1, 100_000), (0, 1, 3, 9000)]
)
def test_decimals_lie_on_their_grid_though_float32_rounds_them(mean, std, digits, num):
    x = np.round(np.random.default_rng(0).normal(mean, std, (num, 1)), digits).astype(np.float32)
    x = np.append(x, [[x.max() + 1000 * 10.0**-digits]] * 2, axis=0).astype(np.float32)  # far from all others, but on the grid
    table = Table().described(x)
    assert table.grid.spacing[0] == pytest.approx(10.0**-digits, rel=1e-6)
    assert not table.grid.off(x).any()


def test_so_they_do_where_each_is_taken():
    percentages = np.tile(np.arange(10_001), 2)[:, None].astype(np.float32) / np.float32(100)
    grid = find_grid(percentages)
    assert grid.spacing[0] == pytest.approx(0.01, rel=1e-7)
    assert not grid.off(percentages).any()


def test_given_bounds_are_by_name_or_number_and_replace_hard_ends():
    share = RNG.random(1500)
    table = Table(bounds={"rest": (0, 2), 2: (-9.0, 9.0)}).described(beside(share), NAMES)
    assert table.intervals == (None, Bounds.of(0.0, 2.0), Bounds.of(-9.0, 9.0))
    assert Table(bounds={}).described(beside(share), NAMES).intervals is None
    assert ends_given({1: (0, 2)}, ["1", "0"], 2) == {0: (0.0, 2.0)}  # columns of a data frame may be called by numbers
    wider = Table(bounds={1: (0, 4)}).described(beside(RNG.integers(0, 3, 1500)), NAMES)
    assert wider.intervals[1] == Bounds.of(-0.5, 4.5, 1.0)


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ({"rset": (0, 1)}, r"columns 0 to 2, by the names 'rent', 'rest', 'income', got 'rset'"),
        ({3: (0, 1)}, "columns 0 to 2"),
        ([(0, 1)], "must be a dictionary"),
        ({"rest": 1.0}, "two numbers"),
        ({"rest": (1, 0)}, "the lower one first"),
        ({"rest": (0, float("inf"))}, "finite"),
        ({"rest": (0, 1e12)}, r"bounds 0 and 1e\+12 of column 1 \('rest'\) are so far apart"),
        ({"rest": (0.0, 0.5)}, r"in row \d+ of column 1 \('rest'\) is outside of its bounds 0 and 0.5"),
    ],
)
def test_bounds_that_do_not_fit_are_refused_by_name(bounds, message):
    with pytest.raises(ValueError, match=message):
        Table(bounds=bounds).described(beside(np.linspace(0, 1, 1500)), NAMES)
    with pytest.raises(ValueError, match="so far apart"):
        Table(bounds={1: (0, 1e9)}).described(beside(RNG.integers(0, 3, 1500)), NAMES)
    with pytest.raises(ValueError, match="values of its grid"):
        Table(bounds={1: (-0.3, 4.0)}).described(beside(RNG.integers(0, 3, 1500)), NAMES)


def test_rows_to_validate_with_belong_to_the_range_and_lie_on_the_grid():
    x, held_out = beside(RNG.integers(0, 3, 1500)), beside(np.array([2, 5]), 2)
    assert Table().described(x, NAMES, held_out).intervals[1] == Bounds.of(-0.5, 5.5, 1.0)
    with pytest.raises(ValueError, match=r"2.5 in validation row 0 is not on the grid of column 1 \('rest'\)"):
        Table().described(x, NAMES, held_out + np.float32(0.5))
    with pytest.raises(ValueError, match=r"5 in validation row 1 of column 1"):
        Table(bounds={1: (0, 4)}).described(x, NAMES, held_out)
    same = RNG.random((300, 2)).astype(np.float32)
    assert Table().described(same, (), same).grid is None


# --- hard ends ---

TAILS = {
    "normal": lambda rng, n: rng.normal(size=n),
    "exponential": lambda rng, n: rng.exponential(size=n),
    "half normal": lambda rng, n: np.abs(rng.normal(size=n)),
    "t(3)": lambda rng, n: rng.standard_t(3, size=n),
    "logistic": lambda rng, n: rng.logistic(size=n),
    "blobs": lambda rng, n: rng.choice([-4, -1, 0, 2, 5], n) + 0.3 * rng.normal(size=n),
    "rare blobs": lambda rng, n: rng.choice([-4, 0, 5], n, p=[0.08, 0.85, 0.07]) + 0.2 * rng.normal(size=n),
}


@pytest.mark.parametrize("num", [200, 1500, 5000])
@pytest.mark.parametrize("name", TAILS)
def test_smooth_tails_are_no_hard_ends(name, num):
    x = np.stack([TAILS[name](np.random.default_rng(seed), num) for seed in range(20)], axis=1)
    assert find_ends(x, None) == {}


@pytest.mark.parametrize("num", [1500, 20_000])
def test_the_ends_of_uniform_numbers_are_found_and_rounded(num):
    rng = np.random.default_rng(num)
    x = np.stack([rng.random(num), rng.uniform(-20, 50, num), rng.uniform(-np.sqrt(3), np.sqrt(3), num)], axis=1)
    found = find_ends(x, None)
    assert found[0] == (0.0, 1.0)
    assert found[1] == (-20.0, 50.0)
    low, high = found[2]
    assert -1.85 < low < -np.sqrt(3)
    assert np.sqrt(3) < high < 1.85
    assert "[0, 1]; bounds={}" in Table().described(x.astype(np.float32)).notes[0]


def test_rows_to_validate_with_beyond_an_end_show_that_it_is_none():
    table = Table().described(beside(RNG.random(1500)), NAMES, beside(np.array([9.0, 0.5]), 2))
    assert table.intervals is None


def test_a_triangle_has_ends_where_its_density_is_0():
    x = np.sqrt(np.random.default_rng(0).random((20_000, 1)))
    assert find_ends(x, None) == {0: (0.0, 1.0)}


# --- what has no density ---


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (NORMAL[:, :2] @ [1.0, 1.0], r"column 2 \('income'\) - column 0 \('rent'\) - column 1 \('rest'\) is constant"),
        (NORMAL[:, 1], r"column 2 \('income'\) - column 1 \('rest'\) is constant"),
        (1e3 - 0.5 * NORMAL[:, 0], r"column 2 \('income'\) \+ 0.5 x column 0 \('rent'\) is constant"),
    ],
)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_dependent_columns_are_refused_with_the_combination(columns, message, dtype):
    x = np.stack([NORMAL[:, 0], NORMAL[:, 1], columns], axis=1).astype(dtype)
    with pytest.raises(ValueError, match=message):
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
    with pytest.raises(ValueError, match=r"column 2 - column 0 - column 1 is constant"):
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
    [note] = Table().described(beside(rare), NAMES).notes
    assert "though 10% of its values are 0" in note


def test_a_value_far_from_all_others_is_said_or_refused_by_row_and_column():
    x = beside(NORMAL[:, 2])
    x[17, 1] = 1e5
    with pytest.warns(FarValueWarning, match=r"100000 in row 17 of column 1 \('rest'\)"):
        check_density(x, NAMES)
    x[17, 1] = 1e12
    with pytest.raises(ValueError, match=r"1e\+12 in row 17 of column 1 \('rest'\).* drop the row"):
        check_density(x, NAMES)
