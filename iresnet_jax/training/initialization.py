"""The variables that training starts from."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key, UInt32

from iresnet_jax.bijections import reshape
from iresnet_jax.bijections.actnorm import ActNormParams
from iresnet_jax.data.dataset import DataSet
from iresnet_jax.models import flow, linen, priors
from iresnet_jax.models.classifier import Classifier, ClassifierSpec
from iresnet_jax.models.density import Density, DensitySpec
from iresnet_jax.models.head import batch_statistics
from iresnet_jax.models.reconstructor import ReconstructorSpec
from iresnet_jax.runs.config import Config, ConstraintConfig
from iresnet_jax.runs.from_config import Spec, compiled_constraint
from iresnet_jax.training import parallel
from iresnet_jax.training.parallel import AXIS


def num_parameters(params: Any) -> int:
    """Numbers in a tree of arrays."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def abstract_variables(config: Config, spec: Spec) -> Any:
    """Shapes and dtypes of the variables, without computing them."""
    del config  # its initial scale changes neither
    return _abstract_variables(spec)


@functools.lru_cache(maxsize=64)
def _abstract_variables(spec: Spec) -> Any:
    example = jax.ShapeDtypeStruct((2, *spec.flow.event_shape), np.float32)
    contexts = [jax.ShapeDtypeStruct((2, spec.flow.context_dim), np.float32)] if spec.flow.context_dim else []
    if isinstance(spec, ReconstructorSpec):
        created = jax.eval_shape(linen.ResidualFlow(spec.flow, fitted=False).init, jax.random.key(0), example)
        return _without_prior(created)
    if isinstance(spec, DensitySpec):
        module: Any = linen.ResidualFlow(spec.flow, prior_family=spec.prior_family, num_classes=spec.num_classes, fitted=False)
    else:
        module = linen.Classifier(spec, fitted=False)
    return jax.eval_shape(module.init, jax.random.key(0), example, *contexts)


def initial_variables(config: Config, spec: Spec, data: DataSet) -> Any:
    """Fresh variables, ActNorm fitted to training data, by all devices if their number divides that of the examples."""
    key_init, key_noise, key_data = _keys(np.uint32(config.seed))
    if isinstance(spec, ReconstructorSpec):
        return _initialize_reconstructor(config, spec, key_init)
    examples, context = data.random_train(key_data, config.training.actnorm_examples)
    if isinstance(spec, ClassifierSpec):
        x = _preprocess(Classifier(spec, {}, {}, {}), examples)
        module: Any = linen.Classifier(spec, last_scale=config.model.last_scale)  # hashable, which type checkers do not see
        return _initialize(config, module, spec, key_init, x)[1]
    model = Density(spec, {}, {})
    given = [_preprocess(model, examples, key_noise), *([] if context is None else [model.scale_context(context)])]
    # With one prior, by default, as the module of any number of classes differs in its prior alone.
    module = linen.ResidualFlow(
        spec.flow, prior_family=spec.prior_family, last_scale=config.model.last_scale, sharp=config.model.sharp
    )
    z, variables = _initialize(config, module, spec, key_init, *given)
    if spec.num_classes is not None:
        prior = priors.standard(spec.prior_family, spec.flow.num_dims, spec.num_classes)
        if config.hybrid.fitted_priors:
            labels = data.random_train_labels(key_data, config.training.actnorm_examples)
            prior = priors.of_classes(spec.prior_family, np.asarray(z), labels, spec.num_classes)
        variables = {**variables, "params": {**variables["params"], "prior": prior}}
    return variables


@jax.jit
def _keys(seed: UInt32[Array, ""]) -> tuple[Key[Array, ""], ...]:
    """Keys of weights, of dequantisation and of the choice of examples; one program, where each operation would be one."""
    return tuple(jax.random.split(jax.random.fold_in(jax.random.key(seed), 2**31), 3))


