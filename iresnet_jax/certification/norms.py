r"""Norms of the inverses of a flow's steps along a trajectory, of large flows and of small ones.

Large flows: a step is ``J = (I + G) diag(s)``. With the least eigenvalue ``lambda`` of the symmetric part of ``I + G``,
``|J^-1|_2 <= 1 / (lambda min s)``, see `iresnet_jax.maths.least_eigenvalue`. In trained blocks it is near the
truth, and ``1 / (1 - L)`` several times that. A Cholesky factorisation of a banded matrix gives it.

Small flows: dense inverses of the steps' Jacobians, and the norms of all their products, which are sharp.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from iresnet_jax.certification.jacobians import LinearSteps, alike, step_jacobians
from iresnet_jax.certification.prepared import PreparedFlow
from iresnet_jax.certification.residuals import PreciseStage, Residuals
from iresnet_jax.certification.trajectory import places_of
from iresnet_jax.maths import activations, inverse_products, shadowing
from iresnet_jax.maths.double_double import DoubleDouble
from iresnet_jax.maths.inverse_products import Inverses, ProductTables
from iresnet_jax.maths.least_eigenvalue import least_eigenvalue_bound, least_eigenvalue_estimate
from iresnet_jax.maths.row_blocks import RowBlocks, behind_activation, identity_and_symmetric_part, layer_blocks
from iresnet_jax.maths.upward_rounding import UP
from iresnet_jax.models.architecture import FlowSpec

MOST_ENTRIES = 2**26  # of a step's Jacobian that is computed


def step_norms(flow: PreparedFlow, found: Residuals) -> tuple[Float[np.ndarray, "b t"], Float[np.ndarray, "b t"]]:
    """Norms ``|J_t^-1|_2`` of the steps' inverses along trajectories, from the slopes in their residuals.

    Returns:
        Guaranteed bounds, the global one for a step whose slopes jump; and estimates, by Lanczos' method where a Jacobian has
        too many entries, which are no bounds, and the bounds elsewhere.
    """
    constants = flow.constants
    distances = constants.unscaled.jacobian_errors(found.argument_errors) * UP
    bounds = np.broadcast_to(constants.inverse, distances.shape).copy()
    estimates, t = bounds.copy(), 0
    for stage, of_stage, steps in zip(flow.stages, found.slopes, flow.steps, strict=True):
        for k in range(stage.num_blocks):
            layers, margin = layers_of_step(stage, k), 1 - constants.branch[t]
            for i in range(len(bounds)):
                slopes = tuple(None if own is None else own[i, k] for own in of_stage)
                if not (np.isfinite(constants.second[t]) and all(s is None or np.all(np.isfinite(s)) for s in slopes)):
                    continue
                if layers:
                    symmetric = identity_and_symmetric_part(jacobian_blocks(stage, layers, slopes))
                    estimate = least = max(least_eigenvalue_bound(symmetric, margin) - distances[i, t], margin)
                else:
                    step = jax.tree.map(lambda a, k=k: a[k], steps)
                    estimate, _ = least_eigenvalue_estimate(
                        functools.partial(_symmetric_part, step, slopes), len(stage.place.entries)
                    )
                    least = margin
                bounds[i, t] = constants.inverse[t] * margin / least * UP
                estimates[i, t] = constants.inverse[t] * margin / max(estimate, margin) * UP
            t += 1
    return bounds, estimates


def layers_of_step(stage: PreciseStage, k: int) -> tuple[RowBlocks, ...]:
    """The layers of a step as matrices; none if its Jacobian has more than `MOST_ENTRIES` entries."""
    if num_entries(stage) > MOST_ENTRIES:
        return ()
    return tuple(layer_blocks(layer.kernel[k], layer.spec.in_shape, layer.spec.padding) for layer in stage.layers)


def num_entries(stage: PreciseStage) -> int:
    """Numbers in the banded Jacobian of a branch."""
    shapes = [layer.spec.kernel_shape for layer in stage.layers]
    if any(len(shape) == 2 for shape in shapes):
        return math.prod(stage.place.in_shape) ** 2
    height, width, channels = stage.place.in_shape
    seen = min(height, 1 + sum(taps - 1 for taps, *_ in shapes))
    return height * seen * (width * channels) ** 2


def jacobian_blocks(stage: PreciseStage, layers: Sequence[RowBlocks], slopes: Sequence[np.ndarray | None]) -> RowBlocks:
    """``J_g = W_n D_n ... W_1 D_1`` of one branch at slopes of one example, in front of each layer.

    Every entry of a product is a sum of at most as many terms as a layer has taps and channels, which `StepConstants` bounds.
    """
    product = None
    for layer, matrix, slope in zip(stage.layers, layers, slopes, strict=True):
        if slope is not None and layer.spec.activation is not None:
            channels = slope.shape[-1] // activations.get(layer.spec.activation).channel_factor
            matrix = behind_activation(matrix, slope, channels)
        product = matrix if product is None else matrix @ product
    assert product is not None
    return product


@jax.jit
def _symmetric_part(step: LinearSteps, slopes, v):
    """``(I + (G + G^T) / 2) v`` of one example."""
    u, slopes = v.reshape(1, *step.place.in_shape), alike(slopes)
    return (u + (step.push(slopes, u) + step.pull(slopes, u)) / 2).ravel()


class Linearization(NamedTuple):
    """Approximate inverses of the steps' Jacobians of some examples, and where they were taken.

    Attributes:
        inverses: The inverses, by stage; results have leading axes of examples and steps.
        tables: Norms of their products.
        center: The trajectories.
    """

    inverses: tuple[Inverses, ...]
    tables: ProductTables
    center: DoubleDouble

    def of_steps(self, name: str, i: int) -> np.ndarray:
        """A field of `Inverses` for all steps and one example."""
        return np.concatenate([np.asarray(getattr(group, name)[i]) for group in self.inverses])


def linearize(flow: PreparedFlow, found: Residuals, trajectory: DoubleDouble) -> Linearization:
    """Jacobians of all steps along trajectories, their inverses and norms of products, from the slopes in their residuals."""
    ends = np.cumsum([stage.num_blocks for stage in flow.stages])[:-1]
    distances = np.split(flow.constants.jacobian_errors(found.argument_errors), ends, axis=1)
    inverses = _inverses(flow.steps, found.slopes, distances)
    return Linearization(inverses, tables_of(flow.spec, tuple(group.matrices for group in inverses)), trajectory)


@jax.jit
def _inverses(steps: Sequence[LinearSteps], slopes, distances) -> tuple[Inverses, ...]:
    def of_example(own):
        return tuple(
            inverse_products.invert_group(step_jacobians(maps, of_stage), distance)
            for maps, of_stage, distance in zip(steps, *own, strict=True)
        )

    return jax.lax.map(of_example, (slopes, distances))


@functools.partial(jax.jit, static_argnums=0)
def tables_of(spec: FlowSpec, matrices: Sequence[Float[Array, "b _ _ _"]]) -> ProductTables:
    """`inverse_products.product_tables` of matrices of each stage, for each example."""
    active = tuple(jnp.asarray(place.active) for place in places_of(spec).stages)

    def of_example(own):
        return inverse_products.product_tables(own, active, spec.num_dims, spec.num_blocks)

    return jax.lax.map(of_example, matrices)


def products_at(flow: PreparedFlow, linearized: Linearization, i: int, moved: Float[np.ndarray, " t"]) -> shadowing.Products:
    """Norms and defects of the products for one example, whose trajectory moved since it was linearized."""
    size = linearized.of_steps("norms", i)
    defect = (linearized.of_steps("defects", i) + size * flow.constants.second * moved) * UP
    norms, rounding = (np.asarray(table[i]) for table in linearized.tables)
    before = np.concatenate([np.zeros((len(size), 1)), norms[:, :-1]], axis=1)
    np.fill_diagonal(before, 1)
    jacobians = np.maximum(linearized.of_steps("jacobians", i) + flow.constants.second * moved, 1)
    return shadowing.Products(norms, np.triu(before * defect + rounding * jacobians) * UP)


@functools.partial(jax.jit, static_argnums=0)
def newton_step_by_inverses(
    spec: FlowSpec, inverses: Sequence[Inverses], values: Float[Array, "b t d"]
) -> Float[Array, "b t d"]:
    """`jacobians.newton_step` by the approximate inverses."""
    active = tuple(jnp.asarray(place.active) for place in places_of(spec).stages)
    return jax.lax.map(lambda own: inverse_products.solve_backward(own[0], active, own[1]), (inverses, values))
