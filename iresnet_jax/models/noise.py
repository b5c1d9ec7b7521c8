r"""Noise of variational dequantisation (Ho et al. 2019, sec. 3.1): where in its cell a level lies,
given the whole image.

    ``e ~ logistic``,   ``u = sigmoid(F(e; h(x)))``,   ``log q(u | x) = log s(e) - log|det dF/de| -
    log s(F(e))``

with ``s = sigmoid'``, the density of the logistic distribution, and ``F`` a residual flow whose
blocks are contractions. So ``q(. | x)`` is a density on ``(0, 1)^d`` whatever ``h``, and ``log P(x)
>= E[log p(x + u) - log q(u | x)]``. Uniform noise is the case ``F(e) = e``, where training starts.

``h`` is a network without a constraint, see `contexts.apply_network`. For every pixel of an image
it takes the square window of levels around it, zero beyond the border; of a vector it takes all.
Each layer of ``F`` adds a linear map of its output.

Weights of the flow's stages stand beside those of the density's own, under names that begin with
`PREFIX`.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Integer, Key

from iresnet_jax.bijections.bijection import Bijection
from iresnet_jax.bijections.dequantize import cell_centers, into_cells
from iresnet_jax.bijections.logit import log_logistic
from iresnet_jax.maths.keys import check_keys
from iresnet_jax.maths.logdet_estimator import LogdetInfo
from iresnet_jax.models import contexts
from iresnet_jax.models.architecture import PREFIX, FlowSpec
from iresnet_jax.models.contexts import Network, apply_network


def weights_of(weights: Mapping[str, Any]) -> dict[str, Any]:
    """The weights of the flow of noise alone, or their bounds, by the names that they have in
    it.
    """
    return {
        name.removeprefix(PREFIX): block
        for name, block in weights.items()
        if name.startswith(PREFIX)
    }


def initial_network(spec: FlowSpec, key: Key[Array, ""]) -> Network:
    """Weights of the network ``h``; empty without variational noise."""
    if spec.noise is None:
        return {}
    *space, channels = spec.event_shape
    return contexts.initial_network(
        key, channels * spec.noise.window ** len(space), spec.noise.network
    )


def features(
    spec: FlowSpec, network: Network, x: Integer[Array, "b ..."], num_levels: int
) -> Float[Array, "b ... k"]:
    """``h(x)``: a vector for every pixel, or for the example if it is a vector."""
    values = (2 * cell_centers(x, num_levels) - 1).astype(network["skip"]["kernel"].dtype)
    if x.ndim == 2:
        return apply_network(network, values)
    assert spec.noise is not None
    window = (spec.noise.window, spec.noise.window)
    around = lax.conv_general_dilated_patches(
        values, window, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    found = apply_network(network, around.reshape(math.prod(around.shape[:-1]), around.shape[-1]))
    return found.reshape(*around.shape[:-1], found.shape[-1])


def place_and_logdet(
    flow: Bijection,
    x: Integer[Array, "b ..."],
    key: Key[Array, "..."],
    key_probe: Key[Array, "..."],
    num_levels: int,
    dtype: Any,
) -> tuple[Float[Array, "b ..."], Float[Array, " b"], LogdetInfo]:
    """Levels as points of [0, 1), ``-log q(u | x) - d log(num_levels)``, and its error by that of
    the log-determinant.

    The flow is ``F`` given the features of these examples. Keys, of noise and of probes, are one or
    one per example.
    """
    start = _logistic(x, key, dtype)
    end, log_det, info = flow.forward_and_logdet(start, key_probe)
    log_det += jnp.sum(log_logistic(end) - log_logistic(start.reshape(end.shape)), axis=1)
    volume = end.shape[1] * jnp.log(jnp.asarray(num_levels, end.dtype))
    return into_cells(jax.nn.sigmoid(end.reshape(x.shape)), x, num_levels), log_det - volume, info


def _logistic(x: Array, key: Key[Array, "..."], dtype: Any) -> Array:
    """Logistic numbers of the shape of ``x``, the same in every precision, from one key or from
    one per example.
    """
    key = check_keys(key, len(x))
    if key.ndim == 0:
        return jax.random.logistic(key, x.shape, jnp.float32).astype(dtype)
    return jax.vmap(lambda own: jax.random.logistic(own, x.shape[1:], jnp.float32))(key).astype(
        dtype
    )
