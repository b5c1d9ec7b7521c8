r"""Norms of the inverses of a flow's steps along a trajectory, and Newton's method without dense inverses: for large flows.

A step is ``J = (I + G) diag(s)``. With the least eigenvalue ``lambda`` of the symmetric part of ``I + G``,
``|J^-1|_2 <= 1 / (lambda min s)``, see `iresnet_jax.maths.chains.least_eigenvalue`. In trained blocks it is near the truth,
and ``1 / (1 - L)`` several times that. A Cholesky factorisation of a banded matrix gives it.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from iresnet_jax.branches.feedforward import FeedforwardSpec
from iresnet_jax.certification.problem import Problem, kernels_of
from iresnet_jax.certification.step_blocks import jacobian_blocks
from iresnet_jax.certification.trajectory import Residuals
from iresnet_jax.maths.chains.least_eigenvalue import least_eigenvalue_bound, least_eigenvalue_estimate
from iresnet_jax.maths.chains.row_blocks import identity_and_symmetric_part
from iresnet_jax.maths.enclosures.upward_rounding import UP
from iresnet_jax.maths.inverse.fixed_point import Settings, solve_linear

_MEMORY, _MOST_EVALS = 8, 300  # of the linear solves


class StepNorms(NamedTuple):
    """Norms of the inverses of a trajectory's Jacobians, ``|J_t^-1|_2``.

    Attributes:
        bounds: Guaranteed bounds.
        estimates: Estimates by Lanczos' method where a Jacobian has too many entries, which are no bounds; elsewhere `bounds`.
    """

    bounds: Float[np.ndarray, "b t"]
    estimates: Float[np.ndarray, "b t"]


def step_norms(problem: Problem, found: Residuals) -> StepNorms:
    """Norms of the steps' inverses along trajectories, from the slopes in their residuals.

    A step whose slopes jump has the global bound of its inverse.
    """
    constants = problem.constants
    distances = constants.jacobian_errors(found.argument_errors) / constants.largest_scale * UP
    bounds = np.broadcast_to(constants.inverse, distances.shape).copy()
    estimates, start = bounds.copy(), 0
    for place, stage in enumerate(problem.spec.layout):
        kernels = problem.kernels()[place]
        for k in range(stage.spec.num_blocks):
            t, layers = start + k, problem.layers[start + k]
            margin = 1 - constants.branch[t]
            for i in range(len(bounds)):
                slopes = tuple(None if own is None else own[k, i] for own in found.slopes[place])
                if not (np.isfinite(constants.second[t]) and all(s is None or np.all(np.isfinite(s)) for s in slopes)):
                    continue
                if layers:
                    symmetric = identity_and_symmetric_part(jacobian_blocks(stage.branch, layers, slopes))
                    estimate = least = max(least_eigenvalue_bound(symmetric, margin) - distances[i, t], margin)
                else:
                    own = {name: kernel[k] for name, kernel in kernels.items()}
                    apply = functools.partial(_symmetric_part, stage.branch, own, slopes)
                    estimate, _ = least_eigenvalue_estimate(apply, math.prod(stage.branch.in_shape))
                    least = margin
                bounds[i, t] = constants.inverse[t] * margin / least * UP
                estimates[i, t] = constants.inverse[t] * margin / max(estimate, margin) * UP
        start += stage.spec.num_blocks
    return StepNorms(bounds, estimates)


@functools.partial(jax.jit, static_argnums=0)
def _symmetric_part(branch, kernels, slopes, v):
    """``(I + (G + G^T) / 2) v`` of one example."""

    def push(u):
        return tangent(branch, kernels, tuple(None if s is None else s[None] for s in slopes), u)

    u = v.reshape(1, *branch.in_shape)
    (back,) = jax.linear_transpose(push, u)(u)
    return (u + (push(u) + back) / 2).ravel()


def tangent(
    branch: FeedforwardSpec, kernels: Mapping[str, Array], slopes: Sequence[Array | None], u: Float[Array, "b ..."]
) -> Float[Array, "b ..."]:
    """``J_g u`` of one block for slopes in front of each layer, ``(b, ...)``."""
    for layer, slope in zip(branch.layers, slopes, strict=True):
        if slope is not None:
            u = jnp.concatenate([u] * (slope.shape[-1] // u.shape[-1]), axis=-1) * slope
        u = layer.linear_map()(kernels[layer.name], u)
    return u


def chained(problem: Problem, norms: Float[np.ndarray, " t"]) -> Float[np.ndarray, " t"]:
    """Norms of steps on the whole vector, of which those of a later stage may leave entries alone."""
    beside = [
        np.full(stage.spec.num_blocks, len(active) < problem.spec.num_dims)
        for stage, active in zip(problem.spec.layout, problem.entries.active, strict=True)
    ]
    return np.where(np.concatenate(beside), np.maximum(norms, 1), norms)


def newton_step(problem: Problem, found: Residuals) -> Float[Array, "b t d"]:
    """The correction ``e_t = J_t^-1 (e_{t+1} - r_t)`` of every point of a trajectory, ``e_T = 0``; no number is guaranteed."""
    return _newton_step(
        problem.spec, problem.weights, problem.entries.active, problem.scales, found.slopes, jnp.asarray(found.values)
    )


def forward_correction(problem: Problem, found: Residuals) -> Float[Array, "b t d"]:
    """The correction ``e_{t+1} = J_t e_t + r_t`` of every point of a trajectory that starts where it should, ``e_0 = 0``."""
    return _forward_correction(
        problem.spec, problem.weights, problem.entries.active, problem.scales, found.slopes, jnp.asarray(found.values)
    )


@functools.partial(jax.jit, static_argnums=0)
def _forward_correction(spec, weights, active, scales, slopes, values):
    now, corrections, start = jnp.zeros_like(values[:, 0]), [], 0
    for stage, entries, scale, own_slopes in zip(spec.layout, active, scales, slopes, strict=True):

        def step(now, own, branch=stage.branch, entries=entries):
            kernels, scale, slopes, r = own
            u = (now[:, entries] * scale[None]).reshape(-1, *branch.in_shape)
            pushed = (u + tangent(branch, kernels, slopes, u)).reshape(len(now), -1)
            return now.at[:, entries].set(pushed + r[:, entries]), now

        end = start + stage.spec.num_blocks
        steps = (kernels_of(weights[stage.name]), scale, tuple(own_slopes), jnp.moveaxis(values[:, start:end], 1, 0))
        now, found = lax.scan(step, now, steps)
        corrections.append(found)
        start = end
    return jnp.moveaxis(jnp.concatenate([*corrections, now[None]]), 0, 1)


@functools.partial(jax.jit, static_argnums=0)
def _newton_step(spec, weights, active, scales, slopes, values):
    later, corrections, end = jnp.zeros_like(values[:, 0]), [], values.shape[1]
    for stage, entries, scale, own_slopes in reversed(list(zip(spec.layout, active, scales, slopes, strict=True))):

        def step(later, own, branch=stage.branch, entries=entries):
            kernels, scale, slopes, lipschitz, r = own
            right = (later - r)[:, entries].reshape(-1, *branch.in_shape)
            settings = Settings(lipschitz, _MOST_EVALS, _MEMORY)
            solved, _ = solve_linear(lambda u: tangent(branch, kernels, slopes, u), right, settings)
            now = later.at[:, entries].set(solved.reshape(len(later), -1) / scale[None])
            return now, now

        start = end - stage.spec.num_blocks
        own = weights[stage.name]
        right = jnp.moveaxis(values[:, start:end], 1, 0)
        steps = (kernels_of(own), scale, tuple(own_slopes), own.branch.lipschitz_bound, right)
        later, found = lax.scan(step, later, steps, reverse=True)
        corrections.append(found)
        end = start
    return jnp.moveaxis(jnp.concatenate(corrections[::-1]), 0, 1)
