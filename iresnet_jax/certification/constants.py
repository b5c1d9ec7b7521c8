"""Certified constants of a whole flow near an example: how much it stretches and shrinks distances there."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from iresnet_jax.certification.banded import jacobian_blocks, layers_of_step
from iresnet_jax.certification.passes import forward_correction
from iresnet_jax.certification.prepared import MOST_DIMS, PreparedFlow, in_parts, inputs_of, prepared
from iresnet_jax.certification.products import linearize, products_at, tables_of
from iresnet_jax.certification.residuals import Residuals, residuals
from iresnet_jax.certification.trajectory import follow, over_steps, places_of
from iresnet_jax.maths.enclosures.double_double import DoubleDouble
from iresnet_jax.maths.enclosures.upward_rounding import UP, gamma
from iresnet_jax.maths.norms.convolution_certificate import dense_norm_bound
from iresnet_jax.maths.trajectories import local_bounds, shadowing
from iresnet_jax.maths.trajectories.least_eigenvalue import singular_value_bounds
from iresnet_jax.models.architecture import FlowSpec
from iresnet_jax.models.contractions import bilipschitz
from iresnet_jax.models.density import Contexts
from iresnet_jax.models.model import Model


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
    model: Model,
    x: Float[Array, "b ..."] | Float[np.ndarray, "b ..."],
    radius: float,
    *,
    context: Contexts | None = None,
) -> LocalConstants:
    """Guaranteed constants of a model's flow in the ball of a radius around each input, rounding included.

    See `iresnet_jax.maths.trajectories.local_bounds`. At radius 0 they bound the largest singular value of the flow's Jacobian
    and the reciprocal of the least one, from above. Small flows take the products of all pairs of steps, ``T^2 / 2`` matrices.
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
    if not radius >= 0:
        raise ValueError(f"radius must be at least 0, got {radius}")
    with prepared(model, x, context=context, most_dims=MOST_DIMS) as (flow, contexts):
        forward, inverse = map(float, bilipschitz(flow.spec, flow.weights))
        inputs = inputs_of(model, x).reshape(np.shape(x))
        if not flow.smooth:
            return LocalConstants(np.full(len(x), forward), np.full(len(x), inverse), forward, inverse)
        bounds = in_parts(functools.partial(_of_example, flow, radius), 1, inputs, contexts)
    return LocalConstants(np.minimum(bounds[0], forward), np.minimum(bounds[1], inverse), forward, inverse)


def _of_example(flow: PreparedFlow, radius: float, x, context) -> tuple[np.ndarray, np.ndarray]:
    """The constants in a ball around one example, each as an array of one."""
    trajectory = DoubleDouble.of(np.array(follow(flow.spec, flow.weights, x, context)))
    found = residuals(flow.stages, trajectory, context)
    if flow.dense:
        bounds = _by_all_products(flow, found, trajectory, radius)
    else:
        moves = forward_correction(flow.steps, found.slopes, found.values)
        trajectory = trajectory + DoubleDouble.of(np.array(moves))
        bounds = _by_the_whole_product(flow, residuals(flow.stages, trajectory, context), radius)
    return np.array([bounds.forward]), np.array([bounds.inverse])


def _by_the_whole_product(flow: PreparedFlow, found: Residuals, radius) -> local_bounds.LocalBounds:
    """Constants in a ball from the singular values of the product of all Jacobians at its centre.

    With ``M_t`` near ``J_t`` and ``P_t = M_{t-1} ... M_0``, products of mean Jacobians differ from ``P_t`` by at most ``w_t``,
    ``w_{t+1} = |J'_t| w_t + |J'_t - M_t| |P_t|`` and ``|J'_t - M_t| <= |J_t - M_t| + K_t ((|P_t| + w_t) R + E_t)``, in the
    notation of `local_bounds`. Singular values differ by as much.
    """
    constants, stretch = flow.constants, flow.chained(flow.constants.stretch)
    errors, sizes = constants.jacobian_errors(found.argument_errors)[0], found.sizes[0]
    product, size, wrong, off, t = np.eye(flow.spec.num_dims), 1.0, 0.0, 0.0, 0
    for stage, steps, of_stage in zip(flow.stages, flow.steps, found.slopes, strict=True):
        for k, scale in enumerate(np.asarray(steps.scale).reshape(stage.num_blocks, -1)):
            layers = layers_of_step(stage, k)
            if not layers:
                return local_bounds.LocalBounds(np.inf, np.inf)
            slopes = tuple(None if own is None else own[0, k] for own in of_stage)
            matrix = jacobian_blocks(stage, layers, slopes).dense()
            matrix = (matrix + np.eye(len(matrix))) * scale
            terms = np.abs(matrix) @ np.abs(product[stage.place.active])
            rounding = gamma(len(matrix) + 2) * float(np.linalg.norm(terms)) * UP
            change = errors[t] + constants.second[t] * ((size + wrong) * radius + off)
            wrong = (stretch[t] * wrong + change * size + rounding) * UP
            off = (stretch[t] * off + sizes[t]) * UP
            product[stage.place.active] = matrix @ product[stage.place.active]
            size = min((stretch[t] + errors[t]) * size + rounding, float(np.linalg.norm(product))) * UP
            t += 1
    least, largest = singular_value_bounds(product)
    inverse = UP / (least - wrong) if least > wrong else np.inf
    return local_bounds.LocalBounds(float(np.nan_to_num((largest + wrong) * UP, nan=np.inf)), float(inverse))


def _by_all_products(flow: PreparedFlow, found: Residuals, trajectory: DoubleDouble, radius) -> local_bounds.LocalBounds:
    """Constants in a ball from the norms of the products of Jacobians, and of inverses, of all pairs of steps."""
    constants, linearized = flow.constants, linearize(flow, found, trajectory)
    inverse = shadowing.inverse_norms(products_at(flow, linearized, 0, np.zeros(flow.spec.num_blocks)))
    there, back = (tuple(getattr(group, name) for group in linearized.inverses) for name in ("forward", "matrices"))
    norms, rounding = (np.asarray(table[0]) for table in tables_of(flow.spec, there, forward=True))
    errors = constants.jacobian_errors(found.argument_errors)[0]
    exact = local_bounds.forward_norms(norms, rounding, np.maximum(linearized.of_steps("jacobians", 0), 1), errors)
    # Twice the bound of a product's error: for its own, and for that of the other product of the same matrices.
    known = norms[0, -1], float(np.asarray(linearized.tables.norms[0])[0, -1])
    for bounds, matrices, computed, forward in ((exact, there, known[0], True), (inverse, back, known[1], False)):
        tight = float(_whole_norm(flow.spec, tuple(group[0] for group in matrices), forward=forward))
        bounds[0, -1] = min(bounds[0, -1], (tight + 2 * (bounds[0, -1] - computed)) * UP)
    return local_bounds.in_ball(exact, inverse, constants.second, found.sizes[0], radius)


@functools.partial(jax.jit, static_argnums=0, static_argnames="forward")
def _whole_norm(spec: FlowSpec, matrices: Sequence[Float[Array, "_ _ _"]], *, forward: bool) -> Float[Array, ""]:
    """A sharper bound of the norm of the product over all steps than that of `product_tables`."""

    def step(product, own):
        place, matrix = own
        if forward:
            return product.at[place.active].set(matrix @ product[place.active]), None
        return product.at[:, place.active].set(product[:, place.active] @ matrix), None

    product, _ = over_steps(step, jnp.eye(spec.num_dims), list(zip(places_of(spec).stages, matrices, strict=True)))
    return dense_norm_bound(product)
