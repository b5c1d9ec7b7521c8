r"""ActNorm: an affine map of each channel, initialised from data (Kingma and Dhariwal 2018, sec.
3.1).

After initialisation the parameters are trained like any other; nothing depends on the batch. The
channels are on the last axis and every axis between it and the first counts positions.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from iresnet_jax.bijections.bijection import ClosedForm, no_inverse_error
from iresnet_jax.maths.fixed_point import example_norm
from iresnet_jax.maths.lipschitz_bounds import scaling_bounds
from iresnet_jax.pytrees import pytree

EPS = 1e-5  # added to variances, which caps scales at 316


@pytree(arrays=("bias", "log_scale"))
class ActNorm(ClosedForm):
    r"""``y = (x + bias) exp(log_scale)``, channel by channel.

    Attributes:
        bias: Shift in the units of the input, one per channel; added first.
        log_scale: Natural log of the scale, one per channel.
    """

    bias: Any
    log_scale: Any

    @classmethod
    def fit(cls, x: Float[Array, "b ... c"], *, axis_name: str | None = None) -> "ActNorm":
        r"""The map that whitens each channel of a batch.

        ``bias = -mean`` and ``log_scale = -log(var + eps) / 2`` with ``eps`` = `EPS`, over the
        batch and all positions: on ``x`` the output has mean 0 and variance ``var / (var + eps)``.
        A channel that does not vary, such as padding, keeps its scale: with the largest scale, ``1
        / sqrt(eps)``, its bias would learn hundreds of times too fast.

        Args:
            x: A batch; about 1000 examples make the statistics representative.
            axis_name: Mapped axis that the batch is spread over in equal shares; statistics are
                taken over the whole batch.
        """
        mean, variance = channel_moments(x, axis_name)
        # A channel varies if its variance exceeds the rounding of its mean.
        varies = variance > jnp.square(16 * jnp.finfo(x.dtype).eps * mean)
        return cls(-mean, jnp.where(varies, -jnp.log(variance + EPS) / 2, 0))

    def map(self, x):
        """``y``, and ``num_positions sum_c log_scale_c``, equal for all examples."""
        y = (x + _per_channel(self.bias, x)) * jnp.exp(_per_channel(self.log_scale, x))
        return y, self._logdet(x)

    def unmap(self, y):
        """``x = y exp(-log_scale) - bias``, and ``log|det dx/dy|``."""
        x = y * jnp.exp(-_per_channel(self.log_scale, y)) - _per_channel(self.bias, y)
        return x, -self._logdet(y)

    def bilipschitz(self):
        """See `scaling_bounds`."""
        return scaling_bounds(self.log_scale)

    def inverse_error(self, x):
        """Rounding of ``y exp(-log_scale)``, which is as large as ``x + bias``, and of the
        difference.
        """
        size = 4 * example_norm(x + _per_channel(self.bias, x)) + example_norm(x)
        return no_inverse_error(x)._replace(
            error_bound=jax.lax.stop_gradient(jnp.finfo(x.dtype).eps * size)
        )

    def _logdet(self, x):
        return jnp.broadcast_to(
            math.prod(x.shape[1:-1]) * jnp.sum(_per_channel(self.log_scale, x)), x.shape[:1]
        )


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
    # In two passes, a large mean costs no digits.
    return mean, mean_of(jnp.square(x - _per_channel(mean, x)))


def _per_channel(value: Any, x: Float[Array, "b ... c"]) -> Any:
    """Gives one value a channel as many axes as ``x`` (implicit broadcasting is an error here),
    and at least its precision.
    """
    return value.reshape((1,) * (x.ndim - 1) + value.shape).astype(
        jnp.promote_types(value.dtype, x.dtype)
    )
