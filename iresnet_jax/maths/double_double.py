r"""Arithmetic of about 100 bits on the host: a number is the unevaluated sum of two float64 numbers
(Dekker 1971).

It measures residuals that float64 would round away. NumPy computes it, one IEEE operation after the
other: a compiler that fuses a product into a sum would break the error terms. No elementary
function of the platform is trusted: `exp` and `log` are made of sums and products, and what
`numpy.log` contributes is a first guess that is verified.

Numbers are pairs ``(high, low)`` of arrays with ``|low| <= ulp(high) / 2``. Sums and products err
by a few units of ``2^-104`` of their result (Joldes et al. 2017); `UNIT`, ``2^-90``, bounds the
relative error of every function in this file with a wide margin.

Activations are the formulas in the docstrings of `activations`, with 1.1 and 1.004 as decimal
numbers. Values err by at most ``ACTIVATION_ERROR (1 + |x|)``, slopes by at most ``SLOPE_ERROR``.

Products of matrices have about 80 bits, from products of float64 that are exact (Ozaki et al.
2012). Both factors are cut into slices of few bits on one grid each. Sums of products of slices fit
53 bits, whatever the order in which a library adds them up, and only the sum over pairs of slices
rounds. Grids are relative to the largest entry, and so is the bound of what is left out.
"""

import functools
import math
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from iresnet_jax.maths.upward_rounding import UP

Array = Any  # float64 arrays of NumPy, and its float64 scalars
UNIT = 2.0**-90  # relative error of any function in this file is at most this
# Largest absolute argument of `exp`; beyond it, low parts leave float64's range.
LARGEST_EXPONENT = 600.0

_LEFT, _RIGHT = 4, 3  # slices of the left and of the right factor of a product of matrices
_HALVINGS = 10  # of the argument of exp's series, after which it is at most 0.00034


class DoubleDouble(NamedTuple):
    """The unevaluated sum ``high + low``.

    Attributes:
        high: The number rounded to float64.
        low: The rest.
    """

    high: Array
    low: Array

    @classmethod
    def of(cls, value: Array | float) -> "DoubleDouble":
        """A float64 array, exactly."""
        high = np.asarray(value, np.float64)
        return cls(high, np.zeros_like(high))

    @classmethod
    def constant(cls, value: Fraction) -> "DoubleDouble":
        """A rational number, to 2^-106 of it."""
        high = float(value)
        return cls(np.asarray(high), np.asarray(float(value - Fraction(high))))

    def __neg__(self) -> "DoubleDouble":
        return DoubleDouble(-self.high, -self.low)

    def __add__(self, other: "DoubleDouble") -> "DoubleDouble":
        high, error = two_sum(self.high, other.high)
        low, low_error = two_sum(self.low, other.low)
        high, error = _fast_two_sum(high, error + low)
        return DoubleDouble(*_fast_two_sum(high, error + low_error))

    def __sub__(self, other: "DoubleDouble") -> "DoubleDouble":
        return self + -other

    def __mul__(self, other: "DoubleDouble") -> "DoubleDouble":
        high, error = _two_prod(self.high, other.high)
        return DoubleDouble(
            *_fast_two_sum(high, error + (self.high * other.low + self.low * other.high))
        )

    def times(self, factor: float) -> "DoubleDouble":
        """The product with a power of two, exactly."""
        return DoubleDouble(self.high * factor, self.low * factor)

    def reciprocal(self) -> "DoubleDouble":
        """``1 / x``: a Newton step from the quotient of float64."""
        guess = DoubleDouble.of(1 / self.high)
        return guess + guess * (DoubleDouble.of(1.0) - self * guess)

    def map(self, function) -> "DoubleDouble":
        """The same function of arrays on both parts, such as a reshape."""
        return DoubleDouble(function(self.high), function(self.low))


def where(condition: Array, x: DoubleDouble, y: DoubleDouble) -> DoubleDouble:
    """``numpy.where`` on both parts."""
    return DoubleDouble(np.where(condition, x.high, y.high), np.where(condition, x.low, y.low))


