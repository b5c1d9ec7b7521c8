r"""Integers as points of [0, 1): level ``k`` of ``n`` fills the cell ``[k / n, (k + 1) / n)``.

Uniform noise makes a density of the continuous points a lower bound of the levels' log-likelihood
(Theis et al. 2016, sec. 3.1): the cells of ``n x`` have volume 1, so ``E_u[log p(n x)] <= log
P(k)`` by Jensen's inequality.

`Marginals` of `iresnet_jax.bijections.marginals` does so for entries of vectors, such as ages in
years.
"""

import math
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Integer, Key, Num, UInt8

from iresnet_jax.bijections.bijection import Bijection, no_inverse_error, no_logdet_error
from iresnet_jax.bijections.enclosure import Enclosure
from iresnet_jax.maths.keys import check_keys


def cells(num_levels: int, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """Returns the smallest and the largest float of each level's cell.

    Tables instead of arithmetic: ``k / n`` rounds differently once a compiler multiplies by ``1 /
    n``, and a float at the edge of a cell would then change its level.
    """
    if not 2 <= num_levels <= 256:
        raise ValueError(
            f"num_levels must lie in [2, 256], got {num_levels}: 8-bit data have 256 levels"
        )
    edges = (np.arange(num_levels + 1) / num_levels).astype(dtype)
    return edges[:-1], np.nextafter(edges[1:], np.zeros((), dtype))


def dequantize(
    key: Key[Array, "..."], x: Integer[Array, "b ..."], num_levels: int = 256
) -> Float[Array, "b ..."]:
    r"""Adds uniform noise to integers: ``(x + u) / num_levels`` with ``u ~ U[0, 1)`` for each
    entry.

    Uria et al. 2013; Theis et al. 2016, section 3.1. The result is float32 and lies in the cell of
    ``x`` after rounding too: it is strictly below 1, and `quantize` returns ``x`` exactly.

    Args:
        key: One typed key, or one per example, of shape ``(b,)``: an example's noise then does not
            depend on the batch.
        x: Integers in ``[0, num_levels)``. Others, which cannot be refused under ``jit``, become
            NaN.
        num_levels: Number of values an entry can take, 2 to 256.
    """
    return into_cells(uniform(key, x.shape, jnp.float32), x, num_levels)


def into_cells(
    noise: Float[Array, "b ..."], x: Integer[Array, "b ..."], num_levels: int
) -> Float[Array, "b ..."]:
    """``(x + noise) / num_levels`` for noise in [0, 1], within the cell of ``x`` after rounding
    too; NaN for invalid levels.
    """
    smallest, largest = cells(num_levels, np.dtype(noise.dtype))
    level = x.astype(jnp.int32)
    index = jnp.clip(level, 0, num_levels - 1)
    # The sum is rounded: in float32 one u in 131072 would lift level 255 to 1. Hence the minimum.
    y = jnp.minimum(jnp.asarray(smallest)[index] + noise / num_levels, jnp.asarray(largest)[index])
    return jnp.where(level == index, y, jnp.nan)


def uniform(key: Any, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
    """Numbers in [0, 1), from one key or from one per example; others raise ``ValueError``."""
    key = check_keys(key, shape[0])
    if key.ndim == 0:
        return jax.random.uniform(key, shape, dtype)
    return jax.vmap(lambda own: jax.random.uniform(own, shape[1:], dtype))(key)


def quantize(x: Float[Array, "..."], num_levels: int = 256) -> UInt8[Array, "..."]:
    """Returns the level whose cell holds ``x``: ``floor(num_levels x)``, free of its rounding
    errors.

    Numbers outside of [0, 1), as in a model's samples, are clipped to the nearest level; NaN
    becomes the highest.
    """
    smallest, _ = cells(num_levels, x.dtype)
    level = jnp.searchsorted(jnp.asarray(smallest), x, side="right") - 1
    return jnp.maximum(level, 0).astype(jnp.uint8)


def cell_centers(x: Integer[Array, "b ..."], num_levels: int = 256) -> Float[Array, "b ..."]:
    """``(x + 1/2) / num_levels``: levels without noise, for results that should not depend on
    noise; NaN out of range.
    """
    return (known_levels(x, num_levels) + 0.5) / num_levels


def known_levels(x: Integer[Array, "b ..."], num_levels: int) -> Float[Array, "b ..."]:
    """Levels as floats; NaN out of range."""
    level = x.astype(jnp.int32)  # 256 does not fit 8 bits
    return jnp.where(
        (level >= 0) & (level < num_levels), level.astype(jnp.result_type(float)), jnp.nan
    )


def check_levels(
    x: Num[Array, "b ..."] | Num[np.ndarray, "b ..."], num_levels: int, event_shape: tuple[int, ...]
) -> None:
    """Raises ``ValueError`` unless ``x`` is a batch of images of integer levels in ``[0,
    num_levels)``.

    Only concrete values are checked: under ``jit`` levels out of range become NaN instead.
    """
    wanted = (
        f"images of shape (batch, {', '.join(map(str, event_shape))}) with integer levels 0 "
        f"to {num_levels - 1}"
    )
    got = None
    if x.shape[1:] != tuple(event_shape):
        got = f"an array of shape {x.shape}"
    elif not jnp.issubdtype(x.dtype, jnp.integer):
        got = f"{x.dtype}: undo the scaling to [0, 1] (of a density, model.continuous takes [0, 1))"
    elif x.size and not isinstance(x, jax.core.Tracer):
        known = np.asarray(x)  # under jit, JAX's operations would trace concrete arrays
        if known.min() < 0 or known.max() >= num_levels:
            got = f"levels from {known.min()} to {known.max()}"
    if got:
        raise ValueError(f"the model takes {wanted}, got {got}")


class Dequantize(Bijection):
    r"""From integer levels to [0, 1), with a new noise at each forward pass: a bijection in
    distribution. `forward` alone gives the middle of a cell.

    ``log|det| = -D log num_levels`` from the unit cubes of the levels to [0, 1).
    """

    def __init__(self, num_levels: int):
        self.num_levels = num_levels

    def forward(self, x):
        """`cell_centers`."""
        return cell_centers(x, self.num_levels)

    def forward_and_logdet(self, x, key):
        """`dequantize`, and the logarithm of the cells' volume."""
        u = dequantize(key, x, self.num_levels)
        return u, self._log_volume(u), no_logdet_error(u)

    def inverse(self, y):
        """`quantize`."""
        return quantize(y, self.num_levels), no_inverse_error(y)

    def inverse_and_logdet(self, y, key=None):
        """`quantize`, and minus the logarithm of the cells' volume."""
        x, info = self.inverse(y)
        return x, -self._log_volume(y), no_logdet_error(y), info

    def _log_volume(self, u):
        return jnp.full(len(u), -math.prod(u.shape[1:]) * math.log(self.num_levels), u.dtype)


def certain_levels(
    x: Integer[np.ndarray, "b ..."], enclosure: Enclosure, num_levels: int
) -> Bool[np.ndarray, "b ..."]:
    """Whether every point of the enclosure has the integer level ``x``, whose cell is ``[x, x + 1)
    / n``.
    """
    ends = (
        np.nextafter(num_levels * enclosure.low, -np.inf),
        np.nextafter(num_levels * enclosure.high, np.inf),
    )
    low, high = (np.clip(np.floor(end), 0, num_levels - 1) for end in ends)
    return (low == high) & (low == np.asarray(x, np.float64))
