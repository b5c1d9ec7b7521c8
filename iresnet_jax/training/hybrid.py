"""The hybrid objective: one network that classifies examples and models their density (Nalisnick et
al. 2019).

    loss = cross-entropy(label, p(y | x)) + lambda bits/dim(x),

with both from the joint density ``p(x, y) = p(y) p(x | y)`` of `density` with a prior for every
class. Continuous data have nats in place of bits/dim, see `DensitySpec.unit`. At ``lambda = D log
2`` for images of ``D`` dimensions, or 1 for continuous data, the loss is the negative
log-likelihood of data and labels in nats, up to the constant of the grey levels; a smaller one pays
more attention to the labels.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from iresnet_jax.arguments import CountOrNone, NotNegative
from iresnet_jax.models.density import Density
from iresnet_jax.models.head import cross_entropy
from iresnet_jax.training.classification import Augment
from iresnet_jax.training.step import Keys, Loss


@dataclass(frozen=True)
class HybridConfig:
    """Objective "hybrid", which minimises cross-entropy + lambda bits/dim, or nats instead for
    continuous data.

    With ``lambda = D log 2`` for images of D dimensions, or 1 for continuous data, the loss is the
    joint likelihood of data and labels. A smaller lambda emphasises the labels.
    """

    weight: NotNegative = 1.0  # lambda after the ramp
    initial_weight: NotNegative = 1.0  # lambda at step 0, if there is a ramp
    ramp_steps: CountOrNone = 0  # steps of the linear ramp between them; 0 for no ramp

    def weight_of_step(self) -> Callable[[Any], Any]:
        """``step -> lambda``: from ``initial_weight`` in a straight line to ``weight``, then
        constant.
        """
        if not self.ramp_steps:
            return optax.constant_schedule(self.weight)
        return optax.linear_schedule(self.initial_weight, self.weight, self.ramp_steps)


def make_loss(
    settings: HybridConfig, *, label_smoothing: float = 0.0, augment: Augment | None = None
) -> Callable[[Density, Any, Keys], Loss]:
    """The loss ``(model, (examples, labels), keys) -> Loss``: cross-entropy and likelihood,
    weighted.

    Args:
        settings: The weight of the likelihood.
        label_smoothing: Smoothing of the labels, see `head.cross_entropy`.
        augment: Random change of the images that are classified, in a pass of their own: a
            likelihood is one of images as they are. None classifies those.
    """
    weight_of_step = settings.weight_of_step()

    def loss(model: Density, batch: Any, keys: Keys) -> Loss:
        x, labels = batch
        keys_by_use = jnp.moveaxis(
            jax.vmap(lambda key: jax.random.split(key, 4))(keys.examples), 1, 0
        )
        key_noise, key_probe, key_augment, key_augment_noise = keys_by_use
        terms = model.terms(x, key_noise, key_probe)
        bits = jnp.mean(model.spec.in_units(terms.log_prob))
        logits = terms.log_prior_by_class
        if augment is not None:
            logits = model.class_log_probs(augment(key_augment, x), key_augment_noise)
        assert logits is not None  # the model has classes
        entropy = jnp.mean(cross_entropy(logits, labels, label_smoothing=label_smoothing))
        bits_weight = weight_of_step(keys.step)
        value = entropy + bits_weight * bits
        metrics = {
            "loss": value,
            model.spec.metric: bits,
            "log_prior": jnp.mean(terms.log_prior),
            "log_det": jnp.mean(terms.log_det),
            "cross_entropy": entropy,
            "accuracy": jnp.mean(jnp.argmax(logits, axis=1) == labels),
            "bits_weight": jnp.asarray(bits_weight, bits.dtype),
        }
        return Loss(value, metrics)

    return loss
