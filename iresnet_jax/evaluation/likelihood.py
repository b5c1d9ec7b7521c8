r"""Test likelihood: the mean over examples, noise and probes, and its standard error from the
differences between examples.

It is unbiased if log-determinants are exact or from `RouletteLogdet`; otherwise its line states the
bound of the truncation error.

**The importance-weighted bound** is one of the likelihood of discrete data. With noise
``u_1, ..., u_K`` from ``q(u | x)`` and ``w_k = p(x + u_k) / q(u_k | x)``

    ``log P(x) >= E[log (1/K) sum_k w_k]``,   which grows with ``K`` to ``log P(x)``      (Burda et
    al. 2016; Ho et al. 2019)

and with ``K = 1`` it is the mean of ``log w``, the bound that training uses.

Noise ``e_k`` of mean zero in ``log w_k``, by estimated log-determinants, would raise the logarithm
of the mean, a convex function of the ``log w_k``, and the result would not be a bound. The
variational form ``log sum_k w_k = max_pi sum_k pi_k (log w_k - log pi_k)`` keeps it a bound: shares
``pi`` from other probes than ``log w_k`` give a value whose expectation is at most the maximum. So
each draw of probes is summed with the shares that all other draws of probes give. The loss is of
second order. The plain formula errs upwards, also by second order, so the difference of the two
bounds the loss.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Num

from iresnet_jax.maths.logdet_estimator import LogdetEstimator
from iresnet_jax.maths.logdet_exact import ExactLogdet
from iresnet_jax.maths.logdet_krylov import KrylovLogdet
from iresnet_jax.maths.logdet_series import RouletteLogdet, SeriesLogdet
from iresnet_jax.maths.upward_rounding import said_up
from iresnet_jax.models.density import Density
from iresnet_jax.runs.config import EvaluationConfig
from iresnet_jax.training import parallel
from iresnet_jax.training.objectives import evaluate_examples

# For each noise draw, an exact log-determinant takes D products per block, and an estimate by 4
# draws of 22 terms 88 products and has an error. At 256 dimensions the exact one costs 3 times as
# much.
MAX_EXACT_DIMS = 256


@dataclass(frozen=True)
class ImportanceBound:
    """The importance-weighted bound of test data as a negative log-likelihood; lower is better.

    Attributes:
        num_draws: Draws of noise of each example, ``K``.
        mean: Mean over examples.
        stderr: Standard error of the mean, from the differences between examples, which include the
            noise of the draws.
        gain: Amount by which ``mean`` is lower than the mean over the same draws.
        gain_stderr: Standard error of ``gain``, over examples.
        num_examples: Examples that have these draws.
        estimation_gap: Largest expected loss of ``mean`` through unbiased estimates of
            log-determinants; 0 if they are exact.
        unit: "bits/dim" or "nats".
    """

    num_draws: int
    mean: float
    stderr: float
    gain: float
    gain_stderr: float
    num_examples: int
    estimation_gap: float
    unit: str

    def __str__(self) -> str:
        loses = f"; estimates lose at most {self.estimation_gap:.2g}" if self.estimation_gap else ""
        return (
            f"{self.mean:.4f} ± {self.stderr:.4f} {self.unit} by the importance-weighted bound "
            f"with {self.num_draws} draws, {self.gain:.4f} ± {self.gain_stderr:.4f} below the mean "
            f"over these draws of {self.num_examples} examples{loses}"
        )

    def of_all(self, mean: float, stderr: float) -> "ImportanceBound":
        """The bound of more examples from their mean over noise, which is lowered by the gain
        measured here.
        """
        return replace(self, mean=mean - self.gain, stderr=math.hypot(stderr, self.gain_stderr))


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
        floor = ""
        if self.entropy_floor is not None:
            floor = f"; no model can be below the entropy of the data, {self.entropy_floor:.4f}"
        lines = [
            f"test: {self.mean:.4f} ± {self.stderr:.4f} {self.unit}{by} ({self.num_examples} "
            f"examples; {self.estimator}){floor}"
        ]
        if self.importance:
            lines.append(f"test: {self.importance}")
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

    With ``settings.num_importance_draws`` the importance-weighted bound of discrete data is added.
    If it is computed for some examples only, its gain on them is subtracted from the mean of all.

    Args:
        contexts: Context of each example, of a conditional density.
        entropy_floor: Entropy of the data in nats, if known.
    """
    num, spec, used = len(examples), model.spec, with_estimator(model, settings)
    estimator = used.how.estimator or ExactLogdet()
    num_noise = settings.num_dequantisations if spec.is_discrete else 1
    num_probes = 1 if isinstance(estimator, ExactLogdet) else settings.num_probe_draws
    draws: Any = {"num_noise": num_noise, "num_probes": num_probes}
    values = objective(used, examples, settings, seed, contexts, **draws)
    by_example = values.mean(axis=(1, 2))
    mean, stderr = float(by_example.mean()), float(by_example.std(ddof=1)) / math.sqrt(num)
    (words, cut), truncation_bound = described(estimator), 0.0
    if cut is not None:
        found = evaluate_examples(
            model.with_(estimator=cut),
            examples,
            jax.random.key(seed),
            settings.batch_size,
            contexts=contexts,
            bounds=model.bounds(),
        )
        truncation_bound = float(np.mean(found["truncation_bound"], dtype=np.float64))
    weighted = None
    if settings.num_importance_draws and spec.is_discrete:
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
    num_noise: int = 1,
    num_probes: int = 1,
    same_probes: bool = False,
) -> Float[np.ndarray, "n s p"]:
    """The objective of examples by the model's estimator, for each draw of noise and of probes.

    Every example has its own keys, so its value does not depend on its batch.

    Args:
        num_noise: Draws of noise.
        num_probes: Draws of probes for each draw of noise.
        same_probes: Whether all draws of noise use the first one's probes.
    """

    def drawn(s: int, p: int) -> np.ndarray:
        options = {"contexts": contexts, "draw": (s, p), "same_probes": same_probes}
        return evaluate_examples(
            model, examples, jax.random.key(seed), settings.batch_size, **options
        )[model.spec.metric]

    values = [[drawn(s, p) for p in range(num_probes)] for s in range(num_noise)]
    return np.moveaxis(np.array(values, dtype=np.float64), -1, 0)


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
    if 0 < num < len(examples):
        rows = np.linspace(0, len(examples) - 1, num, dtype=int)
        examples, contexts = parallel.rows_of(examples, contexts)(rows)
    used = with_estimator(model, settings)
    is_exact = isinstance(used.how.estimator, ExactLogdet)
    num_probes = 1 if is_exact else max(settings.num_probe_draws, 2)
    draws: Any = {"num_noise": settings.num_importance_draws, "num_probes": num_probes}
    values = objective(used, examples, settings, seed, contexts, **draws, same_probes=True)
    return mean_bound(-values / spec.unit_of_a_nat, spec.unit_of_a_nat, spec.unit)


