"""The classification objective: one training step, with augmentation on the device, and the accuracy on held-out data."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Key, Shaped

from iresnet_jax.data import augment
from iresnet_jax.models import classifier
from iresnet_jax.models import flow as model
from iresnet_jax.training import parallel
from iresnet_jax.training.building import Spec, build_constraint, build_optimizer, build_schedule, unroll
from iresnet_jax.training.config import AugmentationConfig, Config
from iresnet_jax.training.evaluation import over_batches
from iresnet_jax.training.initialization import initial_variables
from iresnet_jax.training.objectives.objective import HeldOut, Loss, Objective, update
from iresnet_jax.training.parallel import AXIS, example_keys
from iresnet_jax.training.source import Source
from iresnet_jax.training.state import TrainState

Augment = Callable[[Key[Array, " b"], Shaped[Array, "b h w c"]], Shaped[Array, "b h w c"]]


def objective(config: Config, source: Source, spec: Spec) -> Objective:
    """The classes of images by the classifier that a config describes."""
    assert isinstance(spec, classifier.ClassifierSpec)
    assert source.images is not None
    settings, label_smoothing = config.training, config.classifier.label_smoothing
    augment_images = make_augmentation(config.augmentation)
    check_augmentation(augment_images, source)
    optimizer = build_optimizer(config.optimizer, settings.total_steps)
    step = make_step(
        spec,
        optimizer,
        build_schedule(config.optimizer, settings.total_steps),
        seed=config.seed,
        constrain=make_constraint(config, spec, training=True),
        label_smoothing=label_smoothing,
        augment_images=augment_images,
        ema_decay=settings.ema_decay,
        unroll=unroll(settings.blocks),
        rematerialize=settings.rematerialize,
    )
    return Objective(
        name="accuracy",
        examples=(source.images.images["train"], source.images.labels["train"]),
        optimizer=optimizer,
        initial_variables=lambda: initial_variables(config, spec, source),
        make_step=lambda num_terms: step,
        make_validation=lambda: Validation(config, spec, source),
        # The error is a multiple of one over the number of examples, so this compares cross-entropies only where errors tie.
        loss=lambda held_out: 1 - held_out["accuracy"] + 1e-6 * min(held_out["loss"], 10.0),
    )


def make_constraint(
    config: Config, spec: classifier.ClassifierSpec, *, training: bool
) -> Callable[[Any, Any], model.Constrained]:
    """``(params, spectral) ->`` the weights that run, for training steps or for validation."""
    if not spec.is_bijective:
        return lambda params, spectral: model.Constrained(params, spectral, {})
    return build_constraint(config.constraint, spec.flow, training=training)


def make_augmentation(settings: AugmentationConfig) -> Augment:
    """The random change of training images that ``config.augmentation`` describes."""
    padding, flip = settings.crop_padding, settings.flip

    def augment_images(keys, images):
        if padding and flip:
            return augment.crop_and_flip(keys, images, padding=padding)
        if padding:
            return augment.random_crop(keys, images, padding=padding)
        return augment.random_flip(keys, images) if flip else images

    return augment_images


def check_augmentation(augment_images: Augment, source: Source) -> None:
    """Raises ``ValueError`` in one sentence if images of this size cannot be changed like that."""
    assert source.images is not None
    one = source.images.images["train"][:1]
    jax.eval_shape(lambda images: augment_images(jax.random.split(jax.random.key(0), 1), images), one)


def make_step(
    spec: classifier.ClassifierSpec,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    *,
    seed: int,
    constrain: Callable[[Any, Any], model.Constrained],
    label_smoothing: float,
    augment_images: Augment,
    ema_decay: float,
    unroll: bool,
    rematerialize: bool = False,
) -> Callable[[TrainState, Any], tuple[TrainState, dict[str, Any]]]:
    """The step ``(state, (images, labels)) -> (state, metrics)``, for `parallel.parallelize`.

    BatchNorm's statistics are those of the batch on all devices, and an example's augmentation depends on (seed, step, place in
    the whole batch): a run gives the same result on any number of devices.

    Args:
        spec: The model.
        optimizer: Update rule.
        schedule: Its learning rate, for the log.
        seed: Of the run.
        constrain: ``(params, spectral) ->`` constrained weights.
        label_smoothing: See `classifier.cross_entropy`.
        augment_images: From `make_augmentation`.
        ema_decay: Of the moving averages of the parameters and of the statistics.
        unroll: Write blocks out instead of scanning over them.
        rematerialize: Recompute a block's inside in the backward pass.
    """

    def step(state: TrainState, batch: Any) -> tuple[TrainState, dict[str, Any]]:
        images, labels = batch
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        x = classifier.preprocess(spec, augment_images(example_keys(key, len(images)), images))

        def loss_of(params):
            constrained = constrain(params, state.spectral)
            settings = {"axis_name": AXIS, "unroll": unroll, "rematerialize": rematerialize}
            logits, statistics = classifier.training_logits(spec, constrained.weights, params["head"], x, **settings)
            loss = jnp.mean(classifier.cross_entropy(logits, labels, label_smoothing=label_smoothing))
            accuracy = jnp.mean(jnp.argmax(logits, axis=1) == labels)
            return Loss(loss, {"loss": loss, "accuracy": accuracy}, constrained, statistics)

        return update(state, loss_of, optimizer, schedule, ema_decay=ema_decay)

    return step


def make_evaluation(spec: classifier.ClassifierSpec) -> Callable[[Any, Any], Any]:
    """``((weights, head, statistics), (images, labels)) ->`` cross-entropy in nats and logits, for `parallelize_eval`."""

    def evaluate(state: tuple[Any, Any, Any], batch: tuple[Any, Any]) -> dict[str, Any]:
        images, labels = batch
        logits = classifier.logits(spec, *state, classifier.preprocess(spec, images))
        return {"loss": classifier.cross_entropy(logits, labels), "logits": logits}

    return evaluate


class Validation:
    """Accuracy and cross-entropy on held-out images under the averaged parameters, norms iterated to their tolerance."""

    def __init__(self, config: Config, spec: classifier.ClassifierSpec, source: Source):
        self._images = source.held_out("validation", config.training.eval_examples, config.seed)
        self._labels = source.labels("validation", len(self._images))
        constrain = make_constraint(config, spec, training=False)
        self._constrain = jax.jit(lambda params, spectral: constrain(params, spectral).weights)
        self._evaluate = parallel.parallelize_eval(make_evaluation(spec))
        self._batch_size = config.evaluation.batch_size

    def __call__(self, current: TrainState) -> HeldOut:
        """The means over all examples."""
        weights = self._constrain(current.ema, current.spectral)
        state = (weights, current.ema["head"], current.batch_stats)
        outputs = evaluate_images(self._evaluate, state, self._images, self._labels, self._batch_size)
        correct = outputs["logits"].argmax(axis=1) == self._labels
        return HeldOut({"accuracy": float(correct.mean()), "loss": float(outputs["loss"].mean(dtype=np.float64))})


def evaluate_images(
    evaluate: Any, state: Any, images: np.ndarray, labels: np.ndarray, batch_size: int
) -> dict[str, np.ndarray]:
    """Runs an evaluation from `make_evaluation`, for all devices, over all images."""
    return over_batches(evaluate, state, lambda indices: (images[indices], labels[indices]), len(images), batch_size)
