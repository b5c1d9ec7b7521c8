r"""Maps of entries to the real line: by a logit between two ends, by a logarithm beyond one end, by
asinh for heavy tails.

    log((x - low) / (high - x)),    log((x - low) / scale),    -log((high - x) / scale),    asinh((x
    - center) / scale)

Each map takes all possible values of an entry to the whole line, so no mass is lost or added. A
flow with bounded Lipschitz constants keeps the tail of its prior (Jaini et al. 2020). Through
asinh, logistic tails ``exp(-|y| / s)`` become powers ``|x|^(-1/s)``, and normal tails become
log-normal.

**Near an end** other than 0, floats are equally spaced: the logit of the last float is 17, and the
tail of a wide density on the line would lie between this float and the end. Within 64 floats, at
distances ``d`` below ``e = 2^-18 |end|``, the map goes on with its slope as a multiple of ``e / d -
1``, which reaches farther than any tail.

**At an end** ``y`` is infinite. A value exactly at an end counts as the value at a distance of
`END` times the width, or the scale, from it. Single precision tells values apart at this distance,
so a density that is large there is large on many floats.
"""

import math
from dataclasses import field
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num

from iresnet_jax.bijections.bijection import ClosedForm
from iresnet_jax.bijections.enclosure import Enclosure, on_balls
from iresnet_jax.bijections.standardize import ROUNDING, Identity, Standardize, Whiten
from iresnet_jax.maths.lipschitz_bounds import BiLipschitz
from iresnet_jax.maths.platforms import floats
from iresnet_jax.maths.upward_rounding import UP, U, as_floats
from iresnet_jax.pytrees import pytree

TAIL = 2.0**-18  # share of an end up to which distances from it belong to the tail
# Distance from an end that a value exactly there counts as, as a share of the width or scale.
END = 2.0**-12


