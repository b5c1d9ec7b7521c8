r"""Guaranteed enclosures of preprocessing: bounds of every transform's inverse.

A transform ``t`` has the method ``enclose_inverse(y, radius)``, the `Enclosure` of ``t^-1`` on
balls ``|y' - y| <= radius`` (Euclidean). It holds for the map of the transform's stored constants
in exact arithmetic, and covers rounding. `certify.decode` needs it of a transform of one's own.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from iresnet_jax.maths.double_double import DoubleDouble
from iresnet_jax.maths.upward_rounding import UP

Array = np.ndarray


class Enclosure(NamedTuple):
    """Guarantees of ``t^-1`` on the balls ``|y' - y| <= r``, one per example.

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

    def distance_bound(
        self, x: Float[Array, "b ..."], radius: Float[Array, " b"]
    ) -> Float[Array, " b"]:
        """Bounds of ``|x - t^-1(y')|`` for all ``|y' - y| <= radius``, Euclidean; infinite for
        an ``x`` that is not finite.
        """
        with np.errstate(all="ignore"):
            gap = np.square(np.asarray(x, np.float64) - self.center).sum(
                axis=tuple(range(1, np.ndim(x)))
            )
            moved = np.where(radius == 0, 0, self.lipschitz * radius)
            bound = (np.sqrt(gap) * UP + self.error + moved) * UP
        return np.nan_to_num(bound, nan=np.inf, posinf=np.inf)


def on_balls(rule: Callable[..., Enclosure]) -> Callable[..., Enclosure]:
    """Makes an ``enclose_inverse`` from a method for finite vectors ``(b, d)`` and radii.

    Points may have any shape. An infinite radius, or a centre that is not finite, gives an
    enclosure that says nothing.
    """

    @functools.wraps(rule)
    @np.errstate(all="ignore")
    def enclose_inverse(self, y: Float[Array, "b ..."], radius: Float[Array, " b"]) -> Enclosure:
        y, radius = np.asarray(y, np.float64), np.asarray(radius, np.float64)
        vectors = y.reshape(len(y), math.prod(y.shape[1:]))
        known = np.isfinite(radius) & np.all(np.isfinite(vectors), axis=1)
        found = rule(self, np.where(known[:, None], vectors, 0), np.where(known, radius, 0))
        nothing = np.where(known, 0, np.inf)
        return Enclosure(
            low=(found.low - nothing[:, None]).reshape(y.shape),
            high=(found.high + nothing[:, None]).reshape(y.shape),
            center=found.center.reshape(y.shape),
            error=found.error + nothing,
            lipschitz=found.lipschitz,
        )

    return enclose_inverse


def affine(center: Array, errors: Array, reach: Array, lipschitz: Array) -> Enclosure:
    """The enclosure of an affine map from the movement of each entry of its values.

    Args:
        center: Values at the centres, ``(b, d)``.
        errors: Bounds of their rounding.
        reach: Bounds of each entry's movement within the ball.
        lipschitz: The map's constant, ``(b,)``.
    """
    away = (errors + reach) * UP
    error = np.linalg.norm(errors, axis=1) * UP
    return Enclosure(
        np.nextafter(center - away, -np.inf),
        np.nextafter(center + away, np.inf),
        center,
        error,
        lipschitz * UP,
    )


def increasing(value: Callable, slopes: Array, y: Array, radius: Array) -> Enclosure:
    """The enclosure of a map that acts on every entry by itself and increases.

    Entry ``i`` of the map's values on the ball lies between those at ``y_i - r`` and ``y_i + r``.

    Args:
        value: The map of double-double numbers ``(b, d)``: float64 values and bounds of their
            errors.
        slopes: Largest slope of each entry on the ball, whose maximum bounds the map's constant
            there.
        y: Centres.
        radius: Radii.
    """
    center, errors = value(DoubleDouble.of(y))
    (low, low_errors), (high, high_errors) = (value(end) for end in ends(y, radius))
    return Enclosure(
        low=np.nextafter(low - low_errors, -np.inf),
        high=np.nextafter(high + high_errors, np.inf),
        center=center,
        error=np.linalg.norm(errors, axis=1) * UP,
        lipschitz=np.max(slopes, axis=1) * UP,
    )


def ends(y: Array, radius: Array) -> tuple[DoubleDouble, DoubleDouble]:
    """``y - r`` and ``y + r``, entry by entry."""
    reach = DoubleDouble.of(np.broadcast_to(radius[:, None], y.shape))
    return DoubleDouble.of(y) - reach, DoubleDouble.of(y) + reach
