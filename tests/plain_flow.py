"""A flow once more, in plain NumPy on numbers of any precision, without the library."""

import decimal
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

decimal.getcontext().prec = 50


class Numbers(NamedTuple):
    """How to make numbers of some kind of float64 arrays, and two of their functions."""

    of: Callable[[Any], Any]
    exp: Callable[[Any], Any]
    log: Callable[[Any], Any]


DECIMAL = Numbers(
    lambda a: np.vectorize(lambda v: decimal.Decimal(float(v)), otypes=[object])(
        np.asarray(a, np.float64)
    ),
    np.vectorize(lambda v: v.exp(), otypes=[object]),
    np.vectorize(lambda v: v.ln(), otypes=[object]),
)
FLOAT = Numbers(lambda a: np.asarray(a, np.float64), np.exp, np.log)


def forward(numbers: Numbers, spec: Any, weights: Any, x: Any) -> Any:
    """Latents ``(d,)`` of one example in the flow's input space."""
    latents = []
    for i, stage in enumerate(spec.stages):
        actnorm, layers = weights[f"stage{i}"].actnorm, weights[f"stage{i}"].branch.weights.values()
        x = _squeeze(x, stage.squeeze)
        x = x.ravel() if stage.kernel_sizes is None else x
        for k in range(stage.num_blocks):
            x = (x + numbers.of(actnorm.bias[k])) * numbers.exp(numbers.of(actnorm.log_scale[k]))
            g = x
            for j, layer in enumerate(layers):
                if j or stage.preactivation:
                    g = _activation(
                        numbers,
                        stage.activation,
                        g,
                        numbers.of(layer["beta"][k]) if "beta" in layer else None,
                    )
                g = _product(
                    numbers, g, numbers.of(layer["kernel"][k]), circular=stage.padding == "CIRCULAR"
                )
                g = g + numbers.of(layer["bias"][k])
            x = x + g
        if stage.factor_out:
            half = x.shape[-1] // 2
            latents.append(x[..., half:].ravel())
            x = x[..., :half]
    return np.concatenate([*latents, x.ravel()])


def invert(
    numbers: Numbers, spec: Any, weights: Any, y: Any, near: Any, to_x: np.ndarray, num_steps: int
) -> Any:
    """The preimage by Newton's method from a near point and the inverse Jacobian ``to_x`` there."""
    x = numbers.of(near)
    for _ in range(num_steps):
        step = numbers.of(to_x) @ (y - forward(numbers, spec, weights, x))
        x = x + step.reshape(x.shape)
    return x


def distance(numbers: Numbers, x: Any, y: Any) -> float:
    """Euclidean distance of an array of float64 from one of numbers, rounded to float64."""
    return float(np.sum((numbers.of(x) - y) ** 2)) ** 0.5


def _squeeze(x: Any, factor: int) -> Any:
    """Space to depth of images ``(..., h, w, c)``."""
    if factor == 1:
        return x
    *batch, h, w, c = x.shape
    parts = x.reshape(*batch, h // factor, factor, w // factor, factor, c)
    return np.moveaxis(parts, -4, -3).reshape(*batch, h // factor, w // factor, -1)


def _product(numbers: Numbers, x: Any, kernel: Any, *, circular: bool) -> Any:
    """``x W``, or a convolution of images ``(..., h, w, c)``."""
    if kernel.ndim == 2:
        return x @ kernel
    rows, columns = x.shape[-3:-1]
    y: Any = 0
    for i, j in np.ndindex(kernel.shape[:2]):
        up, left = i - (kernel.shape[0] - 1) // 2, j - (kernel.shape[1] - 1) // 2
        if circular:
            moved = np.roll(x, (-up, -left), axis=(-3, -2))
        else:
            moved = np.broadcast_to(numbers.of(0.0), x.shape).copy()
            to = (
                slice(max(-up, 0), rows - max(up, 0)),
                slice(max(-left, 0), columns - max(left, 0)),
                slice(None),
            )
            at = (
                slice(max(up, 0), rows - max(-up, 0)),
                slice(max(left, 0), columns - max(-left, 0)),
                slice(None),
            )
            moved[..., *to] = x[..., *at]
        y = y + moved @ kernel[i, j]
    return y


def _activation(numbers: Numbers, name: str, x: Any, beta: Any) -> Any:
    one, zero = numbers.of(1.0), numbers.of(0.0)
    swish = numbers.of(11.0) / numbers.of(10.0)
    if name == "elu":
        return np.where(x > 0, x, numbers.exp(np.where(x > 0, zero, x)) - one)
    if name == "softplus":
        return _softplus(numbers, x)
    if name == "softplus4":
        return _softplus(numbers, numbers.of(4.0) * x) / numbers.of(4.0)
    if name == "tanh":
        return numbers.of(2.0) * _sigmoid(numbers, numbers.of(2.0) * x) - one
    if name == "relu":
        return np.where(x > 0, x, zero)
    if name == "identity":
        return x
    if name == "maxmin":
        pairs = x.reshape(*x.shape[:-1], -1, 2)
        return np.stack([pairs.max(axis=-1), pairs.min(axis=-1)], axis=-1).reshape(x.shape)
    b = _softplus(numbers, beta)
    if name == "lipswish":
        return x * _sigmoid(numbers, b * x) / swish
    assert name == "clipswish"
    both = np.concatenate([x * _sigmoid(numbers, b * x), -x * _sigmoid(numbers, -b * x)], axis=-1)
    return both / (swish * (numbers.of(1004.0) / numbers.of(1000.0)))


def _sigmoid(numbers, t):
    one, decay = numbers.of(1.0), numbers.exp(-abs(t))
    return np.where(t > 0, one / (one + decay), decay / (one + decay))


def _softplus(numbers, t):
    return np.where(t > 0, t, numbers.of(0.0)) + numbers.log(numbers.of(1.0) + numbers.exp(-abs(t)))
