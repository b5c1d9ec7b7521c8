r"""Simulation-based calibration of a conditional density: do its posteriors hold the truth as often
as they say?

For held-out pairs of parameters and a context, the rank of each true parameter among ``L`` samples
of the model given the context is uniform on ``0, ..., L`` if the model is the posterior (Talts et
al. 2018). Ranks of the truth's log-density among the samples' log-densities show what ranks of
single parameters cannot: wrong correlations (Modrak et al. 2023).

Each rank belongs to one context, and the test sees many contexts. A model that ignores contexts and
returns the prior therefore passes the test of its parameters; its likelihood reveals it.
"""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from iresnet_jax.evaluation import likelihood, round_trips
from iresnet_jax.models.contexts import for_examples
from iresnet_jax.models.density import Density
from iresnet_jax.runs.config import EvaluationConfig
from iresnet_jax.runs.trained_run import Run

NUM_EXAMPLES, NUM_SAMPLES = 500, 99  # pairs, and samples for each, by default: 100 ranks
LEAST_EXAMPLES = 20  # two bins of ten ranks


@dataclass(frozen=True)
class RankTest:
    """Ranks of one quantity and the test that they are uniform.

    Attributes:
        name: The ranked quantity: "entry 0" and so on, or "log p".
        counts: Ranks in bins of equal width, from the lowest.
        p_value: Twice the smaller p-value of the chi-square test of ``counts`` and the
            Kolmogorov-Smirnov test of the ranks.
        mean_rank: Mean of the ranks from 0 to 1; below .5 samples are too high.
    """

    name: str
    counts: tuple[int, ...]
    p_value: float
    mean_rank: float


@dataclass(frozen=True)
class Calibration:
    """Simulation-based calibration.

    Attributes:
        tests: Tests of the ranks of every entry of the examples, and of the log-density.
        num_examples: Pairs, each of which gives one rank.
        num_samples: Samples per pair.
        num_failed: Samples whose inverse did not converge.
    """

    tests: tuple[RankTest, ...]
    num_examples: int
    num_samples: int
    num_failed: int = 0

    @property
    def p_value(self) -> float:
        """Smallest p-value times the number of tests, at most 1: a bound of the probability by
        chance.
        """
        return min(1.0, len(self.tests) * min(test.p_value for test in self.tests))

    @property
    def is_calibrated(self) -> bool:
        """Whether the tests together accept the ranks; they reject one calibrated model in a
        thousand.
        """
        return self.p_value >= 1e-3

    def band(self) -> tuple[int, int]:
        """Counts between which the bar of a calibrated model lies with a probability of 99 %."""
        from scipy.stats import binom

        low, high = binom.interval(0.99, self.num_examples, 1 / len(self.tests[0].counts))
        return int(low), int(high)

    def __str__(self) -> str:
        lines = [
            f"calibration: p = {self.p_value:.2g} for all {len(self.tests)} tests of ranks of "
            f"{self.num_examples} test examples among {self.num_samples} samples each",
            f"{'':10}{'mean rank':>10}{'p':>10}   counts",
        ]
        for test in self.tests:
            lines.append(
                f"{test.name:10}{test.mean_rank:10.3f}{test.p_value:10.2g}   "
                f"{' '.join(map(str, test.counts))}"
            )
        lines.append(
            "counts of a calibrated model are {} to {} in 99 % of the bins".format(*self.band())
        )
        return "\n".join([*lines, *self.warnings()])

    def warnings(self) -> list[str]:
        """Sentences about a model that the tests reject, and about samples whose inverse did not
        converge.
        """
        found, num = [], self.num_examples * self.num_samples
        if not self.is_calibrated:
            found.append(
                "Ranks of test examples among samples are not uniform: given contexts, "
                "the model is not calibrated."
            )
        if self.num_failed:
            found.append(
                f"The inverse did not converge for {self.num_failed} of {num} samples "
                "that ranks are among."
            )
        return found


