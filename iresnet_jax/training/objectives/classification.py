"""The classification objective: one training step, with augmentation on the device, and the accuracy on held-out data."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key, Shaped

from iresnet_jax.data import augment
from iresnet_jax.data.dataset import DataSet
from iresnet_jax.models.classifier import Classifier, ClassifierSpec, training_logits
from iresnet_jax.models.density import Density
from iresnet_jax.models.flow import Constrained
from iresnet_jax.models.head import cross_entropy
from iresnet_jax.runs.config import AugmentationConfig, Config, ConstraintConfig
from iresnet_jax.runs.from_config import Constrain, build_constraint, compiled_constraint, rematerialize, unroll
from iresnet_jax.training import parallel
from iresnet_jax.training.initialization import abstract_variables, initial_variables
from iresnet_jax.training.objectives.objective import HeldOut, Loss, Objective, UpdateRule, build_rule, update
from iresnet_jax.training.parallel import AXIS, example_keys
from iresnet_jax.training.state import TrainState

Augment = Callable[[Key[Array, " b"], Shaped[Array, "b h w c"]], Shaped[Array, "b h w c"]]


def objective(config: Config, data: DataSet, spec: ClassifierSpec) -> Objective:
    """The classes of images under a classifier."""
    settings = config.training
    augment_images = make_augmentation(config.augmentation)
    check_augmentation(augment_images, data)
    rule, blocks = build_rule(config), unroll(settings.blocks)
    step = make_step(
        Classifier(spec, {}, {}, {}, unroll=blocks, rematerialize=rematerialize(config), bfloat16=settings.bfloat16),
        make_constraint(config.constraint, spec),
        rule,
        seed=config.seed,
        label_smoothing=config.classifier.label_smoothing,
        augment_images=augment_images,
    )
    return Objective(
        name="accuracy",
        examples=(data.examples["train"], data.labels["train"]),
        rule=rule,
        initial_variables=lambda: initial_variables(config, spec, data),
        abstract_variables=lambda: abstract_variables(config, spec),
        make_step=lambda num_terms: step,
        make_validation=lambda: Validation(config, spec, data),
        # The error is a multiple of one over the number of examples, so this compares cross-entropies only where errors tie.
        loss=lambda held_out: 1 - held_out["accuracy"] + 1e-6 * min(held_out["loss"], 10.0),
    )


def make_constraint(settings: ConstraintConfig, spec: ClassifierSpec) -> Constrain:
    """``(params, spectral) ->`` the weights that run, for training steps."""
    if not spec.is_bijective:
        names = [stage.name for stage in spec.flow.layout]
        return lambda params, spectral: Constrained({name: params[name] for name in names}, spectral, {})
    return build_constraint(settings, spec.flow, training=True)


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


def check_augmentation(augment_images: Augment, data: DataSet) -> None:
    """Raises ``ValueError`` in one sentence if images of this size cannot be changed like that."""
    one = data.examples["train"][:1]
    jax.eval_shape(lambda images: augment_images(jax.random.split(jax.random.key(0), 1), images), one)


def make_step(
    model: Classifier, constrain: Constrain, rule: UpdateRule, *, seed: int, label_smoothing: float, augment_images: Augment
) -> Callable[[TrainState, Any], tuple[TrainState, dict[str, Any]]]:
    """The step ``(state, (images, labels)) -> (state, metrics)``, for `parallel.parallelize`.

    BatchNorm's statistics are those of the batch on all devices, and an example's augmentation depends on (seed, step, place in
    the whole batch): a run gives the same result on any number of devices. `likelihood.make_step` explains the other arguments.

    Args:
        label_smoothing: Smoothing of the labels, see `head.cross_entropy`.
        augment_images: Random change of the images, from `make_augmentation`.
    """

    def step(state: TrainState, batch: Any) -> tuple[TrainState, dict[str, Any]]:
        images, labels = batch
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        x = model.preprocess(augment_images(example_keys(key, len(images)), images))

        def loss_of(weights, free, examples):
            x, labels = examples
            current = model.with_(weights=weights, head=free["head"])
            logits, statistics = training_logits(current, x, axis_name=AXIS, num_parts=rule.num_parts)
            loss = jnp.mean(cross_entropy(logits, labels, label_smoothing=label_smoothing))
            accuracy = jnp.mean(jnp.argmax(logits, axis=1) == labels)
            return Loss(loss, {"loss": loss, "accuracy": accuracy}, statistics)

        # The head's statistics are those of the whole batch: features alone are computed part by part.
        return update(state, constrain, loss_of, (x, labels), rule._replace(num_parts=1))

    return step


def classify_batch(model: Classifier | Density, batch: tuple[Any, Any]) -> dict[str, Any]:
    """Cross-entropy in nats and logits of ``(images, labels)``, for `parallelize_eval`.

    A density classifies images at the middle of their grey levels, without noise.
    """
    images, labels = batch
    logits = model.logits(images) if isinstance(model, Classifier) else model.class_log_probs(images)
    return {"loss": cross_entropy(logits, labels), "logits": logits}


class Validation:
    """Accuracy and cross-entropy on held-out images under the averaged parameters, norms iterated to their tolerance."""

    def __init__(self, config: Config, spec: ClassifierSpec, data: DataSet):
        self._spec = spec
        self._images = data.held_out("validation", config.training.eval_examples, config.seed)
        self._labels = data.labels["validation"][: len(self._images)]
        self._constraint = config.constraint
        self._evaluate = parallel.parallelize_eval(classify_batch)
        self._batch_size = config.evaluation.batch_size

    def __call__(self, current: TrainState) -> HeldOut:
        """The means over all examples."""
        weights = {stage.name: current.ema[stage.name] for stage in self._spec.flow.layout}
        if self._spec.is_bijective:
            constrain = compiled_constraint(self._constraint, self._spec.flow)
            weights = constrain(*parallel.on_first_device((weights, current.spectral))).weights
        model = Classifier(self._spec, weights, current.ema["head"], current.batch_stats)
        outputs = evaluate_images(self._evaluate, model, self._images, self._labels, self._batch_size)
        correct = outputs["logits"].argmax(axis=1) == self._labels
        return HeldOut({"accuracy": float(correct.mean()), "loss": float(outputs["loss"].mean(dtype=np.float64))})


def evaluate_images(
    evaluate: Callable[[Any, Any], Any], model: Any, images: np.ndarray, labels: np.ndarray, batch_size: int
) -> dict[str, np.ndarray]:
    """Runs `classify_batch` for all devices over all images."""
    return parallel.over_batches(evaluate, model, lambda indices: (images[indices], labels[indices]), len(images), batch_size)
