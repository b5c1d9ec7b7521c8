"""Rounding upwards, for numbers that must not end below the bound that they stand for."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped


def at_least(value: Any, dtype: Any = None) -> Shaped[Array, "..."]:
    """A number or array in a float type, no smaller than it was where that type cannot hold it.

    Args:
        value: Numbers of Python or NumPy, or a JAX array, which may be traced.
        dtype: The type; by default the value's if that is one of floats which JAX uses, else JAX's default.
    """
    largest = jnp.dtype(jnp.result_type(float))
    given = getattr(value, "dtype", largest)
    kept = jnp.issubdtype(given, jnp.floating) and given.itemsize <= largest.itemsize
    dtype = jnp.dtype(dtype or (given if kept else largest))
    if isinstance(value, jax.Array):
        if value.dtype == dtype:
            return value
        nearest = value.astype(dtype)
        constant = jax.lax.stop_gradient(nearest)
        gap = jnp.nextafter(constant, dtype.type(np.inf)) - constant
        return nearest + jnp.where(constant.astype(value.dtype) < value, gap, 0)
    exact = np.asarray(value, np.float64)
    with np.errstate(over="ignore"):
        nearest = exact.astype(dtype)
    return jnp.asarray(np.where(nearest < exact, np.nextafter(nearest, dtype.type(np.inf)), nearest))


def rounded_up(value: Any, num_roundings: int = 4) -> Shaped[Array, "..."]:
    """`value` times enough to make up for that many roundings of relative size eps/2, and for this product's."""
    value = jnp.asarray(value)
    return value * (1 + (num_roundings + 2) * float(jnp.finfo(value.dtype).eps))
