r"""The certified inverse of a whole flow: how far a computed preimage is from the exact one, by shadowing.

The theorem is in `iresnet_jax.maths.inverse.shadowing`. A trajectory near that of ``x`` is refined to some 80 bits, so its
distance from the exact one is far below the error of ``x``, and the bound is the distance of ``x`` from it and a little more.
Bounds are computed on the host's CPU in float64 and double-double and cover all rounding. Sums, products, quotients and roots
of IEEE arithmetic are trusted, no elementary function and no linear solver is.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from iresnet_jax.bijections.residual import Solver
from iresnet_jax.maths.double_double import DoubleDouble
from iresnet_jax.maths.inverse import inverse_products, shadowing
from iresnet_jax.maths.inverse.inverse_products import Inverses, ProductTables
from iresnet_jax.models.architecture import FlowSpec
from iresnet_jax.models.classifier import Classifier
from iresnet_jax.models.density import Density
from iresnet_jax.models.step_jacobians import StepConstants, step_constants, step_jacobians
from iresnet_jax.models.trajectory import (
    Entries,
    PreciseStage,
    Residuals,
    ending_at,
    entries_of,
    follow,
    go_back,
    precise_stages,
    residuals,
)

MOST_DIMS = 4096  # of the dense path
_MAX_LINEARIZATIONS, _MAX_STEPS = 4, 6
_GOOD_ENOUGH = 1e-3  # of the bound, for the part that comes from the refined trajectory
_CHUNK_ENTRIES = 2**17  # of the widest layer in all blocks of a stage, in the examples that are refined together
_ALL_ROWS = 1e12  # floating-point operations up to which all products are computed instead of those from the first step
_UP = 1 + 2.0**-40


class InverseCertificate(NamedTuple):
    """What is guaranteed of a computed inverse, one entry an example, in the units of the flow's input.

    Attributes:
        error_bound: Bound of ``|x - F^-1(y)|``; infinite if nothing is known.
        applied: Whether the theorem applied to the whole trajectory. Where it did not, and for activations whose slopes jump,
            the bounds of the blocks' inverses multiply.
        beta: Bound of ``|DG^-1|`` of the trajectory's equations.
        eta: Bound of the Newton correction ``|DG^-1 r|`` of the refined trajectory.
        K: Bound of the Lipschitz constant of ``DG``; infinite for activations whose slopes jump.
        h: ``beta K eta``; up to 1/2 the normwise theorem applies. The one used is blockwise and may apply beyond.
        refined: The preimage that the certificate found, to float64.
        refined_bound: Bound of its distance from the exact one, before rounding to float64.
    """

    error_bound: Float[np.ndarray, " b"]
    applied: Bool[np.ndarray, " b"]
    beta: Float[np.ndarray, " b"]
    eta: Float[np.ndarray, " b"]
    K: Float[np.ndarray, " b"]
    h: Float[np.ndarray, " b"]
    refined: Float[np.ndarray, "b ..."]
    refined_bound: Float[np.ndarray, " b"]


def inverse(
    model: Density | Classifier,
    y: Float[Array, "b ..."] | Float[np.ndarray, "b ..."],
    x: Float[Array, "b ..."] | Float[np.ndarray, "b ..."],
    *,
    context: Float[Array, "b k"] | None = None,
) -> InverseCertificate:
    r"""Guaranteed bounds of ``|x - F^-1(y)|`` for a computed inverse ``x`` of a model's flow ``F``, rounding included.

    ``F`` is the map of the model's weights in exact arithmetic, and ``y`` and ``x`` are the numbers that are given: float32
    numbers are certified in float64. The flow is `Density.flow` or `Classifier.flow`, without preprocessing. Needs memory for
    some ``d^2`` numbers a block, and up to `MOST_DIMS` dimensions.

    Args:
        model: A model with certified bounds, as `freeze` and `load` give it.
        y: Latents ``(b, d)``, or features of a classifier.
        x: Inputs of the flow, as the inverse gave them.
        context: Contexts of a conditional density.

    Raises:
        ValueError: If the model has no certified bounds or a block is no contraction, if shapes do not fit, or if there are too
            many dimensions.

    Example:
        >>> x, info = model.flow().inverse(z)  # doctest: +SKIP
        >>> certify.inverse(model, z, x).error_bound  # doctest: +SKIP
    """
    spec = model.spec.flow
    check_certified(model)
    _check_shapes(model, y, x)
    with jax.enable_x64(), jax.default_device(jax.local_devices(backend="cpu")[0]), np.errstate(all="ignore"):
        problem = Problem.of(model)
        y = np.asarray(y, np.float64).reshape(len(y), -1)
        start = np.asarray(x, np.float64).reshape(len(x), -1)
        scaled = model.scale_context(context) if isinstance(model, Density) else None
        contexts = None if scaled is None else np.asarray(scaled, np.float64)
        parts, size = [], min(problem.chunk, 2 ** math.ceil(math.log2(max(len(y), 1))))
        for first in range(0, len(y), size):
            chosen = np.minimum(np.arange(first, first + size), len(y) - 1)  # the last part is filled up with its last example
            part = _certify(problem, y[chosen], start[chosen], None if contexts is None else contexts[chosen])
            parts.append([values[: len(y) - first] for values in part])
        joined = InverseCertificate(*(np.concatenate(values) for values in zip(*parts, strict=True)))
    return joined._replace(refined=joined.refined.reshape(len(y), *spec.event_shape))


class Problem(NamedTuple):
    """A flow prepared for certification.

    Attributes:
        spec: Architecture of the flow.
        weights: Its weights in float64.
        stages: Its steps in double-double.
        entries: Where the vector of a trajectory keeps what.
        constants: Guaranteed constants of the steps.
        num_rows: Rows of the table of products that are computed.
        chunk: Examples that are certified together, at most.
    """

    spec: FlowSpec
    weights: Any
    stages: tuple[PreciseStage, ...]
    entries: Entries
    constants: StepConstants
    num_rows: int
    chunk: int

    @classmethod
    def of(cls, model: Density | Classifier) -> "Problem":
        """Prepares a model's flow; in float64."""
        spec, bounds = model.spec.flow, model.bounds
        assert bounds is not None
        weights = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), model.weights)
        stages = precise_stages(spec, weights, bounds)
        kernels = [{name: layer["kernel"] for name, layer in weights[stage.name]["branch"].items()} for stage in spec.layout]
        lipschitz = [weights[stage.name]["lipschitz"] for stage in spec.layout]
        constants = step_constants(stages, kernels, lipschitz)
        num = len(constants.second)
        affordable = 2.0 * num**2 * spec.num_dims**3 <= _ALL_ROWS
        widest = max(
            stage.spec.num_blocks * math.prod(layer.in_shape) for stage in spec.layout for layer in stage.branch.layers
        )
        chunk = max(1, min(32, _CHUNK_ENTRIES // widest))
        return cls(spec, weights, stages, entries_of(spec), constants, num if affordable else 1, chunk)


class Linearization(NamedTuple):
    """Approximate inverses of the steps' Jacobians of some examples, and where they were taken."""

    inverses: tuple[Inverses, ...]
    tables: ProductTables
    center: DoubleDouble


def _certify(problem, y, start, contexts):
    """The fields of `InverseCertificate` for a part of the examples."""
    last = np.zeros_like(y)
    last[:, problem.entries.latents] = y
    context = None if contexts is None else jnp.asarray(contexts)
    points = follow(problem.spec, problem.weights, jnp.asarray(start.reshape(-1, *problem.spec.event_shape)), context)
    points = ending_at(problem.stages, np.array(points), last)
    best = _nothing(start)
    smooth = bool(np.all(np.isfinite(problem.constants.second)))
    trajectory = DoubleDouble.of(points)
    for attempt in range(_MAX_LINEARIZATIONS):
        if attempt == _MAX_LINEARIZATIONS - 1 or not (smooth and np.all(np.isfinite(trajectory.high))):
            points = np.array(go_back(problem.spec, problem.weights, jnp.asarray(y), context, Solver(atol=1e-13)))
            trajectory = DoubleDouble.of(ending_at(problem.stages, points, last))
        found = residuals(problem.stages, trajectory, contexts)
        if not smooth:
            return _better(best, _bounds(problem, None, found, trajectory, start))
        linearized = linearize(problem, found, trajectory)
        best, trajectory = _refine(problem, linearized, found, trajectory, start, contexts, best)
        if np.all(best.applied):
            break
    return best


def _refine(problem, linearized, found, trajectory, start, contexts, best):
    """Newton steps with one linearization, while they help."""
    size = np.full(len(start), np.inf)
    for _ in range(_MAX_STEPS):
        now = _bounds(problem, linearized, found, trajectory, start)
        best = _better(best, now)
        good = best.applied & (best.refined_bound <= _GOOD_ENOUGH * best.error_bound)
        shrunk = np.linalg.norm(found.values, axis=(1, 2)) < size / 4
        if np.all(good | ~shrunk):
            break
        size = np.linalg.norm(found.values, axis=(1, 2))
        steps = np.array(_newton(linearized.inverses, problem.entries.active, jnp.asarray(found.values)))
        steps = np.where(np.all(np.isfinite(steps), axis=(1, 2), keepdims=True), steps, 0)
        steps = np.concatenate([steps, np.zeros_like(steps[:, :1])], axis=1)
        trajectory = trajectory + DoubleDouble.of(steps)
        found = residuals(problem.stages, trajectory, contexts)
    return best, trajectory


def _bounds(problem, linearized, found: Residuals, trajectory: DoubleDouble, start) -> InverseCertificate:
    """What the theorem says of a trajectory, for each example."""
    constants = problem.constants
    sizes = (np.linalg.norm(found.values, axis=2) + found.errors) * _UP
    gap = trajectory.map(lambda part: part[:, 0]) - DoubleDouble.of(start)
    distance = np.linalg.norm(gap.high, axis=1) * _UP
    rows = []
    for i, residual in enumerate(sizes):
        residual = np.nan_to_num(residual, nan=np.inf, posinf=np.inf)
        if linearized is None:
            num = len(residual)
            products = shadowing.Products(np.full((num, num), np.inf), np.full((num, num), np.inf))
        else:
            moved = (trajectory - linearized.center).high[i, :-1]
            products = products_of(problem, linearized, i, np.linalg.norm(moved, axis=1) * _UP)
        radii = shadowing.radii(products, residual, constants.second, constants.inverse)
        numbers = shadowing.classical(shadowing.inverse_norms(products), residual, constants.second)
        rows.append((distance[i] + radii.radii[0], np.all(radii.applied), *numbers, radii.radii[0]))
    error, applied, beta, eta, K, h, own = np.nan_to_num(np.array(rows, np.float64), nan=np.inf, posinf=np.inf).T
    return InverseCertificate(error * _UP, applied.astype(bool), beta, eta, K, h, trajectory.high[:, 0], own)


def products_of(problem: Problem, linearized: Linearization, i: int, moved: Float[np.ndarray, " t"]) -> shadowing.Products:
    """Norms and defects of the products for one example, whose trajectory moved since it was linearized.

    Rows that were not computed stand for exact products of the approximate inverses.
    """
    size, defect = (
        np.concatenate([np.asarray(getattr(group, name)[i]) for group in linearized.inverses]) for name in ("norms", "defects")
    )
    defect = (defect + size * problem.constants.second * moved) * _UP
    num, rows = len(size), problem.num_rows
    norms, rounding = np.zeros((2, num, num))
    norms[:rows], rounding[:rows] = (np.asarray(table[i]) for table in linearized.tables)
    for s in range(rows, num):
        norms[s, s:] = np.cumprod(np.maximum(size[s:], 1)) * _UP
    before = np.concatenate([np.zeros((num, 1)), norms[:, :-1]], axis=1)
    np.fill_diagonal(before, 1)
    jacobians = np.concatenate([np.asarray(group.jacobians[i]) for group in linearized.inverses])
    jacobians = np.maximum(jacobians + problem.constants.second * moved, 1)
    return shadowing.Products(norms, np.triu(before * defect + rounding * jacobians) * _UP)


def linearize(problem: Problem, found: Residuals, trajectory: DoubleDouble) -> Linearization:
    """Jacobians of all steps along trajectories, their inverses and norms of products, from the slopes in their residuals."""
    distances = problem.constants.jacobian_errors(found.argument_errors)
    inverses, start = [], 0
    for stage, own in zip(problem.spec.layout, problem.stages, strict=True):
        k = stage.spec.num_blocks
        kernels = {name: layer["kernel"] for name, layer in problem.weights[stage.name]["branch"].items()}
        scale = np.broadcast_to(own.scale.high[:, 0], (k, *stage.branch.in_shape)).reshape(k, -1)
        slopes = found.slopes[len(inverses)]
        inverses.append(_invert(stage.branch, kernels, scale, slopes, distances[:, start : start + k]))
        start += k
    tables = tables_of(problem, tuple(group.matrices for group in inverses), problem.num_rows)
    return Linearization(tuple(inverses), tables, trajectory)


@functools.partial(jax.jit, static_argnums=0)
def _invert(branch, kernels, scale, slopes, distances):
    def of_example(own):
        slopes, distances = own
        return inverse_products.invert_group(step_jacobians(branch, kernels, scale, slopes), distances)

    by_example = jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0), tuple(slopes))
    return jax.lax.map(of_example, (by_example, distances))


