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
from iresnet_jax.models import contractions, flow, linen, priors
from iresnet_jax.models.classifier import Classifier, ClassifierSpec
from iresnet_jax.models.density import Density, DensitySpec
from iresnet_jax.models.head import batch_statistics
from iresnet_jax.models.reconstructor import ReconstructorSpec
from iresnet_jax.models.saved import Spec
from iresnet_jax.training import parallel
from iresnet_jax.training.constraint import ConstraintConfig, validation_constraint
from iresnet_jax.training.parallel import AXIS

Examples = tuple[Any, Any, Any]  # examples, their contexts and their labels; None for those that there are not


def num_parameters(params: Any) -> int:
    """Numbers in a tree of arrays."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


@functools.lru_cache(maxsize=64)
def abstract_variables(spec: Spec) -> Any:
    """Shapes and dtypes of the variables, without computing them."""
    example = jax.ShapeDtypeStruct((2, *spec.flow.event_shape), np.float32)
    contexts = [jax.ShapeDtypeStruct((2, spec.flow.context_dim), np.float32)] if spec.flow.context_dim else []
    module = _module(spec).clone(fitted=False)
    if isinstance(spec, DensitySpec):
        module = module.clone(num_classes=spec.num_classes)
    return _without_prior(spec, jax.eval_shape(module.init, jax.random.key(0), example, *contexts))


def initial_variables(
    spec: Spec,
    seed: int,
    examples_of: Callable[[Any], Examples],
    *,
    constraint: ConstraintConfig,
    last_scale: float = 1.0,
    sharp: bool = False,
    fitted_priors: bool = False,
) -> Any:
    """Fresh variables: random weights, norms iterated, ActNorm fitted to training data by all devices together.

    Args:
        spec: The model.
        seed: Seed of the run.
        examples_of: ``key ->`` random training examples. A reconstructor, whose ActNorm is the identity, needs none.
        constraint: How blocks are constrained.
        last_scale: Initial factor on the last layer of each branch.
        sharp: Whether the Swish family starts sharper in a density the wider its layers are.
        fitted_priors: Whether priors of classes start from the moments of their class' latents instead of equal.
    """
    key_init, key_noise, key_data = _keys(np.uint32(seed))
    module = _module(spec, last_scale, sharp=sharp)
    if isinstance(spec, ReconstructorSpec):
        return _created(spec, module, constraint, key_init, jnp.zeros((2, *spec.flow.event_shape)))[0]
    x, context, labels = examples_of(key_data)
    if isinstance(spec, ClassifierSpec):
        inputs: tuple[Any, ...] = (_preprocess(Classifier(spec, {}, {}, {}), x),)
        if not spec.is_bijective:
            return _program(module)(key_init, *inputs)
    else:
        model = Density(spec, {}, {})
        inputs = (_preprocess(model, x, key_noise), *([] if context is None else [model.scale_context(context)]))
    # Weights do not depend on the inputs: two examples give their shapes.
    variables, weights = _created(spec, module, constraint, key_init, *(rows[:2] for rows in inputs))
    fitted, statistics, z = _fitted(spec, weights, inputs)
    params = dict(variables["params"])
    for name, block in fitted.items():
        params[name] = {"blocks": {**params[name]["blocks"], "actnorm": block.actnorm._asdict()}}
    if isinstance(spec, DensitySpec) and spec.num_classes is not None:
        params["prior"] = priors.standard(spec.prior_family, spec.flow.num_dims, spec.num_classes)
        if fitted_priors:
            params["prior"] = priors.of_classes(
                spec.prior_family, np.asarray(z), np.resize(np.asarray(labels), len(z)), spec.num_classes
            )
    variables = {**variables, "params": params}
    return {**variables, "batch_stats": statistics} if statistics else variables


@jax.jit
def _keys(seed: UInt32[Array, ""]) -> tuple[Key[Array, ""], ...]:
    """Keys of weights, of dequantisation and of the choice of examples; one program, where each operation would be one."""
    return tuple(jax.random.split(jax.random.fold_in(jax.random.key(seed), 2**31), 3))


def _module(spec: Spec, last_scale: float = 1.0, *, sharp: bool = False) -> Any:
    """The module that creates the variables; of a density with classes the one with one prior, which is replaced."""
    if isinstance(spec, ClassifierSpec):
        return linen.Classifier(spec, last_scale=last_scale)
    family = spec.prior_family if isinstance(spec, DensitySpec) else "gaussian"
    return linen.ResidualFlow(spec.flow, prior_family=family, last_scale=last_scale, sharp=sharp)


def _created(
    spec: Spec, module: Any, constraint: ConstraintConfig, key: jax.Array, *inputs: jax.Array
) -> tuple[dict[str, Any], Any]:
    """Variables with norms iterated by the program of validation and ActNorm still the identity, and constrained weights."""
    variables = _without_prior(spec, _program(module.clone(fitted=False))(key, *inputs))
    stages = {stage.name: variables["params"][stage.name] for stage in spec.flow.layout}
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
    everywhere = _fitter(spec, num_devices)(weights, parallel.shard(tuple(rows[own] for rows in inputs)))
    fitted, (statistics, z) = parallel.on_first_device(everywhere)
    return fitted, statistics, z


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


def _without_prior(spec: Spec, variables: Any) -> dict[str, Any]:
    """The variables without the prior that the module of a flow always has, if the model is a reconstructor."""
    if not isinstance(spec, ReconstructorSpec):
        return dict(variables)
    return {**variables, "params": {name: value for name, value in variables["params"].items() if name != "prior"}}


_preprocess = jax.jit(lambda model, *given: model.preprocess(*given))


@functools.lru_cache(maxsize=64)
def _program(module: Any) -> Callable[..., Any]:
    """``(key, *inputs) ->`` variables, one function for runs of one architecture, which share its program."""
    return jax.jit(module.init)
