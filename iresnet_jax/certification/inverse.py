r"""The certified inverse of a whole flow: how far a computed preimage is from the exact one, by shadowing.

The theorem is in `iresnet_jax.maths.shadowing`. A trajectory near that of ``x`` is refined to some 80 bits, so its
distance from the exact one is far below the error of ``x``, and the bound is the distance of ``x`` from it and a little more.
Refined so far, a large flow's trajectory needs no sharp bound of ``|DG^-1|``: the product of the steps' own bounds will do.
Bounds are computed on the host's CPU in float64 and double-double and cover all rounding. Sums, products, quotients and roots
of IEEE arithmetic are trusted, no elementary function and no linear solver is.
"""

import functools
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Bool, Float

from iresnet_jax.certification.jacobians import newton_step
from iresnet_jax.certification.norms import linearize, newton_step_by_inverses, products_at, step_norms
from iresnet_jax.certification.prepared import PreparedFlow, in_parts, inputs_of, prepared, vectors_of
from iresnet_jax.certification.residuals import Residuals, ending_at, residuals
from iresnet_jax.certification.trajectory import follow, follow_back
from iresnet_jax.maths import shadowing
from iresnet_jax.maths.double_double import DoubleDouble
from iresnet_jax.maths.upward_rounding import UP
from iresnet_jax.models.density import Contexts
from iresnet_jax.models.model import Model

_MAX_LINEARIZATIONS, _MAX_STEPS = 4, 6
_GOOD_ENOUGH = 1e-3  # of the bound, for the part that comes from the refined trajectory


class InverseCertificate(NamedTuple):
    """Guarantees of a computed inverse, one entry an example, in the units of the flow's input.

    Attributes:
        error_bound: Bound of ``|x - F^-1(y)|``; infinite if nothing is known.
        applied: Whether the theorem applied to the whole trajectory. If not, as for activations whose slopes jump,
            ``error_bound`` is the product of the blocks' bounds.
        beta: Bound of ``|DG^-1|`` of the trajectory's equations; far from sharp for large flows.
        eta: Bound of the Newton correction ``|DG^-1 r|`` of the refined trajectory.
        K: Bound of the Lipschitz constant of ``DG``; infinite for activations whose slopes jump.
        h: ``beta K eta``; up to 1/2 the normwise theorem applies. The blockwise theorem that is used may apply beyond 1/2.
        refined: The preimage that the certificate found, to float64.
        refined_bound: Bound of its distance from the exact one, before rounding to float64.
        estimate: What `error_bound` would be if estimated norms of steps were bounds, which is not guaranteed; NaN where no
            norm had to be estimated.
    """

    error_bound: Float[np.ndarray, " b"]
    applied: Bool[np.ndarray, " b"]
    beta: Float[np.ndarray, " b"]
    eta: Float[np.ndarray, " b"]
    K: Float[np.ndarray, " b"]
    h: Float[np.ndarray, " b"]
    refined: Float[np.ndarray, "b ..."]
    refined_bound: Float[np.ndarray, " b"]
    estimate: Float[np.ndarray, " b"]


def inverse(
    model: Model,
    y: Float[Array, "b ..."] | Float[np.ndarray, "b ..."],
    x: Float[Array, "b ..."] | Float[np.ndarray, "b ..."],
    *,
    context: Contexts | None = None,
) -> InverseCertificate:
    r"""Guaranteed bounds of ``|x - F^-1(y)|`` for a computed inverse ``x`` of a model's flow ``F``, rounding included.

    ``F`` is the map of the model's weights in exact arithmetic, and ``y`` and ``x`` are the numbers that are given: float32
    numbers are certified in float64. The flow is `Density.flow` or `Classifier.flow`,
    without preprocessing.

    Small flows (up to 1e10 operations) take the norms of all products of the steps' inverses. Large ones take the product of
    the norms, each verified from a banded matrix: 1e6 or so for 22 blocks, where the trajectory is refined to residuals of
    1e-19. Where that matrix has more than `norms.MOST_ENTRIES` entries, a step counts with its global bound, and
    `InverseCertificate.estimate` says what an estimate of its norm would give.

    Args:
        model: A model with certified bounds, as `freeze` and `load` give it.
        y: Latents or features.
        x: Inputs of the flow, as the inverse gave them.
        context: Contexts of a conditional density.

    Raises:
        ValueError: If the model has no certified bounds or a block is no contraction, if shapes do not fit, or under ``jit``.

    Example:
        >>> x, info = model.flow().inverse(z)  # doctest: +SKIP
        >>> certify.inverse(model, z, x).error_bound  # doctest: +SKIP
    """
    with prepared(model, y, x, context=context) as (flow, contexts):
        y, x = np.asarray(vectors_of(model, y), np.float64), inputs_of(model, x)
        if len(x) != len(y):
            raise ValueError(f"x and y must hold the same examples, got {len(x)} and {len(y)} of them")
        found = in_parts(functools.partial(_certify, flow), flow.chunk, y, x, contexts)
    return found._replace(refined=found.refined.reshape(len(found.refined), *flow.spec.event_shape))


