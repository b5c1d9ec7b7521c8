"""The state of a training run, which every step changes and every checkpoint saves."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from iresnet_jax.training.optimizers import ema_update


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
    """

    step: Int[Array, ""]
    params: Any
    spectral: Any
    ema: Any
    opt_state: Any
    batch_stats: Any
    num_terms: Int[Array, ""]


def create(variables: Any, optimizer: optax.GradientTransformation, *, num_terms: int = 0) -> TrainState:
    """Makes the state before the first update from the variables of a module."""
    params = variables["params"]
    return TrainState(
        step=jnp.int32(0),
        params=params,
        spectral=variables.get("spectral", {}),
        ema=jax.tree.map(jnp.copy, params),  # its own buffers: the state is donated to the step
        opt_state=optimizer.init(params),
        batch_stats=variables.get("batch_stats", {}),
        num_terms=jnp.int32(num_terms),
    )


def apply_gradients(
    state: TrainState, gradients: Any, spectral: Any, optimizer: optax.GradientTransformation, ema_decay: float
) -> TrainState:
    """Returns the state after one update; `average_statistics` updates the running averages of BatchNorm."""
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = ema_update(state.ema, params, state.step, ema_decay)
    return state._replace(step=state.step + 1, params=params, spectral=spectral, ema=ema, opt_state=opt_state)


def average_statistics(state: TrainState, batch_stats: Any, ema_decay: float) -> Any:
    """Returns the running averages of BatchNorm after a batch; their decay is that of the parameters' average, at least .9."""
    return ema_update(state.batch_stats, batch_stats, state.step, max(ema_decay, 0.9))
