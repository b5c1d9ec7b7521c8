"""Top-1 test error of a classifier or a density with classes, with an interval, and the confusion
of classes.
"""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int, Num

from iresnet_jax.models.classifier import Classifier
from iresnet_jax.models.density import Density
from iresnet_jax.training.classification import classify

CONFIDENCE = 0.95  # probability that the interval of an error covers the true error
NUM_MISTAKES = 32  # listed and shown


@dataclass(frozen=True)
class Mistake:
    """A test image that was classified wrongly, with its place in the test split."""

    index: int
    label: int
    prediction: int


@dataclass(frozen=True)
class Classification:
    """Top-1 error on test images.

    Attributes:
        error: Fraction of images that were classified wrongly.
        interval: Wilson interval of ``error`` at `CONFIDENCE`, low and high.
        num_errors: Images that were classified wrongly.
        num_examples: Test images.
        loss: Mean cross-entropy in nats, without label smoothing.
        confusion: Numbers of images by class (row) and predicted class (column).
        mistakes: First mistakes.
    """

    error: float
    interval: tuple[float, float]
    num_errors: int
    num_examples: int
    loss: float
    confusion: tuple[tuple[int, ...], ...]
    mistakes: tuple[Mistake, ...]

    @property
    def headline(self) -> str:
        """One line."""
        low, high = self.interval
        return (
            f"test error: {100 * self.error:.2f} % ({self.num_errors} of {self.num_examples} "
            f"examples; {100 * CONFIDENCE:.0f} % interval {100 * low:.2f} to {100 * high:.2f} %)"
        )

    def __str__(self) -> str:
        line = f"{self.headline}, cross-entropy {self.loss:.4f} nats"
        return "\n".join([line, *self.warnings()])

    def warnings(self) -> list[str]:
        """A sentence about logits that are not finite."""
        if math.isfinite(self.loss):
            return []
        return ["The cross-entropy is not finite: the test error means nothing."]


def evaluate(
    model: Density | Classifier,
    examples: Num[np.ndarray, "n ..."],
    labels: Int[np.ndarray, " n"],
    batch_size: int,
) -> Classification:
    """Top-1 error of a classifier of images of integer levels, or of a density with classes on
    its data.
    """
    outputs = classify(model, examples, labels, batch_size)
    return summarize(
        outputs["logits"].astype(np.float64),
        labels,
        loss=float(outputs["loss"].mean(dtype=np.float64)),
    )


def summarize(
    logits: Num[np.ndarray, "n k"], labels: Int[np.ndarray, " n"], *, loss: float
) -> Classification:
    """Counts the mistakes that logits make, with the Wilson (1927) interval of their fraction.

    Args:
        loss: Mean cross-entropy in nats.
    """
    predictions = logits.argmax(axis=1)
    wrong = np.flatnonzero(predictions != labels)
    confusion = np.zeros((logits.shape[1],) * 2, int)
    np.add.at(confusion, (labels, predictions), 1)
    return Classification(
        error=len(wrong) / len(labels),
        interval=fraction_interval(len(wrong), len(labels)),
        num_errors=len(wrong),
        num_examples=len(labels),
        loss=loss,
        confusion=tuple(map(tuple, confusion.tolist())),
        mistakes=tuple(
            Mistake(int(i), int(labels[i]), int(predictions[i])) for i in wrong[:NUM_MISTAKES]
        ),
    )


def fraction_interval(count: int, total: int) -> tuple[float, float]:
    """Wilson's (1927) interval for a probability, from ``count`` events in ``total`` trials, at
    `CONFIDENCE`.
    """
    from scipy.stats import binomtest  # late: half a second, for which training should not wait

    interval = binomtest(count, total).proportion_ci(CONFIDENCE, method="wilson")
    return float(interval.low), float(interval.high)
