r"""ActNorm: an affine map of each channel, initialised from data (Kingma and Dhariwal 2018, sec.
3.1).

After initialisation the parameters are trained like any other; nothing depends on the batch. The
channels are on the last axis and every axis between it and the first counts positions.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from iresnet_jax.bijections.bijection import Bijection, exact_bijection, no_inverse_error
from iresnet_jax.maths.fixed_point import example_norm
from iresnet_jax.maths.upward_rounding import rounded_up

EPS = 1e-5  # added to variances, which caps scales at 316


class ActNormParams(NamedTuple):
    """Parameters of ``y = (x + bias) exp(log_scale)``.

    Attributes:
        bias: Shift in the units of the input, one per channel; added first.
        log_scale: Natural log of the scale, one per channel.
    """

    bias: Float[Array, " c"]
    log_scale: Float[Array, " c"]


def initialize(x: Float[Array, "b ... c"], *, axis_name: str | None = None) -> ActNormParams:
    r"""Chooses the parameters that whiten each channel of a batch.

    ``bias = -mean`` and ``log_scale = -log(var + eps) / 2`` with ``eps`` = `EPS`, over the batch
    and all positions: on ``x`` the output has mean 0 and variance ``var / (var + eps)``. A channel
    that does not vary, as one of padding, keeps its scale: with the largest one, ``1 / sqrt(eps)``,
    its bias would learn hundreds of times too fast.

    Args:
        x: A batch; about 1000 examples make the statistics representative.
        axis_name: Mapped axis that the batch is spread over in equal shares: the statistics are
            those of the whole batch.
    """
    mean, variance = channel_moments(x, axis_name)
    # by more than the rounding of its mean
    varies = variance > jnp.square(16 * jnp.finfo(x.dtype).eps * mean)
    return ActNormParams(bias=-mean, log_scale=jnp.where(varies, -jnp.log(variance + EPS) / 2, 0))


def channel_moments(
    x: Float[Array, "b ... c"], axis_name: str | None
) -> tuple[Float[Array, " c"], Float[Array, " c"]]:
    """Mean and (biased) variance of every channel over the batch, all positions and all shares
    along ``axis_name``.
    """

    def mean_of(values):
        mean = jnp.mean(values, axis=tuple(range(x.ndim - 1)))
        return mean if axis_name is None else jax.lax.pmean(mean, axis_name)

    mean = mean_of(x)
    # two passes: a large mean costs no digits
    return mean, mean_of(jnp.square(x - _per_channel(mean, x)))


def forward_and_logdet(
    params: ActNormParams, x: Float[Array, "b ... c"]
) -> tuple[Float[Array, "b ... c"], Float[Array, " b"]]:
    r"""``y = (x + bias) exp(log_scale)``, and ``log|det dy/dx| = num_positions sum_c
    log_scale_c``, equal for all examples.
    """
    y = (x + _per_channel(params.bias, x)) * jnp.exp(_per_channel(params.log_scale, x))
    return y, _logdet(params, x)


def inverse_and_logdet(
    params: ActNormParams, y: Float[Array, "b ... c"]
) -> tuple[Float[Array, "b ... c"], Float[Array, " b"]]:
    r"""``x = y exp(-log_scale) - bias``, and ``log|det dx/dy|``."""
    x = y * jnp.exp(-_per_channel(params.log_scale, y)) - _per_channel(params.bias, y)
    return x, -_logdet(params, y)


def actnorm_bijection(params: ActNormParams) -> Bijection:
    """ActNorm as a bijection whose inverse says how far its own rounding can be off."""

    def rounding(x):  # of y exp(-log_scale), which is as large as x + bias, and of the difference
        size = 4 * example_norm(x + _per_channel(params.bias, x)) + example_norm(x)
        return no_inverse_error(x)._replace(
            error_bound=jax.lax.stop_gradient(jnp.finfo(x.dtype).eps * size)
        )

    return exact_bijection(
        lambda x: forward_and_logdet(params, x),
        lambda y: inverse_and_logdet(params, y),
        inverse_lipschitz=rounded_up(jnp.exp(-jnp.min(params.log_scale))),
        inverse_error=rounding,
    )


def _per_channel(value: Float[Array, " c"], x: Float[Array, "b ... c"]) -> Float[Array, "..."]:
    """Gives one value a channel as many axes as ``x`` (implicit broadcasting is an error here),
    and at least its precision.
    """
    return value.reshape((1,) * (x.ndim - 1) + value.shape).astype(
        jnp.promote_types(value.dtype, x.dtype)
    )


def _logdet(params: ActNormParams, x: Float[Array, "b ... c"]) -> Float[Array, " b"]:
    return jnp.broadcast_to(
        math.prod(x.shape[1:-1]) * jnp.sum(_per_channel(params.log_scale, x)), x.shape[:1]
    )
