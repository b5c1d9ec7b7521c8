"""A model as training sees it: its step, its validation, its first state."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from iresnet_jax.maths.logdet.config import LogdetConfig
from iresnet_jax.training.initialization import abstract_variables
from iresnet_jax.training.step import TrainingStep, TrainState


class ValidationResult(NamedTuple):
    """Result of a validation.

    Attributes:
        metrics: Means over the held-out examples, for the log.
        num_terms: Terms of the log-determinant that training goes on with; 0 if the estimator has no such setting.
    """

    metrics: dict[str, float]
    num_terms: int = 0


class Objective(NamedTuple):
    """A model and its training.

    Attributes:
        name: The metric that is shown, such as "bits_per_dim".
        step: The training step, whose `TrainingStep.loss` is the loss.
        make_validation: ``() ->`` the function that measures a state on held-out data.
        selection: ``held-out metrics -> number``; the state with the lowest is the best.
        examples: Pytree of arrays that batches are taken from; None for endless data, whose steps draw their own.
        initial_variables: ``() ->`` fresh variables, fitted to training data.
        logdet: Settings of the log-determinant, for models that have one in training.
    """

    name: str
    step: TrainingStep
    make_validation: Callable[[], Callable[[TrainState], ValidationResult]]
    selection: Callable[[Mapping[str, float]], float]
    examples: Any
    initial_variables: Callable[[], Any]
    logdet: LogdetConfig | None = None

    @property
    def num_terms(self) -> int:
        """Terms of the log-determinant that training starts with; 0 if the estimator has no such setting."""
        return 0 if self.logdet is None or self.logdet.build().unbiased else self.logdet.num_terms

    def step_with(self, num_terms: int) -> TrainingStep:
        """The training step with so many terms of the log-determinant."""
        if self.logdet is None or num_terms == self.num_terms:
            return self.step
        model = self.step.model.with_(estimator=self.logdet.build(num_terms))
        return dataclasses.replace(self.step, model=model)

    def state_of(self, variables: Any) -> TrainState:
        """The state before the first update."""
        rule = self.step.rule
        state = _state_creator(rule.optimizer)(variables)
        return state._replace(num_terms=jnp.int32(self.num_terms), horizon=jnp.int32(rule.total_steps))

    def initial_state(self) -> TrainState:
        """The state of fresh variables."""
        return self.state_of(self.initial_variables())

    def abstract_variables(self) -> Any:
        """Shapes and dtypes of the variables, without computing them."""
        return abstract_variables(self.step.model.spec)

    def abstract_state(self) -> TrainState:
        """Shapes and dtypes of the state."""
        return jax.eval_shape(_state_creator(self.step.rule.optimizer), self.abstract_variables())

    def abstract_batch(self, batch_size: int) -> Any:
        """Shapes and dtypes of a batch; placeholders for endless data, which has no examples."""
        if self.examples is None:
            return jax.ShapeDtypeStruct((batch_size,), np.float32)
        return jax.tree.map(lambda rows: jax.ShapeDtypeStruct((batch_size, *rows.shape[1:]), rows.dtype), self.examples)


@functools.lru_cache(maxsize=64)
def _state_creator(optimizer: optax.GradientTransformation) -> Callable[[Any], TrainState]:
    """Creates the first state. Jitted: all copies are one program. Cached: runs with one optimizer share it."""
    return jax.jit(lambda variables: TrainState.create(variables, optimizer))