def calibrate_run(
    run: Run, num_examples: int = NUM_EXAMPLES, num_samples: int = NUM_SAMPLES
) -> Calibration:
    """Calibration of a run's model on its first test examples, see `calibrate`."""
    test, settings = run.test_data(num_examples), run.config.evaluation
    if not isinstance(run.model, Density) or test.context is None:
        raise ValueError(
            f"{run.folder} holds no density given contexts: calibration is for posteriors"
        )
    return calibrate(run.model, test.x, test.context, num_samples, settings, run.config.seed)


def calibrate(
    model: Density,
    examples: Float[np.ndarray, "n d"],
    contexts: Float[np.ndarray, "n k"],
    num_samples: int = NUM_SAMPLES,
    settings: EvaluationConfig = EvaluationConfig(),  # noqa: B008 (it is frozen)
    seed: int = 0,
) -> Calibration:
    """Ranks of held-out examples among a model's samples given their contexts, and tests that they
    are uniform.

    Args:
        model: A conditional density of vectors.
        examples: Parameters that neither trained nor chose the model.
        contexts: Their contexts, such as observations that were simulated from them.
        num_samples: Samples of the model per example.
        settings: Batch size, and how log-densities are computed.
        seed: Seed of the samples, in [0, 2^32).

    Example:
        >>> print(calibrate(model, theta_test, context_test))  # doctest: +SKIP
    """
    examples = np.asarray(examples)
    num, generator = len(examples), np.random.default_rng(seed)
    if num < LEAST_EXAMPLES:
        raise ValueError(f"calibration takes at least {LEAST_EXAMPLES} examples, got {num}")
    contexts = for_examples(contexts, num)
    repeated = np.repeat(contexts, num_samples, axis=0)
    drawn, convergence = round_trips.draw(
        model, len(repeated), settings.batch_size, seed=seed, contexts=repeated
    )
    used = likelihood.with_estimator(model, settings)
    of_samples, of_truth = (
        -likelihood.objective(used, x, settings, seed, given)[:, 0, 0]
        for x, given in ((drawn, repeated), (examples, contexts))
    )
    values, truth = _places(model, drawn).reshape(num, num_samples, -1), _places(model, examples)
    ranked = {f"entry {i}": (values[:, :, i], truth[:, i]) for i in range(examples.shape[1])}
    ranked["log p"] = of_samples.reshape(num, num_samples), of_truth
    tests = (
        rank_test(name, _ranks(*pair, generator), num_samples, generator)
        for name, pair in ranked.items()
    )
    return Calibration(tuple(tests), num, num_samples, len(convergence.failed))


def _places(model: Density, x: np.ndarray) -> Float[np.ndarray, "n d"]:
    """Vectors in which middles of cells replace the values that own them, as each precision rounds
    the values differently.
    """
    cells = model.spec.cells
    return np.asarray(x if cells is None else cells.forward(jnp.asarray(x)), np.float64)


def rank_test(
    name: str, ranks: Int[np.ndarray, " n"], num_samples: int, generator: np.random.Generator
) -> RankTest:
    """Tests that ranks are uniform on ``0, ..., num_samples``; noise in [0, 1) makes ranks
    continuous.

    The Kolmogorov-Smirnov test finds samples that are too high or too low, the chi-square test, of
    at most 20 bins with ten ranks or more on average, samples that are too wide or too narrow.
    """
    from scipy.stats import chisquare, kstest

    places = (ranks + generator.random(len(ranks))) / (num_samples + 1)
    counts, _ = np.histogram(places, max(min(20, len(ranks) // 10), 2), (0, 1))
    smaller = min(float(chisquare(counts).pvalue), float(kstest(places, "uniform").pvalue))
    return RankTest(name, tuple(counts.tolist()), min(1.0, 2 * smaller), float(places.mean()))


def _ranks(
    values: Float[np.ndarray, "n m"], truth: Float[np.ndarray, " n"], generator: np.random.Generator
) -> Int[np.ndarray, " n"]:
    """Number of values below the truth; equal values, which grids have, are ranked at random."""
    below = np.sum(values < truth[:, None], axis=1)
    equal = np.sum(values == truth[:, None], axis=1)
    return below + generator.integers(0, equal + 1)
