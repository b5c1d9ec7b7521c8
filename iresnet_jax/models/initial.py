"""A flow's first weights: random parameters, brought into the budget, and ActNorm fitted to a
batch.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from iresnet_jax.bijections import actnorm, reshape
from iresnet_jax.bijections.chain import chain
from iresnet_jax.maths.platforms import fast_compile
from iresnet_jax.models.architecture import FlowSpec
from iresnet_jax.models.contractions import Tree, freeze
from iresnet_jax.models.flow import Block, FlowWeights


def fit_actnorm(
    spec: FlowSpec,
    weights: FlowWeights,
    x: Float[Array, "b ..."],
    context: Float[Array, "b k"] | None = None,
    *,
    axis_name: str | None = None,
) -> tuple[dict[str, Block], Float[Array, "b d"]]:
    """Weights with ActNorm from data, each block's from what the blocks before it make of the
    batch, and the batch's latents.

    Args:
        spec: The architecture. Stages without ActNorm keep their fixed scale.
        weights: Constrained weights, whose own ActNorm is not used.
        x: A representative batch.
        context: Its contexts, if the model is conditional.
        axis_name: Mapped axis of devices that the batch is spread over, see `actnorm.initialize`.
    """
    fitted, latents = dict(weights), []
    for stage in spec.layout:

        def step(x, branch, stage=stage):
            params = stage.actnorm(actnorm.initialize(x, axis_name=axis_name))
            x, _ = actnorm.forward_and_logdet(params, x)
            return x + branch.given(context)(x), params

        branch = weights[stage.name].branch
        x, params = jax.lax.scan(step, chain(stage.reshapes).forward(x), branch)
        fitted[stage.name] = Block(params, branch)
        if stage.spec.factor_out:
            x, latent = reshape.split_channels(x)
            latents.append(reshape.flatten(latent))
    return fitted, jnp.concatenate([*latents, reshape.flatten(x)], axis=-1)


def with_actnorm(params: Tree, weights: FlowWeights) -> dict[str, Any]:
    """Parameters with the ActNorm of weights."""
    fitted = {name: block.actnorm._asdict() for name, block in weights.items()}
    return {
        name: {"blocks": {**stage["blocks"], "actnorm": fitted[name]}}
        for name, stage in params.items()
    }


@functools.partial(fast_compile, static_argnums=(0, 4, 5))
def initial_weights(
    spec: FlowSpec,
    key: Key[Array, ""],
    x: Float[Array, "b ..."],
    context: Float[Array, "b k"] | None = None,
    sharpness: float = 0.0,
    last_scale: float = 1.0,
) -> tuple[dict[str, Block], Float[Array, "b d"]]:
    """Fresh weights as `contractions.freeze` gives them, and the latents of the batch that ActNorm
    is fitted to.

    Arguments are those of `FlowSpec.initial_params` and of `fit_actnorm`.
    """
    # as in training, which draws power iterates from the second one
    key_params, _ = jax.random.split(key)
    params = spec.initial_params(key_params, sharpness=sharpness, last_scale=last_scale)
    return fit_actnorm(spec, freeze(spec, params), x, context)


def some(x: Any) -> Array:
    """At most 1,024 of the rows of an array, evenly spaced: enough to fit ActNorm to."""
    return jnp.asarray(x[:: -(-len(x) // 1024)])
