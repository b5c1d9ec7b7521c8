"""Test likelihood: the mean over examples, noise and probes, and its standard error from how
examples differ.

It is unbiased where log-determinants are exact or a roulette's; otherwise its line says what the
cut may cost.
"""

import math
from dataclasses import dataclass

import jax
import numpy as np
from jaxtyping import Float, Num

from iresnet_jax.evaluation.importance import ImportanceBound, mean_bound
from iresnet_jax.maths.logdet_estimator import LogdetEstimator
from iresnet_jax.maths.logdet_exact import ExactLogdet
from iresnet_jax.maths.logdet_krylov import KrylovLogdet
from iresnet_jax.maths.logdet_series import RouletteLogdet, SeriesLogdet
from iresnet_jax.maths.upward_rounding import said_up
from iresnet_jax.models.density import Density
from iresnet_jax.runs.config import EvaluationConfig
from iresnet_jax.training.density import evaluate_examples

# For each noise draw, D dimensions take D products a block exactly, and 88 by an estimate of 4
# draws of 22 terms, which leaves the error of its probes. At 256 dimensions exactness costs 3 times
# as much.
MAX_EXACT_DIMS = 256


@dataclass(frozen=True)
class Likelihood:
    """Negative log-likelihood of test data; lower is better.

    Attributes:
        mean: Mean over examples, noise and probes.
        stderr: Standard error of ``mean``, from the means of the examples.
        unit: "bits/dim" for images, "nats" for points.
        estimator: Log-determinant that ``mean`` was computed with, in words, "exact
            log-determinant" where that is affordable.
        truncation_bound: Bound of the truncation error of the terms that are always computed, mean
            over examples; 0 if exact.
        num_examples: Test examples.
        num_dequantisations: Noise draws of each example; 0 for points.
        num_probes: Probe draws of each noise draw.
        bound: What ``mean`` bounds the negative log-likelihood of discrete data by: "uniform mean"
            or "variational mean", the mean over uniform noise or that of a flow; "" for continuous
            data, whose likelihood it is itself.
        entropy_floor: Entropy of the data in nats, if known.
        importance: The importance-weighted bound of the same data; None unless it was asked for.
    """

    mean: float
    stderr: float
    unit: str
    estimator: str
    truncation_bound: float
    num_examples: int
    num_dequantisations: int
    num_probes: int
    bound: str = ""
    entropy_floor: float | None = None
    importance: ImportanceBound | None = None

    def __str__(self) -> str:
        by = f" by the {self.bound}" if self.bound else ""
        lines = [
            f"test: {self.mean:.4f} ± {self.stderr:.4f} {self.unit}{by} ({self.num_examples} "
            f"examples; {self.estimator})"
        ]
        if self.importance:
            lines.append(f"test: {self.importance}")
        if self.entropy_floor is not None:
            lines.append(
                f"entropy of the data, below which no model can go: {self.entropy_floor:.4f} nats"
            )
        if self.truncation_bound:
            lines.append(
                "terms beyond those always computed change it by at most "
                f"{said_up(self.truncation_bound, 2)} {self.unit}"
            )
        return "\n".join([*lines, *self.warnings()])

    def warnings(self) -> list[str]:
        """Sentences about a likelihood that is not finite, or too good to be true."""
        if not math.isfinite(self.mean):
            return ["The likelihood is not finite."]
        # Entropies are known to 1e-4 nats, which is more than float32 takes from a mean.
        if self.entropy_floor is not None and self.mean < self.entropy_floor - (
            4 * self.stderr + 1e-4
        ):
            below = (self.entropy_floor - self.mean) / max(self.stderr, 1e-12)
            return [
                f"The likelihood is better than the entropy of the data allows, by {below:.1f} "
                "standard errors."
            ]
        return []


def measure(
    model: Density,
    examples: Num[np.ndarray, "n ..."],
    settings: EvaluationConfig,
    seed: int,
    *,
    contexts: Num[np.ndarray, "n k"] | None = None,
    entropy_floor: float | None = None,
) -> Likelihood:
    """Test objective, bits/dim of images or nats of points, with its standard error.

    The log-determinant is exact up to 256 dimensions. Beyond, the configured estimator's mean is
    the result, unbiased if it is exact or a roulette. Its truncation bound is a posteriori, see
    `SeriesLogdet` and `KrylovLogdet`, and rigorous if the Lipschitz constants are.

    With ``settings.num_importance_draws`` there is the importance-weighted bound by so many draws
    of noise too. If it is computed for some of the examples, its gain on them is taken from the
    mean of all.

    Args:
        contexts: Context of each example, of a conditional density.
        entropy_floor: Entropy of the data in nats, if known.

    Raises:
        ValueError: If there are fewer than two examples.
    """
    num = len(examples)
    if num < 2:
        raise ValueError(
            f"a standard error needs at least 2 examples, got {num}: evaluate more test data"
        )
    spec, used = model.spec, with_estimator(model, settings)
    num_noise = settings.num_dequantisations if spec.is_discrete else 1
    num_probes = 1 if isinstance(used.estimator, ExactLogdet) else settings.num_probe_draws
    values = objective(
        used, examples, settings, seed, contexts, noise=range(num_noise), probes=range(num_probes)
    )
    by_example = values.mean(axis=(1, 2))
    mean, stderr = float(by_example.mean()), float(by_example.std(ddof=1)) / math.sqrt(num)
    words, cut = described(used.estimator)
    truncation_bound = 0.0
    if cut is not None:
        given = evaluate_examples(
            model.with_bounds().with_(estimator=cut),
            examples,
            jax.random.key(seed),
            settings.batch_size,
            contexts=contexts,
        )
        truncation_bound = float(np.mean(given["truncation_bound"], dtype=np.float64))
    weighted = (
        importance_bound(model, examples, settings, seed, contexts)
        if settings.num_importance_draws
        else None
    )
    if weighted and weighted.num_examples < num:
        weighted = weighted.of_all(mean, stderr)
    return Likelihood(
        mean=mean,
        stderr=stderr,
        unit=spec.unit,
        estimator=words,
        truncation_bound=truncation_bound,
        num_examples=num,
        num_dequantisations=num_noise if spec.is_discrete else 0,
        num_probes=num_probes,
        bound=spec.bound,
        entropy_floor=entropy_floor,
        importance=weighted,
    )


