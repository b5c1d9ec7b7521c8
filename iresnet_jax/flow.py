"""Bijections as values, and how they combine: chains, repeated blocks, multi-scale flows.

A `Bijection` holds pure functions that close over their weights. Information adds up on the way: standard errors in
quadrature, truncation bounds and evaluations by sum, and an inverse's error bound grows by each map's ``Lip(F^-1)`` as the
error of a later map's inverse passes through the earlier ones.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Key

from iresnet_jax import actnorm, reshape, residual
from iresnet_jax.fixed_point import FixedPointInfo, example_norm
from iresnet_jax.logdet import LogdetEstimator, LogdetInfo, Trace

_MOST_ENTRIES = 16  # that one product of `_store` takes together

Forward = Callable[[Array, Array], tuple[Array, Array, LogdetInfo]]
Inverse = Callable[[Array, Array], tuple[Array, Array, LogdetInfo, FixedPointInfo]]


class Bijection(NamedTuple):
    """An invertible map of batches, on weights in its closure.

    Attributes:
        forward: ``x -> y``.
        forward_and_logdet: ``(x, key) -> (y, log|det dy/dx|, LogdetInfo)``; one key, or one an example.
        inverse: ``y -> (x, FixedPointInfo)``.
        inverse_and_logdet: ``(y, key) -> (x, log|det dx/dy|, LogdetInfo, FixedPointInfo)``.
        inverse_lipschitz: Upper bound of ``Lip(F^-1)``, if those of its parts are.
    """

    forward: Callable[[Array], Array]
    forward_and_logdet: Forward
    inverse: Callable[[Array], tuple[Array, FixedPointInfo]]
    inverse_and_logdet: Inverse
    inverse_lipschitz: float | Float[Array, ""]


class Solver(NamedTuple):
    """Settings of each block's inverse, see `fixed_point.invert_residual`.

    Attributes:
        atol: Tolerance of the preimage (Euclidean norm of an example).
        max_evals: Cap on evaluations of the branch.
        memory: Steps that Anderson's method remembers; 0 is plain Banach iteration.
        refine: Whether to go on in float64 from what float32 found, see `residual.inverse`.
    """

    atol: float = 1e-6
    max_evals: int = 2000
    memory: int = 4
    refine: bool = False


def no_logdet_error(batch: Array) -> LogdetInfo:
    """The information of a log-determinant known exactly."""
    zeros = jnp.zeros(batch.shape[0], batch.dtype)
    return LogdetInfo(stderr=zeros, truncation_bound=zeros)


def no_inverse_error(batch: Array) -> FixedPointInfo:
    """The information of an inverse in closed form."""
    zeros = jnp.zeros(batch.shape[0], batch.dtype)
    nothing = jnp.zeros(batch.shape[0], jnp.int32)
    return FixedPointInfo(num_evals=nothing, residual=zeros, error_bound=zeros, converged=nothing == 0)


def add_logdet_info(a: LogdetInfo, b: LogdetInfo) -> LogdetInfo:
    """The information of a sum of two log-determinants with independent probes."""
    return LogdetInfo(jnp.sqrt(a.stderr**2 + b.stderr**2), a.truncation_bound + b.truncation_bound)


def follow_inverse_info(later: FixedPointInfo, own: FixedPointInfo, inverse_lipschitz) -> FixedPointInfo:
    """The information of ``F^-1`` applied to the result of an inverse that ended as `later` says."""
    inherited = jnp.where(later.error_bound > 0, inverse_lipschitz * later.error_bound, 0)  # infinity times no error is none
    return FixedPointInfo(
        num_evals=later.num_evals + own.num_evals,
        residual=jnp.maximum(later.residual, own.residual),
        error_bound=own.error_bound + inherited,
        converged=later.converged & own.converged,
    )


def fold_in(key: Key[Array, "..."], data: int | Array) -> Key[Array, "..."]:
    """``jax.random.fold_in`` for one key or one an example."""
    return jax.random.fold_in(key, data) if key.ndim == 0 else jax.vmap(lambda k: jax.random.fold_in(k, data))(key)


def exact_bijection(
    forward_and_logdet: Callable, inverse_and_logdet: Callable, inverse_lipschitz: float | Array = 1.0
) -> Bijection:
    """A bijection in closed form from ``x -> (y, logdet)`` and ``y -> (x, logdet)``."""

    def forward_with_info(x, key):
        del key
        return (*forward_and_logdet(x), no_logdet_error(x))

    def inverse_with_info(y, key):
        del key
        return (*inverse_and_logdet(y), no_logdet_error(y), no_inverse_error(y))

    return Bijection(
        forward=lambda x: forward_and_logdet(x)[0],
        forward_and_logdet=forward_with_info,
        inverse=lambda y: (inverse_and_logdet(y)[0], no_inverse_error(y)),
        inverse_and_logdet=inverse_with_info,
        inverse_lipschitz=inverse_lipschitz,
    )


def permutation_bijection(forward: Callable[[Array], Array], inverse: Callable[[Array], Array]) -> Bijection:
    """A bijection that moves entries around: volume preserving, an isometry."""

    def with_zero(function):
        return lambda x: (function(x), jnp.zeros(x.shape[0], x.dtype))

    return exact_bijection(with_zero(forward), with_zero(inverse))


def squeeze_bijection(factor: int) -> Bijection:
    """Space to depth, see `reshape.squeeze`."""
    return permutation_bijection(lambda x: reshape.squeeze(x, factor), lambda y: reshape.unsqueeze(y, factor))


def flatten_bijection(event_shape: tuple[int, ...]) -> Bijection:
    """Images of one shape as vectors."""
    return permutation_bijection(reshape.flatten, lambda z: reshape.unflatten(z, event_shape))


def actnorm_bijection(params: actnorm.ActNormParams) -> Bijection:
    """``y = (x + bias) exp(log_scale)`` by channel, see `actnorm`."""
    bijection = exact_bijection(
        lambda x: actnorm.forward_and_logdet(params, x),
        lambda y: actnorm.inverse_and_logdet(params, y),
        inverse_lipschitz=jnp.exp(-jnp.min(params.log_scale)),
    )

    def rounding(x):  # of y exp(-log_scale), whose size is that of x + bias, and of the difference
        eps = jnp.finfo(x.dtype).eps
        shifted = x + params.bias.reshape((1,) * (x.ndim - 1) + (-1,))
        return no_inverse_error(x)._replace(error_bound=eps * (4 * example_norm(shifted) + example_norm(x)))

    def inverse(y):
        x, _ = bijection.inverse(y)
        return x, rounding(x)

    def inverse_and_logdet(y, key):
        x, logdet, info, _ = bijection.inverse_and_logdet(y, key)
        return x, logdet, info, rounding(x)

    return bijection._replace(inverse=inverse, inverse_and_logdet=inverse_and_logdet)


def residual_bijection(
    branch: residual.Branch,
    lipschitz_bound: float | Float[Array, ""],
    estimator: LogdetEstimator,
    solver: Solver = Solver(),  # noqa: B008 (immutable)
    trace: Trace | None = None,
    at_zero: residual.AtZero | None = None,
) -> Bijection:
    """``y = x + g(x)``, see `residual`.

    Args:
        branch: ``g``.
        lipschitz_bound: Upper bound of ``Lip(g)``.
        estimator: Of the log-determinant.
        solver: Of the inverse.
        trace: ``tr J_g``, if it has a closed form.
        at_zero: Gives ``g(0)``, if it is the same for all examples.
    """
    margin = jnp.maximum(1 - jnp.asarray(lipschitz_bound), 0)
    solve = {"lipschitz_bound": lipschitz_bound, **solver._asdict(), "at_zero": at_zero}
    return Bijection(
        forward=lambda x: residual.forward(branch, x),
        forward_and_logdet=lambda x, key: residual.forward_and_logdet(
            branch, x, key, estimator, lipschitz_bound=lipschitz_bound, trace=trace
        ),
        inverse=lambda y: residual.inverse(branch, y, **solve),
        inverse_and_logdet=lambda y, key: residual.inverse_and_logdet(branch, y, key, estimator, trace=trace, **solve),
        inverse_lipschitz=1 / margin,
    )


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
