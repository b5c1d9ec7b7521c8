r"""From integers to a density and back: dequantisation, data transforms, priors, bits per dimension.

Integers ``0 .. num_levels - 1`` become numbers in [0, 1), level ``k`` filling the cell
``[k / num_levels, (k + 1) / num_levels)``. Log-densities are in nats and with respect to that unit interval;
:func:`bits_per_dim` turns them into bits per dimension of the integers.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Integer, Key, UInt8


def _cells(num_levels: int, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """Returns the smallest and the largest float of each level's cell.

    Tables instead of arithmetic: ``k / n`` rounds differently once a compiler multiplies by ``1 / n``, and a float at
    the edge of a cell would then change its level.
    """
    if not 2 <= num_levels <= 256:
        raise ValueError(f"num_levels must lie in [2, 256], got {num_levels}: 8-bit data have 256 levels")
    edges = (np.arange(num_levels + 1) / num_levels).astype(dtype)
    return edges[:-1], np.nextafter(edges[1:], np.zeros((), dtype))


def dequantize(
    key: Key[Array, "..."], x: Integer[Array, "b ..."], num_levels: int = 256, *, dtype: DTypeLike = jnp.float32
) -> Float[Array, "b ..."]:
    r"""Adds uniform noise to integers: ``(x + u) / num_levels`` with ``u ~ U[0, 1)`` for each entry.

    Uria et al. 2013; Theis et al. 2016, section 3.1. The result lies in the cell of ``x`` after rounding too, so it
    is strictly below 1 and :func:`quantize` returns ``x`` exactly.

    Args:
        key: One typed key (``jax.random.key``), or one an example, of shape ``(b,)``: an example's noise then does
            not depend on the rest of the batch.
        x: Integers in ``[0, num_levels)``. Others, which cannot be refused under ``jit``, become NaN.
        num_levels: Number of values an entry can take, 2 to 256.
        dtype: float32 or float64 of the result.

    Returns:
        Numbers in [0, 1).

    Raises:
        ValueError: If ``key`` is of another kind or shape, ``num_levels`` is out of range or ``dtype`` is another.

    Example:
        >>> x = dequantize(jax.random.key(0), jnp.zeros((8, 32, 32, 3), jnp.uint8))
    """
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key) or key.shape not in ((), x.shape[:1]):
        raise ValueError(
            f"key must be a typed key of shape () or {x.shape[:1]}, got {key.dtype} of shape {key.shape}: "
            "pass jax.random.key(seed), or split it once for each example"
        )
    dtype = jax.dtypes.canonicalize_dtype(dtype)
    if dtype not in (jnp.float32, jnp.float64):
        raise ValueError(f"dtype must be float32 or float64, got {dtype}: the others cannot resolve the noise")
    smallest, largest = _cells(num_levels, dtype)

    if key.shape:
        noise = jax.vmap(lambda example_key: jax.random.uniform(example_key, x.shape[1:], dtype))(key)
    else:
        noise = jax.random.uniform(key, x.shape, dtype)
    level = x.astype(jnp.int32)
    index = jnp.clip(level, 0, num_levels - 1)
    # The sum is rounded: in float32 one u in 131072 would lift level 255 to 1. Hence the minimum.
    y = jnp.minimum(jnp.asarray(smallest)[index] + noise / num_levels, jnp.asarray(largest)[index])
    return jnp.where(level == index, y, jnp.nan)


def quantize(x: Float[Array, "..."], num_levels: int = 256) -> UInt8[Array, "..."]:
    """Returns the level whose cell holds ``x``: ``floor(num_levels x)``, free of its rounding errors.

    Args:
        x: Numbers in [0, 1); a model's samples outside are clipped to the nearest level.
        num_levels: Number of levels, 2 to 256.

    Returns:
        Integers in ``[0, num_levels)``. NaN has no level and becomes the highest.

    Raises:
        ValueError: If ``num_levels`` is out of range.

    Example:
        >>> quantize(jnp.array([0.0, 0.5, 0.999]))
        Array([  0, 128, 255], dtype=uint8)
    """
    smallest, _ = _cells(num_levels, x.dtype)
    level = jnp.searchsorted(jnp.asarray(smallest), x, side="right") - 1
    return jnp.maximum(level, 0).astype(jnp.uint8)


def logit_forward_and_logdet(x: Float[Array, "b ..."], alpha: float) -> tuple[Float[Array, "b ..."], Float[Array, " b"]]:
    r"""Spreads the unit interval over the real line.

    ``y = log(s / (1 - s))`` with ``s = alpha + (1 - 2 alpha) x``, and
    ``log|det dy/dx| = sum log((1 - 2 alpha) / (s (1 - s)))`` (Dinh et al. 2017, section 4.1). ``1 - s`` is computed
    from ``1 - x``, which keeps its digits for ``x`` near 1.

    Args:
        x: Numbers in [0, 1].
        alpha: Distance of ``s`` from 0 and 1, in (0, 1/2); 1e-6 is usual for MNIST and 0.05 for natural images.

    Returns:
        The logits and the exact log-determinant.

    Raises:
        ValueError: If ``alpha`` is out of range.

    Example:
        >>> y, logdet = logit_forward_and_logdet(x, alpha=0.05)
    """
    _check_alpha(alpha)
    log_s = jnp.log(alpha + (1 - 2 * alpha) * x)
    log_one_minus_s = jnp.log(alpha + (1 - 2 * alpha) * (1 - x))
    return log_s - log_one_minus_s, _sum_event(math.log1p(-2 * alpha) - log_s - log_one_minus_s)


def logit_inverse_and_logdet(y: Float[Array, "b ..."], alpha: float) -> tuple[Float[Array, "b ..."], Float[Array, " b"]]:
    r"""Inverts :func:`logit_forward_and_logdet`: ``x = (sigmoid(y) - alpha) / (1 - 2 alpha)``.

    ``log|det dx/dy| = sum log(sigmoid(y) sigmoid(-y) / (1 - 2 alpha))``, finite for any finite ``y``.

    Args:
        y: Logits. Beyond ``+-log((1 - alpha) / alpha)`` they map slightly outside [0, 1].
        alpha: The one of the forward map.

    Returns:
        The numbers and the exact log-determinant of the inverse.

    Raises:
        ValueError: If ``alpha`` is out of range.
    """
    _check_alpha(alpha)
    x = (jax.nn.sigmoid(y) - alpha) / (1 - 2 * alpha)
    return x, _sum_event(_log_logistic(y) - math.log1p(-2 * alpha))


def center_forward_and_logdet(x: Float[Array, "b ..."]) -> tuple[Float[Array, "b ..."], Float[Array, " b"]]:
    """Moves the unit interval to [-1/2, 1/2]: ``y = x - 1/2``, log-determinant 0."""
    return x - 0.5, jnp.zeros(x.shape[:1], x.dtype)


def center_inverse_and_logdet(y: Float[Array, "b ..."]) -> tuple[Float[Array, "b ..."], Float[Array, " b"]]:
    """Inverts :func:`center_forward_and_logdet`: ``x = y + 1/2``, log-determinant 0."""
    return y + 0.5, jnp.zeros(y.shape[:1], y.dtype)


class GaussianPrior(NamedTuple):
    """Independent normal distributions.

    Attributes:
        mean: One a dimension.
        log_std: Natural log of the standard deviation, one a dimension.
    """

    mean: Float[Array, " d"]
    log_std: Float[Array, " d"]


class LogisticPrior(NamedTuple):
    """Independent logistic distributions, with heavier tails than the normal.

    Attributes:
        mean: One a dimension.
        log_scale: Natural log of the scale, one a dimension; the standard deviation is ``pi / sqrt(3)`` times it.
    """

    mean: Float[Array, " d"]
    log_scale: Float[Array, " d"]


def gaussian_log_prob(params: GaussianPrior, z: Float[Array, "b d"]) -> Float[Array, " b"]:
    r"""Log-density ``-sum (t^2 / 2 + log_std + log(2 pi) / 2)`` with ``t = (z - mean) / std``.

    Args:
        params: The prior.
        z: One row an example.

    Returns:
        Natural log of the density, exact.

    Raises:
        ValueError: If ``params`` and ``z`` differ in their number of dimensions.

    Example:
        >>> prior = GaussianPrior(mean=jnp.zeros(48), log_std=jnp.zeros(48))
        >>> log_prob = gaussian_log_prob(prior, z)
    """
    standardised, log_std = _standardise(params, z)
    return jnp.sum(-0.5 * jnp.square(standardised) - log_std - 0.5 * math.log(2 * math.pi), axis=1)


def logistic_log_prob(params: LogisticPrior, z: Float[Array, "b d"]) -> Float[Array, " b"]:
    r"""Log-density ``sum (log sigmoid(t) + log sigmoid(-t) - log_scale)`` with ``t = (z - mean) / scale``.

    Both terms are softplus functions, so the tails are linear in ``|t|`` and nothing overflows.

    Args:
        params: The prior.
        z: One row an example.

    Returns:
        Natural log of the density, exact.

    Raises:
        ValueError: If ``params`` and ``z`` differ in their number of dimensions.
    """
    standardised, log_scale = _standardise(params, z)
    return jnp.sum(_log_logistic(standardised) - log_scale, axis=1)


def gaussian_sample(params: GaussianPrior, key: Key[Array, ""], n: int, temperature: float = 1.0) -> Float[Array, "{n} d"]:
    """Draws ``mean + temperature * std * e`` with ``e`` standard normal.

    Args:
        params: The prior.
        key: One typed key.
        n: Number of samples, at least 1.
        temperature: Factor on the standard deviation, at least 0, where every sample is the mean. 1 samples the prior.

    Returns:
        One row a sample.

    Raises:
        ValueError: If ``n`` or ``temperature`` is out of range.

    Example:
        >>> z = gaussian_sample(prior, jax.random.key(0), 64, temperature=0.7)
    """
    return _sample(params, key, n, temperature, jax.random.normal)


def logistic_sample(params: LogisticPrior, key: Key[Array, ""], n: int, temperature: float = 1.0) -> Float[Array, "{n} d"]:
    """Draws ``mean + temperature * scale * e`` with ``e`` standard logistic.

    Args:
        params: The prior.
        key: One typed key.
        n: Number of samples, at least 1.
        temperature: Factor on the scale, at least 0, where every sample is the mean. 1 samples the prior.

    Returns:
        One row a sample.

    Raises:
        ValueError: If ``n`` or ``temperature`` is out of range.
    """
    return _sample(params, key, n, temperature, jax.random.logistic)


def bits_per_dim(log_prob: Float[Array, " b"], num_dims: int, num_levels: int = 256) -> Float[Array, " b"]:
    r"""Converts the log-density of dequantised data to bits per dimension of the integers.

    ``-log_prob / (D ln 2) + log2(num_levels)``. The integer ``k`` owns the unit cube of ``v = num_levels x``, whose
    density is ``p_v(v) = p(x) / num_levels^D``, and its probability is ``P(k) = E_u[p_v(k + u)]`` for uniform ``u``. By
    Jensen's inequality ``log P(k) >= E_u[log p_v(k + u)]``: with uniform dequantisation the mean of the result is an
    upper bound of the discrete model's bits per dimension, tight only for a density constant on each cube.

    Args:
        log_prob: Natural log of the density of ``x`` in [0, 1)^D, with the log-determinants of all transforms since.
        num_dims: D, the number of entries of an example.
        num_levels: Number of levels of the integers; 1 gives plain bits per dimension of continuous data.

    Returns:
        Bits per dimension of each example.

    Raises:
        ValueError: If ``num_dims`` or ``num_levels`` is not positive.

    Example:
        >>> bits_per_dim(jnp.zeros(1), num_dims=3072)  # the uniform density needs all 8 bits
        Array([8.], dtype=float32)
    """
    if num_dims < 1 or num_levels < 1:
        raise ValueError(
            f"num_dims and num_levels must be at least 1, got {num_dims} and {num_levels}: "
            "num_dims is height x width x channels of the data"
        )
    return -log_prob / (num_dims * math.log(2)) + math.log2(num_levels)


def _check_alpha(alpha: float) -> None:
    if not 0 < alpha < 0.5:
        raise ValueError(f"alpha must lie in (0, 0.5), got {alpha}: the logit of 0 and 1 is infinite")


def _sum_event(value: Float[Array, "b ..."]) -> Float[Array, " b"]:
    return jnp.sum(value, axis=tuple(range(1, value.ndim)))


def _log_logistic(t: Float[Array, "..."]) -> Float[Array, "..."]:
    """Log-density of the standard logistic distribution, which is also ``log(sigmoid(t) sigmoid(-t))``."""
    return -jax.nn.softplus(t) - jax.nn.softplus(-t)


def _standardise(
    params: GaussianPrior | LogisticPrior, z: Float[Array, "b d"]
) -> tuple[Float[Array, "b d"], Float[Array, "1 d"]]:
    """Returns ``(z - mean) / scale``, and the log-scale with a batch axis."""
    mean, log_scale = params
    expected = z.shape[1:]
    if mean.shape != expected or log_scale.shape != expected:
        raise ValueError(
            f"the prior must have parameters of shape {expected} for z of shape {z.shape}, got {mean.shape} and "
            f"{log_scale.shape}: give every dimension its own"
        )
    return (z - mean[None]) * jnp.exp(-log_scale[None]), log_scale[None]


def _sample(params: GaussianPrior | LogisticPrior, key: Key[Array, ""], n: int, temperature: float, draw) -> Array:
    if n < 1 or temperature < 0:
        raise ValueError(
            f"n must be at least 1 and temperature at least 0, got {n} and {temperature}: "
            "a temperature below 1 concentrates the samples, 0 gives the mean"
        )
    mean, log_scale = params
    noise = draw(key, (n, *mean.shape), mean.dtype)
    return mean[None] + temperature * jnp.exp(log_scale[None]) * noise
