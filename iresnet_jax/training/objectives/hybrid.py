"""The hybrid objective: one network that classifies examples and models their density (Nalisnick et al. 2019).

    loss = cross-entropy(label, p(y | x)) + lambda bits/dim(x),

with both from the joint density ``p(x, y) = p(y) p(x | y)`` of `density` with a prior for every class. Continuous data have
nats in place of bits/dim, see `DensitySpec.unit`. At ``lambda = D log 2`` for images of ``D`` dimensions, or 1 for continuous
data, the loss is the negative log-likelihood of data and labels in nats, up to the constant of the grey levels; a smaller one
pays more attention to the labels.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from iresnet_jax.data.dataset import DataSet
from iresnet_jax.models.density import Density, DensitySpec
from iresnet_jax.models.head import cross_entropy
from iresnet_jax.runs.config import Config, HybridConfig
from iresnet_jax.runs.from_config import Constrain, build_constraint
from iresnet_jax.training import parallel
from iresnet_jax.training.initialization import abstract_variables, initial_variables
from iresnet_jax.training.objectives import classification, likelihood
from iresnet_jax.training.objectives.objective import HeldOut, Loss, Objective, UpdateRule, build_rule, update
from iresnet_jax.training.parallel import example_keys
from iresnet_jax.training.state import TrainState

Weight = Callable[[Any], Any]


def objective(config: Config, data: DataSet, spec: DensitySpec) -> Objective:
    """Classes and likelihood of images under a density with a prior for every class."""
    augment_images = None
    if config.augmentation.crop_padding or config.augmentation.flip:
        augment_images = classification.make_augmentation(config.augmentation)
        classification.check_augmentation(augment_images, data)
    rule, weight, trained = build_rule(config), make_weight(config.hybrid), config.logdet.build()
    constrain = build_constraint(config.constraint, spec.flow, training=True)

    def step(num_terms):
        return make_step(
            likelihood.template(config, spec).with_(estimator=config.logdet.build(num_terms)),
            constrain,
            rule,
            weight,
            seed=config.seed,
            label_smoothing=config.classifier.label_smoothing,
            augment_images=augment_images,
        )

    final_weight = float(weight(config.training.total_steps))
    return Objective(
        name="accuracy",
        examples=(data.examples["train"], data.labels["train"]),
        rule=rule,
        initial_variables=lambda: initial_variables(config, spec, data),
        abstract_variables=lambda: abstract_variables(config, spec),
        make_step=step,
        make_validation=lambda: Validation(config, spec, data),
        loss=lambda held_out: held_out["cross_entropy"] + final_weight * held_out[spec.metric],
        num_terms=0 if trained.unbiased else config.logdet.num_terms,
    )


def make_weight(settings: HybridConfig) -> Weight:
    """``step -> lambda``: from ``initial_weight`` in a straight line to ``weight`` within ``ramp_steps``, then constant."""
    if not settings.ramp_steps:
        return optax.constant_schedule(settings.weight)
    return optax.linear_schedule(settings.initial_weight, settings.weight, settings.ramp_steps)


def make_step(
    model: Density,
    constrain: Constrain,
    rule: UpdateRule,
    weight: Weight,
    *,
    seed: int,
    label_smoothing: float,
    augment_images: classification.Augment | None,
) -> Callable[[TrainState, Any], tuple[TrainState, dict[str, Any]]]:
    """The step ``(state, (images, labels)) -> (state, metrics)``, for `parallel.parallelize`.

    Keys are made as in `likelihood.make_step`, which explains the other arguments.

    Args:
        weight: ``step -> lambda``.
        label_smoothing: Smoothing of the labels, see `head.cross_entropy`.
        augment_images: Random change of the images that are classified, in a pass of their own: a likelihood is one of images
            as they are. None classifies those.
    """
    spec = model.spec

    def step(state: TrainState, batch: Any) -> tuple[TrainState, dict[str, Any]]:
        images, labels = batch
        key_length, key_examples = jax.random.split(jax.random.fold_in(jax.random.key(seed), state.step))
        keys = jax.vmap(lambda k: jax.random.split(k, 4))(example_keys(key_examples, len(images)))
        estimator = model.estimator.fix_length(key_length)
        bits_weight = weight(state.step)

        def loss_of(weights, free, examples):
            images, labels, keys = examples
            key_noise, key_probe, key_augment, key_augment_noise = (keys[:, i] for i in range(4))
            current = model.with_(weights=weights, prior=free["prior"], estimator=estimator)
            terms = current.terms(images, key_noise, key_probe)
            bits = jnp.mean(spec.in_units(terms.log_prob))
            logits = terms.log_prior_by_class
            if augment_images is not None:
                logits = current.class_log_probs(augment_images(key_augment, images), key_augment_noise)
            assert logits is not None  # the model has classes
            entropy = jnp.mean(cross_entropy(logits, labels, label_smoothing=label_smoothing))
            loss = entropy + bits_weight * bits
            metrics = {
                "loss": loss,
                spec.metric: bits,
                "log_prior": jnp.mean(terms.log_prior),
                "log_det": jnp.mean(terms.log_det),
                "cross_entropy": entropy,
                "accuracy": jnp.mean(jnp.argmax(logits, axis=1) == labels),
                "bits_weight": jnp.asarray(bits_weight, bits.dtype),
            }
            return Loss(loss, metrics)

        return update(state, constrain, loss_of, (images, labels, keys), rule)

    return step


class Validation(likelihood.Validation):
    """Likelihood, accuracy and cross-entropy of held-out examples under the averaged parameters."""

    def __init__(self, config: Config, spec: DensitySpec, data: DataSet):
        super().__init__(config, spec, data)
        self._labels = data.labels["validation"][: len(self._examples)]
        self._classify = parallel.parallelize_eval(classification.classify_batch)

    def __call__(self, current: TrainState) -> HeldOut:
        """The means over all examples."""
        model = self.model(current)
        outputs = classification.evaluate_images(self._classify, model, self._examples, self._labels, self._batch_size)
        correct = outputs["logits"].argmax(axis=1) == self._labels
        mean_entropy = float(outputs["loss"].mean(dtype=np.float64))
        metrics, num_terms = self.measure(current, model)
        return HeldOut({**metrics, "accuracy": float(correct.mean()), "cross_entropy": mean_entropy}, num_terms)
