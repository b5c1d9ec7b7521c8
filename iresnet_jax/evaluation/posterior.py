r"""A trained conditional density beside the true posterior of the simulator that drew its data.

Two numbers say how close it is. The divergence ``E_x KL(p(. | x) | q(. | x)) = E log p(theta | x) - E log q(theta | x)``, over
pairs of the simulator, punishes what the model ``q`` does not cover. C2ST (Friedman 2003, Lopez-Paz and Oquab 2017, as the SBI
benchmark computes it: Lueckmann et al. 2021) is the accuracy of a classifier that tells samples of the model from true ones: .5
if none can, 1 if all can.
"""

import math
import warnings
from dataclasses import dataclass
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from iresnet_jax.data.simulators import Simulator
from iresnet_jax.evaluation import draws, samples
from iresnet_jax.evaluation.likelihood import is_too_good, split_error
from iresnet_jax.models.density import Density
from iresnet_jax.runs.config import EvaluationConfig
from iresnet_jax.runs.trained_run import Run

FOLDS = 5
_UNITS_A_DIMENSION = 10  # of each of the classifier's two hidden layers
_MAX_EPOCHS = 1000
_SEED = 1  # of the classifier and of the folds, as in the SBI benchmark


@dataclass(frozen=True)
class Posterior:
    """A conditional density beside the true posterior.

    Attributes:
        divergence: Expected Kullback-Leibler divergence of the truth from the model in nats, mean over test pairs.
        stderr: Standard error of ``divergence``.
        num_examples: Test pairs.
        c2st: Accuracy of a classifier that tells samples of the model from true ones, for each of a few test contexts.
        num_samples: Samples of the model, and of the truth, for each of these contexts.
    """

    divergence: float
    stderr: float
    num_examples: int
    c2st: tuple[float, ...]
    num_samples: int

    @property
    def mean_c2st(self) -> float | None:
        """Mean accuracy over the contexts; .5 says that the classifier cannot tell. None without contexts."""
        return float(np.mean(self.c2st)) if self.c2st else None

    def __str__(self) -> str:
        lines = [f"true posterior: the model diverges by {self.divergence:.4f} ± {self.stderr:.4f} nats"]
        if self.mean_c2st is not None:
            lines.append(
                f"C2ST {self.mean_c2st:.3f} (.5 is indistinguishable; {self.num_samples} samples each for {len(self.c2st)} "
                f"contexts, {min(self.c2st):.3f} to {max(self.c2st):.3f})"
            )
        return "\n".join([*lines, *self.warnings()])

    def warnings(self) -> list[str]:
        """Sentences about a model that is better than the truth, or whose numbers are not finite."""
        found = []
        if not math.isfinite(self.divergence):
            found.append("The divergence from the true posterior is not finite.")
        elif is_too_good(self.divergence, self.stderr):
            below = -self.divergence / max(self.stderr, 1e-12)
            found.append(f"The model is more likely than the true posterior, by {below:.1f} standard errors.")
        if not all(map(math.isfinite, self.c2st)):
            found.append("C2ST is not a number: some samples of the model are not finite.")
        return found


class Comparison(NamedTuple):
    """The numbers of a report, the first test contexts, and samples of the truth and of the model for each of these."""

    summary: Posterior
    contexts: Float[np.ndarray, "c k"]
    truth: Float[np.ndarray, "c n d"]
    samples: Float[np.ndarray, "c n d"]


def compare_run(run: Run) -> Comparison | None:
    """Compares the model of a run with the true posterior, see `compare`; None where no simulator knows it."""
    simulator, contexts = run.data.generator, run.test_contexts()
    if not isinstance(simulator, Simulator) or contexts is None or not isinstance(run.model, Density):
        return None
    return compare(run.model, simulator, run.test_examples(), contexts, run.config.evaluation, run.config.seed)


def compare(
    model: Density,
    simulator: Simulator,
    examples: Float[np.ndarray, "n d"],
    contexts: Float[np.ndarray, "n k"],
    settings: EvaluationConfig,
    seed: int,
) -> Comparison:
    """Compares a model with the posterior that it was trained to be.

    Args:
        simulator: Simulator that knows the truth.
        examples: Test parameters, at least 2.
        contexts: Their observations. The first ``settings.num_posteriors`` are those that samples are drawn for.
        settings: Batch size, and numbers of contexts and samples.

    Raises:
        ValueError: If there are fewer than 2 examples.
    """
    truth = np.asarray(jax.jit(simulator.log_prob)(examples, contexts), np.float64)
    difference = truth - draws.log_prob(model, examples, settings, seed, contexts=contexts)
    divergence = split_error(difference[:, None, None])
    chosen, num = contexts[: settings.num_posteriors], settings.num_posterior_samples
    true_samples = np.zeros((len(chosen), num, examples.shape[1]), np.float32)
    draw = jax.jit(simulator.sample_given, static_argnums=2)
    for i, key in enumerate(jax.random.split(jax.random.fold_in(jax.random.key(seed), 2**31 + 3), len(chosen))):
        true_samples[i] = draw(key, chosen[i], num)
    model_samples = np.zeros_like(true_samples)
    if len(chosen):
        repeated = np.repeat(chosen, num, axis=0)
        drawn = samples.draw(model, len(repeated), settings.batch_size, seed=seed, contexts=repeated)
        model_samples = drawn.values.reshape(model_samples.shape)
    accuracies = tuple(map(c2st, model_samples, true_samples))
    summary = Posterior(divergence.mean, divergence.stderr, len(examples), accuracies, num)
    return Comparison(summary, chosen, true_samples, model_samples)


def c2st(ours: Float[np.ndarray, "n d"], theirs: Float[np.ndarray, "n d"]) -> float:
    """Accuracy of a classifier that tells samples of a model from a reference, on others than it was trained on.

    As in the SBI benchmark: both sets are standardised by the mean and standard deviation of the reference; a perceptron with
    two hidden layers of ``10 d`` rectified units, trained by Adam; the mean accuracy of 5-fold cross-validation. NaN if one
    sample of the model is not finite.


    Example:
        >>> a, b = np.random.default_rng(0).normal(size=(2, 500, 2))
        >>> bool(c2st(a, b) < 0.6 < 0.95 < c2st(a + 4, b))
        True
    """
    from sklearn.model_selection import KFold, cross_val_score
    from sklearn.neural_network import MLPClassifier

    if not np.all(np.isfinite(ours)):
        return math.nan
    mean, scale = theirs.mean(axis=0), theirs.std(axis=0, ddof=1)
    x = (np.concatenate([theirs, ours]).astype(np.float64) - mean) / scale
    is_ours = np.repeat([0, 1], [len(theirs), len(ours)])
    width = _UNITS_A_DIMENSION * x.shape[1]
    classifier = MLPClassifier((width, width), activation="relu", solver="adam", max_iter=_MAX_EPOCHS, random_state=_SEED)
    folds = KFold(FOLDS, shuffle=True, random_state=_SEED)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a classifier that could have been trained for longer
        return float(np.mean(cross_val_score(classifier, x, is_ours, cv=folds, scoring="accuracy")))
