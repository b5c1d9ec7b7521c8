"""One training step, read from top to bottom: constrain, loss and gradients, mean over devices,
optimizer, averages.

A `Step` is written for one device and its share of the batch. `parallel.parallelize` maps it over
all devices, and `train` calls it with one batch after the other.
"""

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Float, Int, Key, UInt32

from iresnet_jax.maths.platforms import fast_compile
from iresnet_jax.models.contractions import ConstrainedFlow
from iresnet_jax.models.free import Free, abstract
from iresnet_jax.training.optimizers import ema_update
from iresnet_jax.training.parallel import AXIS, example_keys


class State(NamedTuple):
    """What steps change, equal on every device: all that a checkpoint holds.

    Attributes:
        step: Finished updates.
        params: Parameters that the optimizer changes.
        spectral: Power iterates.
        ema: Moving average of the parameters; evaluation uses it.
        opt_state: State of the optimizer.
        batch_stats: Running averages of BatchNorm; empty without BatchNorm.
        horizon: Updates in the whole training, on which the learning rate depends; a time limit
            estimates it on the way.
    """

    step: Int[Array, ""]
    params: Any
    spectral: Any
    ema: Any
    opt_state: Any
    batch_stats: Any
    horizon: Int[Array, ""]


class Fixed(NamedTuple):
    """What no step changes: arguments, so that other seeds and data share the program.

    Attributes:
        seed: Seed of the training, from 0 to 2^32 - 1.
        free: The model as training runs it, without its variables.
    """

    seed: UInt32[Array, ""] | np.uint32
    free: Free

    @classmethod
    def of(cls, seed: int, free: Free, **how: Any) -> "Fixed":
        """The arguments of a training; ``how`` is that of `How.in_training`."""
        spec = free.spec
        # names of columns would be compiled anew for other tables
        spec = dataclasses.replace(spec, columns=None) if hasattr(spec, "columns") else spec
        in_training = free.how.in_training(spec, **how)
        return cls(np.uint32(seed), Free({}, {}, {}, spec, in_training, free.constraint))


class Keys(NamedTuple):
    """The randomness of a step.

    Attributes:
        step: Finished updates.
        shared: Key from (seed, step): one for all examples, on all devices.
        device: Key from (seed, step, device, part).
        examples: Key of every example, from (seed, step, place in the whole batch): it depends
            neither on the number of devices nor on the number of parts.
    """

    step: Int[Array, ""]
    shared: Key[Array, ""]
    device: Key[Array, ""]
    examples: Key[Array, " b"]


class Loss(NamedTuple):
    """Loss of examples, and what comes with it.

    Attributes:
        value: Loss to minimise, a mean over the examples.
        metrics: Means over the examples, for the log.
        batch_stats: BatchNorm's statistics of the batch, over all devices; None without BatchNorm.
    """

    value: Float[Array, ""]
    metrics: dict[str, Any]
    batch_stats: Any = None


