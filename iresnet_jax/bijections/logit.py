"""The unit interval, spread over the real line by a logit, where a flow starts."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from iresnet_jax.bijections.bijection import ClosedForm
from iresnet_jax.bijections.enclosure import Enclosure, increasing, on_balls
from iresnet_jax.maths.double_double import DoubleDouble, sigmoid
from iresnet_jax.maths.lipschitz_bounds import BiLipschitz
from iresnet_jax.maths.upward_rounding import UP, U
from iresnet_jax.pytrees import pytree

UNIT_ERROR = 2.0**-80  # absolute error of a logistic function in double-double, with a wide margin


@pytree()
class Logit(ClosedForm):
    """Spreads the unit interval over the real line: ``y = log(s / (1 - s))`` with ``s = alpha + (1
    - 2 alpha) x``.

    Attributes:
        alpha: Distance of ``s`` from 0 and 1, in (0, 1/2); 1e-6 is usual for MNIST and 0.05 for
            natural images.
    """

    alpha: float = 0.05

    def bilipschitz(self) -> BiLipschitz:
        """Bounds on [0, 1]: the slope ``(1 - 2 alpha) / (s (1 - s))`` lies between its values at
        the middle and at the ends.
        """
        return logit_bounds(self.alpha)

    def map(self, x: Float[Array, "b ..."]) -> tuple[Float[Array, "b ..."], Float[Array, " b"]]:
        r"""``y``, and ``log|det dy/dx| = sum log((1 - 2 alpha) / (s (1 - s)))``, exact (Dinh et al.
        2017, section 4.1).

        ``1 - s`` is computed from ``1 - x``, which keeps its digits for ``x`` near 1.
        """
        y, log_slopes = unit_to_line(x, 1 - x, self.alpha)
        return y, sum_event(log_slopes)

    def unmap(self, y: Float[Array, "b ..."]) -> tuple[Float[Array, "b ..."], Float[Array, " b"]]:
        r"""``x = (sigmoid(y) - alpha) / (1 - 2 alpha)``; logits beyond ``+-log((1 - alpha) /
        alpha)`` leave [0, 1] slightly.

        ``log|det dx/dy| = sum log(sigmoid(y) sigmoid(-y) / (1 - 2 alpha))`` is finite for any
        finite ``y``.
        """
        x = (jax.nn.sigmoid(y) - self.alpha) / (1 - 2 * self.alpha)
        return x, sum_event(log_logistic(y) - math.log1p(-2 * self.alpha))

    @on_balls
    def enclose_inverse(
        self, y: Float[np.ndarray, "b d"], radius: Float[np.ndarray, " b"]
    ) -> Enclosure:
        """The logistic function in double-double, increasing in every entry."""

        def value(t):
            u = precise_unit(t, self.alpha)
            return u.high, U * np.abs(u.high) + UNIT_ERROR / (1 - 2 * self.alpha)

        return increasing(value, steepest_unit(y, radius, self.alpha), y, radius)


def unit_to_line(u: Array, v: Array, alpha: float) -> tuple[Array, Array]:
    """The logit ``y`` of ``u``, given ``v = 1 - u``, and ``log dy/du``: minus infinity where
    ``s`` is out of (0, 1).
    """
    s, rest = (alpha + (1 - 2 * alpha) * part for part in (u, v))
    outside = (s <= 0) | (rest <= 0)
    log_s, log_rest = (jnp.log(jnp.where(outside, 0.5, part)) for part in (s, rest))
    return log_s - log_rest, jnp.where(outside, -jnp.inf, math.log1p(-2 * alpha) - log_s - log_rest)


def precise_unit(y: DoubleDouble, alpha: float) -> DoubleDouble:
    """The logit's inverse ``u = (sigmoid(y) - alpha) / (1 - 2 alpha)``, to ``UNIT_ERROR / (1 - 2
    alpha)``.
    """
    return (sigmoid(y) - DoubleDouble.of(alpha)) * (
        DoubleDouble.of(1.0) - DoubleDouble.of(2 * alpha)
    ).reciprocal()


def steepest_unit(
    y: Float[np.ndarray, "b d"], radius: Float[np.ndarray, " b"], alpha: float
) -> Float[np.ndarray, "b d"]:
    """Upper bounds of the slope ``du/dy`` of the logit's inverse on ``[y - r, y + r]``: the slope
    at the point nearest to 0.
    """
    nearest = np.maximum(np.abs(y) - radius[:, None] * UP, 0) * (1 - 4 * U)
    s = sigmoid(DoubleDouble.of(nearest))
    return ((s * (DoubleDouble.of(1.0) - s)).high + UNIT_ERROR) / (1 - 2 * alpha) * UP


def logit_bounds(alpha: float) -> BiLipschitz:
    """Bounds from the slopes of the logit at the ends of [0, 1], which are the largest, and in
    the middle.
    """
    slope = 1 - 2 * alpha
    return BiLipschitz.of(slope / (alpha * (1 - alpha)), 1 / (4 * slope))


def sum_event(value: Float[Array, "b ..."]) -> Float[Array, " b"]:
    """Sum over the entries of every example."""
    return jnp.sum(value, axis=tuple(range(1, value.ndim)))


def log_logistic(t: Float[Array, "..."]) -> Float[Array, "..."]:
    """Log-density of the standard logistic distribution, which is also ``log(sigmoid(t)
    sigmoid(-t))``.
    """
    return -jax.nn.softplus(t) - jax.nn.softplus(-t)
