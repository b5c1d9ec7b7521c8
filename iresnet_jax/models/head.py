"""The head of a classifier, and the loss of its logits.

"pooled" is BatchNorm, ReLU, average over all positions, linear. "linear" is products of all
features with unit vectors: the difference of two logits is ``|w_i - w_j|``-Lipschitz in the
features, at most by a factor of 2 (Singla et al. 2022).
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Key

from iresnet_jax.bijections.actnorm import channel_moments
from iresnet_jax.bijections.reshape import flatten

BATCH_NORM_EPS = 1e-5
HEADS = ("pooled", "linear")

Statistics = Mapping[str, Float[Array, " c"]]  # "mean" and "var" of every channel


def batch_statistics(
    x: Float[Array, "b ... c"], *, axis_name: str | None = None
) -> dict[str, Float[Array, " c"]]:
    """Mean and (biased) variance of every channel over all positions and the batch, which may be
    spread over a mapped axis.
    """
    mean, var = channel_moments(x, axis_name)
    return {"mean": mean, "var": var}


def statistics_of(
    params: Any, features: Float[Array, "b ... c"], *, axis_name: str | None = None
) -> dict[str, Any]:
    """What `apply_head` needs of a batch beside the parameters: ``{"head":
    batch_statistics(features)}``, nothing if linear.
    """
    return {"head": batch_statistics(features, axis_name=axis_name)} if "norm" in params else {}


def apply_head(
    params: Any, statistics: Mapping[str, Statistics], features: Float[Array, "b ... c"]
) -> Float[Array, "b k"]:
    """Logits of features.

    BatchNorm is ``scale (x - mean) / sqrt(var + eps) + bias`` by channel (Ioffe and Szegedy 2015).

    Args:
        params: ``{"norm": {"scale", "bias"}, "linear": {"kernel", "bias"}}``, of a linear head
            without "norm".
        statistics: `statistics_of` the batch in training; running averages after it.
        features: Array with channels last.
    """
    linear = params["linear"]
    if "norm" not in params:
        return flatten(features) @ _unit_columns(params) + linear["bias"].reshape(1, -1)
    norm, own = params["norm"], statistics["head"]
    mean, var, scale, bias = (
        by_channel(a, features) for a in (own["mean"], own["var"], norm["scale"], norm["bias"])
    )
    h = jax.nn.relu((features - mean) * (scale * lax.rsqrt(var + BATCH_NORM_EPS)) + bias)
    pooled = jnp.mean(h, axis=tuple(range(1, h.ndim - 1)))
    return pooled @ linear["kernel"] + linear["bias"].reshape(1, -1)


def _unit_columns(params: Any) -> Float[Array, "d k"]:
    kernel = params["linear"]["kernel"]
    return kernel / jnp.linalg.norm(kernel, axis=0, keepdims=True)


def distances(params: Any) -> Float[Array, "k k"]:
    """``|w_i - w_j|`` of a linear head: Lipschitz constants of differences of logits in the
    features.
    """
    unit = _unit_columns(params)
    same = jnp.eye(unit.shape[1], dtype=bool)
    # a root of 0 has no slope
    squares = jnp.where(same, 1, jnp.maximum(2 - 2 * unit.T @ unit, jnp.finfo(unit.dtype).eps))
    return jnp.where(same, 0, jnp.sqrt(squares))


def initial_head(
    key: Key[Array, ""], feature_shape: tuple[int, ...], num_classes: int, kind: str = "pooled"
) -> dict[str, dict[str, Array]]:
    """A random head, one of `HEADS`; logits of normalised features have a variance of about one
    half if it is pooled.
    """
    num = feature_shape[-1] if kind == "pooled" else math.prod(feature_shape)
    kernel = jax.random.normal(key, (num, num_classes)) / jnp.sqrt(num)
    linear = {"linear": {"kernel": kernel, "bias": jnp.zeros(num_classes)}}
    norms = {"linear": {}, "pooled": {"norm": {"scale": jnp.ones(num), "bias": jnp.zeros(num)}}}
    return {**norms[kind], **linear}


def cross_entropy(
    logits: Float[Array, "b k"], labels: Int[Array, " b"], *, label_smoothing: float = 0.0
) -> Float[Array, " b"]:
    """``-sum_k q_k log p_k`` in nats with ``q = (1 - s) onehot + s / K`` (Szegedy et al. 2016, sec.
    7); ``s`` is ``label_smoothing``.
    """
    log_p = jax.nn.log_softmax(logits)
    of_label = jnp.take_along_axis(log_p, labels[:, None], axis=1)[:, 0]
    return -(1 - label_smoothing) * of_label - label_smoothing * jnp.mean(log_p, axis=1)


def by_channel(values: tuple[float, ...] | Float[Array, " c"], x: Array) -> Float[Array, "..."]:
    """Gives one value a channel, or one for all, as many axes as ``x``."""
    return jnp.asarray(values, x.dtype).reshape((1,) * (x.ndim - 1) + (-1,))