@dataclass(frozen=True, eq=False)  # compared by identity: caches keep one program per step object
class Step:
    """``(state, fixed, batch) -> (state, metrics)``: one step down the gradient of a loss, averaged
    over devices.

    Attributes:
        loss: ``(model, batch, keys) -> Loss``, of a constrained model on examples of the batch.
        optimizer: Optimizer; at a learning rate of 1 if there is a schedule, which multiplies it.
        schedule: Learning rate as a function of the step, for a training of `length` updates; None
            if the optimizer has its own.
        length: Updates that the schedule is made for; a training of another length stretches it.
        ema_decay: Decay of the moving averages of the parameters and of BatchNorm's statistics.
        num_parts: Parts of a device's share of the batch whose losses are computed one after the
            other.
    """

    loss: Callable[[Any, Any, Keys], Loss]
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule | None
    length: int
    ema_decay: float
    num_parts: int = 1

    def __call__(self, state: State, fixed: Fixed, batch: Any) -> tuple[State, dict[str, Any]]:
        """The state after one update and the metrics of the step, of this device's share of a
        batch.
        """
        key, key_examples = jax.random.split(
            jax.random.fold_in(jax.random.key(fixed.seed), state.step)
        )
        keys = example_keys(key_examples, len(jax.tree.leaves(batch)[0]))
        numbers = jnp.arange(len(keys)) // (len(keys) // self.num_parts)  # of the parts
        how = fixed.free.how.for_step(key)

        # 1. Constrain: every block becomes a contraction. The constraint is computed once per step;
        # its vjp takes the mean gradient of all parts back.
        def constrained_weights(params):
            constrained = fixed.free.constraint_of_step(params, state.spectral)
            return constrained.weights, constrained

        weights, pull_back, constrained = jax.vjp(constrained_weights, state.params, has_aux=True)
        # parameters without a constraint, such as the prior's
        learned = {name: leaf for name, leaf in state.params.items() if name not in weights}

        # 2. Loss and gradients, part by part.
        def loss_of(weights, learned, part):
            examples, own_keys, number = part
            device = jax.random.fold_in(key, lax.axis_index(AXIS))
            if self.num_parts > 1:
                device = jax.random.fold_in(device, number[0])
            model = fixed.free.build(weights, learned, state.batch_stats, how)
            loss = self.loss(model, examples, Keys(state.step, key, device, own_keys))
            return loss.value, loss

        (of_weights, of_learned), loss = _mean_over_parts(
            lambda part: jax.grad(loss_of, argnums=(0, 1), has_aux=True)(weights, learned, part),
            (batch, keys, numbers),
            self.num_parts,
        )
        [gradients] = pull_back(of_weights)
        gradients = {**gradients, **of_learned}

        # 3. Mean over devices. One pmean, so that compilers make one reduction. Iterates depend on
        # no data; averaging keeps unlike devices equal.
        own_metrics = {**loss.metrics, **_constraint_metrics(constrained)}
        gradients, metrics, spectral = lax.pmean(
            (gradients, own_metrics, constrained.spectral), AXIS
        )

        with jax.named_scope("optimizer"):
            # 4. Optimizer.
            metrics |= {"grad_norm": optax.tree.norm(gradients)}
            updates, opt_state = self.optimizer.update(gradients, state.opt_state, state.params)
            if self.schedule is not None:
                rate = jnp.asarray(self.schedule(state.step * (self.length / state.horizon)))
                metrics |= {"learning_rate": rate}
                updates = jax.tree.map(lambda update: rate.astype(update.dtype) * update, updates)
            params = optax.apply_updates(state.params, updates)

            # 5. Averages.
            ema = ema_update(state.ema, params, state.step, self.ema_decay)
            batch_stats = state.batch_stats
            if loss.batch_stats:  # one batch is noisy: average over at least ten
                batch_stats = ema_update(
                    batch_stats, loss.batch_stats, state.step, max(self.ema_decay, 0.9)
                )
        return State(
            state.step + 1, params, spectral, ema, opt_state, batch_stats, state.horizon
        ), metrics


def first_state(free: Free, optimizer: optax.GradientTransformation, length: int) -> State:
    """The state before the first update of a training of so many, as far as is known."""
    variables = free.params, free.iterates, free.statistics
    return _first_state(variables, optimizer, np.int32(length))


@functools.partial(fast_compile, static_argnums=(1,))  # so that all copies are one program
def _first_state(variables: Any, optimizer: optax.GradientTransformation, length: Any) -> State:
    params, spectral, batch_stats = variables
    opt_state = optimizer.init(params)
    fresh = State(jnp.int32(0), params, spectral, params, opt_state, batch_stats, length)
    return jax.tree.map(jnp.copy, fresh)  # a buffer each: the step is given the state, and frees it


def abstract_state(spec: Any, optimizer: optax.GradientTransformation) -> State:
    """Shapes and dtypes of a model's state, without computing it."""
    return jax.eval_shape(lambda free: first_state(free, optimizer, 1), abstract(spec))


def _mean_over_parts(compute: Callable[[Any], Any], rows: Any, num_parts: int) -> Any:
    """Mean of what a function computes of equal parts of some rows: no more than the arrays of one
    part are in memory.
    """
    if num_parts == 1:
        return compute(rows)
    parts = jax.tree.map(lambda leaf: leaf.reshape(num_parts, -1, *leaf.shape[1:]), rows)
    zeros = jax.tree.map(
        jnp.zeros_like, jax.eval_shape(compute, jax.tree.map(lambda leaf: leaf[0], parts))
    )
    sums, _ = lax.scan(
        lambda sums, part: (jax.tree.map(jnp.add, sums, compute(part)), None), zeros, parts
    )
    return jax.tree.map(lambda total: total / num_parts, sums)


def _constraint_metrics(constrained: ConstrainedFlow) -> dict[str, Any]:
    """The largest operator norm before normalisation and the largest Lipschitz constant after it,
    if norms were measured.
    """
    if not any(constrained.norms.values()):
        return {}
    norms = [jnp.max(norm) for stage in constrained.norms.values() for norm in stage.values()]
    lipschitz = [jnp.max(block.branch.lipschitz_bound) for block in constrained.weights.values()]
    return {"max_sigma": jnp.max(jnp.stack(norms)), "max_lipschitz": jnp.max(jnp.stack(lipschitz))}
