r"""Histogram equalisation: a flow may start from how often grey levels occur instead of from 8 bits for each.

Level ``k`` of dequantised data fills ``[k, k + 1) / n``; the distribution function of a single entry maps that cell to
``[F_k, F_k + f_k)``, where ``f_k`` is the level's frequency and ``F_k`` the sum of the frequencies below. Over all entries of
data with these frequencies the result ``u`` is uniform, so the logit that follows makes it logistic (marginal Gaussianization,
Chen & Gopinath 2000, with another target).

Entries may have distributions of their own, as images have a background. Entry ``i`` is at the commonest level ``m`` with a
frequency ``p_i``, its share; the other levels divide the rest in the same proportions everywhere, which keeps the same ink the
same:

    f_im = p_i,    f_ik = f_k (1 - p_i) / (1 - f_m).

**Rounding.** Near ``u = 1`` a float has lost ``1 - u``, which the logit needs. So ``u`` is summed up from the cell's lower edge
and ``v = 1 - u`` from its upper one, each from positive terms. The images ``y`` of the cells are disjoint intervals of floats,
kept in a table. Forward stays in the interval of its level and the inverse looks the level up, so a round trip returns every
level exactly.
"""

import math
from collections.abc import Sequence
from dataclasses import field
from fractions import Fraction
from itertools import accumulate
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer

from iresnet_jax.bijections.bijection import ClosedForm
from iresnet_jax.bijections.dequantize import cells, quantize
from iresnet_jax.bijections.enclosure import Enclosure, ends, increasing, on_balls
from iresnet_jax.bijections.logit import (
    UNIT_ERROR,
    check_alpha,
    log_logistic,
    logit_bounds,
    precise_unit,
    steepest_unit,
    sum_event,
)
from iresnet_jax.bijections.standardize import ROUNDING, set_floats
from iresnet_jax.checked_dataclasses import pytree
from iresnet_jax.maths.double_double import DoubleDouble, where
from iresnet_jax.maths.lipschitz_bounds import BiLipschitz
from iresnet_jax.maths.platforms import floats
from iresnet_jax.maths.upward_rounding import UP, U

WEIGHT_OF_ALL = 0.01  # weight of the frequency over all entries in an entry's share: no level is impossible anywhere