@pytree(arrays=("low", "high", "center", "scale", "then"))
class Bounded(ClosedForm):
    """Maps of entries to the line, and a transform of continuous data behind them.

    Attributes:
        low: Lower end of each entry of a vector; minus infinity where there is none.
        high: Upper end; infinity where there is none.
        center: Center of heavy tails.
        scale: Scale of heavy tails; 0 leaves an entry without ends as it is. For an entry with one
            end, the distance from it that is mapped to 0.
        then: Transform of the mapped vectors.
    """

    low: Any
    high: Any
    center: Any = 0.0
    scale: Any = 0.0
    then: Identity | Standardize | Whiten = field(default_factory=Identity)

    def __post_init__(self):
        names = "low", "high", "center", "scale"
        rows = np.broadcast_arrays(*(np.asarray(getattr(self, name), np.float64) for name in names))
        for name, row in zip(names, rows, strict=True):
            object.__setattr__(self, name, floats(row))
        for low, high, _, scale in zip(*(row.tolist() for row in rows), strict=True):
            largest = max(abs(end) for end in (low, high, 0.0) if math.isfinite(end))
            if not low < high:
                raise ValueError(f"the lower end must be below the upper one, got {low} and {high}")
            size = high - low if scale == 0 or math.isfinite(high - low) else scale
            if not 2.0**-16 * largest < size:  # 128 floats
                raise ValueError(
                    f"single precision cannot tell values between {low} and {high} "
                    "apart: subtract their mean"
                )

    @property
    def num_entries(self) -> int:
        """Length of examples."""
        return len(self.low)

    def map(self, x: Num[Array, "b d"]) -> tuple[Float[Array, "b d"], Float[Array, " b"]]:
        """The mapped vectors; outside of an interval the log-determinant is minus infinity."""
        line, log_slopes = self.to_line(as_floats(x))
        y, log_det = self.then.map(line)
        return y, log_det + jnp.sum(log_slopes, axis=1)

    def unmap(self, y: Num[Array, "b d"]) -> tuple[Float[Array, "b d"], Float[Array, " b"]]:
        """Vectors within their intervals."""
        line, log_det = self.then.unmap(as_floats(y))
        x, log_slopes = self.from_line(line)
        return x, log_det + jnp.sum(log_slopes, axis=1)

    def bilipschitz(self) -> BiLipschitz:
        """Constants of both maps: steep without bound near ends and in tails; the logit is
        flattest in the middle.
        """
        _, _, _, scale, bounded, is_both = self._rows(self.low, jnp)
        steepest = jnp.where(bounded, jnp.inf, 1 / jnp.where(scale > 0, scale, 1))
        widest = jnp.where(is_both, scale / 4, jnp.where(bounded | (scale > 0), jnp.inf, 1))
        own = BiLipschitz((1 + ROUNDING) * jnp.max(steepest), (1 + ROUNDING) * jnp.max(widest))
        return own.compose(self.then.bilipschitz())

    def to_line(self, x: Any, xp: Any = jnp) -> tuple[Any, Any]:
        """Vectors on the real line, and ``log dy/dx`` of every entry: minus infinity out of its
        interval.

        With NumPy as ``xp`` it computes in float64, without a compiled program.
        """
        low, high, center, scale, bounded, is_both = self._rows(x, xp)
        unit, is_low = xp.where(scale > 0, scale, 1), x - low < high - x
        end = xp.where(bounded, xp.where(is_low, low, high), 0)
        gap = xp.where(bounded, xp.where(is_low, x - low, high - x), unit)
        # Tolerates the rounding of noise in the last cell.
        is_outside = gap < -2 * xp.finfo(x.dtype).eps * (xp.abs(end) + unit)
        gap = xp.where(gap < xp.finfo(x.dtype).tiny, END * unit, gap)
        rest = unit - is_both * gap
        y, log_slopes = xp.log(gap) - xp.log(rest), xp.log(unit) - xp.log(gap) - xp.log(rest)
        e, start, stretch = _tail(end, unit, is_both, xp)
        # The gradient of 1 / gap may overflow where the quotient is not used.
        near = xp.where(gap < e, gap, 1)
        y = xp.where(gap < e, start - stretch * (e / near - 1), y)
        log_slopes = xp.where(gap < e, xp.log(stretch * e) - 2 * xp.log(near), log_slopes)
        y, log_slopes = xp.where(is_low, y, -y), xp.where(is_outside, -xp.inf, log_slopes)
        t = xp.arcsinh((x - center) / unit)
        # log(cosh) by logaddexp, as cosh overflows.
        free_slopes = xp.where(scale > 0, math.log(2) - xp.logaddexp(t, -t) - xp.log(unit), 0)
        return xp.where(bounded, y, xp.where(scale > 0, t, x)), xp.where(
            bounded, log_slopes, free_slopes
        )

    def from_line(self, y: Any, xp: Any = jnp) -> tuple[Any, Any]:
        """Vectors between the ends of their intervals, and ``log dx/dy`` of every entry; the
        inverse of `to_line`.
        """
        low, high, center, scale, bounded, is_both = self._rows(y, xp)
        unit, is_low = xp.where(scale > 0, scale, 1), xp.isfinite(low) & ((y < 0) | ~is_both)
        end = xp.where(bounded, xp.where(is_low, low, high), 0)
        t = xp.where(bounded, xp.where(is_low, y, -y), 0)
        ratio = xp.exp(t)
        odds = xp.where(is_both, ratio, 0)
        gap, log_slopes = unit * ratio / (1 + odds), xp.log(unit) + t - 2 * xp.log1p(odds)
        e, start, stretch = _tail(end, unit, is_both, xp)
        further = xp.maximum(start - t, 0) / stretch
        gap = xp.where(further > 0, e / (1 + further), gap)
        log_slopes = xp.where(further > 0, xp.log(e / stretch) - 2 * xp.log1p(further), log_slopes)
        tiny = xp.finfo(y.dtype).tiny
        first = xp.maximum(xp.nextafter(low, high), low + tiny)
        last = xp.minimum(xp.nextafter(high, low), high - tiny)
        x = xp.clip(xp.where(is_low, low + gap, high - gap), first, last)
        t = xp.where(bounded | (scale == 0), 0, y)  # sinh of others may overflow
        free = xp.where(scale > 0, center + unit * xp.sinh(t), y)
        free_slopes = xp.where(scale > 0, xp.log(unit) + xp.logaddexp(t, -t) - math.log(2), 0)
        return xp.where(bounded, x, free), xp.where(bounded, log_slopes, free_slopes)

    @on_balls
    def enclose_inverse(
        self, y: Float[np.ndarray, "b d"], radius: Float[np.ndarray, " b"]
    ) -> Enclosure:
        """The images of the intervals in which ``then`` encloses entries; slopes are largest at an
        interval's end, or next to 0.
        """
        line = self.enclose_line(y, radius)
        low, high, center, scale, bounded, _ = self._rows(y, np)
        points = np.concatenate([line.center, line.low, line.high, np.clip(0, line.low, line.high)])
        x, log_slopes = (
            found.reshape(4, *y.shape) for found in Bounded.from_line(self, points, np)
        )
        offset = np.where(bounded, np.minimum(x - low, high - x), np.abs(x - center))
        # NumPy's functions round less
        errors = np.where(bounded | (scale > 0), 16 * U * (np.abs(x) + offset) + 1e-300, 0)
        steepest = np.exp(log_slopes.max(axis=(0, 2))) * (1 + 2.0**-40)
        return Enclosure(
            low=np.maximum(x[1] - errors[1], low),
            high=np.minimum(x[2] + errors[2], high),
            center=x[0],
            error=(np.linalg.norm(errors[0], axis=1) + steepest * line.error) * UP,
            lipschitz=steepest * line.lipschitz * UP,
        )

    def enclose_line(self, y: Any, radius: Any) -> Enclosure:
        """Enclosures of the mapped vectors."""
        return self.then.enclose_inverse(y, radius)

    def _rows(self, x: Any, xp: Any) -> tuple[Any, Any, Any, Any, Any, Any]:
        """Ends, centers, and scales or widths in the type of ``x``, which entries have an end,
        and which have two; as rows.
        """
        numbers = self.low, self.high, self.center, self.scale
        low, high, center, scale = (xp.asarray(values)[None].astype(x.dtype) for values in numbers)
        width, bounded = high - low, xp.isfinite(low) | xp.isfinite(high)
        return (
            low,
            high,
            center,
            xp.where(xp.isfinite(width), width, scale),
            bounded,
            xp.isfinite(width),
        )


def _tail(end: Any, unit: Any, is_both: Any, xp: Any) -> tuple[Any, Any, Any]:
    """The distance ``e`` from an end at which its tail begins, the place on the line there, and
    ``dy/dx`` there times ``e``.
    """
    e = xp.maximum(TAIL * xp.abs(end), xp.finfo(end.dtype).tiny)
    rest = unit - is_both * e
    return e, xp.log(e) - xp.log(rest), unit / rest
