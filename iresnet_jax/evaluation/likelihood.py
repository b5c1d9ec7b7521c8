r"""Test likelihood, unbiased, and how much each source of randomness contributes to its uncertainty.

Every example ``i`` is evaluated under ``S`` dequantisations ``s``, and under ``P`` independent draws ``p`` of probes and series
length for each dequantisation. Let ``a_i`` be the true value of an example, ``d_is`` the effect of its noise and ``e_isp`` that
of its probes, all independent, ``d`` and ``e`` of mean zero. Then

    ``b_isp = a_i + d_is + e_isp``,   ``Var(mean b) = A / n + D / (S n) + E / (S P n)``

where ``A = Var(a)``, ``D = mean_i Var(d_i)`` and ``E = mean_i Var(e_i)``: the three parts of the standard error.
"""

import math
from dataclasses import asdict, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Num

from iresnet_jax.evaluation import stated_accuracy
from iresnet_jax.evaluation.results import Entry, Estimate, Likelihood, MeanAndError, Unlikely
from iresnet_jax.maths.logdet.estimator import LogdetEstimator
from iresnet_jax.maths.logdet.exact import ExactLogdet
from iresnet_jax.maths.logdet.hutchinson_series import SeriesLogdet
from iresnet_jax.maths.logdet.krylov import KrylovLogdet
from iresnet_jax.maths.logdet.roulette import RouletteLogdet
from iresnet_jax.models.density import Density
from iresnet_jax.runs.config import EvaluationConfig
from iresnet_jax.training import parallel
from iresnet_jax.training.objectives.likelihood import evaluate_batch, evaluate_examples

# For each noise draw, D dimensions take D products a block exactly, and 88 by an estimate of 4 draws of 22 terms, which leaves
# the error of its probes. At 256 dimensions exactness costs 3 times as much.
MAX_EXACT_DIMS = 256
NUM_UNLIKELY, NUM_ENTRIES = 8, 3  # least likely points, and entries of each, that a report names


class Measured(NamedTuple):
    """Test likelihood, and what it is the mean of.

    Attributes:
        summary: The numbers of a report.
        log_prob: Log-likelihood of each example in nats, mean over noise and probes.
    """

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


def without_probes(parts: MeanAndError, stderr_probes: float) -> MeanAndError:
    """Parts of an error of single probe draws, with the known part of the probes taken out of the part that holds it."""
    rest = {"stderr_data": parts.stderr_data, "stderr_dequantisation": parts.stderr_dequantisation}
    holder = "stderr_data" if parts.stderr_dequantisation is None else "stderr_dequantisation"
    rest[holder] = math.sqrt(max((rest[holder] or 0.0) ** 2 - stderr_probes**2, 0.0))
    return replace(parts, stderr_probes=stderr_probes, **rest)


