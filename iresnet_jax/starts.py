"""Where the training of a density of vectors starts: preprocessing and a prior, without blocks.

Some starts keep columns on lines, whitened: a normal and a logistic distribution, a mixture,
scales, a kernel density. Others map each column to normal scores, see
`iresnet_jax.bijections.marginals`: independent ones, a normal distribution, a mixture. Rows that a
start was not fitted to say which is likeliest. NumPy computes all of it, in float64.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import scipy.linalg
import scipy.stats
from jaxtyping import Float
from scipy.special import logsumexp

from iresnet_jax.bijections.marginals import Marginals, before
from iresnet_jax.bijections.standardize import Standardize, Whiten, shrunk_covariance
from iresnet_jax.data.dataset import DataSet
from iresnet_jax.data.tables import choose, fit_lines, fit_marginals
from iresnet_jax.models.architecture import FlowSpec
from iresnet_jax.models.contexts import ContextScale, linear_regression, scaled
from iresnet_jax.models.density import Density
from iresnet_jax.models.density_spec import DensitySpec
from iresnet_jax.models.mixtures import (
    GaussianMixture,
    ScaleMixture,
    fit_mixture,
    full,
    likeliest_size,
)
from iresnet_jax.models.priors import LOCATION_SCALE

NUM_FOLDS, MOST_ROWS, MOST_FITTED = 5, 2000, 10_000  # rows of cross-validation and of fits
NUM_SCALES = 16
WHITENED_DIMS = 1000  # most dimensions to whiten: the model stores a matrix of their square
MIXTURE_DIMS = 64  # most dimensions of a mixture, whose components each have a matrix
# Most numbers in the matrices of a kernel density, which has a component for each row, and of
# normal scores.
MOST_NUMBERS = 500_000

Rows = Float[np.ndarray, "_ d"]


def placed(
    marginals: Marginals | None, x: Rows, noise: Rows | float
) -> tuple[Rows, Float[np.ndarray, " _"]]:
    """Rows on lines or as scores by noise in [0, 1), and the log-determinants."""
    if marginals is None:
        return x, np.zeros(len(x))
    u, log_det = marginals.placed(x, noise, np)
    return u, log_det.sum(axis=1)


class Start(NamedTuple):
    """A density before training.

    Attributes:
        name: What it is, for lines of progress.
        marginals: Columns on lines, or their scores; None of continuous ones as they are.
        then: The affine map behind them.
        family: Family of the prior.
        prior: The prior.
    """

    name: str
    marginals: Marginals | None
    then: Standardize | Whiten
    family: str
    prior: Any

    def spec(self, flow: FlowSpec, columns: Any = None) -> DensitySpec:
        """The density of a flow between preprocessing and prior."""
        cells, transform = before(self.marginals, self.then)
        return DensitySpec(
            flow,
            self.family,
            transform,
            cells=cells,
            columns=columns,
            num_components=getattr(self.prior, "num_components", None),
        )

    def model(self, data: DataSet) -> Density:
        """The density without a network."""
        return Density(self.spec(FlowSpec(data.event_shape, ()), data.columns), {}, self.prior)


KERNELS = "kernel density"
# Of a name, whether columns are scores; and the family of the prior.
STARTS = {
    "normal distribution": (False, "gaussian"),
    "logistic distribution": (False, "logistic"),
    "mixture": (False, "mixture"),
    "scales": (False, "scales"),
    KERNELS: (False, "kernels"),
    "independent scores": (True, "gaussian"),
    "normal scores": (True, "mixture"),
    "mixture of scores": (True, "mixture"),
}
# Starts of one component.
SINGLE = ("normal distribution", "logistic distribution", "normal scores")


class Starts:
    """The starts of a density.

    Args:
        data: Vectors whose columns are described.
        most_rows: Most rows of the cross-validation.

    Attributes:
        scores: Mean log-likelihood of each start on rows that it was not fitted to.
    """

    def __init__(self, data: DataSet, most_rows: int = MOST_ROWS):
        self.data, x = data, _some(data.examples["train"], MOST_FITTED)
        self.choices, self.sizes = choose(x, data.kinds), {}
        rows, (num, dims) = _some(x, most_rows), x.shape
        names = list(STARTS)
        if not any(kind.is_line for kind in data.kinds):
            names = [name for name in names if STARTS[name][0]]
        if num * dims**2 > MOST_NUMBERS:
            names = [name for name in names if name != KERNELS]
        if dims > MIXTURE_DIMS:
            names = [name for name in names if not name.startswith("mixture")]
        if 2 * dims**2 > MOST_NUMBERS:
            names = [name for name in names if name != "normal scores"]
        for name in names:
            if name.startswith("mixture"):
                self.sizes[name] = likeliest_size(self._placed(name, rows, {})[2])
        found: dict[str, list[Any]] = {name: [] for name in names}
        for fold in range(NUM_FOLDS):
            is_test, known = np.arange(len(rows)) % NUM_FOLDS == fold, {}
            for name, parts in found.items():
                parts.append(self._held_out(name, rows[~is_test], rows[is_test], known))
        self.scores = {name: float(np.concatenate(each).mean()) for name, each in found.items()}

    @property
    def names(self) -> list[str]:
        """Names of the starts, the likeliest first."""
        return sorted(self.scores, key=lambda name: -self.scores[name])

    @property
    def to_train(self) -> list[str]:
        """Names of two starts to train from: the likeliest, and the likeliest of one component with
        the same columns, on lines or as scores; the second likeliest where the first has one.

        A network shapes one component more easily than a mixture, which starts ahead and is
        soon overtaken. Nothing is trained from a kernel density.
        """
        first, *others = [name for name in self.names if name != KERNELS]
        alike = [name for name in others if STARTS[name][0] == STARTS[first][0] and name in SINGLE]
        return [first, *(others if first in SINGLE else [*alike, *others])[:1]]

    def fit(self, name: str, *, with_validation: bool = False) -> Start:
        """A start, fitted to the training rows, or to those that validate, too."""
        x = self.data.examples["train"]
        x = np.concatenate([x, self.data.examples["validation"]]) if with_validation else x
        marginals, then, z = self._placed(name, _some(x, MOST_FITTED), {})
        family, prior, _ = self._prior(name, z)
        return Start(name, marginals, then, family, prior)

    def losses(self, num: int, seed: int) -> Float[np.ndarray, " _"]:
        """Negative log-density of the held-out rows that validate, under the likeliest start."""
        train = _some(self.data.examples["train"], MOST_FITTED)
        test = np.asarray(self.data.held_out("validation", num, seed).x, np.float64)
        has_masses = any(len(kind.values) or len(kind.atoms) for kind in self.data.kinds)
        return -self._held_out(self.names[0], train, test, {}, draws=16 if has_masses else 1)

    def _held_out(
        self, name: str, train: Rows, test: Rows, known: dict[Any, Any], draws: int = 2
    ) -> Any:
        """Log-densities of rows under a start that is fitted to others, the mean of some draws."""
        marginals, then, z = self._placed(name, train, known)
        log_prob = self._prior(name, z)[2]
        found = []
        for seed in range(draws):
            u, log_det = placed(marginals, test, np.random.default_rng(seed).random(test.shape))
            z, of_transform = _affine(then, u)
            found.append(log_prob(z) + log_det + of_transform)
        return np.mean(found, axis=0)

    def _placed(self, name: str, x: Rows, known: dict[Any, Any]) -> tuple[Any, Any, Rows]:
        """The marginals of a start, the affine map behind them, and where rows lie; ``known``
        keeps the marginals of these rows.
        """
        are_scores, dims = STARTS[name][0], x.shape[1]
        if are_scores not in known:
            fit = fit_marginals if are_scores else fit_lines
            marginals = fit(x, self.data.kinds, self.choices)
            noise = np.random.default_rng(1).random(x.shape)
            known[are_scores] = marginals, placed(marginals, x, noise)[0]
        marginals, u = known[are_scores]
        if dims > WHITENED_DIMS:
            then = Standardize.fit(u)
        else:
            then = Whiten(np.zeros(dims), np.eye(dims)) if are_scores else Whiten.fit(u)
        return marginals, then, _affine(then, u)[0]

    def _prior(self, name: str, z: Rows) -> tuple[str, Any, Callable[[Rows], Any]]:
        """Family of a start's prior, the prior fitted to latents, and its log-density by NumPy."""
        family, dims = STARTS[name][1], z.shape[1]
        if family == "kernels":
            prior = GaussianMixture.kernels(z)
            return "mixture", prior, lambda z: _log_kernels(prior, z)
        if family == "mixture" and STARTS[name][0]:
            if name in self.sizes:
                found = fit_mixture(z, *self.sizes[name])
                weights, means, covariances = found.weights_, found.means_, full(found)
            else:
                means = z.mean(axis=0)[None]
                weights, covariances = np.ones(1), shrunk_covariance(z - means)[None]
            # Where all else is unlikely, rows are as likely as with independent columns, nearly.
            share = 1 / (len(z) + 1)
            parts = (
                np.append(weights * (1 - share), share),
                np.concatenate([means, np.zeros((1, dims))]),
                np.concatenate([covariances, np.eye(dims)[None]]),
            )
            prior = GaussianMixture.of(*parts)
            return "mixture", prior, lambda z: _log_mixture(*parts, z)
        if family == "mixture":
            found = fit_mixture(z, *self.sizes[name])
            return (
                "mixture",
                GaussianMixture.of(found.weights_, found.means_, full(found)),
                found.score_samples,
            )
        if family == "scales":
            prior = ScaleMixture.fit(z, NUM_SCALES)
            return family, prior, lambda z: _log_scales(prior, z)
        prior = LOCATION_SCALE[family].of_moments(np.zeros(dims), np.ones(dims))
        unit: Any = scipy.stats.norm if family == "gaussian" else LOGISTIC
        return family, prior, lambda z: unit.logpdf(z).sum(axis=1)


