r"""Histogram equalisation: a flow starts from the frequencies of grey levels instead of equal ones.

Level ``k`` of dequantised data fills ``[k, k + 1) / n``; the distribution function of a single
entry maps that cell to ``[F_k, F_k + f_k)``, where ``f_k`` is the level's frequency and ``F_k`` the
sum of the frequencies below. Over all entries of data with these frequencies the result ``u`` is
uniform, so the logit that follows makes it logistic (marginal Gaussianization, Chen & Gopinath
2000, with another target).

Entries may have their own distributions, as images have a background. Entry ``i`` has the commonest
level ``m`` with a frequency ``p_i``, its share; the other levels divide the rest in the same
proportions at all entries:

    f_im = p_i,    f_ik = f_k (1 - p_i) / (1 - f_m).

Near ``u = 1`` a float has lost ``1 - u``, which the logit needs. So ``u`` is summed up from the
cell's lower edge and ``v = 1 - u`` from its upper one. The floats ``y`` of a cell are an interval
in a table: forward stays in it, and the inverse looks the level up there, so a round trip returns
every level exactly.
"""

import math
from collections.abc import Sequence
from dataclasses import field
from fractions import Fraction
from itertools import accumulate
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer, Num

from iresnet_jax.bijections.bijection import ClosedForm
from iresnet_jax.bijections.dequantize import check_levels, quantize
from iresnet_jax.bijections.enclosure import Enclosure, ends, increasing, on_balls
from iresnet_jax.bijections.logit import (
    UNIT_ERROR,
    log_logistic,
    logit_bounds,
    precise_unit,
    steepest_unit,
    sum_event,
    unit_to_line,
)
from iresnet_jax.bijections.reshape import flatten
from iresnet_jax.bijections.standardize import ROUNDING, set_floats
from iresnet_jax.maths.double_double import DoubleDouble, where
from iresnet_jax.maths.lipschitz_bounds import BiLipschitz
from iresnet_jax.maths.platforms import floats
from iresnet_jax.maths.upward_rounding import UP, U, as_floats
from iresnet_jax.pytrees import pytree

# Weight of the frequency over all entries in an entry's share, so that no level is impossible.
WEIGHT_OF_ALL = 0.01


