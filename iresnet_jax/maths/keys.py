"""Checks of random keys: typed keys pass, legacy `jax.random.PRNGKey` keys are converted."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key


def typed_key(key: Any) -> Key[Array, "..."]:
    """A typed key, or an array of them; legacy keys of `jax.random.PRNGKey` are converted."""
    dtype = getattr(key, "dtype", None)
    if dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key):
        return key
    if dtype == jnp.uint32 and key.shape[-1:] == (2,):
        return jax.random.wrap_key_data(key)
    got = repr(key) if isinstance(key, int) else f"a {type(key).__name__}"
    raise ValueError(
        f"key must be a key such as jax.random.key({key if isinstance(key, int) else 0}), got {got}"
    )


def single_key(key: Any) -> Key[Array, ""]:
    """`typed_key` of one key."""
    if (key := typed_key(key)).shape:
        raise ValueError(
            f"key must be a single key, got keys of shape {key.shape}: choose one, or "
            "loop over them"
        )
    return key


def check_keys(key: Any, num: int) -> Key[Array, "..."]:
    """One typed key, or ``num`` keys, one for each example; anything else raises ``ValueError``."""
    key = typed_key(key)
    if key.shape not in ((), (num,)):
        raise ValueError(
            f"there must be one key, or one for each of {num} examples, got keys of "
            f"shape {key.shape}"
        )
    return key
