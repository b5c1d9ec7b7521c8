"""Columns of tables: cells, atoms, ends, heavy tails, and what is said of them."""

import numpy as np
import pytest

from iresnet_jax.data.tables import (
    atoms_of,
    choose,
    describe,
    ends_given,
    fit_lines,
    notes_of,
    tails_of,
    values_of,
)

RNG = np.random.default_rng(0)
NAMES = ["rent", "rest", "income"]
NORMAL = RNG.normal(size=(1500, 3))
EPS = float(np.finfo(np.float32).eps)


def described(x, *names, **options):
    return describe({"train": x}, *names, **options)


def lines(x, *names, **options):
    return fit_lines(x, described(x, *names, **options))


def beside(column, num=1500):
    return np.stack([NORMAL[:num, 0], column, NORMAL[:num, 1]], axis=1).astype(np.float32)


FREE = (-np.inf, np.inf)


def ends_of(marginals):
    return list(zip(marginals.low.tolist(), marginals.high.tolist(), strict=True))


def values(column):
    return values_of(np.asarray(column, np.float32).astype(np.float64), EPS)


@pytest.mark.parametrize(
    ("mean", "std", "digits", "num"),
    [(24, 4, 2, 50), (5000, 900, 1, 100_000), (0, 1, 3, 9000), (7, 9, 0, 9)],
)
def test_decimals_lie_on_their_grid_though_float32_rounds_them(mean, std, digits, num):
    x = np.round(np.random.default_rng(0).normal(mean, std, num), digits)
    first, second = values(np.append(x, x.max() + 10.0**-digits))
    assert second - first == pytest.approx(10.0**-digits, rel=1e-6)


def test_a_grid_may_lack_values_and_numbers_of_more_digits_have_none():
    assert np.ptp(values(RNG.choice([0, 4, 10, 14], 1500))) == 2
    assert np.ptp(values(np.tile(np.arange(10_001), 2) / 100)) == pytest.approx(0.01)
    assert np.ptp(values(1e6 * RNG.integers(1, 9, 50))) == 1e6
    assert values(NORMAL[:, 0]) == values(RNG.random(5)) == values(1e-9 * RNG.random(200)) == ()


def test_numbers_that_floats_have_rounded_have_no_grid_of_what_is_left():
    """Seconds since 1970: their floats are multiples of 128, which are no cells."""
    seconds = 1_700_000_000 + RNG.integers(0, 10**6, 1500)
    assert set(np.diff(np.unique(np.float32(seconds))) % 128) == {0}
    assert values(seconds) == ()
    # floats have these, and no noise in their cells
    assert values(2**23 + RNG.integers(0, 10**6, 50_000)) == ()
    assert np.ptp(values(2**23 - 1 - RNG.integers(0, 10**6, 50_000))) == 1


def test_few_values_off_any_grid_own_the_numbers_half_way_to_their_neighbours():
    roots = np.sqrt(RNG.integers(1, 9, 1500))
    np.testing.assert_allclose(values(roots), np.sqrt(np.arange(1, 9)), rtol=1e-6)
    assert values(np.sqrt(np.arange(1500))) == ()


def test_levels_of_booleans_and_categories_exist_whether_seen_or_not():
    x = np.stack(
        [RNG.integers(0, 2, 50), 2 * RNG.integers(0, 2, 50), RNG.integers(0, 2, 50)], axis=1
    ).astype(np.float32)
    found = lines(x, levels=(2, 3, 0))
    assert found.spacing.tolist() == [1.0, 1.0, 1.0]
    assert (found.least.tolist(), found.most.tolist()) == ([0, 0, 0], [1, 2, 1])


def test_a_value_that_many_rows_have_is_an_atom_of_a_continuous_column_and_of_a_rounded_one():
    amounts = np.where(RNG.random(1500) < 0.6, 0, RNG.exponential(10, 1500))
    for x, known in ((amounts, ()), (np.round(amounts, 1), (0.0, 0.1))):
        assert atoms_of(x, known) == [0]
    clipped = np.clip(NORMAL[:, 0], -1.5, 1.5)
    assert set(atoms_of(clipped, ())) == {-1.5, 1.5}
    assert atoms_of(np.full(50, 3.0), (3.0, 4.0)) == []


