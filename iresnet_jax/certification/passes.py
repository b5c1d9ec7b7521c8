r"""Passes of vectors through all steps of a flow, backward and forward, at slopes that are given, see `jacobians`.

Corrections of trajectories promise nothing: residuals say how good they were. What rounding may add to gradients and norms is
`margin_bounds.Step.rounding`.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from iresnet_jax.bijections.reshape import flatten
from iresnet_jax.branches.layers import LayerSpec
from iresnet_jax.certification.jacobians import Steps, over_copies, places_of, pull, push
from iresnet_jax.maths import activations
from iresnet_jax.maths.enclosures.upward_rounding import UP, frobenius_bound, gamma
from iresnet_jax.maths.inverse.fixed_point import Settings, solve_linear
from iresnet_jax.maths.norms.convolution_certificate import dense_norm_bound
from iresnet_jax.models.architecture import FlowSpec

FlowSlopes = tuple[tuple[Array | np.ndarray | None, ...], ...]  # (b, k, ...), by stage and layer

_MEMORY, _MOST_EVALS = 8, 300  # of the linear solves
_NUM_SQUARINGS = 5  # of Gram matrices: the norm of one with 784 columns is at most 5 % too large


@functools.partial(jax.jit, static_argnums=0)
def forward_correction(
    spec: FlowSpec, steps: Sequence[Steps], slopes: FlowSlopes, residuals: Float[Array, "b t d"]
) -> Float[Array, "b t+1 d"]:
    """The correction ``e_{t+1} = J_t e_t + r_t`` of every point of a trajectory that starts where it should, ``e_0 = 0``."""
    now, corrections = jnp.zeros_like(residuals[:, 0]), []
    for place, *own in zip(places_of(spec), steps, _by_step(slopes), _by_stage(steps, residuals), strict=True):

        def step(now, own, place=place):
            maps, slopes, r = own
            u = place.read(now) * maps.scale.reshape(1, *place.in_shape)
            after = place.write(now, u + push(place.layers, maps.kernels, slopes, u)[0])
            return after.at[:, place.active].add(r[:, place.active]), now

        now, found = lax.scan(step, now, tuple(own))
        corrections.append(found)
    return jnp.moveaxis(jnp.concatenate([*corrections, now[None]]), 0, 1)


@functools.partial(jax.jit, static_argnums=0)
def newton_step(
    spec: FlowSpec, steps: Sequence[Steps], slopes: FlowSlopes, residuals: Float[Array, "b t d"]
) -> Float[Array, "b t d"]:
    """The correction ``e_t = J_t^-1 (e_{t+1} - r_t)`` of every point of a trajectory but the last, where ``e_T = 0``."""
    later, corrections = jnp.zeros_like(residuals[:, 0]), []
    parts = zip(places_of(spec), steps, _by_step(slopes), _by_stage(steps, residuals), strict=True)
    for place, *own in reversed(list(parts)):

        def step(later, own, place=place):
            maps, slopes, r = own
            settings = Settings(maps.lipschitz, _MOST_EVALS, _MEMORY)
            solved, _ = solve_linear(lambda u: push(place.layers, maps.kernels, slopes, u)[0], place.read(later - r), settings)
            now = place.write(later, flatten(solved) / maps.scale[None])
            return now, now

        later, found = lax.scan(step, later, tuple(own), reverse=True)
        corrections.append(found)
    return jnp.moveaxis(jnp.concatenate(corrections[::-1]), 0, 1)


def _by_step(slopes: FlowSlopes) -> FlowSlopes:
    """Slopes with the axis of steps in front, ``(k, b, ...)``."""
    return jax.tree.map(lambda own: jnp.moveaxis(own, 1, 0), slopes)


def _by_stage(steps: Sequence[Steps], values: Float[Array, "b t d"]) -> list[Float[Array, "k b d"]]:
    ends = np.cumsum([len(own.lipschitz) for own in steps])
    return jnp.split(jnp.moveaxis(values, 1, 0), ends[:-1])


class Backward(NamedTuple):
    """Gradients of ``c`` functions of the last point.

    Attributes:
        points: In every point of the trajectory.
        outputs: In the outputs of the activations, by stage and layer, ``(k, c, ...)``; None in front of a layer without.
    """

    points: Float[Array, "t+1 c d"]
    outputs: tuple[tuple[Array | None, ...], ...]


@functools.partial(jax.jit, static_argnums=0)
def backward(spec: FlowSpec, steps: Sequence[Steps], slopes: FlowSlopes, last: Float[Array, "b c d"]) -> Backward:
    """Gradients of functions along trajectories, from those in the last point; results have a leading axis of examples.

    Args:
        spec: Architecture of the flow.
        steps: Its steps.
        slopes: Slopes of the activations.
        last: Gradients in the last point.
    """

    def of_example(own):
        slopes, g = own
        points, outputs = [], []
        for place, maps, of_layers in reversed(list(zip(places_of(spec), steps, slopes, strict=True))):

            def step(g, own, place=place):
                maps, slopes = own
                above = place.read(g)
                z, found = pull(place.layers, maps.kernels, _alike(slopes), above)
                return place.write(g, flatten(above + z) * maps.scale[None]), (g, found)

            g, (passed, found) = lax.scan(step, g, (maps, of_layers), reverse=True)
            points.append(passed)
            outputs.append(found)
        return Backward(jnp.concatenate([g[None], *points[::-1]]), tuple(outputs[::-1]))

    return lax.map(of_example, (slopes, last))


def weights_of(layer: LayerSpec, outputs: Float[Array, "... m"]) -> Float[Array, "... c"]:
    """``w`` of `margin_bounds` for gradients in the outputs of the activation in front of a layer, one an input of it."""
    assert layer.activation is not None
    convex = activations.get(layer.activation).convex
    return over_copies(layer, jnp.maximum(-outputs, 0) if convex else jnp.abs(outputs))


class Forward(NamedTuple):
    """Norms of Jacobians in the perturbation, see `iresnet_jax.maths.chains.margin_bounds.Tangents`.

    Attributes:
        points: Bounds of ``|P_t|_2``.
        frobenius: Norms of ``P_t``.
        arguments: Bounds of ``|A|_2``, activation by activation.
        fourth: Bounds of ``|A d|_4^2`` for ``|d| = 1``, as ``sum_k (A d)_k^4 <= sum_k |A_k|^2 (A d)_k^2``.
        forms: Bounds of ``|M|_2`` of each function.
    """

    points: Float[Array, " t+1"]
    frobenius: Float[Array, " t+1"]
    arguments: Float[Array, " a"]
    fourth: Float[Array, " a"]
    forms: Float[Array, " c"]


@functools.partial(jax.jit, static_argnums=0)
def forward(
    spec: FlowSpec,
    steps: Sequence[Steps],
    slopes: FlowSlopes,
    weights: Sequence[Sequence[Array | None]],
    first: Float[Array, "n d"],
) -> Forward:
    """Norms of the Jacobians of everything on the way, one example after the other.

    Args:
        spec: Architecture of the flow.
        steps: Its steps.
        slopes: Slopes of the activations.
        weights: ``S w`` of ``c`` functions, ``(b, k, c, ...)``, by stage and layer.
        first: Rows of ``P_0^T``, one for each coordinate of the perturbation.
    """

    def of_example(own):
        slopes, weights = own
        num = next(w.shape[1] for of_stage in weights for w in of_stage if w is not None)
        state = (first, jnp.zeros((num, len(first), len(first))), jnp.zeros(num))
        points, arguments = [], []
        for place, *of_stage in zip(places_of(spec), steps, slopes, weights, strict=True):

            def step(state, own, place=place):
                tangents, form, rounding = state
                maps, slopes, weights = own
                u = place.read(tangents) * maps.scale.reshape(1, *place.in_shape)
                z, arriving = push(place.layers, maps.kernels, _alike(slopes), u)
                found = []
                for matrix, weight in zip(arriving, weights, strict=True):
                    if weight is not None:
                        matrix, weight = flatten(matrix), weight.reshape(num, -1)
                        lengths = jnp.sum(matrix**2, axis=0)
                        found.append(jnp.stack([_norm(matrix), _norm(matrix * jnp.sqrt(lengths)[None]) * UP]))
                        form = form + lax.map(lambda w, matrix=matrix: (matrix * w[None]) @ matrix.T, weight)
                        rounding = rounding + gamma(matrix.shape[1] + 64) * (weight @ lengths)
                return (place.write(tangents, u + z), form, rounding), (_sizes(tangents), jnp.array(found).reshape(-1, 2))

            state, (sizes, found) = lax.scan(step, state, tuple(of_stage))
            points.append(sizes)
            arguments.append(found.reshape(-1, 2))
        tangents, form, rounding = state
        points, arguments = jnp.concatenate([*points, _sizes(tangents)[None]]), jnp.concatenate(arguments)
        forms = (lax.map(_norm, form) + rounding) * UP
        return Forward(points[:, 0], points[:, 1], arguments[:, 0], arguments[:, 1], forms)

    return lax.map(of_example, (slopes, weights))


def _alike(slopes: Sequence[Array | None]) -> list[Array | None]:
    """Slopes of one example, for all vectors."""
    return [None if slope is None else slope[None] for slope in slopes]


def _sizes(matrix: Float[Array, "n d"]) -> Float[Array, "2"]:
    """Bounds of the 2-norm and of the Frobenius norm."""
    return jnp.stack([_norm(matrix), frobenius_bound(matrix)])


def _norm(matrix: Float[Array, "n m"]) -> Float[Array, ""]:
    return jnp.minimum(dense_norm_bound(matrix, method="gram", num_squarings=_NUM_SQUARINGS), frobenius_bound(matrix))
