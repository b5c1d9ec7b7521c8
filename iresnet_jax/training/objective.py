"""What the training loop has to know of what it trains: the variables to begin with, a step, and how to validate."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jax import lax

from iresnet_jax import model
from iresnet_jax.training import state
from iresnet_jax.training.parallel import AXIS


class Objective(NamedTuple):
    """A model and its training, as functions.

    Attributes:
        name: The metric that is shown, such as "bits_per_dim".
        examples: What batches are taken from, as a pytree of arrays; None for endless data, whose steps draw their own.
        optimizer: Update rule.
        initial_variables: ``() ->`` fresh variables, fitted to training data.
        step: ``(state, batch) -> (state, metrics)``, for `parallel.parallelize`.
        make_validation: ``() ->`` the function that measures a state on held-out data; late, as it prepares its own programs.
        loss: What of the held-out metrics a checkpoint is chosen by; lower is better.
    """

    name: str
    examples: Any
    optimizer: optax.GradientTransformation
    initial_variables: Callable[[], Any]
    step: Callable[[state.TrainState, Any], tuple[state.TrainState, dict[str, Any]]]
    make_validation: Callable[[], Callable[[state.TrainState], dict[str, float]]]
    loss: Callable[[Mapping[str, float]], float]


def constraint_metrics(constrained: model.Constrained) -> dict[str, Any]:
    """The largest operator norm before normalisation and the largest Lipschitz constant after it, if norms were measured."""
    if not any(constrained.norms.values()):
        return {}
    norms = [jnp.max(norm) for stage in constrained.norms.values() for norm in stage.values()]
    lipschitz = [jnp.max(stage["lipschitz"]) for stage in constrained.weights.values()]
    return {
        "max_sigma": lax.pmax(jnp.max(jnp.stack(norms)), AXIS),
        "max_lipschitz": lax.pmax(jnp.max(jnp.stack(lipschitz)), AXIS),
    }
