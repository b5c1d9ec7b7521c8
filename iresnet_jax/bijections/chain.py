"""Bijections one after the other: chains, blocks of one shape that are repeated, and multi-scale
flows.

In a multi-scale flow half of the channels may leave as latents after each stage.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from iresnet_jax.bijections.bijection import Bijection, Walk, keys_of_links
from iresnet_jax.bijections.reshape import flatten, split_channels, unflatten
from iresnet_jax.maths import platforms
from iresnet_jax.maths.lipschitz_bounds import product_bound
from iresnet_jax.maths.logdet_exact import INVERSE_JACOBIANS

Rematerialize = Literal["nothing", "elementwise", "blocks"]
_POLICIES = {
    "elementwise": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_saveable,
        jax.checkpoint_policies.save_only_these_names(INVERSE_JACOBIANS),
    ),
    "blocks": jax.checkpoint_policies.nothing_saveable,
}


class Chain(Walk):
    """``F = F_n ... F_2 F_1``, first to last."""

    def __init__(self, bijections: Iterable[Bijection]):
        self.bijections = tuple(bijections)
        bounds = (bijection.inverse_lipschitz for bijection in self.bijections)
        self.inverse_lipschitz = functools.reduce(product_bound, bounds, jnp.asarray(1.0))

    def onward(self, way, key):
        """Through one bijection after the other."""
        keys = keys_of_links(key, len(self.bijections))
        for bijection, own in zip(self.bijections, keys, strict=True):
            way = way.through(bijection, own)
        return way

    def back(self, way, key):
        """Through the last inverse first."""
        keys = keys_of_links(key, len(self.bijections))
        for bijection, own in reversed(list(zip(self.bijections, keys, strict=True))):
            way = way.through(bijection, own)
        return way


class Repeat(Walk):
    """The chain of ``make(weights[0]), make(weights[1]), ...``, all of one shape, with weights
    stacked on a leading axis.

    Scanned, program size and compile time do not depend on the number of blocks. Scanned or
    unrolled, the result is the same.

    Args:
        make: Builds one bijection from one slice of the weights.
        weights: Tree of arrays with a common leading axis.
        unroll: Whether blocks are unrolled instead of scanned.
        rematerialize: What the backward pass recomputes: "nothing"; "elementwise": all but products
            of matrices, inverse Jacobians and, except on CPUs, convolutions; or "blocks": memory
            then holds one activation per block.
    """

    def __init__(
        self,
        make: Callable[[Any], Bijection],
        weights: Any,
        *,
        unroll: bool = False,
        rematerialize: Rematerialize = "nothing",
    ):
        self.make, self.weights, self.unroll = make, weights, unroll
        self.policy = _POLICIES.get(rematerialize)
        bounds = jax.vmap(lambda w: jnp.asarray(make(w).inverse_lipschitz))(weights)
        self.inverse_lipschitz, _ = lax.scan(_times, jnp.ones((), bounds.dtype), bounds)

    def onward(self, way, key):
        """Through the blocks, whose backward pass recomputes what `rematerialize` says."""
        through = self._through
        if self.policy is not None:
            through = jax.checkpoint(through, policy=self.policy)

        def step(way, block):
            way = through(way, *block)
            return way._replace(y=platforms.stored(way.y)) if self.unroll else way

        return platforms.scan_or_unroll(step, way, self._blocks(key), unroll=self.unroll)

    def back(self, way, key):
        """Through the last inverse first."""

        def step(way, block):
            return self._through(way, *block)

        blocks = self._blocks(key)
        return platforms.scan_or_unroll(step, way, blocks, unroll=self.unroll, reverse=True)

    def _through(self, way, weights, key):
        return way.through(self.make(weights), key)

    def _blocks(self, key):
        num = len(jax.tree.leaves(self.weights)[0])
        return self.weights, None if key is None else keys_of_links(key, num)


def _times(total, own):
    """A step of the product of bounds; a function made at every call would be compiled at every
    call outside of ``jit``.
    """
    return product_bound(total, own), None


class Promoted(Bijection):
    """The same bijection at least in the precision of its weights and, for inverses, in the
    precision in which a part refines.
    """

    def __init__(self, bijection: Bijection, dtype: Any, inverse_dtype: Any):
        self.bijection, self.dtype, self.inverse_dtype = bijection, dtype, inverse_dtype
        self.inverse_lipschitz = bijection.inverse_lipschitz

    def forward(self, x):
        """The map in the precision of the weights."""
        return self.bijection.forward(_at_least(x, self.dtype))

    def forward_and_logdet(self, x, key):
        """The map in the precision of the weights."""
        return self.bijection.forward_and_logdet(_at_least(x, self.dtype), key)

    def inverse(self, y):
        """The inverse in the precision of inverses."""
        return self.bijection.inverse(_at_least(y, self.inverse_dtype))

    def inverse_and_logdet(self, y, key):
        """The inverse in the precision of inverses."""
        return self.bijection.inverse_and_logdet(_at_least(y, self.inverse_dtype), key)


def _at_least(x, dtype):
    return x.astype(jnp.promote_types(x.dtype, dtype))


class Stage(NamedTuple):
    """One scale of a multi-scale flow: a bijection, and whether half of its output channels
    leave as latents.
    """

    bijection: Bijection
    factor_out: bool = False


class Multiscale(Walk):
    """The flow from examples of ``event_shape`` to latent vectors ``(b, d)`` (Dinh et al. 2017,
    sec. 3.6).

    After a stage with ``factor_out`` the second half of the channels joins the latent vector and
    the first half goes on. The latent vector holds the factored-out parts first, in order, and what
    remains last. Without stages it is `flatten`.

    Args:
        stages: Scales from the data to the last one.
        event_shape: Shape of one example.
        batch_size: Size of the batches that the stages take, if they are bound to one, for example
            by a context.
    """

    def __init__(self, stages: Iterable[Stage], event_shape: Sequence[int], *, batch_size: int = 1):
        self.stages, self.event_shape = tuple(stages), tuple(event_shape)
        self.shapes = _latent_shapes(self.stages, (batch_size, *self.event_shape))
        lipschitz = jnp.asarray(1.0)
        # Latents that left at this stage skip the inverses of later stages.
        for stage in reversed(self.stages):
            later = jnp.maximum(lipschitz, 1) if stage.factor_out else lipschitz
            lipschitz = product_bound(stage.bijection.inverse_lipschitz, later)
        self.inverse_lipschitz = lipschitz

    def onward(self, way, key):
        """Through the stages; latents that leave are kept."""
        if way.y.shape[1:] != self.event_shape:
            raise ValueError(
                f"the flow takes examples of shape {self.event_shape}, got an array of "
                f"shape {way.y.shape}"
            )
        latents = []
        for stage, own in zip(self.stages, keys_of_links(key, len(self.stages)), strict=True):
            way = way.through(stage.bijection, own)
            if stage.factor_out:
                kept, latent = split_channels(way.y)
                latents.append(flatten(latent))
                way = way._replace(y=kept)
        return way._replace(y=jnp.concatenate([*latents, flatten(way.y)], axis=-1))

    def back(self, way, key):
        """Through the inverses, the last one first; latents come back where they left."""
        *ends, num_dims = itertools.accumulate(map(math.prod, self.shapes))
        if way.x.shape[1:] != (num_dims,):
            raise ValueError(
                f"the flow's inverse takes latents of shape ({num_dims},), got an "
                f"array of shape {way.x.shape}"
            )
        parts = jnp.split(way.x, ends, axis=1)
        *latents, x = map(unflatten, parts, self.shapes)
        way, keys = way._replace(x=x), keys_of_links(key, len(self.stages))
        for stage, own in reversed(list(zip(self.stages, keys, strict=True))):
            if stage.factor_out:
                way = way._replace(x=jnp.concatenate([way.x, latents.pop()], axis=-1))
            way = way.through(stage.bijection, own)
        return way


def _latent_shapes(stages: tuple[Stage, ...], shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Shapes of the factored-out parts and, last, of what remains, each of one example; ``shape``
    is a batch's shape.
    """
    shapes = []
    for stage in stages:
        shape = jax.eval_shape(
            stage.bijection.forward, jax.ShapeDtypeStruct(shape, jnp.result_type(float))
        ).shape
        if stage.factor_out:
            shape = (*shape[:-1], shape[-1] // 2)
            shapes.append(shape[1:])
    return [*shapes, shape[1:]]
