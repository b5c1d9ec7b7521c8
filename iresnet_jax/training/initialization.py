"""The variables that training starts from."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from iresnet_jax.bijections import reshape
from iresnet_jax.bijections.standardize import Whiten
from iresnet_jax.maths.platforms import fast_compile
from iresnet_jax.models.architecture import FlowSpec
from iresnet_jax.models.claims import check_claims
from iresnet_jax.models.classifier import Classifier, ClassifierSpec
from iresnet_jax.models.contexts import linear_regression, with_linear_mean
from iresnet_jax.models.head import batch_statistics
from iresnet_jax.models.initial import fit_actnorm, with_actnorm
from iresnet_jax.models.priors import LOCATION_SCALE, MIXTURES, ClassPriors
from iresnet_jax.models.saved import MODELS, Spec
from iresnet_jax.training import parallel
from iresnet_jax.training.constraint import ConstraintConfig, validation_constraint
from iresnet_jax.training.parallel import AXIS

PRIOR_EXAMPLES = 20_000  # vectors at most, whose latents a prior with components is fitted to

# examples, their contexts and their labels; None for those that there are not
Examples = tuple[Any, Any, Any]


def num_parameters(params: Any) -> int:
    """Numbers in a tree of arrays."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def abstract_variables(spec: Spec) -> Any:
    """Shapes and dtypes of the variables, without computing them."""

    def create(key):
        arrays = spec.initial_arrays(key)
        statistics = arrays.pop("statistics", {})
        params = {**spec.flow.initial_params(key), **arrays}
        return {
            "params": params,
            "spectral": spec.flow.initial_iterates(key),
            "batch_stats": statistics,
        }

    return jax.eval_shape(create, jax.random.key(0))


def initial_variables(
    spec: Spec,
    seed: int,
    examples_of: Callable[[Any, int], Examples],
    *,
    actnorm_examples: int,
    constraint: ConstraintConfig,
    last_scale: float = 1.0,
    sharpness: float = 0.0,
) -> Any:
    """Fresh variables: random weights, norms iterated, ActNorm fitted to training data by all
    devices together.

    A prior with components is fitted to latents. Behind whitening, ActNorm is the identity and the
    prior has variance 1, as a fit to the same examples would undo the shrinkage of the covariance:
    the density starts as a normal one, and one with classes as linear discriminant analysis.

    Args:
        spec: The model.
        seed: Seed of the run.
        examples_of: ``(key, n) ->`` up to ``n`` random training examples.
        actnorm_examples: Examples that ActNorm is fitted to.
        constraint: How blocks are constrained.
        last_scale: Initial factor on the last layer of each branch.
        sharpness: See `FeedforwardSpec.initial_weights`.
    """
    key_init, key_noise, key_data = jax.random.split(
        jax.random.fold_in(jax.random.key(np.uint32(seed)), 2**31), 3
    )
    key_flow, key_arrays = jax.random.split(key_init)
    x, context, _ = jax.tree.map(np.asarray, examples_of(key_data, actnorm_examples))
    arrays = spec.initial_arrays(key_arrays)
    model = MODELS[type(spec)](spec, {}, **arrays)
    if isinstance(model, Classifier):
        rows: tuple[Any, ...] = (preprocess(model, x),)
    else:
        rows = (
            preprocess(model, x, key_noise),
            *([] if context is None else [model.scale_context(context)]),
        )
    params, spectral, weights = _fresh(spec.flow, constraint, key_flow, sharpness, last_scale)
    is_vectors, transform = len(spec.flow.event_shape) == 1, getattr(spec, "transform", None)
    is_white, z, statistics = isinstance(getattr(transform, "then", transform), Whiten), None, {}
    if not is_white:
        weights, statistics, z = _fitted(spec, weights, rows)
    check_claims(spec.flow, weights, *rows)
    if isinstance(model, Classifier):
        arrays["statistics"] = statistics
    elif is_white or model.spec.num_components is not None:
        if model.network and is_white:
            x, context, _ = jax.tree.map(np.asarray, examples_of(key_data, PRIOR_EXAMPLES))
            scaled, _ = model.spec.context.forward_and_logdet(jnp.asarray(context))
            coefficients = linear_regression(
                np.asarray(scaled), np.asarray(preprocess(model, x, key_noise))
            )
            arrays["network"] = with_linear_mean(model.network, coefficients)
            params = _less_first_features(spec.flow, params)
        family, num_components, num_classes = (
            model.spec.prior_family,
            model.spec.num_components,
            model.spec.num_classes,
        )
        if is_vectors:
            x, context, labels = examples_of(key_data, PRIOR_EXAMPLES)
            z = model.with_(weights=weights).encode(x, key_noise, context=context)
        if num_components is not None:
            arrays["prior"] = MIXTURES[family].fit(np.asarray(z), num_components)
        elif num_classes is not None:
            arrays["prior"] = ClassPriors.fit(
                family, np.asarray(z), np.asarray(labels), num_classes
            )
        else:
            arrays["prior"] = LOCATION_SCALE[family].of_moments(
                np.zeros(spec.flow.num_dims), np.ones(spec.flow.num_dims)
            )
    statistics = arrays.pop("statistics", {})
    return {
        "params": {**with_actnorm(params, weights), **arrays},
        "spectral": spectral,
        "batch_stats": statistics,
    }


