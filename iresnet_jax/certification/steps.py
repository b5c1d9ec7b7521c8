r"""A flow as a chain of steps on one vector, its trajectory in float64, and Newton's corrections of
a trajectory.

A step is an ActNorm and a residual block. It acts on some entries of a vector of all ``d``
dimensions, read in the order of its branch's input, and leaves the others alone: squeezing and
flattening only change the order, and entries that left as latents are not acted on again. The first
point of a trajectory is the flow's input, the last one holds its latents.
"""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from iresnet_jax.bijections.chain import Chain
from iresnet_jax.bijections.reshape import flatten, split_channels
from iresnet_jax.bijections.residual import Solver
from iresnet_jax.maths.fixed_point import solve_linear
from iresnet_jax.models.architecture import FlowSpec
from iresnet_jax.models.flow import Block, FlowWeights, flow_bijection


@jax.tree_util.register_static
@dataclass(frozen=True)
class Place:
    """Where the steps of a stage act.

    Attributes:
        entries: Entries of the flow's vector that the steps act on, in the order of the branch's
            input.
        in_shape: Shape of the branch's input.
    """

    entries: tuple[int, ...]
    in_shape: tuple[int, ...]

    @functools.cached_property
    def active(self) -> Int[np.ndarray, " a"]:
        """`entries` as an array."""
        return np.array(self.entries)

    def read(self, vectors: Float[Array, "n d"]) -> Float[Array, "n ..."]:
        """Inputs of the branch."""
        return vectors[:, self.active].reshape(-1, *self.in_shape)

    def write(
        self, vectors: Float[Array, "n d"], values: Float[Array, "n ..."]
    ) -> Float[Array, "n d"]:
        """The vectors with new values where the steps act."""
        return vectors.at[:, self.active].set(flatten(values))


class Places(NamedTuple):
    """Places of the stages and latents in the vector of a trajectory.

    Attributes:
        stages: Place of the steps of each stage.
        latents: Entries of the latent vector, in its order.
    """

    stages: tuple[Place, ...]
    latents: Int[np.ndarray, " d"]


@functools.lru_cache(maxsize=32)
def places_of(spec: FlowSpec) -> Places:
    """The places of a flow's steps, from its own reshapes of a vector of indices."""
    places, latents = [], []
    with jax.ensure_compile_time_eval():
        indices = jnp.arange(spec.num_dims).reshape(1, *spec.event_shape)
        for stage in spec.layout:
            indices = Chain(stage.reshapes).forward(indices)
            places.append(Place(tuple(np.asarray(indices).ravel().tolist()), stage.branch.in_shape))
            if stage.spec.factor_out:
                indices, left = split_channels(indices)
                latents.append(np.asarray(left).ravel())
        latents.append(np.asarray(indices).ravel())
    return Places(tuple(places), np.concatenate(latents))


def blocks_of(spec: FlowSpec, weights: FlowWeights) -> list[tuple[Place, Block]]:
    """Each block with its stage's place."""
    return [
        (place, weights[stage.name])
        for place, stage in zip(places_of(spec).stages, spec.layout, strict=True)
    ]


@functools.partial(jax.jit, static_argnums=0)
def follow(
    spec: FlowSpec,
    weights: FlowWeights,
    x: Float[Array, "b ..."],
    context: Float[Array, "b k"] | None,
) -> Float[Array, "b t d"]:
    """Every point of the trajectory that starts at ``x``, the last one included."""

    def step(vector, own):
        place, block = own
        u = block.actnorm.forward(place.read(vector))
        return place.write(vector, u + block.branch.given(context)(u)), vector

    vector, points = flatten(x), []
    for stage in blocks_of(spec, weights):
        vector, found = lax.scan(step, vector, stage)
        points.append(found)
    return jnp.moveaxis(jnp.concatenate([*points, vector[None]]), 0, 1)


@functools.partial(jax.jit, static_argnums=0)
def follow_back(
    spec: FlowSpec,
    weights: FlowWeights,
    y: Float[Array, "b d"],
    context: Float[Array, "b k"] | None,
) -> Float[Array, "b t d"]:
    """Every point of the trajectory from the flow's own inverse of the latents ``y``."""
    x, _ = flow_bijection(spec, weights, solver=Solver(atol=1e-13), context=context).inverse(y)
    return follow(spec, weights, x, context)


@functools.partial(jax.jit, static_argnums=0)
def newton_step(
    spec: FlowSpec,
    weights: FlowWeights,
    points: Float[Array, "b t d"],
    residuals: Float[Array, "b r d"],
    context: Float[Array, "b k"] | None,
) -> Float[Array, "b r d"]:
    """The correction ``e_t = J_t^-1 (e_{t+1} - r_t)`` of every point of a trajectory but the last,
    where ``e_T = 0``.

    The correction is not guaranteed: residuals of the corrected trajectory say how good it is.
    """

    def step(later, own):
        (place, block), point, residual = own
        u = block.actnorm.forward(place.read(point))
        _, push = jax.linearize(block.branch.given(context), u)
        limits = {"lipschitz_bound": block.branch.lipschitz_bound, "max_evals": 300, "memory": 8}
        solved, _ = solve_linear(push, place.read(later - residual), **limits)
        scale = jnp.exp(block.actnorm.log_scale).reshape(*(1,) * (u.ndim - 1), -1)
        now = place.write(later, solved / scale)
        return now, now

    later, corrections, end = jnp.zeros_like(residuals[:, 0]), [], residuals.shape[1]
    by_step = jnp.moveaxis(points, 1, 0), jnp.moveaxis(residuals, 1, 0)
    for stage, (place, block) in reversed(
        list(zip(spec.layout, blocks_of(spec, weights), strict=True))
    ):
        first = end - stage.spec.num_blocks
        own = ((place, block), *(values[first:end] for values in by_step))
        later, found = lax.scan(step, later, own, reverse=True)
        corrections.append(found)
        end = first
    return jnp.moveaxis(jnp.concatenate(corrections[::-1]), 0, 1)