def test_values_of_counts_and_rare_ties_are_no_atoms():
    for counts in (RNG.poisson(1, 1500), RNG.poisson(20, 1500), RNG.integers(0, 2, 1500)):
        assert atoms_of(counts.astype(float), (0.0, 1.0)) == []
    x = np.array(NORMAL[:, 0])
    x[:5] = x[0]
    assert atoms_of(x, ()) == []


def test_ends_are_those_that_are_given_by_name_or_number_with_all_of_their_cells():
    share = RNG.random(1500)
    table = lines(beside(share), NAMES, bounds={"rest": (0, 2), 2: (-9.0, 9.0)})
    assert ends_of(table) == [FREE, (0.0, 2.0), (-9.0, 9.0)]
    # what was seen is no end
    assert ends_of(lines(beside(RNG.integers(0, 3, 1500)), NAMES)) == [FREE] * 3
    # a data frame's names may be numbers
    assert ends_given({1: (0, 2)}, [1, 0], [0, 0])[1].tolist() == [2.0, np.inf]
    found = lines(beside(RNG.integers(0, 3, 1500)), NAMES, bounds={1: (0, 4)})
    assert ends_of(found)[1] == (-0.5, 4.5)


def test_a_column_may_have_one_end_whose_map_takes_the_median_to_0():
    for bounds, column in (
        ((0, None), RNG.exponential(40, 1500)),
        ((None, 9), 9 - RNG.exponential(40, 1500)),
    ):
        table = lines(beside(column), NAMES, bounds={"rest": bounds})
        assert np.isinf(ends_of(table)[1]).tolist() == [bounds[0] is None, bounds[1] is None]
        line, _ = table.to_line(beside(column), np)
        assert np.median(line[:, 1]) == pytest.approx(0, abs=1e-3)
    counts = lines(beside(RNG.poisson(3, 1500)), NAMES, bounds={"rest": (0, np.inf)})
    assert ends_of(counts)[1] == (-0.5, np.inf)


def test_heavy_tails_are_found_and_light_ones_are_left():
    for heavy in (RNG.standard_cauchy(1500), RNG.standard_t(2, 1500), RNG.lognormal(3, 1.5, 1500)):
        assert tails_of(heavy)[1] > 0
    one_outlier = np.append(NORMAL[:, 0], 1e12)
    assert tails_of(one_outlier)[1] > 0
    for light in (
        NORMAL[:, 0],
        RNG.logistic(size=1500),
        RNG.random(1500),
        RNG.laplace(size=1500),
        RNG.exponential(size=1500),
    ):
        assert tails_of(light)[1] == 0
    assert tails_of(np.concatenate([NORMAL[:, 0], 9 + NORMAL[:, 1]]))[1] == 0


def test_a_line_says_what_each_column_is():
    """Few and frequent numbers are levels; one that another column tells follows it."""
    x = np.stack(
        [
            np.where(NORMAL[:, 2] < 0, 0, 1e3 ** NORMAL[:, 2]),
            RNG.integers(0, 2, 1500),
            np.round(NORMAL[:, 1], 1),
            np.full(1500, 7),
        ],
        axis=1,
    )
    x = np.concatenate([x, 5 * x[:, 1:2], x[:, 2:3]], axis=1).astype(np.float32)
    names = ["pay", "sex", "heat", "one", "grade", "again"]
    kinds = described(x, names)
    low, high = x[:, 2].min(), x[:, 2].max()
    assert tuple(notes_of(x, names, kinds)) == (
        f"pay: numbers, 0 to {x[:, 0].max():g}, often 0.0, heavy tails",
        "sex: 2 levels",
        f"heat: multiples of 0.1, {low:g} to {high:g}",
        "one: always 7",
        "grade: 2 levels",
        "again: a copy of heat",
    )
    parents = [choice.parent for choice in choose(x, kinds)]
    assert parents in ([-1, 4, -1, -1, -1, -1], [-1, -1, -1, -1, 1, -1])
