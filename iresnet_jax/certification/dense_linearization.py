"""Dense inverses of the Jacobians along trajectories and the norms of all their products: sharp, for few dimensions."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from iresnet_jax.certification.problem import Problem
from iresnet_jax.certification.step_jacobians import step_jacobians
from iresnet_jax.certification.trajectory import Residuals
from iresnet_jax.maths.chains import inverse_products, shadowing
from iresnet_jax.maths.chains.inverse_products import Inverses, ProductTables
from iresnet_jax.maths.enclosures.double_double import DoubleDouble
from iresnet_jax.maths.enclosures.upward_rounding import UP


class Linearization(NamedTuple):
    """Approximate inverses of the steps' Jacobians of some examples, and where they were taken."""

    inverses: tuple[Inverses, ...]
    tables: ProductTables
    center: DoubleDouble


def products_of(problem: Problem, linearized: Linearization, i: int, moved: Float[np.ndarray, " t"]) -> shadowing.Products:
    """Norms and defects of the products for one example, whose trajectory moved since it was linearized."""
    size, defect = (
        np.concatenate([np.asarray(getattr(group, name)[i]) for group in linearized.inverses]) for name in ("norms", "defects")
    )
    defect = (defect + size * problem.constants.second * moved) * UP
    norms, rounding = (np.asarray(table[i]) for table in linearized.tables)
    before = np.concatenate([np.zeros((len(size), 1)), norms[:, :-1]], axis=1)
    np.fill_diagonal(before, 1)
    jacobians = np.concatenate([np.asarray(group.jacobians[i]) for group in linearized.inverses])
    jacobians = np.maximum(jacobians + problem.constants.second * moved, 1)
    return shadowing.Products(norms, np.triu(before * defect + rounding * jacobians) * UP)


def linearize(problem: Problem, found: Residuals, trajectory: DoubleDouble) -> Linearization:
    """Jacobians of all steps along trajectories, their inverses and norms of products, from the slopes in their residuals."""
    distances = problem.constants.jacobian_errors(found.argument_errors)
    inverses, start = [], 0
    for stage, kernels, scale, slopes in zip(problem.spec.layout, problem.kernels(), problem.scales, found.slopes, strict=True):
        end = start + stage.spec.num_blocks
        inverses.append(_invert(stage.branch, kernels, scale, slopes, distances[:, start:end]))
        start = end
    tables = tables_of(problem, tuple(group.matrices for group in inverses))
    return Linearization(tuple(inverses), tables, trajectory)


def newton_steps(problem: Problem, linearized: Linearization, values: Float[np.ndarray, "b t d"]) -> Float[Array, "b t d"]:
    """The corrections of all points of trajectories with these residuals, by the approximate inverses."""
    return _newton_steps(linearized.inverses, problem.entries.active, jnp.asarray(values))


@functools.partial(jax.jit, static_argnums=0)
def _invert(branch, kernels, scale, slopes, distances):
    def of_example(own):
        slopes, distances = own
        return inverse_products.invert_group(step_jacobians(branch, kernels, scale, slopes), distances)

    by_example = jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0), tuple(slopes))
    return jax.lax.map(of_example, (by_example, distances))


def tables_of(problem: Problem, matrices: Sequence[Float[Array, "b _ _ _"]], *, forward: bool = False) -> ProductTables:
    """`inverse_products.product_tables` of matrices of each stage, for each example."""
    active = tuple(jnp.asarray(entries) for entries in problem.entries.active)
    num = len(problem.constants.second)
    return _tables(tuple(matrices), active, problem.spec.num_dims, num, forward)


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _tables(matrices, active, num_dims, num_rows, forward):
    def of_example(own):
        return inverse_products.product_tables(own, active, num_dims, num_rows, forward=forward)

    return jax.lax.map(of_example, matrices)


@jax.jit
def _newton_steps(inverses, active, values):
    return jax.lax.map(lambda own: inverse_products.solve_backward(own[0], active, own[1]), (inverses, values))