@pytree(arrays=("frequencies", "shares", "starts"))
class Equalize(ClosedForm):
    """The distribution function of the grey levels, and a logit behind it; outside [0, 1) the outermost cells are continued.

    Attributes:
        frequencies: Frequency of each level, positive, of sum 1; see `level_frequencies`.
        shares: Frequency of the commonest level at each entry of an example, in row-major order, see `entry_shares`; None
            gives all entries the same distribution.
        alpha: Distance of the logit's argument from 0 and 1, in (0, 1/2).
        starts: Smallest float ``y`` of the cell of each level, ``(entries or 1, levels)``.
    """

    frequencies: Any
    shares: Any = None
    alpha: float = 0.05
    starts: Any = field(init=False, repr=False)

    def __post_init__(self):
        check_alpha(self.alpha)
        set_floats(self, "frequencies", *(["shares"] if self.shares is not None else []))
        f = np.asarray(self.frequencies, np.float64)
        if f.ndim != 1 or len(f) < 2 or not np.all(f > 0) or abs(f.sum() - 1) > 1e-6:
            raise ValueError(f"frequencies must be positive and add up to 1, got {len(f)} with the sum {f.sum()}")
        if self.shares is not None and not np.all((np.asarray(self.shares) > 0) & (np.asarray(self.shares) < 1)):
            raise ValueError("shares must lie in (0, 1): smooth them as entry_shares does")
        object.__setattr__(self, "starts", floats(_increasing(self._edges())))

    @classmethod
    def fit(cls, images: Integer[np.ndarray, "n ..."], num_levels: int, *, entrywise: bool, alpha: float) -> "Equalize":
        """The frequencies of training images, with the share of the commonest level at each entry if ``entrywise``."""
        frequencies = level_frequencies(images, num_levels)
        return cls(frequencies, entry_shares(images, frequencies) if entrywise else None, alpha)

    @property
    def num_levels(self) -> int:
        """Number of levels."""
        return len(self.frequencies)

    def bilipschitz(self) -> BiLipschitz:
        """Bounds on [0, 1] from the extreme slopes of the distribution function and of the logit."""
        tables, num = self._tables(self.frequencies.dtype), self.num_levels
        rest = jnp.where(jnp.arange(num) == tables.commonest, jnp.nan, tables.frequencies)
        least = jnp.minimum(jnp.nanmin(rest) * jnp.min(tables.others), jnp.min(tables.shares)) * num
        largest = jnp.maximum(jnp.nanmax(rest) * jnp.max(tables.others), jnp.max(tables.shares)) * num
        return logit_bounds(self.alpha).compose(BiLipschitz((1 + ROUNDING) * largest, (1 + ROUNDING) / least))

    def forward_and_logdet(self, x: Float[Array, "b ..."]) -> tuple[Float[Array, "b ..."], Float[Array, " b"]]:
        """``y = logit(alpha + (1 - 2 alpha) u)`` and ``sum log(dy/dx)``."""
        entries = x.reshape(len(x), math.prod(x.shape[1:]))
        tables = self._tables(entries.dtype, entries.shape[1])
        k = quantize(entries, len(self.frequencies)).astype(jnp.int32)
        cell = tables.cell(k)
        u = cell.below + cell.slope * (entries - cell.lower)
        v = cell.above + cell.slope * (cell.upper - entries)
        log_s, log_one_minus_s = (jnp.log(self.alpha + (1 - 2 * self.alpha) * part) for part in (u, v))
        y = log_s - log_one_minus_s
        inside = jnp.clip(y, *tables.range_of_y(k))
        y = y + jax.lax.stop_gradient(inside - y)
        logdet = sum_event(math.log1p(-2 * self.alpha) - log_s - log_one_minus_s + jnp.log(cell.slope))
        return y.reshape(x.shape), logdet

    def inverse_and_logdet(self, y: Float[Array, "b ..."]) -> tuple[Float[Array, "b ..."], Float[Array, " b"]]:
        """``x``, and ``sum log(dx/dy)``."""
        entries = y.reshape(len(y), math.prod(y.shape[1:]))
        tables = self._tables(entries.dtype, entries.shape[1])
        k = tables.level(entries)
        cell = tables.cell(k)
        u, v = ((jax.nn.sigmoid(part) - self.alpha) / (1 - 2 * self.alpha) for part in (entries, -entries))
        x = jnp.where(u < v, cell.lower + (u - cell.below) / cell.slope, cell.upper - (v - cell.above) / cell.slope)
        inside = jnp.clip(x, *tables.range_of_x(k))
        x = x + jax.lax.stop_gradient(inside - x)
        logdet = sum_event(log_logistic(entries) - math.log1p(-2 * self.alpha) - jnp.log(cell.slope))
        return x.reshape(y.shape), logdet

    @on_balls
    def enclose_inverse(self, y: Float[np.ndarray, "b d"], radius: Float[np.ndarray, " b"]) -> Enclosure:
        """The inverse in double-double, increasing in every entry; frequencies count as divided by their sum."""
        cells, wrong_u = _precise_cells(self), 4 * UNIT_ERROR / (1 - 2 * self.alpha)
        widths, num = cells.widths.high, cells.num_levels
        narrowest = np.minimum(widths, np.minimum(np.roll(widths, 1, axis=1), np.roll(widths, -1, axis=1)))
        narrowest = np.where(narrowest > 2.0**-50, narrowest, 0)  # float64 cannot tell narrower cells apart: nothing is known

        def value(t):
            u = precise_unit(t, self.alpha)
            k = cells.holding(u)  # or a neighbour, if u is next to an edge: both continue to there
            below, width = (table.map(lambda part: _at(part, k)) for table in (cells.below, cells.widths))
            x = (DoubleDouble.of(k) + (u - below) * width.reciprocal()) * DoubleDouble.of(num).reciprocal()
            return x.high, 2 * U * np.abs(x.high) + 2 * wrong_u / (num * _at(narrowest, k))

        low, high = (precise_unit(end, self.alpha) for end in ends(y, radius))
        first, last = (cells.holding(end) for end in (low - DoubleDouble.of(wrong_u), high + DoubleDouble.of(wrong_u)))
        narrow, k = np.full_like(y, np.inf), first
        while np.any(k <= last):
            narrow = np.minimum(narrow, _at(widths, np.minimum(k, last)))
            k = k + 1
        return increasing(value, steepest_unit(y, radius, self.alpha) / (num * narrow) * UP, y, radius)

    def _tables(self, dtype: Any, num_entries: int | None = None) -> "_Tables":
        if self.shares is not None and num_entries not in (None, len(self.shares)):
            raise ValueError(f"there must be a share for each of {num_entries} entries, got {len(self.shares)}")
        f = self.frequencies.astype(dtype)
        f = f / jnp.sum(f)
        commonest = jnp.argmax(f)
        rest = jnp.where(jnp.arange(len(f)) == commonest, 0, f)
        shares = f[commonest][None] if self.shares is None else self.shares.astype(dtype)
        below = jnp.concatenate([jnp.zeros(1, dtype), jnp.cumsum(rest)[:-1]])
        above = jnp.concatenate([jnp.cumsum(rest[::-1])[::-1][1:], jnp.zeros(1, dtype)])
        edges = (np.arange(len(f) + 1) / len(f)).astype(dtype)
        others = (1 - shares) / jnp.sum(rest)
        return _Tables(edges, below, above, f, others, shares, self.starts.astype(dtype), commonest)

    def _edges(self) -> Float[np.ndarray, "n k"]:
        """``y`` at the lower edge of every cell, ``(entries or 1, levels)``, by sums of positive numbers in float64."""
        f = np.asarray(self.frequencies, np.float64)
        f, m, k = f / f.sum(), int(np.argmax(f)), np.arange(len(f))
        rest = np.where(k == m, 0, f)
        p = np.asarray(f[m : m + 1] if self.shares is None else self.shares, np.float64)[:, None]
        others = (1 - p) / rest.sum()
        below = others * (np.cumsum(rest) - rest) + np.where(k > m, p, 0)
        above = others * np.cumsum(rest[::-1])[::-1] + np.where(k <= m, p, 0)
        y = np.log(self.alpha + (1 - 2 * self.alpha) * below) - np.log(self.alpha + (1 - 2 * self.alpha) * above)
        return y.astype(self.frequencies.dtype)


