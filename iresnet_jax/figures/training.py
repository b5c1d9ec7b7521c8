"""Training of the small networks that figures make from nothing: Adam in one compiled program."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from iresnet_jax.models.model import Model
from iresnet_jax.training.unconstrained import Unconstrained

M = TypeVar("M", bound=Model)


def minimise(
    loss: Callable[[Any, Any, Any], tuple[Array, Any]], params: Any, iterates: Any, batches: Any, learning_rate: float
) -> tuple[Any, Any]:
    """Parameters and power iterates after an update for each batch, by Adam with clipped gradients; to be called under ``jit``.

    Args:
        loss: ``(params, iterates, batch) -> (loss, iterates of the next step)``.
        params: Parameters to start from.
        iterates: Power iterates to start from.
        batches: What the loss takes, stacked over updates.
        learning_rate: Learning rate of the first update, from which it falls to 0 as a cosine.
    """
    schedule = optax.cosine_decay_schedule(learning_rate, len(batches))
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))

    def step(state: Any, batch: Any) -> tuple[Any, None]:
        params, iterates, moments = state
        gradient, iterates = jax.grad(loss, has_aux=True)(params, iterates, batch)
        updates, moments = optimizer.update(gradient, moments, params)
        return (optax.apply_updates(params, updates), iterates, moments), None

    (params, iterates, _), _ = jax.lax.scan(step, (params, iterates, optimizer.init(params)), batches)
    return params, iterates


def trained(model: M, loss: Callable[..., Array], data: Sequence[Any], places: Int[Array, "k b"], *, learning_rate: float) -> M:
    """A model after training, certified if it is constrained; models of one architecture share a compiled program.

    Args:
        model: The model to start from.
        loss: ``(model, *rows of data) -> loss``, a function of a module.
        data: Arrays with a row for each example.
        places: Rows of the batch of each update.
        learning_rate: See `minimise`.
    """
    free = Unconstrained.of(model)
    return _trained(free, [jnp.asarray(rows) for rows in data], places, loss, learning_rate).certified()


@functools.partial(jax.jit, static_argnames=("loss", "learning_rate"))
def _trained(
    free: Unconstrained, data: Sequence[Array], places: Array, loss: Callable[..., Array], learning_rate: float
) -> Unconstrained:
    def of_params(params, iterates, batch):
        model, iterates = free.with_(iterates=iterates).constrain(params)
        return loss(model, *(rows[batch] for rows in data)), iterates

    params, iterates = minimise(of_params, free.params, free.iterates, places, learning_rate)
    return free.with_(params=params, iterates=iterates)
