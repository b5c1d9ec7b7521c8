"""How well a model's scores tell other data from the data that it was trained on.

Every score is larger for stranger images. Its number is the area under the ROC curve between test images and others, 1 for a
perfect score and 1/2 for a coin. Numbers of different scores do not compare, so every result carries the definitions.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Integer, Num

from iresnet_jax import data
from iresnet_jax.data.dataset import DataSet
from iresnet_jax.data.splits import some_rows
from iresnet_jax.models.classifier import Classifier
from iresnet_jax.models.density import Density
from iresnet_jax.models.head import linear
from iresnet_jax.models.reconstructor import Reconstructor
from iresnet_jax.runs.config import EvaluationConfig
from iresnet_jax.training import parallel
from iresnet_jax.training.objectives.density import evaluate_examples

OTHERS = ("rotated", "noise")
NUM_EXAMPLES = 2000  # images of each side, at most
NUM_FITTED = 5000  # training images that scores are fitted to, at most
RIDGE = 1e-3  # fraction of the pooled features' largest variance that is added to all of them

DEFINITIONS = {
    "energy": "minus the log-sum-exp of the logits (Liu et al. 2020)",
    "confidence": "minus the probability of the most likely class (Hendrycks and Gimpel 2017)",
    "distance": "Mahalanobis distance of the pooled features to the nearest class mean, with the covariance that all classes "
    "share, from training images (Lee et al. 2018)",
    "likelihood": "bits per dimension of the image, a single draw of noise and probes",
    "typicality": "distance of those bits per dimension from their mean over training images (Nalisnick et al. 2019)",
}


@dataclass(frozen=True)
class Score:
    """Area under the ROC curve of a score, and the score's definition: areas of different scores do not compare."""

    auroc: float
    definition: str


@dataclass(frozen=True)
class Separation:
    """How well scores tell other images from test images.

    Attributes:
        other: "rotated", "noise" or the name of a data set.
        num_inside: Test images.
        num_outside: Other images.
        scores: Scores by name.
    """

    other: str
    num_inside: int
    num_outside: int
    scores: Mapping[str, Score]

    def __str__(self) -> str:
        lines = [f"{self.num_inside} test images against {self.num_outside} others ({self.other}):"]
        lines += [f"  AUROC {score.auroc:.4f}  {name}: {score.definition}" for name, score in self.scores.items()]
        return "\n".join(lines)


Scores = Callable[[np.ndarray], dict[str, np.ndarray]]  # of images, each by its name


def auroc(inside: Float[np.ndarray, " n"], outside: Float[np.ndarray, " m"]) -> float:
    """``P(outside > inside) + P(equal) / 2`` over all pairs; scores may be infinite.

    Raises:
        ValueError: If a side is empty or holds a NaN.
    """
    scores = np.concatenate([inside, outside])
    if not len(inside) or not len(outside) or np.isnan(scores).any():
        raise ValueError(f"an AUROC needs scores on both sides, none of them NaN: got {len(inside)} and {len(outside)}")
    from scipy.stats import rankdata  # late: a second, for which other commands should not wait
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(np.repeat([0, 1], [len(inside), len(outside)]), rankdata(scores)))


def compare(
    model: Density | Classifier | Reconstructor,
    dataset: DataSet,
    other: str,
    settings: EvaluationConfig,
    seed: int,
    *,
    num: int = NUM_EXAMPLES,
    data_dir: str | None = None,
) -> Separation:
    """Areas under the ROC curve between test images and others, by score.

    Args:
        other: "rotated", the test images turned by a quarter, or upside down if they are not square; "noise", uniform over all
            levels; or the name of a data set, whose test images are brought to the model's size and levels, see `adapt`.
        num: Images of each side, at most.

    Raises:
        ValueError: If the data are points or have no test split, the model is a reconstructor or takes contexts, or there is no
            such data set.
    """
    if dataset.num_levels is None:
        raise ValueError(f"scores are compared between images, and {dataset.name} are points: give a model of images")
    if isinstance(model, Reconstructor):
        raise ValueError("scores are those of a density or a classifier, and this is a reconstructor")
    if isinstance(model, Density) and model.spec.context_dim:
        raise ValueError("scores are those of a density without contexts: save model.given(context), that of one context")
    test = dataset.held_out("test")
    inside = test[some_rows(len(test), num)]
    outside = others(dataset, other, num, seed, data_dir)
    if isinstance(model, Classifier):
        score = _classifier_scores(model, dataset, settings.batch_size)
    else:
        score = _density_scores(model.with_(estimator=settings.logdet.build()), dataset, settings.batch_size, seed)
    found = score(inside), score(outside)
    scores = {name: Score(auroc(found[0][name], found[1][name]), DEFINITIONS[name]) for name in found[0]}
    return Separation(other, len(inside), len(outside), scores)


