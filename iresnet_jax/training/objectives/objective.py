"""What the training loop knows of a model: its first variables, a training step and a validation."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from iresnet_jax.models.flow import Constrained
from iresnet_jax.training import state
from iresnet_jax.training.config import Config
from iresnet_jax.training.from_config import build_optimizer, build_schedule
from iresnet_jax.training.parallel import AXIS


class HeldOut(NamedTuple):
    """Result of a validation.

    Attributes:
        metrics: Means over the held-out examples, for the log.
        num_terms: Terms of the log-determinant that training goes on with; 0 if the estimator has no such setting.
    """

    metrics: dict[str, float]
    num_terms: int = 0


class Objective(NamedTuple):
    """A model and its training, as functions.

    Attributes:
        name: The metric that is shown, such as "bits_per_dim".
        examples: Pytree of arrays that batches are taken from; None for endless data, whose steps draw their own.
        rule: How a gradient changes the state.
        initial_variables: ``() ->`` fresh variables, fitted to training data.
        make_step: ``num_terms ->`` the step ``(state, batch) -> (state, metrics)``, for `parallel.parallelize`.
        make_validation: ``() ->`` the function that measures a state on held-out data.
        loss: Number that a checkpoint is chosen by, from the held-out metrics; lower is better.
        num_terms: Terms of the log-determinant that training starts with; 0 if the estimator has no such setting.
    """

    name: str
    examples: Any
    rule: "UpdateRule"
    initial_variables: Callable[[], Any]
    make_step: Callable[[int], Callable[[state.TrainState, Any], tuple[state.TrainState, dict[str, Any]]]]
    make_validation: Callable[[], Callable[[state.TrainState], HeldOut]]
    loss: Callable[[Mapping[str, float]], float]
    num_terms: int = 0

    def initial_state(self) -> state.TrainState:
        """The state before the first update."""
        rule, terms = self.rule, self.num_terms
        return state.create(self.initial_variables(), rule.optimizer, num_terms=terms, horizon=rule.total_steps)

    def adapt(self, current: state.TrainState, held_out: HeldOut) -> state.TrainState:
        """The state that training goes on with after a validation: with more terms of the log-determinant, if it found so."""
        return current._replace(num_terms=jnp.int32(held_out.num_terms))


class Loss(NamedTuple):
    """Loss of a batch, and what comes with it.

    Attributes:
        value: Loss to minimise, a mean over the batch.
        metrics: Means over the batch, for the log.
        constrained: Constrained weights that the loss was computed with.
        batch_stats: BatchNorm's statistics of the batch, over all devices; None without BatchNorm.
    """

    value: Any
    metrics: dict[str, Any]
    constrained: Constrained
    batch_stats: Any = None


class UpdateRule(NamedTuple):
    """How a gradient changes the state.

    Attributes:
        optimizer: Optimizer at a learning rate of 1.
        schedule: Learning rate by step of a run of ``total_steps``.
        total_steps: Updates that the schedule is made for; a run of another length stretches it.
        ema_decay: Decay of the moving averages of the parameters and of BatchNorm's statistics.
    """

    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    total_steps: int
    ema_decay: float

    def learning_rate(self, current: state.TrainState) -> jax.Array:
        """The learning rate of the next update."""
        progress = current.step * (self.total_steps / current.horizon)
        return jnp.asarray(self.schedule(progress))


def build_rule(config: Config) -> UpdateRule:
    """The update rule of a run."""
    steps = config.training.total_steps
    return UpdateRule(
        build_optimizer(config.optimizer), build_schedule(config.optimizer, steps), steps, config.training.ema_decay
    )


def update(
    current: state.TrainState, loss_of: Callable[[Any], Loss], rule: UpdateRule
) -> tuple[state.TrainState, dict[str, Any]]:
    """One step down the gradient of a loss, averaged over devices, and the metrics of the step.

    Args:
        loss_of: ``params -> Loss`` on this device's share of the batch.
    """

    def value_and_rest(params):
        loss = loss_of(params)
        return lax.pmean(loss.value, AXIS), loss

    gradients, loss = jax.grad(value_and_rest, has_aux=True)(current.params)
    gradients = lax.pmean(gradients, AXIS)
    spectral = lax.pmean(loss.constrained.spectral, AXIS)
    learning_rate = rule.learning_rate(current)
    metrics = {
        **lax.pmean(loss.metrics, AXIS),
        **constraint_metrics(loss.constrained),
        "grad_norm": optax.tree.norm(gradients),
        "learning_rate": learning_rate,
    }
    if loss.batch_stats:
        current = current._replace(batch_stats=state.average_statistics(current, loss.batch_stats, rule.ema_decay))
    return state.apply_gradients(current, gradients, spectral, rule.optimizer, learning_rate, rule.ema_decay), metrics


def constraint_metrics(constrained: Constrained) -> dict[str, Any]:
    """The largest operator norm before normalisation and the largest Lipschitz constant after it, if norms were measured."""
    if not any(constrained.norms.values()):
        return {}
    norms = [jnp.max(norm) for stage in constrained.norms.values() for norm in stage.values()]
    lipschitz = [jnp.max(stage["lipschitz"]) for stage in constrained.weights.values()]
    return {
        "max_sigma": lax.pmax(jnp.max(jnp.stack(norms)), AXIS),
        "max_lipschitz": lax.pmax(jnp.max(jnp.stack(lipschitz)), AXIS),
    }
