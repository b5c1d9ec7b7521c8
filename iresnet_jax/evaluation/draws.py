"""The objective of test examples, by draws of their noise and of the probes of log-determinants."""

from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Num

from iresnet_jax.maths.logdet.estimator import LogdetEstimator
from iresnet_jax.maths.logdet.exact import ExactLogdet
from iresnet_jax.maths.logdet.hutchinson_series import SeriesLogdet
from iresnet_jax.maths.logdet.krylov import KrylovLogdet
from iresnet_jax.maths.logdet.roulette import RouletteLogdet
from iresnet_jax.models.density import Density
from iresnet_jax.runs.config import EvaluationConfig
from iresnet_jax.training.objectives.density import evaluate_examples

# For each noise draw, D dimensions take D products a block exactly, and 88 by an estimate of 4 draws of 22 terms, which leaves
# the error of its probes. At 256 dimensions exactness costs 3 times as much.
MAX_EXACT_DIMS = 256


class Draws(NamedTuple):
    """The objective of examples, by noise draw and probe draw."""

    model: Density
    examples: Num[np.ndarray, "n ..."]
    settings: EvaluationConfig
    seed: int
    contexts: Num[np.ndarray, "n k"] | None

    @property
    def estimator(self) -> LogdetEstimator:
        """Exact up to 256 dimensions, as configured beyond."""
        return ExactLogdet() if self.model.spec.flow.num_dims <= MAX_EXACT_DIMS else self.settings.logdet.build()

    def outputs(
        self,
        estimator: LogdetEstimator,
        noise_draw: int,
        probe_draw: int,
        num: int | None = None,
        *,
        same_probes: bool = False,
    ) -> dict[str, np.ndarray]:
        """Outputs of `evaluate_examples` for the first examples."""
        return evaluate_examples(
            self.model.with_(estimator=estimator),
            self.examples[:num],
            jax.random.key(self.seed),
            self.settings.batch_size,
            contexts=None if self.contexts is None else self.contexts[:num],
            draw=(noise_draw, probe_draw),
            same_probes=same_probes,
        )

    def values(
        self,
        estimator: LogdetEstimator,
        num_noise: int,
        num_probes: int,
        num: int | None = None,
        **options: bool,
    ) -> Float[np.ndarray, "n s p"]:
        """The objective of the first examples."""
        metric = self.model.spec.metric
        found = [[self.outputs(estimator, s, p, num, **options)[metric] for p in range(num_probes)] for s in range(num_noise)]
        return np.moveaxis(np.array(found, dtype=np.float64), -1, 0)


def log_prob(
    model: Density,
    points: Float[np.ndarray, "n d"],
    settings: EvaluationConfig,
    seed: int,
    *,
    contexts: Num[np.ndarray, "n k"] | None = None,
) -> Float[np.ndarray, " n"]:
    """Log-likelihood of each point under a model of vectors in nats, by one draw of noise and probes.

    Up to 256 dimensions the log-determinant is exact; other arguments are those of `likelihood.measure`.
    """
    draws = Draws(model, points, settings, seed, contexts)
    return -draws.values(draws.estimator, 1, 1)[:, 0, 0]


def described(estimator: LogdetEstimator) -> tuple[str, SeriesLogdet | KrylovLogdet | None]:
    """An estimator in words, and that of the terms that are always computed, whose remainder is bounded; None if exact."""
    if isinstance(estimator, SeriesLogdet):
        return f"series cut after {estimator.num_terms} terms, biased by at most the truncation bound", estimator
    if isinstance(estimator, KrylovLogdet):
        return f"Krylov subspaces of {estimator.num_steps} dimensions, biased by at most the truncation bound", estimator
    if isinstance(estimator, RouletteLogdet):
        tail = {"poisson": "Poisson", "geometric": "geometric"}[estimator.distribution]
        terms = f"{estimator.num_exact_terms} exact terms and a {tail}({estimator.parameter:g}) tail"
        words = f"unbiased up to term {len(estimator.weights())}, {terms}"
        return words, SeriesLogdet(max(estimator.num_exact_terms, 1), num_probes=estimator.num_probes, probe=estimator.probe)
    return "exact log-determinant", None