def with_estimator(model: Density, settings: EvaluationConfig) -> Density:
    """The model with exact log-determinants up to 256 dimensions, and with the configured ones
    beyond.
    """
    is_small = model.spec.flow.num_dims <= MAX_EXACT_DIMS
    return model.with_(estimator=ExactLogdet() if is_small else settings.logdet.build())


def objective(
    model: Density,
    examples: Num[np.ndarray, "n ..."],
    settings: EvaluationConfig,
    seed: int,
    contexts: Num[np.ndarray, "n k"] | None = None,
    *,
    noise: range = range(1),
    probes: range = range(1),
    same_probes: bool = False,
) -> Float[np.ndarray, "n s p"]:
    """The objective of examples by the model's own estimator, for each draw of noise and of probes.

    Every example has keys of its own, so its value does not depend on the batch that it is in.

    Args:
        noise: Numbers of the draws of noise.
        probes: Numbers of the draws of probes of each draw of noise.
        same_probes: Whether all draws of noise have the probes of the first one.
    """

    def drawn(s: int, p: int) -> np.ndarray:
        options = {"contexts": contexts, "draw": (s, p), "same_probes": same_probes}
        return evaluate_examples(
            model, examples, jax.random.key(seed), settings.batch_size, **options
        )[model.spec.metric]

    return np.moveaxis(
        np.array([[drawn(s, p) for p in probes] for s in noise], dtype=np.float64), -1, 0
    )


def log_prob(
    model: Density,
    points: Float[np.ndarray, "n d"],
    settings: EvaluationConfig,
    seed: int,
    *,
    contexts: Num[np.ndarray, "n k"] | None = None,
) -> Float[np.ndarray, " n"]:
    """Log-likelihood of each point under a model of vectors in nats, by one draw of noise and
    probes.
    """
    return -objective(with_estimator(model, settings), points, settings, seed, contexts)[:, 0, 0]


def importance_bound(
    model: Density,
    examples: Num[np.ndarray, "n ..."],
    settings: EvaluationConfig,
    seed: int,
    contexts: Num[np.ndarray, "n k"] | None = None,
) -> ImportanceBound:
    """The importance-weighted bound with ``settings.num_importance_draws`` draws of noise an
    example.

    It is that of ``settings.num_importance_examples`` of the examples, evenly spaced, if these are
    fewer. Estimated log-determinants have at least two draws of probes. Examples pass through the
    model once for each draw, so more draws take more time and no more memory of devices.

    Raises:
        ValueError: If the data are continuous, whose likelihood needs no bound.
    """
    spec, num = model.spec, settings.num_importance_examples
    if not spec.is_discrete:
        raise ValueError(
            "an importance-weighted bound is one of data of integer levels or with cells, and "
            "these are continuous: leave it "
            "out, their likelihood is the number itself"
        )
    if 0 < num < len(examples):
        rows = np.linspace(0, len(examples) - 1, num, dtype=int)
        examples, contexts = examples[rows], None if contexts is None else contexts[rows]
    used = with_estimator(model, settings)
    num_probes = 1 if isinstance(used.estimator, ExactLogdet) else max(settings.num_probe_draws, 2)
    draws = {
        "noise": range(settings.num_importance_draws),
        "probes": range(num_probes),
        "same_probes": True,
    }
    values = objective(used, examples, settings, seed, contexts, **draws)
    return mean_bound(-values / spec.unit_of_a_nat, spec.unit_of_a_nat, spec.unit)


def described(estimator: LogdetEstimator) -> tuple[str, SeriesLogdet | KrylovLogdet | None]:
    """An estimator in words, and that of the terms that are always computed, whose remainder is
    bounded; None if exact.
    """
    if isinstance(estimator, SeriesLogdet):
        return (
            f"series cut after {estimator.num_terms} terms, biased by at most the truncation bound",
            estimator,
        )
    if isinstance(estimator, KrylovLogdet):
        return (
            f"Krylov subspaces of {estimator.num_steps} dimensions, biased by at most the "
            "truncation bound",
            estimator,
        )
    if isinstance(estimator, RouletteLogdet):
        tail = {"poisson": "Poisson", "geometric": "geometric"}[estimator.distribution]
        terms = (
            f"{estimator.num_exact_terms} exact terms and a {tail}({estimator.parameter:g}) tail"
        )
        words = f"unbiased up to term {len(estimator.weights())}, {terms}"
        return words, SeriesLogdet(
            max(estimator.num_exact_terms, 1), num_probes=estimator.num_probes
        )
    return "exact log-determinant", None