class _Cell(NamedTuple):
    """The cell of each entry's level.

    Attributes:
        lower, upper: Edges in ``x``.
        below, above: ``u`` at the lower edge, and ``1 - u`` at the upper one.
        slope: ``du/dx``.
    """

    lower: Array
    upper: Array
    below: Array
    above: Array
    slope: Array


class _Tables(NamedTuple):
    """Tables by level, and by entry if entries have distributions of their own.

    Attributes:
        edges: Edges of the cells in ``x``, one more than levels.
        below, above: Sums of the other levels' frequencies below and above each level, without the commonest.
        frequencies: Frequency of each level.
        others: Factor on the other levels' frequencies, one per entry or one for all.
        shares: Frequency of the commonest level, in the same form.
        starts: Smallest float ``y`` of each cell, ``(entries or 1, levels)``.
        commonest: The commonest level.
    """

    edges: np.ndarray
    below: Array
    above: Array
    frequencies: Array
    others: Array
    shares: Array
    starts: Array
    commonest: Array

    def cell(self, k: Array) -> _Cell:
        def of(table):
            return jnp.asarray(table)[k]

        others, shares = self.others[None], self.shares[None]
        return _Cell(
            lower=of(self.edges[:-1]),
            upper=of(self.edges[1:]),
            below=others * of(self.below) + jnp.where(k > self.commonest, shares, 0),
            above=others * of(self.above) + jnp.where(k < self.commonest, shares, 0),
            slope=len(self.frequencies) * jnp.where(k == self.commonest, shares, others * of(self.frequencies)),
        )

    def range_of_y(self, k: Array) -> tuple[Array, Array]:
        """The smallest and the largest ``y`` of level ``k``; -inf for the lowest level, inf for the highest."""
        highest = len(self.frequencies) - 1
        following = self._starts_at(jnp.minimum(k + 1, highest))
        last = jnp.nextafter(following, jnp.full_like(following, -jnp.inf))
        return jnp.where(k == 0, -jnp.inf, self._starts_at(k)), jnp.where(k == highest, jnp.inf, last)

    def range_of_x(self, k: Array) -> tuple[Array, Array]:
        """The smallest and the largest ``x`` of level ``k``; -inf for the lowest level, inf for the highest."""
        smallest, largest = (jnp.asarray(table)[k] for table in cells(len(self.frequencies), self.edges.dtype))
        return jnp.where(k == 0, -jnp.inf, smallest), jnp.where(k == len(self.frequencies) - 1, jnp.inf, largest)

    def level(self, y: Array) -> Array:
        """The level whose interval holds ``y``."""
        starts = self.starts
        if len(starts) == 1:
            found = jnp.searchsorted(starts[0], y, side="right")
        else:
            found = jax.vmap(lambda row, y: jnp.searchsorted(row, y, side="right"), (0, 1), 1)(starts, y)
        return jnp.clip(found - 1, 0, len(self.frequencies) - 1)

    def _starts_at(self, k: Array) -> Array:
        starts = self.starts
        return starts[0][k] if len(starts) == 1 else starts[jnp.arange(len(starts))[None], k]


