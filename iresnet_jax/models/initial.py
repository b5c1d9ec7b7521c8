"""A flow's first weights: random, within the budget, ActNorm fitted to a batch, every block certified."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from iresnet_jax.bijections.actnorm import ActNormParams
from iresnet_jax.maths.platforms import fast_compile
from iresnet_jax.models import contractions, flow, noise
from iresnet_jax.models.architecture import FlowSpec
from iresnet_jax.models.bounds import FlowWeights
from iresnet_jax.models.contractions import Tree

MOST = 1024  # examples of a batch that ActNorm is fitted to


def initial_weights(
    spec: FlowSpec,
    key: Key[Array, ""],
    x: Float[Array, "b ..."],
    context: Float[Array, "b k"] | None = None,
    *,
    sharp: bool = False,
    last_scale: float = 1.0,
) -> tuple[FlowWeights, Float[Array, "b d"]]:
    """Weights as `contractions.freeze` gives them, and the latents of the batch.

    Args:
        spec: The architecture.
        key: Source of the weights.
        x: A representative batch: ActNorm makes every channel that enters a branch zero on average, with variance 1.
        context: Contexts of the batch, if the model is conditional.
        sharp: Whether activations start sharper, see `BranchSpec.initial_weights`.
        last_scale: Initial factor on the last layer of each branch.
    """
    return _initial_weights((spec, sharp, last_scale), key, x, context)


@functools.partial(fast_compile, static_argnums=(0,))
def _initial_weights(
    what: tuple[FlowSpec, bool, float], key: Array, x: Array, context: Array | None
) -> tuple[FlowWeights, Array]:
    spec, sharp, last_scale = what
    options = {"sharp": sharp} if last_scale == 1 else {"sharp": sharp, "last_scale": last_scale}
    keys = jax.random.split(jax.random.split(key)[0], len(spec.stages))
    params = {stage.name: stage.initial_params(own, **options) for stage, own in zip(spec.layout, keys, strict=True)}
    params |= noise.initial_params(spec, jax.random.fold_in(key, 1))
    weights = contractions.freeze(spec, jax.tree.map(lambda leaf: leaf.astype(x.dtype), params))
    fitted, z = flow.fit_actnorm(spec, weights, x, context)
    fitted = {name: weights[name]._replace(actnorm=ActNormParams(**scales)) for name, scales in fitted.items()}
    return {**weights, **fitted}, z


def initial_iterates(spec: FlowSpec, key: Key[Array, ""]) -> Tree:
    """Random starts of the power iterations of all layers, as `contractions.constrain` takes them."""
    stages = zip(spec.all_stages, jax.random.split(key, len(spec.all_stages)), strict=True)
    found = {stage.name: stage.initial_iterates(own) for stage, own in stages}
    return {name: {"blocks": iterates} for name, iterates in found.items() if iterates}


def some(x: Any) -> Array:
    """At most `MOST` of the rows of an array, evenly spaced."""
    return jnp.asarray(x[:: -(-len(x) // MOST)])
