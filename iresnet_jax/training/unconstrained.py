"""A model whose parameters an optimizer may change freely: for training loops of one's own.

    model --of--> unconstrained --constrain--> model of one step          an optimizer changes `params`
                  unconstrained --certified--> model                      after training

`train` has such a loop.
"""

import dataclasses
import functools
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import jax

from iresnet_jax.models.contractions import as_params
from iresnet_jax.models.initial import initial_iterates
from iresnet_jax.models.model import Model
from iresnet_jax.training.constraint import ConstraintConfig, certified_weights, training_constraint, validation_constraint

M = TypeVar("M", bound=Model)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["params", "iterates", "template"], meta_fields=["settings"])
@dataclass(frozen=True)
class Unconstrained(Generic[M]):
    """Parameters of a model without their constraint. A pytree: ``jit`` takes it as an argument.

    Attributes:
        params: What an optimizer changes: weights of the flow's stages, and whatever else the model learns, such as the prior.
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
            return free.with_(params=optax.apply_updates(free.params, updates), iterates=iterates), state

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
            iterates = initial_iterates(spec.flow, jax.random.key(0))
            iterates = validation_constraint(settings, spec.flow)(stages, iterates).spectral
        template = model.with_(weights={}, history=None, **{name: {} for name in learned})
        return cls({**stages, **learned}, iterates, template, settings)

    def with_(self, **changes: Any) -> "Unconstrained[M]":
        """The same model with other ``params`` or ``iterates``."""
        return dataclasses.replace(self, **changes)

    def constrain(self, params: Any = None) -> tuple[M, Any]:
        """The model whose blocks are contractions, as power iteration sees it, and the power iterates of the next step.

        Args:
            params: Parameters to take instead of `params`, by which the result can be differentiated.
        """
        params = self.params if params is None else params
        constrain = training_constraint(self.settings, self.template.spec, over_blocks=jax.vmap)
        constrained = constrain(params, self.iterates)
        return self._with(params, constrained.weights), constrained.spectral

    def certified(self) -> M:
        """The model to use after training: every block is certified to be within the budget."""
        spec = self.template.spec
        return self._with(
            self.params, certified_weights(spec, {stage.name: self.params[stage.name] for stage in spec.flow.all_stages})
        )

    def _with(self, params: Any, weights: Any) -> M:
        return self.template.with_(weights=weights, **{name: leaf for name, leaf in params.items() if name not in weights})
