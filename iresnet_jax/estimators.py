"""scikit-learn estimators: a density, a classifier and a detector of anomalies among vectors, for
pipelines and searches over parameters.

They wrap `fitting.fit` and need ``pip install 'iresnet_jax[sklearn]'``. Samples are scored in
batches of one size, so that a score does not depend on the other samples.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special
import scipy.stats
from sklearn.base import BaseEstimator, ClassifierMixin, DensityMixin, OutlierMixin
from sklearn.preprocessing import StandardScaler
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data

from iresnet_jax.arguments import Count, Range, check_unmasked, checked
from iresnet_jax.data.arrays import FEWEST
from iresnet_jax.data.tables import values_of
from iresnet_jax.evaluation import plots
from iresnet_jax.fitting import fit
from iresnet_jax.maths.keys import keys_of_examples
from iresnet_jax.models.columns import columns_of, numbers_of
from iresnet_jax.models.density import Density
from iresnet_jax.training.signals import interrupts_raised

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BATCH_SIZE = 256
NUM_DRAWS = 16  # of noise, whose mean a score is
LOWEST_SCORE = float(np.finfo(np.float32).min)  # where single precision has no density
NUM_QUANTILES = 64  # values of each column that stand for its distribution
MOST_NAMED = 3  # columns in the line that explains a row
ALLOWED = {"calibration_fraction": "(0, 1)", "contamination": "(0, .5]", "noise": "[0, inf)"}


# scikit-learn wants parameters stored as they are, and checked by `fit`.
@dataclass(kw_only=True, eq=False, repr=False)
class _ResidualFlow(BaseEstimator):
    """Parameters and training of all estimators."""

    steps: Any = None
    minutes: Any = None
    architecture: Any = None
    validation_fraction: Any = 0.1
    random_state: Any = None
    settings: Any = None
    verbose: Any = False

    def _train(self, x: Any, labels: np.ndarray | None = None, **options: Any) -> None:
        """Sets ``model_``."""
        # Ctrl-C ends a search instead of starting the next fold.
        with interrupts_raised():
            self.model_ = fit(
                x,
                labels,
                key=_key(self.random_state),
                steps=self.steps,
                minutes=self.minutes,
                architecture=self.architecture,
                validation_fraction=self.validation_fraction,
                progress=bool(self.verbose),
                **options,
                **(self.settings or {}),
            )

    def _validated(self, X: Any, *y: Any, **options: Any) -> Any:
        """Samples, and labels if they are given, as arrays."""
        check_unmasked(X, "X")
        return validate_data(self, X, *y, dtype=np.float64, **options)


@dataclass(kw_only=True, eq=False, repr=False)
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

    bounds: Any = None

    def fit(self, X: Any, y: Any = None) -> ResidualFlowDensity:
        """Trains on samples ``X``; ``y`` is ignored."""
        del y
        # Two samples to train on and one to validate.
        x = self._validated(X, ensure_min_samples=3)
        names = getattr(self, "feature_names_in_", None)
        if names is not None:  # bounds and messages use the names
            import pandas as pd

            x = pd.DataFrame(x, columns=names)
        self._train(x, bounds=self.bounds)
        return self

    def score_samples(self, X: Any) -> np.ndarray:
        """Log-likelihood of every sample in nats, the mean of ``model_.log_prob`` over 16 draws of
        noise.

        It is minus infinity if a feature's value is out of its bounds, or so far from the training
        samples that single precision overflows.
        """
        check_is_fitted(self)
        x = self._validated(X, reset=False)
        return np.nan_to_num(_in_batches(_log_prob, self.model_, x), nan=-np.inf, neginf=-np.inf)

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
        x, info = self.model_.sample(_key(random_state), n_samples)
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
    `ResidualFlowDensity` but ``bounds``.

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
        x, y = self._validated(X, y, ensure_min_samples=3)
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
        check_is_fitted(self)
        x = self._validated(X, reset=False)[:, self.varying_features_]
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


class Explanation(NamedTuple):
    """What makes rows unlikely.

    Attributes:
        names: Names of the columns.
        values: Entries of the rows, ``(n, d)``.
        p_values: p-value of each row.
        gains: Nats by which each row would be likelier with another value of a column, ``(n, d)``:
            the logarithm of the row's mean density when the column is drawn anew from its own
            distribution, minus the logarithm of the row's density.
    """

    names: tuple[str, ...]
    values: np.ndarray
    p_values: np.ndarray
    gains: np.ndarray

    @property
    def rows(self) -> list[str]:
        """Number and p-value of each row."""
        return [f"row {row}, p = {p_value:.2g}" for row, p_value in enumerate(self.p_values)]

    def __str__(self) -> str:
        """A line for each row, with at most three columns that gain a nat or more."""
        lines = []
        for row, values, gains in zip(self.rows, self.values, self.gains, strict=True):
            best = [i for i in np.argsort(-gains)[:MOST_NAMED] if gains[i] >= 1]
            found = [f"{self.names[i]} = {values[i]} ({gains[i]:.1f} nats)" for i in best]
            lines.append(f"{row}: {', '.join(found) or 'no single column'}")
        return "\n".join(lines)

    def plot(self) -> Figure:
        """Gains of the columns in colour, a line for each row."""
        return plots.gains(self.gains, self.rows, self.names)


@dataclass(kw_only=True, eq=False, repr=False)
class ResidualFlowDetector(OutlierMixin, _ResidualFlow):
    """A residual flow that tells which rows are anomalies, with guaranteed rates of false alarms.

    Rows are arrays, or data frames with text, booleans and categories. Values that no row of `fit`
    has are rare, also unknown categories and values beyond all others, and have a finite score.

    The model is the density of standardised rows with a little normal noise, and a score is its
    value at a row without noise. Without noise a frequent value has a mass where others have a
    density, and rows of frequent values would be likelier than all others.

    `fit` holds out rows for calibration, which neither train, choose the start, nor validate.
    `p_values` compares with their scores: for fresh rows from the distribution of `fit`'s rows,
    ``P(p <= alpha) <= alpha`` for any ``alpha``, on average over the rows that calibrate, however
    good the model is (Bates et al. 2023, "Testing for outliers with conformal p-values").

    Args:
        steps: Updates to train for.
        minutes: Longest wall-clock time for training.
        architecture: Stages of the flow.
        validation_fraction: Share of the training rows that validates.
        calibration_fraction: Share of all rows that calibrates, in (0, 1), though ten rows always
            train: with ``m`` rows the smallest p-value is ``1 / (m + 1)``.
        contamination: Share of the rows of `fit` that `predict` takes for anomalies without
            ``alpha``, in (0, .5].
        noise: Standard deviation of the noise on training rows, in units of each column's.
        random_state: Seed.
        settings: Further arguments of `iresnet_jax.fit`.
        verbose: Whether to write lines of progress to stderr.

    Attributes:
        model_: The trained `Density`, of standardised rows.
        scaler_: The `StandardScaler`, fitted to the rows that train.
        offset_: Score below which `predict` takes rows for anomalies without ``alpha``.
        calibration_scores_: Scores of the rows that calibrate, rising.
        grids_: Two neighbours of the grid of each column, ``(d, 2)``; the second is infinite
            without a grid.
        columns_: Columns of the data frame; None of arrays.
        quantiles_: Values that stand for the distribution of each column, ``(64, d)``.
        n_features_in_: Number of features.
        feature_names_in_: Their names, if `fit` was given a data frame.

    Example:
        >>> detector = ResidualFlowDetector(minutes=1).fit(frame)  # doctest: +SKIP
        >>> detector.predict(new, alpha=0.01)  # -1 of 1 in 100 normal rows  # doctest: +SKIP
        >>> print(detector.explain(new[:5]))  # doctest: +SKIP
    """

    calibration_fraction: Any = 0.2
    contamination: Any = 0.1
    noise: Any = 0.05

    def fit(self, X: Any, y: Any = None) -> ResidualFlowDetector:
        """Trains on the rows of ``X`` that do not calibrate; ``y`` is ignored."""
        del y
        for name, allowed in ALLOWED.items():
            checked(Annotated[float, Range(allowed)], getattr(self, name), name)
        x, random = self._rows(X, reset=True), check_random_state(self.random_state)
        num = max(min(round(self.calibration_fraction * len(x)), len(x) - FEWEST), 0)
        calibrate, train = np.split(random.permutation(len(x)), [num])
        self.columns_ = None
        if hasattr(x, "iloc"):
            columns_of(x)  # says in which of all rows values are missing
            self.columns_ = columns_of(x.iloc[train])
        x = self._numbers(x)
        self.scaler_ = StandardScaler().fit(x[train])
        rows: Any = self.scaler_.transform(x[train])
        self._train(rows + self.noise * random.normal(size=rows.shape))
        values = [values_of(column, 2.0**-20) for column in x[train].T]
        self.grids_ = np.array([each if len(each) == 2 else (0, np.inf) for each in values])
        at = (np.arange(NUM_QUANTILES) + 0.5) / NUM_QUANTILES
        self.quantiles_ = np.quantile(x[train], at, axis=0, method="inverted_cdf")
        scores = self._scores(x)
        self.calibration_scores_ = np.sort(scores[calibrate])
        self.offset_ = float(np.quantile(scores, self.contamination))
        return self

    def score_samples(self, X: Any) -> np.ndarray:
        """Log-likelihood of every standardised row in nats; it is always finite."""
        check_is_fitted(self)
        return self._scores(self._numbers(self._rows(X)))

    def decision_function(self, X: Any) -> np.ndarray:
        """`score_samples` minus ``offset_``: negative for anomalies."""
        return self.score_samples(X) - self.offset_

    def p_values(self, X: Any) -> np.ndarray:
        """Conformal p-value of every row: the share of calibration rows, itself included, whose
        score is not higher.
        """
        return self._p_values(self.score_samples(X))

    def predict(self, X: Any, *, alpha: float | None = None) -> np.ndarray:
        """-1 for anomalies and 1 for others.

        Args:
            X: Rows.
            alpha: Share of normal rows that may be taken for anomalies; None goes by
                ``contamination``.
        """
        if alpha is None:
            return np.where(self.decision_function(X) < 0, -1, 1)
        return np.where(self.p_values(X) <= alpha, -1, 1)

    def discoveries(self, X: Any, alpha: float) -> np.ndarray:
        """Whether each row is an anomaly, such that at most the share ``alpha`` of those found is
        normal, on average, by the procedure of Benjamini and Hochberg (1995).
        """
        return scipy.stats.false_discovery_control(self.p_values(X)) <= alpha

    def explain(self, X: Any) -> Explanation:
        """Which columns make each row unlikely; `print` it, or ``plot()`` it.

        It computes the density of 64 rows for each entry, so give it the rows that matter.
        """
        check_is_fitted(self)
        rows = self._rows(X)
        x = self._numbers(rows)
        scores, gains = self._scores(x), np.empty(x.shape)
        for row, own in enumerate(x):
            drawn = np.where(np.eye(len(own), dtype=bool)[:, None], self.quantiles_, own)
            found = self._scores(drawn.reshape(-1, len(own))).reshape(len(own), -1)
            gains[row] = scipy.special.logsumexp(found, axis=1) - np.log(NUM_QUANTILES)
        gains -= scores[:, None]
        columns = self.columns_
        names = [column.name for column in columns] if columns else range(x.shape[1])
        values = np.asarray(rows[list(names)], object) if hasattr(rows, "columns") else x
        return Explanation(tuple(map(str, names)), values, self._p_values(scores), gains)

    def _rows(self, X: Any, *, reset: bool = False) -> Any:
        """Rows as a data frame of pandas or as an array."""
        if not hasattr(X, "columns") or (not reset and self.columns_ is None):
            return self._validated(X, ensure_min_samples=3 if reset else 1, reset=reset)
        validate_data(self, X, reset=reset, skip_check_array=True)
        return X.to_pandas() if hasattr(X, "to_pandas") else X

    def _numbers(self, rows: Any) -> np.ndarray:
        """Booleans and categories by their places, and unknown ones off this grid."""
        if self.columns_ is None or not hasattr(rows, "columns"):
            return rows
        x = numbers_of(rows, self.columns_)
        is_level = np.array([column.categories is not None for column in self.columns_])
        return np.where(is_level & (x < 0), -0.5, x)

    def _scores(self, x: np.ndarray) -> np.ndarray:
        """Log-likelihoods; where a column is on a grid, other numbers are as rare as one of all
        rows.
        """
        origin, following = self.grids_.T
        places = (x - origin) / (following - origin)
        rounding = 2.0**-4 + 2.0**-20 * np.abs(x / (following - origin))
        num_off = np.sum(np.abs(places - np.rint(places)) > rounding, axis=1)
        standardised: Any = self.scaler_.transform(x)
        found = _in_batches(_log_prob, self.model_, standardised)
        found -= num_off * np.log(self.scaler_.n_samples_seen_ + 1)
        return np.nan_to_num(found, nan=LOWEST_SCORE, neginf=LOWEST_SCORE)

    def _p_values(self, scores: np.ndarray) -> np.ndarray:
        not_higher = np.searchsorted(self.calibration_scores_, scores, side="right")
        return (1 + not_higher) / (len(self.calibration_scores_) + 1)


def _key(random_state: Any) -> jax.Array:
    """A key from what scikit-learn takes as a seed."""
    return jax.random.key(int(check_random_state(random_state).randint(2**31 - 1)))


@jax.jit
def _log_prob(model: Density, x: jax.Array) -> jax.Array:
    if not model.spec.is_discrete:
        return model.log_prob(x)
    keys = keys_of_examples(x)  # so that equal samples have equal scores
    draw = jax.vmap(jax.random.fold_in, (0, None))
    return jax.lax.map(lambda i: model.log_prob(x, draw(keys, i)), jnp.arange(NUM_DRAWS)).mean(0)


_class_log_probs = jax.jit(Density.class_log_probs)


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
