"""The state of a training run, which every step changes and every checkpoint saves."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from iresnet_jax.training.optimizers import ema_update

OPTIMIZER = "optimizer"  # name of the update's operations in programs


class TrainState(NamedTuple):
    """The state of a run, equal on every device.

    Attributes:
        step: Finished updates.
        params: Parameters that the optimizer changes.
        spectral: Power iterates.
        ema: Moving average of the parameters; evaluation uses it.
        opt_state: State of the optimizer.
        batch_stats: Running averages of BatchNorm; empty without BatchNorm.
        num_terms: Terms of the log-determinant in training, which validation may raise; 0 if the estimator has no such setting.
        horizon: Updates in the whole run, on which the learning rate depends; a run with a time limit estimates it on the way.
    """

    step: Int[Array, ""]
    params: Any
    spectral: Any
    ema: Any
    opt_state: Any
    batch_stats: Any
    num_terms: Int[Array, ""]
    horizon: Int[Array, ""]


def create(variables: Any, optimizer: optax.GradientTransformation, *, num_terms: int = 0, horizon: int = 1) -> TrainState:
    """Makes the state before the first update from the variables of a module."""
    params = jax.tree.map(jnp.copy, variables["params"])  # a buffer each: the step is given the state, and frees it
    return TrainState(
        step=jnp.int32(0),
        params=params,
        spectral=variables.get("spectral", {}),
        ema=jax.tree.map(jnp.copy, params),
        opt_state=optimizer.init(params),
        batch_stats=variables.get("batch_stats", {}),
        num_terms=jnp.int32(num_terms),
        horizon=jnp.int32(horizon),
    )


@jax.named_scope(OPTIMIZER)
def apply_gradients(
    state: TrainState,
    gradients: Any,
    spectral: Any,
    optimizer: optax.GradientTransformation,
    learning_rate: Float[Array, ""],
    ema_decay: float,
) -> TrainState:
    """Returns the state after one update; `average_statistics` updates the running averages of BatchNorm.

    Args:
        state: The state before.
        gradients: Gradient of the loss.
        spectral: New power iterates.
        optimizer: Update rule at a learning rate of 1.
        learning_rate: Factor on its updates.
        ema_decay: Decay of the moving average.
    """
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    updates = jax.tree.map(lambda update: learning_rate.astype(update.dtype) * update, updates)
    params = optax.apply_updates(state.params, updates)
    ema = ema_update(state.ema, params, state.step, ema_decay)
    return state._replace(step=state.step + 1, params=params, spectral=spectral, ema=ema, opt_state=opt_state)


def average_statistics(state: TrainState, batch_stats: Any, ema_decay: float) -> Any:
    """Returns the running averages of BatchNorm after a batch; their decay is that of the parameters' average, at least .9."""
    return ema_update(state.batch_stats, batch_stats, state.step, max(ema_decay, 0.9))
