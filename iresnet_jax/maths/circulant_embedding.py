"""Matrices whose norms bound that of a layer: the layer itself written out, and the symbols of a circulant that contains it.

`convolution_certificate.conv_norm_bound` has the proof. This file removes unused taps axis by axis and bounds the rest
frequency by frequency. Its callers check the arguments.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from iresnet_jax.maths import gram_iteration as gram
from iresnet_jax.maths.upward_rounding import gamma, power_of_two, rounded_up

Pair = tuple[int, int]
Twist = Pair

# Phase of the embedding after one period along rows and columns, in half turns: periodic (0) or antiperiodic (1).
TWISTS: tuple[Twist, ...] = ((0, 0), (0, 1), (1, 0), (1, 1))

CHUNK_NUMBERS = 2**21  # numbers in the symbols that are held in memory at a time


@functools.partial(jax.jit, static_argnums=1)
def written_out(kernel: Float[Array, "kh kw cin cout"], spatial_shape: Pair) -> Float[Array, "m n"]:
    """The matrix of a zero-padded layer: entries are picked from the kernel, so they are exact."""
    picks = []  # by axis and (output, input): the tap that connects them, or one past the last
    for taps, size in zip(kernel.shape, spatial_shape, strict=False):
        tap = np.arange(size) + (taps - 1) // 2 - np.arange(size)[:, None]
        picks.append(np.where((tap >= 0) & (tap < taps), tap, taps))
    rows, columns = picks
    kernel = jnp.pad(kernel, ((0, 1), (0, 1), (0, 0), (0, 0)))
    matrix = kernel[rows[:, None, :, None], columns[None, :, None, :]]  # output rows and columns, input ones, cin, cout
    matrix = jnp.moveaxis(matrix, -1, 2)
    return matrix.reshape(math.prod(spatial_shape) * kernel.shape[3], -1)


@functools.partial(jax.jit, static_argnums=1, static_argnames=("periodic", "twists", "num_squarings"))
def norm_bound(
    kernel: Float[Array, "kh kw cin cout"],
    spatial_shape: Pair,
    *,
    periodic: bool,
    twists: tuple[Twist, ...],
    num_squarings: int | None,
) -> Float[Array, ""]:
    """The bound by twisted circulants, of a layer that is periodic or padded with zeros."""
    periods = list(spatial_shape)
    if not periodic:
        for axis, size in enumerate(spatial_shape):
            kernel, periods[axis] = _reaching_taps(kernel, axis, size)
    # With one tap along an axis the symbol is constant along it, so the axis needs one frequency and no twist.
    active = [taps > 1 for taps in kernel.shape[:2]]
    rows, columns = (period if axis_active else 1 for period, axis_active in zip(periods, active, strict=True))
    twists = tuple(sorted({(a * active[0], b * active[1]) for a, b in twists}))
    return grid_bound(kernel, periods=(rows, columns), twists=twists, num_squarings=num_squarings)


@functools.partial(jax.jit, static_argnames="num_squarings")
def dense_norm_bound(matrix: Float[Array, "m n"], *, num_squarings: int | None) -> Float[Array, ""]:
    """Bound of a matrix's norm; ``num_squarings`` is that of `gram.norm_bound`."""
    matrix, scale, flushed = _normalized(matrix)
    matrix = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    return scale * gram.norm_bound(matrix[None], num_squarings) + flushed


def _reaching_taps(kernel, axis, size):
    """The taps that reach the image along a zero-padded axis, and the period of the embedding."""
    taps = kernel.shape[axis]
    low = (taps - 1) // 2
    # Output i reads pixel i + t - low, so tap t meets the image only if low - (size - 1) <= t <= low + size - 1.
    first, stop = max(0, low - size + 1), min(taps, low + size)
    low = low - first
    reach = size + (stop - first) - 1 - low  # one past the last pixel read
    return lax.slice_in_dim(kernel, first, stop, axis=axis), max(reach, min(size, reach) + low)


