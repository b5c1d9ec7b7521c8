r"""How well a model's scores tell other data from the data that it was trained on.

Every score is larger for stranger images. The numbers of a score are areas under the ROC curve between test images and others,

    ``AUROC = P(score(other) > score(test)) + P(equal) / 2``,

1 for a perfect score and 1/2 for a coin. A score's definition is part of every result, as numbers of different scores do not
compare.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer, Num

from iresnet_jax import data
from iresnet_jax.data import feed
from iresnet_jax.evaluation.trained import Trained
from iresnet_jax.models import classifier, density
from iresnet_jax.training.objectives.likelihood import evaluation_keys

OTHERS = ("rotated", "noise")
NUM_EXAMPLES = 2000  # at most, of each side
NUM_FITTED = 5000  # training images that scores are fitted to, at most
RIDGE = 1e-3  # of the largest variance of pooled features, added to all of them

DEFINITIONS = {
    "energy": "minus the log-sum-exp of the logits (Liu et al. 2020)",
    "confidence": "minus the probability of the most likely class (Hendrycks and Gimpel 2017)",
    "distance": "Mahalanobis distance of the pooled features to the nearest class mean, with the covariance that all classes "
    "share, from training images (Lee et al. 2018)",
    "likelihood": "bits per dimension of the image, a single draw of noise and probes",
    "typicality": "distance of those bits per dimension from their mean over training images (Nalisnick et al. 2019)",
}

Score = Callable[[np.ndarray], dict[str, np.ndarray]]


def auroc(inside: Float[np.ndarray, " n"], outside: Float[np.ndarray, " m"]) -> float:
    """``P(outside > inside) + P(equal) / 2`` over all pairs.

    Raises:
        ValueError: If a side is empty or holds a NaN.
    """
    if not len(inside) or not len(outside) or np.isnan(inside).any() or np.isnan(outside).any():
        raise ValueError(f"an AUROC needs scores on both sides, none of them NaN: got {len(inside)} and {len(outside)}")
    ordered = np.sort(inside)
    below, at_most = (np.searchsorted(ordered, outside, side=side) for side in ("left", "right"))
    return float((below + at_most).mean() / (2 * len(inside)))


def compare(trained: Trained, other: str, *, num: int = NUM_EXAMPLES) -> dict[str, Any]:
    """The scores' areas under the ROC curve between test images and others.

    Args:
        trained: A model of images.
        other: "rotated", the test images turned by a quarter; "noise", uniform over all levels; or the name of a data set,
            whose test images are brought to the model's size and levels, see `adapt`.
        num: Images of each side, from the first, at most.

    Returns:
        ``other``, ``num_inside``, ``num_outside``, and ``scores``, by name ``auroc`` and ``definition``.

    Raises:
        ValueError: If the model is one of points, or there is no such data set.
    """
    source = trained.source
    if source.images is None or source.num_levels is None:
        raise ValueError(f"{trained.workdir} holds a model of points: scores are compared between images")
    inside = source.held_out("test", num, trained.config.seed)
    outside = others(trained, other, num)
    score = _classifier_scores(trained) if trained.is_classifier else _density_scores(trained)
    found = score(inside), score(outside)
    scores = {name: {"auroc": auroc(found[0][name], found[1][name]), "definition": DEFINITIONS[name]} for name in found[0]}
    return {"other": other, "num_inside": len(inside), "num_outside": len(outside), "scores": scores}


def describe(result: dict[str, Any]) -> str:
    """Every score with its definition."""
    lines = [f"{result['num_inside']} test images against {result['num_outside']} others ({result['other']}):"]
    lines += [f"  AUROC {s['auroc']:.4f}  {name}: {s['definition']}" for name, s in result["scores"].items()]
    return "\n".join(lines)


def others(trained: Trained, name: str, num: int) -> np.ndarray:
    """Images of another kind, in the size and with the levels of the model's."""
    source = trained.source
    levels, shape = source.num_levels, source.event_shape
    assert levels is not None  # a model of images
    if name == "noise":
        return np.random.default_rng(trained.config.seed).integers(0, levels, (num, *shape), np.uint8)
    if name == "rotated":
        return np.rot90(source.held_out("test", num, trained.config.seed), axes=(1, 2)).copy()
    found = data.load(name, data_dir=trained.config.data.data_dir)
    return adapt(found.images["test"][:num], found.num_levels, shape, levels)