def tables_of(problem: "Problem", matrices, num_rows: int, *, forward: bool = False) -> ProductTables:
    """`inverse_products.product_tables` of matrices ``(b, k, d, d)`` of each stage, for each example."""
    active = tuple(jnp.asarray(entries) for entries in problem.entries.active)
    return _tables(matrices, active, problem.spec.num_dims, num_rows, forward)


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _tables(matrices, active, num_dims, num_rows, forward):
    def of_example(own):
        return inverse_products.product_tables(own, active, num_dims, num_rows, forward=forward)

    return jax.lax.map(of_example, matrices)


@jax.jit
def _newton(inverses, active, values):
    return jax.lax.map(lambda own: inverse_products.solve_backward(own[0], active, own[1]), (inverses, values))


def _nothing(start) -> InverseCertificate:
    infinite = np.full(len(start), np.inf)
    nothing = np.zeros(len(start), bool)
    return InverseCertificate(infinite, nothing, infinite, infinite, infinite, infinite, start, infinite)


def _better(one: InverseCertificate, other: InverseCertificate) -> InverseCertificate:
    """For each example the certificate with the lesser bound, one by the theorem first."""
    takes = (other.applied & ~one.applied) | ((other.applied == one.applied) & (other.error_bound < one.error_bound))
    chosen = [np.where(takes.reshape(-1, *[1] * (np.ndim(a) - 1)), b, a) for a, b in zip(one, other, strict=True)]
    return InverseCertificate(*chosen)


def check_certified(model: Density | Classifier) -> None:
    """Raises ``ValueError`` unless every block is certified to be a contraction and the flow is small enough for `Problem`."""
    if isinstance(model, Classifier):
        model.require_bijection()
    if model.bounds is None:
        raise ValueError("the weights are not certified: call freeze() first")
    if not all(np.all(np.asarray(stage["lipschitz"]) < 1) for stage in model.weights.values()):
        raise ValueError("a block is not certified to be a contraction, so the inverse may not be unique: see certificate()")
    num_dims = model.spec.flow.num_dims
    if num_dims > MOST_DIMS:
        raise ValueError(f"the dense certificate takes up to {MOST_DIMS} dimensions, got {num_dims}")


def _check_shapes(model, y, x) -> None:
    spec = model.spec.flow
    if x.shape[1:] != tuple(spec.event_shape) or math.prod(y.shape[1:]) != spec.num_dims or len(x) != len(y):
        raise ValueError(
            f"y must have {spec.num_dims} entries an example and x the shape (b, {', '.join(map(str, spec.event_shape))}) of "
            f"the flow's input, got {y.shape} and {x.shape}"
        )
