"""How well a classifier does on test images: its error with an interval, and what it takes for what."""

import math
from typing import Any

import numpy as np
from jaxtyping import Int

from iresnet_jax.evaluation.trained import Trained
from iresnet_jax.report import plots
from iresnet_jax.training import parallel
from iresnet_jax.training.objectives import hybrid
from iresnet_jax.training.objectives.classification import evaluate_images, make_evaluation

CONFIDENCE, Z = 0.95, 1.959964  # of the interval, and the quantile of the normal distribution that belongs to it
NUM_MISTAKES = 32  # listed and shown


def wilson_interval(num_hits: int, num: int, z: float = Z) -> tuple[float, float]:
    r"""An interval for a probability of which ``num`` independent trials had ``num_hits`` (Wilson 1927).

    It holds the ``p`` with ``|p_hat - p| <= z sqrt(p (1 - p) / n)``; unlike ``p_hat +- z sqrt(p_hat (1 - p_hat) / n)`` it is
    right for a handful of errors, or none.

    Args:
        num_hits: From 0 to ``num``.
        num: At least 1.
        z: Quantile of the normal distribution, 1.96 for 95 %.

    Raises:
        ValueError: If the counts are out of range.
    """
    if not 0 <= num_hits <= num or num < 1:
        raise ValueError(f"num_hits must lie in [0, num] and num be at least 1, got {num_hits} of {num}")
    p, spread = num_hits / num, z**2 / num
    middle = (p + spread / 2) / (1 + spread)
    half = math.sqrt(p * (1 - p) * spread + spread**2 / 4) / (1 + spread)
    return max(middle - half, 0.0), min(middle + half, 1.0)


def confusion_matrix(
    labels: Int[np.ndarray, " n"], predictions: Int[np.ndarray, " n"], num_classes: int
) -> Int[np.ndarray, "k k"]:
    """How many examples of each class, by row, were taken for each, by column."""
    matrix = np.zeros((num_classes, num_classes), int)
    np.add.at(matrix, (labels, predictions), 1)
    return matrix


def evaluate(trained: Trained) -> dict[str, Any]:
    """The top-1 error on the test split, with the frozen weights that everything after training uses.

    Args:
        trained: A classifier, or a density with classes.

    Returns:
        ``error`` and its Wilson ``interval`` at ``confidence``, as fractions; ``num_errors`` of ``num_examples``; ``loss``, the
        mean cross-entropy in nats; ``confusion``, see `confusion_matrix`; and ``mistakes``, the first of them with ``index`` in
        the test split, ``label``, ``prediction`` and its ``probability``.
    """
    images, labels = trained.source.held_out("test", _everything(trained), trained.config.seed), trained.source.labels("test")
    if trained.is_classifier:
        step, state = make_evaluation(trained.spec), (trained.weights, trained.head, trained.statistics)
    else:
        step, state = hybrid.make_classification(trained.spec), (trained.weights, trained.prior)
    size = trained.config.evaluation.batch_size
    outputs = evaluate_images(parallel.parallelize_eval(step), state, images, labels, size)
    logits = outputs["logits"].astype(np.float64)
    predictions = logits.argmax(axis=1)
    wrong = np.flatnonzero(predictions != labels)
    best = np.exp(logits.max(axis=1) - np.logaddexp.reduce(logits, axis=1))
    return {
        "error": len(wrong) / len(labels),
        "interval": list(wilson_interval(len(wrong), len(labels))),
        "confidence": CONFIDENCE,
        "num_errors": len(wrong),
        "num_examples": len(labels),
        "loss": float(outputs["loss"].mean(dtype=np.float64)),
        "confusion": confusion_matrix(labels, predictions, trained.spec.num_classes).tolist(),
        "mistakes": [
            {"index": int(i), "label": int(labels[i]), "prediction": int(predictions[i]), "probability": float(best[i])}
            for i in wrong[:NUM_MISTAKES]
        ],
    }


def describe(result: dict[str, Any]) -> str:
    """The error in one line."""
    low, high = result["interval"]
    return (
        f"test error: {100 * result['error']:.2f} % ({result['num_errors']} of {result['num_examples']} images; "
        f"{100 * result['confidence']:.0f} % interval {100 * low:.2f} to {100 * high:.2f} %), "
        f"cross-entropy {result['loss']:.4f} nats"
    )


def figures(trained: Trained, result: dict[str, Any]) -> dict[str, Any]:
    """The confusion matrix, and the images behind it that were mistaken, if any."""
    drawn = {"confusion": plots.confusion_matrix(np.asarray(result["confusion"]))}
    if mistakes := result["mistakes"]:
        images = trained.source.held_out("test", _everything(trained), trained.config.seed)
        chosen = np.stack([images[mistake["index"]] for mistake in mistakes]) / (trained.spec.num_levels - 1)
        drawn["mistakes"] = plots.image_grid(
            chosen, captions=[f"{mistake['label']} as {mistake['prediction']}" for mistake in mistakes]
        )
    return drawn


def _everything(trained: Trained) -> int:
    return len(trained.source.labels("test"))
