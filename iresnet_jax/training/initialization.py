"""The variables that training starts from."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key, UInt32

from iresnet_jax.bijections import reshape
from iresnet_jax.bijections.actnorm import ActNormParams
from iresnet_jax.maths.platforms import fast_compile
from iresnet_jax.models import contractions, flow, noise
from iresnet_jax.models.architecture import FlowSpec
from iresnet_jax.models.claims import check_claims
from iresnet_jax.models.classifier import Classifier, ClassifierSpec
from iresnet_jax.models.contexts import initial_network
from iresnet_jax.models.density import Density
from iresnet_jax.models.density_spec import DensitySpec
from iresnet_jax.models.head import batch_statistics
from iresnet_jax.models.initial import initial_iterates
from iresnet_jax.models.priors import MIXTURES, ClassPriors
from iresnet_jax.models.saved import Spec
from iresnet_jax.training import parallel
from iresnet_jax.training.constraint import ConstraintConfig, validation_constraint
from iresnet_jax.training.parallel import AXIS

PRIOR_EXAMPLES = 20_000  # vectors at most, whose latents a prior with components is fitted to

Examples = tuple[Any, Any, Any]  # examples, their contexts and their labels; None for those that there are not


def num_parameters(params: Any) -> int:
    """Numbers in a tree of arrays."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def abstract_variables(spec: Spec) -> Any:
    """Shapes and dtypes of the variables, without computing them."""
    return _abstract_variables(spec, jnp.result_type(float))


@functools.lru_cache(maxsize=64)
def _abstract_variables(spec: Spec, dtype: Any) -> Any:
    example = jax.ShapeDtypeStruct((2, *spec.flow.event_shape), dtype)
    contexts = [jax.ShapeDtypeStruct((2, spec.flow.context_dim), dtype)] if spec.flow.context_dim else []

    def create(key, *inputs):
        variables = _with_noise(_with_prior(spec, _module(spec).init(key, *inputs)), _noise(spec, key))
        return {**variables, "params": {**variables["params"], **_network(spec, key)}}

    return jax.eval_shape(create, jax.random.key(0), example, *contexts)


def initial_variables(
    spec: Spec,
    seed: int,
    examples_of: Callable[[Any, int], Examples],
    *,
    actnorm_examples: int,
    constraint: ConstraintConfig,
    last_scale: float = 1.0,
    sharp: bool = False,
    fitted_priors: bool = False,
) -> Any:
    """Fresh variables: random weights, norms iterated, ActNorm fitted to training data by all devices together.

    A prior with components is fitted to latents.

    Args:
        spec: The model.
        seed: Seed of the run.
        examples_of: ``(key, n) ->`` up to ``n`` random training examples.
        actnorm_examples: Examples that ActNorm is fitted to.
        constraint: How blocks are constrained.
        last_scale: Initial factor on the last layer of each branch.
        sharp: Whether the Swish family starts sharper in a density the wider its layers are.
        fitted_priors: Whether priors of classes start from the moments of their class' latents instead of equal.
    """
    key_init, key_noise, key_data = _keys(np.uint32(seed))
    create = functools.partial(_variables, spec, last_scale, sharp)
    given = examples_of(key_data, actnorm_examples)
    x, context, labels = jax.tree.map(lambda rows: np.asarray(rows)[: parallel.cut_length(len(rows))], given)
    network = _network(spec, key_init)
    if isinstance(spec, ClassifierSpec):
        inputs: tuple[Any, ...] = (preprocess(Classifier(spec, {}, {}, {}), x),)
    else:
        model = Density(spec, {}, {}, **network)
        inputs = (preprocess(model.bare(), x, key_noise), *([] if context is None else [model.scale_context(context)]))
    # Weights do not depend on the inputs: two examples give their shapes.
    shapes = (np.zeros((2, *rows.shape[1:]), rows.dtype) for rows in inputs)
    variables = _with_noise(create(key_init, *shapes), _noise(spec, key_init))
    variables, weights = _constrained(spec, variables, constraint)
    fitted, statistics, z = _fitted(spec, weights, inputs)
    check_claims(spec.flow, fitted, *inputs)
    params = {**variables["params"], **network}
    for name, block in fitted.items():
        params[name] = {"blocks": {**params[name]["blocks"], "actnorm": block.actnorm._asdict()}}
    if isinstance(spec, DensitySpec) and spec.num_components is not None:
        if len(spec.flow.event_shape) == 1:
            x, context, _ = examples_of(key_data, PRIOR_EXAMPLES)
            rows = jax.tree.map(lambda given: parallel.fill_up(np.asarray(given)), (x, context))
            z = _encode(Density(spec, fitted, {}, **network).bare(), rows[0], key_noise, rows[1])[: len(x)]
        params["prior"] = MIXTURES[spec.prior_family].fit(np.asarray(z), spec.num_components)
    if fitted_priors and isinstance(spec, DensitySpec) and spec.num_classes is not None:
        labels = np.resize(np.asarray(labels), len(z))
        params["prior"] = ClassPriors.fit(spec.prior_family, np.asarray(z), labels, spec.num_classes)
    variables = {**variables, "params": params}
    return {**variables, "batch_stats": statistics} if statistics else variables


def _network(spec: Spec, key: Key[Array, ""]) -> dict[str, Any]:
    """Fresh weights of the networks on contexts and of noise by the names of their fields; empty where there is none."""
    networks = {}
    if isinstance(spec, DensitySpec) and spec.context_hidden:
        networks["network"] = initial_network(jax.random.fold_in(key, 1), spec.context_dim, spec.context_hidden)
    if spec.flow.noise is not None:
        networks["noise_network"] = noise.initial_network(spec.flow, jax.random.fold_in(key, 2))
    return networks


