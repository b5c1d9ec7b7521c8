"""What training changes: the parameters of a model without their constraint, and the models that
they make.
"""

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

import jax

from iresnet_jax.arguments import Count
from iresnet_jax.maths.platforms import fast_compile
from iresnet_jax.models import contractions
from iresnet_jax.models.architecture import FlowSpec
from iresnet_jax.models.flow import as_params, bounded, carried_bounds
from iresnet_jax.models.model import MODELS, How, Model, described, remember
from iresnet_jax.pytrees import pytree

M = TypeVar("M", bound=Model)
# (params, iterates) -> constrained weights
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


@functools.lru_cache(maxsize=64)
def exact_constraint(constraint: ConstraintConfig, spec: FlowSpec) -> Constrain:
    """``(params, iterates) ->`` the weights of a flow with norms iterated to their tolerance.

    One function for all models of one architecture, which share its program.
    """
    return fast_compile(_constraint(constraint, spec))


def _constraint(settings: ConstraintConfig, spec: FlowSpec, **iteration: Any) -> Constrain:
    if settings.norms == "none":
        return functools.partial(contractions.unconstrained, spec)
    if settings.norms == "certified":
        return functools.partial(contractions.constrain_certified, spec)
    return functools.partial(contractions.constrain, spec, **iteration)


@pytree(arrays=("params", "iterates", "statistics", "spec", "how"))
class Free(Generic[M]):
    """Parameters of a model without their constraint: what training starts from and changes, also
    in your own loops. A pytree: ``jit`` takes it as an argument.

    Attributes:
        params: What an optimizer changes: weights of the flow's stages, and whatever else the model
            learns, such as the prior.
        iterates: Power iterates of all layers, from one step to the next.
        statistics: Running averages of a classifier's BatchNorm; empty without.
        spec: All that defines the model but its weights.
        how: How the model runs.
        constraint: How its blocks are constrained.

    Example::

        free = Free.of(model)
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

    params: dict[str, Any]
    iterates: Any
    statistics: Any
    spec: Any
    how: How
    constraint: ConstraintConfig = ConstraintConfig()

    def __repr__(self) -> str:
        name, num = MODELS[type(self.spec)].__name__, num_parameters(self.params)
        return f"Free parameters, {num:,}, of a {name} of {described(self.spec)}"

    @classmethod
    def of(cls, model: M) -> "Free[M]":
        """The parameters of a model, such as one of ``Density.init`` or one that was loaded."""
        spec = model.spec
        constraint = ConstraintConfig() if spec.constrained else ConstraintConfig(norms="none")
        stages = as_params(model.weights)
        learned = {name: model.learned(name) for name in model.arrays}
        statistics, iterates = learned.pop("statistics", {}), {}
        if spec.constrained:
            iterates = spec.flow.initial_iterates(jax.random.key(0))
            iterates = exact_constraint(constraint, spec.flow)(stages, iterates).spectral
        return cls({**stages, **learned}, iterates, statistics, spec, model.how, constraint)

    def with_(self, **changes: Any) -> "Free[M]":
        """The same with other fields, such as ``params`` or ``iterates``."""
        return dataclasses.replace(self, **changes)

    def build(
        self, weights: Any, params: Any = None, statistics: Any = None, how: How | None = None
    ) -> M:
        """The model of constrained weights.

        Args:
            weights: Weights of the flow's stages.
            params: Parameters whose part without a constraint, such as the prior, the model has;
                by default `params`.
            statistics: Running averages of BatchNorm; by default `statistics`.
            how: How the model runs; by default `how`.
        """
        params = self.params if params is None else params
        statistics = self.statistics if statistics is None else statistics
        model = MODELS[type(self.spec)]
        rest = {"statistics": statistics} if "statistics" in model.arrays else {}
        learned = {name: leaf for name, leaf in params.items() if name not in weights}
        return model(self.spec, bounded(weights, None), how=how or self.how, **learned, **rest)

    def constrain(self, params: Any = None) -> tuple[M, Any]:
        """The model whose blocks are contractions, as power iteration sees it, and the power
        iterates of the next step.

        Args:
            params: Parameters to take instead of `params`, by which the result can be
                differentiated.
        """
        params = self.params if params is None else params
        found = self.constraint_of_step(params, self.iterates)
        return self.build(found.weights, params), found.spectral

    def constraint_of_step(self, params: Any, iterates: Any) -> contractions.ConstrainedFlow:
        """The constrained weights that run in a training step."""
        settings, flow = self.constraint, self.spec.flow
        return _constraint(settings, flow, num_steps=settings.num_steps)(params, iterates)

    def validated(self, params: Any = None, iterates: Any = None, statistics: Any = None) -> M:
        """The model as validation runs it: norms are iterated to their tolerance, and blocks are
        scanned, which compiles in half the time.

        Arguments are taken instead of the fields of these names, such as averages.
        """
        params = self.params if params is None else params
        iterates = self.iterates if iterates is None else iterates
        constrain = exact_constraint(self.constraint, self.spec.flow)
        how = dataclasses.replace(self.how, unroll=False, rematerialize="nothing")
        return self.build(
            constrain(self._stages(params), iterates).weights, params, statistics, how
        )

    def certified(self, params: Any = None, statistics: Any = None) -> M:
        """The model to use after training: every block is certified to be within the budget,
        whatever training used.

        Where the model has no constraint, the weights stay as they are. Arguments are those of
        `validated`.
        """
        params, flow = self.params if params is None else params, self.spec.flow
        stages = self._stages(params)
        if not self.spec.constrained:
            weights = contractions.of_stored(flow, stages, constrained=False)
            return self.build(weights, params, statistics)
        weights = contractions.freeze(flow, stages)
        model = self.build(weights, params, statistics)
        return remember(model, carried_bounds(weights))

    def _stages(self, params: Any) -> dict[str, Any]:
        return {stage.name: params[stage.name] for stage in self.spec.flow.all_stages}


def num_parameters(params: Any) -> int:
    """Numbers in a tree of arrays."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