def adapt(
    images: Integer[np.ndarray, "n _ _ _"], num_levels: int, shape: tuple[int, ...], new_levels: int
) -> Integer[np.ndarray, "n _ _ _"]:
    """Images in another size, by nearest neighbour, with other levels, and one channel repeated or three averaged."""
    height, width, channels = shape
    rows = (np.arange(height) + 0.5) * images.shape[1] / height
    columns = (np.arange(width) + 0.5) * images.shape[2] / width
    scaled = images[:, rows.astype(int)][:, :, columns.astype(int)] / (num_levels - 1)
    if scaled.shape[-1] != channels:
        scaled = np.repeat(scaled.mean(axis=-1, keepdims=True), channels, axis=-1)
    return np.rint(scaled * (new_levels - 1)).astype(np.uint8)


def _in_batches(trained: Trained, function: Callable[[Any, Any], Any], images: Num[np.ndarray, "n h w c"]) -> Any:
    """A function of (images, their places), over all of them."""
    size = min(trained.config.evaluation.batch_size, len(images))
    parts = []
    for indices, mask in feed.eval_batches(len(images), size):
        outputs = jax.device_get(function(images[indices], indices))
        parts.append(jax.tree.map(lambda values, mask=mask: values[mask].astype(np.float64), outputs))
    return jax.tree.map(lambda *values: np.concatenate(values), *parts)


def _classifier_scores(trained: Trained) -> Score:
    spec = trained.spec

    @jax.jit
    def outputs(images: Array, _: Any):
        x = classifier.preprocess(spec, images)
        return classifier.pooled_and_logits(spec, trained.weights, trained.head, trained.statistics, x)

    assert trained.source.images is not None
    train = trained.source.images.images["train"][:NUM_FITTED]
    labels = trained.source.labels("train", NUM_FITTED)
    pooled, _ = _in_batches(trained, outputs, train)
    means = np.stack([pooled[labels == k].mean(axis=0) for k in np.unique(labels)])
    spread = pooled - means[np.searchsorted(np.unique(labels), labels)]
    covariance = spread.T @ spread / len(spread)
    covariance += RIDGE * np.diag(covariance).max() * np.eye(len(covariance))
    whiten = np.linalg.inv(np.linalg.cholesky(covariance)).T

    def score(images: np.ndarray) -> dict[str, np.ndarray]:
        pooled, logits = _in_batches(trained, outputs, images)
        log_sum = np.logaddexp.reduce(logits, axis=1)
        distances = np.linalg.norm((pooled[:, None] - means[None]) @ whiten, axis=-1)
        return {"energy": -log_sum, "confidence": -np.exp(logits.max(axis=1) - log_sum), "distance": distances.min(axis=1)}

    return score


def _density_scores(trained: Trained) -> Score:
    spec = trained.spec
    estimator = trained.config.evaluation.logdet.build()

    @jax.jit
    def bits(images, indices):
        key_noise, key_probe = evaluation_keys(jax.random.key(trained.config.seed), jnp.asarray(indices), 0, 0)
        x = density.to_continuous(spec, key_noise, images)
        return density.objective(spec, density.log_prob(spec, trained.weights, trained.prior, x, key_probe, estimator).log_prob)

    @jax.jit
    def class_log_probs(images, _):
        return density.class_log_probs(spec, trained.weights, trained.prior, density.cell_centers(spec, images))

    assert trained.source.images is not None
    usual = _in_batches(trained, bits, trained.source.images.images["train"][:NUM_FITTED]).mean()

    def score(images: np.ndarray) -> dict[str, np.ndarray]:
        found = _in_batches(trained, bits, images)
        scores = {"likelihood": found, "typicality": np.abs(found - usual)}
        if trained.has_classes:
            scores["confidence"] = -np.exp(_in_batches(trained, class_log_probs, images).max(axis=1))
        return scores

    return score
