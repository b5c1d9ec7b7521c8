"""Guaranteed upper bounds of layers' operator norms: dense matrices and convolutions.

Power iteration approaches a norm from below, so it promises nothing. A bound of this file is never
below the truth, rounding included; it can be jitted and differentiated. `gram_iteration` bounds
norms of matrices without an eigensolver. A convolution is written out as a matrix, or bounded
frequency by frequency by the symbols of a circulant that contains it. Bounds hold for the weights
as JAX stores them: NumPy's float64 is rounded first.
"""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from iresnet_jax.maths import gram_iteration
from iresnet_jax.maths.convolution import Padding, pads_of
from iresnet_jax.maths.upward_rounding import gamma, power_of_two, rounded_up

Pair = tuple[int, int]
Twist = Pair

# Phase of the embedding after one period along rows and columns, in half turns: periodic (0) or
# antiperiodic (1).
TWISTS: tuple[Twist, ...] = ((0, 0), (0, 1), (1, 0), (1, 1))

_CHUNK_NUMBERS = 2**21  # numbers in the symbols that are held in memory at a time
_DENSE_SIDE = 256  # a layer with at most so many inputs or outputs is written out as a matrix


@functools.partial(jax.jit, static_argnames="num_squarings")
def dense_norm_bound(
    matrix: Float[Array, "m n"], *, num_squarings: int | None = None
) -> Float[Array, ""]:
    r"""Bounds the largest singular value of a matrix from above.

    Guaranteed, with the rounding bound of `gram_iteration`: ``|M|_2 <= bound``. The slack is at
    most a factor of ``min(m, n)^(2^-(num_squarings + 2))`` and the rounding inflation.
    Differentiable.

    Args:
        matrix: A dense layer's weights, or a 1x1 convolution's, in either orientation; 0, subnormal
            or huge entries are safe.
        num_squarings: How often the Gram matrix is squared; 4 is 10 % of slack for 512 equal
            singular values, usually a few percent, and cheap enough for training. None squares
            until the slack is 1.2e-4 in float32, 2.3e-13 in float64.

    Returns:
        The bound; infinite from entries of some 1e30 on in float32, nan if an entry is not finite.

    Example:
        >>> dense_norm_bound(jnp.eye(3))  # 1.0001
    """
    matrix, scale, flushed = _normalized(matrix)
    rows, columns = matrix.shape
    matrix = matrix.T if rows > columns else matrix
    return scale * gram_iteration.norm_bound(matrix[None], num_squarings) + flushed


def conv_norm_bound(
    kernel: Float[Array, "kh kw cin cout"],
    spatial_shape: tuple[int, int],
    *,
    padding: Padding = "SAME",
    num_squarings: int | None = None,
    twists: Sequence[Twist] | None = None,
) -> Float[Array, ""]:
    r"""Bounds the operator norm of a convolution on images of a given size from above.

    A small zero-padded layer (at most 256 inputs or outputs, and 2^21 entries) is written out as a
    matrix, whose norm `dense_norm_bound` bounds; unless squarings or twists are asked for.
    Otherwise, with the symbol ``F(w) = sum_t K[t] exp(i w.t)``, a complex cin x cout matrix, the
    bound is

        ``min over twists a of max_{j in Z_N} |F((2 pi j + pi a) / N)|_2``

    with ``N = n + max(pad_low, pad_high)`` on each axis.

    Proof for zero padding, one axis. Let ``C`` act on sequences with ``x[m + N] = exp(i pi a)
    x[m]`` by ``(C x)[i] = sum_t K[t] x[i + t - pad_low]``. The sequences ``exp(i w m)``, ``w = (2
    pi j + pi a)/N``, are an orthogonal basis in which ``C`` is block diagonal with blocks ``F(w)``
    up to phases, so ``|C|_2`` is the maximum above. Take ``x`` that vanishes outside ``[0, n)``. An
    output of the layer reads positions in ``[-pad_low, n + pad_high)``; those outside the image
    fall, modulo ``N``, into ``[n, N)``, where ``x`` is zero, as the padding wants it. And the
    outputs are at most ``N``, since both pads are less than the kernel. So the layer is a submatrix
    of ``C``, for every ``a``: each maximum is a bound, hence so is the minimum. Both axes together:
    the same with pairs. The plain circulant (``N = n``, Sedghi et al. 2019) is *not* a bound for
    zero padding. Periodic padding is ``C`` with ``N = n`` and ``a = 0``: exact.

    Taps that no output can use on so small an image are cut off first. What is left with a single
    tap is a plain matrix.

    Rounding: the computed symbol is off by at most ``gamma_{taps + 10} |sum_t |K[t]||_F``, which is
    added; the norm of each block is bounded by `gram_iteration.norm_bound`. The bound concerns
    exact application of the layer.

    Measured against float64 SVDs for Gaussian 3x3 kernels (mean, worst), the embedding exceeds the
    truth by .8 %, 1.4 % on 16 x 16 images; 2 %, 6 % on 8 x 8 (from four channels on 2.7 %); 9 %, 15
    % on 4 x 4; 5x5 kernels on 8 x 8 10 %, 19 %. Trained 3x3 layers of 7 x 7 images with 16 to 64
    channels: up to 4.3 %. Trained layers pass low frequencies best, and zero-padded images hold a
    little less of these than sequences of period 8; eight twists per axis instead of two gain
    nothing. `dense_norm_bound` of the layer as a matrix comes within .03 %, at 50 times the cost
    (.6 s against .01 s for 1,568 inputs).

    Args:
        kernel: Taps as in ``jax.lax``'s "HWIO".
        spatial_shape: Height and width of the images, in pixels.
        padding: "SAME" (zeros) or "CIRCULAR" (periodic).
        num_squarings: Squarings of the Gram matrices, see `dense_norm_bound`; the slack is the same
            with ``min(cin, cout)`` in place of ``min(m, n)``.
        twists: Pairs of 0 (periodic) and 1 (antiperiodic) to take the minimum over, all four by
            default; one pair is four times cheaper.

    Returns:
        The bound; nan if a weight is not finite.

    Example:
        >>> kernel = jnp.ones((3, 3, 1, 1)) / 9
        >>> conv_norm_bound(kernel, (8, 8))  # 0.921; on an infinite image it would be 1
    """
    height, width = spatial_shape
    pads_of(padding, kernel.shape)  # raises for an unknown padding
    periodic = padding == "CIRCULAR"
    sides = [height * width * channels for channels in kernel.shape[2:]]
    small = min(sides) <= _DENSE_SIDE and math.prod(sides) <= _CHUNK_NUMBERS
    as_default = not periodic and num_squarings is None and twists is None
    if small and as_default and kernel.shape[:2] != (1, 1):
        return dense_norm_bound(_written_out(kernel, (height, width)))
    chosen = ((0, 0),) if periodic else tuple((a, b) for a, b in twists or TWISTS)
    return _embedded_bound(
        kernel, (height, width), periodic=periodic, twists=chosen, num_squarings=num_squarings
    )