def _initialize(config: Config, module: Any, spec: Spec, key: jax.Array, *given: jax.Array) -> tuple[Any, Any]:
    """Latents of inputs, which nobody asks of classifiers, and variables that are fitted to them."""
    is_bijective = isinstance(spec, DensitySpec) or spec.is_bijective
    if not is_bijective or not _splits(len(given[0])):
        return _initializer(module)(key, *given)
    # Weights do not depend on the inputs. To iterate norms afterwards shares the program of validation.
    variables = _creator(module.clone(fitted=False))(key, *(rows[:2] for rows in given))
    params = {stage.name: variables["params"][stage.name] for stage in spec.flow.layout}
    norms = config.constraint.norms
    if norms == "none":
        copy, spectral = jax.tree.map(jnp.copy, params), variables.get("spectral", {})  # of what `_fitter` takes for itself
        weights = flow.unconstrained(spec.flow, copy, spectral).weights
    else:
        settings = config.constraint if norms == "estimated" else ConstraintConfig()
        constrain = compiled_constraint(settings, spec.flow)
        weights, spectral, _ = constrain(*parallel.on_first_device((params, variables.get("spectral", {}))))
    own = parallel.own_share(np.arange(len(given[0])))
    everywhere = _fitter(spec, parallel.all_devices())(weights, parallel.shard(tuple(rows[own] for rows in given)))
    fitted, (statistics, z) = parallel.on_first_device(everywhere)
    for name, block in fitted.items():
        params[name] = {"blocks": {**params[name]["blocks"], "actnorm": block.actnorm._asdict()}}
    variables = {**variables, "params": {**variables["params"], **params}, "spectral": spectral}
    return z, {**variables, "batch_stats": statistics} if statistics else variables


def _initialize_reconstructor(config: Config, spec: ReconstructorSpec, key: jax.Array) -> Any:
    """Random branches, norms iterated; ActNorm is the identity, from which training does not move it."""
    module: Any = linen.ResidualFlow(spec.flow, last_scale=config.model.last_scale, fitted=False)
    variables = _without_prior(_creator(module)(key, jnp.zeros((2, *spec.flow.event_shape))))
    if not spec.constrained:
        return variables
    constrain = compiled_constraint(ConstraintConfig(), spec.flow)
    return {**variables, "spectral": constrain(variables["params"], variables.get("spectral", {})).spectral}


def _without_prior(variables: Any) -> Any:
    return {**variables, "params": {name: value for name, value in variables["params"].items() if name != "prior"}}


def _splits(num_examples: int) -> bool:
    """Whether all devices can share so many examples evenly."""
    return num_examples % parallel.all_devices() == 0


@functools.lru_cache(maxsize=64)
def _fitter(spec: Spec, num_devices: int) -> Callable[..., Any]:
    """``(weights, inputs) ->`` fitted weights, and statistics and latents of all inputs, for all devices, which are so many."""
    del num_devices

    def fit(weights, inputs):
        fitted, z = flow.fit_actnorm(spec.flow, weights, *inputs, axis_name=AXIS)
        weights = {name: block._replace(actnorm=ActNormParams(**fitted[name])) for name, block in weights.items()}
        if isinstance(spec, ClassifierSpec):
            features = reshape.unflatten(z, spec.feature_shape)
            return weights, ({"head": batch_statistics(features, axis_name=AXIS)}, None)
        return weights, ({}, jax.lax.all_gather(z, AXIS, tiled=True))

    return parallel.parallelize(fit)


_preprocess = jax.jit(lambda model, *given: model.preprocess(*given))


@functools.lru_cache(maxsize=64)
def _initializer(module: Any) -> Callable[..., tuple[Any, Any]]:
    """``(key, inputs) ->`` outputs and variables, one function for runs of one architecture, which share its program."""
    return jax.jit(module.init_with_output)


@functools.lru_cache(maxsize=64)
def _creator(module: Any) -> Callable[..., Any]:
    return jax.jit(module.init)
