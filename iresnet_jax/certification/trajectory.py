r"""A flow as a chain of steps on one vector, and its trajectory in float64.

A step is an ActNorm and a residual block. It acts on some entries of a vector of all ``d`` dimensions, read in the order that
its branch has them in, and leaves the others alone: squeezing and flattening are orders of entries, and a part that left as
latents is not acted on again. The first point of a trajectory is the flow's input, the last one holds its latents.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from iresnet_jax.bijections.actnorm import forward_and_logdet
from iresnet_jax.bijections.chain import chain
from iresnet_jax.bijections.reshape import flatten, split_channels
from iresnet_jax.bijections.residual import Solver
from iresnet_jax.branches.layers import LayerSpec
from iresnet_jax.models.architecture import FlowSpec
from iresnet_jax.models.bounds import Block, FlowWeights
from iresnet_jax.models.flow import flow_bijection


@jax.tree_util.register_static
@dataclass(frozen=True)
class Place:
    """Common part of a stage's steps: where they act, and how their branches are made.

    Attributes:
        entries: Entries of the flow's vector that the steps act on, in the order of the branch's input.
        in_shape: Shape of the branch's input.
        layers: Layers of the branch.
    """

    entries: tuple[int, ...]
    in_shape: tuple[int, ...]
    layers: tuple[LayerSpec, ...]

    @functools.cached_property
    def active(self) -> Int[np.ndarray, " a"]:
        """`entries` as an array."""
        return np.array(self.entries)

    def read(self, vectors: Float[Array, "n d"]) -> Float[Array, "n ..."]:
        """Inputs of the branch."""
        return vectors[:, self.active].reshape(-1, *self.in_shape)

    def write(self, vectors: Float[Array, "n d"], values: Float[Array, "n ..."]) -> Float[Array, "n d"]:
        """The vectors with other values where the steps act."""
        return vectors.at[:, self.active].set(flatten(values))


class Places(NamedTuple):
    """Where the vector of a trajectory keeps what.

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
            indices = chain(stage.reshapes).forward(indices)
            places.append(Place(tuple(np.asarray(indices).ravel().tolist()), stage.branch.in_shape, stage.branch.chain))
            if stage.spec.factor_out:
                indices, left = split_channels(indices)
                latents.append(np.asarray(left).ravel())
        latents.append(np.asarray(indices).ravel())
    return Places(tuple(places), np.concatenate(latents))


def over_steps(step: Callable[..., Any], carry: Any, stages: Sequence[Any], *, reverse: bool = False) -> tuple[Any, list[Any]]:
    """`lax.scan` over the steps of all stages: the last carry, and what ``step(carry, own)`` gave, stacked by stage.

    Args:
        step: The function, as `lax.scan` takes it.
        carry: First carry.
        stages: What belongs to the steps of each stage, arrays stacked over steps.
        reverse: Whether the last step comes first.
    """
    found = []
    for own in reversed(stages) if reverse else stages:
        carry, out = lax.scan(step, carry, own, reverse=reverse)
        found.append(out)
    return carry, found[::-1] if reverse else found


def in_float64(tree: Any) -> Any:
    """The arrays of a tree in float64, under ``enable_x64``; converted on the host, which compiles nothing."""
    return jax.tree.map(lambda a: jnp.asarray(np.asarray(a, np.float64)), tree)


@functools.partial(jax.jit, static_argnums=0)
def follow(
    spec: FlowSpec, weights: FlowWeights, x: Float[Array, "b ..."], context: Float[Array, "b k"] | None
) -> Float[Array, "b t d"]:
    """Every point of the trajectory that starts at ``x``, the last one included."""

    def step(vector, own):
        place, block = own
        u, _ = forward_and_logdet(block.actnorm, place.read(vector))
        return place.write(vector, u + block.branch.given(context)(u)), vector

    last, points = over_steps(step, flatten(x), blocks_of(spec, weights))
    return jnp.moveaxis(jnp.concatenate([*points, last[None]]), 0, 1)


@functools.partial(jax.jit, static_argnums=0)
def follow_back(
    spec: FlowSpec, weights: FlowWeights, y: Float[Array, "b d"], context: Float[Array, "b k"] | None
) -> Float[Array, "b t d"]:
    """Every point of the trajectory from the flow's own inverse of the latents ``y``."""
    x, _ = flow_bijection(spec, weights, solver=Solver(atol=1e-13), context=context).inverse(y)
    return follow(spec, weights, x, context)


def blocks_of(spec: FlowSpec, weights: FlowWeights) -> list[tuple[Place, Block]]:
    """The blocks of each stage and their place."""
    return [(place, weights[stage.name]) for place, stage in zip(places_of(spec).stages, spec.layout, strict=True)]
