"""How bijections combine: chains, repeated blocks, multi-scale flows."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from iresnet_jax.bijections.bijection import Bijection, fold_in, from_walks
from iresnet_jax.bijections.reshape import flatten, merge_channels, split_channels, unflatten

_MOST_ENTRIES = 16  # entries that one product of `_store` takes together


def _part(key: Array | None, index: int | Array) -> Array | None:
    """The key of one part of a bijection; none without a key."""
    return None if key is None else fold_in(key, index)


def chain(bijections: Sequence[Bijection]) -> Bijection:
    """``F = F_n ... F_2 F_1``, first to last."""
    bijections = tuple(bijections)

    def onward(way, key):
        for i, bijection in enumerate(bijections):
            way = way.through(bijection, _part(key, i))
        return way

    def back(way, key):
        for i, bijection in reversed(list(enumerate(bijections))):
            way = way.through(bijection, _part(key, i))
        return way

    lipschitz = jnp.asarray(1.0)
    for bijection in bijections:
        lipschitz = lipschitz * bijection.inverse_lipschitz
    return from_walks(onward, back, lipschitz)


def repeat(make: Callable[[Any], Bijection], weights: Any, *, unroll: bool = False, rematerialize: bool = False) -> Bijection:
    """The chain of ``make(weights[0]), make(weights[1]), ...``, all of one shape, with weights stacked on a leading axis.

    Scanned, program size and compile time do not depend on the number of blocks. Scanned or unrolled, the result is the same.

    Args:
        make: Builds one bijection from one slice of the weights.
        weights: Tree of arrays with a common leading axis.
        unroll: Write the blocks out one after the other.
        rematerialize: Recompute a block's inside when it is differentiated, so that memory holds one activation a block.
    """
    build = (lambda w: _rematerialized(make, w)) if rematerialize else make
    num_blocks = jax.tree.leaves(weights)[0].shape[0]
    if unroll:
        return chain([_stored(build(jax.tree.map(lambda w, k=k: w[k], weights))) for k in range(num_blocks)])

    def over_blocks(way, key, *, reverse):
        def step(way, block):
            k, w = block
            return way.through(build(w), _part(key, k)), None

        return lax.scan(step, way, (jnp.arange(num_blocks), weights), reverse=reverse)[0]

    return from_walks(
        onward=lambda way, key: over_blocks(way, key, reverse=False),
        back=lambda way, key: over_blocks(way, key, reverse=True),
        inverse_lipschitz=jnp.prod(jax.vmap(lambda w: jnp.asarray(make(w).inverse_lipschitz))(weights)),
    )


def _stored(bijection: Bijection) -> Bijection:
    """The same bijection with outputs that are computed once, see `_store`."""

    def forward_and_logdet(x, key):
        y, logdet, info = bijection.forward_and_logdet(x, key)
        return _store(y), logdet, info

    return bijection._replace(forward=lambda x: _store(bijection.forward(x)), forward_and_logdet=forward_and_logdet)


def _store(x: Float[Array, "b ..."]) -> Float[Array, "b ..."]:
    """``x``, put into memory before it is used, on CPU.

    Blocks written out are one program, in which XLA:CPU fuses the sum ``x + g_1 + g_2 + ...`` into everything that reads it,
    and so adds it up anew for each block behind: work that grows with the square of depth (``benchmarks/depth.py``).
    ``lax.optimization_barrier`` does not stop it; a matrix product does, and by the identity it is exact.
    """
    if jax.default_backend() != "cpu":
        return x
    k = max(n for n in range(1, _MOST_ENTRIES + 1) if math.prod(x.shape[1:]) % n == 0)  # examples stay apart
    return jnp.matmul(x.reshape(-1, k), jnp.eye(k, dtype=x.dtype), precision="highest").reshape(x.shape)


def _rematerialized(make: Callable[[Any], Bijection], weights: Any) -> Bijection:
    """``make(weights)`` with forward passes that are recomputed in the backward pass, weights being explicit inputs."""
    return make(weights)._replace(
        forward=lambda x: jax.checkpoint(lambda w, x: make(w).forward(x))(weights, x),
        forward_and_logdet=lambda x, key: jax.checkpoint(lambda w, x: make(w).forward_and_logdet(x, key))(weights, x),
    )


def in_float64(bijection: Bijection) -> Bijection:
    """The same bijection with inverses from float64 on, for a chain of which one part refines there (`Solver.refine`)."""
    return bijection._replace(
        inverse=lambda y: bijection.inverse(y.astype(jnp.float64)),
        inverse_and_logdet=lambda y, key: bijection.inverse_and_logdet(y.astype(jnp.float64), key),
    )


class Stage(NamedTuple):
    """One scale of a multi-scale flow: a bijection, and whether half of its output channels leave as latents."""

    bijection: Bijection
    factor_out: bool = False


def multiscale(stages: Sequence[Stage], event_shape: tuple[int, ...], *, batch_size: int = 1) -> Bijection:
    """The flow from examples of ``event_shape`` to latent vectors ``(b, d)`` (Dinh et al. 2017, sec. 3.6).

    After a stage with ``factor_out`` the second half of the channels joins the latent vector and the first half goes on. The
    latent vector holds the factored-out parts first, in order, and what remains last.

    Args:
        stages: Scales from the data to the last one.
        event_shape: Shape of one example.
        batch_size: Size of the batches the stages take, where they are tied to one, as by a context.
    """
    stages, event_shape = tuple(stages), tuple(event_shape)
    shapes = _latent_shapes(stages, (batch_size, *event_shape))
    ends = [sum(math.prod(shape) for shape in shapes[: i + 1]) for i in range(len(shapes))]

    def onward(way, key):
        if way.y.shape[1:] != event_shape:
            raise ValueError(f"the flow takes examples of shape {event_shape}, got an array of shape {way.y.shape}")
        latents = []
        for i, stage in enumerate(stages):
            way = way.through(stage.bijection, _part(key, i))
            if stage.factor_out:
                kept, latent = split_channels(way.y)
                latents.append(flatten(latent))
                way = way._replace(y=kept)
        return way._replace(y=jnp.concatenate([*latents, flatten(way.y)], axis=-1))

    def back(way, key):
        if way.x.shape[1:] != (ends[-1],):
            raise ValueError(f"the flow's inverse takes latents of shape ({ends[-1]},), got an array of shape {way.x.shape}")
        parts = jnp.split(way.x, ends[:-1], axis=1)
        *latents, x = [unflatten(part, shape) for part, shape in zip(parts, shapes, strict=True)]
        way = way._replace(x=x)
        for i, stage in reversed(list(enumerate(stages))):
            if stage.factor_out:
                way = way._replace(x=merge_channels(way.x, latents.pop()))
            way = way.through(stage.bijection, _part(key, i))
        return way

    lipschitz = jnp.asarray(1.0)
    for stage in reversed(stages):  # latents that left at this stage skip the inverses of the later ones
        lipschitz = stage.bijection.inverse_lipschitz * (jnp.maximum(lipschitz, 1) if stage.factor_out else lipschitz)
    return from_walks(onward, back, lipschitz)


def _latent_shapes(stages: tuple[Stage, ...], shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Shapes of the factored-out parts and, last, of what remains, each of one example; ``shape`` is that of a batch."""
    shapes = []
    for i, stage in enumerate(stages):
        shape = jax.eval_shape(stage.bijection.forward, jax.ShapeDtypeStruct(shape, jnp.result_type(float))).shape
        if stage.factor_out:
            if shape[-1] % 2:
                raise ValueError(f"stage {i} factors out half of its channels but has {shape[-1]}: squeeze before it")
            shape = (*shape[:-1], shape[-1] // 2)
            shapes.append(shape[1:])
    return [*shapes, shape[1:]]
