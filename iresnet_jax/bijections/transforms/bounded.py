r"""Entries that stay within an interval, on the real line: every value that the inverse gives lies inside.

    y = log((x - low) / (high - x)),    dy/dx = (high - low) / ((x - low) (high - x)),

the logit of the place within the interval, computed from the distances to its ends, which are exact near them. A transform of
continuous data follows, `Standardize` or `Whiten`, fitted to the mapped values.

**At the ends** the logit is infinite. Within a distance `Bounds.edge` of an end all values count as the one at that distance:
the density there is constant. The inverse gives no value closer to an end than the edge, which is wider than what single
precision rounds.

**Outside** of an interval, by more than an edge, the density is 0: the log-determinant is minus infinity.
"""

from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from iresnet_jax.bijections.bijection import Bijection, exact_bijection
from iresnet_jax.bijections.transforms.enclosure import Enclosure, on_balls
from iresnet_jax.bijections.transforms.logit import UNIT_ERROR, Identity
from iresnet_jax.bijections.transforms.standardize import Constants, Standardize, Whiten, inverse_bound
from iresnet_jax.maths.enclosures import double_double
from iresnet_jax.maths.enclosures.ball_arithmetic import Ball, log, where
from iresnet_jax.maths.enclosures.double_double import DoubleDouble
from iresnet_jax.maths.enclosures.precise_activations import sigmoid
from iresnet_jax.maths.enclosures.upward_rounding import UP, U
from iresnet_jax.maths.lipschitz_bounds import BiLipschitz

EDGE = 2.0**-20  # of the interval, or of the spacing of a grid: share that an end takes
FLOAT32_EDGE = 2.0**-21  # least edge as a share of the larger end: 4 units in the last place of float32


@dataclass(frozen=True)
class Bounds:
    """An interval that an entry does not leave.

    Attributes:
        low: Lower end.
        high: Upper end.
        edge: Distance from an end up to which all values count as one.
    """

    low: float
    high: float
    edge: float

    def __post_init__(self):
        if not (np.all(np.isfinite([self.low, self.high])) and self.low < self.high):
            raise ValueError(f"bounds must be finite and the lower end below the upper one, got {self.low} and {self.high}")
        if not FLOAT32_EDGE * max(abs(self.low), abs(self.high)) <= self.edge < (self.high - self.low) / 8:
            raise ValueError(
                f"single precision cannot tell values apart within the bounds {self.low} and {self.high}: subtract the mean"
            )

    @classmethod
    def of(cls, low: float, high: float, spacing: float | None = None) -> "Bounds":
        """The interval with its edge: a millionth of the interval or, for values on a grid, of their spacing.

        Args:
            low: Lower end.
            high: Upper end.
            spacing: Distance of neighbouring values on a grid, whose cells fill the interval.
        """
        return cls(low, high, max(EDGE * (spacing or high - low), FLOAT32_EDGE * max(abs(low), abs(high))))


UNIT = Bounds(0.0, 1.0, 0.1)


