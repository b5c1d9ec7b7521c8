r"""Cells of numbers on the line: noise in them makes rounded, counted and repeated numbers
continuous.

**Cells.** Values of a column are ``knots[i] + k gaps[i]``: a regular grid is one knot with its
spacing, each other value is a knot. A value owns the numbers half-way to its neighbours, and the
first and the last gap go on, so that every number has a cell and counts as its value. A point of
the cell, at random, takes its place on the line; the inverse gives the value back.

**Atoms** are values that many rows have. An atom's cell is wider on the line than among the
numbers, and all that lies above moves up: a monotone map, which leaves room for the mass of one
value. In a continuous column the cell has a width on the line only.

**Unit.** The likelihood of a whole number, or of an atom of a continuous column, is its mass. The
likelihood of another value is its mass divided by the width of its cell among the numbers, a
density per unit. With this unit ``w``, which is 1 for a mass,

    log p(x) >= E_u[log p_line(u)] + log(width on the line / w)
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from iresnet_jax.bijections.dequantize import Spread, uniform
from iresnet_jax.bijections.enclosure import Enclosure
from iresnet_jax.bijections.standardize import set_floats
from iresnet_jax.checked_dataclasses import pytree


@pytree(arrays=("knots", "gaps", "atoms", "widths"))
class Cells(Spread):
    """Entries of vectors whose values own cells, and atoms, beside entries that are continuous.

    Attributes:
        knots: Rising values of each entry ``(d, m)``, all but the last one; any numbers beyond the
            last value.
        gaps: Distance from each knot to the next value; 0 beyond the last value, and for a
            continuous entry.
        atoms: Atoms of each entry ``(d, k)``; any number beyond the last atom.
        widths: Width by which the cell of each atom is wider on the line than among the numbers; 0
            where there are no more.
    """

    knots: Any
    gaps: Any
    atoms: Any
    widths: Any

    def __post_init__(self):
        set_floats(self, "knots", "gaps", "atoms", "widths")

    @classmethod
    def of(
        cls, values: Sequence[Sequence[float]], atoms: Sequence[Mapping[float, float]] = ()
    ) -> "Cells":
        """Cells from the values of each entry (two for a regular grid, none for a continuous entry)
        and the widths of atoms.

        Raises:
            ValueError: If values do not rise, or there is only one.
        """
        for known in values:
            if len(known) == 1 or not (np.all(np.isfinite(known)) and np.all(np.diff(known) > 0)):
                raise ValueError(
                    "values that own cells must be two or more rising numbers, or "
                    f"none, got {known}"
                )
        rows = [known if len(known) else (0.0, 0.0) for known in values]
        longest = max(map(len, rows))
        table = np.stack(
            [np.pad(np.asarray(row, np.float64), (0, longest - len(row)), "edge") for row in rows]
        )
        found = [list(each.items()) for each in atoms or [{}] * len(values)]
        most = max(map(len, found))
        padded = np.array([each + [(0.0, 0.0)] * (most - len(each)) for each in found]).reshape(
            len(values), most, 2
        )
        return cls(table[:, :-1], np.diff(table), padded[..., 0], padded[..., 1])

    @property
    def num_entries(self) -> int:
        """Length of examples."""
        return len(self.knots)

    def margins(self, dtype: Any) -> Float[Array, "1 d"]:
        """A quarter of the least gap, by which the middle of a cell is farther from its ends;
        infinite without cells.
        """
        return jnp.min(jnp.where(self.gaps > 0, self.gaps, jnp.inf), axis=1)[None].astype(dtype) / 4

    def forward(self, x):
        """The middles of the cells."""
        return self._place(x, 0.5)

    def noisy(self, x, key):
        """Points of the cells by uniform noise."""
        return self._place(x, uniform(key, x.shape, x.dtype))

    def _place(self, x, noise):
        _, start, width, _ = self.places(x)
        # the sum is rounded
        within = jnp.minimum(start + width * noise, jnp.nextafter(start + width, start))
        return jnp.where(width > 0, within, start)

    def log_ratio(self, x):
        """Logarithm of the widths on the line, in units of the values."""
        _, _, width, unit = self.places(x)
        return jnp.sum(jnp.log(jnp.where(width > 0, width / unit, 1)), axis=1)

    def places(self, x: Float[Array, "b d"]) -> tuple[Array, Array, Array, Array]:
        """Number of the value that each entry counts as, start and width of its cell on the line,
        and its unit.

        A continuous entry has a number for each value, with a cell of width 0.
        """
        number, value, below, above = self._values(x)
        atoms, wider = (table.T.astype(x.dtype) for table in (self.atoms, self.widths))
        of_atoms = self._values(atoms)[0][None]
        start = value - below + jnp.sum(wider[None] * (of_atoms < number[:, None]), axis=1)
        width = below + above + jnp.sum(wider[None] * (of_atoms == number[:, None]), axis=1)
        is_whole = jnp.all(
            (self.knots == jnp.rint(self.knots)) & (self.gaps == jnp.rint(self.gaps)), axis=1
        )
        return number, start, width, jnp.where(is_whole[None], 1, below + above)

    def nearest(self, u: Float[Array, "b d"]) -> Float[Array, "b d"]:
        """The value in whose cell each point of the line lies; continuous entries that are no atoms
        do not change.
        """
        atoms, wider = (table.T.astype(u.dtype) for table in (self.atoms, self.widths))
        _, start, width, _ = self.places(atoms)
        u = u[:, None]
        is_above, is_atom = u >= (start + width)[None], (wider > 0)[None] & (u >= start[None])
        x = self._values(u[:, 0] - jnp.sum(wider[None] * is_above, axis=1))[1]
        atom = jnp.max(
            jnp.where(is_atom & ~is_above, atoms[None], -jnp.inf), axis=1, initial=-jnp.inf
        )
        return jnp.where(atom > -jnp.inf, atom, x)

    def certain(
        self, x: Float[np.ndarray, "b ... d"], enclosure: Enclosure
    ) -> Bool[np.ndarray, "b ... d"]:
        """Whether every point of the enclosure lies in the cell of ``x``; False of continuous
        entries.
        """
        with jax.enable_x64():
            places = self.places(
                jnp.asarray(np.asarray(x, np.float64).reshape(-1, self.num_entries))
            )
            start, width = (np.asarray(found).reshape(x.shape) for found in places[1:3])
        margin = 2.0**-44 * (np.abs(start) + width)  # exceeds the rounding of the few operations
        return (
            (width > 0)
            & (enclosure.low > start + margin)
            & (enclosure.high < start + width - margin)
        )

    def _values(self, x: Array) -> tuple[Array, Array, Array, Array]:
        """Number of the value next to each entry, the value, and half the gaps below and above
        it; without cells 0.
        """
        knots, gaps = (table.T.astype(x.dtype) for table in (self.knots, self.gaps))
        last = jnp.maximum(jnp.sum(gaps > 0, axis=0)[None] - 1, 0)

        def at(number):
            knot = jnp.clip(number, 0, last).astype(int)
            return knot, *(jnp.take_along_axis(table, knot, axis=0) for table in (knots, gaps))

        count = jax.vmap(lambda table, of_x: jnp.searchsorted(table, of_x, side="right"), 1, 1)(
            knots, x
        )
        knot, known, gap = at(count - 1)
        number = knot + jnp.floor((x - known) / jnp.where(gap > 0, gap, 1) + 0.5)
        knot, known, gap = at(number)
        exact = x.astype(self.atoms.dtype).astype(x.dtype)  # as atoms are
        value = jnp.where(gap > 0, known + (number - knot) * gap, x)
        return jnp.where(gap > 0, number, exact), value, at(number - 1)[2] / 2, gap / 2