@pytree(arrays=("frequencies", "shares", "edges"))
class Equalize(ClosedForm):
    """The distribution function of the grey levels, and a logit behind it; outside [0, 1) the
    outermost cells are continued.

    Attributes:
        frequencies: Frequency of each level, positive; they count as divided by their sum.
        shares: Frequency of the commonest level at each entry of an example, in row-major order,
            see `entry_shares`; None gives all entries the same distribution.
        alpha: Distance of the logit's argument from 0 and 1, in (0, 1/2).
        edges: Smallest float ``y`` of the cell of each level, from minus infinity to infinity,
            ``(entries or 1, levels + 1)``.
    """

    frequencies: Any
    shares: Any = None
    alpha: float = 0.05
    edges: Any = field(init=False, repr=False)

    def __post_init__(self):
        set_floats(self, "frequencies", *(["shares"] if self.shares is not None else []))
        f = np.asarray(self.frequencies, np.float64)
        p = np.asarray(0.5 if self.shares is None else self.shares)
        if not np.all(f > 0) or not np.all((p > 0) & (p < 1)):
            raise ValueError("frequencies must be positive and shares in (0, 1): smooth them")
        widths, below, above = self._cells(np.dtype(np.float64), np)
        log_s, log_one_minus_s = (
            np.log(self.alpha + (1 - 2 * self.alpha) * part) for part in (below, above + widths)
        )
        lower = _increasing((log_s - log_one_minus_s).astype(self.frequencies.dtype))
        object.__setattr__(self, "edges", floats(_with_open_ends(np.pad(lower, ((0, 0), (0, 1))))))

    @classmethod
    def fit(
        cls, images: Integer[np.ndarray, "n ..."], num_levels: int, *, entrywise: bool, alpha: float
    ) -> "Equalize":
        """The frequencies of training images, with the share of the commonest level at each
        entry if ``entrywise``.
        """
        frequencies = level_frequencies(images, num_levels)
        return cls(frequencies, entry_shares(images, frequencies) if entrywise else None, alpha)

    @property
    def num_levels(self) -> int:
        """Number of levels."""
        return len(self.frequencies)

    def bilipschitz(self) -> BiLipschitz:
        """Bounds on [0, 1] from the extreme slopes of the distribution function and of the
        logit.
        """
        widths, *_ = self._cells(self.frequencies.dtype)
        least, largest = (self.num_levels * extreme(widths) for extreme in (jnp.min, jnp.max))
        return logit_bounds(self.alpha).compose(
            BiLipschitz((1 + ROUNDING) * largest, (1 + ROUNDING) / least)
        )

    def map(self, x: Num[Array, "b ..."]) -> tuple[Float[Array, "b ..."], Float[Array, " b"]]:
        """``y = logit(alpha + (1 - 2 alpha) u)`` and ``sum log(dy/dx)``."""
        x = as_floats(x)
        entries = self._flatten(x)
        k = quantize(entries, self.num_levels).astype(jnp.int32)
        lower, upper, below, above, slopes = self._of_levels(k, x.dtype)
        u, v = below + slopes * (entries - lower), above + slopes * (upper - entries)
        y, log_slopes = unit_to_line(u, v, self.alpha)
        y = _within_cells(y, self.edges.astype(x.dtype), k)
        return y.reshape(x.shape), sum_event(log_slopes + jnp.log(slopes))

    def unmap(self, y: Num[Array, "b ..."]) -> tuple[Float[Array, "b ..."], Float[Array, " b"]]:
        """``x``, and ``sum log(dx/dy)``."""
        y = as_floats(y)
        entries, edges = self._flatten(y), self.edges.astype(y.dtype)
        if len(edges) == 1:
            k = jnp.searchsorted(edges[0, 1:-1], entries, side="right")
        else:
            k = jax.vmap(lambda row, y: jnp.searchsorted(row, y, side="right"), (0, 1), 1)(
                edges[:, 1:-1], entries
            )
        lower, upper, below, above, slopes = self._of_levels(k, y.dtype)
        u, v = (
            (jax.nn.sigmoid(part) - self.alpha) / (1 - 2 * self.alpha)
            for part in (entries, -entries)
        )
        x = jnp.where(u < v, lower + (u - below) / slopes, upper - (v - above) / slopes)
        x = _within_cells(x, jnp.asarray(_with_open_ends(self._edges_of_x(y.dtype))), k)
        return x.reshape(y.shape), sum_event(
            log_logistic(entries) - math.log1p(-2 * self.alpha) - jnp.log(slopes)
        )

    @on_balls
    def enclose_inverse(
        self, y: Float[np.ndarray, "b d"], radius: Float[np.ndarray, " b"]
    ) -> Enclosure:
        """The inverse in double-double, increasing in every entry; frequencies count as divided
        by their sum.
        """
        widths, below = self._precise_cells()
        wrong_u, num = 4 * UNIT_ERROR / (1 - 2 * self.alpha), self.num_levels
        narrowest = np.minimum(
            widths.high,
            np.minimum(np.roll(widths.high, 1, axis=1), np.roll(widths.high, -1, axis=1)),
        )
        # float64 cannot tell narrower cells apart: nothing is known about them.
        narrowest = np.where(narrowest > 2.0**-50, narrowest, 0)

        def value(t):
            u = precise_unit(t, self.alpha)
            # Next to an edge k may be the neighbour's level; both cells continue to there.
            k = _holding(below, u)
            lower, width = (table.map(lambda part: _at(part, k)) for table in (below, widths))
            x = (DoubleDouble.of(k) + (u - lower) * width.reciprocal()) * DoubleDouble.of(
                num
            ).reciprocal()
            return x.high, 2 * U * np.abs(x.high) + 2 * wrong_u / (num * _at(narrowest, k))

        low, high = (precise_unit(end, self.alpha) for end in ends(y, radius))
        k, last = (
            _holding(below, end)
            for end in (low - DoubleDouble.of(wrong_u), high + DoubleDouble.of(wrong_u))
        )
        narrow = np.full_like(y, np.inf)
        while np.any(k <= last):
            narrow = np.minimum(narrow, _at(widths.high, np.minimum(k, last)))
            k = k + 1
        return increasing(
            value, steepest_unit(y, radius, self.alpha) / (num * narrow) * UP, y, radius
        )

    def _flatten(self, x: Float[Array, "b ..."]) -> Float[Array, "b d"]:
        entries = flatten(x)
        if self.shares is not None and entries.shape[1] != len(self.shares):
            raise ValueError(
                f"there must be a share for each of {entries.shape[1]} entries, got "
                f"{len(self.shares)}"
            )
        return entries

    def _cells(self, dtype: Any, xp: Any = jnp) -> tuple[Any, Any, Any]:
        """``u`` over each level's cell, ``u`` at its lower edge and ``1 - u`` at its upper one,
        ``(entries or 1, levels)``.
        """
        f = xp.asarray(self.frequencies).astype(dtype)
        f = f / f.sum()
        level, commonest = np.arange(len(f)), f.argmax()
        rest, nothing = xp.where(level == commonest, 0, f), xp.zeros(1, dtype)
        shares = (
            f[commonest][None] if self.shares is None else xp.asarray(self.shares).astype(dtype)
        )[:, None]
        others = (1 - shares) / rest.sum()
        rest_below = xp.concatenate([nothing, xp.cumsum(rest)[:-1]])[None]
        rest_above = xp.concatenate([xp.cumsum(rest[::-1])[::-1][1:], nothing])[None]
        widths = xp.where((level == commonest)[None], shares, others * f[None])
        below = others * rest_below + xp.where((level > commonest)[None], shares, 0)
        return widths, below, others * rest_above + xp.where((level < commonest)[None], shares, 0)

    def _of_levels(self, k: Array, dtype: Any) -> tuple[Array, Array, Array, Array, Array]:
        """``x`` at both edges of levels' cells, ``u`` at the lower and ``1 - u`` at the upper
        ones, and ``du/dx``.
        """
        widths, below, above = (_at(table, k) for table in self._cells(dtype))
        edges = jnp.asarray(self._edges_of_x(dtype)[0])
        return edges[k], edges[k + 1], below, above, self.num_levels * widths

    def _edges_of_x(self, dtype: Any) -> Float[np.ndarray, "1 k"]:
        return (np.arange(self.num_levels + 1) / self.num_levels).astype(dtype)[None]

    def _precise_cells(self) -> tuple[DoubleDouble, DoubleDouble]:
        """``u`` over each level's cell and at its lower edge, ``(entries or 1, levels)``, to
        2^-88 from rational numbers.
        """
        f = [Fraction(frequency) for frequency in np.asarray(self.frequencies).tolist()]
        m = f.index(max(f))
        total, levels = sum(f), np.arange(len(f))[None]
        rest = [Fraction(0) if k == m else each for k, each in enumerate(f)]
        p = [f[m] / total]
        if self.shares is not None:
            p = [Fraction(share) for share in np.asarray(self.shares).tolist()]
        factors = [(1 - share) / (total - f[m]) for share in p]
        shares, others = (_rational(part).map(lambda part: part[:, None]) for part in (p, factors))
        own, before = (
            _rational(row).map(lambda part: part[None])
            for row in (rest, [Fraction(0), *accumulate(rest[:-1])])
        )
        nothing = DoubleDouble.of(np.zeros((1, 1)))
        return where(levels == m, shares, others * own), others * before + where(
            levels > m, shares, nothing
        )


