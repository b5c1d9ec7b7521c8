r"""The certified inverse of a whole flow: how far a computed preimage is from the exact preimage,
by shadowing.

The trajectory of ``x`` is refined to some 80 bits. The refined trajectory's distance from the exact
one is then far below the error of ``x``, and the bound is the distance from ``x`` to the refined
preimage plus this distance.

**Theorem.** Let ``x*_t`` be the exact trajectory of bijections ``F_t`` that ends in ``y``, and
``x^_t`` any other one that ends there. ``r_t = F_t(x^_t) - x^_{t+1}`` are its residuals, ``J_t``
the Jacobian of ``F_t`` at ``x^_t``, ``n_t`` a bound of ``|J_t^-1|``, and ``K_t`` a Lipschitz
constant of that Jacobian. If ``|x*_{t+1} - x^_{t+1}| <= rho_{t+1}``, then with

    c = n_t (rho_{t+1} + |r_t|),    k = n_t K_t / 2    and    4 k c <= 1

``|x*_t - x^_t| <= rho_t = 2 c / (1 + sqrt(1 - 4 k c))``, the lesser root of ``c + k rho^2 = rho``.

*Proof.* Taylor's formula gives ``F_t(x^_t + e) = F_t(x^_t) + J_t e + q(e)`` with ``|q(e)| <= K_t /
2 |e|^2``. So ``F_t(x^_t + e) = x*_{t+1}`` if and only if ``e = Phi(e) = J_t^-1 (x*_{t+1} - x^_{t+1}
- r_t - q(e))``. ``|e| <= rho_t`` gives ``|Phi(e)| <= c + k rho_t^2 = rho_t``: by Brouwer's theorem
``Phi`` has a fixed point in that ball. As ``F_t`` is injective, it is ``x*_t - x^_t``.

The bounds are computed backwards from the last point, where ``rho`` is 0. If the quadratic has no
root, or ``K_t`` is infinite, the theorem does not apply, and the bound is ``rho_t = (rho_{t+1} +
|r_t|) Lip(F_t^-1)``.

Bounds are computed on the host's CPU in float64 and double-double and cover all rounding. Only
sums, products, quotients and roots of IEEE arithmetic are trusted, no elementary function and no
linear solver.
"""

import functools
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Bool, Float

from iresnet_jax.certification.norms import step_norms
from iresnet_jax.certification.prepared import (
    PreparedFlow,
    in_parts,
    inputs_of,
    prepared,
    vectors_of,
)
from iresnet_jax.certification.residuals import Residuals, ending_at, residuals
from iresnet_jax.certification.steps import follow, follow_back, newton_step
from iresnet_jax.maths.double_double import DoubleDouble
from iresnet_jax.maths.upward_rounding import UP
from iresnet_jax.models.contexts import Contexts
from iresnet_jax.models.model import Model
from iresnet_jax.pytrees import in_words, largest, share

_MAX_STEPS = 6  # of Newton's method
_MARGIN = 2.0**-20  # a computed discriminant must exceed this for the theorem to apply


class InverseCertificate(NamedTuple):
    """Guarantees of a computed inverse, one entry per example, in the units of the flow's input.

    Attributes:
        error_bound: Bound of ``|x - F^-1(y)|``; infinite if nothing is known.
        applied: Whether the theorem applied to the whole trajectory. If not, for example because
            slopes of activations jump, steps have their global bounds ``Lip(F_t^-1)``.
        refined: The preimage that the certificate found, to float64.
        refined_bound: Bound of the distance from ``refined``, before its rounding to float64, to
            the exact preimage.
    """

    error_bound: Float[np.ndarray, " b"]
    applied: Bool[np.ndarray, " b"]
    refined: Float[np.ndarray, "b ..."]
    refined_bound: Float[np.ndarray, " b"]

    def __repr__(self) -> str:
        return in_words(
            self,
            lambda: (
                f"guaranteed error at most {largest(self.error_bound)}, by the sharp theorem for "
                f"{share(self.applied)}"
            ),
        )


def inverse(
    model: Model,
    y: Float[Array, "b ..."] | Float[np.ndarray, "b ..."],
    x: Float[Array, "b ..."] | Float[np.ndarray, "b ..."],
    *,
    context: Contexts | None = None,
) -> InverseCertificate:
    r"""Guaranteed bounds of ``|x - F^-1(y)|`` for a computed inverse ``x`` of a model's flow ``F``,
    rounding included.

    ``F`` is the map of the model's weights in exact arithmetic, and ``y`` and ``x`` are taken as
    exact numbers: float32 numbers are certified in float64, and contexts after scaling in float64.
    The flow is `Density.flow` or `Classifier.flow`, without preprocessing.

    The norms of the steps' inverses multiply, to about 1e6 for 22 blocks, against refined residuals
    of 1e-19. Each norm is verified from a banded matrix; a step whose matrix has more than
    `norms.MOST_ENTRIES` entries counts with its global bound.

    Args:
        model: A model with certified bounds, from `freeze` or `load`.
        y: Latents or features.
        x: Inputs of the flow, from the computed inverse.
        context: Contexts of a conditional density, one for all or one for each.

    Example:
        >>> x, info = model.flow().inverse(z)  # doctest: +SKIP
        >>> certify.inverse(model, z, x).error_bound  # doctest: +SKIP
    """
    with prepared(model, y, x, context=context) as (flow, contexts):
        y, x = np.asarray(vectors_of(model, y), np.float64), inputs_of(model, x)
        if len(x) != len(y):
            raise ValueError(
                f"x and y must hold the same examples, got {len(x)} and {len(y)} of them"
            )
        found = in_parts(functools.partial(_certify, flow), flow.chunk, y, x, contexts)
    return found._replace(refined=found.refined.reshape(len(found.refined), *flow.spec.event_shape))