def _noise(spec: Spec, key: Key[Array, ""]) -> dict[str, dict[str, Any]]:
    """Fresh variables of the flow of noise, by collection."""
    return {"params": {}, "spectral": {}} if spec.flow.noise is None else _noise_of(spec.flow, key)


@functools.partial(fast_compile, static_argnums=(0,))
def _noise_of(spec: FlowSpec, key: Key[Array, ""]) -> dict[str, dict[str, Any]]:
    params = noise.initial_params(spec, jax.random.fold_in(key, 3))
    iterates = initial_iterates(spec, jax.random.fold_in(key, 4))
    return {"params": params, "spectral": {name: iterates[name] for name in params}}


def _with_noise(variables: Any, of_noise: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Variables with those of the flow of noise, where there is one."""
    if not of_noise["params"]:
        return variables
    return {**variables, **{name: {**variables[name], **added} for name, added in of_noise.items()}}


@fast_compile
def _keys(seed: UInt32[Array, ""]) -> tuple[Key[Array, ""], ...]:
    """Keys of weights, of dequantisation and of the choice of examples; one program, where each operation would be one."""
    return tuple(jax.random.split(jax.random.fold_in(jax.random.key(seed), 2**31), 3))


def _module(spec: Spec, *, sharp: bool = False) -> Any:
    """The module that creates the variables, but for those of noise and of a density's prior."""
    from iresnet_jax.models import linen  # late: commands for trained models need no Flax

    if isinstance(spec, ClassifierSpec):
        return linen.Classifier(spec, fitted=False)
    return linen.ResidualFlow(dataclasses.replace(spec.flow, noise=None), sharp=sharp, fitted=False)


def _variables(spec: Spec, last_scale: float, sharp: bool, key: jax.Array, *inputs: Any) -> dict[str, Any]:  # noqa: FBT001
    """Fresh variables. Models that differ in their priors and in a scale other than 1 share a program."""
    scales = () if last_scale == 1 else (np.float32(last_scale),)  # a constant of 1 keeps the last bit of earlier versions
    return _with_prior(spec, _program(_module(spec, sharp=sharp))(key, inputs, *scales))


def _with_prior(spec: Spec, variables: Any) -> dict[str, Any]:
    """The variables with the standard prior of a density in place of the normal one that the module of every flow has."""
    params = {name: value for name, value in variables["params"].items() if name != "prior"}
    if isinstance(spec, DensitySpec):
        params["prior"] = spec.standard_prior()
    return {**variables, "params": params}


def _constrained(spec: Spec, variables: dict[str, Any], constraint: ConstraintConfig) -> tuple[dict[str, Any], Any]:
    """Variables with norms iterated by the program of validation, ActNorm still the identity, and constrained weights."""
    stages = {stage.name: variables["params"][stage.name] for stage in spec.flow.all_stages}
    if constraint.norms == "none":
        copy = jax.tree.map(jnp.copy, stages)  # of what `_fitter` takes for itself
        weights, spectral, _ = contractions.unconstrained(spec.flow, copy, variables.get("spectral", {}))
    else:
        settings = constraint if constraint.norms == "estimated" else ConstraintConfig()
        constrain = validation_constraint(settings, spec.flow)
        weights, spectral, _ = constrain(*parallel.on_first_device((stages, variables.get("spectral", {}))))
    return {**variables, "spectral": spectral}, weights


def _fitted(spec: Spec, weights: Any, inputs: tuple[jax.Array, ...]) -> tuple[Any, Any, Any]:
    """Weights with ActNorm fitted to inputs, the head's statistics of a classifier, and the latents of a density.

    Inputs that do not split evenly over the devices leave a few out, or repeat some if there are fewer than devices.
    """
    num, num_devices = len(inputs[0]), parallel.all_devices()
    own = parallel.own_share(np.resize(np.arange(num), max(num // num_devices, 1) * num_devices))
    feature_shape = spec.feature_shape if isinstance(spec, ClassifierSpec) else None
    # Rows are chosen on the host: JAX would compile a program for each operation.
    rows = parallel.shard(tuple(np.asarray(given)[own] for given in inputs))
    everywhere = _fitter(spec.flow, feature_shape, num_devices)(weights, rows)
    fitted, (statistics, z) = parallel.on_first_device(everywhere)
    return fitted, statistics, z


@functools.lru_cache(maxsize=64)
def _fitter(flow_spec: FlowSpec, feature_shape: tuple[int, ...] | None, num_devices: int) -> Callable[..., Any]:
    """``(weights, inputs) ->`` fitted weights, and statistics and latents of all inputs, for all devices, which are so many.

    One function for models of one flow; a classifier's has features of a shape.
    """
    del num_devices

    def fit(weights, inputs):
        fitted, z = flow.fit_actnorm(flow_spec, weights, *inputs, axis_name=AXIS)
        weights = {**weights, **{name: weights[name]._replace(actnorm=ActNormParams(**own)) for name, own in fitted.items()}}
        if feature_shape is not None:
            features = reshape.unflatten(z, feature_shape)
            return weights, ({"head": batch_statistics(features, axis_name=AXIS)}, None)
        return weights, ({}, jax.lax.all_gather(z, AXIS, tiled=True))

    return parallel.parallelize(fit)


preprocess = fast_compile(lambda model, *given: model.preprocess(*given))  # one function for models of one shape
_encode = fast_compile(lambda model, x, key, context: model.encode(x, key, context=context))


@functools.lru_cache(maxsize=64)
def _program(module: Any) -> Callable[..., Any]:
    """``(key, inputs, last scale) ->`` variables, one function for runs of one architecture, which share its program."""

    def create(key, inputs, last_scale=1.0):
        return module.clone(last_scale=last_scale).init(key, *inputs)

    return fast_compile(create)
