"""Random keys: typed keys pass checks, legacy `jax.random.PRNGKey` keys are converted, and examples
have keys of their own.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key, Num


def typed_key(key: Any) -> Key[Array, "..."]:
    """A typed key, or an array of them; legacy keys of `jax.random.PRNGKey` are converted."""
    dtype = getattr(key, "dtype", None)
    if dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key):
        return key
    if dtype == jnp.uint32 and key.shape[-1:] == (2,):
        return jax.random.wrap_key_data(key)
    raise ValueError(f"key must be a key such as jax.random.key(0), got {key!r}")


def check_keys(key: Any, num: int) -> Key[Array, "..."]:
    """One typed key, or ``num`` keys, one for each example; anything else raises ``ValueError``."""
    key = typed_key(key)
    if key.shape not in ((), (num,)):
        raise ValueError(
            f"there must be one key, or one for each of {num} examples, got keys of "
            f"shape {key.shape}"
        )
    return key


def keys_of_examples(x: Num[Array, "b ..."]) -> Key[Array, " b"]:
    """A key for each example from its own bits in single precision, so that its random numbers
    depend on nothing else, and those of different examples are independent.
    """
    numbers = x.astype(jnp.float32).reshape(len(x), -1)
    numbers = jnp.where(numbers == 0, 0.0, numbers)  # 0 and -0 are equal
    bits = jax.lax.bitcast_convert_type(numbers, jnp.uint32)
    # Products modulo 2^32 with odd numbers of each entry, after a mixing of each entry's bits.
    factors = np.random.default_rng(0).integers(2**31, size=(2, bits.shape[1]), dtype=np.uint32)
    mixed = (bits ^ (bits >> 16)) * jnp.uint32(0x45D9F3B)
    mixed = mixed ^ (mixed >> 16)
    first, second = (jnp.sum(mixed * (2 * each[None] + 1), axis=1) for each in jnp.asarray(factors))
    return jax.vmap(lambda a, b: jax.random.fold_in(jax.random.fold_in(jax.random.key(0), a), b))(
        first, second
    )
