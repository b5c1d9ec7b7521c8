"""Balls against mpmath's numbers of 60 digits at points of the arguments' balls."""

import mpmath
import numpy as np
import pytest

from iresnet_jax.maths.enclosures import ball_arithmetic
from iresnet_jax.maths.enclosures.ball_arithmetic import LOG_2PI, Ball, joined
from iresnet_jax.maths.enclosures.double_double import DoubleDouble

MP = mpmath.mp.clone()
MP.dps = 60
ONE_ARGUMENT = {
    "exp": (ball_arithmetic.exp, MP.exp),
    "log": (lambda x: ball_arithmetic.log(x * x), lambda t: MP.log(t * t)),
    "softplus": (ball_arithmetic.softplus, lambda t: MP.log1p(MP.exp(t)) if t < 0 else t + MP.log1p(MP.exp(-t))),
    "reciprocal": (Ball.reciprocal, lambda t: 1 / t),
    "negative": (Ball.__neg__, lambda t: -t),
}
TWO_ARGUMENTS = {
    "sum": (Ball.__add__, lambda a, b: a + b),
    "difference": (Ball.__sub__, lambda a, b: a - b),
    "product": (Ball.__mul__, lambda a, b: a * b),
}


def arguments(seed, radius):
    rng = np.random.default_rng(seed)
    size = rng.normal(size=400) * 10.0 ** rng.uniform(-3, 2, 400)
    return Ball(DoubleDouble(size, size * 2.0**-55 * rng.uniform(-1, 1, 400)), np.full(400, radius) * np.abs(size))


def points(ball, side):
    """Points of every ball in 60 digits: the middle and the ends."""
    whole = zip(ball.middle.high, ball.middle.low, ball.radius, strict=True)
    return [MP.mpf(float(h)) + MP.mpf(float(low)) + side * MP.mpf(float(r)) for h, low, r in whole]


def holds(ball, exact):
    """Whether exact numbers are in balls, without tolerance."""
    gaps = [abs(value - middle) for value, middle in zip(exact, points(ball, 0), strict=True)]
    return np.array([gap <= MP.mpf(float(r)) for gap, r in zip(gaps, ball.radius, strict=True)])


@pytest.mark.parametrize("name", ONE_ARGUMENT)
@pytest.mark.parametrize("radius", [0.0, 1e-20, 1e-3])
def test_functions_hold_their_values_at_every_point(name, radius):
    function, exact = ONE_ARGUMENT[name]
    x = arguments(0, radius)
    y = function(x)
    for side in (-1, 0, 1):
        assert holds(y, [exact(t) for t in points(x, side)]).all()
    assert np.all(y.radius <= 1e-21 + 1e3 * radius * (1 + np.abs(y.middle.high)) + 2e-24 * np.abs(y.middle.high))
    if radius and name != "negative":
        too_small = Ball(y.middle, 1e-3 * y.radius)
        assert not holds(too_small, [exact(t) for t in points(x, 1)]).all()


@pytest.mark.parametrize("name", TWO_ARGUMENTS)
@pytest.mark.parametrize("radius", [0.0, 1e-20, 1e-3])
def test_operations_hold_their_values_at_every_corner(name, radius):
    function, exact = TWO_ARGUMENTS[name]
    x, y = arguments(0, radius), arguments(1, 2 * radius)
    z = function(x, y)
    for sides in ((-1, -1), (-1, 1), (1, -1), (1, 1), (0, 0)):
        values = [exact(a, b) for a, b in zip(points(x, sides[0]), points(y, sides[1]), strict=True)]
        assert holds(z, values).all()
        if radius and sides == (1, 1):
            assert not holds(Ball(z.middle, 1e-3 * z.radius), values).all()


def test_sums_and_log_sum_exp_of_many_terms():
    x = arguments(2, 1e-18)
    first = x.map(lambda part: part[:371])
    rows = joined(np.stack, [first, -first])
    whole, values = rows.sum(), points(x, 0)[:371]
    assert holds(whole, [MP.fsum(values), -MP.fsum(values)]).all()
    assert holds(whole, [MP.fsum(points(x, 1)[:371]), -MP.fsum(points(x, 1)[:371])]).all()
    assert np.all(whole.radius < 1e-12)
    logits = ball_arithmetic.log_sum_exp(rows)
    assert np.all(logits.radius < 1e-12)
    for row, sign in enumerate((1, -1)):
        exact = MP.log(MP.fsum([MP.exp(sign * value) for value in values]))
        assert holds(logits.map(lambda part, row=row: part[row : row + 1]), [exact]).all()


@np.errstate(all="ignore")
def test_exponentials_and_logarithms_out_of_range_promise_nothing_false():
    small = ball_arithmetic.exp(Ball.of(np.array([-599.0, -601.0, -1e5])))
    assert holds(small, [MP.exp(t) for t in (-599, -601, -100000)]).all()
    assert np.all(small.radius < 1e-240)
    for unknown in (
        ball_arithmetic.exp(Ball.of(np.array([601.0, np.nan, np.inf]))),
        ball_arithmetic.exp(Ball(DoubleDouble.of(np.zeros(3)), np.array([1.1, np.inf, np.nan]))),
        ball_arithmetic.log(Ball.of(np.array([0.0, -1.0, np.nan]))),
        ball_arithmetic.log(Ball(DoubleDouble.of(np.ones(3)), np.array([1.0, 2.0, np.nan]))),
        Ball(DoubleDouble.of(np.ones(3)), np.array([1.0, 2.0, np.inf])).reciprocal(),
        Ball.of(np.array([1e308, np.inf, np.nan])) * Ball.of(np.array([1e308, 1.0, 1.0])),
    ):
        lower, upper = unknown.bounds()
        assert np.all(np.isneginf(lower))
        assert np.all(np.isposinf(upper))


def test_bounds_are_rounded_outwards_and_tight():
    x = arguments(3, 1e-18)
    lower, upper = x.bounds()
    for side in (-1, 1):
        for point, least, most in zip(points(x, side), lower, upper, strict=True):
            assert MP.mpf(float(least)) <= point <= MP.mpf(float(most))
    assert np.all(upper - lower <= 8 * np.spacing(np.abs(x.middle.high)))


def test_constants_and_joined_balls():
    constant = LOG_2PI.map(np.atleast_1d)
    assert holds(constant, [MP.log(2 * MP.pi)]).all()
    assert constant.radius[0] < 1e-25
    pair = joined(np.stack, [constant, -constant])
    assert pair.middle.high.shape == (2, 1)
    assert pair.middle.high[0, 0] == -pair.middle.high[1, 0]
