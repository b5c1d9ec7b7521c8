r"""Test likelihood, unbiased, and how much each source of randomness contributes to its uncertainty.

Every example ``i`` is evaluated under ``S`` dequantisations ``s``, and under ``P`` independent draws ``p`` of probes and series
length for each dequantisation. Let ``a_i`` be the true value of an example, ``d_is`` the effect of its noise and ``e_isp`` that
of its probes, all independent, ``d`` and ``e`` of mean zero. Then

    ``b_isp = a_i + d_is + e_isp``,   ``Var(mean b) = A / n + D / (S n) + E / (S P n)``

where ``A = Var(a)``, ``D = mean_i Var(d_i)`` and ``E = mean_i Var(e_i)``: the three parts of the standard error.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Num

from iresnet_jax.evaluation.importance import ImportanceBound, summarize
from iresnet_jax.maths.logdet_estimator import LogdetEstimator
from iresnet_jax.maths.logdet_exact import ExactLogdet
from iresnet_jax.maths.logdet_krylov import KrylovLogdet
from iresnet_jax.maths.logdet_roulette import RouletteLogdet
from iresnet_jax.maths.logdet_series import SeriesLogdet
from iresnet_jax.maths.upward_rounding import said_up
from iresnet_jax.models.density import Density
from iresnet_jax.runs.config import EvaluationConfig
from iresnet_jax.training.density import evaluate_examples

# For each noise draw, D dimensions take D products a block exactly, and 88 by an estimate of 4 draws of 22 terms, which leaves
# the error of its probes. At 256 dimensions exactness costs 3 times as much.
MAX_EXACT_DIMS = 256
SUSPICIOUS_Z = 4.0  # standard errors that an unbiased estimate is off once in 16,000 draws, and twice in a row hardly ever
FLOOR_Z = 4.0  # standard errors below the entropy of the data from which a likelihood is too good to be true
ROUNDING = 1e-4  # nats to which entropies are known, and more than float32 takes from a mean log-density


@dataclass(frozen=True)
class MeanAndError:
    """A mean over examples and its standard error, in parts whose squares add up.

    Attributes:
        mean: Mean over examples, noise and probes.
        stderr: Standard error of the mean, all parts together.
        stderr_data: Part due to the choice of test examples; more examples shrink it.
        stderr_probes: Part due to probes and series lengths; more draws or probes shrink it. None after a single draw, whose
            effect the other parts contain.
        stderr_dequantisation: Part due to the noise; more dequantisations shrink it. None after a single dequantisation, whose
            effect ``stderr_data`` contains.
    """

    mean: float
    stderr: float
    stderr_data: float
    stderr_probes: float | None
    stderr_dequantisation: float | None


@dataclass(frozen=True)
class Estimate:
    """Estimated log-determinants beside the exact ones of the same examples, with the noise of the first dequantisation.

    Attributes:
        mean: Mean objective by the estimate.
        difference: Mean of the estimate less the exact value, whose expectation is 0.
        z: ``difference`` in its standard errors.
    """

    mean: float
    difference: float
    z: float


@dataclass(frozen=True)
class Likelihood(MeanAndError):
    """Negative log-likelihood of test data; lower is better.

    Attributes:
        unit: "bits/dim" for images, "nats" for points.
        estimator: Log-determinant that ``mean`` was computed with, in words, "exact log-determinant" where that is affordable.
        unbiased: Whether ``mean`` has no truncation bias.
        truncation_bound: Bound of the truncation error of the terms that are always computed, mean over examples; 0 if exact.
        num_examples: Test examples.
        num_dequantisations: Noise draws of each example; 0 for points.
        num_probes: Probe draws of each noise draw.
        estimate: Unbiased estimate that checks an exact ``mean``; None without one.
        entropy_floor: Entropy of the data in nats, if known.
        num_dims: Entries of an example; None if not known.
        bound: What ``mean`` bounds the negative log-likelihood of discrete data by: "uniform mean" or "variational mean", the
            mean over uniform noise or that of a flow; "" for continuous data, whose likelihood it is itself.
        importance: The importance-weighted bound of the same data; None unless it was asked for.
    """

    unit: str
    estimator: str
    unbiased: bool
    truncation_bound: float
    num_examples: int
    num_dequantisations: int
    num_probes: int
    estimate: Estimate | None = None
    entropy_floor: float | None = None
    num_dims: int | None = None
    bound: str = ""
    importance: ImportanceBound | None = None

    def __str__(self) -> str:
        parts = {"test examples": self.stderr_data, "probes": self.stderr_probes, "dequantisation": self.stderr_dequantisation}
        split = ", ".join(f"{name} {stderr:.2g}" for name, stderr in parts.items() if stderr)
        by = f" by the {self.bound}" if self.bound else ""
        lines = [f"test: {self.mean:.4f} ± {self.stderr:.4f} {self.unit}{by} ({split}; {self.estimator})"]
        if self.importance:
            lines.append(f"test: {self.importance}")
        if self.unit == "nats" and self.num_dims:
            lines.append(f"a dimension: {self.mean / self.num_dims:.4f} ± {self.stderr / self.num_dims:.4f} nats")
        if self.entropy_floor is not None:
            lines.append(f"entropy of the data, below which no model can go: {self.entropy_floor:.4f} nats")
        if self.truncation_bound:
            lines.append(
                f"terms beyond those always computed change it by at most {said_up(self.truncation_bound, 2)} {self.unit}"
            )
        return "\n".join([*lines, *self.warnings()])

    def warnings(self) -> list[str]:
        """Sentences about a likelihood that is not finite, too good to be true, or off its check."""
        found = []
        if not math.isfinite(self.mean):
            found.append("The likelihood is not finite.")
        if self.estimate and not abs(self.estimate.z) <= SUSPICIOUS_Z:
            found.append(
                f"Unbiased estimates of the likelihood, {self.estimate.mean:.4f} {self.unit} on the first noise, were more "
                f"than {SUSPICIOUS_Z:g} standard errors away from the exact value twice in a row: one of the two is wrong."
            )
        floor = self.entropy_floor
        if floor is not None and self.mean < floor - (FLOOR_Z * self.stderr + ROUNDING):
            below = (floor - self.mean) / max(self.stderr, 1e-12)
            found.append(f"The likelihood is better than the entropy of the data allows, by {below:.1f} standard errors.")
        return found


class Measured(NamedTuple):
    """Test likelihood, and the log-likelihood of each example in nats, mean over noise and probes."""

    summary: Likelihood
    log_prob: Float[np.ndarray, " n"]


def measure(
    model: Density,
    examples: Num[np.ndarray, "n ..."],
    settings: EvaluationConfig,
    seed: int,
    *,
    contexts: Num[np.ndarray, "n k"] | None = None,
    entropy_floor: float | None = None,
) -> Measured:
    """Test objective, bits/dim of images or nats of points, with the parts of its error, and its value at each example.

    The log-determinant is exact up to 256 dimensions, and the configured estimator checks it if it is unbiased. Beyond, the
    estimator's mean is the result, unbiased if it is exact or a roulette. Its truncation bound is a posteriori, see
    `SeriesLogdet` and `KrylovLogdet`, and rigorous if the Lipschitz constants are.

    With ``settings.num_importance_draws`` there is the importance-weighted bound by so many draws of noise too. If it is
    computed for some of the examples, its gain on them is taken from the mean of all.

    Args:
        contexts: Context of each example, of a conditional density.
        entropy_floor: Entropy of the data in nats, if known.
    """
    spec, configured = model.spec, settings.logdet.build()
    used = with_estimator(model, settings)
    is_exact = isinstance(used.estimator, ExactLogdet)
    num_noise, num_probes = settings.num_dequantisations if spec.is_discrete else 1, settings.num_probe_draws
    probes = range(1 if is_exact else num_probes)
    values = objective(used, examples, settings, seed, contexts, noise=range(num_noise), probes=probes)
    parts = split_error(values)
    if is_exact:
        parts = replace(parts, stderr_probes=0.0)
    if not spec.is_discrete:
        parts = replace(parts, stderr_dequantisation=0.0)
    words, cut = described(used.estimator)
    bound = 0.0
    if cut is not None:
        given = evaluate_examples(
            model.with_bounds().with_(estimator=cut), examples, jax.random.key(seed), settings.batch_size, contexts=contexts
        )
        bound = float(np.mean(given["truncation_bound"], dtype=np.float64))
    estimate = None
    if is_exact and configured.unbiased and not isinstance(configured, ExactLogdet):
        estimator = model.with_(estimator=configured)

        def estimated(first: int) -> Float[np.ndarray, " n"]:
            draws = range(first, first + num_probes)
            return objective(estimator, examples, settings, seed, contexts, probes=draws).mean(axis=(1, 2))

        estimate = checked(estimated, values[:, 0, 0], num_probes)
    weighted = importance_bound(model, examples, settings, seed, contexts) if settings.num_importance_draws else None
    if weighted and weighted.num_examples < len(examples):
        weighted = weighted.of_all(parts.mean, parts.stderr)
    summary = Likelihood(
        **asdict(parts),
        unit=spec.unit,
        estimator=words,
        unbiased=used.estimator.unbiased,
        truncation_bound=bound,
        num_examples=len(examples),
        num_dequantisations=num_noise if spec.is_discrete else 0,
        num_probes=values.shape[2],
        estimate=estimate,
        entropy_floor=entropy_floor,
        num_dims=spec.flow.num_dims,
        bound=spec.bound,
        importance=weighted,
    )
    return Measured(summary, -values.mean(axis=(1, 2)) / spec.unit_of_a_nat)


def with_estimator(model: Density, settings: EvaluationConfig) -> Density:
    """The model with exact log-determinants up to 256 dimensions, and with the configured ones beyond."""
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
        return evaluate_examples(model, examples, jax.random.key(seed), settings.batch_size, **options)[model.spec.metric]

    return np.moveaxis(np.array([[drawn(s, p) for p in probes] for s in noise], dtype=np.float64), -1, 0)


def log_prob(
    model: Density,
    points: Float[np.ndarray, "n d"],
    settings: EvaluationConfig,
    seed: int,
    *,
    contexts: Num[np.ndarray, "n k"] | None = None,
) -> Float[np.ndarray, " n"]:
    """Log-likelihood of each point under a model of vectors in nats, by one draw of noise and probes."""
    return -objective(with_estimator(model, settings), points, settings, seed, contexts)[:, 0, 0]


def importance_bound(
    model: Density,
    examples: Num[np.ndarray, "n ..."],
    settings: EvaluationConfig,
    seed: int,
    contexts: Num[np.ndarray, "n k"] | None = None,
) -> ImportanceBound:
    """The importance-weighted bound with ``settings.num_importance_draws`` draws of noise an example.

    It is that of ``settings.num_importance_examples`` of the examples, evenly spaced, if these are fewer. Estimated
    log-determinants have at least two draws of probes. Examples pass through the model once for each draw, so more draws take
    more time and no more memory of devices.

    Raises:
        ValueError: If the data are continuous, whose likelihood needs no bound, or fewer than two.
    """
    spec, num = model.spec, settings.num_importance_examples
    if not spec.is_discrete:
        raise ValueError(
            "an importance-weighted bound is one of data of integer levels or on a grid, and these are continuous: leave it "
            "out, their likelihood is the number itself"
        )
    if 0 < num < len(examples):
        rows = np.linspace(0, len(examples) - 1, num, dtype=int)
        examples, contexts = examples[rows], None if contexts is None else contexts[rows]
    used = with_estimator(model, settings)
    num_probes = 1 if isinstance(used.estimator, ExactLogdet) else max(settings.num_probe_draws, 2)
    draws = {"noise": range(settings.num_importance_draws), "probes": range(num_probes), "same_probes": True}
    values = objective(used, examples, settings, seed, contexts, **draws)
    words, unbiased = described(used.estimator)[0], used.estimator.unbiased
    return summarize(-values / spec.unit_of_a_nat, spec.unit_of_a_nat, unit=spec.unit, estimator=words, unbiased=unbiased)


def split_error(values: Float[np.ndarray, "n s p"]) -> MeanAndError:
    r"""Splits the standard error of the mean of nested draws: an analysis of variance with random effects.

    ``E`` is the mean over ``i, s`` of the variance over ``p``. The variance over ``s`` of means over ``p`` expects
    ``D + E / P``, and the variance over ``i`` of means over ``s, p`` expects ``A + D / S + E / (S P)``; so subtracting gives
    unbiased estimates of ``D`` and ``A``. A difference can be negative for one example, so examples are averaged first and only
    the mean is cut off at zero. Unless that happens, ``stderr`` is that of independent per-example means.

    Args:
        values: Objective by example, noise draw and probe draw.

    Raises:
        ValueError: If there are fewer than two examples.
    """
    num_examples, num_noise, num_probes = values.shape
    if num_examples < 2:
        raise ValueError(f"a standard error needs at least 2 examples, got {num_examples}: evaluate more test data")
    values = values.astype(np.float64)
    by_noise = values.mean(axis=2)
    by_example = by_noise.mean(axis=1)
    probes = values.var(axis=2, ddof=1).mean() if num_probes > 1 else None
    noise = None
    if num_noise > 1:
        noise = max(by_noise.var(axis=1, ddof=1).mean() - (probes or 0.0) / num_probes, 0.0)
    data = by_example.var(ddof=1) - (noise or 0.0) / num_noise - (probes or 0.0) / (num_noise * num_probes)

    def stderr(variance, num_draws):
        return None if variance is None else math.sqrt(variance / (num_draws * num_examples))

    stderr_data = math.sqrt(max(data, 0.0) / num_examples)
    stderr_probes, stderr_noise = stderr(probes, num_noise * num_probes), stderr(noise, num_noise)
    total = math.hypot(stderr_data, stderr_probes or 0.0, stderr_noise or 0.0)
    return MeanAndError(float(by_example.mean()), total, stderr_data, stderr_probes, stderr_noise)


def checked(estimated: Callable[[int], Float[np.ndarray, " n"]], exact: Float[np.ndarray, " n"], num_probes: int) -> Estimate:
    """An unbiased estimate beside the exact values; if it is suspicious, another one by fresh draws takes its place.

    A single one is off by more than `SUSPICIOUS_Z` by chance once in some thousands of evaluations, more often if the examples
    are few. Two in a row are so where the estimate or the exact values are wrong.

    Args:
        estimated: ``first -> values``, where draws of probes are numbered from ``first``.
        exact: Exact objective of the same examples with the same noise.
        num_probes: Draws of probes of each estimate.
    """
    found = compare(estimated(0), exact)
    return found if abs(found.z) <= SUSPICIOUS_Z else compare(estimated(num_probes), exact)


def compare(estimated: Float[np.ndarray, " n"], exact: Float[np.ndarray, " n"]) -> Estimate:
    """An estimate beside the exact values of the same examples with the same noise."""
    difference = estimated - exact
    rounding = np.finfo(np.float32).eps * (1 + np.abs(exact).mean())  # smaller differences mean nothing
    stderr = np.hypot(difference.std(ddof=1) / np.sqrt(len(difference)), rounding)
    return Estimate(float(estimated.mean()), float(difference.mean()), float(difference.mean() / stderr))


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
