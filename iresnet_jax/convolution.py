"""The one convolution of the library: every k x k layer, its norm and its transpose go through `conv`.

Three implementations compute the same sum and differ in speed only. XLA's own convolution is best for wide layers; on CPU a
thin input (few channels in) is several times faster as patches times a matrix, a thin output as a matrix product per tap
followed by shifted adds. Both are plain matrix products, so they also keep their speed inside `lax.scan` and
`lax.while_loop`, where XLA:CPU's convolution gradients are slow, and under `vmap` over kernels.
"""

from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

Padding = str | Sequence[tuple[int, int]]
Implementation = Literal["auto", "xla", "patches", "taps"]

PADDINGS = ("SAME", "VALID", "CIRCULAR")

# Above this many input or output channels XLA:CPU's own convolution is taken to be faster: a first choice, not yet measured.
_THIN_CHANNELS = 32


def explicit_padding(
    padding: Padding, kernel_size: tuple[int, int], spatial_shape: tuple[int, int], strides: tuple[int, int]
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Rows and columns that `padding` adds before and after the image; "CIRCULAR" pads as "SAME" with stride 1.

    Raises:
        ValueError: If the padding's name is unknown.
    """
    if not isinstance(padding, str):
        (top, bottom), (left, right) = padding
        return (top, bottom), (left, right)
    if padding not in PADDINGS:
        raise ValueError(f"padding must be one of {', '.join(PADDINGS)} or explicit pairs, got {padding!r}")
    if padding == "CIRCULAR":
        pairs = [((k - 1) // 2, k // 2) for k in kernel_size]
    else:
        pairs = lax.padtype_to_pads(spatial_shape, kernel_size, strides, padding)
    (top, bottom), (left, right) = pairs
    return (top, bottom), (left, right)


def conv(
    x: Float[Array, "b h w c"],
    kernel: Float[Array, "kh kw cin cout"],
    *,
    strides: int | tuple[int, int] = 1,
    padding: Padding = "SAME",
    implementation: Implementation = "auto",
) -> Float[Array, "b h2 w2 cout"]:
    """Cross-correlation ``y[i] = sum_t x[s i + t - p] K[t]``, the linear map of a convolutional layer.

    Args:
        x: Images, with as many channels as the kernel takes.
        kernel: Taps in the order of ``jax.lax``'s "HWIO".
        strides: Step between outputs, in pixels.
        padding: "SAME" and "VALID" as in ``jax.lax`` (zeros), "CIRCULAR" (periodic), or explicit pairs of zeros.
        implementation: "auto" picks by backend and shape; the others are for measurements.

    Returns:
        The layer's output, without bias.

    Raises:
        ValueError: If channels do not match, the padding's name is unknown, or the padded image is smaller than the kernel.
    """
    kernel_height, kernel_width, cin, _ = kernel.shape
    if x.shape[-1] != cin:
        raise ValueError(f"the kernel takes {cin} channels, the input has {x.shape[-1]}: check the layer's widths")
    strides = (strides, strides) if isinstance(strides, int) else strides
    pads = explicit_padding(padding, (kernel_height, kernel_width), (x.shape[1], x.shape[2]), strides)
    if any(n + sum(pair) < k for n, pair, k in zip(x.shape[1:3], pads, kernel.shape[:2], strict=True)):
        raise ValueError(
            f"the kernel's {kernel_height} x {kernel_width} taps do not fit an image of {x.shape[1]} x {x.shape[2]} pixels "
            f"padded by {pads}: pad more, or use padding='SAME'"
        )
    if padding == "CIRCULAR":
        x = jnp.pad(x, ((0, 0), *pads, (0, 0)), mode="wrap")
        pads = ((0, 0), (0, 0))
    if implementation == "auto":
        implementation = choose_implementation(kernel.shape)
    if implementation == "xla":
        return lax.conv_general_dilated(x, kernel, strides, pads, dimension_numbers=("NHWC", "HWIO", "NHWC"))
    if pads != ((0, 0), (0, 0)):
        x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
    return (_conv_by_patches if implementation == "patches" else _conv_by_taps)(x, kernel, strides)


def choose_implementation(kernel_shape: Sequence[int]) -> Implementation:
    """The fastest implementation for this backend and kernel shape ``(kh, kw, cin, cout)``."""
    kernel_height, kernel_width, cin, cout = kernel_shape
    if kernel_height == kernel_width == 1:
        return "patches"  # a plain matrix product
    if jax.default_backend() != "cpu" or min(cin, cout) > _THIN_CHANNELS:
        return "xla"
    return "patches" if cin <= cout else "taps"


def _window(x, tap, kernel_size, strides):
    """The view of `x` that tap ``(i, j)`` multiplies."""
    rows, columns = x.shape[1] - kernel_size[0] + 1, x.shape[2] - kernel_size[1] + 1
    return x[:, tap[0] : tap[0] + rows : strides[0], tap[1] : tap[1] + columns : strides[1], :]


def _conv_by_patches(x, kernel, strides):
    *kernel_size, _, cout = kernel.shape
    patches = jnp.concatenate([_window(x, tap, kernel_size, strides) for tap in np.ndindex(*kernel_size)], axis=-1)
    return patches @ kernel.reshape(-1, cout)


def _conv_by_taps(x, kernel, strides):
    *kernel_size, cin, cout = kernel.shape
    products = x @ kernel.reshape(-1, cin, cout).transpose(1, 0, 2).reshape(cin, -1)
    taps = zip(np.ndindex(*kernel_size), jnp.split(products, kernel_size[0] * kernel_size[1], axis=-1), strict=True)
    views = [_window(product, tap, kernel_size, strides) for tap, product in taps]
    return sum(views[1:], views[0])
