r"""The preprocessing transforms once more, with guaranteed errors: balls that hold ``t(u)`` and ``log|det dt/du|``.

Constants of a transform count as the float64 numbers that they are, and ``u`` as the numbers that are given. The frequencies
of `Equalize` count as divided by their sum, and each entry is mapped by the line of its level, which `quantize` reads off ``u``
in its own dtype. The tables of float intervals that keep round trips exact move nothing here.
"""

from fractions import Fraction
from itertools import accumulate
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from iresnet_jax.bijections.transforms.dequantize import Grid, quantize
from iresnet_jax.bijections.transforms.equalize import Equalize
from iresnet_jax.bijections.transforms.logit import Center, Identity, Logit
from iresnet_jax.bijections.transforms.standardize import Standardize, Whiten
from iresnet_jax.maths.chains.inverse_products import invert
from iresnet_jax.maths.enclosures.ball_arithmetic import Ball, joined, log, where
from iresnet_jax.maths.enclosures.double_double import DoubleDouble

_REFINEMENTS = 2  # of the solution of a triangular system, by the digits of float64 each
_UP = 1 + 2.0**-30


def enclose_forward(transform: Any, u: Float[np.ndarray, "b ..."]) -> tuple[Ball, Ball]:
    """Balls of ``t(u)``, of the shape of ``u``, and of ``log|det dt/du|``, one an example; under ``enable_x64``.

    Args:
        transform: A transform of a density.
        u: Continuous data, float32 or float64.

    Raises:
        ValueError: If this transform has no enclosure.
    """
    x = np.asarray(u, np.float64)
    if isinstance(transform, Identity):
        return Ball.of(x), Ball.of(np.zeros(len(x)))
    if isinstance(transform, Center):
        return Ball.of(x) - Ball.of(0.5), Ball.of(np.zeros(len(x)))
    if isinstance(transform, Standardize):
        return _standardize(transform, x)
    if isinstance(transform, Whiten):
        return _whiten(transform, x)
    if isinstance(transform, Logit):
        y, log_slopes = _logit(transform.alpha, Ball.of(x))
        return y, _by_example(log_slopes).sum()
    if isinstance(transform, Equalize):
        return _equalize(transform, np.asarray(u))
    raise ValueError(
        f"the transform {type(transform).__name__} has no guaranteed enclosure: certify.log_det takes the flow's input instead"
    )


def enclose_cells(num_levels: int | None, grid: Grid | None, num_dims: int) -> Ball:
    """The log-determinant of `dequantize_bijection` or of `Grid`: logarithms of the cells' widths."""
    if num_levels is not None:
        return -log(Ball.of(num_levels)) * Ball.of(num_dims)
    widths = np.array([1.0, *(width for width in (grid.spacing if grid else ()) if width > 0)])
    return log(Ball.of(widths)).sum()


def _standardize(transform: Standardize, x: np.ndarray) -> tuple[Ball, Ball]:
    scale = Ball.of(np.asarray(transform.scale))
    y = (Ball.of(x) - Ball.of(np.asarray(transform.mean))) * scale.reciprocal()
    positions = Ball.of(np.full(len(x), np.prod(x.shape[1:-1])))
    return y, -(log(scale).sum() * positions)


def _whiten(transform: Whiten, x: np.ndarray) -> tuple[Ball, Ball]:
    r"""The solution of ``T y = x - m``, refined, and how far it may be off: ``|T^-1| |x - m - T y|``.

    ``|T^-1|_2 <= |R|_2 / (1 - |R T - I|_2)`` for any matrix ``R``.
    """
    factor = np.asarray(transform.factor)
    guess = invert(jnp.asarray(factor), jnp.zeros(()))
    inverse, norm, defect = (np.asarray(part) for part in (guess.matrices, guess.norms, guess.defects))
    centred = Ball.of(x) - Ball.of(np.asarray(transform.mean))
    inverse_norm = norm / (1 - defect) * _UP if defect < 1 else np.inf
    matrix, solutions = Ball.of(factor), []
    for i in range(len(x)):
        own = centred.map(lambda part, i=i: part[i])
        y = wrong = Ball.of(inverse @ own.middle.high)
        for step in range(_REFINEMENTS + 1):
            wrong = own - (matrix * _row(y)).sum()
            if step < _REFINEMENTS:  # any numbers near the solution will do: what counts is their residual
                y = Ball(y.middle + DoubleDouble.of(inverse @ wrong.middle.high), np.zeros(len(inverse)))
        size = np.linalg.norm(np.abs(wrong.middle.high) + np.abs(wrong.middle.low) + wrong.radius) * _UP
        solutions.append(y.widened(np.full(len(y.radius), inverse_norm * size)))
    log_det = -log(Ball.of(np.diag(factor))).sum()
    return joined(np.stack, solutions), log_det + Ball.of(np.zeros(len(x)))


def _logit(alpha: float, u: Ball) -> tuple[Ball, Ball]:
    """``log(s / (1 - s))`` with ``s = alpha + (1 - 2 alpha) u``, and the logarithm of its slope, entry by entry."""
    slope = Ball.of(1.0) - Ball.of(2 * alpha)
    s = Ball.of(alpha) + slope * u
    log_s, log_rest = log(s), log(Ball.of(1.0) - s)
    return log_s - log_rest, log(slope) - log_s - log_rest


def _equalize(transform: Equalize, u: np.ndarray) -> tuple[Ball, Ball]:
    entries, n = np.asarray(u.reshape(len(u), -1)), len(transform.frequencies)
    total = sum(map(Fraction, transform.frequencies))
    frequencies = [Fraction(f) / total for f in transform.frequencies]
    m = int(np.argmax(transform.frequencies))
    rest = [Fraction(0) if k == m else f for k, f in enumerate(frequencies)]
    k = np.asarray(quantize(jnp.asarray(entries), n)).astype(np.int64)
    shares = [frequencies[m]] if transform.shares is None else [Fraction(p) for p in transform.shares]
    p = _row(Ball.rational(shares))
    others = _row(Ball.rational([(1 - share) / (1 - frequencies[m]) for share in shares]))
    below, own = (_at(Ball.rational(table), k) for table in ([Fraction(0), *accumulate(rest[:-1])], frequencies))
    weight = where(k == m, p, others * own)
    inside = Ball.of(entries.astype(np.float64)) * Ball.of(n) - Ball.of(k.astype(np.float64))
    start = others * below + where(k > m, p, Ball.of(np.zeros(p.radius.shape)))
    y, log_slopes = _logit(transform.alpha, start + weight * inside)
    return y.map(lambda part: part.reshape(u.shape)), (log_slopes + log(weight * Ball.of(n))).sum()


def _row(values: Ball) -> Ball:
    return values.map(lambda part: part[None])


def _at(table: Ball, k: np.ndarray) -> Ball:
    return table.map(lambda part: part[k])


def _by_example(values: Ball) -> Ball:
    return values.map(lambda part: part.reshape(len(part), -1))
