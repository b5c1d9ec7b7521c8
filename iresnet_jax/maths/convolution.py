"""The one convolution of the library: every k x k layer, its norm and its transpose go through
`conv`.

Three implementations compute the same sum and differ in speed only: XLA's own convolution, patches
times a matrix, and one matrix product for all taps followed by shifted sums. The last two are plain
matrix products, which stay fast under ``vmap`` over kernels.

XLA:CPU has a fast kernel for one layout of a convolution. It brings gradients into that layout
outside of loops only: inside of ``lax.scan`` and ``lax.while_loop`` they are up to fifty times
slower. So on CPU the convolution is a custom primitive with gradients in the fast layout. Few
output channels from many input channels are slow in that kernel too, so the primitive rearranges
such convolutions (measured in ``benchmarks/convolution.py``).
"""

import functools
import math
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Float

from iresnet_jax.maths import platforms

Padding = str  # "SAME", with zeros, or "CIRCULAR": the image keeps its size
Implementation = Literal["auto", "xla", "patches", "taps"]
Pair = tuple[int, int]
Pads = tuple[Pair, Pair]  # before and after the rows, and the columns

_THIN = 32  # largest number of output channels that counts as few on CPU
_MOST_TAPS = 25  # largest number of taps that are unrolled
_MOST_COLUMNS = 256  # largest width, on TPUs, of one product for all taps

PADDINGS = ("SAME", "CIRCULAR")


