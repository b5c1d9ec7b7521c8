"""The likelihood objective: one training step, and the likelihood of held-out data."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from jaxtyping import Array, Int, Key

from iresnet_jax.maths.logdet.estimator import LogdetEstimator
from iresnet_jax.models import density
from iresnet_jax.models import flow as model
from iresnet_jax.training import parallel
from iresnet_jax.training.building import Spec, build_constraint, build_optimizer, build_schedule, unroll
from iresnet_jax.training.config import Config
from iresnet_jax.training.evaluation import over_batches
from iresnet_jax.training.initialization import initial_variables
from iresnet_jax.training.objectives.objective import HeldOut, Loss, Objective, update
from iresnet_jax.training.parallel import example_keys
from iresnet_jax.training.source import Source
from iresnet_jax.training.state import TrainState

TOLERATED_BIAS = 0.002  # of what is trained, in bits/dim or nats; beyond it training raises its number of terms
REFERENCE_TERMS = 60  # of the series: at an eigenvalue of -.9 they leave .0002 of -2.3
SIGNIFICANT = 3.0  # standard errors by which a bias must differ from 0 to count
ALARMING_BIAS = 0.01  # beyond it a warning is logged
MORE_TERMS = 1.5  # factor on the number of terms
WARNING = (
    "on validation data the log-determinant of training reads %s lower by %.3f than one that is not cut off: training "
    "exploited what its %d terms cut off; start with a larger logdet.num_terms, lower model.coeff or use logdet.kind = roulette"
)


def objective(config: Config, source: Source, spec: Spec) -> Objective:
    """The likelihood of the data under the model that a config describes."""
    assert isinstance(spec, density.DensitySpec)
    settings = config.training
    optimizer = build_optimizer(config.optimizer, settings.total_steps)
    name = density.objective_name(spec)
    trained = config.logdet.build()
    step_by = functools.partial(
        make_step,
        spec,
        optimizer=optimizer,
        schedule=build_schedule(config.optimizer, settings.total_steps),
        seed=config.seed,
        constrain=build_constraint(config.constraint, spec.flow, training=True),
        ema_decay=settings.ema_decay,
        unroll=unroll(settings.blocks),
        rematerialize=settings.rematerialize,
        draw=source.draw,
    )
    return Objective(
        name=name,
        examples=None if source.images is None else source.images.images["train"],
        optimizer=optimizer,
        initial_variables=lambda: initial_variables(config, spec, source),
        make_step=lambda num_terms: step_by(config.logdet.build(num_terms)),
        make_validation=lambda: Validation(config, spec, source),
        loss=lambda held_out: held_out[name],
        num_terms=0 if trained.unbiased else config.logdet.num_terms,
    )


def make_step(
    spec: density.DensitySpec,
    estimator: LogdetEstimator,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    *,
    seed: int,
    constrain: Callable[[Any, Any], model.Constrained],
    ema_decay: float,
    unroll: bool,
    rematerialize: bool = False,
    draw: Callable[[Any, Any], Any] | None = None,
) -> Callable[[TrainState, Any], tuple[TrainState, dict[str, Any]]]:
    """The step ``(state, batch) -> (state, metrics)``, for `parallel.parallelize`.

    Every example has its own random key, made from (seed, step, place in the whole batch): a run gives the same result on any
    number of devices. A random series length comes from (seed, step) alone, so blocks and devices share it.

    Args:
        spec: The model.
        estimator: Log-determinant.
        optimizer: Update rule.
        schedule: Its learning rate, for the log.
        seed: Of the run.
        constrain: ``(params, spectral) ->`` constrained weights.
        ema_decay: Of the moving average of the parameters.
        unroll: Write blocks out instead of scanning over them.
        rematerialize: Recompute a block's inside in the backward pass.
        draw: For endless data: ``(key, placeholder) -> example``; None takes the examples of the batch.
    """

    def step(state: TrainState, batch: Any) -> tuple[TrainState, dict[str, Any]]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        key_length, key_examples = jax.random.split(key)
        keys = jax.vmap(lambda k: jax.random.split(k, 3))(example_keys(key_examples, batch.shape[0]))
        key_draw, key_dequantise, key_probe = keys[:, 0], keys[:, 1], keys[:, 2]
        data = batch if draw is None else jax.vmap(draw)(key_draw, batch)
        x = density.to_continuous(spec, key_dequantise, data)
        shared = estimator.fix_length(key_length)

        def loss_of(params):
            constrained = constrain(params, state.spectral)
            terms = density.log_prob(
                spec, constrained.weights, params["prior"], x, key_probe, shared, unroll=unroll, rematerialize=rematerialize
            )
            loss = jnp.mean(density.objective(spec, terms.log_prob))
            means = {"log_prior": jnp.mean(terms.log_prior), "log_det": jnp.mean(terms.log_det)}
            return Loss(loss, {density.objective_name(spec): loss, **means}, constrained)

        return update(state, loss_of, optimizer, schedule, ema_decay=ema_decay)

    return step


def make_evaluation(spec: density.DensitySpec, estimator: LogdetEstimator) -> Callable[[Any, Any], Any]:
    """``((weights, prior), (x, noise keys, probe keys)) -> `` objective, terms and truncation bound, for `parallelize_eval`.

    Each example's keys, from `evaluation_keys`, decide its noise, probes and series length, so that results do not depend on
    the batching. Blocks are scanned: without gradients that is as fast as writing them out, and compiles in half the time.
    """

    def evaluate(state: tuple[Any, Any], batch: tuple[Any, Any, Any]) -> dict[str, Any]:
        weights, prior = state
        data, key_noise, key_probe = batch
        x = density.to_continuous(spec, key_noise, data)
        terms = density.log_prob(spec, weights, prior, x, key_probe, estimator)
        return {
            density.objective_name(spec): density.objective(spec, terms.log_prob),
            "log_prior": terms.log_prior,
            "log_det": terms.log_det,
            "truncation_bound": density.objective_scale(spec) * terms.info.truncation_bound,
        }

    return evaluate


class Validation:
    """Mean objective of held-out data under the averaged parameters, norms iterated to their tolerance.

    Training may learn to widen the gap between a log-determinant that is cut off and the true one, and nothing else shows it
    before the loss on held-out data rises. ``training_bias`` shows it: the objective by the log-determinant of training less
    the objective by `REFERENCE_TERMS` terms of the series, on one batch with the same noise and probes. While it is below
    `-TOLERATED_BIAS`, training goes on with more terms.
    """

    def __init__(self, config: Config, spec: density.DensitySpec, source: Source):
        estimator, trained = config.evaluation.logdet.build(), config.logdet.build()
        self.spec, self._seed = spec, config.seed
        self._examples = source.held_out("validation", config.training.eval_examples, config.seed)
        constrain = build_constraint(config.constraint, spec.flow, training=False)
        self._constrain = jax.jit(lambda params, spectral: constrain(params, spectral).weights)
        self._evaluate = parallel.parallelize_eval(make_evaluation(spec, estimator))
        self._is_cut = not trained.unbiased
        self._max_num_terms, self._total_steps = config.training.max_num_terms, config.training.total_steps
        reference = dataclasses.replace(config.logdet, kind="series").build(REFERENCE_TERMS)
        self._evaluate_reference = parallel.parallelize_eval(make_evaluation(spec, reference))
        self._evaluate_trained = functools.cache(
            lambda num_terms: parallel.parallelize_eval(make_evaluation(spec, config.logdet.build(num_terms)))
        )
        self._batch_size = config.evaluation.batch_size

    def __call__(self, current: TrainState) -> HeldOut:
        """The mean of every term, and the terms of the log-determinant that training goes on with."""
        return self.measure(current, self.constrain(current))

    def constrain(self, current: TrainState) -> tuple[Any, Any]:
        """The averaged weights, constrained, and the averaged prior."""
        return self._constrain(current.ema, current.spectral), current.ema["prior"]

    def measure(self, current: TrainState, state: tuple[Any, Any]) -> HeldOut:
        """What `__call__` returns, under the weights and the prior that `constrain` made of a training state."""
        outputs = self._outputs(self._evaluate, state, self._examples)
        means = {name: float(np.mean(values, dtype=np.float64)) for name, values in outputs.items()}
        if not self._is_cut:
            return HeldOut(means, int(current.num_terms))
        reference = self._on_a_batch(self._evaluate_reference, state)
        means["training_bias"], is_exploited = self._bias(state, int(current.num_terms), reference)
        self._warn(means["training_bias"], int(current.num_terms))
        num_terms = int(current.num_terms)
        if is_exploited and int(current.step) < self._total_steps:
            num_terms = self._enough_terms(state, num_terms, reference)
        return HeldOut({**means, "num_terms": num_terms}, num_terms)

    def _warn(self, bias: float, num_terms: int) -> None:
        if bias < -ALARMING_BIAS:
            logging.warning(WARNING, density.objective_name(self.spec), -bias, num_terms)

    def _enough_terms(self, state: tuple[Any, Any], num_terms: int, reference: np.ndarray) -> int:
        """The first number of terms above this one whose bias is tolerated, or the largest that is allowed."""
        before, is_exploited = num_terms, True
        while is_exploited and num_terms < self._max_num_terms:
            num_terms = min(math.ceil(MORE_TERMS * num_terms), self._max_num_terms)
            _, is_exploited = self._bias(state, num_terms, reference)
        if num_terms > before:
            logging.info("training goes on with %d terms of the log-determinant: it exploits what fewer cut off", num_terms)
        return num_terms

    def _outputs(self, evaluate: Any, state: tuple[Any, Any], examples: np.ndarray) -> dict[str, np.ndarray]:
        outputs = evaluate_examples(evaluate, state, examples, jax.random.key(self._seed), self._batch_size)
        del outputs["truncation_bound"]
        return outputs

    def _on_a_batch(self, evaluate: Any, state: tuple[Any, Any]) -> np.ndarray:
        outputs = self._outputs(evaluate, state, self._examples[: self._batch_size])
        return outputs[density.objective_name(self.spec)].astype(np.float64)

    def _bias(self, state: tuple[Any, Any], num_terms: int, reference: np.ndarray) -> tuple[float, bool]:
        """How the objective by so many terms differs from the other, and whether it is lower by more than is tolerated."""
        differences = self._on_a_batch(self._evaluate_trained(num_terms), state) - reference
        bias, stderr = float(differences.mean()), float(differences.std() / math.sqrt(len(differences)))
        return bias, bias < -max(TOLERATED_BIAS, SIGNIFICANT * stderr)


def evaluate_examples(
    evaluate: Any,
    weights: Any,
    examples: np.ndarray,
    key: jax.Array,
    batch_size: int,
    *,
    draw: tuple[int, int] = (0, 0),
    num_devices: int | None = None,
) -> dict[str, np.ndarray]:
    """Runs a parallel evaluation over all examples.

    Args:
        evaluate: From `make_evaluation`, for all devices.
        weights: Constrained weights and the prior's parameters.
        examples: The data.
        key: Of the evaluation; an example's random numbers depend on it, its place and the draw, and not on the batches.
        batch_size: See `evaluation.over_batches`.
        draw: Counts the noise draws, and the probe draws of each.
        num_devices: Devices to use, from the first; all local ones by default.
    """

    def batch_of(indices):
        return examples[indices], *evaluation_keys(key, indices, *draw)

    return over_batches(evaluate, weights, batch_of, len(examples), batch_size, num_devices=num_devices)


@jax.jit
def evaluation_keys(
    key: Key[Array, ""],
    examples: Int[Array, " b"] | Int[np.ndarray, " b"],
    noise_draw: int | Int[Array, ""],
    probe_draw: int | Int[Array, ""],
) -> tuple[Key[Array, " b"], Key[Array, " b"]]:
    """The keys of examples' dequantisation noise, and of their probes and series lengths.

    Probe draws of one noise draw share its noise and are otherwise independent, as everything else is.

    Args:
        key: Of the evaluation.
        examples: Places in the data set.
        noise_draw: Counts dequantisations.
        probe_draw: Counts the probe draws of one dequantisation.
    """

    def of_example(example):
        key_noise, key_probe = jax.random.split(jax.random.fold_in(jax.random.fold_in(key, example), noise_draw))
        return key_noise, jax.random.fold_in(key_probe, probe_draw)

    return jax.vmap(of_example)(jnp.asarray(examples))