def _phases(taps, periods, twist):
    """``(cos, sin)(w.t)`` on the grid, one frequency of each pair ``+-w`` (a real kernel's symbol there is conjugate)."""
    j = np.stack(np.meshgrid(*(np.arange(n) for n in periods), indexing="ij"), axis=-1).reshape(-1, 2)
    mirrored = (-j - np.array(twist)) % np.array(periods)
    j = j[np.ravel_multi_index(tuple(j.T), periods) <= np.ravel_multi_index(tuple(mirrored.T), periods)]
    t = np.stack(np.meshgrid(*(np.arange(k) for k in taps), indexing="ij"), axis=-1).reshape(-1, 2)
    # w.t = pi * turns / (N1 N2); an integer modulo a full turn, so the angle is known to the last bits.
    turns = ((2 * j + np.array(twist)) * np.array(periods[::-1])) @ t.T % (2 * periods[0] * periods[1])
    angle = np.pi * (turns / (periods[0] * periods[1]))
    return np.stack([np.cos(angle), np.sin(angle)], axis=1)


@functools.partial(jax.jit, static_argnames=("periods", "twists", "num_squarings"))
def grid_bound(
    kernel: Float[Array, "kh kw cin cout"], *, periods: Pair, twists: tuple[Twist, ...], num_squarings: int | None
) -> Float[Array, ""]:
    """Minimum over twists of the maximum over a frequency grid of the symbol's norm, as an upper bound."""
    height, width, cin, cout = kernel.shape
    if height == width == 1:
        return dense_norm_bound(kernel[0, 0], num_squarings=num_squarings)
    kernel, scale, flushed = _normalized(kernel)
    kernel = jnp.swapaxes(kernel, 2, 3) if cin > cout else kernel
    kernel = kernel.reshape(height * width, *kernel.shape[2:])
    num_taps, rows, columns = kernel.shape
    grids = [_phases((height, width), periods, twist) for twist in twists]
    phases = np.concatenate(grids)
    chunk = min(len(phases), max(1, CHUNK_NUMBERS // (2 * rows * columns)))
    fill = -len(phases) % chunk
    phases = np.concatenate([phases, np.repeat(phases[-1:], fill, axis=0)]).reshape(-1, chunk, 2, num_taps)

    def symbol_norm(kernel, phase):
        symbol = jnp.matmul(phase, kernel.reshape(num_taps, -1), precision=lax.Precision.HIGHEST)
        return gram.norm_bound(symbol.reshape(2, rows, columns), num_squarings)

    phases = jnp.asarray(phases, kernel.dtype)
    frozen = lax.stop_gradient(kernel)
    norms = lax.map(jax.vmap(lambda phase: symbol_norm(frozen, phase)), phases).reshape(-1)
    ends = np.cumsum([len(grid) for grid in grids])
    per_twist = jnp.stack([jnp.max(norms[end - len(grid) : end]) for grid, end in zip(grids, ends, strict=True)])
    bound = jnp.min(per_twist)
    # Only the frequency that attains the bound has a gradient, so only there is it computed.
    attained = symbol_norm(kernel, phases.reshape(-1, 2, num_taps)[jnp.argmax(norms == bound)])
    bound = bound + (attained - lax.stop_gradient(attained))
    absolute = lax.stop_gradient(gram.frobenius(jnp.sum(jnp.abs(kernel), axis=0)[None]))
    symbol_error = gram.MARGIN * gamma(num_taps + 10, kernel.dtype) * absolute
    return scale * rounded_up(bound + symbol_error) + flushed


def _normalized(kernel):
    """Kernel over the power of two that brings its largest entry into [1, 2), this power, and the norm that may be lost.

    Processors may take subnormal entries for 0. Each is below ``tiny``, and a layer's norm is at most the sum of the absolute
    entries, so twice their number times ``tiny`` covers them and the rounding of a sum. Of entries beyond some 1e30 the loss is
    infinite: compilers divide by a product of two powers at once, and may take its reciprocal for 0.
    """
    kernel = kernel.astype(jnp.promote_types(kernel.dtype, jnp.float32))
    scale = power_of_two(jnp.max(jnp.abs(kernel)))
    unsigned = jnp.dtype(f"uint{8 * kernel.dtype.itemsize}").type
    info = jnp.finfo(kernel.dtype)
    bits = lax.bitcast_convert_type(lax.stop_gradient(kernel), unsigned)
    # The barrier keeps the compiler from comparing the entries as floats, among which subnormal ones may equal 0.
    magnitude = lax.optimization_barrier(bits & unsigned(~(1 << (info.bits - 1)) & (2**info.bits - 1)))
    subnormal = magnitude - unsigned(1) < unsigned((1 << info.nmant) - 1)  # 0 wraps around to the largest number
    lost = jnp.sum(subnormal).astype(kernel.dtype) * (2 * float(info.tiny))
    return kernel / scale, scale, jnp.where(scale > 2.0 ** (info.maxexp - 28), jnp.inf, lost)
