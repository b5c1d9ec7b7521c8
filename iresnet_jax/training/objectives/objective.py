"""What the training loop knows of a model: its first variables, a training step and a validation."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from iresnet_jax.models.flow import Constrained
from iresnet_jax.runs.config import Config
from iresnet_jax.runs.from_config import Constrain, build_optimizer, build_schedule
from iresnet_jax.training import state
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
        abstract_variables: ``() ->`` their shapes and dtypes, without computing them.
        make_step: ``num_terms ->`` the step ``(state, batch) -> (state, metrics)``, for `parallel.parallelize`.
        make_validation: ``() ->`` the function that measures a state on held-out data.
        loss: Number that a checkpoint is chosen by, from the held-out metrics; lower is better.
        num_terms: Terms of the log-determinant that training starts with; 0 if the estimator has no such setting.
    """

    name: str
    examples: Any
    rule: "UpdateRule"
    initial_variables: Callable[[], Any]
    abstract_variables: Callable[[], Any]
    make_step: Callable[[int], Callable[[state.TrainState, Any], tuple[state.TrainState, dict[str, Any]]]]
    make_validation: Callable[[], Callable[[state.TrainState], HeldOut]]
    loss: Callable[[Mapping[str, float]], float]
    num_terms: int = 0

    def initial_state(self) -> state.TrainState:
        """The state before the first update."""
        created = _state_creator(self.rule.optimizer)(self.initial_variables())
        return created._replace(num_terms=jnp.int32(self.num_terms), horizon=jnp.int32(self.rule.total_steps))

    def abstract_state(self) -> state.TrainState:
        """Shapes and dtypes of the state."""
        return jax.eval_shape(_state_creator(self.rule.optimizer), self.abstract_variables())

    def adapt(self, current: state.TrainState, held_out: HeldOut) -> state.TrainState:
        """The state that training goes on with after a validation: with more terms of the log-determinant, if it found so."""
        return current._replace(num_terms=jnp.int32(held_out.num_terms))


@functools.lru_cache(maxsize=64)
def _state_creator(optimizer: optax.GradientTransformation) -> Callable[[Any], state.TrainState]:
    """One program for the state of all runs with one optimizer: copies one by one would compile one by one."""
    return jax.jit(lambda variables: state.create(variables, optimizer))


class Loss(NamedTuple):
    """Loss of a batch, and what comes with it.

    Attributes:
        value: Loss to minimise, a mean over the batch.
        metrics: Means over the batch, for the log.
        batch_stats: BatchNorm's statistics of the batch, over all devices; None without BatchNorm.
    """

    value: Any
    metrics: dict[str, Any]
    batch_stats: Any = None


class UpdateRule(NamedTuple):
    """How a gradient changes the state.

    Attributes:
        optimizer: Optimizer at a learning rate of 1.
        schedule: Learning rate by step of a run of ``total_steps``.
        total_steps: Updates that the schedule is made for; a run of another length stretches it.
        ema_decay: Decay of the moving averages of the parameters and of BatchNorm's statistics.
        num_parts: Parts of a device's share of the batch that are computed one after the other.
    """

    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    total_steps: int
    ema_decay: float
    num_parts: int = 1

    def learning_rate(self, current: state.TrainState) -> jax.Array:
        """The learning rate of the next update."""
        progress = current.step * (self.total_steps / current.horizon)
        return jnp.asarray(self.schedule(progress))


def build_rule(config: Config) -> UpdateRule:
    """The update rule of a run."""
    settings = config.training
    schedule = build_schedule(config.optimizer, settings.total_steps)
    optimizer = build_optimizer(config.optimizer)
    return UpdateRule(optimizer, schedule, settings.total_steps, settings.ema_decay, settings.num_parts)


LossOf = Callable[[Any, Any, Any], Loss]  # (constrained weights, parameters without a constraint, examples) -> their loss


def update(
    current: state.TrainState, constrain: Constrain, loss_of: LossOf, batch: Any, rule: UpdateRule
) -> tuple[state.TrainState, dict[str, Any]]:
    """One step down the gradient of a loss, averaged over devices, and the metrics of the step.

    Weights are constrained once, and the gradient goes back through the constraint once, whatever the number of parts.

    Args:
        constrain: ``(params, spectral) ->`` constrained weights.
        loss_of: ``(weights, free, examples) -> Loss``, where ``free`` are the parameters that have no constraint.
        batch: This device's share of the batch, a pytree of arrays whose first axis counts examples.
    """

    def constrained_weights(params):
        constrained = constrain(params, current.spectral)
        return constrained.weights, constrained

    weights, pull_back, constrained = jax.vjp(constrained_weights, current.params, has_aux=True)
    free = {name: leaf for name, leaf in current.params.items() if name not in weights}
    (of_weights, of_free), loss = mean_gradients(loss_of, weights, free, batch, rule.num_parts)
    [own_gradients] = pull_back(of_weights)
    own_gradients = {**own_gradients, **of_free}
    own_metrics = {**loss.metrics, **constraint_metrics(constrained)}
    # All sums over devices at once, which compilers make one reduction. Power iterates depend on no data: devices of one kind
    # compute equal ones, their mean is for those that do not.
    gradients, metrics, spectral = lax.pmean((own_gradients, own_metrics, constrained.spectral), AXIS)
    learning_rate = rule.learning_rate(current)
    metrics |= {"grad_norm": optax.tree.norm(gradients), "learning_rate": learning_rate}
    if loss.batch_stats:
        current = current._replace(batch_stats=state.average_statistics(current, loss.batch_stats, rule.ema_decay))
    return state.apply_gradients(current, gradients, spectral, rule.optimizer, learning_rate, rule.ema_decay), metrics


def mean_gradients(loss_of: LossOf, weights: Any, free: Any, batch: Any, num_parts: int) -> tuple[tuple[Any, Any], Loss]:
    """Gradients of a loss by ``(weights, free)``, and the loss; both means over equal parts of the batch.

    With parts no more than the arrays of one are in memory at a time.
    """

    def of_examples(examples):
        def value_and_rest(weights, free):
            loss = loss_of(weights, free, examples)
            return loss.value, loss

        return jax.grad(value_and_rest, argnums=(0, 1), has_aux=True)(weights, free)

    if num_parts == 1:
        return of_examples(batch)
    parts = jax.tree.map(lambda rows: rows.reshape(num_parts, -1, *rows.shape[1:]), batch)
    zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(of_examples, jax.tree.map(lambda rows: rows[0], parts)))
    sums, _ = lax.scan(lambda sums, part: (jax.tree.map(jnp.add, sums, of_examples(part)), None), zeros, parts)
    return jax.tree.map(lambda total: total / num_parts, sums)


def constraint_metrics(constrained: Constrained) -> dict[str, Any]:
    """The largest operator norm before normalisation and the largest Lipschitz constant after it, if norms were measured."""
    if not any(constrained.norms.values()):
        return {}
    norms = [jnp.max(norm) for stage in constrained.norms.values() for norm in stage.values()]
    lipschitz = [jnp.max(stage.branch.lipschitz_bound) for stage in constrained.weights.values()]
    return {"max_sigma": jnp.max(jnp.stack(norms)), "max_lipschitz": jnp.max(jnp.stack(lipschitz))}
