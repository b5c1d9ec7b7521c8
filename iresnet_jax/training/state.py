"""What a training run carries from step to step, and saves."""

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
        params: Parameters that the optimizer moves.
        spectral: Power iterates.
        ema: Moving average of the parameters, the ones that are evaluated.
        opt_state: The optimizer's own.
        batch_stats: Running averages of BatchNorm, where there is one.
        num_terms: Of the log-determinant that is trained, which validation raises; 0 without one.
    """

    step: Int[Array, ""]
    params: Any
    spectral: Any
    ema: Any
    opt_state: Any
    batch_stats: Any
    num_terms: Int[Array, ""]


def create(variables: Any, optimizer: optax.GradientTransformation, *, num_terms: int = 0) -> TrainState:
    """The state before the first update, from a module's variables."""
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
    """The state after one update; BatchNorm's running averages are moved by `average_statistics`."""
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = ema_update(state.ema, params, state.step, ema_decay)
    return state._replace(step=state.step + 1, params=params, spectral=spectral, ema=ema, opt_state=opt_state)


def average_statistics(state: TrainState, batch_stats: Any, ema_decay: float) -> Any:
    """Running averages of BatchNorm over the same steps as the averaged parameters they are used with.

    Without an average of the parameters (``ema_decay`` of 0) they still go over the last ten steps or so.
    """
    return ema_update(state.batch_stats, batch_stats, state.step, max(ema_decay, 0.9))
