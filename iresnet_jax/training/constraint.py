"""Constraints that make blocks contractions: in training steps, in validation, and by
certificate in the trained model.
"""

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar

import jax

from iresnet_jax.bijections.residual import Solver
from iresnet_jax.checked_dataclasses import Count
from iresnet_jax.maths.platforms import fast_compile
from iresnet_jax.models import contractions
from iresnet_jax.models.architecture import FlowSpec
from iresnet_jax.models.bounds import without_bounds
from iresnet_jax.models.classifier import ClassifierSpec
from iresnet_jax.models.flow import as_params
from iresnet_jax.models.saved import MODELS, Model, Spec
from iresnet_jax.training import parallel

M = TypeVar("M", bound=Model)
# (params, spectral) -> constrained weights
Constrain = Callable[[Any, Any], contractions.ConstrainedFlow]


@dataclass(frozen=True)
class ConstraintConfig:
    """Settings that keep blocks contractions in training; a trained model is certified in any
    case.
    """

    # "estimated": norms by power iteration. "certified": guaranteed upper bounds at every step.
    # "none": an ordinary residual network without an inverse, for the objective "classification".
    norms: Literal["estimated", "certified", "none"] = "estimated"
    # power iterations per training step; validation iterates until the norm changes by less than .1
    # %
    num_steps: Count = 1


def training_constraint(settings: ConstraintConfig, spec: Spec) -> Constrain:
    """``(params, spectral) ->`` the weights that run in training steps.

    Args:
        settings: How blocks are constrained.
        spec: The model.
    """
    return _constraint(settings, spec.flow, num_steps=settings.num_steps)


@functools.lru_cache(maxsize=64)
def validation_constraint(settings: ConstraintConfig, spec: FlowSpec) -> Constrain:
    """``(params, spectral) ->`` the weights that run in validation, norms iterated to their
    tolerance.

    One function for all models of one architecture, which share its program.
    """
    return fast_compile(_constraint(settings, spec))


def validated_model(
    template: Any,
    settings: ConstraintConfig,
    params: Any,
    spectral: Any,
    *,
    given: Any = None,
    **rest: Any,
) -> Any:
    """The model of averaged parameters, as validation runs it: blocks are scanned, which compiles
    in half the time.

    Args:
        template: The model without weights.
        settings: How its blocks are constrained.
        params: Parameters as in `TrainState.ema`.
        spectral: Power iterates.
        given: Context that a density is given, see `Density.given`; None leaves it as it is.
        rest: Other fields of the model.
    """
    constrain = validation_constraint(settings, template.spec.flow)
    weights = constrain(
        *parallel.on_first_device((_stages(template.spec, params), spectral))
    ).weights
    model = with_params(template, params, weights, **rest)
    return model if given is None else model.given(given)


def certified_model(
    spec: Spec, params: Any, batch_stats: Any, solver: Solver = Solver(), *, given: Any = None
) -> Model:
    """The model of averaged parameters after training: certified to be within its budget, whatever
    training used.

    Where training had no constraint, the weights stay as they are and their bounds are certified.
    Arguments are those of `validated_model`, ``batch_stats`` the running averages of a classifier's
    BatchNorm.
    """
    rest = {"statistics": batch_stats} if isinstance(spec, ClassifierSpec) else {}
    template = MODELS[type(spec)](spec, {}, {}, **{name: {} for name in rest}, solver=solver)
    model = with_params(template, params, _certified_weights(spec, params), **rest)
    return model if given is None else model.given(given)


def with_params(template: Any, params: Any, weights: Any, **rest: Any) -> Any:
    """The model with the weights of its stages, and with the parameters that have no constraint,
    such as the prior's.
    """
    return template.with_(
        weights=weights,
        **{name: leaf for name, leaf in params.items() if name not in weights},
        **rest,
    )


def _certified_weights(spec: Spec, params: Any) -> Any:
    if spec.constrained:
        return without_bounds(contractions.freeze(spec.flow, _stages(spec, params)))
    return contractions.of_stored(spec.flow, _stages(spec, params), constrained=False)


def _stages(spec: Spec, params: Any) -> Any:
    return {stage.name: params[stage.name] for stage in spec.flow.all_stages}


def _constraint(settings: ConstraintConfig, spec: FlowSpec, **iteration: Any) -> Constrain:
    if settings.norms == "none":
        return functools.partial(contractions.unconstrained, spec)
    if settings.norms == "certified":
        return functools.partial(contractions.constrain_certified, spec)
    return functools.partial(contractions.constrain, spec, **iteration)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["params", "iterates", "template"],
    meta_fields=["settings"],
)
@dataclass(frozen=True)
class Unconstrained(Generic[M]):
    """Parameters of a model without their constraint, for loops of one's own. A pytree: ``jit``
    takes it as an argument.

    Attributes:
        params: What an optimizer changes: weights of the flow's stages, and whatever else the model
            learns, such as the prior.
        iterates: Power iterates of all layers, from one step to the next.
        template: The model without what `params` holds.
        settings: How its blocks are constrained.

    Example::

        free = Unconstrained.of(model)
        optimizer = optax.adam(1e-3)
        state = optimizer.init(free.params)

        @jax.jit
        def step(free, state, batch):
            def loss(params):
                model, iterates = free.constrain(params)
                return -model.log_prob(batch).mean(), iterates

            gradient, iterates = jax.grad(loss, has_aux=True)(free.params)
            updates, state = optimizer.update(gradient, state, free.params)
            params = optax.apply_updates(free.params, updates)
            return free.with_(params=params, iterates=iterates), state

        for batch in batches:
            free, state = step(free, state, batch)
        model = free.certified()
    """

    params: dict[str, Any] = field(repr=False)
    iterates: Any = field(repr=False)
    template: M
    settings: ConstraintConfig = field(default_factory=ConstraintConfig)

    @classmethod
    def of(cls, model: M) -> "Unconstrained[M]":
        """The parameters of a model, such as one of ``Density.init`` or one that was loaded.

        Raises:
            ValueError: If the model has no weights.
        """
        spec = model.spec
        if not model.weights:
            raise ValueError("the model has no weights: make one by init, load or fit")
        settings = ConstraintConfig() if spec.constrained else ConstraintConfig(norms="none")
        stages = as_params(model.weights)
        learned = {name: model.learned(name) for name in model.arrays if name != "statistics"}
        iterates = {}
        if spec.constrained:
            iterates = spec.flow.initial_iterates(jax.random.key(0))
            iterates = validation_constraint(settings, spec.flow)(stages, iterates).spectral
        template = model.with_(weights={}, history=None, **{name: {} for name in learned})
        return cls({**stages, **learned}, iterates, template, settings)

    def with_(self, **changes: Any) -> "Unconstrained[M]":
        """The same model with other ``params`` or ``iterates``."""
        return dataclasses.replace(self, **changes)

    def constrain(self, params: Any = None) -> tuple[M, Any]:
        """The model whose blocks are contractions, as power iteration sees it, and the power
        iterates of the next step.

        Args:
            params: Parameters to take instead of `params`, by which the result can be
                differentiated.
        """
        params = self.params if params is None else params
        constrained = training_constraint(self.settings, self.template.spec)(params, self.iterates)
        return with_params(self.template, params, constrained.weights), constrained.spectral

    def certified(self) -> M:
        """The model to use after training: every block is certified to be within the budget."""
        return with_params(
            self.template, self.params, _certified_weights(self.template.spec, self.params)
        )