def two_sum(a: Array, b: Array) -> tuple[Array, Array]:
    """``a + b`` as its rounded value and the exact rest (Knuth)."""
    s = a + b
    t = s - a
    return s, (a - (s - t)) + (b - t)


def _fast_two_sum(a: Array, b: Array) -> tuple[Array, Array]:
    """`two_sum` for ``|a| >= |b|``."""
    s = a + b
    return s, b - (s - a)


def _split(a: Array) -> tuple[Array, Array]:
    """``a`` as two numbers of 26 bits each (Veltkamp)."""
    c = 134217729.0 * a  # 2^27 + 1
    high = c - (c - a)
    return high, a - high


def _two_prod(a: Array, b: Array) -> tuple[Array, Array]:
    """``a b`` as its rounded value and the exact rest (Dekker)."""
    p = a * b
    (a1, a2), (b1, b2) = _split(a), _split(b)
    return p, a2 * b2 - (((p - a1 * b1) - a2 * b1) - a1 * b2)


# log 2 = -log(1 - 1/2), from the series of 2 atanh(1/3) in rational arithmetic.
LOG2 = DoubleDouble.constant(
    sum((2 * Fraction(1, 3) ** (2 * k + 1) / (2 * k + 1) for k in range(40)), Fraction(0))
)


def exp(x: DoubleDouble) -> DoubleDouble:
    r"""``e^x`` for ``|x| <= 600``.

    ``x = k log 2 + 2^10 r`` with ``|r| <= 0.00034``. ``e^r - 1`` is ``r + r^2/2 + r^3/6`` and a
    rest below ``2^-39`` of it, for which float64 is precise enough; then ``e^2r - 1 = 2 (e^r - 1) +
    (e^r - 1)^2`` ten times. Arguments out of range become the nearest one in it.
    """
    inside = np.abs(x.high) <= LARGEST_EXPONENT
    x = where(inside, x, DoubleDouble.of(np.clip(x.high, -LARGEST_EXPONENT, LARGEST_EXPONENT)))
    k = np.rint(x.high / math.log(2))
    r = (x - LOG2 * DoubleDouble.of(k)).times(2.0**-_HALVINGS)
    h = r.high
    rest = h * h * h * h * (1 / 24 + h * (1 / 120 + h * (1 / 720 + h * (1 / 5040 + h / 40320))))
    square = r * r
    m = (
        r
        + square.times(0.5)
        + square * r * DoubleDouble.constant(Fraction(1, 6))
        + DoubleDouble.of(rest)
    )
    for _ in range(_HALVINGS):
        m = m.times(2.0) + m * m
    k = k.astype(np.int64)
    return (DoubleDouble.of(1.0) + m).map(lambda part: np.ldexp(part, k))


def log(x: DoubleDouble) -> DoubleDouble:
    """``log x`` of positive numbers, to `UNIT` of ``max(1, |log x|)``: a Newton step ``y + (x e^-y
    - 1)`` from float64's guess.

    The step's error is half the square of its size, and the size is checked: if the platform's
    logarithm errs by more than ``2^-46``, the result is NaN.
    """
    guess = np.log(x.high)
    step = x * exp(DoubleDouble.of(-guess)) - DoubleDouble.of(1.0)
    trusted = np.abs(step.high) <= 2.0**-46
    return DoubleDouble.of(np.where(trusted, guess, np.nan)) + step


class Sliced(NamedTuple):
    """Kernels of linear maps, one for each entry of the leading axis, with outputs on the last.

    Attributes:
        slices: Three slices, the largest first.
        largest: For each output, a power of two that no entry of its kernel exceeds.
        rest: For each output, the largest entry that the slices leave out; 0 for float32 kernels
            without tiny entries.
        num_terms: Terms of the sum for an output.
    """

    slices: tuple[Float[Array, "k ... m"], ...]
    largest: Float[Array, "k m"]
    rest: Float[Array, "k m"]
    num_terms: int

    @classmethod
    def of(cls, kernel: Float[Array, "k ... m"]) -> "Sliced":
        """Slices of kernels, on one grid per output."""
        axes, num_terms = tuple(range(1, kernel.ndim - 1)), math.prod(kernel.shape[1:-1])
        largest = _power_of_two(np.max(np.abs(kernel), axis=axes, keepdims=True, initial=0))
        *slices, (_, rest) = _cut(DoubleDouble.of(kernel), largest, _bits(num_terms), _RIGHT)
        shape = (len(kernel), kernel.shape[-1])
        left_out = np.max(np.abs(rest.high), axis=axes, initial=0)
        return cls(
            tuple(part for part, _ in slices),
            largest.reshape(shape),
            left_out.reshape(shape),
            num_terms,
        )


