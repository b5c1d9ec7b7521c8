r"""Passes of vectors through all steps of a flow, backward and forward, at slopes that are given, see `jacobians`.

Corrections of trajectories promise nothing: residuals say how good they were. What rounding may add to gradients and norms is
`margin_bounds.Step.rounding`.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from iresnet_jax.bijections.reshape import flatten
from iresnet_jax.branches.layers import LayerSpec
from iresnet_jax.certification.jacobians import LinearSteps, alike, over_copies
from iresnet_jax.certification.trajectory import over_steps
from iresnet_jax.maths import activations
from iresnet_jax.maths.enclosures.upward_rounding import UP, frobenius_bound, gamma
from iresnet_jax.maths.inverse.fixed_point import Settings, solve_linear
from iresnet_jax.maths.norms.convolution_certificate import dense_norm_bound

FlowSlopes = tuple[tuple[Array | np.ndarray | None, ...], ...]  # (b, k, ...), by stage and layer

_MEMORY, _MOST_EVALS = 8, 300  # of the linear solves
_NUM_SQUARINGS = 5  # of Gram matrices: the norm of one with 784 columns is at most 5 % too large


@jax.jit
def forward_correction(
    steps: Sequence[LinearSteps], slopes: FlowSlopes, residuals: Float[Array, "b t d"]
) -> Float[Array, "b t+1 d"]:
    """The correction ``e_{t+1} = J_t e_t + r_t`` of every point of a trajectory that starts where it should, ``e_0 = 0``."""

    def step(now, own):
        maps, slopes, r = own
        u = maps.place.read(now) * maps.scale[None]
        return maps.place.write(now, u + maps.push(slopes, u)[0] + maps.place.read(r)), now

    last, corrections = over_steps(step, jnp.zeros_like(residuals[:, 0]), _stages(steps, slopes, residuals))
    return jnp.moveaxis(jnp.concatenate([*corrections, last[None]]), 0, 1)


@jax.jit
def newton_step(steps: Sequence[LinearSteps], slopes: FlowSlopes, residuals: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
    """The correction ``e_t = J_t^-1 (e_{t+1} - r_t)`` of every point of a trajectory but the last, where ``e_T = 0``."""

    def step(later, own):
        maps, slopes, r = own
        settings = Settings(maps.lipschitz, _MOST_EVALS, _MEMORY)
        solved, _ = solve_linear(lambda u: maps.push(slopes, u)[0], maps.place.read(later - r), settings)
        now = maps.place.write(later, solved / maps.scale[None])
        return now, now

    stages = _stages(steps, slopes, residuals)
    _, corrections = over_steps(step, jnp.zeros_like(residuals[:, 0]), stages, reverse=True)
    return jnp.moveaxis(jnp.concatenate(corrections), 0, 1)


def _stages(steps: Sequence[LinearSteps], slopes: FlowSlopes, residuals: Float[Array, "b t d"]) -> list[Any]:
    """The steps of each stage with slopes and residuals, the axis of steps in front."""
    by_step = jax.tree.map(lambda own: jnp.moveaxis(own, 1, 0), (slopes, residuals))
    ends = np.cumsum([len(own.lipschitz) for own in steps])[:-1]
    return list(zip(steps, by_step[0], jnp.split(by_step[1], ends), strict=True))


@jax.jit
def backward(steps: Sequence[LinearSteps], slopes: FlowSlopes, last: Float[Array, "b c d"]) -> tuple[Any, Any]:
    """Gradients of ``c`` functions along trajectories, from those in the last point.

    Returns:
        Gradients in every point, ``(b, t + 1, c, d)``, and in the outputs of the activations, by stage and layer,
        ``(b, k, c, ...)``; None in front of a layer without.
    """

    def step(g, own):
        maps, slopes = own
        above = maps.place.read(g)
        z, found = maps.pull(alike(slopes), above)
        return maps.place.write(g, (above + z) * maps.scale[None]), (g, found)

    def of_example(own):
        slopes, last = own
        first, found = over_steps(step, last, list(zip(steps, slopes, strict=True)), reverse=True)
        points, outputs = zip(*found, strict=True)
        return jnp.concatenate([first[None], *points]), outputs

    return lax.map(of_example, (slopes, last))


def weights_of(layer: LayerSpec, outputs: Float[Array, "... m"]) -> Float[Array, "... c"]:
    """``w`` of `margin_bounds` for gradients in the outputs of the activation in front of a layer, one per input of it."""
    assert layer.activation is not None
    convex = activations.get(layer.activation).convex
    return over_copies(layer, jnp.maximum(-outputs, 0) if convex else jnp.abs(outputs))


@jax.jit
def forward(
    steps: Sequence[LinearSteps],
    slopes: FlowSlopes,
    weights: Sequence[Sequence[Array | None]],
    first: Float[Array, "n d"],
) -> tuple[Array, ...]:
    """The fields of `margin_bounds.Tangents` with the axis of examples in front, one example after the other.

    ``fourth`` is bounded by ``sum_k (A d)_k^4 <= sum_k |A_k|^2 (A d)_k^2``.

    Args:
        steps: The steps of a flow.
        slopes: Slopes of the activations.
        weights: ``S w`` of ``c`` functions, ``(b, k, c, ...)``, by stage and layer.
        first: Rows of ``P_0^T``, one for each coordinate of the perturbation.
    """

    def step(state, own):
        tangents, form, rounding = state
        maps, slopes, weights = own
        u = maps.place.read(tangents) * maps.scale[None]
        z, arriving = maps.push(alike(slopes), u)
        found = []
        for values, weight in zip(arriving, weights, strict=True):
            if weight is not None:
                matrix, weight = flatten(values), weight.reshape(len(rounding), -1)
                lengths = jnp.sum(matrix**2, axis=0)
                found.append(jnp.stack([_norm(matrix), _norm(matrix * jnp.sqrt(lengths)[None]) * UP]))
                form = form + lax.map(lambda w, matrix=matrix: (matrix * w[None]) @ matrix.T, weight)
                rounding = rounding + gamma(matrix.shape[1] + 64) * (weight @ lengths)
        return (maps.place.write(tangents, u + z), form, rounding), (_sizes(tangents), jnp.array(found).reshape(-1, 2))

    def of_example(own):
        slopes, weights = own
        num = next(w.shape[1] for of_stage in weights for w in of_stage if w is not None)
        state = (first, jnp.zeros((num, len(first), len(first))), jnp.zeros(num))
        (last, form, rounding), found = over_steps(step, state, list(zip(steps, slopes, weights, strict=True)))
        sizes, arguments = zip(*found, strict=True)
        points = jnp.concatenate([*sizes, _sizes(last)[None]])
        arguments = jnp.concatenate([own.reshape(-1, 2) for own in arguments])
        forms = (lax.map(_norm, form) + rounding) * UP
        return points[:, 0], points[:, 1], arguments[:, 0], arguments[:, 1], forms

    return lax.map(of_example, (slopes, weights))


def _sizes(matrix: Float[Array, "n d"]) -> Float[Array, "2"]:
    """Bounds of the 2-norm and of the Frobenius norm."""
    return jnp.stack([_norm(matrix), frobenius_bound(matrix)])


def _norm(matrix: Float[Array, "n m"]) -> Float[Array, ""]:
    return jnp.minimum(dense_norm_bound(matrix, method="gram", num_squarings=_NUM_SQUARINGS), frobenius_bound(matrix))