def pads_of(padding: Padding, kernel_shape: Sequence[int]) -> Pads:
    """Numbers of rows and columns that a padding adds before and after the image."""
    if padding not in PADDINGS:
        raise ValueError(
            f"padding must be one of {', '.join(PADDINGS)}, which keep the image's "
            f"size, got {padding!r}"
        )
    height, width = kernel_shape[:2]
    return ((height - 1) // 2, height // 2), ((width - 1) // 2, width // 2)


def conv(
    x: Float[Array, "b h w c"],
    kernel: Float[Array, "kh kw cin cout"],
    *,
    padding: Padding = "SAME",
    implementation: Implementation = "auto",
) -> Float[Array, "b h w cout"]:
    """Cross-correlation ``y[i] = sum_t x[i + t - p] K[t]``, the linear map of a convolutional
    layer.

    Args:
        x: Images.
        kernel: Taps in the order of ``jax.lax``'s "HWIO".
        padding: "SAME" as in ``jax.lax`` (zeros), or "CIRCULAR" (periodic).
        implementation: "auto" chooses by the kernel's shape; the other names serve measurements.
    """
    dtype = jnp.promote_types(x.dtype, kernel.dtype)
    x, kernel = x.astype(dtype), kernel.astype(dtype)
    pads = pads_of(padding, kernel.shape)
    if padding == "CIRCULAR":
        x = jnp.pad(x, ((0, 0), *pads, (0, 0)), mode="wrap")
        pads = ((0, 0), (0, 0))
    if implementation == "auto":
        implementation = choose_implementation(kernel.shape)
        if dtype == jnp.bfloat16 and math.prod(kernel.shape[:2]) > 1:
            implementation = "xla"  # sums over taps in float32, as do its gradients
    if implementation == "xla":
        convolve = _convolve if platforms.platform() != "cpu" else _convolution.bind
        return convolve(x, kernel, pads=pads)
    if pads != ((0, 0), (0, 0)):
        x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
    return _conv_by_patches(x, kernel) if implementation == "patches" else _conv_by_taps(x, kernel)


def choose_implementation(kernel_shape: Sequence[int]) -> Implementation:
    """The implementation for a kernel of shape ``(kh, kw, cin, cout)``: on CPUs the fastest in
    ``benchmarks/convolution.py``.

    On TPUs, one product for all taps of few channels fills the matrix unit. XLA's convolution uses
    only a part of the unit for each tap and takes far longer to compile.
    """
    *taps, cin, cout = kernel_shape
    if math.prod(taps) == 1:
        return "patches"  # a plain matrix product
    if platforms.platform() == "tpu" and math.prod(taps) * min(cin, cout) <= _MOST_COLUMNS:
        return "patches" if cin <= cout else "taps"
    return "xla"


def _window(x, tap, kernel_size, channels=slice(None)):
    """The part of an image that a tap ``(i, j)`` multiplies."""
    rows, columns = (n - k + 1 for n, k in zip(x.shape[1:3], kernel_size, strict=True))
    return x[:, tap[0] : tap[0] + rows, tap[1] : tap[1] + columns, channels]


def _conv_by_patches(x, kernel):
    *kernel_size, _, cout = kernel.shape
    patches = jnp.concatenate(
        [_window(x, tap, kernel_size) for tap in np.ndindex(*kernel_size)], axis=-1
    )
    return _product(patches, kernel.reshape(-1, cout))


def _product(x, matrix):
    """``x @ matrix`` with pixels as rows: without the reshape, XLA:CPU computes the matrix's
    gradient more slowly.
    """
    return (x.reshape(-1, x.shape[-1]) @ matrix).reshape(*x.shape[:-1], matrix.shape[1])


def _convolve(x, kernel, *, pads):
    return lax.conv_general_dilated(
        x, kernel, (1, 1), pads, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def _output_aval(x, kernel, *, pads):
    shapes = (jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (x, kernel))
    y = jax.eval_shape(functools.partial(_convolve, pads=pads), *shapes)
    return x.update(shape=y.shape, dtype=y.dtype, weak_type=False)


def _pads_of_gradient(x, kernel, y, pads, rule):
    """Pads along each axis, by a rule of the sizes of image, kernel and result and of the pad in
    front.
    """
    sizes = zip(x.shape[1:3], kernel.shape[:2], y.shape[1:3], pads, strict=True)
    return tuple(rule(n, k, m, before) for n, k, m, (before, _) in sizes)


def _gradient_of_x(y, x, kernel, *, pads):
    """The transpose in ``x``: a convolution of the cotangent ``y`` with the flipped kernel."""
    pads = _pads_of_gradient(
        x.aval, kernel, y, pads, lambda n, k, m, before: (k - 1 - before, n - m + before)
    )
    return _convolution.bind(y, lax.rev(kernel, (0, 1)).transpose(0, 1, 3, 2), pads=pads)


def _gradient_of_kernel(y, x, kernel, *, pads):
    """The transpose in the kernel: a convolution of ``x`` with the cotangent ``y`` in which the
    batch acts as channels.
    """
    pads = _pads_of_gradient(
        x, kernel.aval, y, pads, lambda n, k, m, before: (before, m + k - 1 - n - before)
    )
    return _convolution.bind(x.transpose(3, 1, 2, 0), y.transpose(1, 2, 0, 3), pads=pads).transpose(
        1, 2, 0, 3
    )


def _batched(arguments, axes, *, pads):
    """``vmap``: mapped images join the batch, mapped kernels join the output channels; if both are
    mapped, pairs are computed one after the other.
    """
    (x, kernel), (x_axis, kernel_axis) = arguments, axes
    convolve = functools.partial(_convolution.bind, pads=pads)
    if kernel_axis is None:
        x = jnp.moveaxis(x, x_axis, 0)
        y = convolve(x.reshape(-1, *x.shape[2:]), kernel)
        return y.reshape(*x.shape[:2], *y.shape[1:]), 0
    if x_axis is None:
        kernel = jnp.moveaxis(kernel, kernel_axis, 3)
        y = convolve(x, kernel.reshape(*kernel.shape[:3], -1))
        return y.reshape(*y.shape[:3], *kernel.shape[3:]), 3
    return lax.map(
        lambda pair: convolve(*pair),
        (jnp.moveaxis(x, x_axis, 0), jnp.moveaxis(kernel, kernel_axis, 0)),
    ), 0


def _compute(x, kernel, *, pads):
    """The primitive's value: XLA's convolution, rearranged for few output channels from many
    input channels.
    """
    y = jax.eval_shape(functools.partial(_convolve, pads=pads), x, kernel)
    if math.prod(kernel.shape[:2]) >= math.prod(y.shape[1:3]):  # the gradient of a kernel
        if _narrows(y.shape[1:3], pads, x.shape[0], y.shape[3]):
            return _gradient_of_narrowing_kernel(x, kernel, pads, y.shape[1:3])
    elif _narrows(kernel.shape[:2], pads, *kernel.shape[2:]):
        return _conv_by_taps(x, kernel, pads)
    return _convolve(x, kernel, pads=pads)


def _narrows(taps, pads, cin, cout):
    inside = all(0 <= n < k for pair, k in zip(pads, taps, strict=True) for n in pair)
    return inside and math.prod(taps) <= _MOST_TAPS and cout <= _THIN and cout < cin


def _conv_by_taps(x, kernel, pads=((0, 0), (0, 0))):
    """One matrix product for all taps, then shifted sums of the few output channels."""
    *taps, cin, cout = kernel.shape
    products = jnp.pad(
        _product(x, kernel.transpose(2, 0, 1, 3).reshape(cin, -1)), ((0, 0), *pads, (0, 0))
    )
    views = [
        _window(products, tap, taps, slice(t * cout, (t + 1) * cout))
        for t, tap in enumerate(np.ndindex(*taps))
    ]
    return sum(views[1:], views[0])


def _gradient_of_narrowing_kernel(x, y, pads, taps):
    """The convolution of `_gradient_of_kernel` with ``x (cin, h, w, b)`` as kernel and ``y (h2,
    w2, b, cout)`` as images.
    """
    rows, columns = (
        (k - 1 - before, k - 1 - after) for (before, after), k in zip(pads, taps, strict=True)
    )
    gradient = _convolve(y.transpose(3, 0, 1, 2), x.transpose(1, 2, 3, 0), pads=(rows, columns))
    return lax.rev(gradient, (1, 2)).transpose(3, 1, 2, 0)


_convolution = Primitive("convolution")
_convolution.def_impl(jax.jit(_compute, static_argnames="pads"))
_convolution.def_abstract_eval(_output_aval)
mlir.register_lowering(_convolution, mlir.lower_fun(_compute, multiple_results=False))
ad.defbilinear(_convolution, _gradient_of_x, _gradient_of_kernel)
batching.primitive_batchers[_convolution] = _batched
