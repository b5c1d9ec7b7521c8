"""How bijections combine: chains, repeated blocks, multi-scale flows."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from iresnet_jax.bijections import reshape
from iresnet_jax.bijections.bijection import (
    Bijection,
    add_logdet_info,
    fold_in,
    follow_inverse_info,
    no_inverse_error,
    no_logdet_error,
)

_MOST_ENTRIES = 16  # that one product of `_store` takes together


def chain(bijections: Sequence[Bijection]) -> Bijection:
    """``F = F_n ... F_2 F_1``, first to last."""
    bijections = tuple(bijections)

    def forward(x):
        for bijection in bijections:
            x = bijection.forward(x)
        return x

    def forward_and_logdet(x, key):
        total, info = jnp.zeros(x.shape[0], x.dtype), no_logdet_error(x)
        for i, bijection in enumerate(bijections):
            x, logdet, own = bijection.forward_and_logdet(x, fold_in(key, i))
            total, info = total + logdet, add_logdet_info(info, own)
        return x, total, info

    def inverse(y):
        info = no_inverse_error(y)
        for bijection in reversed(bijections):
            y, own = bijection.inverse(y)
            info = follow_inverse_info(info, own, bijection.inverse_lipschitz)
        return y, info

    def inverse_and_logdet(y, key):
        total, logdet_info, info = jnp.zeros(y.shape[0], y.dtype), no_logdet_error(y), no_inverse_error(y)
        for i, bijection in reversed(list(enumerate(bijections))):
            y, logdet, own_logdet, own = bijection.inverse_and_logdet(y, fold_in(key, i))
            total, logdet_info = total + logdet, add_logdet_info(logdet_info, own_logdet)
            info = follow_inverse_info(info, own, bijection.inverse_lipschitz)
        return y, total, logdet_info, info

    lipschitz = jnp.asarray(1.0)
    for bijection in bijections:
        lipschitz = lipschitz * bijection.inverse_lipschitz
    return Bijection(forward, forward_and_logdet, inverse, inverse_and_logdet, lipschitz)


def repeat(make: Callable[[Any], Bijection], weights: Any, *, unroll: bool = False, rematerialize: bool = False) -> Bijection:
    """The chain of ``make(weights[0]), make(weights[1]), ...``, all of one shape, with weights stacked on a leading axis.

    Scanned, program size and compile time do not depend on the number of blocks. Scanned or unrolled, the result is the same.

    Args:
        make: Builds one bijection from one slice of the weights.
        weights: Tree of arrays with a common leading axis.
        unroll: Write the blocks out one after the other.
        rematerialize: Recompute a block's inside when it is differentiated, so that memory holds one activation a block.
    """
    num_blocks = jax.tree.leaves(weights)[0].shape[0]

    def at(k):
        return jax.tree.map(lambda w: w[k], weights)

    if unroll:
        build = (lambda w: _rematerialized(make, w)) if rematerialize else make
        return chain([_stored(build(at(k))) for k in range(num_blocks)])
    build = (lambda w: _rematerialized(make, w)) if rematerialize else make
    order = jnp.arange(num_blocks)

    def forward(x):
        return lax.scan(lambda x, w: (build(w).forward(x), None), x, weights)[0]

    def forward_and_logdet(x, key):
        def step(carry, block):
            x, total, info = carry
            k, w = block
            x, logdet, own = build(w).forward_and_logdet(x, fold_in(key, k))
            return (x, total + logdet, add_logdet_info(info, own)), None

        carry = (x, jnp.zeros(x.shape[0], x.dtype), no_logdet_error(x))
        return lax.scan(step, carry, (order, weights))[0]

    def inverse(y):
        def step(carry, w):
            y, info = carry
            bijection = build(w)
            y, own = bijection.inverse(y)
            return (y, follow_inverse_info(info, own, bijection.inverse_lipschitz)), None

        return lax.scan(step, (y, no_inverse_error(y)), weights, reverse=True)[0]

    def inverse_and_logdet(y, key):
        def step(carry, block):
            y, total, logdet_info, info = carry
            k, w = block
            bijection = build(w)
            y, logdet, own_logdet, own = bijection.inverse_and_logdet(y, fold_in(key, k))
            info = follow_inverse_info(info, own, bijection.inverse_lipschitz)
            return (y, total + logdet, add_logdet_info(logdet_info, own_logdet), info), None

        carry = (y, jnp.zeros(y.shape[0], y.dtype), no_logdet_error(y), no_inverse_error(y))
        return lax.scan(step, carry, (order, weights), reverse=True)[0]

    lipschitz = jnp.prod(jax.vmap(lambda w: jnp.asarray(make(w).inverse_lipschitz))(weights))
    return Bijection(forward, forward_and_logdet, inverse, inverse_and_logdet, lipschitz)


def _stored(bijection: Bijection) -> Bijection:
    """The same with outputs that are computed once, see `_store`."""

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
    """The same with inverses from float64 on, for a chain of which one refines there (`Solver.refine`)."""
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
        stages: From the data to the last scale.
        event_shape: Shape of one example.
        batch_size: Of the batches the stages take, where they are tied to one, as by a context.
    """
    stages = tuple(stages)
    shapes = _latent_shapes(stages, (batch_size, *event_shape))

    def split(x):
        c = x.shape[-1] // 2
        return x[..., :c], reshape.flatten(x[..., c:])

    num_latents = sum(math.prod(shape) for shape in shapes)

    def check_examples(x):
        if x.shape[1:] != tuple(event_shape):
            raise ValueError(f"the flow takes examples of shape {tuple(event_shape)}, got an array of shape {x.shape}")

    def check_latents(z):
        if z.shape[1:] != (num_latents,):
            raise ValueError(f"the flow's inverse takes latents of shape ({num_latents},), got an array of shape {z.shape}")

    def forward(x):
        check_examples(x)
        latents = []
        for stage in stages:
            x = stage.bijection.forward(x)
            if stage.factor_out:
                x, latent = split(x)
                latents.append(latent)
        return jnp.concatenate([*latents, reshape.flatten(x)], axis=-1)

    def forward_and_logdet(x, key):
        check_examples(x)
        latents, total, info = [], jnp.zeros(x.shape[0], x.dtype), no_logdet_error(x)
        for i, stage in enumerate(stages):
            x, logdet, own = stage.bijection.forward_and_logdet(x, fold_in(key, i))
            total, info = total + logdet, add_logdet_info(info, own)
            if stage.factor_out:
                x, latent = split(x)
                latents.append(latent)
        return jnp.concatenate([*latents, reshape.flatten(x)], axis=-1), total, info

    def latents_of(z):
        check_latents(z)
        sizes = [math.prod(shape) for shape in shapes]
        ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
        return [reshape.unflatten(z[:, end - size : end], shape) for end, size, shape in zip(ends, sizes, shapes, strict=True)]

    def inverse(z):
        *latents, x = latents_of(z)
        info = no_inverse_error(z)
        for stage in reversed(stages):
            if stage.factor_out:
                x = jnp.concatenate([x, latents.pop()], axis=-1)
            x, own = stage.bijection.inverse(x)
            info = follow_inverse_info(info, own, stage.bijection.inverse_lipschitz)
        return x, info

    def inverse_and_logdet(z, key):
        *latents, x = latents_of(z)
        total, logdet_info, info = jnp.zeros(z.shape[0], z.dtype), no_logdet_error(z), no_inverse_error(z)
        for i, stage in reversed(list(enumerate(stages))):
            if stage.factor_out:
                x = jnp.concatenate([x, latents.pop()], axis=-1)
            x, logdet, own_logdet, own = stage.bijection.inverse_and_logdet(x, fold_in(key, i))
            total, logdet_info = total + logdet, add_logdet_info(logdet_info, own_logdet)
            info = follow_inverse_info(info, own, stage.bijection.inverse_lipschitz)
        return x, total, logdet_info, info

    lipschitz = jnp.asarray(1.0)
    for stage in reversed(stages):  # latents that left at this stage skip the inverses of the later ones
        lipschitz = stage.bijection.inverse_lipschitz * (jnp.maximum(lipschitz, 1) if stage.factor_out else lipschitz)
    return Bijection(forward, forward_and_logdet, inverse, inverse_and_logdet, lipschitz)


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