def others(dataset: DataSet, name: str, num: int, seed: int, data_dir: str | None = None) -> Integer[np.ndarray, "n h w c"]:
    """Images of another kind, see `compare`, in the size and with the levels of the data."""
    levels, shape = dataset.num_levels, dataset.event_shape
    assert levels is not None  # images
    if name == "noise":
        return np.random.default_rng(seed).integers(0, levels, (num, *shape), np.uint8)
    if name == "rotated":
        test = dataset.held_out("test")
        return np.rot90(test[some_rows(len(test), num)], 1 if shape[0] == shape[1] else 2, axes=(1, 2)).copy()
    found = data.load(name, data_dir=data_dir)
    if found.num_levels is None:
        raise ValueError(f"{name} are points, which cannot be compared with images: name a data set of images")
    test = found.held_out("test")
    return adapt(test[some_rows(len(test), num)], found.num_levels, shape, levels)


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


def _pooled_and_logits(model, images):
    pooled = model.pooled(images)
    return pooled, linear(model.head, pooled)


def _class_log_probs(model, images):
    return model.class_log_probs(images)


def _outputs(function: Callable[..., Any], model: Any, images: Num[np.ndarray, "n h w c"], batch_size: int) -> Any:
    """Outputs of ``function(model, images)`` in float64."""
    found = parallel.over_batches(function, model, lambda places: images[places], len(images), batch_size)
    return jax.tree.map(lambda values: values.astype(np.float64), found)


def _classifier_scores(model: Classifier, dataset: DataSet, batch_size: int) -> Scores:
    from scipy.spatial.distance import cdist  # late, as above

    rows = some_rows(len(dataset.labels["train"]), NUM_FITTED)
    labels = dataset.labels["train"][rows]
    pooled, _ = _outputs(_pooled_and_logits, model, dataset.examples["train"][rows], batch_size)
    classes, places = np.unique(labels, return_inverse=True)
    means = np.stack([pooled[labels == k].mean(axis=0) for k in classes])
    spread = pooled - means[places]
    covariance = spread.T @ spread / len(spread)
    covariance += RIDGE * np.diag(covariance).max() * np.eye(len(covariance))
    inverse = np.linalg.inv(covariance)

    def score(images: np.ndarray) -> dict[str, np.ndarray]:
        pooled, logits = _outputs(_pooled_and_logits, model, images, batch_size)
        log_sum = np.logaddexp.reduce(logits, axis=1)
        distances = cdist(pooled, means, "mahalanobis", VI=inverse)
        return {"energy": -log_sum, "confidence": -np.exp(logits.max(axis=1) - log_sum), "distance": distances.min(axis=1)}

    return score


def _density_scores(model: Density, dataset: DataSet, batch_size: int, seed: int) -> Scores:
    def bits(images: np.ndarray) -> np.ndarray:
        return evaluate_examples(model, images, jax.random.key(seed), batch_size)[model.spec.metric].astype(np.float64)

    examples = dataset.examples["train"]
    usual = bits(examples[some_rows(len(examples), NUM_FITTED)]).mean()

    def score(images: np.ndarray) -> dict[str, np.ndarray]:
        found = bits(images)
        scores = {"likelihood": found, "typicality": np.abs(found - usual)}
        if model.spec.num_classes is not None:
            scores["confidence"] = -np.exp(_outputs(_class_log_probs, model, images, batch_size).max(axis=1))
        return scores

    return score
