"""Test likelihood: the mean over examples, noise and probes, and its standard error from the
differences between examples.

It is unbiased if log-determinants are exact or from `RouletteLogdet`; otherwise its line states the
bound of the truncation error.
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

# For each noise draw, an exact log-determinant takes D products per block, and an estimate by 4
# draws of 22 terms 88 products and has an error. At 256 dimensions the exact one costs 3 times as
# much.
MAX_EXACT_DIMS = 256


@dataclass(frozen=True)
class Likelihood:
    """Negative log-likelihood of test data; lower is better.

    Attributes:
        mean: Mean over examples, noise and probes.
        stderr: Standard error of ``mean``, from the means of the examples.
        unit: "bits/dim" for images, "nats" for points.
        estimator: Log-determinant that ``mean`` was computed with, in words; "exact
            log-determinant" if that is affordable.
        truncation_bound: Bound of the truncation error of the terms that are always computed, mean
            over examples; 0 if exact.
        num_examples: Test examples.
        num_dequantisations: Noise draws of each example; 0 for points.
        num_probes: Probe draws of each noise draw.
        bound: Kind of bound that ``mean`` is for discrete data: "uniform mean" or "variational
            mean", by uniform noise or by a flow's noise; "" for continuous data, whose negative
            log-likelihood ``mean`` is.
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
        # Entropies are known to 1e-4 nats, which exceeds the rounding of a mean in float32.
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

    The log-determinant is exact up to 256 dimensions. Beyond, it is the configured estimator's,
    which is unbiased for `ExactLogdet` and `RouletteLogdet`. Its truncation bound is a posteriori,
    see `SeriesLogdet` and `KrylovLogdet`, and rigorous if the Lipschitz constants are.

    With ``settings.num_importance_draws`` the importance-weighted bound is added. If it is computed
    for some examples only, its gain on them is subtracted from the mean of all examples.

    Args:
        contexts: Context of each example, of a conditional density.
        entropy_floor: Entropy of the data in nats, if known.
    """
    num = len(examples)
    if num < 2:
        raise ValueError(
            f"a standard error needs at least 2 examples, got {num}: evaluate more test data"
        )
    spec, used = model.spec, with_estimator(model, settings)
    num_noise = settings.num_dequantisations if spec.is_discrete else 1
    num_probes = 1 if isinstance(used.how.estimator, ExactLogdet) else settings.num_probe_draws
    values = objective(
        used, examples, settings, seed, contexts, noise=range(num_noise), probes=range(num_probes)
    )
    by_example = values.mean(axis=(1, 2))
    mean, stderr = float(by_example.mean()), float(by_example.std(ddof=1)) / math.sqrt(num)
    words, cut = described(used.how.estimator or ExactLogdet())
    truncation_bound = 0.0
    if cut is not None:
        given = evaluate_examples(
            model.with_(estimator=cut),
            examples,
            jax.random.key(seed),
            settings.batch_size,
            contexts=contexts,
            bounds=model.bounds(),
        )
        truncation_bound = float(np.mean(given["truncation_bound"], dtype=np.float64))
    weighted = None
    if settings.num_importance_draws:
        weighted = importance_bound(model, examples, settings, seed, contexts)
        if weighted.num_examples < num:
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
    """The model with exact log-determinants up to 256 dimensions, and with the configured estimator
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
    """The objective of examples by the model's estimator, for each draw of noise and of probes.

    Every example has its own keys, so its value does not depend on its batch.

    Args:
        noise: Numbers of the draws of noise.
        probes: Numbers of the draws of probes for each draw of noise.
        same_probes: Whether all draws of noise use the first one's probes.
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
    """The importance-weighted bound with ``settings.num_importance_draws`` draws of noise per
    example.

    ``settings.num_importance_examples`` limits it to so many examples, evenly spaced. Estimated
    log-determinants have at least two draws of probes. Examples pass through the model once for
    each draw, so more draws take more time and no more memory of devices.
    """
    spec, num = model.spec, settings.num_importance_examples
    if not spec.is_discrete:
        raise ValueError(
            "an importance-weighted bound is one of data of integer levels or with cells, and "
            "these are continuous: leave it out, their likelihood is the number itself"
        )
    if 0 < num < len(examples):
        rows = np.linspace(0, len(examples) - 1, num, dtype=int)
        examples, contexts = examples[rows], None if contexts is None else contexts[rows]
    used = with_estimator(model, settings)
    num_probes = (
        1 if isinstance(used.how.estimator, ExactLogdet) else max(settings.num_probe_draws, 2)
    )
    draws = {
        "noise": range(settings.num_importance_draws),
        "probes": range(num_probes),
        "same_probes": True,
    }
    values = objective(used, examples, settings, seed, contexts, **draws)
    return mean_bound(-values / spec.unit_of_a_nat, spec.unit_of_a_nat, spec.unit)


def described(estimator: LogdetEstimator) -> tuple[str, SeriesLogdet | KrylovLogdet | None]:
    """An estimator in words, and the estimator of the terms that are always computed, which has the
    truncation bound; None if exact.
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
