r"""Rounding upwards, for numbers that must not fall below the bound that they represent.

Certificates multiply a bound that they computed in float64 by `UP`. A sum of ``n`` positive terms
rounds by at most ``gamma_n = n u / (1 - n u)`` of it (Higham 2002, Lemma 3.1), less than ``2^-32``
for a million: `UP` covers such a sum and the rounding of a few operations around it. Sums whose
terms cancel take `gamma` times the sum of the absolute terms instead. `at_least` and `rounded_up`
round numbers of any float type up, traced ones too.
"""

import decimal
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Shaped

UP = 1 + 2.0**-30
U = 2.0**-53  # relative error of one rounding to float64


def gamma(num_roundings: int, dtype: Any = np.float64) -> float:
    """``gamma_n = n u / (1 - n u)``, rounded up: the relative error that ``n`` roundings can add
    up to (Higham 2002).
    """
    nu = num_roundings * float(jnp.finfo(dtype).eps) / 2
    return nu / (1 - nu) * (1 + 8 * U)


def at_least(value: Any, dtype: Any = None) -> Shaped[Array, "..."]:
    """A number or array in a float type, rounded up where the type cannot hold it.

    Args:
        value: Numbers of Python or NumPy, or a JAX array, which may be traced.
        dtype: The type; by default the value's if it is a float type that JAX uses, else JAX's
            default.
    """
    largest = jnp.dtype(jnp.result_type(float))
    given = getattr(value, "dtype", largest)
    kept = jnp.issubdtype(given, jnp.floating) and given.itemsize <= largest.itemsize
    dtype = jnp.dtype(dtype or (given if kept else largest))
    if isinstance(value, jax.Array):
        if value.dtype == dtype:
            return value
        nearest = value.astype(dtype)
        constant = lax.stop_gradient(nearest)
        gap = jnp.nextafter(constant, dtype.type(np.inf)) - constant
        return nearest + jnp.where(constant.astype(value.dtype) < value, gap, 0)
    exact = np.asarray(value, np.float64)
    with np.errstate(over="ignore"):
        nearest = exact.astype(dtype)
    return jnp.asarray(
        np.where(nearest < exact, np.nextafter(nearest, dtype.type(np.inf)), nearest)
    )


def said_up(value: float, digits: int) -> str:
    """An upper bound in words, rounded up to so many significant digits."""
    if not math.isfinite(value):
        return f"{value:g}"
    context = decimal.Context(prec=digits, rounding=decimal.ROUND_CEILING)
    return f"{float(context.create_decimal_from_float(float(value))):.{digits}g}"


def rounded_up(value: Any, num_roundings: int = 4) -> Shaped[Array, "..."]:
    """``value`` times a factor that covers ``num_roundings`` roundings of relative size eps/2, and
    the rounding of this product.
    """
    value = jnp.asarray(value)
    return value * (1 + (num_roundings + 2) * float(jnp.finfo(value.dtype).eps))


def lipschitz_at_least(value: Any, dtype: Any = None) -> Shaped[Array, "..."]:
    """A Lipschitz bound by `at_least`; infinite, so that it promises nothing, where it is negative
    or NaN.
    """
    bound = at_least(value, dtype)
    return jnp.where(bound >= 0, bound, jnp.inf)


def as_floats(batch: Any) -> Float[Array, "b ..."]:
    """A batch as a JAX array of floats: lists, NumPy arrays and integers are converted."""
    batch = jnp.asarray(batch)
    return (
        batch if jnp.issubdtype(batch.dtype, jnp.floating) else batch.astype(jnp.result_type(float))
    )


def power_of_two(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """The largest power of two up to ``x > 0``, exactly (the exponent's bits), as a constant; 1
    at 0 and below ``tiny``.

    For numbers it is at most ``1 / tiny``: XLA divides by multiplying with the inverse, which would
    be 0.
    """
    wide = lax.stop_gradient(x).astype(jnp.promote_types(x.dtype, jnp.float32))
    integer, mask = (
        (jnp.int32, 0x7F800000) if wide.dtype == jnp.float32 else (jnp.int64, 0x7FF0000000000000)
    )
    bits = lax.bitcast_convert_type(wide, integer)
    power = lax.bitcast_convert_type(bits & integer(mask), wide.dtype)
    largest = 1 / jnp.finfo(wide.dtype).tiny
    power = jnp.where(power == 2 * largest, largest, power)
    return jnp.where(power > 0, power, 1).astype(x.dtype)


def euclidean_norm(x: Float[Array, "..."], axis: int | Sequence[int]) -> Float[Array, "..."]:
    """``sqrt(sum x^2)`` over some axes; squares neither overflow nor underflow, as a power of two
    is factored out.
    """
    axis = (axis,) if isinstance(axis, int) else tuple(axis)
    largest = jnp.max(jnp.abs(lax.stop_gradient(x)), axis=axis, keepdims=True, initial=0)
    scale = power_of_two(jnp.where(jnp.isfinite(largest), largest, 1))
    return jnp.sqrt(jnp.sum((x / scale) ** 2, axis=axis)) * jnp.squeeze(scale, axis)
