r"""Cells of numbers on the line: noise in them makes rounded, counted and repeated numbers continuous.

**Cells.** Values of a column are ``knots[i] + k gaps[i]``: a regular grid is one knot with its spacing, other values are a knot
each. A value owns the numbers half-way to its neighbours, and the first and the last gap go on, so that every number has a cell
and counts as its value. A point of the cell, at random, takes its place on the line; the inverse gives the value back.

**Atoms** are values that many rows have. The cell of one is wider on the line than among the numbers, of a continuous column by
all of its width, and what lies above moves up: a monotone map, which leaves room for the mass of one value.

**Unit.** With ``w`` the width of a cell among the numbers, the number of a value is its mass divided by w, and an atom's of a
continuous column its mass alone:

    log p(x) >= E_u[log p_line(u)] + log(width on the line / w)

This is a density per unit; of whole numbers, whose cells have width 1, it is the probability.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from iresnet_jax.bijections.bijection import Bijection
from iresnet_jax.bijections.dequantize import bijection_in_distribution, uniform
from iresnet_jax.bijections.enclosure import Enclosure
from iresnet_jax.bijections.standardize import set_floats
from iresnet_jax.checked_dataclasses import pytree


@pytree(arrays=("knots", "gaps", "atoms", "widths"))
class Cells:
    """Entries of vectors whose values own cells, and atoms, beside entries that are continuous.

    Attributes:
        knots: Rising values of each entry ``(d, m)``, all but the last one, which repeats where there are no more.
        gaps: Distance from each knot to the next value; 0 where there are no more, and for a continuous entry.
        atoms: Atoms of each entry ``(d, k)``; any number where there are no more.
        widths: Width by which the cell of each atom is wider on the line than among the numbers; 0 where there are no more.
    """

    knots: Any
    gaps: Any
    atoms: Any
    widths: Any

    def __post_init__(self):
        set_floats(self, "knots", "gaps", "atoms", "widths")

    @classmethod
    def of(cls, values: Sequence[Sequence[float]], atoms: Sequence[Mapping[float, float]] = ()) -> "Cells":
        """Cells of entries by their values, two of a regular grid and none of a continuous entry, and the widths of atoms.

        Raises:
            ValueError: If values do not rise, or there is one alone.
        """
        for known in values:
            if len(known) == 1 or not (np.all(np.isfinite(known)) and np.all(np.diff(known) > 0)):
                raise ValueError(f"values that own cells must be two or more rising numbers, or none, got {known}")
        tables = [np.asarray(known if len(known) else (0.0, 0.0), np.float64) for known in values]
        found = [atoms[entry] if atoms else {} for entry in range(len(values))]
        knots, gaps = [table[:-1] for table in tables], [np.diff(table) for table in tables]
        widths = [list(each.values()) for each in found]
        return cls(_table(knots, "edge"), _table(gaps), _table([list(each) for each in found]), _table(widths))

    @property
    def num_entries(self) -> int:
        """Length of examples."""
        return len(self.knots)

    @property
    def have_cells(self) -> Bool[Array, " d"]:
        """Which entries have cells everywhere, and not at atoms alone."""
        return self.gaps[:, 0] > 0

    def margins(self, dtype: Any) -> Float[Array, "1 d"]:
        """A quarter of the least gap, by which points of the middle of a cell are farther from its ends; 0 of other entries."""
        gaps = self.gaps.astype(dtype)
        return jnp.where(self.have_cells, jnp.min(jnp.where(gaps > 0, gaps, jnp.inf), axis=1) / 4, 0)[None]

    def bijection(self) -> Bijection:
        """From numbers to points of their cells on the line, a bijection in distribution; without noise, to their middles."""

        def middle(x):
            _, start, width, _ = self.places(x)
            return start + width / 2

        def noisy(x, key):
            _, start, width, _ = self.places(x)
            return start + width * uniform(key, x.shape, x.dtype)

        def log_ratio(x):
            _, _, width, among_numbers = self.places(x)
            ratio = width / jnp.where(among_numbers > 0, among_numbers, 1)
            return jnp.sum(jnp.log(jnp.where(width > 0, ratio, 1)), axis=1)

        return bijection_in_distribution(middle, noisy, self.nearest, log_ratio)

    def places(self, x: Float[Array, "b d"]) -> tuple[Array, Array, Array, Array]:
        """Number of the value that each entry counts as, start and width of its cell on the line, its width among the numbers.

        A continuous entry is a number of its own, with a cell of width 0.
        """
        number, _, low, high = self._values(x)
        start, width = low, high - low
        atoms, widths = (table.astype(x.dtype).T for table in (self.atoms, self.widths))
        for atom, wider in zip(self._values(atoms)[0][:, None], widths[:, None], strict=True):
            start += wider * (atom < number)
            width += wider * (atom == number)
        return number, start, width, high - low

    def nearest(self, u: Float[Array, "b d"]) -> Float[Array, "b d"]:
        """The value in whose cell each point of the line lies; other numbers of continuous entries as they are."""
        atoms, widths = (table.astype(u.dtype).T for table in (self.atoms, self.widths))
        _, starts, own, _ = self.places(atoms)
        found = list(zip(atoms[:, None], widths[:, None], starts[:, None], (starts + own)[:, None], strict=True))
        x = self._values(u - sum((wider * (u >= end) for _, wider, _, end in found), jnp.zeros_like(u)))[1]
        for atom, wider, start, end in found:
            x = jnp.where((wider > 0) & (u >= start) & (u < end), atom, x)
        return x

    def certain(self, x: Float[np.ndarray, "b ... d"], enclosure: Enclosure) -> Bool[np.ndarray, "b ... d"]:
        """Whether every point of the enclosure lies in the cell of ``x``; False of continuous entries."""
        with jax.enable_x64():
            places = self.places(jnp.asarray(np.asarray(x, np.float64).reshape(-1, self.num_entries)))
            start, width = (np.asarray(found).reshape(x.shape) for found in places[1:3])
        margin = 2.0**-44 * (np.abs(start) + width)  # more than what the few operations round
        return (width > 0) & (enclosure.low > start + margin) & (enclosure.high < start + width - margin)

    def _values(self, x: Array) -> tuple[Array, Array, Array, Array]:
        """Number of the value next to each entry, the value, and the ends of its cell among the numbers."""
        knots, gaps = (table.astype(x.dtype).T for table in (self.knots, self.gaps))
        last = jnp.maximum(jnp.sum(gaps > 0, axis=0)[None] - 1, 0)

        def at(number):
            knot = jnp.clip(number, 0, last).astype(int)
            return knot, jnp.take_along_axis(knots, knot, axis=0), jnp.take_along_axis(gaps, knot, axis=0)

        def value(number):
            knot, known, gap = at(number)
            return known + (number - knot) * gap

        below = jax.vmap(lambda table, of_x: jnp.searchsorted(table, of_x, side="right"), 1, 1)(knots, x)
        knot, known, gap = at(below - 1)
        has_cell = gap > 0
        number = knot + jnp.floor((x - known) / jnp.where(has_cell, gap, 1) + 0.5)
        own = value(number)
        low, high = (value(number - 1) + own) / 2, (own + value(number + 1)) / 2
        exact = x.astype(self.atoms.dtype).astype(x.dtype)  # as atoms are
        found = (number, exact), (own, x), (low, x), (high, x)
        number, own, low, high = (jnp.where(has_cell, of_cell, of_x) for of_cell, of_x in found)
        return number, own, low, high


def _table(rows: Sequence[Any], fill: Literal["constant", "edge"] = "constant") -> Float[np.ndarray, "d m"]:
    """Rows of different lengths as one table, the shorter ones filled with 0 or with their last number."""
    longest = max(map(len, rows), default=0)
    return np.stack([np.pad(np.asarray(row, np.float64), (0, longest - len(row)), fill) for row in rows])