@functools.partial(jax.jit, static_argnums=1)
def _written_out(
    kernel: Float[Array, "kh kw cin cout"], spatial_shape: Pair
) -> Float[Array, "m n"]:
    """The matrix of a zero-padded layer: entries are picked from the kernel, so they are exact."""
    picks = []  # by axis and (output, input): the tap that connects them, or one past the last
    for taps, size in zip(kernel.shape, spatial_shape, strict=False):
        tap = np.arange(size) + (taps - 1) // 2 - np.arange(size)[:, None]
        picks.append(np.where((tap >= 0) & (tap < taps), tap, taps))
    rows, columns = picks
    kernel = jnp.pad(kernel, ((0, 1), (0, 1), (0, 0), (0, 0)))
    # (output row, output column, input row, input column, cin, cout)
    matrix = kernel[rows[:, None, :, None], columns[None, :, None, :]]
    matrix = jnp.moveaxis(matrix, -1, 2)
    return matrix.reshape(math.prod(spatial_shape) * kernel.shape[3], -1)


@functools.partial(
    jax.jit, static_argnums=1, static_argnames=("periodic", "twists", "num_squarings")
)
def _embedded_bound(
    kernel: Float[Array, "kh kw cin cout"],
    spatial_shape: Pair,
    *,
    periodic: bool,
    twists: tuple[Twist, ...],
    num_squarings: int | None,
) -> Float[Array, ""]:
    """The bound of a periodic or zero-padded layer by twisted circulants."""
    periods = list(spatial_shape)
    if not periodic:
        for axis, size in enumerate(spatial_shape):
            kernel, periods[axis] = _reaching_taps(kernel, axis, size)
    # With one tap along an axis the symbol is constant along it, so the axis needs one frequency
    # and no twist.
    active = [taps > 1 for taps in kernel.shape[:2]]
    rows, columns = (
        period if axis_active else 1 for period, axis_active in zip(periods, active, strict=True)
    )
    twists = tuple(sorted({(a * active[0], b * active[1]) for a, b in twists}))
    return _grid_bound(kernel, periods=(rows, columns), twists=twists, num_squarings=num_squarings)


def _reaching_taps(kernel, axis, size):
    """The taps that reach the image along a zero-padded axis, and the period of the embedding."""
    taps = kernel.shape[axis]
    low = (taps - 1) // 2
    # Output i reads pixel i + t - low, so tap t meets the image only if low - (size - 1) <= t <=
    # low + size - 1.
    first, stop = max(0, low - size + 1), min(taps, low + size)
    low = low - first
    return lax.slice_in_dim(kernel, first, stop, axis=axis), size + max(low, stop - first - 1 - low)


