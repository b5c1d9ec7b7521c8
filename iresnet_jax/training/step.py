"""One training step, read from top to bottom: constrain, loss and gradients, mean over devices,
optimizer, averages.

A `TrainingStep` is written for one device and its share of the batch. `parallel.parallelize` maps
it over all devices, and `Trainer.steps` calls it with one batch after the other.

What a step depends on is bound once, in ``_training_step`` of `runs.objective_from_config`: the
model without weights, the loss (``make_loss`` in the objective's file, such as `training.density`),
the constraint (`constraint.training_constraint`) and the optimizer. An `Objective` is a step with
its validation, its data and its first state.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Float, Int, Key

from iresnet_jax.maths.logdet_config import LogdetConfig
from iresnet_jax.maths.platforms import fast_compile
from iresnet_jax.models.contractions import ConstrainedFlow
from iresnet_jax.models.density_spec import DensitySpec
from iresnet_jax.models.saved import Spec
from iresnet_jax.training.constraint import Constrain
from iresnet_jax.training.initialization import abstract_variables
from iresnet_jax.training.optimizers import ema_update
from iresnet_jax.training.parallel import AXIS, example_keys


class TrainState(NamedTuple):
    """The state of a run, equal on every device; all but `constants` is changed by steps and saved
    by checkpoints.

    Attributes:
        step: Finished updates.
        params: Parameters that the optimizer changes.
        spectral: Power iterates.
        ema: Moving average of the parameters; evaluation uses it.
        opt_state: State of the optimizer.
        batch_stats: Running averages of BatchNorm; empty without BatchNorm.
        num_terms: Terms of the log-determinant in training, which validation may raise; 0 if the
            estimator has no such setting.
        horizon: Updates in the whole run, on which the learning rate depends; a run with a time
            limit estimates it on the way.
        constants: What no step changes and no checkpoint saves, so that runs by other seeds and of
            other data share a program: the "seed", and the "spec" of a density, which holds the
            numbers of its preprocessing.
    """

    step: Int[Array, ""]
    params: Any
    spectral: Any
    ema: Any
    opt_state: Any
    batch_stats: Any
    num_terms: Int[Array, ""]
    horizon: Int[Array, ""]
    constants: Any


@functools.partial(fast_compile, static_argnums=(1,))  # so that all copies are one program
def first_state(
    variables: Any, optimizer: optax.GradientTransformation, of_run: Any = None
) -> TrainState:
    """The state before the first update.

    Args:
        variables: Variables by collection: "params", "spectral" and "batch_stats".
        optimizer: The optimizer.
        of_run: What else the run begins with, by its names in `TrainState`.
    """
    of_run = of_run or {"num_terms": np.int32(0), "horizon": np.int32(1), "constants": {}}
    params, spectral, batch_stats = (
        variables.get(name, {}) for name in ("params", "spectral", "batch_stats")
    )
    fresh = TrainState(
        jnp.int32(0), params, spectral, params, optimizer.init(params), batch_stats, **of_run
    )
    return jax.tree.map(jnp.copy, fresh)  # a buffer each: the step is given the state, and frees it


def abstract_state(
    spec: Spec, optimizer: optax.GradientTransformation, of_run: Any = None
) -> TrainState:
    """Shapes and dtypes of a model's state, without computing it."""
    return jax.eval_shape(
        lambda variables: first_state(variables, optimizer, of_run), abstract_variables(spec)
    )


class StepKeys(NamedTuple):
    """The randomness of a step. It depends neither on the number of devices nor on the number of
    parts.

    Attributes:
        step: Finished updates.
        shared: Key from (seed, step): one for all examples, on all devices.
        examples: Key of every example, from (seed, step, place in the whole batch).
    """

    step: Int[Array, ""]
    shared: Key[Array, ""]
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


class UpdateRule(NamedTuple):
    """Rule by which a gradient changes the state.

    Attributes:
        optimizer: Optimizer at a learning rate of 1, which the schedule multiplies.
        schedule: Learning rate as a function of the step, for a run of ``total_steps``; None if the
            optimizer has its own.
        total_steps: Updates that the schedule is made for; a run of another length stretches it.
        ema_decay: Decay of the moving averages of the parameters and of BatchNorm's statistics.
    """

    optimizer: optax.GradientTransformation
    schedule: optax.Schedule | None
    total_steps: int
    ema_decay: float


