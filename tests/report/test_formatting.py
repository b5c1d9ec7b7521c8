"""Numbers written for people: digits follow the uncertainty, units the size."""

import doctest
import math

import numpy as np
import pytest

from iresnet_jax.report import page as formatting


@pytest.mark.parametrize(
    ("mean", "stderr", "text"),
    [
        (3.45178, 0.0123, "3.452 ± 0.012"),
        (3.45178, 0.0996, "3.45 ± 0.10"),  # rounds up into the next digit
        (1234.5, 21.0, "1,234 ± 21"),
        (-0.5, 0.1, "\N{MINUS SIGN}0.50 ± 0.10"),
        (2.0, 0.0, "2.000"),
        (2.0, None, "2.000"),
        (2.0, math.nan, "2.000 ± not a number"),
        (math.inf, 0.1, "∞ ± 0.10"),
        (1.0, 3.2e-12, "1.00000000 ± 3.2 \N{MULTIPLICATION SIGN} 10⁻¹²"),
    ],
)
def test_digits_follow_the_uncertainty(mean, stderr, text):
    assert formatting.uncertain(mean, stderr) == text


def test_numbers_of_any_kind_are_written():
    values = [np.int64(70000), np.float32(0.25), 0.0, -2.5e-9, 123456.0, math.nan, -math.inf, None]
    assert [formatting.number(v, 3) for v in values] == [
        *(
            "70,000",
            "0.250",
            "0",
            "\N{MINUS SIGN}2.50 \N{MULTIPLICATION SIGN} 10⁻⁹",
            "1.23 \N{MULTIPLICATION SIGN} 10⁵",
            "not a number",
            "\N{MINUS SIGN}∞",
            "not recorded",
        )
    ]
    seconds = [2.5e-5, 0.9994, 59.94, 59.96, 3599.9, 360000.0, None]
    assert [formatting.duration(s) for s in seconds] == [
        *("25.0 µs", "999 ms", "59.9 s", "1 min 0 s", "1 h 0 min", "100 h 0 min", "not recorded")
    ]


def test_the_examples_of_the_documentation_run():
    failed, attempted = doctest.testmod(formatting)
    assert attempted == 4
    assert not failed
