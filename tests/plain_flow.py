"""A flow written down once more, in plain NumPy on numbers of any precision: what certified inverses are compared with.

It shares no code with the library. `LONG` are the platform's long doubles, of 64 bits on x86, `DECIMAL` decimal numbers of 50
digits, and `mpmath_numbers` those of mpmath. Weights count as the numbers they are; 1.1 and 1.004 in LipSwish and CLipSwish are
decimal numbers.
"""

import decimal
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

decimal.getcontext().prec = 50


class Numbers(NamedTuple):
    """Arrays of some kind of number.

    Attributes:
        of: Makes them, exactly, of float64 arrays.
        exp: The exponential function.
        log: The natural logarithm.
    """

    of: Callable[[Any], Any]
    exp: Callable[[Any], Any]
    log: Callable[[Any], Any]


LONG = Numbers(lambda a: np.asarray(a, np.float64).astype(np.longdouble), np.exp, np.log)
DECIMAL = Numbers(
    lambda a: np.vectorize(lambda v: decimal.Decimal(float(v)), otypes=[object])(np.asarray(a, np.float64)),
    np.vectorize(lambda v: v.exp(), otypes=[object]),
    np.vectorize(lambda v: v.ln(), otypes=[object]),
)
FLOAT = Numbers(lambda a: np.asarray(a, np.float64), np.exp, np.log)


def mpmath_numbers(digits: int = 50) -> Numbers:
    """Numbers of mpmath with so many digits."""
    import mpmath

    context = mpmath.mp.clone()
    context.dps = digits
    of, exp, log = (np.vectorize(f, otypes=[object]) for f in (lambda v: context.mpf(float(v)), context.exp, context.log))
    return Numbers(lambda a: of(np.asarray(a, np.float64)), exp, log)


def forward(numbers: Numbers, spec: Any, weights: Any, x: Any) -> Any:
    """Latents ``(d,)`` of one example in the flow's input space."""
    latents = []
    for i, stage in enumerate(spec.stages):
        own = weights[f"stage{i}"]
        x = _squeeze(x, stage.squeeze)
        x = x.ravel() if stage.kernel_sizes is None else x
        for k in range(stage.num_blocks):
            x = x + numbers.of(own.actnorm.bias[k])
            x = x * numbers.exp(numbers.of(own.actnorm.log_scale[k]))
            g = x
            for j, layer in enumerate(own.branch.weights.values()):
                if j or stage.preactivation:
                    beta = numbers.of(layer["beta"][k]) if "beta" in layer else None
                    g = _activation(numbers, stage.activation, g, beta)
                kernel = numbers.of(layer["kernel"][k])
                g = g @ kernel if kernel.ndim == 2 else _conv(numbers, g, kernel, circular=stage.padding == "CIRCULAR")
                g = g + numbers.of(layer["bias"][k])
            x = x + g
        if stage.factor_out:
            half = x.shape[-1] // 2
            latents.append(x[..., half:].ravel())
            x = x[..., :half]
    return np.concatenate([*latents, x.ravel()])


def invert(
    numbers: Numbers,
    spec: Any,
    weights: Any,
    y: Any,
    near: Any,
    solve: np.ndarray | Callable[[np.ndarray], np.ndarray],
    num_steps: int = 4,
) -> Any:
    """The preimage of latents ``y`` by Newton's method, from a point that is near.

    Args:
        numbers: Kind of number.
        spec: Architecture of the flow.
        weights: Weights of the flow.
        y: Latents of one example, in float64.
        near: Where to start, in float64.
        solve: Inverse of the whole flow's Jacobian there, or what multiplies a vector with it; in float64.
        num_steps: Steps; each takes the error down by the error of `solve`.
    """
    x = numbers.of(near)
    for _ in range(num_steps):
        wrong = numbers.of(y) - forward(numbers, spec, weights, x)
        if callable(solve):
            size = float(np.max(abs(wrong))) or 1.0  # in float64's range, whatever the numbers are
            step = numbers.of(solve((wrong / numbers.of(size)).astype(np.float64))) * numbers.of(size)
        else:
            step = numbers.of(solve) @ wrong
        x = x + step.reshape(x.shape)
    return x


def distance(numbers: Numbers, x: Any, y: Any) -> float:
    """Euclidean distance of an array of float64 from one of numbers, rounded to float64."""
    return float(np.sum((numbers.of(x) - y) ** 2)) ** 0.5


def _squeeze(x: Any, factor: int) -> Any:
    if factor == 1:
        return x
    h, w, c = x.shape
    parts = x.reshape(h // factor, factor, w // factor, factor, c)
    return parts.transpose(0, 2, 1, 3, 4).reshape(h // factor, w // factor, -1)


def _conv(numbers: Numbers, x: Any, kernel: Any, *, circular: bool) -> Any:
    """A convolution of images ``(..., h, w, c)``."""
    rows, columns = x.shape[-3:-1]
    y: Any = 0
    for i, j in np.ndindex(kernel.shape[:2]):
        up, left = i - (kernel.shape[0] - 1) // 2, j - (kernel.shape[1] - 1) // 2
        if circular:
            moved = np.roll(x, (-up, -left), axis=(-3, -2))
        else:
            moved = np.broadcast_to(numbers.of(0.0), x.shape).copy()
            to = slice(max(-up, 0), rows - max(up, 0)), slice(max(-left, 0), columns - max(left, 0)), slice(None)
            at = slice(max(up, 0), rows - max(-up, 0)), slice(max(left, 0), columns - max(-left, 0)), slice(None)
            moved[..., *to] = x[..., *at]
        y = y + moved @ kernel[i, j]
    return y


def _activation(numbers: Numbers, name: str, x: Any, beta: Any) -> Any:
    one, zero = numbers.of(1.0), numbers.of(0.0)

    def sigmoid(t):
        decay = numbers.exp(-abs(t))
        return np.where(t > 0, one / (one + decay), decay / (one + decay))

    def softplus(t):
        return np.where(t > 0, t, zero) + numbers.log(one + numbers.exp(-abs(t)))

    swish = numbers.of(11.0) / numbers.of(10.0)
    if name == "elu":
        return np.where(x > 0, x, numbers.exp(np.where(x > 0, zero, x)) - one)
    if name == "softplus":
        return softplus(x)
    if name == "softplus4":
        return softplus(numbers.of(4.0) * x) / numbers.of(4.0)
    if name == "tanh":
        return numbers.of(2.0) * sigmoid(numbers.of(2.0) * x) - one
    if name == "relu":
        return np.where(x > 0, x, zero)
    if name == "identity":
        return x
    if name == "maxmin":
        pairs = x.reshape(*x.shape[:-1], -1, 2)
        return np.stack([pairs.max(axis=-1), pairs.min(axis=-1)], axis=-1).reshape(x.shape)
    b = softplus(beta)
    if name == "lipswish":
        return x * sigmoid(b * x) / swish
    assert name == "clipswish"
    both = np.concatenate([x * sigmoid(b * x), -x * sigmoid(-b * x)], axis=-1)
    return both / (swish * (numbers.of(1004.0) / numbers.of(1000.0)))