@dataclass(frozen=True, eq=False)  # compared by identity: caches keep one program per step object
class TrainingStep:
    """``(state, batch) -> (state, metrics)``: one step down the gradient of a loss, averaged over
    devices.

    Attributes:
        model: The model without weights, run as training runs it.
        loss: ``(model, batch, keys) -> Loss``, of a constrained model on examples of the batch.
        constrain: ``(params, spectral) ->`` constrained weights.
        rule: How a gradient changes the state.
        num_parts: Parts of a device's share of the batch whose losses are computed one after the
            other.
    """

    model: Any
    loss: Callable[[Any, Any, StepKeys], Loss]
    constrain: Constrain
    rule: UpdateRule
    num_parts: int = 1

    def __call__(self, state: TrainState, batch: Any) -> tuple[TrainState, dict[str, Any]]:
        """The state after one update and the metrics of the step, of this device's share of a
        batch.
        """
        rule = self.rule
        key_shared, key_examples = jax.random.split(
            jax.random.fold_in(jax.random.key(state.constants["seed"]), state.step)
        )
        keys = example_keys(key_examples, len(jax.tree.leaves(batch)[0]))

        # 1. Constrain: every block becomes a contraction. The constraint is computed once per step;
        # its vjp takes the mean gradient of all parts back.
        def constrained_weights(params):
            constrained = self.constrain(params, state.spectral)
            return constrained.weights, constrained

        weights, pull_back, constrained = jax.vjp(constrained_weights, state.params, has_aux=True)
        # parameters without a constraint, such as the prior's
        free = {name: leaf for name, leaf in state.params.items() if name not in weights}
        spec = state.constants.get("spec")
        model = self.model if spec is None else self.model.with_(spec=spec)

        # 2. Loss and gradients, part by part.
        def loss_of(weights, free, part):
            examples, part_keys = part
            loss = self.loss(
                model.with_(weights=weights, **free),
                examples,
                StepKeys(state.step, key_shared, part_keys),
            )
            return loss.value, loss

        (of_weights, of_free), loss = _mean_over_parts(
            lambda part: jax.grad(loss_of, argnums=(0, 1), has_aux=True)(weights, free, part),
            (batch, keys),
            self.num_parts,
        )
        [gradients] = pull_back(of_weights)
        gradients = {**gradients, **of_free}

        # 3. Mean over devices. One pmean, so that compilers make one reduction. Iterates depend on
        # no data; averaging keeps unlike devices equal.
        own_metrics = {**loss.metrics, **_constraint_metrics(constrained)}
        gradients, metrics, spectral = lax.pmean(
            (gradients, own_metrics, constrained.spectral), AXIS
        )

        with jax.named_scope("optimizer"):
            # 4. Optimizer.
            metrics |= {"grad_norm": optax.tree.norm(gradients)}
            updates, opt_state = rule.optimizer.update(gradients, state.opt_state, state.params)
            if rule.schedule is not None:
                learning_rate = jnp.asarray(
                    rule.schedule(state.step * (rule.total_steps / state.horizon))
                )
                metrics |= {"learning_rate": learning_rate}
                updates = jax.tree.map(
                    lambda update: learning_rate.astype(update.dtype) * update, updates
                )
            params = optax.apply_updates(state.params, updates)

            # 5. Averages.
            ema, batch_stats = (
                ema_update(state.ema, params, state.step, rule.ema_decay),
                state.batch_stats,
            )
            if loss.batch_stats:  # one batch is noisy: average over at least ten
                batch_stats = ema_update(
                    batch_stats, loss.batch_stats, state.step, max(rule.ema_decay, 0.9)
                )
        return state._replace(
            step=state.step + 1,
            params=params,
            spectral=spectral,
            ema=ema,
            opt_state=opt_state,
            batch_stats=batch_stats,
        ), metrics