def product(
    x: DoubleDouble, kernel: Sliced, apply: Callable[[Array, Array], Any]
) -> tuple[DoubleDouble, Float[Array, "k b m"]]:
    r"""``W x`` of double-double inputs ``(k, b, ...)``, and a bound of the error of each entry, by
    output.

    With ``beta`` bits per slice, the entries behind the first ``i`` slices are at most ``2^(-i beta
    - 1)`` times the largest one. Pairs ``(i, j)`` of slices with ``i + j <= 5`` are multiplied:
    nine products of float64. Those left out are the tail behind four slices of ``x`` with the first
    one of ``W``, behind three with the second, and behind two with the third. Together they are at
    most ``(1/2 + 1/4 + 1/4) 2^(-4 beta)`` of the product of the largest entries, for each of ``n``
    terms.

    Args:
        x: Inputs.
        kernel: The linear maps.
        apply: ``(inputs (k, i, b, ...), kernels (k, ...)) -> outputs (k, i, b, ..., m)``, the
            linear maps in float64. Every output is a sum of at most ``num_terms`` products; as all
            partial sums are exact, their order is free.
    """
    beta = _bits(kernel.num_terms)
    scale = _power_of_two(
        np.max(np.abs(x.high), axis=tuple(range(2, x.high.ndim)), keepdims=True, initial=0)
    )
    left = np.stack([part for part, _ in list(_cut(x, scale, beta, _LEFT))[:_LEFT]], axis=1)
    parts = [
        np.asarray(apply(left[:, : _LEFT - j], right)) for j, right in enumerate(kernel.slices)
    ]
    total = None
    for size in range(_LEFT):
        for j in range(min(size + 1, _RIGHT)):
            part = DoubleDouble.of(parts[j][:, size - j])
            total = part if total is None else total + part
    assert total is not None
    left_out = kernel.largest * (2.0 ** (-4 * beta) + 16 * UNIT) + kernel.rest
    return total, kernel.num_terms * scale.reshape(*scale.shape[:2], 1) * left_out[:, None] * UP


def _bits(num_terms: int) -> int:
    """Bits of a slice: sums of ``n`` products of integers up to ``2^beta`` stay within ``2^53``."""
    return (53 - int(np.ceil(np.log2(max(num_terms, 1))))) // 2


def _cut(
    x: DoubleDouble, scale: Array, bits: int, num: int
) -> Iterator[tuple[Array, DoubleDouble]]:
    """Pairs of a slice of ``x`` and what remains behind it; last, a zero slice and the rest. ``|x|
    <= scale``, a power of two.
    """
    rest = x
    for i in range(1, num + 1):
        grid = scale * 2.0 ** (-bits * i)
        part = np.rint(rest.high / grid) * grid
        rest = DoubleDouble(*two_sum(rest.high - part, rest.low))
        yield part, rest
    yield np.zeros(()), rest


def _power_of_two(x: Array) -> Array:
    """The least power of two that is at least ``x``; 1 for 0, infinity and NaN."""
    mantissa, exponent = np.frexp(np.where((x > 0) & np.isfinite(x), x, 1.0))
    return np.ldexp(1.0, exponent - (mantissa == 0.5)).astype(np.float64)


# ----------------------------------------------------------------------- activations

Value = tuple[DoubleDouble, Array]

ACTIVATION_ERROR = 2.0**-80  # of values, relative to 1 + |x|
SLOPE_ERROR = 2.0**-48

