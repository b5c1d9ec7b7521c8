r"""Maps that only move entries around: squeeze, order of channels, channel split, flatten.

They are permutations of the entries, so their log-determinants are 0. Channels are on the last
axis.

Channels of zeros behind the data's channels widen a network (Behrmann et al. 2019). This map is
injective: it has no density, and its inverse exists on its image only. `padding_residual` is an
array's distance from the image.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from iresnet_jax.bijections.bijection import ClosedForm
from iresnet_jax.maths.lipschitz_bounds import BiLipschitz


def squeeze(
    x: Shaped[Array, "b h w c"], factor: int = 2
) -> Shaped[Array, "b h//{factor} w//{factor} c*{factor}**2"]:
    r"""Trades resolution for channels (space to depth; Dinh et al. 2017, sec. 3.6).

    ``y[b, i, j, (di * factor + dj) * c + k] = x[b, i * factor + di, j * factor + dj, k]``: the
    channels of a pixel list the pixels of a ``factor x factor`` patch row by row, each with all its
    channels. An isometry.

    Args:
        x: Images.
        factor: Side of a patch in pixels; divides the height and the width.
    """
    b, h, w, c = x.shape
    patches = x.reshape(b, h // factor, factor, w // factor, factor, c)
    return patches.transpose(0, 1, 3, 2, 4, 5).reshape(b, h // factor, w // factor, c * factor**2)


def unsqueeze(
    y: Shaped[Array, "b h w c"], factor: int = 2
) -> Shaped[Array, "b h*{factor} w*{factor} c//({factor}**2)"]:
    """Inverts `squeeze` exactly (depth to space)."""
    b, h, w, c = y.shape
    patches = y.reshape(b, h, w, factor, factor, c // factor**2)
    return patches.transpose(0, 1, 3, 2, 4, 5).reshape(b, h * factor, w * factor, c // factor**2)


@dataclass(frozen=True)
class Isometry(ClosedForm):
    """A bijection that preserves distances and volume, such as a permutation of entries.

    Attributes:
        there: ``x -> y``.
        again: ``y -> x``.
    """

    there: Callable[[Array], Array]
    again: Callable[[Array], Array]

    def map(self, x):
        """``y``, and 0."""
        return self.there(x), jnp.zeros(len(x), x.dtype)

    def unmap(self, y):
        """``x``, and 0."""
        return self.again(y), jnp.zeros(len(y), y.dtype)

    def bilipschitz(self):
        """Both constants are 1."""
        return BiLipschitz(jnp.asarray(1.0), jnp.asarray(1.0))


def squeeze_bijection(factor: int) -> Isometry:
    """`squeeze` as a bijection."""
    return Isometry(lambda x: squeeze(x, factor), lambda y: unsqueeze(y, factor))


def order_bijection(order: Sequence[int]) -> Isometry:
    """Channels in another order: channel ``i`` of the result is channel ``order[i]`` of the
    input.
    """
    # int32 has the same type in both precisions.
    there, again = (np.asarray(each, np.int32) for each in (order, np.argsort(order)))
    return Isometry(lambda x: x[..., there], lambda y: y[..., again])


def flatten_bijection(event_shape: Sequence[int]) -> Isometry:
    """`flatten` as a bijection of examples of one shape."""
    return Isometry(flatten, lambda z: unflatten(z, event_shape))


def split_channels(
    x: Shaped[Array, "... c"],
) -> tuple[Shaped[Array, "... c//2"], Shaped[Array, "... c//2"]]:
    """The first and the second half of the channels: the part that goes on in a multi-scale flow,
    and the part that leaves as latents.
    """
    half = x.shape[-1] // 2
    return x[..., :half], x[..., half:]


def padding_residual(y: Float[Array, "b ... c"], num: int) -> Float[Array, " b"]:
    """Distance of every example from examples whose last ``num`` channels are zeros: the Euclidean
    norm of these channels.

    Where it is 0 the gradient is 0 too (a subgradient) instead of NaN.
    """
    padding = y[..., y.shape[-1] - num :]
    squared = jnp.sum(jnp.square(padding), axis=tuple(range(1, y.ndim)))
    is_zero = squared == 0
    return jnp.where(is_zero, 0, jnp.sqrt(jnp.where(is_zero, 1, squared)))


def flatten(x: Shaped[Array, "b ..."]) -> Shaped[Array, "b d"]:
    """The entries of each example in row-major order; an example without axes becomes one entry."""
    return x.reshape(x.shape[0], math.prod(x.shape[1:]))


def unflatten(z: Shaped[Array, "b d"], event_shape: Sequence[int]) -> Shaped[Array, "b ..."]:
    """Inverts `flatten` exactly, to examples of ``event_shape``."""
    return z.reshape(z.shape[0], *event_shape)