def _at(table: Any, k: Any) -> Any:
    """The entries ``(b, d)`` of a table ``(d or 1, levels)`` for the level of each entry."""
    return table[0 if len(table) == 1 else np.arange(k.shape[1])[None], k]


def _with_open_ends(edges: Float[np.ndarray, "n k"]) -> Float[np.ndarray, "n k"]:
    return np.pad(edges[:, 1:-1], ((0, 0), (1, 1)), constant_values=(-np.inf, np.inf))


def _within_cells(values: Array, edges: Array, k: Array) -> Array:
    """Values moved into the floats of their levels' cells, where rounding has left them;
    derivatives stay.
    """
    following = _at(edges, k + 1)
    inside = jnp.clip(
        values, _at(edges, k), jnp.nextafter(following, jnp.full_like(following, -jnp.inf))
    )
    return values + jax.lax.stop_gradient(inside - values)


def _increasing(rows: Float[np.ndarray, "n k"]) -> Float[np.ndarray, "n k"]:
    """The rows with ties moved to the next larger float, so that no interval is empty."""
    for k in range(1, rows.shape[1]):
        rows[:, k] = np.maximum(rows[:, k], np.nextafter(rows[:, k - 1], rows.dtype.type(np.inf)))
    return rows


def _holding(below: DoubleDouble, u: DoubleDouble) -> np.ndarray:
    """The level ``(b, d)`` whose cell holds ``u``; the first and the last cell go on outside [0,
    1].
    """
    last = below.high.shape[1] - 1
    rows = np.broadcast_to(below.high, (u.high.shape[1], last + 1))
    found = [np.searchsorted(*pair, side="right") for pair in zip(rows, u.high.T, strict=True)]
    k = np.clip(np.stack(found, axis=1) - 1, 0, last)
    k = np.where((k > 0) & ((u - below.map(lambda part: _at(part, k))).high < 0), k - 1, k)
    following = np.minimum(k + 1, last)
    return np.where((u - below.map(lambda part: _at(part, following))).high >= 0, following, k)


