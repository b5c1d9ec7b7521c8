"""Test error of a model with classes, and the accuracy of a classifier if pixels may move.

The accuracy against every attack within a distance lies between the verified accuracy, by
`certify.radius`, and the accuracy under the attacks here.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, Num

from iresnet_jax import certification as certify
from iresnet_jax.maths.fixed_point import example_norm
from iresnet_jax.models.classifier import Classifier
from iresnet_jax.models.density import Density
from iresnet_jax.runs.config import EvaluationConfig
from iresnet_jax.training import parallel
from iresnet_jax.training.objectives import classify

CONFIDENCE = 0.95  # probability that the interval of an error covers the true error
NUM_MISTAKES = 32  # listed and shown
NUM_CHECKED = 1000  # largest number of images whose own radii are attacked
INSIDE = 0.999  # share of a radius within which attacks must fail by more than rounding
ROUNDING = 1e-5  # rounding of logits in float32, relative to their size


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

    def __str__(self) -> str:
        low, high = self.interval
        line = (
            f"test error: {100 * self.error:.2f} % ({self.num_errors} of {self.num_examples} "
            f"examples; {100 * CONFIDENCE:.0f} % interval {100 * low:.2f} to {100 * high:.2f} %), "
            f"cross-entropy {self.loss:.4f} nats"
        )
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
    return summarize(outputs["logits"], labels, loss=float(outputs["loss"].mean(dtype=np.float64)))


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


# --- robustness -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Accuracy:
    """Fraction of images that are classified correctly, with its Wilson interval."""

    fraction: float
    interval: tuple[float, float]

    @classmethod
    def of(cls, right: Bool[np.ndarray, " n"]) -> "Accuracy":
        """The accuracy, from a mask of the images that are classified correctly."""
        return cls(float(right.mean()), fraction_interval(int(right.sum()), len(right)))

    def __str__(self) -> str:
        low, high = self.interval
        return f"{100 * self.fraction:5.2f} % ({100 * low:.2f} to {100 * high:.2f})"


@dataclass(frozen=True)
class Robustness:
    """Accuracies within radii, for pixels on the scale of [0, 1] in the 2-norm.

    Attributes:
        num_examples: Test images.
        clean: Accuracy on the images as they are.
        radii: Radii, the smallest first.
        verified: Accuracy that is proven within each radius.
        attacked: Accuracy under attacks within each radius.
        attack: Steps and random starts of an attack.
        median_radius: Median of the certified radii, 0 for images that are classified wrongly.
        lipschitz: Median of the certified Lipschitz constants of the margins.
        num_checked: Images that were attacked within .999 times their own radius.
        num_broken: Radii that these attacks broke.
    """

    num_examples: int
    clean: Accuracy
    radii: tuple[float, ...]
    verified: tuple[Accuracy, ...]
    attacked: tuple[Accuracy, ...]
    attack: tuple[int, int]
    median_radius: float
    lipschitz: float
    num_checked: int
    num_broken: int

    def __str__(self) -> str:
        rows = zip(self.radii, self.verified, self.attacked, strict=True)
        steps, starts = self.attack
        lines = [
            f"robustness: {self.clean.fraction:.2%} of {self.num_examples} images right, median "
            f"certified radius {self.median_radius:.4g}; {self.num_broken} of {self.num_checked} "
            f"radii broken by attacks ({steps} steps, {starts} starts)",
            f"{'radius':>8}   {'verified':24} under attack",
            *(f"{size:8.4g}   {proven!s:24} {left}" for size, proven, left in rows),
        ]
        return "\n".join([*lines, *self.warnings()])

    def warnings(self) -> list[str]:
        """Sentences about broken radii, and about constants too large to verify anything."""
        found = []
        if self.num_broken:
            found.append(
                f"{self.num_broken} certified radii were broken: a bound is wrong, please "
                "report it."
            )
        # For a linear head on potentials it is at most 2 over the least divisor of pixels.
        if self.lipschitz > 20:
            found.append(
                "Radii are small because the certified Lipschitz constant of margins is "
                f"{self.lipschitz:.2g}, a product over "
                'all blocks: only blocks of kind "potential" without ActNorm keep it near 1.'
            )
        return found


def robustness(
    model: Classifier,
    images: Num[np.ndarray, "n h w c"],
    labels: Int[np.ndarray, " n"],
    settings: EvaluationConfig,
    seed: int,
) -> Robustness:
    """The robustness of a classifier on images of integer levels.

    An image is not attacked at radii at which it is verified, nor at radii above a successful
    attack.
    """
    attack, size = (settings.attack_steps, settings.attack_starts), settings.batch_size
    found = certify.radius(model, images)
    right = found.predicted == labels
    proven, left = np.where(right, found.radius, 0), right.copy()
    radii, verified, attacked = sorted(settings.radii), [], []
    for radius in radii:
        tried = np.flatnonzero(left & (proven < radius))
        left[tried] = 0 < least_margins(
            model, images[tried], labels[tried], np.full(len(tried), radius), attack, seed, size
        )
        verified.append(Accuracy.of(proven >= radius))
        attacked.append(Accuracy.of(left))
    own = slice(0, NUM_CHECKED)
    margins = least_margins(
        model, images[own], found.predicted[own], INSIDE * found.radius[own], attack, seed, size
    )
    return Robustness(
        num_examples=len(images),
        clean=Accuracy.of(right),
        radii=tuple(radii),
        verified=tuple(verified),
        attacked=tuple(attacked),
        attack=attack,
        median_radius=float(np.median(proven)),
        lipschitz=float(np.median(found.lipschitz)),
        num_checked=len(margins),
        num_broken=int((margins < 0).sum()),
    )


def least_margins(
    model: Classifier,
    images: Num[np.ndarray, "n h w c"],
    classes: Int[np.ndarray, " n"],
    radii: Float[np.ndarray, " n"],
    attack: tuple[int, int],
    seed: int,
    batch_size: int,
) -> Float[np.ndarray, " n"]:
    """The least margins of classes that projected gradient descent finds within radii (Madry et al.
    2018).

    The margin is the class' logit less the largest other one. A step's length is 2.5 radii divided
    by the number of steps.

    Args:
        model: The classifier.
        images: Images of integer levels; pixels stay within [0, 1].
        classes: Class of each image.
        radii: Radius of each image.
        attack: Number of steps and of random starts.
        seed: Seed of the starts.
        batch_size: Most images at once.
    """
    if not len(images):
        return np.zeros(0)
    state = (model, np.asarray(attack, np.int32), np.uint32(seed))
    # All batches have one shape, so one program is compiled.
    places = np.resize(np.arange(len(images)), -(-len(images) // batch_size) * batch_size)
    rows = (
        images[places],
        classes[places].astype(np.int32),
        radii[places].astype(np.float32),
        places,
    )
    return parallel.over_batches(_descend, state, parallel.rows_of(*rows), len(places), batch_size)[
        : len(images)
    ]


def _descend(state: Any, batch: Any) -> Float[Array, " b"]:
    (model, (num_steps, num_starts), seed), (images, classes, radii, places) = state, batch
    spec = model.spec
    pixels = spec.unpad(model.preprocess(images))
    is_own = jax.nn.one_hot(classes, spec.num_classes) > 0
    keys = jax.vmap(lambda place: jax.random.fold_in(jax.random.key(seed), place))(places)

    def summed(x):
        logits = model.logits_of_input(spec.pad(x))
        rest = jnp.max(jnp.where(is_own, -jnp.inf, logits), axis=1)
        margins = jnp.max(jnp.where(is_own, logits, -jnp.inf), axis=1) - rest
        return jnp.sum(margins), margins + ROUNDING * jnp.max(jnp.abs(logits), axis=1)

    def along(directions, lengths):  # scales each example's direction to a Euclidean norm
        norms = jnp.maximum(example_norm(directions), jnp.finfo(directions.dtype).tiny)
        return directions * (lengths / norms).reshape(-1, 1, 1, 1)

    def into_ball(x):
        moves = jax.vmap(optax.projections.projection_l2_ball)(x - pixels, radii)
        return jnp.clip(pixels + moves, 0, 1)

    def descend(start, least):
        draws = jax.vmap(
            lambda key: jax.random.normal(jax.random.fold_in(key, start), pixels.shape[1:])
        )(keys)
        first = into_ball(pixels + along(draws, radii))

        def step(_, state):
            x, least = state
            slopes, margins = jax.grad(summed, has_aux=True)(x)
            x = into_ball(x - along(slopes, 2.5 * radii / num_steps))
            return x, jnp.minimum(least, margins)

        x, least = jax.lax.fori_loop(0, num_steps, step, (first, least))
        return jnp.minimum(least, summed(x)[1])

    return jax.lax.fori_loop(0, num_starts, descend, jnp.full(len(pixels), jnp.inf, pixels.dtype))
