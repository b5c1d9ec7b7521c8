"""Unnormalised log-densities as they are given, and sentences about those that are none."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

LogDensity = Callable[[Array], Any]  # (b, ...) -> (b,)


def log_density_of(log_density: LogDensity, x: Any) -> Float[Array, " b"]:
    """The log-density of a batch.

    Raises:
        ValueError: If it is not one real number an example.
    """
    values = jnp.asarray(log_density(x))
    if values.shape != x.shape[:1] or not jnp.issubdtype(values.dtype, jnp.floating):
        raise ValueError(
            f"log_density must give one real number for each of {len(x)} examples, shape ({len(x)},), got {values.dtype} of "
            f"shape {values.shape}: a function of one example becomes one of batches by jax.vmap"
        )
    return values


def check_finite(values: Any, where: str) -> None:
    """Raises ``ValueError`` if log-densities are NaN or infinite; the message says how many are, and where."""
    if bad := int(np.sum(~np.isfinite(np.asarray(values)))):
        raise ValueError(not_finite(bad, len(values), where))


def not_finite(bad: int, num: int, where: str) -> str:
    """The sentence about log-densities that are not finite."""
    return (
        f"log_density is NaN or infinite at {bad} of {num} {where}: it must be finite wherever samples may fall; "
        "parameters with ends are to be mapped to the whole line first"
    )