def _rational(values: Sequence[Fraction]) -> DoubleDouble:
    parts = [DoubleDouble.constant(value) for value in values]
    return DoubleDouble(
        *(np.array([getattr(part, name) for part in parts]) for name in ("high", "low"))
    )


def level_frequencies(
    images: Integer[np.ndarray, "..."], num_levels: int
) -> Float[np.ndarray, " k"]:
    """Frequency of each level of training images, none 0: ``(count + 1) / (total +
    num_levels)``.
    """
    counts = np.zeros(num_levels, np.int64)
    # A view of a file must not be read as a whole.
    for part in np.array_split(images, max(1, images.size // 2**26)):
        check_levels(part, num_levels, part.shape[1:])
        counts += np.bincount(part.ravel(), minlength=num_levels)
    return (counts + 1) / (counts.sum() + num_levels)


def entry_shares(
    images: Integer[np.ndarray, "n ..."], frequencies: Float[np.ndarray, " k"]
) -> Float[np.ndarray, " d"]:
    """Frequency of the commonest level at each entry of an example, mixed with 1 % of its frequency
    over all entries.

    Args:
        images: Training images.
        frequencies: Their `level_frequencies`.

    Returns:
        Numbers in (0, 1), one for each entry of an example in row-major order.
    """
    commonest = int(np.argmax(frequencies))
    counts = np.zeros(images.shape[1:], np.int64)
    for part in np.array_split(images, max(1, images.size // 2**26)):
        counts += (part == commonest).sum(axis=0)
    shares = (1 - WEIGHT_OF_ALL) * counts / len(images) + WEIGHT_OF_ALL * frequencies[commonest]
    return shares.ravel()
