r"""Entries on the real line: intervals by a logit, so that all that the inverse gives lies inside, heavy tails by asinh.

    y = log((x - low) / (high - x)),    dy/dx = (high - low) / ((x - low) (high - x)),

computed from the distances to the ends, which are exact near them. It maps the open interval onto the whole line, so a density
of the line is one of the interval and no mass is lost or made. A transform of continuous data follows, `Standardize` or
`Whiten`, fitted to the mapped values.

**Near an end** other than 0, floats are equally spaced: the logit of the last one is 17, and a wide density of the line would
have its tail between that and the end. Within 64 floats of an end, at distances ``d`` below ``e = 2^-18 |end|``, the map is

    y = +- (log((w - e) / e) + (e / d - 1) w / (w - e)),    |dy/dx| = e w / ((w - e) d^2),    w = high - low,

which continues the logit with its slope and reaches farther than any tail.

**At an end** ``y`` is infinite. A value exactly there counts as the one at a distance of `END` times the width, where single
precision tells values apart: a density that is large there is large on many floats, and not on the end alone.

**Outside** of an interval the density is 0: the log-determinant is minus infinity.

**Heavy tails** are those of entries without ends: a flow whose Lipschitz constants are bounded keeps the tail of its
prior (Jaini et al. 2020). With ``y = asinh((x - center) / scale)``, logistic tails ``exp(-|y| / s)`` are the powers
``|x|^(-1/s)`` of x, and normal tails those of a log-normal distribution.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from iresnet_jax.bijections.bijection import ClosedForm
from iresnet_jax.bijections.enclosure import Enclosure, on_balls
from iresnet_jax.bijections.logit import UNIT_ERROR
from iresnet_jax.bijections.standardize import ROUNDING, Identity, Standardize, Whiten, set_floats
from iresnet_jax.checked_dataclasses import pytree
from iresnet_jax.maths.double_double import DoubleDouble, log, where
from iresnet_jax.maths.lipschitz_bounds import BiLipschitz
from iresnet_jax.maths.precise_activations import sigmoid
from iresnet_jax.maths.upward_rounding import UP, U

TAIL = 2.0**-18  # share of an end up to which distances from it belong to the tail
END = 2.0**-12  # distance from an end that a value exactly there counts as, as a share of the width


@dataclass(frozen=True)
class Bounds:
    """An interval that an entry does not leave.

    Attributes:
        low: Lower end.
        high: Upper end.
    """

    low: float
    high: float

    def __post_init__(self):
        if not (np.all(np.isfinite([self.low, self.high])) and self.low < self.high):
            raise ValueError(f"bounds must be finite and the lower end below the upper one, got {self.low} and {self.high}")
        if not 2.0**-18 * max(abs(self.low), abs(self.high)) < self.high - self.low:  # 32 units in the last place
            raise ValueError(
                f"single precision cannot tell values apart within the bounds {self.low} and {self.high}: subtract the mean"
            )


@dataclass(frozen=True)
class Asinh:
    """The map ``asinh((x - center) / scale)`` of an entry with heavy tails."""

    center: float
    scale: float


@pytree(arrays=("low", "high", "then", "center", "scale"))
class Bounded(ClosedForm):
    """The logit of entries within their intervals, asinh of those with heavy tails, and a transform of continuous data behind.

    Attributes:
        low: Lower ends of the entries of a vector, 0 where there is none.
        high: Upper ends, 1 where there is none.
        is_bounded: Which entries have bounds; the others may be any number.
        then: Transform of the mapped vectors.
        center: Centers of entries with heavy tails.
        scale: Their scales, 0 where there are no heavy tails; None without any.
    """

    low: Any
    high: Any
    is_bounded: tuple[bool, ...]
    then: Identity | Standardize | Whiten = field(default_factory=Identity)
    center: Any = None
    scale: Any = None

    def __post_init__(self):
        num = len(self.is_bounded)
        for name in ("center", "scale"):
            object.__setattr__(self, name, np.zeros(num) if getattr(self, name) is None else getattr(self, name))
        set_floats(self, "low", "high", "center", "scale")
        if not (any(self.is_bounded) or np.any(np.asarray(self.scale) > 0)):
            raise ValueError("no entry has bounds or heavy tails: use the transform of continuous data alone")
        if not self.low.shape == self.high.shape == (num,):
            raise ValueError(f"there must be two ends for each of {num} entries, got {self.low.shape} and {self.high.shape}")
        if not isinstance(self.then, Identity) and self.then.num_entries != num:
            raise ValueError(f"there are bounds for {num} entries and a transform of {self.then.num_entries}")

    @classmethod
    def of(cls, ends: Sequence[Bounds | Asinh | None], then: Identity | Standardize | Whiten | None = None) -> "Bounded":
        """The transform of entries with these intervals or maps of heavy tails; None is an entry without."""
        is_bounded = tuple(isinstance(each, Bounds) for each in ends)
        low, high = np.array([(each.low, each.high) if isinstance(each, Bounds) else (0.0, 1.0) for each in ends]).T
        center, scale = np.array([(each.center, each.scale) if isinstance(each, Asinh) else (0.0, 0.0) for each in ends]).T
        return cls(low, high, is_bounded, then or Identity(), center, scale)

    @property
    def num_entries(self) -> int:
        """Length of examples."""
        return len(self.is_bounded)

    @property
    def ends(self) -> tuple[Bounds | Asinh | None, ...]:
        """What `of` makes the transform of."""
        numbers = (np.asarray(values).tolist() for values in (self.low, self.high, self.center, self.scale))
        rows = zip(self.is_bounded, *numbers, strict=True)
        return tuple(
            Bounds(low, high) if bounded else Asinh(center, scale) if scale else None
            for bounded, low, high, center, scale in rows
        )

    def forward_and_logdet(self, x: Float[Array, "b d"]) -> tuple[Float[Array, "b d"], Float[Array, " b"]]:
        """The mapped vectors; outside of an interval the log-determinant is minus infinity."""
        line, log_slopes = self.to_line(x)
        y, log_det = self.then.forward_and_logdet(line)
        return y, log_det + jnp.sum(log_slopes, axis=1)

    def inverse_and_logdet(self, y: Float[Array, "b d"]) -> tuple[Float[Array, "b d"], Float[Array, " b"]]:
        """Vectors within their intervals."""
        line, log_det = self.then.inverse_and_logdet(y)
        x, log_slopes = self.from_line(line)
        return x, log_det + jnp.sum(log_slopes, axis=1)

    def bilipschitz(self) -> BiLipschitz:
        """Constants of both maps: logit and sinh are steep without bound, their inverses steepest in the middle."""
        is_heavy, is_bounded = self.scale > 0, jnp.array(self.is_bounded)
        steepest = jnp.where(is_bounded, jnp.inf, jnp.where(is_heavy, 1 / jnp.where(is_heavy, self.scale, 1), 1))
        widest = jnp.where(is_heavy, jnp.inf, jnp.where(is_bounded, (self.high - self.low) / 4, 1))
        own = BiLipschitz((1 + ROUNDING) * jnp.max(steepest), (1 + ROUNDING) * jnp.max(widest))
        return own.compose(self.then.bilipschitz())

    def to_line(self, x: Any, xp: Any = jnp) -> tuple[Any, Any]:
        """Vectors ``(b, d)`` on the real line, and ``log dy/dx`` of every entry: minus infinity out of its interval.

        Args:
            x: The vectors.
            xp: ``jax.numpy`` or ``numpy``, which computes in float64 what no program compiles.
        """
        low, high, bounded = self._ends(x, xp)
        rounding = 2 * xp.finfo(x.dtype).eps * xp.maximum(xp.abs(low), xp.abs(high))  # of noise in the last cell
        is_within = (x >= low - rounding) & (x <= high + rounding)
        smallest, end = xp.finfo(x.dtype).tiny, END * (high - low)
        inside = xp.where(x - low < smallest, low + end, xp.where(high - x < smallest, high - end, x))
        below, above = xp.log(inside - low), xp.log(high - inside)
        line, log_slopes = below - above, xp.log(high - low) - below - above
        for sign, end, gap in ((-1, low, inside - low), (1, high, high - inside)):
            first, stretch, e = _tail(end, high - low, xp)
            line = xp.where(gap < e, sign * (first + (e / gap - 1) * stretch), line)
            log_slopes = xp.where(gap < e, xp.log(xp.where(e > 0, e, 1) * stretch) - 2 * xp.log(gap), log_slopes)
        center, scale, heavy = self._tails(x, xp)
        in_tails = xp.arcsinh((x - center) / scale)
        free, free_slopes = xp.where(heavy, in_tails, x), xp.where(heavy, -_log_cosh(in_tails, xp) - xp.log(scale), 0)
        return xp.where(bounded, line, free), xp.where(bounded, xp.where(is_within, log_slopes, -xp.inf), free_slopes)

    def from_line(self, y: Any, xp: Any = jnp) -> tuple[Any, Any]:
        """Vectors between the ends of their intervals, and ``log dx/dy`` of every entry; the inverse of `to_line`."""
        low, high, bounded = self._ends(y, xp)
        decay, width = xp.exp(-xp.abs(y)), high - low
        x = xp.where(y < 0, low + width * decay / (1 + decay), high - width * decay / (1 + decay))
        log_slopes = xp.log(width) - xp.abs(y) - 2 * xp.log1p(decay)
        for sign, end in ((-1, low), (1, high)):
            first, stretch, e = _tail(end, width, xp)
            further = xp.maximum(sign * y - first, 0) / stretch
            x = xp.where(further > 0, end - sign * e / (1 + further), x)
            of_tail = xp.log(xp.where(e > 0, e, 1) / stretch) - 2 * xp.log1p(further)
            log_slopes = xp.where(further > 0, of_tail, log_slopes)
        smallest = xp.finfo(y.dtype).tiny
        first = xp.maximum(xp.nextafter(low, high), low + smallest)
        x = xp.clip(x, first, xp.minimum(xp.nextafter(high, low), high - smallest))
        center, scale, heavy = self._tails(y, xp)
        in_tails = xp.where(heavy, y, 0)  # sinh of others may overflow
        free, free_slopes = center + scale * xp.sinh(in_tails), xp.log(scale) + _log_cosh(in_tails, xp)
        free, free_slopes = xp.where(heavy, free, y), xp.where(heavy, free_slopes, 0)
        return xp.where(bounded, x, free), xp.where(bounded, log_slopes, free_slopes)

    def clip(self, x: Any, margin: Any) -> Any:
        """Vectors whose entries with a positive margin, those that own cells, stay so far from their ends.

        A point between two cells may be rounded to either, and beyond the last one there is none.
        """
        low, high, bounded = self._ends(x, jnp)
        return jnp.where(bounded & (margin > 0), jnp.clip(x, low + margin, high - margin), x)

    def outside(self, x: np.ndarray) -> np.ndarray:
        """Which entries of vectors are out of their intervals, read in the type of the vectors."""
        low, high, bounded = self._ends(x, np)
        return bounded & ~((x >= low) & (x <= high))

    @on_balls
    def enclose_inverse(self, y: Float[np.ndarray, "b d"], radius: Float[np.ndarray, " b"]) -> Enclosure:
        """The logistic function of the intervals on the real line in which the transform behind encloses every entry."""
        line = self.then.enclose_inverse(y, radius)
        low, high, bounded = self._ends(line.center, np)
        width, one = DoubleDouble.of(high) - DoubleDouble.of(low), DoubleDouble.of(1.0)

        def value(t):
            x = DoubleDouble.of(low) + width * sigmoid(DoubleDouble.of(t))
            for sign, end in ((-1.0, low), (1.0, high)):
                e = DoubleDouble.of(TAIL * np.abs(end))
                rest, known = width - e, e.high > 0
                first = log(rest * where(known, e, one).reciprocal())
                further = (DoubleDouble.of(sign * t) - first) * rest * width.reciprocal()
                in_tail = known & (further.high > 0)  # or next to it: both continue to there
                beyond = e * (one + where(in_tail, further, one)).reciprocal()
                x = where(in_tail, DoubleDouble.of(end) - beyond.times(sign), x)
            return x.high, (U * np.abs(x.high) + width.high * UNIT_ERROR) * UP

        center, errors = value(line.center)
        (least, least_errors), (most, most_errors) = value(line.low), value(line.high)
        nearest = np.maximum(np.maximum(line.low, -line.high), 0)  # the point nearest to 0, where the map is steepest
        begins = np.minimum(*(_tail(end, high - low, np)[0] for end in (low, high))) - 1e-9
        nearest = np.minimum(nearest, begins)  # in a tail the slope is at most the one where it begins
        s = sigmoid(DoubleDouble.of(nearest))
        slopes = np.where(bounded, width.high * ((s * (DoubleDouble.of(1.0) - s)).high + UNIT_ERROR) * UP, 1)
        shift, scale, heavy = self._tails(line.center, np)
        farthest = np.where(heavy, np.maximum(np.abs(line.low), np.abs(line.high)), 0)
        slopes = np.where(heavy, scale * np.cosh(farthest) * UP, slopes)

        def free(t):  # and the rounding of sinh, of products and of sums, also of t itself
            x = shift + scale * np.sinh(np.where(heavy, t, 0))
            return np.where(heavy, x, t), np.where(heavy, 8 * U * (np.abs(x) + np.abs(shift)), 0)

        (of_free, free_errors), (below, below_errors), (above, above_errors) = map(free, (line.center, line.low, line.high))
        steepest, errors = slopes.max(axis=1) * UP, np.where(bounded, errors, free_errors)
        return Enclosure(
            low=np.where(bounded, np.maximum(np.nextafter(least - least_errors, -np.inf), low), below - below_errors),
            high=np.where(bounded, np.minimum(np.nextafter(most + most_errors, np.inf), high), above + above_errors),
            center=np.where(bounded, center, of_free),
            error=(np.linalg.norm(errors, axis=1) * UP + steepest * line.error) * UP,
            lipschitz=steepest * line.lipschitz * UP,
        )

    def _ends(self, x: Any, xp: Any) -> tuple[Any, Any, Any]:
        """Ends of all entries in the type of ``x``, as rows, and which entries have some."""
        low, high = (xp.asarray(ends)[None].astype(x.dtype) for ends in (self.low, self.high))
        return low, high, xp.asarray([self.is_bounded])

    def _tails(self, x: Any, xp: Any) -> tuple[Any, Any, Any]:
        """Centers and scales of heavy tails in the type of ``x``, as rows, 1 of other entries, and which entries have some."""
        center, scale = (xp.asarray(values)[None].astype(x.dtype) for values in (self.center, self.scale))
        return center, xp.where(scale > 0, scale, 1), scale > 0


def _log_cosh(y: Any, xp: Any) -> Any:
    """``log cosh y``, which does not overflow."""
    return xp.abs(y) + xp.log1p(xp.exp(-2 * xp.abs(y))) - math.log(2)


def _tail(end: Any, width: Any, xp: Any) -> tuple[Any, Any, Any]:
    """Where the tail next to an end begins on the line, without its sign, ``w / (w - e)`` and ``e``; none at the end 0."""
    e = TAIL * xp.abs(end)
    first = xp.where(e > 0, xp.log((width - e) / xp.where(e > 0, e, 1)), xp.inf)
    return first, width / (width - e), e