def with_likelier_columns(data: DataSet) -> DataSet:
    """Data with contexts or classes, with normal scores in place of lines if linear models do
    better on them: the regression of the examples on contexts, or that of classes on examples.
    """
    from sklearn.linear_model import LogisticRegression  # late: a second
    from sklearn.model_selection import cross_val_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if data.labels and np.bincount(data.labels["train"]).min() < NUM_FOLDS:
        return data
    rows = np.random.default_rng(0).permutation(len(data.examples["train"]))[:MOST_ROWS]
    x = np.asarray(data.examples["train"][rows], np.float64)
    choices = choose(x, data.kinds)
    spaces = {"line": data.marginals, "scores": fit_marginals(x, data.kinds, choices)}
    found = {}
    for name, marginals in spaces.items():
        if data.contexts:
            context = np.asarray(data.contexts["train"][rows], float)
            c = np.asarray(scaled(ContextScale.fit(context), jnp.asarray(context)))
            u, log_det = placed(marginals, x, np.random.default_rng(1).random(x.shape))
            centred = u - u.mean(axis=0)
            residuals = centred - c @ linear_regression(c, centred)
            z, of_whiten = _affine(Whiten.fit(u, residuals), residuals + u.mean(axis=0))
            found[name] = np.mean(scipy.stats.norm.logpdf(z).sum(axis=1) + log_det) + of_whiten
        else:
            u, _ = placed(marginals, x, 0.5)
            model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=300))
            labels = data.labels["train"][rows]
            found[name] = cross_val_score(model, u, labels, scoring="neg_log_loss").mean()
    if not found["scores"] > found["line"]:
        return data
    rows = _some(data.examples["train"], MOST_FITTED)
    return replace(data, marginals=fit_marginals(rows, data.kinds, choices))


