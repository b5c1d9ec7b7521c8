"""Constraints that make blocks contractions: in training steps, in validation, and by certificate in the trained model."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from iresnet_jax.bijections.residual import Solver
from iresnet_jax.checked_dataclasses import Count
from iresnet_jax.maths.platforms import fast_compile
from iresnet_jax.models import contractions
from iresnet_jax.models.architecture import FlowSpec
from iresnet_jax.models.bounds import without_bounds
from iresnet_jax.models.classifier import ClassifierSpec
from iresnet_jax.models.saved import MODELS, Model, Spec
from iresnet_jax.training import parallel

Constrain = Callable[[Any, Any], contractions.ConstrainedFlow]  # (params, spectral) -> constrained weights


@dataclass(frozen=True)
class ConstraintConfig:
    """Settings that keep blocks contractions in training; a trained model is certified in any case."""

    # "estimated": norms by power iteration. "certified": guaranteed upper bounds at every step. "none": an ordinary residual
    # network without an inverse, for the objective "classification".
    norms: Literal["estimated", "certified", "none"] = "estimated"
    num_steps: Count = 1  # power iterations per training step; validation iterates until the norm changes by less than .1 %


def training_constraint(settings: ConstraintConfig, spec: Spec, *, over_blocks: Any = parallel.shared_vmap) -> Constrain:
    """``(params, spectral) ->`` the weights that run in training steps.

    Args:
        settings: How blocks are constrained.
        spec: The model.
        over_blocks: How power iteration of one block becomes that of all, see `contractions.constrain`; by default devices
            share the blocks, which takes a step of `parallel.parallelize`.
    """
    return _constraint(settings, spec.flow, num_steps=settings.num_steps, over_blocks=over_blocks)


@functools.lru_cache(maxsize=64)
def validation_constraint(settings: ConstraintConfig, spec: FlowSpec) -> Constrain:
    """``(params, spectral) ->`` the weights that run in validation, norms iterated to their tolerance.

    One function for all models of one architecture, which share its program.
    """
    return fast_compile(_constraint(settings, spec, rtol=1e-3))


def validated_model(
    template: Any, settings: ConstraintConfig, params: Any, spectral: Any, *, given: Any = None, **rest: Any
) -> Any:
    """The model of averaged parameters, as validation runs it: blocks are scanned, which compiles in half the time.

    Args:
        template: The model without weights.
        settings: How its blocks are constrained.
        params: Parameters as in `TrainState.ema`.
        spectral: Power iterates.
        given: Context that a density is given, see `Density.given`; None leaves it as it is.
        rest: Other fields of the model.
    """
    spec = template.spec
    stages = {stage.name: params[stage.name] for stage in spec.flow.all_stages}
    free = {name: leaf for name, leaf in params.items() if name not in stages}
    stages = validation_constraint(settings, spec.flow)(*parallel.on_first_device((stages, spectral))).weights
    model = template.with_(weights=stages, **free, **rest)
    return model if given is None else model.given(given)


def certified_model(spec: Spec, params: Any, batch_stats: Any, solver: Solver = Solver(), *, given: Any = None) -> Model:
    """The model of averaged parameters after training: certified to be within its budget, whatever training used.

    Where training had no constraint, the weights stay as they are and their bounds are certified. Arguments are those of
    `validated_model`, ``batch_stats`` the running averages of a classifier's BatchNorm.
    """
    stages = {stage.name: params[stage.name] for stage in spec.flow.all_stages}
    free = {name: leaf for name, leaf in params.items() if name not in stages}
    if isinstance(spec, ClassifierSpec):
        free["statistics"] = batch_stats
    model = MODELS[type(spec)](spec, certified_weights(spec, stages), **free, solver=solver)
    return model if given is None else model.given(given)


def certified_weights(spec: Spec, stages: Any) -> Any:
    """Weights to use after training, of the parameters of all stages; see `certified_model`."""
    if spec.constrained:
        return without_bounds(contractions.freeze(spec.flow, stages))
    return contractions.of_stored(spec.flow, stages, constrained=False)


def _constraint(settings: ConstraintConfig, spec: FlowSpec, **iteration: Any) -> Constrain:
    if settings.norms == "none":
        return functools.partial(contractions.unconstrained, spec)
    if settings.norms == "certified":
        return functools.partial(contractions.constrain_certified, spec)
    return functools.partial(contractions.constrain, spec, **iteration)
