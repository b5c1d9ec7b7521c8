"""scikit-learn estimators: a density and a classifier of vectors, for pipelines and searches over
parameters.

They wrap `fitting.fit` and need ``pip install 'iresnet_jax[sklearn]'``. Samples are scored in
batches of one size, so that a score does not depend on the other samples.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special
from sklearn.base import BaseEstimator, ClassifierMixin, DensityMixin
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data

from iresnet_jax.arguments import Count, check_unmasked, checked
from iresnet_jax.fitting import fit
from iresnet_jax.maths.keys import keys_of_examples
from iresnet_jax.models.density import Density
from iresnet_jax.training.signals import interrupts_raised

BATCH_SIZE = 256
NUM_DRAWS = 16  # of noise, whose mean a score is


class _ResidualFlow(BaseEstimator):
    """Parameters and training of both estimators."""

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
        # scikit-learn wants parameters stored as they are, and checked by `fit`.
        self.steps = steps
        self.minutes = minutes
        self.architecture = architecture
        self.validation_fraction = validation_fraction
        self.random_state = random_state
        self.bounds = bounds
        self.settings = settings
        self.verbose = verbose

    def _train(self, x: Any, labels: np.ndarray | None = None) -> None:
        """Sets ``model_``."""
        options = {
            name: getattr(self, name)
            for name in ("steps", "minutes", "architecture", "validation_fraction", "bounds")
        }
        key = jax.random.key(int(check_random_state(self.random_state).randint(2**31 - 1)))
        # Ctrl-C ends a search instead of starting the next fold.
        with interrupts_raised():
            self.model_ = fit(
                x, labels, key=key, progress=bool(self.verbose), **options, **(self.settings or {})
            )

    def _checked(self, X: Any) -> np.ndarray:
        check_is_fitted(self)
        check_unmasked(X, "X")
        x: Any = validate_data(self, X, dtype=np.float64, reset=False)
        return x


class ResidualFlowDensity(DensityMixin, _ResidualFlow):
    """A residual flow as a density estimator.

    `score_samples` and `score` are as in `sklearn.mixture.GaussianMixture`; `sample` returns only
    the samples.

    Features of whole or rounded numbers have masses, see `iresnet_jax.bijections.marginals`:
    `score_samples` is then a lower bound of their log-probability by their unit, finite for all
    values. No sample leaves the bounds of a feature, and
    `score_samples` is minus infinity outside of them.

    Args:
        steps: Updates to train for.
        minutes: Longest wall-clock time for training instead of steps; 3 by default.
        architecture: Stages of the flow; by default they depend on the number of samples.
        validation_fraction: Share of the samples that chooses the best step, in (0, 1).
        random_state: Seed.
        bounds: Ends ``(low, high)`` of features by name or number, None for no end.
        settings: Further arguments of `iresnet_jax.fit`, such as ``{"learning_rate": 1e-3}``.
        verbose: Whether to write lines of progress to stderr.

    Attributes:
        model_: The trained `Density`; ``model_.history`` has the measurements of the training.
        n_features_in_: Number of features.
        feature_names_in_: Their names, if `fit` was given a data frame.

    Example:
        >>> flow = ResidualFlowDensity(minutes=1, random_state=0).fit(x)  # doctest: +SKIP
        >>> flow.score_samples(x_new)  # doctest: +SKIP
    """

    def fit(self, X: Any, y: Any = None) -> ResidualFlowDensity:
        """Trains on samples ``X``; ``y`` is ignored."""
        del y
        check_unmasked(X, "X")
        # Two samples to train on and one to validate.
        x: Any = validate_data(self, X, dtype=np.float64, ensure_min_samples=3)
        names = getattr(self, "feature_names_in_", None)
        if names is not None:  # bounds and messages use the names
            import pandas as pd

            x = pd.DataFrame(x, columns=names)
        self._train(x)
        return self

    def score_samples(self, X: Any) -> np.ndarray:
        """Log-likelihood of every sample in nats, the mean of ``model_.log_prob`` over 16 draws of
        noise.

        It is minus infinity if a feature's value is out of its bounds, or so far from the training
        samples that single precision overflows.
        """
        return np.nan_to_num(
            _in_batches(_log_prob, self.model_, self._checked(X)), nan=-np.inf, neginf=-np.inf
        )

    def score(self, X: Any, y: Any = None) -> float:
        """Mean log-likelihood of the samples in nats, as in `sklearn.mixture.GaussianMixture`;
        ``y`` is ignored.
        """
        del y
        return float(self.score_samples(X).mean())

    def sample(
        self, n_samples: int = 1, random_state: int | np.random.RandomState | None = None
    ) -> np.ndarray:
        """Draws samples.

        Args:
            n_samples: Number of samples.
            random_state: Seed; None draws new samples at each call.
        """
        check_is_fitted(self)
        n_samples = checked(Count, n_samples, "n_samples")
        key = jax.random.key(int(check_random_state(random_state).randint(2**31 - 1)))
        x, info = self.model_.sample(key, n_samples)
        if failed := int(np.sum(~np.asarray(info.converged))):
            warnings.warn(
                f"the inverse of {failed} of {n_samples} samples did not converge: they "
                "are not exact",
                stacklevel=2,
            )
        return np.asarray(x, np.float64)


class ResidualFlowClassifier(ClassifierMixin, _ResidualFlow):
    """A residual flow with a prior for every class, which classifies by Bayes' rule.

    The model is a density of samples and labels, trained for the labels' cross-entropy and, with a
    tenth of the weight, for the likelihood of the samples: ``model_.log_prob`` is low for samples
    unlike all classes. Constant features are ignored. It has the parameters of
    `ResidualFlowDensity`, and ``bounds`` must be None.

    Attributes:
        classes_: Labels of the classes, sorted.
        model_: The trained `Density` of the features in ``varying_features_``, whose class ``i`` is
            ``classes_[i]``.
        varying_features_: Places of the features that are not constant.
        n_features_in_: Number of features.
        feature_names_in_: Their names, if `fit` was given a data frame.

    Example:
        >>> flow = ResidualFlowClassifier(minutes=1)
        >>> flow = flow.fit(x, labels)  # doctest: +SKIP
        >>> flow.predict_proba(x_new)  # doctest: +SKIP
    """

    def fit(self, X: Any, y: Any) -> ResidualFlowClassifier:
        """Trains on samples ``X`` with labels ``y`` of any type."""
        check_unmasked(X, "X")
        both: Any = validate_data(self, X, y, dtype=np.float64, ensure_min_samples=3)
        x, y = both
        check_classification_targets(y)
        self.classes_, labels = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(
                "a classifier needs samples of at least 2 classes, and all are of one class, "
                f"{self.classes_[0]!r}"
            )
        self.varying_features_ = np.flatnonzero(x.max(axis=0) > x.min(axis=0))
        self._train(x[:, self.varying_features_], labels.astype(np.int32))
        return self

    def predict_log_proba(self, X: Any) -> np.ndarray:
        """Log-probability of every class of ``classes_``, one row per sample.

        Raises:
            ValueError: If a sample is so far from the training samples that single precision
                overflows.
        """
        x = self._checked(X)[:, self.varying_features_]
        found = _in_batches(_class_log_probs, self.model_, x)
        if len(rows := np.flatnonzero(np.isnan(found).any(axis=1))):
            raise ValueError(
                f"sample {rows[0]} is so far from the training samples that its classes have no "
                "probabilities"
            )
        return scipy.special.log_softmax(found, axis=1)  # sums are 1 in float64

    def predict_proba(self, X: Any) -> np.ndarray:
        """Probability of every class of ``classes_``, one row per sample."""
        return np.exp(self.predict_log_proba(X))

    def predict(self, X: Any) -> np.ndarray:
        """The most likely class of every sample."""
        best = self.predict_log_proba(X).argmax(axis=1)  # raises unless fitted
        return self.classes_[best]


@jax.jit
def _log_prob(model: Density, x: jax.Array) -> jax.Array:
    if not model.spec.is_discrete:
        return model.log_prob(x)
    keys = keys_of_examples(x)  # so that equal samples have equal scores
    draw = jax.vmap(jax.random.fold_in, (0, None))
    return jax.lax.map(lambda i: model.log_prob(x, draw(keys, i)), jnp.arange(NUM_DRAWS)).mean(0)


@jax.jit
def _class_log_probs(model: Density, x: jax.Array) -> jax.Array:
    return model.class_log_probs(x)


def _in_batches(
    function: Callable[[Density, Any], Any], model: Density, x: np.ndarray
) -> np.ndarray:
    """Results of a compiled function for all samples, in batches of one size: rounding depends on
    the size.
    """
    with np.errstate(over="ignore"):
        x = x.astype(jnp.result_type(float))
    batches = np.pad(x, [(0, -len(x) % BATCH_SIZE), (0, 0)], mode="edge").reshape(
        -1, BATCH_SIZE, x.shape[1]
    )
    return np.concatenate([np.asarray(function(model, batch), np.float64) for batch in batches])[
        : len(x)
    ]