@dataclass(frozen=True)
class Bounded:
    """The logit of entries within their intervals, and a transform of continuous data behind it.

    Attributes:
        intervals: Bounds of each entry of a vector; None for an entry that may be any number.
        then: Transform of the mapped vectors.
    """

    intervals: tuple[Bounds | None, ...]
    then: Identity | Standardize | Whiten = field(default_factory=Identity)

    def __post_init__(self):
        if not any(self.intervals):
            raise ValueError("no entry has bounds: use the transform of continuous data alone")
        if not isinstance(self.then, Identity) and len(self.then.mean) != len(self.intervals):
            raise ValueError(f"there are bounds for {len(self.intervals)} entries and a transform of {len(self.then.mean)}")

    @property
    def standard(self) -> "Bounded":
        """The unit interval for every entry with bounds."""
        then = self.then if isinstance(self.then, Identity) else self.then.standard
        return Bounded(tuple(bounds and UNIT for bounds in self.intervals), then)

    def constants(self) -> Constants:
        """What `bijection`, `to_line` and `from_line` compute with."""
        low, high, edge, _ = self._arrays(np.float64)
        then = {} if isinstance(self.then, Identity) else {"then": self.then.constants()}
        return {"low": low, "high": high, "edge": edge, "inverse_lipschitz": inverse_bound(self), **then}

    def bijection(self, constants: Constants | None = None) -> Bijection:
        """The map of vectors; outside of an interval its log-determinant is minus infinity.

        Args:
            constants: Those of another `Bounded` with bounds for the same entries, in place of its own.
        """
        given = self.constants() if constants is None else constants
        then = self.then.bijection(*([given["then"]] if "then" in given else []))

        def forward_and_logdet(x):
            line, log_slopes = self.to_line(x, constants=given)
            y, log_det, _ = then.forward_and_logdet(line, None)  # pyright: ignore[reportArgumentType] (exact: takes no key)
            return y, log_det + jnp.sum(log_slopes, axis=1)

        def inverse_and_logdet(y):
            line, log_det, _, _ = then.inverse_and_logdet(y, None)  # pyright: ignore[reportArgumentType]
            x, log_slopes = self.from_line(line, constants=given)
            return x, log_det + jnp.sum(log_slopes, axis=1)

        return exact_bijection(forward_and_logdet, inverse_and_logdet, inverse_lipschitz=given["inverse_lipschitz"])

    def bilipschitz(self) -> BiLipschitz:
        """Constants of both maps: the logit is steepest at an edge, and its inverse in the middle of the interval."""
        low, high, edge, bounded = self._arrays(np.float64)
        width = high - low
        free = [] if bounded.all() else [1.0]
        steepest = [*free, *(width / (edge * (width - edge)))[bounded]]
        widest = [*free, *(width / 4)[bounded]]
        return BiLipschitz.of(max(steepest), max(widest)).compose(self.then.bilipschitz())

    def to_line(self, x: Any, xp: Any = jnp, *, constants: Constants | None = None) -> tuple[Any, Any]:
        """Vectors ``(b, d)`` on the real line, and ``log dy/dx`` of every entry: minus infinity out of its interval.

        Args:
            x: The vectors.
            xp: ``jax.numpy`` or ``numpy``, which computes in float64 what no program compiles.
            constants: See `bijection`.
        """
        low, high, edge, bounded = self._ends(x, xp, constants)
        inside = xp.clip(x, low + edge, high - edge)
        below, above = xp.log(inside - low), xp.log(high - inside)
        is_within = (x >= low - edge) & (x <= high + edge)  # noise on a grid may be rounded beyond its last cell
        log_slopes = xp.where(is_within, xp.log(high - low) - below - above, -xp.inf)
        return xp.where(bounded, below - above, x), xp.where(bounded, log_slopes, 0)

    def from_line(self, y: Any, xp: Any = jnp, *, constants: Constants | None = None) -> tuple[Any, Any]:
        """Vectors within their intervals, and ``log dx/dy`` of every entry; the inverse of `to_line`."""
        low, high, edge, bounded = self._ends(y, xp, constants)
        limit = xp.log((high - low - edge) / edge)
        inside = xp.clip(y, -limit, limit)
        below, above = 1 / (1 + xp.exp(-inside)), 1 / (1 + xp.exp(inside))
        x = xp.where(inside < 0, low + (high - low) * below, high - (high - low) * above)
        log_slopes = xp.log(high - low) + xp.log(below) + xp.log(above)
        return xp.where(bounded, x, y), xp.where(bounded, log_slopes, 0)

    def outside(self, x: np.ndarray) -> np.ndarray:
        """Which entries of vectors are out of their intervals, read in the type of the vectors."""
        low, high, _, bounded = self._arrays(x.dtype)
        return bounded & ~((x >= low) & (x <= high))

    def enclose_forward(self, u: Float[np.ndarray, "b d"]) -> tuple[Ball, Ball]:
        """The logit in double-double, through the transform behind it."""
        low, high, edge, bounded = self._arrays(np.float64)
        u = np.asarray(u, np.float64)
        first, last = Ball.of(low) + Ball.of(edge), Ball.of(high) - Ball.of(edge)  # whose middles are these sums exactly
        is_first = (u < first.middle.high) | ((u == first.middle.high) & (first.middle.low > 0))
        is_last = (u > last.middle.high) | ((u == last.middle.high) & (last.middle.low < 0))
        inside = where(is_first, first, where(is_last, last, Ball.of(u)))
        below, above = log(inside - Ball.of(low)), log(Ball.of(high) - inside)
        log_width, chosen = log(Ball.of(high) - Ball.of(low)), np.broadcast_to(bounded, np.shape(u))
        line = where(chosen, below - above, Ball.of(u))
        y, log_det = self.then.enclose_forward(line)
        return y, log_det + where(chosen, log_width - below - above, Ball.of(np.zeros(np.shape(u)))).sum()

    @on_balls
    def enclose_inverse(self, y: Float[np.ndarray, "b d"], radius: Float[np.ndarray, " b"]) -> Enclosure:
        """The logistic function of the intervals on the real line in which the transform behind encloses every entry."""
        line = self.then.enclose_inverse(y, radius)
        low, high, edge, bounded = self._arrays(np.float64)
        width = DoubleDouble.of(high) - DoubleDouble.of(low)
        limit = double_double.log((width - DoubleDouble.of(edge)) * DoubleDouble.of(edge).reciprocal()).high
        of_limit = edge * 2.0**-45  # what the rounding of the limit, below 2^-48, moves the values there by

        def value(t):
            t = np.clip(t, -limit, limit)
            x = DoubleDouble.of(low) + width * sigmoid(DoubleDouble.of(t))
            return x.high, (U * np.abs(x.high) + width.high * UNIT_ERROR + of_limit) * UP

        center, errors = value(line.center)
        (least, least_errors), (most, most_errors) = value(line.low), value(line.high)
        nearest = np.maximum(np.maximum(line.low, -line.high), 0)  # the point nearest to 0, where the logistic is steepest
        s = sigmoid(DoubleDouble.of(np.minimum(nearest, limit)))
        slopes = np.where(bounded, width.high * ((s * (DoubleDouble.of(1.0) - s)).high + UNIT_ERROR) * UP, 1)
        steepest, errors = slopes.max(axis=1) * UP, np.where(bounded, errors, 0)
        return Enclosure(
            low=np.where(bounded, np.nextafter(least - least_errors, -np.inf), line.low),
            high=np.where(bounded, np.nextafter(most + most_errors, np.inf), line.high),
            center=np.where(bounded, center, line.center),
            error=(np.linalg.norm(errors, axis=1) * UP + steepest * line.error) * UP,
            lipschitz=steepest * line.lipschitz * UP,
        )

    def _arrays(self, dtype: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Ends and edges of all entries, those of the unit interval where there are no bounds, and which have bounds."""
        known = [bounds or UNIT for bounds in self.intervals]
        ends = ([bounds.low for bounds in known], [bounds.high for bounds in known], [bounds.edge for bounds in known])
        low, high, edge = (np.asarray(values, np.float64).astype(dtype)[None] for values in ends)
        return low, high, edge, np.array([[bounds is not None for bounds in self.intervals]])

    def _ends(self, x: Any, xp: Any, constants: Constants | None) -> tuple[Any, ...]:
        """`_arrays` in the type of ``x``, with the ends and edges of ``constants`` if there are any."""
        *own, bounded = self._arrays(x.dtype)
        given = own if constants is None else [constants[name] for name in ("low", "high", "edge")]
        return *(xp.asarray(values, x.dtype) for values in given), xp.asarray(bounded)
