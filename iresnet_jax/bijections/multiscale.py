"""Multi-scale flows: after a stage half of the channels may leave as latents."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from iresnet_jax.bijections.bijection import Bijection, from_walks, keys_of_links
from iresnet_jax.bijections.reshape import flatten, split_channels, unflatten
from iresnet_jax.maths.lipschitz_bounds import product_bound


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
        for stage, own in zip(stages, keys_of_links(key, len(stages)), strict=True):
            way = way.through(stage.bijection, own)
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
        for stage, own in reversed(list(zip(stages, keys_of_links(key, len(stages)), strict=True))):
            if stage.factor_out:
                way = way._replace(x=jnp.concatenate([way.x, latents.pop()], axis=-1))
            way = way.through(stage.bijection, own)
        return way

    lipschitz = jnp.asarray(1.0)
    for stage in reversed(stages):  # latents that left at this stage skip the inverses of the later ones
        later = jnp.maximum(lipschitz, 1) if stage.factor_out else lipschitz
        lipschitz = product_bound(stage.bijection.inverse_lipschitz, later)
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
