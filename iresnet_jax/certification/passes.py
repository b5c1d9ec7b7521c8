r"""Passes of vectors through all steps of a flow, forward and backward, at given slopes, see `jacobians`.

Corrections of trajectories promise nothing: residuals say how good they were.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from iresnet_jax.certification.jacobians import LinearSteps
from iresnet_jax.certification.trajectory import over_steps
from iresnet_jax.maths.inverse.fixed_point import Settings, solve_linear

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
        return maps.place.write(now, u + maps.push(slopes, u) + maps.place.read(r)), now

    last, corrections = over_steps(step, jnp.zeros_like(residuals[:, 0]), _stages(steps, slopes, residuals))
    return jnp.moveaxis(jnp.concatenate([*corrections, last[None]]), 0, 1)


@jax.jit
def newton_step(steps: Sequence[LinearSteps], slopes: FlowSlopes, residuals: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
    """The correction ``e_t = J_t^-1 (e_{t+1} - r_t)`` of every point of a trajectory but the last, where ``e_T = 0``."""

    def step(later, own):
        maps, slopes, r = own
        settings = Settings(maps.lipschitz, _MOST_EVALS, _MEMORY)
        solved, _ = solve_linear(lambda u: maps.push(slopes, u), maps.place.read(later - r), settings)
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
