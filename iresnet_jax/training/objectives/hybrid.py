"""The hybrid objective: one network that classifies images and models their density (Nalisnick et al. 2019).

    loss = cross-entropy(label, p(y | x)) + lambda bits/dim(x),

with both from the joint density ``p(x, y) = p(y) p(x | y)`` of `density` with a prior for every class. At
``lambda = D log 2`` for ``D`` dimensions this is its negative log-likelihood in nats, up to the constant of the grey levels; a
smaller one pays more attention to the labels.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from iresnet_jax.maths.logdet.estimator import LogdetEstimator
from iresnet_jax.models import classifier, density
from iresnet_jax.models import flow as model
from iresnet_jax.training import parallel
from iresnet_jax.training.building import Spec, build_constraint, build_optimizer, build_schedule, unroll
from iresnet_jax.training.config import Config, HybridConfig
from iresnet_jax.training.initialization import initial_variables
from iresnet_jax.training.objectives import classification, likelihood
from iresnet_jax.training.objectives.objective import HeldOut, Loss, Objective, update
from iresnet_jax.training.parallel import example_keys
from iresnet_jax.training.source import Source
from iresnet_jax.training.state import TrainState

Weight = Callable[[Any], Any]


def objective(config: Config, source: Source, spec: Spec) -> Objective:
    """Classes and likelihood of images by the density that a config describes, with a prior for every class."""
    assert isinstance(spec, density.DensitySpec)
    assert source.images is not None  # or there were no classes
    settings, label_smoothing = config.training, config.classifier.label_smoothing
    augment_images = None
    if config.augmentation.crop_padding or config.augmentation.flip:
        augment_images = classification.make_augmentation(config.augmentation)
        classification.check_augmentation(augment_images, source)
    optimizer = build_optimizer(config.optimizer, settings.total_steps)
    weight = make_weight(config.hybrid)
    trained = config.logdet.build()
    step_by = functools.partial(
        make_step,
        spec,
        optimizer=optimizer,
        schedule=build_schedule(config.optimizer, settings.total_steps),
        weight=weight,
        seed=config.seed,
        constrain=build_constraint(config.constraint, spec.flow, training=True),
        label_smoothing=label_smoothing,
        augment_images=augment_images,
        ema_decay=settings.ema_decay,
        unroll=unroll(settings.blocks),
        rematerialize=settings.rematerialize,
    )
    final_weight = float(weight(settings.total_steps))
    return Objective(
        name="accuracy",
        examples=(source.images.images["train"], source.images.labels["train"]),
        optimizer=optimizer,
        initial_variables=lambda: initial_variables(config, spec, source),
        make_step=lambda num_terms: step_by(config.logdet.build(num_terms)),
        make_validation=lambda: Validation(config, spec, source),
        loss=lambda held_out: held_out["cross_entropy"] + final_weight * held_out["bits_per_dim"],
        num_terms=0 if trained.unbiased else config.logdet.num_terms,
    )


def make_weight(settings: HybridConfig) -> Weight:
    """``step -> lambda``: from ``initial_weight`` in a straight line to ``weight`` within ``ramp_steps``, then constant."""
    if not settings.ramp_steps:
        return optax.constant_schedule(settings.weight)
    return optax.linear_schedule(settings.initial_weight, settings.weight, settings.ramp_steps)


def make_step(
    spec: density.DensitySpec,
    estimator: LogdetEstimator,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    weight: Weight,
    *,
    seed: int,
    constrain: Callable[[Any, Any], model.Constrained],
    label_smoothing: float,
    augment_images: classification.Augment | None,
    ema_decay: float,
    unroll: bool,
    rematerialize: bool = False,
) -> Callable[[TrainState, Any], tuple[TrainState, dict[str, Any]]]:
    """The step ``(state, (images, labels)) -> (state, metrics)``, for `parallel.parallelize`.

    Keys are made as in `density.make_step`, so a run gives the same result on any number of devices.

    Args:
        spec: The model, with classes.
        estimator: Log-determinant.
        optimizer: Update rule.
        schedule: Its learning rate, for the log.
        weight: ``step -> lambda``.
        seed: Of the run.
        constrain: ``(params, spectral) ->`` constrained weights.
        label_smoothing: See `classifier.cross_entropy`.
        augment_images: Of the images that are classified, in a pass of their own: a likelihood is one of images as they are.
            None classifies those.
        ema_decay: Of the moving average of the parameters.
        unroll: Write blocks out instead of scanning over them.
        rematerialize: Recompute a block's inside in the backward pass.
    """

    def step(state: TrainState, batch: Any) -> tuple[TrainState, dict[str, Any]]:
        images, labels = batch
        key_length, key_examples = jax.random.split(jax.random.fold_in(jax.random.key(seed), state.step))
        keys = jax.vmap(lambda k: jax.random.split(k, 4))(example_keys(key_examples, len(images)))
        key_noise, key_probe, key_augment, key_augment_noise = (keys[:, i] for i in range(4))
        x = density.to_continuous(spec, key_noise, images)
        shared = estimator.fix_length(key_length)
        bits_weight = weight(state.step)

        def loss_of(params):
            constrained = constrain(params, state.spectral)
            terms = density.log_prob(
                spec, constrained.weights, params["prior"], x, key_probe, shared, unroll=unroll, rematerialize=rematerialize
            )
            bits = jnp.mean(density.objective(spec, terms.log_prob))
            logits = terms.log_prior_by_class
            if augment_images is not None:
                changed = density.to_continuous(spec, key_augment_noise, augment_images(key_augment, images))
                logits = density.class_log_probs(
                    spec, constrained.weights, params["prior"], changed, unroll=unroll, rematerialize=rematerialize
                )
            assert logits is not None  # the model has classes
            cross_entropy = jnp.mean(classifier.cross_entropy(logits, labels, label_smoothing=label_smoothing))
            loss = cross_entropy + bits_weight * bits
            metrics = {
                "loss": loss,
                "bits_per_dim": bits,
                "log_prior": jnp.mean(terms.log_prior),
                "log_det": jnp.mean(terms.log_det),
                "cross_entropy": cross_entropy,
                "accuracy": jnp.mean(jnp.argmax(logits, axis=1) == labels),
                "bits_weight": jnp.asarray(bits_weight, bits.dtype),
            }
            return Loss(loss, metrics, constrained)

        return update(state, loss_of, optimizer, schedule, ema_decay=ema_decay)

    return step


def make_classification(spec: density.DensitySpec) -> Callable[[Any, Any], Any]:
    """``((weights, prior), (images, labels)) ->`` cross-entropy in nats and logits, for `parallelize_eval`.

    Images are classified at the middle of their grey levels, without noise.
    """

    def evaluate(state: tuple[Any, Any], batch: tuple[Any, Any]) -> dict[str, Any]:
        images, labels = batch
        logits = density.class_log_probs(spec, *state, density.cell_centers(spec, images))
        return {"loss": classifier.cross_entropy(logits, labels), "logits": logits}

    return evaluate


class Validation:
    """Bits/dim, accuracy and cross-entropy on held-out images under the averaged parameters."""

    def __init__(self, config: Config, spec: density.DensitySpec, source: Source):
        self._likelihood = likelihood.Validation(config, spec, source)
        self._images = source.held_out("validation", config.training.eval_examples, config.seed)
        self._labels = source.labels("validation", len(self._images))
        self._classify = parallel.parallelize_eval(make_classification(spec))
        self._batch_size = config.evaluation.batch_size

    def __call__(self, current: TrainState) -> HeldOut:
        """The means over all examples."""
        state = self._likelihood.constrain(current)
        outputs = classification.evaluate_images(self._classify, state, self._images, self._labels, self._batch_size)
        correct = outputs["logits"].argmax(axis=1) == self._labels
        cross_entropy = float(outputs["loss"].mean(dtype=np.float64))
        metrics, num_terms = self._likelihood.measure(current, state)
        return HeldOut({**metrics, "accuracy": float(correct.mean()), "cross_entropy": cross_entropy}, num_terms)