def _less_first_features(spec: FlowSpec, params: Any) -> Any:
    """Parameters whose first block subtracts the first features of contexts from the entries, if
    its branch knows how.
    """
    stage = spec.layout[0]
    blocks = params[stage.name]["blocks"]
    first = stage.branch.less_context(jax.tree.map(lambda leaf: leaf[0], blocks))
    blocks = jax.tree.map(lambda leaf, own: leaf.at[0].set(own), blocks, first)
    return {**params, stage.name: {**params[stage.name], "blocks": blocks}}


@functools.partial(fast_compile, static_argnums=(0, 1, 3, 4))
def _fresh(
    spec: FlowSpec,
    constraint: ConstraintConfig,
    key: Key[Array, ""],
    sharpness: float,
    last_scale: float,
) -> tuple[Any, Any, Any]:
    """Random parameters of a flow, power iterates and constrained weights; models that differ in
    priors share a program.
    """
    key_params, key_iterates = jax.random.split(key)
    params = spec.initial_params(key_params, sharpness=sharpness, last_scale=last_scale)
    weights, spectral, _ = validation_constraint(constraint, spec)(
        params, spec.initial_iterates(key_iterates)
    )
    return params, spectral, weights


def _fitted(spec: Spec, weights: Any, rows: tuple[Any, ...]) -> tuple[Any, Any, Any]:
    """Weights with ActNorm fitted to inputs of the flow, the statistics of a classifier's head, and
    a density's latents.

    Inputs that do not split evenly over the devices leave a few out, or repeat some if there are
    fewer than devices.
    """
    num, num_devices = len(rows[0]), parallel.all_devices()
    own = parallel.own_share(np.resize(np.arange(num), max(num // num_devices, 1) * num_devices))
    feature_shape = (
        spec.feature_shape if isinstance(spec, ClassifierSpec) and spec.head == "pooled" else None
    )
    fit = _fitter(spec.flow, feature_shape, num_devices)
    # Rows are chosen on the host: JAX would compile a program for each operation.
    everywhere = fit(weights, parallel.shard(tuple(np.asarray(given)[own] for given in rows)))
    weights, (statistics, z) = parallel.on_first_device(everywhere)
    return weights, statistics, z


@functools.lru_cache(maxsize=64)
def _fitter(
    spec: FlowSpec, feature_shape: tuple[int, ...] | None, num_devices: int
) -> Callable[..., Any]:
    """``(weights, rows) ->`` what `_fitted` returns, a program for all devices, which are so
    many.
    """
    del num_devices

    def fit(weights, rows):
        weights, z = fit_actnorm(spec, weights, *rows, axis_name=AXIS)
        if feature_shape is None:
            return weights, ({}, jax.lax.all_gather(z, AXIS, tiled=True))
        return weights, (
            {"head": batch_statistics(reshape.unflatten(z, feature_shape), axis_name=AXIS)},
            None,
        )

    return parallel.parallelize(fit)


# one function for models of one shape
preprocess = fast_compile(lambda model, *given: model.preprocess(*given))