def _phases(taps, periods, twist):
    """``(cos, sin)(w.t)`` on the grid, one frequency of each pair ``+-w`` (a real kernel's
    symbol there is conjugate).
    """
    j, t = (np.array(list(np.ndindex(*sizes))) for sizes in (periods, taps))
    mirrored = (-j - np.array(twist)) % np.array(periods)
    j = j[np.arange(len(j)) <= np.ravel_multi_index(tuple(mirrored.T), periods)]
    # w.t = pi * turns / (N1 N2); an integer modulo a full turn, so the angle is known to the last
    # bits.
    turns = (
        ((2 * j + np.array(twist)) * np.array(periods[::-1])) @ t.T % (2 * periods[0] * periods[1])
    )
    angle = np.pi * (turns / (periods[0] * periods[1]))
    return np.stack([np.cos(angle), np.sin(angle)], axis=1)


@functools.partial(jax.jit, static_argnames=("periods", "twists", "num_squarings"))
def _grid_bound(
    kernel: Float[Array, "kh kw cin cout"],
    *,
    periods: Pair,
    twists: tuple[Twist, ...],
    num_squarings: int | None,
) -> Float[Array, ""]:
    """Minimum over twists of the maximum over a frequency grid of the symbol's norm, as an upper
    bound.
    """
    height, width, cin, cout = kernel.shape
    if height == width == 1:
        return dense_norm_bound(kernel[0, 0], num_squarings=num_squarings)
    kernel, scale, flushed = _normalized(kernel)
    kernel = jnp.swapaxes(kernel, 2, 3) if cin > cout else kernel
    kernel = kernel.reshape(height * width, *kernel.shape[2:])
    num_taps, rows, columns = kernel.shape
    grids = [_phases((height, width), periods, twist) for twist in twists]
    phases = np.concatenate(grids)
    chunk = min(len(phases), max(1, _CHUNK_NUMBERS // (2 * rows * columns)))
    fill = -len(phases) % chunk
    phases = np.concatenate([phases, np.repeat(phases[-1:], fill, axis=0)]).reshape(
        -1, chunk, 2, num_taps
    )

    def symbol_norm(kernel, phase):
        symbol = jnp.matmul(phase, kernel.reshape(num_taps, -1), precision=lax.Precision.HIGHEST)
        return gram_iteration.norm_bound(symbol.reshape(2, rows, columns), num_squarings)

    phases = jnp.asarray(phases, kernel.dtype)
    frozen = lax.stop_gradient(kernel)
    norms = lax.map(jax.vmap(lambda phase: symbol_norm(frozen, phase)), phases).reshape(-1)
    ends = np.cumsum([len(grid) for grid in grids])
    per_twist = jnp.stack(
        [jnp.max(norms[end - len(grid) : end]) for grid, end in zip(grids, ends, strict=True)]
    )
    bound = jnp.min(per_twist)
    # The gradient is computed at the frequency that attains the bound; the others have none.
    attained = symbol_norm(kernel, phases.reshape(-1, 2, num_taps)[jnp.argmax(norms == bound)])
    bound = bound + (attained - lax.stop_gradient(attained))
    absolute = lax.stop_gradient(gram_iteration.frobenius(jnp.sum(jnp.abs(kernel), axis=0)[None]))
    symbol_error = gram_iteration.MARGIN * gamma(num_taps + 10, kernel.dtype) * absolute
    return scale * rounded_up(bound + symbol_error) + flushed


def _normalized(kernel):
    """Kernel divided by the power of two that brings its largest entry into [1, 2), this power, and
    the norm that may be lost.

    Processors may take subnormal entries for 0. Each is below ``tiny``, and a layer's norm is at
    most the sum of the absolute entries, so twice their number times ``tiny`` covers them and the
    rounding of a sum. For entries beyond some 1e30 the loss is infinite: compilers merge two
    divisions by powers into one by their product, whose reciprocal may round to 0.
    """
    kernel = kernel.astype(jnp.promote_types(kernel.dtype, jnp.float32))
    scale = power_of_two(jnp.max(jnp.abs(kernel)))
    unsigned = jnp.dtype(f"uint{8 * kernel.dtype.itemsize}").type
    info = jnp.finfo(kernel.dtype)
    bits = lax.bitcast_convert_type(lax.stop_gradient(kernel), unsigned)
    # The barrier keeps the compiler from comparing the entries as floats, among which subnormal
    # ones may equal 0.
    magnitude = lax.optimization_barrier(
        bits & unsigned(~(1 << (info.bits - 1)) & (2**info.bits - 1))
    )
    # 0 wraps around to the largest number
    subnormal = magnitude - unsigned(1) < unsigned((1 << info.nmant) - 1)
    lost = jnp.sum(subnormal).astype(kernel.dtype) * (2 * float(info.tiny))
    return kernel / scale, scale, jnp.where(scale > 2.0 ** (info.maxexp - 28), jnp.inf, lost)
