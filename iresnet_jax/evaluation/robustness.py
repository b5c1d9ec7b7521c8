"""Verified accuracy of a classifier against the radius of perturbations, beside its accuracy under an attack.

An image is verified at a radius if it is classified rightly and its certified radius is no smaller. Accuracy under attack
counts images that are classified rightly and for which no perturbation up to that norm was found that changes the class. The
fraction that no perturbation at all breaks lies between the two.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Integer, Key, Num

from iresnet_jax.certification.radius import CertifiedRadius, radius
from iresnet_jax.certification.trajectory import in_float64
from iresnet_jax.evaluation.accuracy import CONFIDENCE, fraction_interval
from iresnet_jax.models.classifier import Classifier
from iresnet_jax.training.parallel import eval_batches

_SHORTER = 1 - 1e-6  # than the radius, so that rounding leaves no perturbation longer than it


@dataclasses.dataclass(frozen=True)
class RobustnessAt:
    """How a classifier holds against perturbations of one norm.

    Attributes:
        radius: Largest norm of a perturbation, of pixels on the scale of [0, 1].
        verified: Fraction of images that are classified rightly whatever the perturbation, guaranteed.
        interval: Wilson interval of ``verified``, low and high.
        attacked: Fraction of images that are classified rightly and whose class no attack changed: an upper bound.
        num_broken: Images with a certified radius of that size whose class the attack changed: 0, or a certificate is wrong.
    """

    radius: float
    verified: float
    interval: tuple[float, float]
    attacked: float
    num_broken: int


@dataclasses.dataclass(frozen=True)
class Robustness:
    """Verified accuracy and accuracy under attack against the radius.

    Attributes:
        num_examples: Test images.
        accuracy: Fraction that is classified rightly.
        at: Results by radius.
        median_radius: Median of the certified radii.
        median_global_radius: Median of those that the Lipschitz constant of the whole network gives.
        confidence: Probability that an interval covers the true accuracy.
    """

    num_examples: int
    accuracy: float
    at: tuple[RobustnessAt, ...]
    median_radius: float
    median_global_radius: float
    confidence: float

    @property
    def num_broken(self) -> int:
        """Certificates that the attack broke, at any radius."""
        return sum(row.num_broken for row in self.at)

    def __str__(self) -> str:
        lines = [
            f"{self.num_examples} test images, {100 * self.accuracy:.1f} % right; median certified radius "
            f"{self.median_radius:.2g}, by the Lipschitz constant alone {self.median_global_radius:.2g}",
            f"    radius  verified [%]  ({100 * self.confidence:.0f} % interval)  under attack [%]",
        ]
        for row in self.at:
            interval = "({:.1f} to {:.1f})".format(*(100 * value for value in row.interval))
            lines.append(f"{row.radius:10g}  {100 * row.verified:12.1f}  {interval:>16}  {100 * row.attacked:16.1f}")
        if self.num_broken:
            lines.append(f"{self.num_broken} certificates were broken by the attack: please report it")
        return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class Attack:
    """Projected gradient descent on the margin in a ball of the 2-norm (Madry et al. 2018).

    Attributes:
        num_restarts: Random starts in the ball; the first start is the image itself.
        num_steps: Steps of each.
        step_size: Length of a step over the radius.
    """

    num_restarts: int = 3
    num_steps: int = 40
    step_size: float = 0.1

    def __post_init__(self):
        if self.num_restarts < 1 or self.num_steps < 1 or not self.step_size > 0:
            raise ValueError(f"an attack needs at least 1 restart, 1 step and a positive step_size, got {self}")


def evaluate(
    model: Classifier,
    images: Integer[np.ndarray, "n h w c"],
    labels: Int[np.ndarray, " _"],
    *,
    radii: Sequence[float],
    attack: Attack = Attack(),
    batch_size: int = 64,
    seed: int = 0,
    certified: CertifiedRadius | None = None,
) -> Robustness:
    """Verified accuracy and accuracy under attack at each radius.

    Args:
        radii: Norms of perturbations, of pixels on the scale of [0, 1], which they may leave; increasing and positive.
        certified: Certified radii of the images, if they are known.

    Raises:
        ValueError: If the model cannot be certified, the radii are not increasing and positive, or there are no images.
    """
    if not len(images) or len(images) != len(labels):
        raise ValueError(f"a robust accuracy needs images with a label each, got {len(images)} and {len(labels)}")
    if not len(radii) or min(radii) <= 0 or list(radii) != sorted(set(radii)):
        raise ValueError(f"radii must be positive and increasing, got {tuple(radii)}")
    certified = radius(model, images) if certified is None else certified
    right = certified.predicted == labels
    rows, resists = [], right
    for r in radii:
        safe, broken = certified.radius >= r, np.zeros(len(images), bool)
        for indices, mask in eval_batches(len(images), min(batch_size, len(images))):
            keys = jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(seed)))(jnp.asarray(indices))
            found = attacked(model, images[indices], certified.predicted[indices], r, keys, attack)
            broken[np.asarray(indices)[mask]] = found[mask]
        resists = resists & ~broken  # a perturbation of a smaller norm is one of this norm too
        verified, num = int(np.sum(right & safe)), len(right)
        interval, num_broken = fraction_interval(verified, num), int(np.sum(safe & broken))
        rows.append(RobustnessAt(r, verified / num, interval, float(resists.mean()), num_broken))
    median, whole = (float(np.median(values)) for values in (certified.radius, certified.global_radius))
    return Robustness(len(images), float(right.mean()), tuple(rows), median, whole, CONFIDENCE)


def attacked(
    model: Classifier,
    images: Integer[np.ndarray, "b h w c"],
    classes: Int[np.ndarray, " b"],
    radius: float,
    keys: Key[Array, " b"],
    attack: Attack,
) -> Bool[np.ndarray, " b"]:
    """For which images a perturbation of at most that norm was found that changes the class; verified in float64.

    Args:
        classes: The classes that the model gives them.
        radius: Largest norm of a perturbation, of pixels on the scale of [0, 1].
    """
    pixels = np.asarray(images, np.float64) / (model.spec.num_levels - 1)
    moves = np.asarray(_climb(model, jnp.asarray(pixels, jnp.float32), jnp.asarray(classes), radius, keys, attack), np.float64)
    lengths = np.sqrt(np.sum(np.square(moves), axis=(-3, -2, -1), keepdims=True))
    moves *= np.minimum(1, radius * _SHORTER / np.maximum(lengths, 1e-300))
    with jax.enable_x64():
        precise = in_float64((model.weights, model.head, model.statistics))
        precise = model.with_(**dict(zip(("weights", "head", "statistics"), precise, strict=True)))
        logits = np.asarray(_logits(precise, jnp.asarray(pixels + moves).reshape(-1, *pixels.shape[1:])))
    given = logits.argmax(axis=1).reshape(len(moves), -1)
    return np.any(given != np.asarray(classes), axis=0)


@jax.jit
def _logits(model: Classifier, pixels: Float[Array, "b h w c"]) -> Float[Array, "b k"]:
    return model.logits_of_input(model.spec.pad(pixels))


@functools.partial(jax.jit, static_argnames="attack")
def _climb(model, pixels, classes, radius, keys, attack: Attack) -> Num[Array, "s b h w c"]:
    """The perturbations with the least margins, one per restart and image."""

    def margins(moves):
        logits = _logits(model, pixels + moves)
        own = jnp.take_along_axis(logits, classes[:, None], axis=1)[:, 0]
        others = jnp.where(jax.nn.one_hot(classes, logits.shape[1]) > 0, -jnp.inf, logits)
        return own - jnp.max(others, axis=1)

    def unit(values):
        return values / jnp.maximum(jnp.sqrt(jnp.sum(values**2, axis=(1, 2, 3), keepdims=True)), 1e-12)

    def step(state, _):
        moves, best, least = state
        values, pull = jax.vjp(margins, moves)
        best = jnp.where((values < least)[:, None, None, None], moves, best)
        moves = moves - attack.step_size * radius * unit(pull(jnp.ones_like(values))[0])
        lengths = jnp.sqrt(jnp.sum(moves**2, axis=(1, 2, 3), keepdims=True))
        moves = moves * jnp.minimum(1, radius * _SHORTER / jnp.maximum(lengths, 1e-12))
        return (moves, best, jnp.minimum(values, least)), None

    def restart(index):
        def draw(key):
            key_direction, key_length = jax.random.split(jax.random.fold_in(key, index))
            share = jax.random.uniform(key_length) ** (1 / pixels[0].size)
            return share, jax.random.normal(key_direction, pixels.shape[1:])

        shares, directions = jax.vmap(draw)(keys)
        start = jnp.where(index > 0, radius * _SHORTER, 0) * shares[:, None, None, None] * unit(directions)
        state = (start, start, jnp.full(len(pixels), jnp.inf))
        (moves, best, least), _ = lax.scan(step, state, length=attack.num_steps)
        return jnp.where((margins(moves) < least)[:, None, None, None], moves, best)

    return lax.map(restart, jnp.arange(attack.num_restarts))
