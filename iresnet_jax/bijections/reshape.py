r"""Maps that only move entries around: squeeze, channel split, channel padding, flatten.

All but the padding are permutations of the entries, so their log-determinants are 0. Padding is injective: it has no
density, and its inverse exists on its image only, so :func:`padding_residual` says how far from it an array is.
"""

import math
from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from iresnet_jax.bijections.bijection import Bijection, permutation_bijection


def _check_factor(factor: int) -> None:
    if factor < 1:
        raise ValueError(f"factor must be at least 1, got {factor}: 2 halves the height and the width")


def _check_images(x: Array) -> None:
    if x.ndim != 4:
        raise ValueError(f"images must have shape (batch, height, width, channels), got {x.shape}: add the missing axes")


def squeeze(x: Shaped[Array, "b h w c"], factor: int = 2) -> Shaped[Array, "b h//{factor} w//{factor} c*{factor}**2"]:
    r"""Trades resolution for channels (space to depth).

    ``y[b, i, j, (di * factor + dj) * c + k] = x[b, i * factor + di, j * factor + dj, k]``: the output lists the pixels
    of a ``factor x factor`` patch row by row, each with all its channels. Dinh et al. 2017, section 3.6, with the
    channel order stated here. A permutation, so volume preserving and an isometry.

    Args:
        x: Images.
        factor: Side of a patch in pixels; divides the height and the width.

    Returns:
        Images ``factor`` times smaller on each side with ``factor**2`` times the channels.

    Raises:
        ValueError: If ``x`` is no batch of images, or ``factor`` is not positive or does not divide both sides.

    Example:
        >>> squeeze(jnp.zeros((8, 32, 32, 3))).shape
        (8, 16, 16, 12)
    """
    _check_factor(factor)
    _check_images(x)
    b, h, w, c = x.shape
    if h % factor or w % factor:
        raise ValueError(f"factor must divide the height and the width, got factor {factor} for {h}x{w}: pad the images first")
    patches = x.reshape(b, h // factor, factor, w // factor, factor, c)
    return patches.transpose(0, 1, 3, 2, 4, 5).reshape(b, h // factor, w // factor, c * factor**2)


def unsqueeze(y: Shaped[Array, "b h w c"], factor: int = 2) -> Shaped[Array, "b h*{factor} w*{factor} c//({factor}**2)"]:
    """Inverts :func:`squeeze` exactly (depth to space).

    Args:
        y: Images whose number of channels is a multiple of ``factor**2``.
        factor: Side of a patch in pixels.

    Returns:
        Images ``factor`` times larger on each side.

    Raises:
        ValueError: If ``y`` is no batch of images, or ``factor`` is not positive or its square does not divide the
            number of channels.
    """
    _check_factor(factor)
    _check_images(y)
    b, h, w, c = y.shape
    if c % factor**2:
        raise ValueError(
            f"the number of channels must be a multiple of factor**2 = {factor**2}, got {c}: "
            "pass the factor that the images were squeezed with"
        )
    patches = y.reshape(b, h, w, factor, factor, c // factor**2)
    return patches.transpose(0, 1, 3, 2, 4, 5).reshape(b, h * factor, w * factor, c // factor**2)


def pad_channels(x: Shaped[Array, "b ... c"], num: int) -> Shaped[Array, "b ... c+{num}"]:
    """Appends ``num`` channels of zeros, which widens a network without breaking its injectivity.

    Behrmann et al. 2019, for classification. An isometry onto its image, which has no volume: the result has no
    density.

    Args:
        x: Input with channels last.
        num: Number of channels to append, at least 0.

    Returns:
        ``x`` in the first channels and zeros in the last ``num``.

    Raises:
        ValueError: If ``num`` is negative.

    Example:
        >>> pad_channels(jnp.zeros((8, 32, 32, 3)), 13).shape
        (8, 32, 32, 16)
    """
    if num < 0:
        raise ValueError(f"num must be at least 0, got {num}: use unpad_channels to remove channels")
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, num)])


def _num_kept(y: Array, num: int) -> int:
    """Returns how many channels are left of ``y`` without its last ``num``."""
    c = y.shape[-1]
    if not 0 <= num < c:
        raise ValueError(f"num must lie in [0, {c}) for {c} channels, got {num}: pass the num given to pad_channels")
    return c - num


def unpad_channels(y: Shaped[Array, "b ... c"], num: int) -> Shaped[Array, "b ... c-{num}"]:
    """Drops the last ``num`` channels: the inverse of :func:`pad_channels` on its image, a projection elsewhere.

    Args:
        y: Input with channels last.
        num: Number of channels to drop, at least 0 and below the number of channels.

    Returns:
        The remaining channels; how far ``y`` was from a padded array is told by :func:`padding_residual`.

    Raises:
        ValueError: If ``num`` is out of range.
    """
    return y[..., : _num_kept(y, num)]


def padding_residual(y: Float[Array, "b ... c"], num: int) -> Float[Array, " b"]:
    """Measures, example by example, how far ``y`` is from the image of :func:`pad_channels`.

    The Euclidean norm of the last ``num`` channels, which is the distance to the nearest padded array. Where it is 0
    the gradient is 0 too (a subgradient) instead of NaN.

    Args:
        y: Input with channels last.
        num: Number of padded channels, at least 0 and below the number of channels.

    Returns:
        One distance an example, in the units of ``y``; 0 where unpadding is an exact inverse.

    Raises:
        ValueError: If ``num`` is out of range.
    """
    padding = y[..., _num_kept(y, num) :]
    squared = jnp.sum(jnp.square(padding), axis=tuple(range(1, y.ndim)))
    is_zero = squared == 0
    return jnp.where(is_zero, 0, jnp.sqrt(jnp.where(is_zero, 1, squared)))


def split_channels(x: Shaped[Array, "... c"]) -> tuple[Shaped[Array, "... c//2"], Shaped[Array, "... c//2"]]:
    """The first and the second half of the channels: what goes on in a multi-scale flow, and what leaves as latents."""
    half = x.shape[-1] // 2
    return x[..., :half], x[..., half:]


def merge_channels(kept: Shaped[Array, "... c"], latent: Shaped[Array, "... c"]) -> Shaped[Array, "... 2*c"]:
    """Inverts `split_channels`."""
    return jnp.concatenate([kept, latent], axis=-1)


def flatten(x: Shaped[Array, "b ..."]) -> Shaped[Array, "b d"]:
    """Lists the entries of each example in row-major order.

    Args:
        x: A batch of arrays of any shape; an example without axes becomes one entry.

    Returns:
        One row an example.

    Example:
        >>> flatten(jnp.zeros((8, 4, 4, 3))).shape
        (8, 48)
    """
    return x.reshape(x.shape[0], math.prod(x.shape[1:]))


def unflatten(z: Shaped[Array, "b d"], event_shape: Sequence[int]) -> Shaped[Array, "b ..."]:
    """Inverts :func:`flatten` exactly.

    Args:
        z: One row an example.
        event_shape: Shape of one example, without the batch axis.

    Returns:
        A batch of arrays of shape ``event_shape``.

    Raises:
        ValueError: If ``event_shape`` does not have as many entries as a row.

    Example:
        >>> unflatten(jnp.zeros((8, 48)), (4, 4, 3)).shape
        (8, 4, 4, 3)
    """
    event_shape = tuple(event_shape)
    if math.prod(event_shape) != z.shape[1]:
        raise ValueError(
            f"event_shape must have {z.shape[1]} entries, got {event_shape} with {math.prod(event_shape)}: "
            "leave the batch axis out"
        )
    return z.reshape(z.shape[0], *event_shape)


def squeeze_bijection(factor: int) -> Bijection:
    """`squeeze` as a bijection."""
    return permutation_bijection(lambda x: squeeze(x, factor), lambda y: unsqueeze(y, factor))


def flatten_bijection(event_shape: tuple[int, ...]) -> Bijection:
    """`flatten` as a bijection of examples of one shape."""
    return permutation_bijection(flatten, lambda z: unflatten(z, event_shape))
