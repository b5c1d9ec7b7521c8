"""Dense inverses of the Jacobians along trajectories and the norms of all their products: sharp, for few dimensions."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from iresnet_jax.certification.jacobians import LinearSteps, step_jacobians
from iresnet_jax.certification.prepared import PreparedFlow
from iresnet_jax.certification.residuals import Residuals
from iresnet_jax.certification.trajectory import places_of
from iresnet_jax.maths.enclosures.double_double import DoubleDouble
from iresnet_jax.maths.enclosures.upward_rounding import UP
from iresnet_jax.maths.trajectories import inverse_products, shadowing
from iresnet_jax.maths.trajectories.inverse_products import Inverses, ProductTables
from iresnet_jax.models.architecture import FlowSpec


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


@functools.partial(jax.jit, static_argnums=0, static_argnames="forward")
def tables_of(spec: FlowSpec, matrices: Sequence[Float[Array, "b _ _ _"]], *, forward: bool = False) -> ProductTables:
    """`inverse_products.product_tables` of matrices of each stage, for each example."""
    active = tuple(jnp.asarray(place.active) for place in places_of(spec).stages)

    def of_example(own):
        return inverse_products.product_tables(own, active, spec.num_dims, spec.num_blocks, forward=forward)

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
    """`passes.newton_step` by the approximate inverses."""
    active = tuple(jnp.asarray(place.active) for place in places_of(spec).stages)
    return jax.lax.map(lambda own: inverse_products.solve_backward(own[0], active, own[1]), (inverses, values))
