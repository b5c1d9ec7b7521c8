"""The one way to a new model: random weights, with norms, ActNorm, prior and a head's statistics
fitted to examples.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from iresnet_jax.bijections import reshape
from iresnet_jax.bijections.actnorm import ActNorm
from iresnet_jax.bijections.chain import Chain
from iresnet_jax.maths.keys import typed_key
from iresnet_jax.maths.platforms import fast_compile
from iresnet_jax.models import priors
from iresnet_jax.models.architecture import FlowSpec
from iresnet_jax.models.certificate import check_claims
from iresnet_jax.models.contexts import linear_regression, scaled, with_linear_mean
from iresnet_jax.models.contractions import ConstrainedFlow, Tree
from iresnet_jax.models.flow import Block, FlowWeights, flow_bijection
from iresnet_jax.models.free import ConstraintConfig, Free, exact_constraint
from iresnet_jax.models.model import MODELS

IMAGES, VECTORS = 1024, 20_000  # examples that a new model is fitted to, at most


def initial(
    spec: Any,
    key: Key[Array, ""],
    x: Any,
    *,
    context: Any = None,
    labels: Any = None,
    prior: Any = None,
    constraint: ConstraintConfig = ConstraintConfig(),
    sharpness: float = 0.0,
    last_scale: float = 1.0,
) -> Free:
    """Fresh parameters of a model, fitted to examples.

    Norms are iterated to their tolerance, and ActNorm is fitted. A prior with components is fitted
    to latents. Behind whitening, ActNorm is the identity and the prior has variance 1, as a fit to
    the same examples would undo the shrinkage of the covariance: the density starts as a normal
    one, and one with classes as linear discriminant analysis.

    Args:
        spec: The model.
        key: Source of the weights.
        x: Examples. Of many a part is taken: 20,000 vectors or 1024 images.
        context: Their contexts, of a conditional density.
        labels: Their classes, for the priors of classes behind whitening.
        prior: Prior that the model begins with as it is; None fits one of the spec's family.
        constraint: How blocks are constrained.
        sharpness: See `FeedforwardSpec.initial_weights`.
        last_scale: Initial factor on the last layer of each branch.
    """
    key_weights, key_noise, key_learned = jax.random.split(typed_key(key), 3)
    most = VECTORS if len(spec.flow.event_shape) == 1 else IMAGES
    x, context, labels = (
        None if rows is None else rows[:: -(-len(rows) // most)] for rows in (x, context, labels)
    )
    learned = dict(spec.initial_arrays(key_learned))
    statistics = learned.pop("statistics", {})
    if prior is not None:
        learned["prior"] = priors.trainable(prior)
    u, given = _inputs(spec, learned.get("network"), x, context, key_noise)
    if not np.all(np.isfinite(u)):
        name = type(getattr(spec, "transform", None)).__name__
        raise ValueError(f"examples are out of the range of their transform, {name}")
    fits_actnorm = not getattr(spec, "is_white", False)
    params, found, z = fresh(
        spec.flow, key_weights, u, given, constraint, sharpness, last_scale, fits_actnorm
    )
    check_claims(spec.flow, found.weights, u, given)
    if learned.get("network") and not fits_actnorm:
        c = np.asarray(scaled(spec.context, jnp.asarray(context)))
        coefficients = linear_regression(c, np.asarray(u))
        learned["network"] = with_linear_mean(learned["network"], coefficients)
        params = _less_first_features(spec.flow, params)
    fitted = spec.fitted(z, labels) if prior is None else {}
    statistics = fitted.pop("statistics", statistics)
    how = MODELS[type(spec)].how
    return Free({**params, **learned, **fitted}, found.spectral, statistics, spec, how, constraint)


def abstract(spec: Any, constraint: ConstraintConfig = ConstraintConfig()) -> Free:
    """`initial` with shapes and dtypes in place of arrays, which are not computed."""

    def create(key):
        learned = dict(spec.initial_arrays(key))
        statistics = learned.pop("statistics", {})
        params = {**spec.flow.initial_params(key), **learned}
        return params, spec.flow.initial_iterates(key), statistics

    params, iterates, statistics = jax.eval_shape(create, jax.random.key(0))
    return Free(params, iterates, statistics, spec, MODELS[type(spec)].how, constraint)


@functools.partial(fast_compile, static_argnums=(0, 4, 5, 6, 7))
def fresh(
    spec: FlowSpec,
    key: Key[Array, ""],
    x: Float[Array, "b ..."],
    context: Float[Array, "b k"] | None = None,
    constraint: ConstraintConfig = ConstraintConfig(),
    sharpness: float = 0.0,
    last_scale: float = 1.0,
    fits_actnorm: bool = True,  # noqa: FBT001, FBT002 (static)
) -> tuple[dict[str, Any], ConstrainedFlow, Float[Array, "b d"]]:
    """Random parameters of a flow, their constrained weights, and the latents of inputs that
    ActNorm is fitted to; models that differ in priors share a program.
    """
    key_params, key_iterates = jax.random.split(key)
    params = spec.initial_params(key_params, sharpness=sharpness, last_scale=last_scale)
    found = exact_constraint(constraint, spec)(params, spec.initial_iterates(key_iterates))
    if not fits_actnorm:
        return params, found, flow_bijection(spec, found.weights, context=context).forward(x)
    weights, z = fit_actnorm(spec, found.weights, x, context)
    return with_actnorm(params, weights), found._replace(weights=weights), z


def fit_actnorm(
    spec: FlowSpec,
    weights: FlowWeights,
    x: Float[Array, "b ..."],
    context: Float[Array, "b k"] | None = None,
) -> tuple[dict[str, Block], Float[Array, "b d"]]:
    """Weights with ActNorm from data, each block's from what the blocks before it make of the
    batch, and the batch's latents.

    Args:
        spec: The architecture. Stages without ActNorm keep their fixed scale.
        weights: Constrained weights, whose own ActNorm is not used.
        x: A representative batch.
        context: Its contexts, if the model is conditional.
    """
    fitted, latents = dict(weights), []
    for stage in spec.layout:

        def step(x, branch, stage=stage):
            params = stage.actnorm(ActNorm.fit(x))
            x = params.forward(x)
            return x + branch.given(context)(x), params

        branch = weights[stage.name].branch
        x, params = jax.lax.scan(step, Chain(stage.reshapes).forward(x), branch)
        fitted[stage.name] = Block(params, branch)
        if stage.spec.factor_out:
            x, latent = reshape.split_channels(x)
            latents.append(reshape.flatten(latent))
    return fitted, jnp.concatenate([*latents, reshape.flatten(x)], axis=-1)


def with_actnorm(params: Tree, weights: FlowWeights) -> dict[str, Any]:
    """Parameters with the ActNorm of weights."""
    fitted = {name: dict(vars(block.actnorm)) for name, block in weights.items()}
    return {
        name: {"blocks": {**stage["blocks"], "actnorm": fitted[name]}}
        for name, stage in params.items()
    }


@fast_compile
def _inputs(spec: Any, network: Any, x: Any, context: Any, key: Key[Array, ""]) -> Any:
    """What the flow is given of examples and of their contexts."""
    given = None if context is None else spec.scale_context(context, network)
    return spec.preprocess(x, key), given


def _less_first_features(spec: FlowSpec, params: Any) -> Any:
    """Parameters whose first block subtracts the first features of contexts from the entries, if
    its branch knows how.
    """
    stage = spec.layout[0]
    blocks = params[stage.name]["blocks"]
    first = stage.branch.less_context(jax.tree.map(lambda leaf: leaf[0], blocks))
    blocks = jax.tree.map(lambda leaf, own: leaf.at[0].set(own), blocks, first)
    return {**params, stage.name: {**params[stage.name], "blocks": blocks}}
