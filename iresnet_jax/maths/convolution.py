"""The one convolution of the library: every k x k layer, its norm and its transpose go through `conv`.

Three implementations compute the same sum and differ in speed only: XLA's own convolution, patches times a matrix, and one
matrix product for all taps followed by shifted sums. The last two are plain matrix products, which stay fast under ``vmap``
over kernels.

XLA:CPU has a fast kernel for one layout of a convolution. It brings gradients into that layout outside of loops only: inside of
``lax.scan`` and ``lax.while_loop`` they are up to fifty times slower. So on CPU the convolution is a primitive of our own with
gradients in the fast layout. Few output channels from many input channels are slow in that kernel too, so the primitive
rearranges them (measured in ``benchmarks/convolution.py``).
"""

import functools
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Float

from iresnet_jax.maths import platforms

Padding = str | Sequence[tuple[int, int]]
Implementation = Literal["auto", "xla", "patches", "taps"]
Pair = tuple[int, int]

_THIN = 32  # largest number of output channels that counts as few on CPU
_MOST_TAPS = 25  # largest number of taps that are unrolled
_MOST_COLUMNS = 256  # of a product of all taps of few channels, on TPUs

PADDINGS = ("SAME", "VALID", "CIRCULAR")


def explicit_padding(
    padding: Padding, kernel_size: tuple[int, int], spatial_shape: tuple[int, int], strides: tuple[int, int]
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Numbers of rows and columns that `padding` adds before and after the image; "CIRCULAR" adds what "SAME" does at stride 1.

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
        x: Images.
        kernel: Taps in the order of ``jax.lax``'s "HWIO".
        strides: Step between outputs, in pixels.
        padding: "SAME" and "VALID" as in ``jax.lax`` (zeros), "CIRCULAR" (periodic), or explicit pairs of zeros.
        implementation: "auto" chooses by the kernel's shape; the other names serve measurements.

    Raises:
        ValueError: If channels do not match, the padding's name is unknown, or the padded image is smaller than the kernel.
    """
    kernel_height, kernel_width, cin, _ = kernel.shape
    if x.shape[-1] != cin:
        raise ValueError(f"the kernel takes {cin} channels, the input has {x.shape[-1]}: check the layer's widths")
    dtype = jnp.promote_types(x.dtype, kernel.dtype)
    x, kernel = x.astype(dtype), kernel.astype(dtype)
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
        if dtype == jnp.bfloat16 and kernel_height * kernel_width > 1:
            implementation = "xla"  # which sums over taps in float32, as do its gradients
    if implementation == "xla":
        convolve = _convolve if platforms.platform() != "cpu" else _convolution.bind
        return convolve(x, kernel, window=_Window(strides, pads))
    if pads != ((0, 0), (0, 0)):
        x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
    return (_conv_by_patches if implementation == "patches" else _conv_by_taps)(x, kernel, strides)


def choose_implementation(kernel_shape: Sequence[int]) -> Implementation:
    """The implementation for a kernel of shape ``(kh, kw, cin, cout)``: on CPUs the fastest in ``benchmarks/convolution.py``.

    On TPUs all taps of few channels fill the matrix unit in one product, where XLA's convolution uses a part of it for each
    tap, and takes far longer to compile.
    """
    *taps, cin, cout = kernel_shape
    if math.prod(taps) == 1:
        return "patches"  # a plain matrix product
    if platforms.platform() == "tpu" and math.prod(taps) * min(cin, cout) <= _MOST_COLUMNS:
        return "patches" if cin <= cout else "taps"
    return "xla"


def _window(x, tap, kernel_size, strides):
    """The part of `x` that tap ``(i, j)`` multiplies."""
    rows, columns = x.shape[1] - kernel_size[0] + 1, x.shape[2] - kernel_size[1] + 1
    return x[:, tap[0] : tap[0] + rows : strides[0], tap[1] : tap[1] + columns : strides[1], :]


def _conv_by_patches(x, kernel, strides):
    *kernel_size, _, cout = kernel.shape
    patches = jnp.concatenate([_window(x, tap, kernel_size, strides) for tap in np.ndindex(*kernel_size)], axis=-1)
    return _product(patches, kernel.reshape(-1, cout))


def _product(x, matrix):
    """``x @ matrix``, pixels as rows: XLA:CPU computes the gradient of the matrix of ``x @ matrix`` more slowly."""
    return (x.reshape(-1, x.shape[-1]) @ matrix).reshape(*x.shape[:-1], -1)


def _conv_by_taps(x, kernel, strides):
    *kernel_size, cin, cout = kernel.shape
    products = _product(x, kernel.reshape(-1, cin, cout).transpose(1, 0, 2).reshape(cin, -1))
    taps = zip(np.ndindex(*kernel_size), jnp.split(products, kernel_size[0] * kernel_size[1], axis=-1), strict=True)
    views = [_window(product, tap, kernel_size, strides) for tap, product in taps]
    return sum(views[1:], views[0])


class _Window(NamedTuple):
    """Geometry along each axis: ``y[i] = sum_t x[(s i + d t - p) / e] K[t]`` over the taps ``t`` at which ``e`` divides."""

    strides: Pair  # s
    pads: tuple[Pair, Pair]  # p before and the padding after the image
    x_dilation: Pair = (1, 1)  # e
    kernel_dilation: Pair = (1, 1)  # d


def _convolve(x, kernel, *, window):
    return lax.conv_general_dilated(x, kernel, *window, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def _output_aval(x, kernel, *, window):
    shapes = (jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (x, kernel))
    y = jax.eval_shape(functools.partial(_convolve, window=window), *shapes)
    return x.update(shape=y.shape, dtype=y.dtype, weak_type=False)


def _spans(x, kernel, y, window):
    """Dilated lengths ``step (n - 1) + 1`` of image, kernel and result along each axis; their steps are ``e``, ``d``, ``s``."""
    sizes = zip(x.shape[1:3], kernel.shape[:2], y.shape[1:3], strict=True)
    steps = zip(window.x_dilation, window.kernel_dilation, window.strides, strict=True)
    return [[step * (n - 1) + 1 for n, step in zip(*axis, strict=True)] for axis in zip(sizes, steps, strict=True)]


def _gradient_of_x(y, x, kernel, *, window):
    """The transpose in ``x``: a convolution of the cotangent ``y`` with the flipped kernel."""
    pads = []
    for (before, _), (n, k, m) in zip(window.pads, _spans(x.aval, kernel, y, window), strict=True):
        pads.append((k - 1 - before, n - m + before))
    flipped = lax.rev(kernel, (0, 1)).transpose(0, 1, 3, 2)
    transposed = _Window(window.x_dilation, tuple(pads), window.strides, window.kernel_dilation)
    return _convolution.bind(y, flipped, window=transposed)


def _gradient_of_kernel(y, x, kernel, *, window):
    """The transpose in the kernel: a convolution of ``x`` with the cotangent ``y`` in which the batch acts as channels."""
    pads = []
    for (before, _), (n, k, m) in zip(window.pads, _spans(x, kernel.aval, y, window), strict=True):
        pads.append((before, m + k - 1 - n - before))
    transposed = _Window(window.kernel_dilation, tuple(pads), window.x_dilation, window.strides)
    gradient = _convolution.bind(x.transpose(3, 1, 2, 0), y.transpose(1, 2, 0, 3), window=transposed)
    return gradient.transpose(1, 2, 0, 3)


def _batched(arguments, axes, *, window):
    """``vmap``: images join the batch, kernels join the output channels; pairs of both are computed one after the other."""
    (x, kernel), (x_axis, kernel_axis) = arguments, axes
    convolve = functools.partial(_convolution.bind, window=window)
    if kernel_axis is None:
        x = jnp.moveaxis(x, x_axis, 0)
        y = convolve(x.reshape(-1, *x.shape[2:]), kernel)
        return y.reshape(*x.shape[:2], *y.shape[1:]), 0
    if x_axis is None:
        kernel = jnp.moveaxis(kernel, kernel_axis, 3)
        y = convolve(x, kernel.reshape(*kernel.shape[:3], -1))
        return y.reshape(*y.shape[:3], *kernel.shape[3:]), 3
    return lax.map(lambda pair: convolve(*pair), (jnp.moveaxis(x, x_axis, 0), jnp.moveaxis(kernel, kernel_axis, 0))), 0


def _compute(x, kernel, *, window):
    """The primitive's value: XLA's convolution, rearranged for few output channels from many input channels."""
    y = jax.eval_shape(functools.partial(_convolve, window=window), x, kernel)
    if window == _Window((1, 1), window.pads):
        if math.prod(kernel.shape[:2]) >= math.prod(y.shape[1:3]):  # the gradient of a kernel
            if _narrows(y.shape[1:3], window.pads, x.shape[0], y.shape[3]):
                return _gradient_of_narrowing_kernel(x, kernel, window.pads, y.shape[1:3])
        elif _narrows(kernel.shape[:2], window.pads, *kernel.shape[2:]):
            return _narrowing(x, kernel, window.pads)
    return _convolve(x, kernel, window=window)


def _narrows(taps, pads, cin, cout):
    inside = all(0 <= n < k for pair, k in zip(pads, taps, strict=True) for n in pair)
    return inside and math.prod(taps) <= _MOST_TAPS and cout <= _THIN and cout < cin


def _narrowing(x, kernel, pads):
    """One matrix product for all taps, then shifted sums of the few output channels."""
    *taps, cin, cout = kernel.shape
    rows, columns = (n + sum(pair) - k + 1 for n, pair, k in zip(x.shape[1:3], pads, taps, strict=True))
    products = jnp.pad(_product(x, kernel.transpose(2, 0, 1, 3).reshape(cin, -1)), ((0, 0), *pads, (0, 0)))
    views = []
    for tap, (i, j) in enumerate(np.ndindex(*taps)):
        views.append(products[:, i : i + rows, j : j + columns, tap * cout : (tap + 1) * cout])
    return sum(views[1:], views[0])


def _gradient_of_narrowing_kernel(x, y, pads, taps):
    """The convolution of `_gradient_of_kernel` with ``x (cin, h, w, b)`` as kernel and ``y (h2, w2, b, cout)`` as images."""
    rows, columns = ((k - 1 - before, k - 1 - after) for (before, after), k in zip(pads, taps, strict=True))
    window = _Window((1, 1), (rows, columns))
    gradient = _convolve(y.transpose(3, 0, 1, 2), x.transpose(1, 2, 3, 0), window=window)
    return lax.rev(gradient, (1, 2)).transpose(3, 1, 2, 0)


_convolution = Primitive("convolution")
_convolution.def_impl(jax.jit(_compute, static_argnames="window"))
_convolution.def_abstract_eval(_output_aval)
mlir.register_lowering(_convolution, mlir.lower_fun(_compute, multiple_results=False))
ad.defbilinear(_convolution, _gradient_of_x, _gradient_of_kernel)
batching.primitive_batchers[_convolution] = _batched
