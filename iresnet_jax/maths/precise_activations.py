r"""The activations of `activations` in double-double arithmetic, with their slopes: what residuals
and Jacobians are made of.

Values err by at most ``ERROR (1 + |x|)``, slopes by at most ``SLOPE_ERROR``. The exact functions
are the formulas in the docstrings of `activations`, with 1.1 and 1.004 as decimal numbers. Only
arithmetic is trusted, no elementary function of the platform.
"""

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np

from iresnet_jax.maths.double_double import DoubleDouble, exp, log, where

Array = Any
Value = tuple[DoubleDouble, Array]

ERROR = 2.0**-80  # relative to 1 + |x|
SLOPE_ERROR = 2.0**-48

_ONE = DoubleDouble.of(1.0)
_LIPSWISH, _CLIPSWISH = Fraction(10, 11), Fraction(10, 11) / Fraction(1004, 1000)


def softplus(x: DoubleDouble) -> DoubleDouble:
    """``max(x, 0) + log(1 + e^-|x|)``."""
    size = where(x.high < 0, -x, x)
    positive = where(x.high > 0, x, DoubleDouble.of(np.zeros_like(x.high)))
    return positive + log(_ONE + exp(-size))


def sigmoid(x: DoubleDouble) -> DoubleDouble:
    """``1 / (1 + e^-x)``, from ``e^-|x|``."""
    decay = exp(where(x.high < 0, x, -x))
    quotient = (_ONE + decay).reciprocal()
    return where(x.high < 0, decay * quotient, quotient)


def _elu(x: DoubleDouble, beta: None) -> Value:
    growth = exp(where(x.high < 0, x, DoubleDouble.of(np.zeros_like(x.high))))
    return where(x.high < 0, growth - _ONE, x), growth.high


def _softplus(x: DoubleDouble, beta: None) -> Value:
    return softplus(x), sigmoid(x).high


def _softplus4(x: DoubleDouble, beta: None) -> Value:
    return softplus(x.times(4.0)).times(0.25), sigmoid(x.times(4.0)).high


def _tanh(x: DoubleDouble, beta: None) -> Value:
    s = sigmoid(x.times(2.0))  # tanh(x) = 2 s - 1, of slope 4 s (1 - s)
    return s.times(2.0) - _ONE, (s * (_ONE - s)).high * 4


def _relu(x: DoubleDouble, beta: None) -> Value:
    return where(x.high > 0, x, DoubleDouble.of(np.zeros_like(x.high))), (x.high > 0).astype(
        np.float64
    )


def _identity(x: DoubleDouble, beta: None) -> Value:
    return x, np.ones_like(x.high)


def _swish(x: DoubleDouble, sharpness: DoubleDouble) -> tuple[DoubleDouble, DoubleDouble, Array]:
    """``x sigmoid(b x)``, ``sigmoid(b x)`` and the slope ``s + t s (1 - s)`` at ``t = b x``."""
    t = x * sharpness
    s = sigmoid(t)
    return x * s, s, s.high + t.high * (s * (_ONE - s)).high


def _lipswish(x: DoubleDouble, sharpness: DoubleDouble) -> Value:
    value, _, slope = _swish(x, sharpness)
    return value * DoubleDouble.constant(_LIPSWISH), slope * float(_LIPSWISH)


def _clipswish(x: DoubleDouble, sharpness: DoubleDouble) -> Value:
    first, _, slope = _swish(x, sharpness)
    second = first - x  # -x sigmoid(-b x)
    factor = DoubleDouble.constant(_CLIPSWISH)
    both = DoubleDouble(
        *(np.concatenate(parts, axis=-1) for parts in zip(first, second, strict=True))
    )
    return both * factor, np.concatenate([slope, slope - 1], axis=-1) * float(_CLIPSWISH)


def _maxmin(x: DoubleDouble, beta: None) -> Value:
    """Pairs sorted; its Jacobian is no diagonal, and the slopes are NaN."""
    first, second = (x.map(lambda part, i=i: part[..., i::2]) for i in (0, 1))
    ascending = (first - second).high < 0
    sorted_pairs = (where(ascending, second, first), where(ascending, first, second))
    high, low = (
        np.stack([pair[i] for pair in sorted_pairs], axis=-1).reshape(x.high.shape) for i in (0, 1)
    )
    return DoubleDouble(high, low), np.full_like(x.high, np.nan)


_FUNCTIONS: dict[str, Callable[..., Value]] = {
    "elu": _elu,
    "softplus": _softplus,
    "softplus4": _softplus4,
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
        name: A name in `activations.ACTIVATIONS`.
        x: Arguments, channels last.
        sharpness: ``softplus(beta)`` of the Swish family, broadcastable to ``x``.

    Returns:
        The values, and the slope of each output in its own input.
    """
    if name not in _FUNCTIONS:
        raise ValueError(
            f"certified errors know the activations {', '.join(_FUNCTIONS)}, got {name!r}"
        )
    return _FUNCTIONS[name](x, sharpness)
