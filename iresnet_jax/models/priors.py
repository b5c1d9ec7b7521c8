"""Priors of latents: values that have a log-density and are sampled, and whose arrays are trained.

A prior is a pytree with ``log_prob(z) -> (b,)`` and ``sample(key, (n,)) -> (n, d)``, as
distributions of NumPyro and flowjax are. Those of `FAMILIES` also have ``standard``, to start from,
``fit`` to latents, and a temperature, the factor on the scale of their samples: 1 samples the
prior, and at 0 every sample is a mean.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Integer, Key
from numpy.typing import ArrayLike

from iresnet_jax.bijections.logit import log_logistic
from iresnet_jax.branches.own import Structure
from iresnet_jax.maths.platforms import floats
from iresnet_jax.models.mixtures import EntryMixtures, GaussianMixture, ScaleMixture
from iresnet_jax.pytrees import pytree

NUM_FOLDS = 5  # of the cross-validation of classifiers
NUM_REGRESSED = 5000  # latents that logistic regression is fitted to
SMALLEST_VARIANCE = 1e-4  # of latents within classes, whose whole variance is about 1 or more

L = TypeVar("L", bound="LocationScale")


@pytree(arrays=("mean", "log_scale"))
class LocationScale:
    """Independent entries ``mean + scale * e``, with ``e`` from the standard member of a family.

    Attributes:
        mean: Mean of each entry.
        log_scale: Logarithm of the scale of each entry.
        unit_std, log_density, draw: The standard member's standard deviation, log-density and
            source of numbers.
    """

    unit_std: ClassVar[float]
    log_density: ClassVar[Callable[[Array], Array]]
    draw: ClassVar[Callable[..., Array]]

    mean: Any
    log_scale: Any

    @classmethod
    def standard(cls: type[L], num_dims: int) -> L:
        """Means of 0 and scales of 1."""
        return cls(floats(np.zeros(num_dims)), floats(np.zeros(num_dims)))

    @classmethod
    def of_moments(cls: type[L], mean: ArrayLike, std: ArrayLike) -> L:
        """The member with these means and standard deviations."""
        return cls(floats(mean), floats(np.log(std) - math.log(cls.unit_std)))

    @classmethod
    def fit(cls: type[L], z: ArrayLike) -> L:
        """The member with the moments of latents."""
        z = np.asarray(z, np.float64)
        return cls.of_moments(z.mean(axis=0), np.sqrt(np.maximum(z.var(axis=0), SMALLEST_VARIANCE)))

    def log_prob(self, z: Float[Array, "b d"]) -> Float[Array, " b"]:
        """``sum (log p(t) - log_scale)`` with ``t = (z - mean) / scale``; natural log, exact."""
        t = (z - self.mean[None]) * jnp.exp(-self.log_scale[None])
        return jnp.sum(self.log_density(t) - self.log_scale[None], axis=1)

    def sample(
        self, key: Key[Array, ""], shape: tuple[int], temperature: Any = 1.0
    ) -> Float[Array, "n d"]:
        """Draws ``mean + temperature * scale * e``."""
        drawn = self.draw(key, (*shape, *self.mean.shape), self.mean.dtype)
        return self.mean[None] + temperature * jnp.exp(self.log_scale[None]) * drawn


@pytree(arrays=("mean", "log_scale"))
class Gaussian(LocationScale):
    """Independent normal entries; ``exp(log_scale)`` are their standard deviations."""

    unit_std = 1.0
    draw = staticmethod(jax.random.normal)

    @staticmethod
    def log_density(t: Array) -> Array:
        """Log-density of the standard normal distribution."""
        return -0.5 * jnp.square(t) - 0.5 * math.log(2 * math.pi)


@pytree(arrays=("mean", "log_scale"))
class Logistic(LocationScale):
    """Independent logistic entries, ``log p(t) = log sigmoid(t) + log sigmoid(-t)``: its tails
    are linear in ``|t|``.
    """

    unit_std = math.pi / math.sqrt(3)
    log_density = staticmethod(log_logistic)
    draw = staticmethod(jax.random.logistic)


LOCATION_SCALE: dict[str, Any] = {"gaussian": Gaussian, "logistic": Logistic}
MIXTURES: dict[str, Any] = {
    "mixture": GaussianMixture,
    "scales": ScaleMixture,
    "marginals": EntryMixtures,
}  # of components
FAMILIES = {**LOCATION_SCALE, **MIXTURES}
OWN = "own"  # the family of a prior of one's own


@pytree(arrays=("by_class", "logits"))
class ClassPriors:
    """A prior for every class: ``p(z) = sum_y p(y) p(z | y)``.

    Attributes:
        by_class: A prior of `LOCATION_SCALE` whose arrays have a leading axis of classes.
        logits: ``p(y) = softmax(logits)_y``.
    """

    scored: ClassVar[tuple[str, ...]] = ("logits",)

    by_class: Any
    logits: Any

    @classmethod
    def standard(cls, family: str, num_dims: int, num_classes: int) -> "ClassPriors":
        """Classes that are equally likely, with the standard member each."""
        one = LOCATION_SCALE[family].standard(num_dims)
        stacked = jax.tree.map(lambda leaf: floats(np.zeros((num_classes, *leaf.shape))), one)
        return cls(stacked, floats(np.zeros(num_classes)))

    @classmethod
    def fit(
        cls, family: str, z: ArrayLike, labels: Int[np.ndarray, " n"], num_classes: int
    ) -> "ClassPriors":
        """Priors of classes whose variance is 1, as it is within classes behind `Whiten`.

        The means are those of the latents of each class, as in linear discriminant analysis. If its
        classes are less likely by cross-validation than those of logistic regression, whose weights
        are means up to a shift of all of them, they are the ones nearest to the mean of all latents
        that leave ``p(y)`` near the frequencies of classes. A class without examples has the mean
        of all latents. Frequencies count one more example a class.
        """
        z = np.asarray(z, np.float64)
        counts = np.bincount(labels, minlength=num_classes)
        mean = np.stack(
            [
                z[labels == label].mean(axis=0) if counts[label] else z.mean(axis=0)
                for label in range(num_classes)
            ]
        )
        logits = np.log((counts + 1) / (counts.sum() + num_classes))
        some = slice(0, NUM_REGRESSED)
        has_all = (
            family == "gaussian"
            and np.bincount(labels[some], minlength=num_classes).min() >= NUM_FOLDS
        )
        if has_all and (found := _better_logits(z[some], labels[some])) is not None:
            weights, bias = found
            mean = weights - weights.mean(axis=0) + z.mean(axis=0)
            shift = logits - bias - 0.5 * np.square(mean).sum(axis=1)
            mean = mean + np.linalg.lstsq(mean - mean[0], shift - shift[0], rcond=0.1)[0]
            logits = bias + 0.5 * np.square(mean).sum(axis=1)
        return cls(LOCATION_SCALE[family].of_moments(mean, np.ones_like(mean)), floats(logits))

    def log_prob_by_class(self, z: Float[Array, "b d"]) -> Float[Array, "b k"]:
        """``log p(y) + log p(z | y)`` for every class ``y``: logits of the classes, whose
        log-sum-exp is the log-density.
        """
        of_classes = jax.vmap(lambda prior: prior.log_prob(z), out_axes=1)(self.by_class)
        return of_classes + jax.nn.log_softmax(self.logits)[None]

    def log_prob(
        self, z: Float[Array, "b d"], labels: Integer[Array, " b"] | None = None
    ) -> Float[Array, " b"]:
        """``log p(z)``, or ``log p(z | y)`` with labels ``y``, NaN for a label that is no class."""
        by_class = self.log_prob_by_class(z)
        if labels is None:
            return jax.nn.logsumexp(by_class, axis=1)
        of_classes = by_class - jax.nn.log_softmax(self.logits)[None]
        labels = self.checked_labels(labels, len(z))
        own = jnp.take_along_axis(of_classes, labels[:, None], axis=1)[:, 0]
        return jnp.where(self._exist(labels), own, jnp.nan)

    def _exist(self, labels: Integer[Array, " n"]) -> Bool[Array, " n"]:
        return (labels >= 0) & (labels < len(self.logits))

    def checked_labels(self, labels: Any, num: int) -> Array:
        """Classes of so many samples. Numbers that are no classes make results NaN."""
        labels = labels if isinstance(labels, jax.Array) else np.asarray(labels)
        if labels.shape != (num,) or not jnp.issubdtype(labels.dtype, jnp.integer):
            raise ValueError(
                f"labels must be {num} integers, one per sample, got {labels.dtype} "
                f"of shape {labels.shape}"
            )
        return jnp.asarray(labels).astype(int)  # 256 is no number of 8 bits

    def sample(
        self,
        key: Key[Array, ""],
        shape: tuple[int],
        temperature: Any = 1.0,
        labels: Integer[Array, " n"] | None = None,
    ) -> Float[Array, "n d"]:
        """Draws of classes from ``p(y)``, or of these labels; NaN for a label that is no class."""
        key_label, key_noise = jax.random.split(key)
        drawn = jax.random.categorical(key_label, self.logits, shape=shape)
        labels = drawn if labels is None else jnp.asarray(labels).astype(int)
        chosen = jax.tree.map(lambda stacked: stacked[labels], self.by_class)
        one = jax.vmap(lambda prior, key: prior.sample(key, (1,), temperature)[0])
        return jnp.where(
            self._exist(labels)[:, None], one(chosen, jax.random.split(key_noise, *shape)), jnp.nan
        )


def _better_logits(
    z: Float[np.ndarray, "n d"], labels: Int[np.ndarray, " n"]
) -> tuple[Any, Any] | None:
    """Weights ``(k, d)`` and biases ``(k,)`` of logistic regression if it is better than linear
    discriminant analysis.
    """
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import cross_val_score
    from threadpoolctl import threadpool_limits

    regression, analysis = LogisticRegression(max_iter=1000), LinearDiscriminantAnalysis()
    with threadpool_limits(1):
        scores = [
            cross_val_score(each, z, labels, scoring="neg_log_loss", cv=NUM_FOLDS).mean()
            for each in (regression, analysis)
        ]
        if scores[0] < scores[1]:
            return None
        regression.fit(z, labels)
    weights, bias = np.asarray(regression.coef_), np.asarray(regression.intercept_)
    if len(bias) == 1:  # two classes have one logit
        weights, bias = (np.concatenate([np.zeros_like(part), part]) for part in (weights, bias))
    return weights, bias


@pytree(arrays=("weights",))
class OwnPrior:
    """A prior of one's own with its arrays of JAX apart from everything else, which is constant.

    Attributes:
        weights: Its arrays of floats, which are trained.
        structure: What is not.
    """

    weights: Mapping[str, Any]
    structure: Structure

    @property
    def module(self) -> Any:
        """The prior as it was given, with the weights of now."""
        return self.structure.join(self.weights)

    def log_prob(self, z: Float[Array, "b d"]) -> Array:
        """Log-density, as the prior says it."""
        return self.module.log_prob(z)

    def sample(self, key: Key[Array, ""], shape: tuple[int]) -> Array:
        """Draws, as the prior makes them."""
        return self.module.sample(key, shape)


def standard(
    family: str, num_dims: int, num_components: int | None = None, num_classes: int | None = None
) -> Any:
    """The standard member of a family, of so many components or for each class, which all
    members have the structure of.
    """
    if num_classes is not None:
        return ClassPriors.standard(family, num_dims, num_classes)
    return FAMILIES[family].standard(
        num_dims, *([] if num_components is None else [num_components])
    )


def family_of(prior: Any) -> str:
    """Name of a prior's family."""
    return next((name for name, family in FAMILIES.items() if isinstance(prior, family)), OWN)


def trainable(prior: Any) -> Any:
    """A prior as a pytree of arrays of floats: itself, or an `OwnPrior` if it is one's own and has
    other leaves.

    As in branches of one's own, arrays of JAX are trained; arrays of NumPy, numbers and functions
    are constants.
    """
    if isinstance(prior, (*FAMILIES.values(), ClassPriors)):
        return jax.tree.map(floats, prior)
    structure, weights = Structure.of(prior)
    return prior if all(structure.names) else OwnPrior(weights, structure)
