r"""Columns of a table as normal scores: levels, counts, rounded numbers, atoms and continuous
values become entries that are standard normal each.

**Mass.** A value with mass ``m`` owns an interval of scores ``[a, b]`` with ``Phi(b) - Phi(a) =
m``. Forward draws a point of it from the normal distribution, so that noise is uniform in mass; the
inverse gives the value back. For any density ``p_Z`` of scores,

    log p(x) >= log m(x) + E[log p_Z(z) - log phi(z)]

with equality where columns are independent (flows of copulas: Kamthe et al. 2021, Laszkiewicz et
al. 2022). A continuous value has the score ``S(x)``. The likelihood of a level, a whole number or
an atom is its mass; that of another value with mass is the mass divided by the width of its cell
among the numbers, a density per unit.

**One map.** ``S`` is a monotone spline of rational quadratic functions (Gregory and Delbourgo 1982)
on the line of `Bounded`, from which ends and heavy tails are inherited, and linear beyond its
knots. A number of a grid owns the scores between the ends of its cell, ``S(x - spacing / 2)`` and
``S(x + spacing / 2)``, also beyond the data; the first and the last that exist own half-lines.

**Listed values** have intervals of their own: the levels of a column, whose masses may depend on
the level of another column, its parent, and atoms, at which ``S`` jumps. A value that a column of
levels does not list, or that never occurs with the parent's level, and a number that does not
exist, have a reserved mass, and their score is normal noise, which tells nothing. No sample shows
them.

**Lines.** A column that is flat keeps to a line, which whitening starts from: noise is uniform in
cells and exponential in half-lines, and a number that does not exist has the cell of the nearest
one.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.scipy.special
import numpy as np
import scipy.special
from jaxtyping import Bool, Float

from iresnet_jax.bijections.bijection import no_inverse_error, no_logdet_error
from iresnet_jax.bijections.bounded import Bounded
from iresnet_jax.bijections.dequantize import uniform
from iresnet_jax.bijections.enclosure import Enclosure
from iresnet_jax.bijections.standardize import ROUNDING, set_floats
from iresnet_jax.maths.lipschitz_bounds import BiLipschitz
from iresnet_jax.maths.upward_rounding import UP, U
from iresnet_jax.pytrees import pytree

NARROW = 1e-3  # width of scores within which the normal density is as good as constant
FINE = 3e-5  # width below which a difference of scores is rounded more than a slope times a width
FAR = 12.0  # distance of scores from 0 beyond which single precision has no probabilities
# What `Marginals.of` pads tables with, and the fields of one column without cells or knots.
PADDING = {"at": np.inf, "to": np.inf, "values": np.inf, "lower": np.inf, "upper": -np.inf}
PLAIN: Mapping[str, Any] = {
    **{"low": -np.inf, "high": np.inf, "center": 0, "scale": 0, "spacing": 0, "origin": 0},
    **{"least": -np.inf, "most": np.inf, "unit": 0, "has_levels": 0, "flat": 0, "parent": -1},
    **{"at": [0], "to": [0], "slopes": [1], "values": [], "units": [], "lower": [[]]},
    **{"upper": [[]], "reserved": [[0, 0]]},
}


class Places(NamedTuple):
    """Where values may lie among scores.

    Attributes:
        low, high: Ends of the interval of a value with mass.
        has_mass: Whether it has one.
        score: Score of a value without.
        step: Scale of noise in half-lines of flat columns.
        log_factor: ``log dz/dx`` of a value without mass; of others the logarithm of a factor on
            the mass.
    """

    low: Any
    high: Any
    has_mass: Any
    score: Any
    step: Any
    log_factor: Any


@pytree(arrays=(*PLAIN, "then"))
class Marginals(Bounded):
    """From the columns of a table to their scores, a bijection in distribution; and a transform of
    scores behind it. Every array has a leading axis of columns.

    Attributes:
        spacing: Distance of the numbers of a grid; 0 without one.
        origin: A number of the grid.
        least, most: Smallest and largest number of the grid that exists.
        unit: Logarithm of the unit of values that are not listed.
        has_levels: 1 if no values but those listed exist, 2 if each value counts as the nearest one
            of them, 0 otherwise.
        flat: Whether the column keeps to a line, with noise that is uniform between scores.
        parent: Place of the column whose level the masses depend on; -1 for none.
        at: Places of the spline's knots on the line, rising; infinite beyond the last one.
        to: Their scores.
        slopes: Its derivatives there.
        values: Listed values, rising.
        units: Logarithms of their units.
        lower: Where the interval of each begins, ``(d, rows, k)``: a row for each level of the
            parent, and one for all others.
        upper: Where it ends, not beyond `lower` if the level does not occur.
        reserved: Logarithms of the mass of all that occurs, and of each value that does not, ``(d,
            rows, 2)``.
        is_continuous: Whether nothing has mass.
    """

    spacing: Any = ()
    origin: Any = ()
    least: Any = ()
    most: Any = ()
    unit: Any = ()
    has_levels: Any = ()
    flat: Any = ()
    parent: Any = ()
    at: Any = ()
    to: Any = ()
    slopes: Any = ()
    values: Any = ()
    units: Any = ()
    lower: Any = ()
    upper: Any = ()
    reserved: Any = ()
    is_continuous: bool = False

    def __post_init__(self):
        super().__post_init__()
        set_floats(self, *(name for name in PLAIN if name not in ("low", "high", "scale")))

    @classmethod
    def of(cls, columns: Sequence[Mapping[str, Any]]) -> "Marginals":
        """The map of columns with these attributes, `PLAIN` in place of those that are missing.

        Tables are padded to lengths that are powers of 2, for which there are fewer programs.
        """
        made: dict[str, Any] = {}
        for name, default in PLAIN.items():
            parts = [np.asarray(column.get(name, default), np.float64) for column in columns]
            sizes = np.max([part.shape for part in parts], axis=0).astype(int).tolist()
            shape = [1 << (max(size, 2) - 1).bit_length() for size in sizes]
            made[name] = np.empty((len(parts), *shape))
            for i, part in enumerate(parts):
                made[name][i] = part.flat[-1] if name == "slopes" else PADDING.get(name, 0.0)
                made[name][(i, *map(slice, part.shape))] = part
        has_mass = np.any(made["spacing"] > 0) or np.any(np.isfinite(made["values"]))
        return cls(**made, is_continuous=not has_mass)

    @classmethod
    def lines(cls, spacings: Sequence[float | int], **common: Any) -> "Marginals":
        """Flat columns of the multiples of each spacing; those with the spacing 0 stay as they are.

        Args:
            spacings: Distances of the numbers of each column. The unit of whole numbers is 1, that
                of others is the spacing.
            **common: Further attributes, an entry a column.
        """
        columns = []
        for i, spacing in enumerate(spacings):
            unit = 0 if spacing == round(spacing) else math.log(spacing)
            columns.append({"flat": 1, "spacing": spacing, "unit": unit})
            columns[-1] |= {name: values[i] for name, values in common.items()}
        return cls.of(columns)

    # -------------------------------------------------------------------------------- the bijection

    def forward_and_logdet(self, x, key=None):
        """Transformed scores, with noise of values with mass by the key; the logarithm of the
        factor between both densities.
        """
        noise = 0.5 if self.is_continuous or key is None else uniform(key, x.shape, x.dtype)
        z, log_factors = self.placed(x, noise)
        y, log_det = self.then.map(z)
        return y, log_det + jnp.sum(log_factors, axis=1), no_logdet_error(y)

    def inverse_and_logdet(self, y, key=None):
        """The values that own transformed scores, and minus the logarithm of the factor there."""
        z, log_det = self.then.unmap(y)
        x, _ = self.from_line(z)
        factors = self._log_factors(self.places(x, jnp), z, jnp)
        return x, log_det - jnp.sum(factors, axis=1), no_logdet_error(y), no_inverse_error(y)

    def to_line(self, x: Any, xp: Any = jnp) -> tuple[Any, Any]:
        """Scores in the middle of the values' masses, and the logarithm of each factor."""
        return self.placed(x, 0.5, xp)

    def placed(self, x: Any, noise: Any, xp: Any = jnp) -> tuple[Any, Any]:
        """Scores by noise in [0, 1), and the logarithm of the factor of each entry.

        With NumPy as ``xp`` it computes in float64, without a compiled program.
        """
        places, special = self.places(x, xp), _special(xp)
        if self.is_continuous:
            return places.score, places.log_factor
        noise = xp.maximum(noise, 2.0**-24)
        low, high, is_above = _lower_half(places, xp)
        below = special.ndtr(low)
        normal = special.ndtri(below + noise * (special.ndtr(high) - below))
        is_even, is_half = self._is_even(places, xp), self._is_half(places, xp)
        z = xp.where(is_even, places.low + noise * _width(places, xp), normal * (1 - 2 * is_above))
        away = -places.step * xp.log(noise)
        z = xp.where(is_half, xp.where(is_above, places.low + away, places.high - away), z)
        # A rounded score still belongs to the value.
        margin = 8 * xp.finfo(x.dtype).eps * (1 + xp.abs(xp.where(is_even, z, normal)))
        margin = xp.minimum(margin, _width(places, xp) / 4)
        z = xp.clip(z, places.low + margin, places.high - margin)
        z = xp.where(places.has_mass, z, places.score)
        return z, self._log_factors(places, z, xp)

    def _log_factors(self, places: Places, z: Any, xp: Any) -> Any:
        """``log m(x) - log phi(z)`` of values with mass, by their unit; ``log dz/dx`` of others."""
        low, high, _ = _lower_half(places, xp)
        log_high = _special(xp).log_ndtr(high)
        log_low = _special(xp).log_ndtr(xp.maximum(low, -1e18))
        log_mass = log_high + xp.log1p(-xp.exp(xp.minimum(log_low - log_high, -1e-6)))
        log_ratio = log_mass + 0.5 * z**2 + 0.5 * math.log(2 * math.pi)
        log_ratio = xp.where(self._is_even(places, xp), xp.log(_width(places, xp)), log_ratio)
        away = xp.minimum(xp.abs(z - places.low), xp.abs(z - places.high)) / places.step
        log_ratio = xp.where(self._is_half(places, xp), away + xp.log(places.step), log_ratio)
        return xp.where(places.has_mass, log_ratio, 0) + places.log_factor

    def _is_even(self, places: Places, xp: Any) -> Any:
        """Whether noise is uniform between scores: of lines, and where the normal density is as
        good as constant or too small for single precision.
        """
        is_far = _lower_half(places, xp)[1] < -FAR
        return self._row("flat", xp) | (_width(places, xp) < NARROW) | is_far

    def _is_half(self, places: Places, xp: Any) -> Any:
        """Whether noise is exponential: of lines, in the half-lines of the outermost numbers."""
        return self._row("flat", xp) & places.has_mass & ~xp.isfinite(places.high - places.low)

    def places(self, x: Any, xp: Any = jnp) -> Places:
        """Where values may lie among scores."""
        if self.is_continuous:
            line, log_slopes = super().to_line(x, xp)
            z, slopes = self._spline(line, xp)
            return Places(z, z, xp.zeros(z.shape, bool), z, z, log_slopes + xp.log(slopes))
        spacing, origin, least, most = (
            self._row(name, xp, x.dtype) for name in ("spacing", "origin", "least", "most")
        )
        step = xp.where(spacing > 0, spacing, 1)
        nearest = xp.where(spacing > 0, origin + xp.round((x - origin) / step) * step, x)
        value = xp.where(spacing > 0, xp.clip(nearest, least, most), x)
        ends = xp.concatenate([value, value - spacing / 2, value + spacing / 2])
        line, log_slopes = super().to_line(ends, xp)
        scores, slopes = self._spline(line, xp)
        z, low, high = scores.reshape(3, *x.shape)
        log_slope = (log_slopes + xp.log(slopes))[: len(x)]
        flat, half = self._row("flat", xp), xp.exp(log_slope) * spacing / 2
        is_fine = (spacing > 0) & (high - low < FINE)
        low, high = xp.where(is_fine, z - half, low), xp.where(is_fine, z + half, high)
        low = xp.where(value <= least, -xp.inf, low)
        high = xp.where(value >= most, xp.inf, high)
        level, row = self._levels(x, xp)
        first, last, unit, occurring, lacking = self._each(
            xp,
            lambda lower, upper, units, reserved, row, level: (
                lower[row, level],
                upper[row, level],
                units[level],
                reserved[row, 0],
                reserved[row, 1],
            ),
            ("lower", "upper", "units", "reserved"),
            row,
            xp.minimum(level, self.values.shape[1] - 1),
        )
        has_levels = self._row("has_levels", xp)
        is_listed = (level < self._num_values(xp)) & (last > first)
        is_fine = is_fine & ~is_listed
        is_lacking = (has_levels & ~is_listed) | (value != nearest)
        low = xp.where(is_listed, first, xp.where(is_lacking & ~flat, -xp.inf, low))
        high = xp.where(is_listed, last, xp.where(is_lacking & ~flat, xp.inf, high))
        # Masses of numbers that do not exist add up, as 1 / k (k + 1) of the k-th one does to 1.
        away = xp.maximum(xp.abs(nearest - value) / step, 1)
        lacking = lacking - xp.where(has_levels, 0, xp.log(away) + xp.log1p(away))
        factor = xp.where(spacing > 0, occurring - self._row("unit", xp, x.dtype), log_slope)
        # Rounded differences of far scores may vanish.
        rounding = log_slope + xp.log(step) - xp.log(xp.maximum(high - low, xp.finfo(x.dtype).tiny))
        factor = factor + xp.where(is_fine, rounding, 0)
        factor = xp.where(is_listed, occurring - unit, xp.where(is_lacking, lacking, factor))
        is_beyond = (x < self._row("low", xp, x.dtype)) | (x > self._row("high", xp, x.dtype))
        factor = xp.where(is_beyond, -xp.inf, factor)
        has_mass = is_listed | has_levels | (spacing > 0)
        low, high = xp.where(has_mass, low, -1), xp.where(has_mass, high, 1)
        return Places(low, high, has_mass, z, xp.where(half > 0, 2 * half, 1), factor)

    def from_line(self, y: Any, xp: Any = jnp) -> tuple[Any, Any]:
        """Values that own scores, and ``log dx/dz`` of continuous ones."""
        line, slopes = self._spline(y, xp, inverse=True)
        x, log_slopes = super().from_line(line, xp)
        log_slopes = log_slopes - xp.log(slopes)
        if self.is_continuous:
            return x, log_slopes
        spacing, origin, least, most = (
            self._row(name, xp, y.dtype) for name in ("spacing", "origin", "least", "most")
        )
        on_grid = origin + xp.round((x - origin) / xp.where(spacing > 0, spacing, 1)) * spacing
        x = xp.clip(xp.where(spacing > 0, on_grid, x), least, most)
        root = xp.zeros(y.shape, int)
        x, level = self._listed(x, y, root, xp)
        has_parent, parents = self._parents(xp)
        x, _ = self._listed(x, y, xp.where(has_parent, level[:, parents], root), xp)
        return x, log_slopes

    def _listed(self, x: Any, z: Any, row: Any, xp: Any) -> tuple[Any, Any]:
        """Listed values in place of others where scores lie in their intervals, and their places,
        given the row of each column's table.
        """

        def find(lower, upper, values, z, row):
            place = xp.maximum(xp.sum(lower[row] <= z[:, None], axis=1) - 1, 0)
            return values[place], place, (lower[row, place] <= z) & (z < upper[row, place])

        found, place, is_inside = self._each(xp, find, ("lower", "upper", "values"), z, row)
        is_listed = (self._row("has_levels", xp) | is_inside) & xp.isfinite(found)
        return xp.where(is_listed, found, x), place

    def _levels(self, x: Any, xp: Any) -> tuple[Any, Any]:
        """Place of each entry among the listed values of its column, their number if it is none
        of them; and the row of its column's tables.
        """

        def find(values, has_levels, x):
            place = xp.searchsorted((values[1:] + values[:-1]) / 2, x, side="right")
            place = xp.minimum(place, len(values) - 1)
            gap = xp.abs(x - values[place])
            is_known = gap <= 4 * xp.finfo(x.dtype).eps * xp.abs(x)
            num = xp.sum(xp.isfinite(values))
            return (xp.where(is_known | (has_levels > 1), place, num),)

        level = self._each(xp, find, ("values", "has_levels"), x)[0]
        has_parent, parents = self._parents(xp)
        return level, xp.where(has_parent, level[:, parents], 0)

    def _parents(self, xp: Any) -> tuple[Any, Any]:
        parents = xp.asarray(self.parent).astype(int)
        return (parents >= 0)[None], xp.maximum(parents, 0)

    def _num_values(self, xp: Any) -> Any:
        return xp.sum(xp.isfinite(xp.asarray(self.values)), axis=1)[None]

    def _row(self, name: str, xp: Any, dtype: Any = bool) -> Any:
        return xp.asarray(getattr(self, name))[None].astype(dtype)

    def _each(self, xp: Any, function: Callable, tables: Sequence[str], *rows: Any) -> Any:
        """A function of one column's tables and entries, for all columns."""
        dtype = next((row.dtype for row in rows if row.dtype.kind == "f"), None)
        arrays = [xp.asarray(getattr(self, name)) for name in tables]
        arrays = [array if dtype is None else array.astype(dtype) for array in arrays]
        if xp is jnp:
            axes = [0] * len(arrays) + [1] * len(rows)
            return jax.vmap(function, axes, 1)(*arrays, *rows)
        columns = zip(*arrays, *(row.T for row in rows), strict=True)
        found = zip(*(function(*c) for c in columns), strict=True)
        return tuple(np.stack(parts, 1) for parts in found)

    def _spline(self, y: Any, xp: Any, *, inverse: bool = False) -> tuple[Any, Any]:
        """``S(y)``, or ``S^-1(y)``, and the derivative of ``S`` there."""

        def at_points(at, to, slopes, points):
            table = to if inverse else at
            place = xp.searchsorted(table, points, side="right") - 1
            following = xp.minimum(place + 1, len(at) - 1)
            is_inside = (place >= 0) & (following > place) & xp.isfinite(at[following])
            end = xp.maximum(place, 0)
            y0, z0, d0, d1 = at[end], to[end], slopes[end], slopes[following]
            dy = xp.where(is_inside, at[following] - y0, 1)
            dz = xp.where(is_inside, to[following] - z0, d0)
            is_jump = dy <= 0
            s = dz / xp.where(is_jump, 1, dy)
            bend = d0 + d1 - 2 * s
            if inverse:
                up = points - z0
                a, b, c = dz * (s - d0) + up * bend, dz * d0 - up * bend, -s * up
                root = xp.sqrt(xp.maximum(b * b - 4 * a * c, 0))
                t = xp.clip(2 * c / xp.where(is_jump | (b + root == 0), -1, -b - root), 0, 1)
                outside = y0 + up / d0
            else:
                t, outside = xp.clip((points - y0) / xp.where(is_jump, 1, dy), 0, 1), 0
            both = t * (1 - t)
            below = s + bend * both
            slope = s * s * (d1 * t * t + 2 * s * both + d0 * (1 - t) ** 2) / below**2
            if inverse:
                return xp.where(is_inside, y0 + dy * t, outside), xp.where(is_inside, slope, d0)
            z = z0 + dz * (s * t * t + d0 * both) / below
            outside = z0 + d0 * (points - y0)
            return xp.where(is_inside, z, outside), xp.where(is_inside, slope, d0)

        return self._each(xp, at_points, ("at", "to", "slopes"), y)

    # ----------------------------------------------------------------------------------- guarantees

    def bilipschitz(self) -> BiLipschitz:
        """Constants of the line, of the spline's steepest and flattest pieces, and of ``then``;
        infinite with mass.
        """
        if not self.is_continuous:
            return BiLipschitz(jnp.asarray(jnp.inf), jnp.asarray(jnp.inf))
        least, most = self._slope_bounds(jnp)
        own = BiLipschitz((1 + ROUNDING) * jnp.max(most), (1 + ROUNDING) / jnp.min(least))
        return super().bilipschitz().compose(own)

    def _slope_bounds(self, xp: Any) -> tuple[Any, Any]:
        """Bounds of the spline's slope below the first knot and after each knot, ``(d, m)``."""
        at, to, slopes = (xp.asarray(part) for part in (self.at, self.to, self.slopes))
        is_piece = xp.isfinite(at[:, 1:])
        dy, dz = (xp.where(is_piece, part[:, 1:] - part[:, :-1], 1) for part in (at, to))
        left, s = slopes[:, :-1], dz / dy
        right = xp.where(is_piece, slopes[:, 1:], left)
        s = xp.where(is_piece, s, left)
        # The quotient of means of the three by one of these two, see `_spline`.
        three, bent = xp.stack([left, right, s]), (s / 2 + (left + right) / 4)
        least = xp.min(three, axis=0) * (s / xp.maximum(s, bent)) ** 2
        most = xp.max(three, axis=0) * (s / xp.minimum(s, bent)) ** 2
        first, last = slopes[:, :1], slopes[:, -1:]
        return (
            xp.concatenate([first, least, last], axis=1),
            xp.concatenate([first, most, last], axis=1),
        )

    def enclose_line(self, y: Any, radius: Any) -> Enclosure:
        """Enclosures on the line: the spline is increasing, and a point whose score is off by
        ``e`` is off by ``e`` over the least slope around.
        """
        scores = self.then.enclose_inverse(y, radius)
        points = np.stack([scores.center, scores.low, scores.high])
        flat_points = points.reshape(-1, y.shape[1])
        line, _ = self._spline(flat_points, np, inverse=True)
        back, _ = self._spline(line, np)
        line, off = line.reshape(points.shape), np.abs(back - flat_points).reshape(points.shape)
        least, _ = self._slope_bounds(np)
        to = np.asarray(self.to, np.float64)
        places = [
            np.stack([np.searchsorted(t, p, side="right") for t, p in zip(to, pts.T, strict=True)])
            for pts in (points[1], points[2])
        ]
        index = np.arange(least.shape[1])
        is_near = (index >= places[0][..., None] - 1) & (index <= places[1][..., None] + 1)
        slope = np.min(np.where(is_near, least[:, None], np.inf), axis=2).T
        size = np.max(np.abs(to), axis=1, where=np.isfinite(to), initial=1)
        errors = (off + 64 * U * (np.abs(points) + size)) / slope * UP
        return Enclosure(
            line[1] - errors[1],
            line[2] + errors[2],
            line[0],
            np.linalg.norm(errors[0], axis=1) * UP + scores.error / slope.min(axis=1) * UP,
            scores.lipschitz / slope.min(axis=1) * UP,
        )

    def certain(
        self, x: Float[np.ndarray, "b ... d"], enclosure: Enclosure
    ) -> Bool[np.ndarray, "b ... d"]:
        """Whether every score of the enclosure belongs to ``x``; False of continuous entries."""
        rows = np.asarray(x, np.float64).reshape(-1, self.num_entries)
        places = self.places(rows, np)
        low, high = places.low.reshape(x.shape), places.high.reshape(x.shape)
        margin = 2.0**-18 * (1 + np.abs(enclosure.center))  # tables are in single precision
        has_mass = places.has_mass.reshape(x.shape)
        return has_mass & (enclosure.low > low + margin) & (enclosure.high < high - margin)


def _special(xp: Any) -> Any:
    return scipy.special if xp is np else jax.scipy.special


def _width(places: Places, xp: Any) -> Any:
    """Widths of intervals; infinite ones are 1 in operations that do not use them."""
    width = places.high - places.low
    return xp.where(xp.isfinite(width), xp.maximum(width, xp.finfo(width.dtype).tiny), 1)


def _lower_half(places: Places, xp: Any) -> tuple[Any, Any, Any]:
    """Intervals on the side of 0 where single precision tells probabilities apart, and whether
    they are mirrored.
    """
    is_above = places.high > -places.low
    return (
        xp.where(is_above, -places.high, places.low),
        xp.where(is_above, -places.low, places.high),
        is_above,
    )


def before(marginals: Marginals | None, then: Any) -> tuple[Marginals | None, Any]:
    """The map of values with mass, None without any, and the transform of what is continuous: of
    columns that are mapped first, if they are, and then transformed.
    """
    if marginals is None or not marginals.is_continuous:
        return marginals, then
    return None, replace(marginals, then=then)