LOGISTIC = scipy.stats.logistic(0, math.sqrt(3) / math.pi)


def _some(x: Rows, most: int) -> Rows:
    return np.random.default_rng(0).permutation(np.asarray(x, np.float64))[:most]


def _affine(then: Standardize | Whiten, u: Rows) -> tuple[Rows, float]:
    """An affine transform by NumPy, and its log-determinant."""
    if isinstance(then, Standardize):
        mean, scale = (np.asarray(part, np.float64) for part in (then.mean, then.scale))
        return (u - mean) / scale, -float(np.log(scale).sum())
    mean, factor = (np.asarray(part, np.float64) for part in (then.mean, then.factor))
    z = scipy.linalg.solve_triangular(factor, (u - mean).T, lower=True).T
    return z, -float(np.log(np.diag(factor)).sum())


def _log_kernels(prior: GaussianMixture, z: Rows) -> Float[np.ndarray, " _"]:
    """Log-density of a kernel density, by NumPy."""
    centers, log_slopes = (np.asarray(p, np.float64) for p in (prior.mean, prior.log_diagonal))
    square = np.square(z).sum(axis=1)[:, None] + np.square(centers).sum(axis=1)
    terms = -0.5 * np.exp(2 * log_slopes[:, 0]) * (square - 2 * z @ centers.T)
    constant = math.log(len(centers)) + 0.5 * z.shape[1] * math.log(2 * math.pi)
    return np.asarray(logsumexp(terms + log_slopes.sum(axis=1), axis=1)) - constant


def _log_mixture(weights: Any, means: Any, covariances: Any, z: Rows) -> Float[np.ndarray, " _"]:
    """Log-density of a mixture of normal distributions, by NumPy."""
    of_components = [
        scipy.stats.multivariate_normal(mean, covariance).logpdf(z)
        for mean, covariance in zip(means, covariances, strict=True)
    ]
    return np.asarray(logsumexp(np.stack(of_components) + np.log(weights)[:, None], axis=0))


def _log_scales(prior: ScaleMixture, z: Rows) -> Float[np.ndarray, " _"]:
    """Log-density of a mixture of scales, by NumPy."""
    mean, log_std, log_scales, logits = (
        np.asarray(part, np.float64)
        for part in (prior.mean, prior.log_std, prior.log_scales, prior.logits)
    )
    square = np.square((z - mean) / np.exp(log_std)).sum(axis=1)[:, None]
    terms = logits - len(mean) * log_scales - 0.5 * square * np.exp(-2 * log_scales)
    constant = log_std.sum() + logsumexp(logits) + 0.5 * len(mean) * math.log(2 * math.pi)
    return logsumexp(terms, axis=1) - constant
