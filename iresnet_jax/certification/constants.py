"""Certified constants of a whole flow near an example: how much it stretches and shrinks distances there."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from iresnet_jax.certification.dense_linearization import linearize, products_of, tables_of
from iresnet_jax.certification.problem import Problem, check_certified
from iresnet_jax.certification.step_blocks import jacobian_blocks
from iresnet_jax.certification.step_norms import chained, forward_correction
from iresnet_jax.certification.trajectory import Residuals, follow, residuals
from iresnet_jax.maths.chains import local_bounds, shadowing
from iresnet_jax.maths.chains.least_eigenvalue import singular_value_bounds
from iresnet_jax.maths.enclosures.double_double import DoubleDouble
from iresnet_jax.maths.enclosures.upward_rounding import UP, gamma
from iresnet_jax.maths.norms.convolution_certificate import dense_norm_bound
from iresnet_jax.models.classifier import Classifier
from iresnet_jax.models.density import Density
from iresnet_jax.models.flow import bilipschitz
from iresnet_jax.models.reconstructor import Reconstructor


class LocalConstants(NamedTuple):
    """Guaranteed constants of a flow in a ball around each example, in the 2-norm.

    Attributes:
        forward: Bound of ``|F(x) - F(x')| / |x - x'|`` for any two points of the ball.
        inverse: Bound of ``|x - x'| / |F(x) - F(x')|``, likewise.
        global_forward: Bound on the whole space, by the products over blocks.
        global_inverse: Its counterpart for the inverse.
    """

    forward: Float[np.ndarray, " b"]
    inverse: Float[np.ndarray, " b"]
    global_forward: float
    global_inverse: float


def local_constants(
    model: Density | Classifier | Reconstructor,
    x: Float[Array, "b ..."] | Float[np.ndarray, "b ..."],
    radius: float,
    *,
    context: Float[Array, "b k"] | None = None,
) -> LocalConstants:
    """Guaranteed constants of a model's flow in the ball of a radius around each input, rounding included.

    See `iresnet_jax.maths.chains.local_bounds`. At radius 0 they bound the largest singular value of the flow's Jacobian and
    the reciprocal of the least one, from above. Small flows compute the products of all pairs of steps, ``T^2 / 2`` matrices.
    Large ones compute the product of all steps only: their constants are as sharp at radius 0, and of little use beyond 1e-12.

    Args:
        model: A model with certified bounds.
        x: Inputs of the flow.
        radius: Radius of the balls, at least 0, in the units of the flow's input.
        context: Contexts of a conditional density.

    Raises:
        ValueError: If the model cannot be certified, see `certify.inverse`, or the radius is negative.

    Example:
        >>> certify.local_constants(model, x, 0.1).inverse  # doctest: +SKIP
    """
    check_certified(model)
    if not radius >= 0:
        raise ValueError(f"radius must be at least 0, got {radius}")
    spec = model.spec.flow
    with jax.enable_x64(), jax.default_device(jax.local_devices(backend="cpu")[0]), np.errstate(all="ignore"):
        problem = Problem.of(model)
        whole = bilipschitz(spec, problem.weights)
        scaled = model.scale_context(context) if isinstance(model, Density) else None
        bounds = []
        for i in range(len(x)):
            own = None if scaled is None else np.asarray(scaled[i : i + 1], np.float64)
            bounds.append(_of_example(problem, np.asarray(x[i : i + 1], np.float64), own, radius))
        of_whole = tuple(float(value) for value in whole)
    forward, inverse = (
        np.minimum(np.array(values), cap) for values, cap in zip(zip(*bounds, strict=True), of_whole, strict=True)
    )
    return LocalConstants(forward, inverse, *of_whole)


def _of_example(problem: Problem, x, context, radius) -> local_bounds.LocalBounds:
    if not problem.smooth:
        return local_bounds.LocalBounds(np.inf, np.inf)
    points = follow(problem.spec, problem.weights, jnp.asarray(x), None if context is None else jnp.asarray(context))
    trajectory = DoubleDouble.of(np.array(points))
    found = residuals(problem.stages, trajectory, context)
    if problem.dense:
        return _by_all_products(problem, found, trajectory, radius)
    trajectory = trajectory + DoubleDouble.of(np.array(forward_correction(problem, found)))
    return _by_the_whole_product(problem, residuals(problem.stages, trajectory, context), radius)


def _by_the_whole_product(problem: Problem, found: Residuals, radius) -> local_bounds.LocalBounds:
    """Constants in a ball from the singular values of the product of all Jacobians at its centre.

    With ``M_t`` near ``J_t`` and ``P_t = M_{t-1} ... M_0``, products of mean Jacobians differ from ``P_t`` by at most ``w_t``,
    ``w_{t+1} = |J'_t| w_t + |J'_t - M_t| |P_t|`` and ``|J'_t - M_t| <= |J_t - M_t| + K_t ((|P_t| + w_t) R + E_t)``, in the
    notation of `local_bounds`. Singular values differ by as much.
    """
    constants, d = problem.constants, problem.spec.num_dims
    stretch = chained(problem, (1 + constants.branch) * constants.largest_scale * UP)
    errors = constants.jacobian_errors(found.argument_errors)[0]
    sizes = (np.linalg.norm(found.values[0], axis=1) + found.errors[0]) * UP
    product, size, wrong, off, t = np.eye(d), 1.0, 0.0, 0.0, 0
    for place, (stage, entries) in enumerate(zip(problem.spec.layout, problem.entries.active, strict=True)):
        for k in range(stage.spec.num_blocks):
            if not problem.layers[t]:
                return local_bounds.LocalBounds(np.inf, np.inf)
            slopes = tuple(None if own is None else own[k, 0] for own in found.slopes[place])
            matrix = jacobian_blocks(stage.branch, problem.layers[t], slopes).dense()
            matrix = (matrix + np.eye(len(matrix))) * problem.scales[place][k]
            terms = np.abs(matrix) @ np.abs(product[entries])
            rounding = gamma(len(matrix) + 2) * float(np.linalg.norm(terms)) * UP
            change = errors[t] + constants.second[t] * ((size + wrong) * radius + off)
            wrong = (stretch[t] * wrong + change * size + rounding) * UP
            off = (stretch[t] * off + sizes[t]) * UP
            product[entries] = matrix @ product[entries]
            size = min((stretch[t] + errors[t]) * size + rounding, float(np.linalg.norm(product))) * UP
            t += 1
    least, largest = singular_value_bounds(product)
    inverse = UP / (least - wrong) if least > wrong else np.inf
    return local_bounds.LocalBounds(float(np.nan_to_num((largest + wrong) * UP, nan=np.inf)), float(inverse))


def _by_all_products(problem: Problem, found: Residuals, trajectory: DoubleDouble, radius) -> local_bounds.LocalBounds:
    """Constants in a ball from the norms of the products of Jacobians, and of inverses, of all pairs of steps."""
    linearized = linearize(problem, found, trajectory)
    inverse = shadowing.inverse_norms(products_of(problem, linearized, 0, np.zeros(len(problem.constants.second))))
    matrices = tuple(group.forward for group in linearized.inverses)
    tables = tables_of(problem, matrices, forward=True)
    errors = problem.constants.jacobian_errors(found.argument_errors)[0]
    own_sizes = np.concatenate([np.asarray(group.jacobians[0]) for group in linearized.inverses])
    norms, rounding = (np.asarray(table[0]) for table in tables)
    active = tuple(jnp.asarray(entries) for entries in problem.entries.active)
    tight = [
        float(_whole_norm(tuple(group[0] for group in own), active, problem.spec.num_dims, way))
        for own, way in ((matrices, True), (tuple(group.matrices for group in linearized.inverses), False))
    ]
    exact = local_bounds.forward_norms(norms, rounding, np.maximum(own_sizes, 1), errors)
    # Twice the bound of a product's error: for its own, and for that of the other product of the same matrices.
    exact[0, -1] = min(exact[0, -1], (tight[0] + 2 * (exact[0, -1] - norms[0, -1])) * UP)
    of_inverse = float(np.asarray(linearized.tables.norms[0])[0, -1])
    inverse[0, -1] = min(inverse[0, -1], (tight[1] + 2 * (inverse[0, -1] - of_inverse)) * UP)
    sizes = (np.linalg.norm(found.values[0], axis=1) + found.errors[0]) * UP
    return local_bounds.in_ball(exact, inverse, problem.constants.second, sizes, radius)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _whole_norm(matrices, active, num_dims, forward):
    """A sharper bound of the norm of the product over all steps than that of `product_tables`."""
    product = jnp.eye(num_dims)
    for group, entries in zip(matrices, active, strict=True):

        def step(product, matrix, entries=entries):
            if forward:
                return product.at[entries].set(matrix @ product[entries]), None
            return product.at[:, entries].set(product[:, entries] @ matrix), None

        product, _ = jax.lax.scan(step, product, group)
    return dense_norm_bound(product)