def described(estimator: LogdetEstimator) -> tuple[str, SeriesLogdet | KrylovLogdet | None]:
    """An estimator in words, and the estimator of the terms that are always computed, which has the
    truncation bound; None if exact.
    """
    biased = "biased by at most the truncation bound"
    if isinstance(estimator, SeriesLogdet):
        return f"series cut after {estimator.num_terms} terms, {biased}", estimator
    if isinstance(estimator, KrylovLogdet):
        return f"Krylov subspaces of {estimator.num_steps} dimensions, {biased}", estimator
    if isinstance(estimator, RouletteLogdet):
        num, tail = estimator.num_exact_terms, estimator.distribution.replace("poisson", "Poisson")
        words = f"unbiased up to term {len(estimator.weights())}, {num} exact terms and a "
        words += f"{tail}({estimator.parameter:g}) tail"
        return words, SeriesLogdet(max(num, 1), num_probes=estimator.num_probes)
    return "exact log-determinant", None


def log_likelihood_bound(log_weights: Float[np.ndarray, "n k p"]) -> Float[np.ndarray, " n"]:
    """The bound of each example in nats, see the module; the number of probes ``p`` does not matter
    if log-determinants are exact.

    Args:
        log_weights: ``log p(x + u) - log q(u | x)`` by example, draw of noise, and draw of probes.
            Probes are the same for all draws of noise, so that their effect on the shares largely
            cancels. A single draw of probes means that the log-determinants are exact.
    """
    num_draws, num_probes = log_weights.shape[1:]
    seen = log_weights
    if num_probes > 1:
        seen = (log_weights.sum(axis=2, keepdims=True) - log_weights) / (num_probes - 1)
    log_shares = seen - np.logaddexp.reduce(seen, axis=1, keepdims=True)
    return np.sum(np.exp(log_shares) * (log_weights - log_shares), axis=1).mean(axis=1) - math.log(
        num_draws
    )


def mean_bound(
    log_weights: Float[np.ndarray, "n k p"], unit_of_a_nat: float, unit: str
) -> ImportanceBound:
    """The mean of `log_likelihood_bound` over examples with its standard error, as a negative
    log-likelihood.

    Args:
        log_weights: As for `log_likelihood_bound`, for at least two examples.
        unit_of_a_nat: One nat in the unit of the result.
        unit: Name of the unit.
    """
    num, num_draws, num_probes = log_weights.shape
    bounds = log_likelihood_bound(log_weights)
    gains = bounds - log_weights.mean(axis=(1, 2))
    excess = np.zeros(num)
    if num_probes > 1:
        excess = log_likelihood_bound(log_weights.mean(axis=2, keepdims=True)) - bounds
    return ImportanceBound(
        num_draws=num_draws,
        mean=-unit_of_a_nat * float(bounds.mean()),
        stderr=unit_of_a_nat * float(bounds.std(ddof=1)) / math.sqrt(num),
        gain=unit_of_a_nat * float(gains.mean()),
        gain_stderr=unit_of_a_nat * float(gains.std(ddof=1)) / math.sqrt(num),
        num_examples=num,
        estimation_gap=unit_of_a_nat * max(float(excess.mean()), 0.0),
        unit=unit,
    )
