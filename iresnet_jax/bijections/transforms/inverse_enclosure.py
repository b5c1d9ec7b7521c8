r"""Guaranteed enclosures of preprocessing's inverse: what the error of a flow's input becomes in the units of the data.

The inverse ``t^-1`` of a transform acts on every entry by itself and increases, or is affine. If ``|y' - y| <= r`` (Euclidean),
entry ``i`` of ``t^-1(y')`` therefore lies between the values at ``y_i - r`` and ``y_i + r``, and with ``S`` the largest slope
there, ``|t^-1(y') - t^-1(y)| <= S r``. The maps are those of the transforms' constants as real numbers, float64 as they are
kept; the frequencies of `Equalize` count as divided by their sum. Rounding is covered: logistic functions are computed in
double-double, all margins are rounded outward.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from iresnet_jax.bijections.transforms.dequantize import Grid
from iresnet_jax.bijections.transforms.equalize import Equalize
from iresnet_jax.bijections.transforms.logit import Center, Identity, Logit
from iresnet_jax.bijections.transforms.standardize import Standardize, Whiten
from iresnet_jax.maths.enclosures.double_double import DoubleDouble, where
from iresnet_jax.maths.enclosures.precise_activations import sigmoid
from iresnet_jax.maths.norms.convolution_certificate import dense_norm_bound

_U = 2.0**-53
_UP = 1 + 2.0**-40
_SIGMOID = 2.0**-80  # absolute error of a logistic function in double-double, and of sums of frequencies, with a wide margin

Array = np.ndarray


class Enclosure(NamedTuple):
    """What is guaranteed of ``t^-1`` on the balls ``|y' - y| <= r``, one an example.

    Attributes:
        low: Bound from below of every entry of ``t^-1(y')``.
        high: Bound from above.
        center: ``t^-1(y)``.
        error: Bound of the Euclidean norm of the error of `center`.
        lipschitz: Bound of ``|t^-1(y') - t^-1(y)| / |y' - y|``.
    """

    low: Float[Array, "b ..."]
    high: Float[Array, "b ..."]
    center: Float[Array, "b ..."]
    error: Float[Array, " b"]
    lipschitz: Float[Array, " b"]


@np.errstate(all="ignore")
def enclose_inverse(transform: Any, y: Float[Array, "b ..."], radius: Float[Array, " b"]) -> Enclosure:
    """The enclosure of a transform's inverse on balls around points.

    Args:
        transform: The preprocessing of a density.
        y: Centres, float64.
        radius: Radii, at least 0. An infinite radius, or a centre that is not finite, gives an enclosure that says nothing.
    """
    y, radius = np.asarray(y, np.float64), np.asarray(radius, np.float64)
    shape, known = y.shape, np.isfinite(radius) & np.all(np.isfinite(y.reshape(len(y), -1)), axis=1)
    points = np.where(known[:, None], y.reshape(len(y), -1), 0)
    found = _RULES[type(transform)](transform, points, np.where(known, radius, 0), shape)
    nothing = np.where(known, 0, np.inf)
    return Enclosure(
        low=(found.low - nothing[:, None]).reshape(shape),
        high=(found.high + nothing[:, None]).reshape(shape),
        center=found.center.reshape(shape),
        error=found.error + nothing,
        lipschitz=found.lipschitz,
    )


def distance_bound(x: Float[Array, "b ..."], enclosure: Enclosure, radius: Float[Array, " b"]) -> Float[Array, " b"]:
    """Bounds of ``|x - t^-1(y')|`` for all ``|y' - y| <= radius``, Euclidean; infinite for an ``x`` that is not finite."""
    with np.errstate(all="ignore"):
        gap = (np.asarray(x, np.float64) - enclosure.center).reshape(len(x), -1)
        moved = np.where(radius == 0, 0, enclosure.lipschitz * radius)
        bound = (np.linalg.norm(gap, axis=1) * _UP + enclosure.error + moved) * _UP
    return np.nan_to_num(bound, nan=np.inf, posinf=np.inf)


# ------------------------------------------------------------------------------------------------- which value is certain


def certain_levels(x: Array, enclosure: Enclosure, num_levels: int) -> Bool[Array, "b ..."]:
    """Whether the integer levels ``x``, whose cells are ``[k, k + 1) / n``, are those of every point of the enclosure."""
    ends = np.nextafter(num_levels * enclosure.low, -np.inf), np.nextafter(num_levels * enclosure.high, np.inf)
    low, high = (np.clip(np.floor(end), 0, num_levels - 1) for end in ends)
    return (low == high) & (low == np.asarray(x, np.float64))


def certain_on_grid(x: Array, enclosure: Enclosure, grid: Grid) -> Bool[Array, "b ..."]:
    """Whether the values ``x`` are those on the grid next to every point of the enclosure; False at continuous entries."""
    spacing, offset = np.asarray(grid.spacing), np.asarray(grid.offset)
    step = np.where(spacing > 0, spacing, 1)

    def nearest(values, direction):
        margin = 2.0**-48 * (np.abs(values) + np.abs(offset)) / step
        return np.floor((values - offset) / step + 0.5 + direction * margin)

    with np.errstate(all="ignore"):
        low, high = nearest(enclosure.low, -1), nearest(enclosure.high, 1)
        own = np.rint((np.asarray(x, np.float64) - offset) / step)
        return (spacing > 0) & (low == high) & (low == own)


# -------------------------------------------------------------------------------------------------------- each transform


def _shift(of: float) -> Callable[..., Enclosure]:
    """The rule of ``t^-1(y) = y + of``."""

    def rule(transform, y, radius, shape):
        del transform, shape
        center = y + of
        return _affine(center, _U * np.abs(center) * (of != 0), radius[:, None] * np.ones_like(y), np.ones(len(y)))

    return rule


def _standardize(transform: Standardize, y: Array, radius: Array, shape: tuple[int, ...]) -> Enclosure:
    del shape
    repeats = y.shape[1] // len(transform.scale)
    scale, mean = np.tile(transform.scale, repeats), np.tile(transform.mean, repeats)
    center = y * scale + mean
    errors = 2 * _U * (np.abs(y * scale) + np.abs(center)) + 1e-300
    return _affine(center, errors, radius[:, None] * scale, np.full(len(y), max(transform.scale)))


def _whiten(transform: Whiten, y: Array, radius: Array, shape: tuple[int, ...]) -> Enclosure:
    del shape
    factor, mean = np.asarray(transform.factor), np.asarray(transform.mean)
    center = y @ factor.T + mean
    errors = 4 * len(mean) * _U * (np.abs(y) @ np.abs(factor).T + np.abs(mean)) + 1e-300
    with jax.enable_x64():
        largest = float(dense_norm_bound(jnp.asarray(factor)))
    return _affine(center, errors, radius[:, None] * np.linalg.norm(factor, axis=1) * _UP, np.full(len(y), largest))


def _affine(center: Array, errors: Array, reach: Array, lipschitz: Array) -> Enclosure:
    """The enclosure of an affine map, from how far each entry of its values moves."""
    away = (errors + reach) * _UP
    error = np.linalg.norm(errors, axis=1) * _UP
    return Enclosure(np.nextafter(center - away, -np.inf), np.nextafter(center + away, np.inf), center, error, lipschitz * _UP)


def _logit(transform: Logit, y: Array, radius: Array, shape: tuple[int, ...]) -> Enclosure:
    del shape

    def value(t: DoubleDouble):
        u = _unit(t, transform.alpha)
        return u.high, _U * np.abs(u.high) + _SIGMOID / (1 - 2 * transform.alpha)

    return _increasing(value, _steepest(y, radius, transform.alpha), y, radius)


def _equalize(transform: Equalize, y: Array, radius: Array, shape: tuple[int, ...]) -> Enclosure:
    del shape
    cells, wrong_u = _cells(transform), 4 * _SIGMOID / (1 - 2 * transform.alpha)
    widths, num = cells.widths.high, cells.num_levels
    narrowest = np.minimum(widths, np.minimum(np.roll(widths, 1, axis=1), np.roll(widths, -1, axis=1)))
    narrowest = np.where(narrowest > 2.0**-50, narrowest, 0)  # narrower cells are not told apart in float64: nothing is known

    def value(t: DoubleDouble):
        u = _unit(t, transform.alpha)
        k = cells.holding(u)  # or a neighbour, if u is next to an edge: both continue to there
        within = (u - cells.at(cells.below, k)) * cells.at(cells.widths, k).reciprocal()
        x = (DoubleDouble.of(k) + within) * DoubleDouble.of(float(num)).reciprocal()
        return x.high, 2 * _U * np.abs(x.high) + 2 * wrong_u / (num * cells.at(narrowest, k))

    low, high = (_unit(end, transform.alpha) for end in _ends(y, radius))
    first, last = (cells.holding(end) for end in (low - DoubleDouble.of(wrong_u), high + DoubleDouble.of(wrong_u)))
    narrow, k = np.full_like(y, np.inf), first
    while np.any(k <= last):
        narrow = np.minimum(narrow, cells.at(widths, np.minimum(k, last)))
        k = k + 1
    return _increasing(value, _steepest(y, radius, transform.alpha) / (num * narrow) * _UP, y, radius)


_RULES: dict[type, Callable[..., Enclosure]] = {
    Identity: _shift(0.0),
    Center: _shift(0.5),
    Standardize: _standardize,
    Whiten: _whiten,
    Logit: _logit,
    Equalize: _equalize,
}


# -------------------------------------------------------------------------------------------------- logits, and levels


def _ends(y: Array, radius: Array) -> tuple[DoubleDouble, DoubleDouble]:
    reach = DoubleDouble.of(np.broadcast_to(radius[:, None], y.shape))
    return DoubleDouble.of(y) - reach, DoubleDouble.of(y) + reach


def _unit(t: DoubleDouble, alpha: float) -> DoubleDouble:
    """``u = (sigmoid(t) - alpha) / (1 - 2 alpha)``, to ``_SIGMOID / (1 - 2 alpha)``."""
    return (sigmoid(t) - DoubleDouble.of(alpha)) * (DoubleDouble.of(1.0) - DoubleDouble.of(2 * alpha)).reciprocal()


def _steepest(y: Array, radius: Array, alpha: float) -> Array:
    """The largest slope of ``u`` on ``[y - r, y + r]``: that of the point nearest to 0."""
    nearest = np.maximum(np.abs(y) - radius[:, None] * _UP, 0) * (1 - 4 * _U)
    s = sigmoid(DoubleDouble.of(nearest))
    return ((s * (DoubleDouble.of(1.0) - s)).high + _SIGMOID) / (1 - 2 * alpha) * _UP


def _increasing(value: Callable, slopes: Array, y: Array, radius: Array) -> Enclosure:
    """The enclosure of a map that increases in every entry, from its values with their errors and its largest slopes."""
    center, errors = value(DoubleDouble.of(y))
    (low, low_errors), (high, high_errors) = (value(end) for end in _ends(y, radius))
    return Enclosure(
        low=np.nextafter(low - low_errors, -np.inf),
        high=np.nextafter(high + high_errors, np.inf),
        center=center,
        error=np.linalg.norm(errors, axis=1) * _UP,
        lipschitz=np.max(slopes, axis=1) * _UP,
    )


class _Cells(NamedTuple):
    """The distribution functions of `Equalize` in double-double, ``(d or 1, n)``: frequencies divided by their sum.

    Attributes:
        widths: Frequency of each level, ``u`` over its cell.
        below: ``u`` at the lower edge of each cell.
    """

    widths: DoubleDouble
    below: DoubleDouble

    @property
    def num_levels(self) -> int:
        return self.widths.high.shape[1]

    def at(self, table: Any, k: Array) -> Any:
        """The entries ``(b, d)`` of a table for levels ``k`` of each entry."""
        entries = 0 if len(self.widths.high) == 1 else np.arange(k.shape[1])[None]
        return table.map(lambda part: part[entries, k]) if isinstance(table, DoubleDouble) else table[entries, k]

    def holding(self, u: DoubleDouble) -> Array:
        """The level whose cell holds ``u``; the first and the last cell go on outside [0, 1]."""
        edges, last = self.below.high, self.num_levels - 1
        if len(edges) == 1:
            k = np.searchsorted(edges[0], u.high, side="right") - 1
        else:
            k = np.stack([np.searchsorted(row, u.high[:, i], side="right") - 1 for i, row in enumerate(edges)], axis=1)
        k = np.clip(k, 0, last)
        k = np.where((k > 0) & ((u - self.at(self.below, k)).high < 0), k - 1, k)
        following = np.minimum(k + 1, last)
        return np.where((u - self.at(self.below, following)).high >= 0, following, k)


@functools.lru_cache(maxsize=8)
def _cells(transform: Equalize) -> _Cells:
    f = np.asarray(transform.frequencies, np.float64)
    levels, m = np.arange(len(f))[None], int(np.argmax(f))
    rest = np.where(levels[0] == m, 0, f)
    sums = [DoubleDouble.of(0.0)]
    for frequency in rest:
        sums.append(sums[-1] + DoubleDouble.of(frequency))
    total = sums.pop()  # of all but the commonest
    before = DoubleDouble(*(np.stack(parts)[None] for parts in zip(*sums, strict=True)))
    if transform.shares is None:
        shares = DoubleDouble.of(f[m : m + 1]) * (total + DoubleDouble.of(f[m])).reciprocal()
    else:
        shares = DoubleDouble.of(transform.shares)
    shares = shares.map(lambda part: part[:, None])
    others, none = (DoubleDouble.of(1.0) - shares) * total.reciprocal(), DoubleDouble.of(np.zeros((1, 1)))
    widths = where(levels == m, shares, DoubleDouble.of(rest[None]) * others)
    return _Cells(widths, before * others + where(levels > m, shares, none))
