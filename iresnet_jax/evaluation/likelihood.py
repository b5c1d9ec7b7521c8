r"""Test likelihood, unbiased, and how much each source of randomness contributes to its uncertainty.

Every example ``i`` is evaluated under ``S`` dequantisations ``s``, and under ``P`` independent draws ``p`` of probes and series
length for each dequantisation. Let ``a_i`` be the true value of an example, ``d_is`` the effect of its noise and ``e_isp`` that
of its probes, all independent, ``d`` and ``e`` of mean zero. Then

    ``b_isp = a_i + d_is + e_isp``,   ``Var(mean b) = A / n + D / (S n) + E / (S P n)``

where ``A = Var(a)``, ``D = mean_i Var(d_i)`` and ``E = mean_i Var(e_i)``: the three parts of the standard error.
"""

import math
from dataclasses import asdict, dataclass, replace
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Num

from iresnet_jax.evaluation import importance
from iresnet_jax.evaluation.draws import Draws, described
from iresnet_jax.evaluation.importance import ImportanceBound
from iresnet_jax.maths.enclosures.upward_rounding import said_up
from iresnet_jax.maths.logdet.estimator import LogdetEstimator
from iresnet_jax.maths.logdet.exact import ExactLogdet
from iresnet_jax.models.density import Density
from iresnet_jax.runs.config import EvaluationConfig

SUSPICIOUS_Z = 4.0  # one in 16,000 unbiased estimates differs from the exact value by more standard errors
FLOOR_Z = 3.0  # standard errors below the entropy of the data from which a likelihood is too good to be true
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
    """Estimated log-determinants beside those of the result, on the same examples with the noise of the first dequantisation.

    Attributes:
        estimator: Estimator in words.
        unbiased: Whether ``difference`` is 0 in expectation.
        mean: Mean objective by the estimate.
        difference: Mean of estimate less the result's value.
        z: ``difference`` in its standard errors.
    """

    estimator: str
    unbiased: bool
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
        estimate: Estimate that checks ``mean``; None without one.
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

    @property
    def is_exact(self) -> bool:
        """Whether every log-determinant is exact."""
        return self.estimator == described(ExactLogdet())[0]

    @property
    def key(self) -> str:
        """Name in ``report.json``."""
        return "nll" if self.unit == "nats" else "bits_per_dim"

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
        if self.estimate:
            noise = " on the first noise" if self.num_dequantisations else ""
            lines.append(
                f"check: {self.estimate.mean:.4f} {self.unit}{noise} by an estimate ({self.estimate.estimator}), "
                f"z = {self.estimate.z:+.2f} from the exact value"
            )
        return "\n".join([*lines, *self.warnings()])

    def warnings(self) -> list[str]:
        """Sentences about a likelihood that is not finite, too good to be true, or off its check."""
        found = []
        if not math.isfinite(self.mean):
            found.append("The likelihood is not finite.")
        if self.estimate and self.estimate.unbiased and not abs(self.estimate.z) <= SUSPICIOUS_Z:
            found.append(
                f"The estimated likelihood is {abs(self.estimate.z):.1f} standard errors away from the exact one: one of them "
                "is wrong."
            )
        if self.entropy_floor is not None and is_too_good(self.mean - self.entropy_floor, self.stderr):
            below = (self.entropy_floor - self.mean) / max(self.stderr, 1e-12)
            found.append(f"The likelihood is better than the entropy of the data allows, by {below:.1f} standard errors.")
        return found


def is_too_good(above_floor: float, stderr: float) -> bool:
    """Whether a mean lies below the least possible value by more than chance and rounding, in nats."""
    return above_floor < -(FLOOR_Z * stderr + ROUNDING)


class Measured(NamedTuple):
    """Test likelihood, and the log-likelihood of each example in nats, mean over noise and probes."""

    summary: Likelihood
    log_prob: Float[np.ndarray, " n"]


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


def measure(
    model: Density,
    examples: Num[np.ndarray, "n ..."],
    settings: EvaluationConfig,
    seed: int,
    *,
    contexts: Num[np.ndarray, "n k"] | None = None,
    entropy_floor: float | None = None,
) -> Measured:
    """Test objective, bits/dim of images or nats of points, with its standard error in parts, and its value at each example.

    The log-determinant is exact up to 256 dimensions, and the configured estimator on the noise of the first dequantisation
    checks it. Beyond, the estimator's mean is the result, unbiased if it is exact or a roulette. Its truncation bound is a
    posteriori, see `SeriesLogdet` and `KrylovLogdet`, and rigorous if the Lipschitz constants are.

    With ``settings.num_importance_draws`` there is the importance-weighted bound by so many draws of noise too. If it is
    computed for some of the examples, its gain on them is taken from the mean of all.

    Args:
        contexts: Context of each example, of a conditional density.
        entropy_floor: Entropy of the data in nats, if known.
    """
    spec, configured = model.spec, settings.logdet.build()
    draws = Draws(model, examples, settings, seed, contexts)
    has_noise = spec.is_discrete
    num_noise = settings.num_dequantisations if has_noise else 1
    used = draws.estimator
    is_exact = isinstance(used, ExactLogdet)
    values = draws.values(used, num_noise, 1 if is_exact else settings.num_probe_draws)
    parts = split_error(values)
    if is_exact:
        parts = replace(parts, stderr_probes=0.0)
    estimator, cut = described(used)
    bound = 0.0 if cut is None else float(np.mean(draws.outputs(cut, 0, 0)["truncation_bound"], dtype=np.float64))
    check = None
    if is_exact and not isinstance(configured, ExactLogdet):
        estimated = draws.values(configured, 1, settings.num_probe_draws)[:, 0].mean(axis=1)
        check = compare(estimated, values[:, 0, 0], configured)
    weighted = importance.measure(model, examples, settings, seed, contexts=contexts) if settings.num_importance_draws else None
    if weighted and weighted.num_examples < len(examples):
        weighted = weighted.of_all(parts.mean, parts.stderr)
    summary = Likelihood(
        **asdict(parts if has_noise else replace(parts, stderr_dequantisation=0.0)),
        unit=spec.unit,
        estimator=estimator,
        unbiased=used.unbiased,
        truncation_bound=bound,
        num_examples=len(examples),
        num_dequantisations=num_noise if has_noise else 0,
        num_probes=values.shape[2],
        estimate=check,
        entropy_floor=entropy_floor,
        num_dims=spec.flow.num_dims,
        bound=spec.bound,
        importance=weighted,
    )
    return Measured(summary, -values.mean(axis=(1, 2)) / spec.unit_of_a_nat)


def compare(estimated: Float[np.ndarray, " n"], exact: Float[np.ndarray, " n"], estimator: LogdetEstimator) -> Estimate:
    """An estimate beside the exact values of the same examples with the same noise."""
    difference = estimated - exact
    rounding = np.finfo(np.float32).eps * (1 + np.abs(exact).mean())  # smaller differences mean nothing
    stderr = np.hypot(difference.std(ddof=1) / np.sqrt(len(difference)), rounding)
    return Estimate(
        estimator=described(estimator)[0],
        unbiased=estimator.unbiased,
        mean=float(estimated.mean()),
        difference=float(difference.mean()),
        z=float(difference.mean() / stderr),
    )