def _mean_over_parts(compute: Callable[[Any], Any], rows: Any, num_parts: int) -> Any:
    """Mean of what a function computes of equal parts of some rows: no more than the arrays of
    one part are in memory.
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
    """The largest operator norm before normalisation and the largest Lipschitz constant after
    it, if norms were measured.
    """
    if not any(constrained.norms.values()):
        return {}
    norms = [jnp.max(norm) for stage in constrained.norms.values() for norm in stage.values()]
    lipschitz = [jnp.max(block.branch.lipschitz_bound) for block in constrained.weights.values()]
    return {"max_sigma": jnp.max(jnp.stack(norms)), "max_lipschitz": jnp.max(jnp.stack(lipschitz))}


class ValidationResult(NamedTuple):
    """Result of a validation.

    Attributes:
        metrics: Means over the held-out examples, for the log.
        num_terms: Terms of the log-determinant that training goes on with; 0 if the estimator has
            no such setting.
        losses: The loss of each example whose mean chooses a state; None if only the mean is known.
    """

    metrics: dict[str, float]
    num_terms: int = 0
    losses: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class Objective:
    """A model and its training; `runs.objective_from_config` builds one for each objective of a
    config.

    Attributes:
        name: The metric that is shown, such as "bits_per_dim".
        training_step: The step of one device, before `parallel.parallelize`.
        make_validation: ``() ->`` the function that measures a state on held-out data; None if
            there are none.
        selection: ``held-out metrics -> number``; the state with the lowest is the best.
        examples: Pytree of arrays that batches are taken from; None for endless data, whose steps
            draw their own.
        initial_variables: ``() ->`` fresh variables, fitted to training data.
        seed: Seed of the run, from 0 to 2^32 - 1.
        logdet: Settings of the log-determinant, for models that have one in training.
    """

    name: str
    training_step: TrainingStep
    make_validation: Callable[[], Callable[[TrainState], ValidationResult]] | None
    selection: Callable[[Mapping[str, float]], float]
    examples: Any
    initial_variables: Callable[[], Any]
    seed: int
    logdet: LogdetConfig | None = None

    @property
    def num_terms(self) -> int:
        """Terms of the log-determinant that training starts with; 0 if the estimator has no such
        setting.
        """
        return 0 if self.logdet is None or self.logdet.build().unbiased else self.logdet.num_terms

    def step_with(self, num_terms: int) -> TrainingStep:
        """The training step with so many terms of the log-determinant."""
        if self.logdet is None or num_terms == self.num_terms:
            return self.training_step
        model = self.training_step.model.with_(estimator=self.logdet.build(num_terms))
        return dataclasses.replace(self.training_step, model=model)

    def state_of(self, variables: Any) -> TrainState:
        """The state before the first update."""
        return first_state(variables, self.training_step.rule.optimizer, self._of_run())

    def initial_state(self) -> TrainState:
        """The state of fresh variables."""
        return self.state_of(self.initial_variables())

    def abstract_state(self) -> TrainState:
        """Shapes and dtypes of the state."""
        return abstract_state(
            self.training_step.model.spec, self.training_step.rule.optimizer, self._of_run()
        )

    def _of_run(self) -> dict[str, Any]:
        spec, horizon = (
            getattr(self.training_step.model, "spec", None),
            np.int32(self.training_step.rule.total_steps),
        )
        of_data = {"spec": spec} if isinstance(spec, DensitySpec) else {}
        constants = {"seed": np.uint32(self.seed), **of_data}
        return {"num_terms": np.int32(self.num_terms), "horizon": horizon, "constants": constants}

    def abstract_batch(self, batch_size: int) -> Any:
        """Shapes and dtypes of a batch; placeholders for endless data, which has no examples."""
        return abstract_batch(
            np.zeros(1, np.float32) if self.examples is None else self.examples, batch_size
        )


def abstract_batch(examples: Any, batch_size: int) -> Any:
    """Shapes of a batch, in the dtypes that JAX gives to arrays: without ``jax_enable_x64``,
    float32 for float64.
    """

    def of_rows(rows):
        return jax.ShapeDtypeStruct(
            (batch_size, *rows.shape[1:]), jax.dtypes.canonicalize_dtype(rows.dtype)
        )

    return jax.tree.map(of_rows, examples)
