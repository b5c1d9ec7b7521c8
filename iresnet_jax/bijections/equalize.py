r"""Histogram equalisation: a flow may start from how often grey levels occur instead of from 8 bits for each.

Level ``k`` of dequantised data fills ``[k, k + 1) / num_levels``; the distribution function of a single entry maps that to
``[F_k, F_k + f_k)``, where ``f_k`` is the level's frequency and ``F_k`` that of all levels below. Over all entries of data with
these frequencies the result is uniform, so a logit behind it makes it logistic (marginal Gaussianization, Chen & Gopinath 2000,
with another target).

Entries may have distributions of their own, as images have a background. Entry ``i`` is at the commonest level ``m`` with a
frequency ``p_i``, its share; all others have the rest in the same proportions everywhere, which keeps the same ink the same:

    f_im = p_i,    f_ik = f_k (1 - p_i) / (1 - f_m).
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer

from iresnet_jax.bijections.likelihood import quantize

WEIGHT_OF_ALL = 0.01  # of the frequency over all entries in an entry's share, so that no level is impossible anywhere


def level_frequencies(images: Integer[np.ndarray, "..."], num_levels: int = 256) -> tuple[float, ...]:
    """How often each level occurs, none never: ``(count + 1) / (total + num_levels)``.

    Args:
        images: Integers in ``[0, num_levels)``: training data.
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