def _increasing(rows: Float[np.ndarray, "n k"]) -> Float[np.ndarray, "n k"]:
    """The rows with ties moved to the next larger float, so that no interval is empty."""
    for k in range(1, rows.shape[1]):
        rows[:, k] = np.maximum(rows[:, k], np.nextafter(rows[:, k - 1], rows.dtype.type(np.inf)))
    return rows


class _PreciseCells(NamedTuple):
    """The distribution functions once more for enclosures, ``(entries or 1, levels)``, to 2^-88.

    Attributes:
        widths: Frequency of each level, ``u`` over its cell.
        below: ``u`` at the lower edge of each cell.
    """

    widths: DoubleDouble
    below: DoubleDouble

    @property
    def num_levels(self) -> int:
        return self.widths.high.shape[1]

    def holding(self, u: DoubleDouble) -> np.ndarray:
        """The level ``(b, d)`` whose cell holds ``u``; the first and the last cell go on outside [0, 1]."""
        below, last = self.below, self.num_levels - 1
        if len(below.high) == 1:
            k = np.searchsorted(below.high[0], u.high, side="right") - 1
        else:
            k = np.stack([np.searchsorted(row, u.high[:, i], side="right") - 1 for i, row in enumerate(below.high)], axis=1)
        k = np.clip(k, 0, last)
        k = np.where((k > 0) & ((u - below.map(lambda part: _at(part, k))).high < 0), k - 1, k)
        following = np.minimum(k + 1, last)
        return np.where((u - below.map(lambda part: _at(part, following))).high >= 0, following, k)


def _at(table: np.ndarray, k: np.ndarray) -> np.ndarray:
    """The entries ``(b, d)`` of a table ``(d or 1, levels)`` for the level of each entry."""
    return table[0 if len(table) == 1 else np.arange(k.shape[1])[None], k]


def _precise_cells(spec: Equalize) -> _PreciseCells:
    """The tables from rational arithmetic."""
    f = [Fraction(frequency) for frequency in np.asarray(spec.frequencies).tolist()]
    m = f.index(max(f))
    total, levels = sum(f), np.arange(len(f))[None]
    rest = [Fraction(0) if k == m else each for k, each in enumerate(f)]
    p = [f[m] / total] if spec.shares is None else [Fraction(share) for share in np.asarray(spec.shares).tolist()]
    shares, others = (_rational(part).map(lambda part: part[:, None]) for part in (p, [(1 - q) / (total - f[m]) for q in p]))
    own, before = (_rational(row).map(lambda part: part[None]) for row in (rest, [Fraction(0), *accumulate(rest[:-1])]))
    nothing = DoubleDouble.of(np.zeros((1, 1)))
    return _PreciseCells(where(levels == m, shares, others * own), others * before + where(levels > m, shares, nothing))


def _rational(values: Sequence[Fraction]) -> DoubleDouble:
    parts = [DoubleDouble.constant(value) for value in values]
    return DoubleDouble(*(np.array([getattr(part, name) for part in parts]) for name in ("high", "low")))


def level_frequencies(images: Integer[np.ndarray, "..."], num_levels: int = 256) -> tuple[float, ...]:
    """Frequency of each level, none 0: ``(count + 1) / (total + num_levels)``.

    Args:
        images: Training data, integers in ``[0, num_levels)``.
        num_levels: Number of levels.

    Raises:
        ValueError: If a value is out of range.
    """
    counts = np.zeros(num_levels, np.int64)
    for part in np.array_split(images, max(1, images.size // 2**26)):  # a view of a file must not be read at once
        found = np.bincount(part.ravel(), minlength=num_levels)
        if len(found) > num_levels:
            raise ValueError(f"images must hold values below num_levels={num_levels}, got {len(found) - 1}")
        counts += found
    return tuple(((counts + 1) / (counts.sum() + num_levels)).tolist())


def entry_shares(images: Integer[np.ndarray, "n ..."], frequencies: Sequence[float]) -> tuple[float, ...]:
    """Frequency of the commonest level at each entry of an example, mixed with 1 % of its frequency over all entries.

    Args:
        images: Training data, integers.
        frequencies: Frequencies of the levels, from `level_frequencies`.

    Returns:
        Numbers in (0, 1), one for each entry of an example in row-major order.
    """
    commonest = int(np.argmax(frequencies))
    counts = np.zeros(images.shape[1:], np.int64)
    for part in np.array_split(images, max(1, images.size // 2**26)):
        counts += (part == commonest).sum(axis=0)
    shares = (1 - WEIGHT_OF_ALL) * counts / len(images) + WEIGHT_OF_ALL * frequencies[commonest]
    return tuple(shares.ravel().tolist())
