"""scikit-learn estimators: a density and a classifier of vectors, for pipelines and searches over parameters.

They wrap `fitting.fit` and take what ``pip install 'iresnet_jax[sklearn]'`` installs. Preprocessing runs in float64
outside of the compiled programs, so fits to data of one shape, such as the folds of a cross-validation, share all of them.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
import scipy.special
from sklearn.base import BaseEstimator, ClassifierMixin, DensityMixin
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data

from iresnet_jax.bijections.transforms.bounded import Bounded
from iresnet_jax.bijections.transforms.logit import Identity
from iresnet_jax.bijections.transforms.standardize import Standardize, Whiten
from iresnet_jax.checked_dataclasses import Count, check_unmasked, checked
from iresnet_jax.data.tables import REPEATS, check_density, ends_given, find_grid
from iresnet_jax.fit_arguments import checked_options
from iresnet_jax.fit_settings import is_whitened
from iresnet_jax.fitting import fit
from iresnet_jax.maths.logdet.krylov import KrylovLogdet
from iresnet_jax.maths.platforms import fast_compile
from iresnet_jax.models.density import Density
from iresnet_jax.runs.signals import interrupts_raised

LEAST_SAMPLES = 3  # two to train on, one to validate
EXACT_DIMS = 256  # at most: beyond, `score_samples` estimates log-determinants, see `_core`
NOISE_DRAWS = 16  # of the noise that spreads values on a grid over their cells
FARTHEST_DENSITY = 1e18  # standard deviations from the mean beyond which a density is 0: its square overflows in float32
FARTHEST = 1e6  # standard deviations from the mean at which a classifier clips, so that float32 does not overflow


class _ResidualFlow(BaseEstimator):
    """What both estimators do: checks, training, and the model's programs on batches of one size."""

    bounds: Any = None  # a parameter of densities alone

    def __init__(
        self,
        *,
        steps: Any = None,
        minutes: Any = None,
        architecture: Any = None,
        validation_fraction: Any = 0.1,
        random_state: Any = None,
        settings: Any = None,
        verbose: Any = False,
    ):
        # scikit-learn wants parameters stored as they are, and checked by `fit`.
        self.steps = steps
        self.minutes = minutes
        self.architecture = architecture
        self.validation_fraction = validation_fraction
        self.random_state = random_state
        self.settings = settings
        self.verbose = verbose

    def _train(self, x: np.ndarray, labels: np.ndarray | None = None) -> None:
        """Sets ``model_`` and ``history_`` to those of the data, checked and in float64."""
        given = ("steps", "minutes", "architecture", "validation_fraction", "settings")
        options = checked_options(**{name: getattr(self, name) for name in given})
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        settings = options["settings"] = {"seed": seed, **options["settings"]}
        names = self._names
        grid = find_grid(x - x.mean(axis=0), names)
        if labels is None:
            check_density(x, names, grid)
        bounds = None if self.bounds is None else ends_given(self.bounds, names, x.shape[1])
        # Values on a grid need a noise of their own in training; bounds and a preprocessing may be chosen: `fit` does it all.
        whole = "preprocessing.transform" in settings or grid is not None or bool(bounds)
        transform = Identity()
        if not whole:
            num = len(x) - max(round(options["validation_fraction"] * len(x)), 1)
            transform = Whiten.fit(x, labels) if is_whitened(num, x.shape[1]) else Standardize.fit(x)
            settings["preprocessing.transform"] = "none"
        with interrupts_raised():
            x = _forward(transform, x)[0].astype(np.float32)
            model = fit(x, labels, **options, bounds=bounds or None, progress=bool(self.verbose))
        assert isinstance(model, Density)
        self.model_ = model if whole else model.with_(spec=dataclasses.replace(model.spec, transform=transform))
        self.history_ = model.history

    @property
    def _names(self) -> list[str]:
        """Names of the features that vary, if they have any."""
        names = list(getattr(self, "feature_names_in_", ()))
        return [names[place] for place in getattr(self, "varying_features_", range(len(names)))] if names else []

    def _checked(self, X: Any) -> np.ndarray:
        check_is_fitted(self)
        check_unmasked(X, "X")
        x: Any = validate_data(self, X, dtype=np.float64, reset=False)
        return x


