"""The classification objective: the loss of a batch, and the accuracy on held-out images."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, Shaped

from iresnet_jax.models.classifier import Classifier, training_logits
from iresnet_jax.models.density import Density
from iresnet_jax.models.head import cross_entropy, distances
from iresnet_jax.training import parallel
from iresnet_jax.training.parallel import AXIS
from iresnet_jax.training.run import Measured
from iresnet_jax.training.step import Keys, Loss

Augment = Callable[[Key[Array, " b"], Shaped[Array, "b h w c"]], Shaped[Array, "b h w c"]]


class Margin(NamedTuple):
    """The margin that a loss asks for (Lipschitz-margin training, Tsuzuku et al. 2018).

    Attributes:
        radius: Distance in pixels of [0, 1], for a linear head. Differences of logits grow by at
            most ``|w_i - w_j|`` times it, over the divisor of pixels, if features never stretch: by
            that the loss raises the logits of wrong classes.
        temperature: Divisor of the logits then.
    """

    radius: float = 0.0
    temperature: float = 1.0

    def apply(self, model: Any, logits: Float[Array, "b k"], labels: Any) -> Float[Array, "b k"]:
        """The logits that the loss of a model sees."""
        if getattr(model.spec, "head", None) == "linear":
            logits += self.radius / min(model.spec.std) * distances(model.head)[labels]
        return logits / self.temperature


def make_loss(
    augment: Augment | None = None,
    *,
    label_smoothing: float = 0.0,
    margin: Margin = Margin(),
    num_parts: int = 1,
) -> Callable[[Classifier, Any, Keys], Loss]:
    """The loss ``(model, (images, labels), keys) -> Loss``: the cross-entropy.

    BatchNorm's statistics are those of the batch on all devices.

    Args:
        augment: Random change of the images; None classifies them as they are.
        label_smoothing: Smoothing of the labels, see `head.cross_entropy`.
        margin: Margin by which images are to be classified.
        num_parts: Parts of the batch whose features are computed one after the other. The head's
            statistics are those of the whole batch, so the step itself must not split it.
    """

    def loss(model: Classifier, batch: Any, keys: Keys) -> Loss:
        images, labels = batch
        x = model.preprocess(images if augment is None else augment(keys.examples, images))
        logits, statistics = training_logits(model, x, axis_name=AXIS, num_parts=num_parts)
        seen = margin.apply(model, logits, labels)
        value = jnp.mean(cross_entropy(seen, labels, label_smoothing=label_smoothing))
        accuracy = jnp.mean(jnp.argmax(logits, axis=1) == labels)
        return Loss(value, {"loss": value, "accuracy": accuracy}, statistics)

    return loss


def measure(
    model: Classifier, images: np.ndarray, labels: np.ndarray, batch_size: int, margin: Margin
) -> Measured:
    """Share of held-out images that are classified rightly, also with a margin, and their mean
    cross-entropy.

    The best model has the least error, of images without their margin where there is one, and
    where errors tie the least cross-entropy.
    """
    outputs = classify(model, images, labels, batch_size, margin)
    found = {
        "accuracy": float((outputs["logits"].argmax(axis=1) == labels).mean()),
        "loss": float(outputs["loss"].mean(dtype=np.float64)),
    }
    if margin.radius:
        found["accuracy_at_margin"] = float(outputs["at_margin"].mean())
    error = 1 - found.get("accuracy_at_margin", found["accuracy"])
    return Measured(found, error + 1e-6 * min(found["loss"], 10.0))


def classify(
    model: Classifier | Density,
    x: np.ndarray,
    labels: np.ndarray,
    batch_size: int,
    margin: Margin = Margin(),
) -> dict[str, np.ndarray]:
    """Cross-entropies in nats, logits, and who is right with the margin; a density takes the
    middle of grey levels.
    """
    return parallel.over_batches(
        _classify, (model, margin), parallel.rows_of(x, labels), len(x), batch_size
    )


def _classify(own: tuple[Classifier | Density, Margin], batch: tuple[Any, Any]) -> dict[str, Any]:
    (model, margin), (x, labels) = own, batch
    logits = model.logits(x)
    less = margin.apply(model, logits, labels)
    return {
        "loss": cross_entropy(less, labels),
        "logits": logits,
        "at_margin": jnp.argmax(less, axis=1) == labels,
    }