def _certify(flow: PreparedFlow, y, start, contexts) -> InverseCertificate:
    """The certificates of a part of the examples, all of them as vectors."""
    last = np.zeros_like(y)
    last[:, flow.places.latents] = y
    points = follow(flow.spec, flow.weights, start.reshape(-1, *flow.spec.event_shape), contexts)
    trajectory = DoubleDouble.of(ending_at(flow.stages, np.array(points), last))
    certify = _with_products if flow.dense and flow.smooth else _with_norms
    best = None
    for attempt in range(_MAX_LINEARIZATIONS):
        if attempt == _MAX_LINEARIZATIONS - 1 or not (flow.smooth and np.all(np.isfinite(trajectory.high))):
            points = np.array(follow_back(flow.spec, flow.weights, y, contexts))
            trajectory = DoubleDouble.of(ending_at(flow.stages, points, last))
        found, trajectory = certify(flow, trajectory, start, contexts)
        best = _better(best, found)
        if np.all(best.applied) or not flow.smooth:
            break
    assert best is not None
    return best


def _with_products(flow: PreparedFlow, trajectory, start, contexts) -> tuple[InverseCertificate, DoubleDouble]:
    """The best certificates of Newton's steps with one linearization, while they help, and the last trajectory."""
    found = residuals(flow.stages, trajectory, contexts)
    linearized = linearize(flow, found, trajectory)
    best, size = None, np.full(len(start), np.inf)
    for _ in range(_MAX_STEPS):
        moved = np.linalg.norm((trajectory - linearized.center).high[:, :-1], axis=2) * UP
        products = [products_at(flow, linearized, i, own) for i, own in enumerate(moved)]
        best = _better(best, _bounds(flow, products, found, trajectory, start))
        good = best.applied & (best.refined_bound <= _GOOD_ENOUGH * best.error_bound)
        shrunk = np.linalg.norm(found.values, axis=(1, 2)) < size / 4
        if np.all(good | ~shrunk):
            break
        size = np.linalg.norm(found.values, axis=(1, 2))
        trajectory = _moved(trajectory, newton_step_by_inverses(flow.spec, linearized.inverses, found.values))
        found = residuals(flow.stages, trajectory, contexts)
    assert best is not None
    return best, trajectory


def _with_norms(flow: PreparedFlow, trajectory, start, contexts) -> tuple[InverseCertificate, DoubleDouble]:
    """The certificates from the norms of each step's inverse, after as many Newton steps as help, and the last trajectory."""
    found = residuals(flow.stages, trajectory, contexts)
    for _ in range(_MAX_STEPS):
        size, floor = (np.linalg.norm(part.reshape(len(start), -1), axis=1) for part in (found.values, found.errors))
        if np.all(size <= floor):
            break
        moved = _moved(trajectory, newton_step(flow.steps, found.slopes, found.values))
        after = residuals(flow.stages, moved, contexts)
        smaller = np.linalg.norm(after.values, axis=(1, 2)) < size
        trajectory = DoubleDouble(*(np.where(smaller[:, None, None], b, a) for a, b in zip(trajectory, moved, strict=True)))
        found = found.where(~smaller, after)
        if not np.any(np.linalg.norm(found.values, axis=(1, 2)) < size / 4):
            break
    norms, guesses = step_norms(flow, found)
    tables = ([shadowing.products_of_norms(flow.chained(own)) for own in every] for every in (norms, guesses))
    bounds, estimates = (_bounds(flow, table, found, trajectory, start) for table in tables)
    estimated = np.any(guesses != norms, axis=1)
    return bounds._replace(estimate=np.where(estimated, estimates.error_bound, np.nan)), trajectory


def _moved(trajectory: DoubleDouble, steps) -> DoubleDouble:
    """A trajectory and the corrections of all its points but the last; those that are no numbers count as 0."""
    steps = np.array(steps)
    steps = np.where(np.all(np.isfinite(steps), axis=(1, 2), keepdims=True), steps, 0)
    return trajectory + DoubleDouble.of(np.concatenate([steps, np.zeros_like(steps[:, :1])], axis=1))


def _bounds(
    flow: PreparedFlow, products: list[shadowing.Products], found: Residuals, trajectory: DoubleDouble, start
) -> InverseCertificate:
    """Conclusion of the theorem for a trajectory, for each example."""
    constants = flow.constants
    gap = trajectory.map(lambda part: part[:, 0]) - DoubleDouble.of(start)
    distance = np.linalg.norm(gap.high, axis=1) * UP
    rows = []
    for i, residual in enumerate(found.sizes):
        residual = np.nan_to_num(residual, nan=np.inf, posinf=np.inf)
        radii = shadowing.radii(products[i], residual, constants.second, constants.inverse)
        numbers = shadowing.classical(shadowing.inverse_norms(products[i]), residual, constants.second)
        rows.append((distance[i] + radii.radii[0], np.all(radii.applied), *numbers, radii.radii[0]))
    error, applied, beta, eta, K, h, own = np.nan_to_num(np.array(rows, np.float64), nan=np.inf, posinf=np.inf).T
    nothing = np.full(len(error), np.nan)
    return InverseCertificate(error * UP, applied.astype(bool), beta, eta, K, h, trajectory.high[:, 0], own, nothing)


def _better(one: InverseCertificate | None, other: InverseCertificate) -> InverseCertificate:
    """For each example the certificate with the lesser bound, one by the theorem first."""
    if one is None:
        return other
    takes = (other.applied & ~one.applied) | ((other.applied == one.applied) & (other.error_bound < one.error_bound))
    return jax.tree.map(lambda a, b: np.where(takes.reshape(-1, *[1] * (np.ndim(a) - 1)), b, a), one, other)
