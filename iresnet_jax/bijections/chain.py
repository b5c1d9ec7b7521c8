"""Bijections one after the other: chains, blocks of one shape that are repeated, and multi-scale
flows.

In a multi-scale flow half of the channels may leave as latents after each stage.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Num

from iresnet_jax.bijections.bijection import Bijection, from_walks, keys_of_links
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

# JAX before 0.12 moves what does not change out of the body of a scan that is differentiated, and
# forgets the rules of `jax.custom_jvp` and `lax.custom_root` in the rest: second derivatives of
# inverses would be 0. Conditions stay as they are.
_FORGETS_DERIVATIVES = jax.__version_info__ < (0, 12)

_MOST_ENTRIES = 16  # entries that one product of `_store` takes together


def chain(bijections: Sequence[Bijection]) -> Bijection:
    """``F = F_n ... F_2 F_1``, first to last."""
    bijections = tuple(bijections)

    def links(key):
        return list(zip(bijections, keys_of_links(key, len(bijections)), strict=True))

    def onward(way, key):
        for bijection, own in links(key):
            way = way.through(bijection, own)
        return way

    def back(way, key):
        for bijection, own in reversed(links(key)):
            way = way.through(bijection, own)
        return way

    lipschitz = functools.reduce(
        product_bound, (bijection.inverse_lipschitz for bijection in bijections), jnp.asarray(1.0)
    )
    return from_walks(onward, back, lipschitz)


def repeat(
    make: Callable[[Any], Bijection],
    weights: Any,
    *,
    unroll: bool = False,
    rematerialize: Rematerialize = "nothing",
) -> Bijection:
    """The chain of ``make(weights[0]), make(weights[1]), ...``, all of one shape, with weights
    stacked on a leading axis.

    Scanned, program size and compile time do not depend on the number of blocks. Scanned or
    unrolled, the result is the same.

    Args:
        make: Builds one bijection from one slice of the weights.
        weights: Tree of arrays with a common leading axis.
        unroll: Whether blocks are unrolled instead of scanned.
        rematerialize: What the backward pass recomputes: "nothing"; "elementwise", all but products
            of matrices, inverse Jacobians and, but for CPUs, convolutions; or "blocks", so that
            memory holds one activation a block.
    """
    build = (
        make
        if rematerialize == "nothing"
        else lambda w: _rematerialized(make, w, _POLICIES[rematerialize])
    )
    num_blocks = jax.tree.leaves(weights)[0].shape[0]
    if unroll:
        return chain(
            [_stored(build(jax.tree.map(lambda w, k=k: w[k], weights))) for k in range(num_blocks)]
        )

    def over_blocks(way, key, *, reverse):
        def step(way, block):
            w, own = block
            return way.through(build(w), own), None

        def step_in_condition(way, numbered):
            k, block = numbered
            return lax.cond(k >= 0, lambda way: step(way, block)[0], lambda way: way, way), None

        blocks = weights, None if key is None else keys_of_links(key, num_blocks)
        if reverse and _FORGETS_DERIVATIVES:
            return lax.scan(step_in_condition, way, (jnp.arange(num_blocks), blocks), reverse=True)[
                0
            ]
        return lax.scan(step, way, blocks, reverse=reverse)[0]

    of_blocks = jax.vmap(lambda w: jnp.asarray(make(w).inverse_lipschitz))(weights)
    lipschitz, _ = lax.scan(_times, jnp.ones((), of_blocks.dtype), of_blocks)
    return from_walks(
        onward=lambda way, key: over_blocks(way, key, reverse=False),
        back=lambda way, key: over_blocks(way, key, reverse=True),
        inverse_lipschitz=lipschitz,
    )


def _times(total, own):
    """A step of the product of bounds; a function made anew at every call would be compiled anew
    outside of ``jit``.
    """
    return product_bound(total, own), None


def _stored(bijection: Bijection) -> Bijection:
    """The same bijection with outputs that are computed once, see `_store`."""

    def forward_and_logdet(x, key):
        y, logdet, info = bijection.forward_and_logdet(x, key)
        return _store(y), logdet, info

    return bijection._replace(
        forward=lambda x: _store(bijection.forward(x)), forward_and_logdet=forward_and_logdet
    )


def _store(x: Float[Array, "b ..."]) -> Float[Array, "b ..."]:
    """``x``, put into memory before it is used, on CPU.

    Unrolled blocks are one program, in which XLA:CPU fuses the sum ``x + g_1 + g_2 + ...`` into
    everything that reads it. Each later block adds it up again: work that grows with the square of
    depth. ``lax.optimization_barrier`` does not stop it; a matrix product does, and by the identity
    it is exact.
    """
    if platforms.platform() != "cpu":
        return x
    # examples stay apart
    k = max(n for n in range(1, _MOST_ENTRIES + 1) if math.prod(x.shape[1:]) % n == 0)
    return jnp.matmul(x.reshape(-1, k), jnp.eye(k, dtype=x.dtype), precision="highest").reshape(
        x.shape
    )


def _rematerialized(
    make: Callable[[Any], Bijection], weights: Any, policy: Callable[..., bool]
) -> Bijection:
    """``make(weights)`` whose backward pass keeps what the policy says of a forward pass;
    weights are explicit inputs.
    """
    keep = functools.partial(jax.checkpoint, policy=policy)
    return make(weights)._replace(
        forward=lambda x: keep(lambda w, x: make(w).forward(x))(weights, x),
        forward_and_logdet=lambda x, key: keep(lambda w, x: make(w).forward_and_logdet(x, key))(
            weights, x
        ),
    )


def in_precision(bijection: Bijection, dtype: Any, inverse_dtype: Any) -> Bijection:
    """The same bijection in these precisions at least: that of its weights, and for inverses the
    one that a part refines in.
    """

    def wide(x: Num[Array, "b ..."], dtype: Any) -> Float[Array, "b ..."]:
        return x.astype(jnp.promote_types(x.dtype, dtype))

    return bijection._replace(
        forward=lambda x: bijection.forward(wide(x, dtype)),
        forward_and_logdet=lambda x, key: bijection.forward_and_logdet(wide(x, dtype), key),
        inverse=lambda y: bijection.inverse(wide(y, inverse_dtype)),
        inverse_and_logdet=lambda y, key: bijection.inverse_and_logdet(wide(y, inverse_dtype), key),
    )


class Stage(NamedTuple):
    """One scale of a multi-scale flow: a bijection, and whether half of its output channels
    leave as latents.
    """

    bijection: Bijection
    factor_out: bool = False


def multiscale(
    stages: Sequence[Stage], event_shape: tuple[int, ...], *, batch_size: int = 1
) -> Bijection:
    """The flow from examples of ``event_shape`` to latent vectors ``(b, d)`` (Dinh et al. 2017,
    sec. 3.6).

    After a stage with ``factor_out`` the second half of the channels joins the latent vector and
    the first half goes on. The latent vector holds the factored-out parts first, in order, and what
    remains last.

    Args:
        stages: Scales from the data to the last one.
        event_shape: Shape of one example.
        batch_size: Size of the batches the stages take, where they are tied to one, as by a
            context.
    """
    stages, event_shape = tuple(stages), tuple(event_shape)
    shapes = _latent_shapes(stages, (batch_size, *event_shape))
    ends = [sum(math.prod(shape) for shape in shapes[: i + 1]) for i in range(len(shapes))]

    def onward(way, key):
        if way.y.shape[1:] != event_shape:
            raise ValueError(
                f"the flow takes examples of shape {event_shape}, got an array of "
                f"shape {way.y.shape}"
            )
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
            raise ValueError(
                f"the flow's inverse takes latents of shape ({ends[-1]},), got an "
                f"array of shape {way.x.shape}"
            )
        parts = jnp.split(way.x, ends[:-1], axis=1)
        *latents, x = [unflatten(part, shape) for part, shape in zip(parts, shapes, strict=True)]
        way = way._replace(x=x)
        for stage, own in reversed(list(zip(stages, keys_of_links(key, len(stages)), strict=True))):
            if stage.factor_out:
                way = way._replace(x=jnp.concatenate([way.x, latents.pop()], axis=-1))
            way = way.through(stage.bijection, own)
        return way

    lipschitz = jnp.asarray(1.0)
    # latents that left at this stage skip the inverses of the later ones
    for stage in reversed(stages):
        later = jnp.maximum(lipschitz, 1) if stage.factor_out else lipschitz
        lipschitz = product_bound(stage.bijection.inverse_lipschitz, later)
    return from_walks(onward, back, lipschitz)


def _latent_shapes(stages: tuple[Stage, ...], shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Shapes of the factored-out parts and, last, of what remains, each of one example;
    ``shape`` is that of a batch.
    """
    shapes = []
    for stage in stages:
        shape = jax.eval_shape(
            stage.bijection.forward, jax.ShapeDtypeStruct(shape, jnp.result_type(float))
        ).shape
        if stage.factor_out:
            if shape[-1] % 2:
                raise ValueError(
                    f"a stage that factors out half of its channels has {shape[-1]}: "
                    "squeeze before it"
                )
            shape = (*shape[:-1], shape[-1] // 2)
            shapes.append(shape[1:])
    return [*shapes, shape[1:]]
