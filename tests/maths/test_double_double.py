"""Double-double arithmetic against decimal numbers, and exact products against fractions."""

import decimal
import operator
from fractions import Fraction

import numpy as np
import pytest

from iresnet_jax.maths.activations import ACTIVATIONS
from iresnet_jax.maths.double_double import (
    ACTIVATION_ERROR,
    LOG2,
    SLOPE_ERROR,
    UNIT,
    DoubleDouble,
    Sliced,
    activate,
    exp,
    log,
    product,
)

CONTEXT = decimal.Context(prec=60)
Decimal = decimal.Decimal


@pytest.fixture(autouse=True)
def digits():
    with decimal.localcontext(CONTEXT):
        yield


def numbers(num, seed=0, largest=100.0):
    """Double-doubles of all sizes and both signs, with low parts."""
    rng = np.random.default_rng(seed)
    high = largest * rng.uniform(-1, 1, num) * 10.0 ** rng.uniform(-6, 0, num)
    return DoubleDouble(high, high * 2.0**-54 * rng.uniform(-1, 1, num))


def exact(x):
    """The decimal numbers that double-doubles are."""
    pairs = zip(np.ravel(x.high), np.ravel(x.low), strict=True)
    return [Decimal(float(high)) + Decimal(float(low)) for high, low in pairs]


def worst(found, wanted, relative_to):
    return max(
        float(abs(value - reference) / size)
        for value, reference, size in zip(exact(found), wanted, relative_to, strict=True)
    )


def test_sums_products_and_functions_against_decimal_numbers():
    a, b, x = numbers(200, 1), numbers(200, 2), numbers(200, largest=600.0)
    for function in (operator.add, operator.sub, operator.mul):
        wanted = list(map(function, exact(a), exact(b)))
        assert worst(function(a, b), wanted, map(abs, wanted)) <= UNIT
    for function, right in ((exp, Decimal.exp), (DoubleDouble.reciprocal, lambda v: 1 / v)):
        wanted = list(map(right, exact(x)))
        assert worst(function(x), wanted, map(abs, wanted)) <= UNIT


def test_logarithm_against_decimal_numbers():
    x = numbers(200)
    x = DoubleDouble(np.abs(x.high), np.sign(x.high) * x.low)
    wanted = [value.ln() for value in exact(x)]
    assert worst(log(x), wanted, [max(1, abs(v)) for v in wanted]) <= UNIT
    assert worst(LOG2, [Decimal(2).ln()], [1]) <= UNIT


def test_a_wrong_logarithm_of_the_platform_gives_nan(monkeypatch):
    right = np.log
    monkeypatch.setattr("iresnet_jax.maths.double_double.np.log", lambda x: right(x) + 1e-12)
    assert np.isnan(log(DoubleDouble.of(2.0)).high)


def test_arguments_out_of_range_become_the_nearest_in_it():
    found = exp(DoubleDouble.of(np.array([-1e5, 1e5])))
    wanted = [Decimal(-600).exp(), Decimal(600).exp()]
    assert worst(found, wanted, wanted) <= UNIT


def reference(name, t, b):
    """Value and slope of an activation at one decimal number."""
    one = Decimal(1)
    sigmoid = one / (one + (-t).exp())
    swish = t * b
    s = one / (one + (-swish).exp())
    lipswish, clipswish = Decimal("1.1"), Decimal("1.1") * Decimal("1.004")
    slope = s + swish * s * (one - s)
    squashed = one / (one + (-4 * t).exp())
    twice = one / (one + (-2 * t).exp())
    return {
        "elu": [(t, one) if t > 0 else (t.exp() - one, t.exp())],
        "softplus": [((one + t.exp()).ln(), sigmoid)],
        "softplus4": [((one + (4 * t).exp()).ln() / 4, squashed)],
        "tanh": [(2 * twice - one, 4 * twice * (one - twice))],
        "relu": [(t, one) if t > 0 else (Decimal(0), Decimal(0))],
        "identity": [(t, one)],
        "lipswish": [(t * s / lipswish, slope / lipswish)],
        "clipswish": [
            (t * s / clipswish, slope / clipswish),
            (-t * (one - s) / clipswish, (slope - one) / clipswish),
        ],
    }[name]


@pytest.mark.parametrize("name", [name for name, entry in ACTIVATIONS.items() if entry.elementwise])
def test_activations_and_slopes_against_decimal_numbers(name):
    x, sharpness = numbers(60), 3.7
    values, slopes = activate(
        name,
        x.map(lambda part: part[:, None]),
        DoubleDouble.of(sharpness) if ACTIVATIONS[name].initial_beta else None,
    )
    for i, t in enumerate(exact(x)):
        wanted = reference(name, t, Decimal(sharpness))
        found = exact(values.map(lambda part, i=i: part[i]))
        assert len(found) == len(wanted)
        for value, slope, (right, right_slope) in zip(found, slopes[i], wanted, strict=True):
            assert abs(value - right) <= Decimal(ACTIVATION_ERROR) * (1 + abs(t))
            assert abs(Decimal(float(slope)) - right_slope) <= Decimal(SLOPE_ERROR)


def test_products_are_within_their_bound_of_fractions():
    rng = np.random.default_rng(0)
    high = rng.normal(size=(2, 3, 5, 37)) * 10.0 ** rng.uniform(-8, 0, (2, 3, 5, 37))
    x = DoubleDouble(high, high * 2.0**-55)
    # some entries are cut off
    kernel = rng.normal(size=(2, 37, 4)) * 10.0 ** rng.uniform(-25, 0, (2, 37, 4))
    found, bound = product(
        x, Sliced.of(kernel), lambda left, right: np.einsum("kibpn,knm->kibpm", left, right)
    )
    largest = 0.0
    for k, b, p, m in np.ndindex(2, 3, 5, 4):
        entries = zip(x.high[k, b, p], x.low[k, b, p], kernel[k, :, m], strict=True)
        wanted = sum((Fraction(u) + Fraction(v)) * Fraction(w) for u, v, w in entries)
        error = abs(Fraction(found.high[k, b, p, m]) + Fraction(found.low[k, b, p, m]) - wanted)
        assert error <= Fraction(bound[k, b, m])
        largest = max(largest, float(error / Fraction(bound[k, b, m])))
    assert largest > 1e-4  # the bound is not out of all proportion
    assert bound.max() <= 2.0**-60 * np.abs(high).max()


def test_products_of_slices_do_not_depend_on_the_order_of_sums():
    rng = np.random.default_rng(1)
    x, kernel = (
        DoubleDouble.of(rng.normal(size=(1, 1, 2, 300))),
        Sliced.of(rng.normal(size=(1, 300, 3))),
    )
    order = rng.permutation(300)

    def shuffled(left, right):
        return np.cumsum(left[..., order, None] * right[:, None, None, None, order], axis=-2)[
            ..., -1, :
        ]

    one, _ = product(x, kernel, lambda left, right: np.einsum("kibpn,knm->kibpm", left, right))
    other, _ = product(x, kernel, shuffled)
    np.testing.assert_array_equal(one, other)
