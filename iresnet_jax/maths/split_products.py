r"""Matrix products of about 80 bits from products of float64 that are exact (Ozaki et al. 2012).

Both factors are cut into slices of few bits on one grid each. Sums of products of slices fit 53 bits, whatever the order in
which a library adds them up, and only the sum over pairs of slices rounds. Grids are relative to the largest entry, and so is
the bound of what is left out.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from iresnet_jax.maths.double_double import UNIT, DoubleDouble, two_sum
from iresnet_jax.maths.upward_rounding import UP

Array = np.ndarray
_LEFT, _RIGHT = 4, 3  # slices of the left and of the right factor


class Sliced(NamedTuple):
    """Kernels of linear maps, one for each entry of the leading axis, with outputs on the last.

    Attributes:
        slices: Three slices, the largest first.
        largest: Power of two that no entry of an output's kernel exceeds.
        rest: Largest entry of it that is left behind the slices; 0 for kernels of float32 without tiny entries.
        num_terms: Terms of the sum for an output.
    """

    slices: tuple[Float[Array, "k ... m"], ...]
    largest: Float[Array, "k m"]
    rest: Float[Array, "k m"]
    num_terms: int

    @classmethod
    def of(cls, kernel: Float[Array, "k ... m"]) -> "Sliced":
        """Slices of kernels, on one grid an output."""
        axes, num_terms = tuple(range(1, kernel.ndim - 1)), math.prod(kernel.shape[1:-1])
        largest = _power_of_two(np.max(np.abs(kernel), axis=axes, keepdims=True, initial=0))
        *slices, (_, rest) = _cut(DoubleDouble.of(kernel), largest, _bits(num_terms), _RIGHT)
        shape = (len(kernel), kernel.shape[-1])
        left_out = np.max(np.abs(rest.high), axis=axes, initial=0)
        return cls(tuple(part for part, _ in slices), largest.reshape(shape), left_out.reshape(shape), num_terms)


def product(
    x: DoubleDouble, kernel: Sliced, apply: Callable[[Array, Array], Any]
) -> tuple[DoubleDouble, Float[Array, "k b m"]]:
    r"""``W x`` of double-double inputs ``(k, b, ...)``, and a bound of the error of each entry, by output.

    With ``beta`` bits a slice, the entries behind the first ``i`` slices are at most ``2^(-i beta - 1)`` times the largest one.
    Pairs ``(i, j)`` of slices with ``i + j <= 5`` are multiplied: nine products of float64. Those left out are the tail behind
    four slices of ``x`` with the first one of ``W``, behind three with the second, and behind two with the third. Together they
    are at most ``(1/2 + 1/4 + 1/4) 2^(-4 beta)`` of the product of the largest entries, for each of ``n`` terms.

    Args:
        x: Inputs.
        kernel: The linear maps.
        apply: ``(inputs (k, i, b, ...), kernels (k, ...)) -> outputs (k, i, b, ..., m)``, the linear maps in float64. Every
            output is a sum of at most ``num_terms`` products; as all partial sums are exact, their order is free.
    """
    beta = _bits(kernel.num_terms)
    scale = _power_of_two(np.max(np.abs(x.high), axis=tuple(range(2, x.high.ndim)), keepdims=True, initial=0))
    left = np.stack([part for part, _ in list(_cut(x, scale, beta, _LEFT))[:_LEFT]], axis=1)
    parts = [np.asarray(apply(left[:, : _LEFT - j], right)) for j, right in enumerate(kernel.slices)]
    total = None
    for size in range(_LEFT):
        for j in range(min(size + 1, _RIGHT)):
            part = DoubleDouble.of(parts[j][:, size - j])
            total = part if total is None else total + part
    assert total is not None
    left_out = kernel.largest * (2.0 ** (-4 * beta) + 16 * UNIT) + kernel.rest
    return total, kernel.num_terms * scale.reshape(*scale.shape[:2], 1) * left_out[:, None] * UP


def _bits(num_terms: int) -> int:
    """Bits of a slice: sums of ``n`` products of integers up to ``2^beta`` stay within ``2^53``."""
    return (53 - int(np.ceil(np.log2(max(num_terms, 1))))) // 2


def _cut(x: DoubleDouble, scale: Array, bits: int, num: int) -> Iterator[tuple[Array, DoubleDouble]]:
    """Slices of ``x`` and what is left behind each, and last nothing with the rest; ``|x| <= scale``, a power of two."""
    rest = x
    for i in range(1, num + 1):
        grid = scale * 2.0 ** (-bits * i)
        part = np.rint(rest.high / grid) * grid
        rest = DoubleDouble(*two_sum(rest.high - part, rest.low))
        yield part, rest
    yield np.zeros(()), rest


def _power_of_two(x: Array) -> Array:
    """The least power of two from ``x >= 0`` on; a harmless one for 0."""
    mantissa, exponent = np.frexp(np.where((x > 0) & np.isfinite(x), x, 1.0))
    return np.ldexp(1.0, exponent - (mantissa == 0.5)).astype(np.float64)