def entry_shares(images: Integer[np.ndarray, "n ..."], frequencies: Sequence[float]) -> Float[np.ndarray, "..."]:
    """How often each entry of an example is at the commonest level, with a little of the frequency over all entries.

    Args:
        images: Integers: training data.
        frequencies: Those of the levels, from `level_frequencies`.

    Returns:
        Numbers in (0, 1), one for each entry of an example.
    """
    commonest = int(np.argmax(frequencies))
    counts = np.zeros(images.shape[1:], np.int64)
    for part in np.array_split(images, max(1, images.size // 2**26)):
        counts += (part == commonest).sum(axis=0)
    return (1 - WEIGHT_OF_ALL) * counts / len(images) + WEIGHT_OF_ALL * frequencies[commonest]


def equalize_forward_and_logdet(
    x: Float[Array, "b ..."], frequencies: Sequence[float], shares: Float[np.ndarray, "..."] | None = None
) -> tuple[Float[Array, "b ..."], Float[Array, " b"]]:
    r"""``u = F_k + f_k (num_levels x - k)``: continuous, strictly increasing, with slope ``f_k num_levels``.

    Args:
        x: Numbers in [0, 1); outside, the first and the last cell are continued.
        frequencies: One a level, positive, of sum 1; see `level_frequencies`.
        shares: For each entry of an example, how often it is at the commonest level, see `entry_shares`; None if all entries
            have the same distribution.

    Returns:
        Numbers in [0, 1) and the exact log-determinant ``sum log(f_k num_levels)``.

    Raises:
        ValueError: If a frequency is not positive, or they do not add up to 1; or if a share is not in (0, 1), or there is not
            one for each entry.

    Example:
        >>> u, logdet = equalize_forward_and_logdet(x, level_frequencies(train_images))
    """
    cells = _histogram(frequencies, x.dtype)
    k = quantize(x, len(frequencies)).astype(jnp.int32)
    start, slope = cells.edges[k], cells.slopes[k]
    if shares is not None:
        own = _own(cells, shares, x)
        start = own.from_all(start)
        slope = slope * jnp.where(k == cells.commonest, own.factor, own.factor_of_others)
    return start + slope * (x - cells.levels[k]), _log_sum(slope)


def equalize_inverse_and_logdet(
    u: Float[Array, "b ..."], frequencies: Sequence[float], shares: Float[np.ndarray, "..."] | None = None
) -> tuple[Float[Array, "b ..."], Float[Array, " b"]]:
    """Inverts `equalize_forward_and_logdet`: ``x = (k + (u - F_k) / f_k) / num_levels``.

    Args:
        u: Numbers in [0, 1); outside, the first and the last cell are continued.
        frequencies: Those of the forward map.
        shares: Those of the forward map.

    Returns:
        The numbers and the exact log-determinant of the inverse.

    Raises:
        ValueError: As the forward map.
    """
    cells = _histogram(frequencies, u.dtype)
    own = None if shares is None else _own(cells, shares, u)
    of_all = u if own is None else own.to_all(u)
    k = jnp.maximum(jnp.searchsorted(cells.edges, of_all, side="right") - 1, 0)
    slope = cells.slopes[k]
    if own is not None:
        slope = slope * jnp.where(k == cells.commonest, own.factor, own.factor_of_others)
    return cells.levels[k] + (of_all - cells.edges[k]) / cells.slopes[k], -_log_sum(slope)


def all_slopes(frequencies: Sequence[float], shares: Float[np.ndarray, "..."] | None = None) -> Float[np.ndarray, " s"]:
    """Every slope that the map of `equalize_forward_and_logdet` has anywhere."""
    f = np.asarray(frequencies, np.float64)
    if shares is None:
        return f * len(f)
    p, commonest = np.ravel(shares), int(np.argmax(f))
    others = np.outer(np.delete(f, commonest), (1 - p) / (1 - f[commonest]))
    return np.concatenate([others.ravel(), p]) * len(f)


class _Cells(NamedTuple):
    """Of every level the slope and where its cell begins in ``u`` and in ``x``; the commonest level, and its cell in ``u``."""

    slopes: Array
    edges: Array
    levels: Array
    commonest: int
    begin: float
    size: float


def _histogram(frequencies: Sequence[float], dtype: np.dtype) -> _Cells:
    f = np.asarray(frequencies, np.float64)
    if f.ndim != 1 or not np.all(f > 0) or abs(f.sum() - 1) > 1e-6:
        raise ValueError(f"frequencies must be positive and add up to 1, got {len(f)} with the sum {f.sum()}")
    edges = np.concatenate([[0.0], np.cumsum(f)[:-1]])
    commonest = int(np.argmax(f))
    begin = float(edges[commonest])
    slopes, edges, levels = (jnp.asarray(table, dtype) for table in (f * len(f), edges, np.arange(len(f)) / len(f)))
    return _Cells(slopes, edges, levels, commonest, begin, float(f[commonest]))


class _Own(NamedTuple):
    """The map from the distribution function of all entries to that of each: linear below, in and above the commonest cell.

    Attributes:
        begin, end: Of that cell for all entries.
        own_begin, own_end: For each.
        factor: The slope in it.
        factor_of_others: The slope elsewhere.
    """

    begin: Array
    end: Array
    own_begin: Array
    own_end: Array
    factor: Array
    factor_of_others: Array

    def from_all(self, u: Array) -> Array:
        inside = self.own_begin + self.factor * (u - self.begin)
        above = self.own_end + self.factor_of_others * (u - self.end)
        return jnp.where(u < self.begin, self.factor_of_others * u, jnp.where(u < self.end, inside, above))

    def to_all(self, v: Array) -> Array:
        inside = self.begin + (v - self.own_begin) / self.factor
        above = self.end + (v - self.own_end) / self.factor_of_others
        return jnp.where(v < self.own_begin, v / self.factor_of_others, jnp.where(v < self.own_end, inside, above))


def _own(cells: _Cells, shares: Float[np.ndarray, "..."], x: Array) -> _Own:
    p = np.asarray(shares, np.float64)
    if p.shape != x.shape[1:] or not np.all((p > 0) & (p < 1)):
        raise ValueError(f"shares must lie in (0, 1), one for each entry of {x.shape[1:]}, got {p.shape}")
    p = p[None]  # for every example
    begin, end, others = cells.begin, cells.begin + cells.size, (1 - p) / (1 - cells.size)
    tables = (begin, end, others * begin, others * begin + p, p / cells.size, others)
    return _Own(*(jnp.asarray(table, x.dtype) for table in tables))


def _log_sum(slope: Float[Array, "b ..."]) -> Float[Array, " b"]:
    return jnp.sum(jnp.log(slope).reshape(len(slope), -1), axis=1)