def evaluate(
    model: Density,
    examples: Num[np.ndarray, "n ..."],
    settings: EvaluationConfig,
    seed: int,
    *,
    contexts: Num[np.ndarray, "n k"] | None = None,
    entropy_floor: float | None = None,
) -> Likelihood:
    """Test objective with its standard error in parts: the summary of `measure`, which has the same arguments."""
    return measure(model, examples, settings, seed, contexts=contexts, entropy_floor=entropy_floor).summary


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

    With ``settings.target_stderr`` the log-determinants have a stated accuracy, see `stated_accuracy`, and the configured
    estimator on the first batch and noise checks them. Without, the log-determinant is exact up to 256 dimensions, and the
    configured estimator on the noise of the first dequantisation checks it. Beyond, the estimator's mean is the result,
    unbiased if it is exact or a roulette. Its truncation bound is a posteriori, see `SeriesLogdet` and `KrylovLogdet`, and
    rigorous if the Lipschitz constants are.

    Args:
        examples: Images of integer levels, or points; at least 2.
        settings: Estimator, draws and batch size.
        seed: Seed of noise and probes.
        contexts: Context of each example, of a conditional density.
        entropy_floor: Entropy of the data in nats, if known.
    """
    if settings.target_stderr:
        return _measure_to_target(model, examples, settings, seed, contexts, entropy_floor)
    spec = model.spec
    has_noise = _has_noise(spec)
    num_noise = settings.num_dequantisations if has_noise else 1
    configured = settings.logdet.build()
    estimator = ExactLogdet() if spec.flow.num_dims <= MAX_EXACT_DIMS else configured
    is_exact = isinstance(estimator, ExactLogdet)
    num_probes = 1 if is_exact else settings.num_probe_draws
    outputs_of = _Outputs(model, examples, settings, seed, contexts)

    values = outputs_of.values(estimator, num_noise, num_probes)
    parts = asdict(split_error(values))
    if is_exact:
        parts["stderr_probes"] = 0.0
    if not has_noise:
        parts["stderr_dequantisation"] = 0.0
    cut = _always_computed(estimator)
    bound = 0.0 if cut is None else float(np.mean(outputs_of(cut, 0, 0)["truncation_bound"], dtype=np.float64))
    check = None
    if is_exact and not isinstance(configured, ExactLogdet):
        estimated = outputs_of.values(configured, 1, settings.num_probe_draws)[:, 0].mean(axis=1)
        check = compare(estimated, values[:, 0, 0], configured)
    summary = Likelihood(
        **parts,
        unit=spec.unit,
        estimator=_in_words(estimator),
        unbiased=estimator.unbiased,
        truncation_bound=bound,
        num_examples=len(examples),
        num_dequantisations=num_noise if has_noise else 0,
        num_probes=num_probes,
        estimate=check,
        entropy_floor=entropy_floor,
        num_dims=spec.flow.num_dims,
    )
    return Measured(summary, -values.mean(axis=(1, 2)) / spec.unit_of_a_nat)


def _measure_to_target(model, examples, settings, seed, contexts, entropy_floor):
    """`measure` with log-determinants of a stated accuracy."""
    spec = model.spec
    has_noise = _has_noise(spec)
    num_noise = settings.num_dequantisations if has_noise else 1
    found, accuracy = stated_accuracy.log_prob(
        model,
        examples,
        settings.target_stderr,
        seed,
        num_dequantisations=num_noise,
        batch_size=settings.batch_size,
        contexts=contexts,
    )
    values = -spec.unit_of_a_nat * found
    parts = asdict(without_probes(split_error(values[:, :, None]), accuracy.stderr / math.sqrt(len(examples))))
    if not has_noise:
        parts["stderr_dequantisation"] = 0.0
    configured, check = settings.logdet.build(), None
    if not isinstance(configured, ExactLogdet):
        num = max(settings.batch_size, 2)
        first = _Outputs(model, examples[:num], settings, seed, None if contexts is None else contexts[:num])
        estimated = first.values(configured, 1, settings.num_probe_draws)[:, 0].mean(axis=1)
        check = compare(estimated, values[:num, 0], configured)
    is_exact = accuracy.bias == accuracy.stderr == 0
    within = f"log-determinants within {accuracy.target:g} {spec.unit} an example, root mean square"
    summary = Likelihood(
        **parts,
        unit=spec.unit,
        estimator=_in_words(ExactLogdet()) if is_exact else within,
        unbiased=is_exact,
        truncation_bound=accuracy.bias_bound,
        num_examples=len(examples),
        num_dequantisations=num_noise if has_noise else 0,
        num_probes=1,
        estimate=check,
        entropy_floor=entropy_floor,
        num_dims=spec.flow.num_dims,
        accuracy=accuracy,
    )
    return Measured(summary, found.mean(axis=1))


def _has_noise(spec):
    return spec.num_levels is not None or spec.grid is not None


class _Outputs:
    """Outputs of `evaluate_batch` for all examples by an estimator, for the noise and probes of a draw."""

    def __init__(self, model, examples, settings, seed, contexts):
        self._model, self._examples, self._size, self._contexts = model, examples, settings.batch_size, contexts
        self._key, self._step = jax.random.key(seed), parallel.parallelize_eval(evaluate_batch)

    def __call__(self, estimator: LogdetEstimator, noise_draw: int, probe_draw: int) -> dict[str, np.ndarray]:
        state, draw = self._model.with_(estimator=estimator), (noise_draw, probe_draw)
        return evaluate_examples(self._step, state, self._examples, self._key, self._size, contexts=self._contexts, draw=draw)

    def values(self, estimator: LogdetEstimator, num_noise: int, num_probes: int) -> Float[np.ndarray, "n s p"]:
        """The objective by example, noise draw and probe draw."""
        metric = self._model.spec.metric
        draws = [[self(estimator, s, p)[metric] for p in range(num_probes)] for s in range(num_noise)]
        return np.moveaxis(np.array(draws, dtype=np.float64), -1, 0)


def log_prob(
    model: Density,
    points: Float[np.ndarray, "n d"],
    settings: EvaluationConfig,
    seed: int,
    *,
    contexts: Num[np.ndarray, "n k"] | None = None,
) -> Float[np.ndarray, " n"]:
    """Log-likelihood of each point under a model of vectors in nats, by one draw of noise and probes.

    Up to 256 dimensions the log-determinant is exact; other arguments are those of `measure`.
    """
    estimator = ExactLogdet() if model.spec.flow.num_dims <= MAX_EXACT_DIMS else settings.logdet.build()
    key, step = jax.random.key(seed), parallel.parallelize_eval(evaluate_batch)
    found = evaluate_examples(
        step, model.with_(estimator=estimator), points, key, settings.batch_size, contexts=contexts, draw=(0, 0)
    )
    return -np.asarray(found[model.spec.metric], np.float64)


def least_likely(points: Float[np.ndarray, "n d"], log_prob: Float[np.ndarray, " n"]) -> tuple[Unlikely, ...]:
    """The least likely points, those without a finite likelihood first, each with its entries that are furthest out.

    Entries are compared by their distances from the mean in standard deviations, both over all points.
    """
    deviations = (points - points.mean(axis=0)) / np.maximum(points.std(axis=0), 1e-12)
    order = np.argsort(np.where(np.isnan(log_prob), -np.inf, log_prob), kind="stable")[:NUM_UNLIKELY]
    found = []
    for row in order.tolist():
        furthest = np.argsort(-np.abs(deviations[row]), kind="stable")[:NUM_ENTRIES].tolist()
        entries = tuple(Entry(i, float(points[row, i]), float(deviations[row, i])) for i in furthest)
        found.append(Unlikely(row, float(log_prob[row]), entries))
    return tuple(found)


def compare(estimated: Float[np.ndarray, " n"], exact: Float[np.ndarray, " n"], estimator: LogdetEstimator) -> Estimate:
    """An estimate beside the exact values of the same examples with the same noise."""
    difference = estimated - exact
    rounding = np.finfo(np.float32).eps * (1 + np.abs(exact).mean())  # smaller differences mean nothing
    stderr = np.hypot(difference.std(ddof=1) / np.sqrt(len(difference)), rounding)
    return Estimate(
        estimator=_in_words(estimator),
        unbiased=estimator.unbiased,
        mean=float(estimated.mean()),
        difference=float(difference.mean()),
        z=float(difference.mean() / stderr),
    )


def log_density_on_grid(
    model: Density, points: Float[np.ndarray, "n 2"], side: int
) -> tuple[Float[np.ndarray, "m m"], tuple[float, float, float, float]]:
    """Exact log-density of a model of the plane on a square grid around points.

    Args:
        side: Grid points along each axis.

    Returns:
        Natural log of the density, rows along the second coordinate, and (left, right, bottom, top).
    """
    reach = 1.1 * float(np.abs(points).max())
    edge = (np.arange(side) + 0.5) / side * 2 * reach - reach
    grid = np.stack(np.meshgrid(edge, edge), axis=-1).astype(np.float32)

    @jax.jit
    def log_density(model, grid):
        return jax.lax.map(model.log_prob, grid)

    return np.asarray(log_density(model.with_(estimator=ExactLogdet()), jnp.asarray(grid))), (-reach, reach, -reach, reach)


def _always_computed(estimator: LogdetEstimator) -> SeriesLogdet | KrylovLogdet | None:
    """The estimator of the terms that are always computed, whose remainder is bounded; None for exact log-determinants."""
    if isinstance(estimator, SeriesLogdet | KrylovLogdet):
        return estimator
    if isinstance(estimator, RouletteLogdet):
        return SeriesLogdet(max(estimator.num_exact_terms, 1), num_probes=estimator.num_probes, probe=estimator.probe)
    return None


def _in_words(estimator: LogdetEstimator) -> str:
    if isinstance(estimator, SeriesLogdet):
        return f"series cut after {estimator.num_terms} terms, biased by at most the truncation bound"
    if isinstance(estimator, KrylovLogdet):
        return f"Krylov subspaces of {estimator.num_steps} dimensions, biased by at most the truncation bound"
    if isinstance(estimator, RouletteLogdet):
        tail = {"poisson": "Poisson", "geometric": "geometric"}[estimator.distribution]
        return f"unbiased, {estimator.num_exact_terms} exact terms and a {tail}({estimator.parameter:g}) tail"
    return "exact log-determinant"
