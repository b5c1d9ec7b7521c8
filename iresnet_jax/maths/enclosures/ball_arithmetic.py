r"""Arithmetic with guaranteed errors on the host: numbers are balls with a double-double middle (van der Hoeven 2009).

Whatever real numbers lie in the balls of the arguments, the result lies in the ball of the result. Radii are float64 and
rounded up. Where nothing is known any more, as behind a logarithm of a ball that reaches 0, the radius is infinite or no
number, and `Ball.bounds` gives the whole line. NumPy computes it; no elementary function of the platform is trusted, see
`double_double`.
"""

from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np

from iresnet_jax.maths.enclosures import double_double, precise_activations
from iresnet_jax.maths.enclosures.double_double import LARGEST_EXPONENT, UNIT, DoubleDouble
from iresnet_jax.maths.enclosures.upward_rounding import UP

Array = Any  # float64 arrays of NumPy
_TINY = 1e-250  # more than what the underflow of a product or an exponential may lose
_MOST_LEVELS = 64  # of a sum by halves


class Ball(NamedTuple):
    """All numbers within ``radius`` of ``middle``.

    Attributes:
        middle: The middle.
        radius: Guaranteed distance from it, at least 0, of the same shape.
    """

    middle: DoubleDouble
    radius: Array

    @classmethod
    def of(cls, value: "Ball | Array | float") -> "Ball":
        """Float64 numbers, exactly; a ball as it is."""
        if isinstance(value, cls):
            return value
        middle = DoubleDouble.of(value)
        return cls(middle, np.zeros_like(middle.high))

    @classmethod
    def rational(cls, values: Sequence[Fraction]) -> "Ball":
        """A vector of rational numbers."""
        parts = [DoubleDouble.constant(value) for value in values]
        middle = DoubleDouble(*(np.array([getattr(part, name) for part in parts]) for name in ("high", "low")))
        return cls(middle, UNIT * np.abs(middle.high) + _TINY)

    def __neg__(self) -> "Ball":
        return Ball(-self.middle, self.radius)

    def __add__(self, other: "Ball") -> "Ball":
        middle = self.middle + other.middle
        return Ball(middle, (self.radius + other.radius + UNIT * np.abs(middle.high)) * UP)

    def __sub__(self, other: "Ball") -> "Ball":
        return self + -other

    def __mul__(self, other: "Ball") -> "Ball":
        middle = self.middle * other.middle
        mixed = np.abs(self.middle.high) * other.radius + np.abs(other.middle.high) * self.radius
        return Ball(middle, (mixed + self.radius * other.radius + UNIT * np.abs(middle.high)) * UP + _TINY)

    def reciprocal(self) -> "Ball":
        """``1 / x``; unknown for a ball that reaches 0."""
        middle, size = self.middle.reciprocal(), np.abs(self.middle.high) / UP
        away = np.where(self.radius < size, (size - self.radius) / UP, 0)
        return Ball(middle, (self.radius / (size * away) + UNIT / size) * UP + _TINY)

    def widened(self, error: Array) -> "Ball":
        """The ball with a larger radius."""
        return Ball(self.middle, (self.radius + error) * UP)

    def map(self, function) -> "Ball":
        """The same function of arrays on all parts, such as a reshape."""
        return Ball(self.middle.map(function), function(self.radius))

    def sum(self) -> "Ball":
        """The sum over the last axis, by halves: each level of sums errs by `UNIT` times the sum of absolute values at most."""
        parts = self.middle.map(lambda part: np.moveaxis(part, -1, 0))
        size = np.sum(np.abs(parts.high), axis=0) * UP
        while len(parts.high) > 1:
            half = len(parts.high) // 2
            first, second, rest = (
                parts.map(lambda part, chosen=chosen: part[chosen])
                for chosen in (slice(half), slice(half, 2 * half), slice(2 * half, None))
            )
            parts = DoubleDouble(*(np.concatenate(pair) for pair in zip(first + second, rest, strict=True)))
        return Ball(parts.map(lambda part: part[0]), (np.sum(self.radius, axis=-1) + _MOST_LEVELS * UNIT * size) * UP)

    def bounds(self) -> tuple[Array, Array]:
        """Float64 numbers that no number of the ball is below, and none above."""
        gap = (self.radius + np.abs(self.middle.low)) * UP
        known = np.isfinite(self.middle.high) & np.isfinite(gap)
        lower, upper = np.nextafter(self.middle.high - gap, -np.inf), np.nextafter(self.middle.high + gap, np.inf)
        return np.where(known, lower, -np.inf), np.where(known, upper, np.inf)


def where(condition: Array, x: Ball, y: Ball) -> Ball:
    """``numpy.where`` on all parts."""
    return Ball(double_double.where(condition, x.middle, y.middle), np.where(condition, x.radius, y.radius))


def joined(function: Callable[[list[Array]], Array], balls: Sequence[Ball]) -> Ball:
    """All parts of some balls by a function of lists, such as ``numpy.stack`` and ``numpy.concatenate``."""
    high, low = (function([getattr(ball.middle, name) for ball in balls]) for name in ("high", "low"))
    return Ball(DoubleDouble(high, low), function([ball.radius for ball in balls]))


def exp(x: Ball) -> Ball:
    r"""``e^x``: ``|e^(m + t) - e^m| <= e^m (r + r^2)`` for ``|t| <= r <= 1``; unknown for larger radii and for ``m > 600``.

    Below -600 the result is 0 within ``1e-250``, which ``e^-599`` is less than; so is that of a larger ball which ends there.
    """
    middle, r = double_double.exp(x.middle), x.radius
    small = x.middle.high < -LARGEST_EXPONENT
    middle = double_double.where(small, DoubleDouble.of(np.zeros_like(middle.high)), middle)
    known = (r <= 1) & (x.middle.high <= LARGEST_EXPONENT)
    error = np.where(known, np.abs(middle.high) * (r + r * r + UNIT) * UP + _TINY, np.inf)
    return Ball(middle, np.where(x.middle.high + r < -LARGEST_EXPONENT, _TINY, error))


def log(x: Ball) -> Ball:
    """``log x``: ``|log(m + t) - log m| <= r / (m - r)`` for ``|t| <= r < m``; unknown for a ball that reaches 0."""
    middle, least = double_double.log(x.middle), x.middle.high / UP
    known = x.radius < least
    slope = 1 / np.where(known, (least - x.radius) / UP, 0)
    return Ball(middle, np.where(known, (x.radius * slope + UNIT * np.maximum(1, np.abs(middle.high))) * UP, np.inf))


def softplus(x: Ball) -> Ball:
    """``log(1 + e^x)``, whose slope is between 0 and 1."""
    middle = precise_activations.softplus(x.middle)
    return Ball(middle, (x.radius + precise_activations.ERROR * (1 + np.abs(x.middle.high))) * UP)


def log_sum_exp(x: Ball) -> Ball:
    """``log sum e^x`` over the last axis."""
    largest = Ball.of(np.max(x.middle.high, axis=-1))
    return log(exp(x - largest.map(lambda part: part[..., None])).sum()) + largest


def _arctan_of_reciprocal(n: int) -> Fraction:
    return sum((Fraction((-1) ** k, (2 * k + 1) * n ** (2 * k + 1)) for k in range(40)), Fraction(0))


# log(2 pi), with pi = 16 arctan(1/5) - 4 arctan(1/239) (Machin) to 1e-56
LOG_2PI = log(Ball.rational([2 * (16 * _arctan_of_reciprocal(5) - 4 * _arctan_of_reciprocal(239))])).map(lambda part: part[0])