_ZERO, _ONE = DoubleDouble.of(0.0), DoubleDouble.of(1.0)
_LIPSWISH, _CLIPSWISH = Fraction(10, 11), Fraction(10, 11) / Fraction(1004, 1000)


def softplus(x: DoubleDouble) -> DoubleDouble:
    """``max(x, 0) + log(1 + e^-|x|)``."""
    size = where(x.high < 0, -x, x)
    return where(x.high > 0, x, _ZERO) + log(_ONE + exp(-size))


def sigmoid(x: DoubleDouble) -> DoubleDouble:
    """``1 / (1 + e^-x)``, from ``e^-|x|``."""
    decay = exp(where(x.high < 0, x, -x))
    quotient = (_ONE + decay).reciprocal()
    return where(x.high < 0, decay * quotient, quotient)


def _elu(x: DoubleDouble, _: None) -> Value:
    growth = exp(where(x.high < 0, x, _ZERO))
    return where(x.high < 0, growth - _ONE, x), growth.high


def _softplus(x: DoubleDouble, _: None, sharpness: float = 1.0) -> Value:
    x = x.times(sharpness)
    return softplus(x).times(1 / sharpness), sigmoid(x).high


def _tanh(x: DoubleDouble, _: None) -> Value:
    s = sigmoid(x.times(2.0))  # tanh(x) = 2 s - 1, of slope 4 s (1 - s)
    return s.times(2.0) - _ONE, (s * (_ONE - s)).high * 4


def _relu(x: DoubleDouble, _: None) -> Value:
    return where(x.high > 0, x, _ZERO), (x.high > 0) * 1.0


def _identity(x: DoubleDouble, _: None) -> Value:
    return x, np.ones_like(x.high)


def _swish(x: DoubleDouble, sharpness: DoubleDouble) -> Value:
    """``x s`` with ``s = sigmoid(t)`` and the slope ``s + t s (1 - s)`` at ``t = b x``."""
    t = x * sharpness
    s = sigmoid(t)
    return x * s, s.high + t.high * (s * (_ONE - s)).high


def _lipswish(x: DoubleDouble, sharpness: DoubleDouble) -> Value:
    value, slope = _swish(x, sharpness)
    return value * DoubleDouble.constant(_LIPSWISH), slope * float(_LIPSWISH)


def _clipswish(x: DoubleDouble, sharpness: DoubleDouble) -> Value:
    first, slope = _swish(x, sharpness)
    second = first - x  # -x sigmoid(-b x)
    both = DoubleDouble(
        *(np.concatenate(pair, axis=-1) for pair in zip(first, second, strict=True))
    )
    slopes = np.concatenate([slope, slope - 1], axis=-1)
    return both * DoubleDouble.constant(_CLIPSWISH), slopes * float(_CLIPSWISH)


def _maxmin(x: DoubleDouble, _: None) -> Value:
    """Pairs sorted; its Jacobian is no diagonal, and the slopes are NaN."""
    first, second = (x.map(lambda part, i=i: part[..., i::2]) for i in (0, 1))
    ascending = (first - second).high < 0
    pairs = zip(where(ascending, second, first), where(ascending, first, second), strict=True)
    parts = (np.stack(pair, axis=-1).reshape(x.high.shape) for pair in pairs)
    return DoubleDouble(*parts), np.full_like(x.high, np.nan)


_FUNCTIONS: dict[str, Callable[..., Value]] = {
    "elu": _elu,
    "softplus": _softplus,
    "softplus4": functools.partial(_softplus, sharpness=4.0),
    "tanh": _tanh,
    "relu": _relu,
    "identity": _identity,
    "lipswish": _lipswish,
    "clipswish": _clipswish,
    "maxmin": _maxmin,
}


def activate(name: str, x: DoubleDouble, sharpness: DoubleDouble | None = None) -> Value:
    """Value and slope of an activation.

    Args:
        name: A name in `activations.PROVEN`.
        x: Arguments, channels last.
        sharpness: ``softplus(beta)`` of the Swish family, broadcastable to ``x``.

    Returns:
        The values, and the slope of each output in its own input.
    """
    return _FUNCTIONS[name](x, sharpness)