class ResidualFlowDensity(DensityMixin, _ResidualFlow):
    """A residual flow as a density estimator.

    `score_samples` and `score` are those of `sklearn.mixture.GaussianMixture`; `sample` returns the samples alone.

    Features with at most one value for every 2 samples, all on a regular grid, such as counts, are dequantised: `score_samples`
    is then a lower bound of the log-probability of their values. They keep to the range of the training samples, and features
    with bounds to theirs: no sample leaves it, and `score_samples` is minus infinity outside.
    A constant feature, or one that is a linear combination of others, has no density: `fit` refuses it by name.

    Args:
        steps: Updates to train for.
        minutes: Longest wall-clock time for training instead of steps; 3 by default.
        architecture: Stages of the flow; by default they depend on the number of samples.
        validation_fraction: Share of the samples that chooses the best step, in (0, 1).
        random_state: Seed. Fits to data of one shape share their compiled programs.
        bounds: Ends ``(low, high)`` of features by name or number, such as the range that counts may have in samples to score.
        settings: Other settings by name, such as ``{"optimizer.learning_rate": 1e-3}``, see `runs.config.Config`.
        verbose: Whether to write lines of progress to stderr.

    Attributes:
        model_: The trained `Density`.
        history_: Measurements of the training, a `History`.
        n_features_in_: Number of features.
        feature_names_in_: Their names, if `fit` was given a data frame.

    Example:
        >>> flow = ResidualFlowDensity(minutes=1, random_state=0).fit(x)  # doctest: +SKIP
        >>> flow.score_samples(x_new)  # doctest: +SKIP
    """

    def __init__(
        self,
        *,
        steps: Any = None,
        minutes: Any = None,
        architecture: Any = None,
        validation_fraction: Any = 0.1,
        random_state: Any = None,
        bounds: Any = None,
        settings: Any = None,
        verbose: Any = False,
    ):
        super().__init__(
            steps=steps,
            minutes=minutes,
            architecture=architecture,
            validation_fraction=validation_fraction,
            random_state=random_state,
            settings=settings,
            verbose=verbose,
        )
        self.bounds = bounds

    def fit(self, X: Any, y: Any = None) -> ResidualFlowDensity:
        """Trains on samples ``X``; ``y`` is ignored.

        Raises:
            ValueError: If there are fewer than 3 samples, or a feature has no density; it says which.
        """
        del y
        check_unmasked(X, "X")
        x: Any = validate_data(self, X, dtype=np.float64, ensure_min_samples=LEAST_SAMPLES)
        self._train(x)
        return self

    def score_samples(self, X: Any) -> np.ndarray:
        """Log-likelihood in nats of every sample, the same in whatever batch a sample stands.

        It is minus infinity where a feature has a value out of its range, or between the values of its grid, see `fit`.

        The log-determinant is exact up to 256 features. Beyond them its probes, like the noise of features on a grid, come from
        a hash of the sample.
        """
        x = self._checked(X)
        spec = self.model_.spec
        if spec.grid is None:
            return self._log_prob(x)
        impossible = spec.grid.off(x).any(axis=1)
        spacing = np.asarray(spec.grid.spacing)
        volume = np.log(spacing[spacing > 0]).sum()
        noise = _noise(x, NOISE_DRAWS)
        draws = [self._log_prob(x + (uniform - 0.5) * spacing, probes_of=x) for uniform in noise]  # or the sum had their noise
        found = scipy.special.logsumexp(draws, axis=0) - np.log(NOISE_DRAWS) + volume
        return np.where(impossible, -np.inf, found)

    def score(self, X: Any, y: Any = None) -> float:
        """Mean log-likelihood of the samples in nats, as that of `sklearn.mixture.GaussianMixture`; ``y`` is ignored."""
        del y
        return float(self.score_samples(X).mean())

    def sample(self, n_samples: int = 1, random_state: int | np.random.RandomState | None = None) -> np.ndarray:
        """Draws samples.

        Args:
            n_samples: Number of samples.
            random_state: Seed; None draws others at each call.

        Raises:
            ValueError: If ``n_samples`` is less than 1.
        """
        check_is_fitted(self)
        n_samples = checked(Count, n_samples, "n_samples")
        key = jax.random.key(int(check_random_state(random_state).randint(2**31 - 1)))
        model, size = _core(self.model_), _batch_size(self.model_.spec.flow.num_dims)
        parts, failed = [], 0
        for number in range(-(-n_samples // size)):
            y, converged = _sample(model, jax.random.fold_in(key, number), size)
            parts.append(np.asarray(y))
            failed += int(np.sum(~np.asarray(converged)[: n_samples - number * size]))
        if failed:
            warnings.warn(f"the inverse of {failed} of {n_samples} samples did not converge: they are not exact", stacklevel=2)
        x = _inverse(self.model_.spec.transform, np.concatenate(parts)[:n_samples].astype(np.float64))
        if (grid := self.model_.spec.grid) is not None:
            spacing, offset = np.asarray(grid.spacing), np.asarray(grid.offset)
            step = np.where(spacing > 0, spacing, 1)
            x = np.where(spacing > 0, offset + step * np.round((x - offset) / step), x)
        return x

    def _log_prob(self, x: np.ndarray, probes_of: np.ndarray | None = None) -> np.ndarray:
        """Log-density of points, those of the cells of a grid included."""
        y, log_det = _forward(self.model_.spec.transform, x)
        seeds = _bits(x if probes_of is None else probes_of, 1)[:, 0].astype(np.uint32)
        is_near = np.abs(y).max(axis=1) <= FARTHEST_DENSITY  # not for NaN, which values of 1e308 become here
        log_prob = _over_batches(_log_prob, _core(self.model_), np.where(is_near[:, None], y, 0), seeds)
        return np.where(is_near, log_prob + log_det, -np.inf)


class ResidualFlowClassifier(ClassifierMixin, _ResidualFlow):
    """A residual flow with a prior for every class, which classifies by Bayes' rule.

    The model is a density of samples and labels, trained for the labels' cross-entropy and, with a tenth of the weight, for the
    likelihood of the samples: ``model_.log_prob`` is low for samples that are like none of the classes. Constant features are
    ignored, and repeated values are spread over the gaps between them in training.

    Args:
        steps: Updates to train for.
        minutes: Longest wall-clock time for training instead of steps; 3 by default.
        architecture: Stages of the flow; by default they depend on the number of samples.
        validation_fraction: Share of the samples that chooses the best step, in (0, 1).
        random_state: Seed. Fits to data of one shape share their compiled programs.
        settings: Other settings by name, such as ``{"hybrid.weight": 1.0}``, see `runs.config.Config`.
        verbose: Whether to write lines of progress to stderr.

    Attributes:
        classes_: Labels of the classes, sorted.
        model_: The trained `Density` of the features in ``varying_features_``, whose class ``i`` is ``classes_[i]``.
        varying_features_: Places of the features that are not constant.
        history_: Measurements of the training, a `History`.
        n_features_in_: Number of features.
        feature_names_in_: Their names, if `fit` was given a data frame.

    Example:
        >>> flow = ResidualFlowClassifier(minutes=1, random_state=0).fit(x, labels)  # doctest: +SKIP
        >>> flow.predict_proba(x_new)  # doctest: +SKIP
    """

    def fit(self, X: Any, y: Any) -> ResidualFlowClassifier:
        """Trains on samples ``X`` with labels ``y`` of any type.

        Raises:
            ValueError: If there are fewer than 3 samples or 2 classes, or all features are constant.
        """
        check_unmasked(X, "X")
        checked: Any = validate_data(self, X, y, dtype=np.float64, ensure_min_samples=LEAST_SAMPLES)
        x, y = checked
        check_classification_targets(y)
        self.classes_, labels = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(
                f"a classifier needs samples of at least 2 classes, and all are of one class, {self.classes_[0]!r}"
            )
        self.varying_features_ = np.flatnonzero(x.max(axis=0) > x.min(axis=0))
        if not len(self.varying_features_):
            raise ValueError("all features are constant, so they tell nothing of the classes")
        self._train(_spread(x[:, self.varying_features_]), labels.astype(np.int32))
        return self

    def predict_log_proba(self, X: Any) -> np.ndarray:
        """Log-probability of every class of ``classes_``, one row per sample."""
        x = self._checked(X)[:, self.varying_features_]
        y = np.clip(_forward(self.model_.spec.transform, x)[0], -FARTHEST, FARTHEST)
        logits = _over_batches(_class_logits, _core(self.model_), y)
        return scipy.special.log_softmax(logits, axis=1)

    def predict_proba(self, X: Any) -> np.ndarray:
        """Probability of every class of ``classes_``, one row per sample."""
        return np.exp(self.predict_log_proba(X))

    def predict(self, X: Any) -> np.ndarray:
        """The most likely class of every sample."""
        best = self.predict_log_proba(X).argmax(axis=1)  # raises unless fitted
        return self.classes_[best]


# Preprocessing, in float64 --------------------------------------------------------------------------------------------


@np.errstate(over="ignore", invalid="ignore")
def _forward(transform: Any, x: np.ndarray) -> tuple[np.ndarray, Any]:
    """The preprocessed data and the log-determinants, the same for all of an affine map."""
    if isinstance(transform, Bounded):
        line, log_slopes = transform.to_line(x, np)
        y, log_det = _forward(transform.then, line)
        return y, log_slopes.sum(axis=1) + log_det
    if isinstance(transform, Whiten):
        factor = np.asarray(transform.factor)
        y = scipy.linalg.solve_triangular(factor, (x - transform.mean).T, lower=True).T
        return y, -float(np.log(np.diag(factor)).sum())
    if isinstance(transform, Standardize):
        return (x - transform.mean) / transform.scale, -float(np.log(transform.scale).sum())
    assert isinstance(transform, Identity)
    return x, 0.0


def _inverse(transform: Any, y: np.ndarray) -> np.ndarray:
    if isinstance(transform, Bounded):
        return transform.from_line(_inverse(transform.then, y), np)[0]
    if isinstance(transform, Whiten):
        return transform.mean + y @ np.asarray(transform.factor).T
    return transform.mean + y * transform.scale if isinstance(transform, Standardize) else y


def _spread(x: np.ndarray) -> np.ndarray:
    """The data with uniform noise, of the median gap between values, in columns that repeat their values.

    A density of repeated values would grow without bound, which a classifier need not bother its user with.
    """
    spread, noise = np.array(x), np.random.default_rng(0).uniform(-0.5, 0.5, x.shape)
    for column, values in enumerate(x.T):
        distinct = np.unique(values)
        if len(values) >= REPEATS * len(distinct):
            spread[:, column] += noise[:, column] * np.median(np.diff(distinct))
    return spread


def _noise(x: np.ndarray, draws: int) -> np.ndarray:
    """Uniform numbers in [0, 1) of shape ``(draws, n, d)``; equal samples have equal ones, wherever they stand."""
    bits = _bits(x, draws * x.shape[1]).reshape(len(x), draws, -1)
    return (bits >> np.uint64(11)).swapaxes(0, 1) * 2.0**-53


def _bits(x: np.ndarray, num: int) -> np.ndarray:
    """Random numbers of 64 bits, ``num`` for each sample, from a hash of the sample alone."""
    rows = np.ascontiguousarray(x + 0.0)  # -0 becomes 0
    return np.stack([np.frombuffer(hashlib.shake_128(row.tobytes()).digest(8 * num), np.uint64) for row in rows])


# Compiled programs ----------------------------------------------------------------------------------------------------


def _core(model: Density) -> Density:
    """The model after its preprocessing, whose spec holds no constants of the data: fits of one shape share programs.

    The log-determinant of more than `EXACT_DIMS` dimensions is that of a Krylov space of 20 dimensions for each of 4 probes.
    """
    spec = dataclasses.replace(model.spec, transform=Identity(), grid=None)
    core = model.with_(spec=spec, history=None)
    return core if spec.flow.num_dims <= EXACT_DIMS else core.with_(estimator=KrylovLogdet(20, num_probes=4))


def _batch_size(num_dims: int) -> int:
    """Samples of a batch, a multiple of 16. The number of samples does not matter: other shapes would be rounded otherwise."""
    return 16 * max(1, min(16, 256 // num_dims))


def _over_batches(program: Callable[..., Any], model: Density, *arrays: np.ndarray) -> np.ndarray:
    """Results of a program for all samples, by batches of one size, in float64."""
    size, results = _batch_size(arrays[0].shape[1]), []
    for start in range(0, len(arrays[0]), size):
        parts = [array[start : start + size] for array in arrays]
        missing = size - len(parts[0])
        padded = [np.pad(part, [(0, missing)] + [(0, 0)] * (part.ndim - 1)) for part in parts]
        results.append(np.asarray(program(model, *padded))[: len(parts[0])])
    return np.concatenate(results).astype(np.float64)


@fast_compile
def _log_prob(model: Density, y: Any, seeds: Any) -> jax.Array:
    return model.log_prob(y.astype(jnp.float32), jax.vmap(jax.random.key)(seeds))


@fast_compile
def _class_logits(model: Density, y: Any) -> jax.Array:
    return model.log_prior_by_class(model.encode(y.astype(jnp.float32)))


@functools.partial(fast_compile, static_argnums=(2,))
def _sample(model: Density, key: jax.Array, num: int) -> tuple[jax.Array, jax.Array]:
    y, info = model.sample(key, num)
    return y, info.converged