def _certify(flow: PreparedFlow, y, start, contexts) -> InverseCertificate:
    """The certificates of a part of the examples, all of them as vectors."""
    if not flow.stages:  # the latents are the flow's input
        error = np.nan_to_num(np.linalg.norm(y - start, axis=1) * UP, nan=np.inf)
        return InverseCertificate(error, np.ones(len(y), bool), y, np.zeros(len(y)))
    last = np.zeros_like(y)
    last[:, flow.places.latents] = y

    def certificates(points):
        trajectory = DoubleDouble.of(ending_at(flow.stages, np.array(points), last))
        trajectory, found = _refined(flow, trajectory, contexts)
        own, applied = _distance_bounds(flow, found)
        gap = trajectory.map(lambda part: part[:, 0]) - DoubleDouble.of(start)
        error = np.nan_to_num((np.linalg.norm(gap.high, axis=1) * UP + own) * UP, nan=np.inf)
        return InverseCertificate(error, applied, trajectory.high[:, 0], own)

    found = certificates(
        follow(flow.spec, flow.weights, start.reshape(-1, *flow.spec.event_shape), contexts)
    )
    if np.all(found.applied):
        return found
    other = certificates(follow_back(flow.spec, flow.weights, y, contexts))
    better = (other.applied & ~found.applied) | (
        (other.applied == found.applied) & (other.error_bound < found.error_bound)
    )
    return _where(better, other, found)


def _refined(
    flow: PreparedFlow, trajectory: DoubleDouble, contexts
) -> tuple[DoubleDouble, Residuals]:
    """The trajectories after Newton steps until these no longer help, and their residuals."""
    found = residuals(flow.stages, trajectory, contexts)
    for _ in range(_MAX_STEPS):
        size, floor = (
            np.linalg.norm(part.reshape(len(part), -1), axis=1)
            for part in (found.values, found.errors)
        )
        if np.all(size <= floor):
            break
        steps = np.array(
            newton_step(flow.spec, flow.weights, trajectory.high, found.values, contexts)
        )
        steps = np.where(np.all(np.isfinite(steps), axis=(1, 2), keepdims=True), steps, 0)
        moved = trajectory + DoubleDouble.of(
            np.concatenate([steps, np.zeros_like(steps[:, :1])], axis=1)
        )
        after = residuals(flow.stages, moved, contexts)
        smaller = np.linalg.norm(after.values, axis=(1, 2)) < size
        trajectory, found = _where(smaller, (moved, after), (trajectory, found))
        if not np.any(np.linalg.norm(found.values, axis=(1, 2)) < size / 4):
            break
    return trajectory, found


def _distance_bounds(
    flow: PreparedFlow, found: Residuals
) -> tuple[Float[np.ndarray, " b"], Bool[np.ndarray, " b"]]:
    """Distance of each trajectory's first point from the exact one, and whether the theorem
    applied at every step.
    """
    norms, inverse = (
        flow.chained(own)
        for own in (step_norms(flow.stages, flow.constants, found), flow.constants.inverse)
    )
    bound, applied = np.zeros(len(norms)), np.ones(len(norms), bool)
    for t in reversed(range(norms.shape[1])):
        behind = (bound + found.sizes[:, t]) * UP
        c, k = norms[:, t] * behind * UP, norms[:, t] * flow.constants.second[t] / 2 * UP
        root_exists = 4 * k * c <= 1 - _MARGIN
        root = 2 * c / (1 + np.sqrt(1 - 4 * k * c)) * UP
        of_block = behind * inverse[t] * UP
        bound = np.nan_to_num(
            np.where(root_exists, np.fmin(root, of_block), of_block), nan=np.inf, posinf=np.inf
        )
        applied &= root_exists
    return bound, applied


def _where(condition: Bool[np.ndarray, " b"], one: Any, other: Any) -> Any:
    """``one`` for the examples that meet a condition, ``other`` elsewhere; both are trees of
    arrays.
    """
    return jax.tree.map(
        lambda a, b: np.where(condition.reshape(-1, *[1] * (a.ndim - 1)), a, b), one, other
    )
