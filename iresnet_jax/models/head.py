"""The head of a classifier: BatchNorm, ReLU, average over all positions, linear; and the loss of its logits."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Key

from iresnet_jax.bijections.actnorm import channel_moments

BATCH_NORM_EPS = 1e-5

Statistics = Mapping[str, Float[Array, " c"]]  # "mean" and "var" of every channel


def batch_statistics(x: Float[Array, "b ... c"], *, axis_name: str | None = None) -> dict[str, Float[Array, " c"]]:
    """Mean and (biased) variance of every channel over all positions and the batch, which may be spread over a mapped axis."""
    mean, var = channel_moments(x, axis_name)
    return {"mean": mean, "var": var}


def apply_head(params: Any, statistics: Statistics, features: Float[Array, "b ... c"]) -> Float[Array, "b k"]:
    """Logits of features.

    BatchNorm is ``scale (x - mean) / sqrt(var + eps) + bias`` by channel (Ioffe and Szegedy 2015).

    Args:
        params: ``{"norm": {"scale", "bias"}, "linear": {"kernel", "bias"}}``.
        statistics: Statistics of the batch in training, see `batch_statistics`; their running averages after it.
        features: Array with channels last.
    """
    norm, linear = params["norm"], params["linear"]
    mean, var, scale, bias = (
        by_channel(a, features) for a in (statistics["mean"], statistics["var"], norm["scale"], norm["bias"])
    )
    h = jax.nn.relu((features - mean) * (scale * lax.rsqrt(var + BATCH_NORM_EPS)) + bias)
    pooled = jnp.mean(h, axis=tuple(range(1, h.ndim - 1)))
    return pooled @ linear["kernel"] + linear["bias"].reshape(1, -1)


def initial_head(key: Key[Array, ""], num_channels: int, num_classes: int) -> dict[str, dict[str, Array]]:
    """A head that normalises, with logits of variance about one half."""
    kernel = jax.random.normal(key, (num_channels, num_classes)) / jnp.sqrt(num_channels)
    norm = {"scale": jnp.ones(num_channels), "bias": jnp.zeros(num_channels)}
    return {"norm": norm, "linear": {"kernel": kernel, "bias": jnp.zeros(num_classes)}}


def cross_entropy(logits: Float[Array, "b k"], labels: Int[Array, " b"], *, label_smoothing: float = 0.0) -> Float[Array, " b"]:
    """``-sum_k q_k log p_k`` in nats with ``q = (1 - s) onehot + s / K`` (Szegedy et al. 2016, sec. 7).

    Raises:
        ValueError: If ``label_smoothing``, which is ``s``, is not in [0, 1).
    """
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing must lie in [0, 1), got {label_smoothing}: 0 is none, .1 is usual")
    log_p = jax.nn.log_softmax(logits)
    of_label = jnp.take_along_axis(log_p, labels[:, None], axis=1)[:, 0]
    return -(1 - label_smoothing) * of_label - label_smoothing * jnp.mean(log_p, axis=1)


def by_channel(values: tuple[float, ...] | Float[Array, " c"], x: Array) -> Float[Array, "..."]:
    """Gives one value a channel, or one for all, as many axes as ``x``."""
    return jnp.asarray(values, x.dtype).reshape((1,) * (x.ndim - 1) + (-1,))
