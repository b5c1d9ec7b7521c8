r"""The likelihood of test data, unbiased, and how much each source of randomness contributes to its uncertainty.

Every example ``i`` is evaluated under ``S`` dequantisations ``s``, and under ``P`` independent draws ``p`` of probes and series
length for each of them. With the true value ``a_i`` of an example, the effect ``d_is`` of its noise and that ``e_isp`` of its
probes, all independent and ``d``, ``e`` of mean zero,

    ``b_isp = a_i + d_is + e_isp``,   ``Var(mean b) = A / n + D / (S n) + E / (S P n)``

where ``A = Var(a)``, ``D = mean_i Var(d_i)`` and ``E = mean_i Var(e_i)``: the three parts of the standard error.
"""

import math
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from iresnet_jax.evaluation.trained import Trained, require_density
from iresnet_jax.maths.logdet.krylov import KrylovLogdet
from iresnet_jax.maths.logdet.roulette import RouletteLogdet
from iresnet_jax.maths.logdet.series import ExactLogdet, LogdetEstimator, SeriesLogdet
from iresnet_jax.models import density
from iresnet_jax.training import parallel
from iresnet_jax.training.objectives.likelihood import evaluate_examples, make_evaluation
from iresnet_jax.training.source import Source

MAX_EXACT_DIMS = 256  # up to here the exact log-determinant costs no more than the estimate
SUSPICIOUS_Z = 4.0  # one in 16 000 unbiased evaluations differs from the exact one by more standard errors
FLOOR_Z = 3.0  # standard errors below the entropy of the data at which a likelihood is too good to be true


class MeanAndError(NamedTuple):
    """A mean over examples and its standard error, in parts whose squares add up.

    Attributes:
        mean: Over examples, noise and probes.
        stderr: Of the mean, all parts together.
        stderr_data: From the choice of test examples; shrinks with more examples only.
        stderr_probes: From probes and series lengths; shrinks with more draws or probes as well. None if there was one draw:
            then the other parts contain it.
        stderr_dequantisation: From the noise; shrinks with more dequantisations as well. None as above.
    """

    mean: float
    stderr: float
    stderr_data: float
    stderr_probes: float | None
    stderr_dequantisation: float | None


def split_error(values: Float[np.ndarray, "n s p"]) -> MeanAndError:
    r"""Splits the standard error of the mean of nested draws: an analysis of variance with random effects.

    ``E`` is the mean over ``i, s`` of the variance over ``p``. The variance over ``s`` of means over ``p`` expects
    ``D + E / P``, and the variance over ``i`` of means over ``s, p`` expects ``A + D / S + E / (S P)``; so subtracting gives
    unbiased estimates of ``D`` and ``A``. They can come out negative for one example, so examples are averaged first and only
    the result is cut off at zero. Unless that happens, ``stderr`` is that of independent per-example means.

    Args:
        values: By example, noise draw and probe draw.

    Raises:
        ValueError: If there are fewer than two examples.
    """
    num_examples, num_noise, num_probes = values.shape
    if num_examples < 2:
        raise ValueError(f"a standard error needs at least 2 examples, got {num_examples}: evaluate more test data")
    values = values.astype(np.float64)
    of_noise = values.mean(axis=2)
    of_example = of_noise.mean(axis=1)
    probes = values.var(axis=2, ddof=1).mean() if num_probes > 1 else None
    noise = None
    if num_noise > 1:
        noise = max(of_noise.var(axis=1, ddof=1).mean() - (probes or 0.0) / num_probes, 0.0)
    data = of_example.var(ddof=1) - (noise or 0.0) / num_noise - (probes or 0.0) / (num_noise * num_probes)

    def stderr(variance, num_draws):
        return None if variance is None else math.sqrt(variance / (num_draws * num_examples))

    stderr_data = math.sqrt(max(data, 0.0) / num_examples)
    stderr_probes, stderr_noise = stderr(probes, num_noise * num_probes), stderr(noise, num_noise)
    total = math.hypot(stderr_data, stderr_probes or 0.0, stderr_noise or 0.0)
    return MeanAndError(float(of_example.mean()), total, stderr_data, stderr_probes, stderr_noise)


def evaluate(trained: Trained) -> dict[str, Any]:
    r"""The test objective, bits/dim of images or nats of a toy, with its standard error in parts.

    The mean is unbiased if ``config.evaluation.logdet`` is exact or a roulette. ``truncation_bound`` is the mean over examples
    of what the evaluation's sure terms could have missed at most, a posteriori, see `SeriesLogdet` and `KrylovLogdet`; it is
    rigorous if the Lipschitz constants are. Below 256 dimensions ``exact`` checks the estimate: the mean
    from `ExactLogdet` on the noise of the first dequantisation, the difference of the estimate on that noise from it, and
    that in standard errors of the difference, ``z``.

    Args:
        trained: The model.

    Returns:
        The fields of `MeanAndError`, ``truncation_bound``, ``num_examples``, ``num_dequantisations``, ``num_probes`` (draws for
        each dequantisation), ``unbiased``, ``estimator`` in words, and where it applies ``exact`` and ``entropy_floor``.
    """
    require_density(trained, "likelihood")
    settings = trained.config.evaluation
    source = trained.source
    is_toy = source.num_levels is None
    examples = source.held_out("test", settings.num_examples if is_toy else _everything(source), trained.config.seed)
    estimator = settings.logdet.build()
    num_noise = 1 if is_toy else settings.num_dequantisations
    num_probes = 1 if isinstance(estimator, ExactLogdet) else settings.num_probe_draws
    name = density.objective_name(trained.spec)
    weights, size = (trained.weights, trained.prior), settings.batch_size
    key = jax.random.key(trained.config.seed)

    def outputs_of(estimator):
        step = parallel.parallelize_eval(make_evaluation(trained.spec, estimator))
        # On several simulated CPU devices the LU factorisations dead-lock in XLA's pool of as many threads (jaxlib 0.10).
        num_devices = 1 if isinstance(estimator, ExactLogdet) and jax.default_backend() == "cpu" else None
        return lambda draw: evaluate_examples(step, weights, examples, key, size, draw=draw, num_devices=num_devices)

    estimate = outputs_of(estimator)
    draws = [[estimate((s, p))[name] for p in range(num_probes)] for s in range(num_noise)]
    values = np.moveaxis(np.array(draws, dtype=np.float64), -1, 0)
    result: dict[str, Any] = split_error(values)._asdict()
    if isinstance(estimator, ExactLogdet):
        result["stderr_probes"] = 0.0
    if is_toy:
        result["stderr_dequantisation"] = 0.0
        assert source.toy is not None
        result["entropy_floor"] = float(source.toy.entropy)
    result |= {
        "num_examples": len(examples),
        "num_dequantisations": 0 if is_toy else num_noise,
        "num_probes": num_probes,
        "estimator": _in_words(estimator),
        "unbiased": estimator.unbiased,
        "truncation_bound": 0.0,
    }
    if (cut := _cut(estimator)) is not None:
        result["truncation_bound"] = float(np.mean(outputs_of(cut)((0, 0))["truncation_bound"], dtype=np.float64))
    if trained.spec.flow.num_dims <= MAX_EXACT_DIMS and not isinstance(estimator, ExactLogdet):
        exact = outputs_of(ExactLogdet())((0, 0))[name].astype(np.float64)
        result["exact"] = _compare(values[:, 0].mean(axis=1), exact)
    return result


def warnings(result: dict[str, Any]) -> list[str]:
    """What looks wrong about an evaluation, in sentences."""
    found = []
    exact = result.get("exact")
    if exact and result["unbiased"] and abs(exact["z"]) > SUSPICIOUS_Z:
        found.append(
            f"The estimated likelihood is {abs(exact['z']):.1f} standard errors away from the exact one: one of them is wrong."
        )
    floor = result.get("entropy_floor")
    if floor is not None and result["mean"] < floor - FLOOR_Z * result["stderr"]:
        below = (floor - result["mean"]) / max(result["stderr"], 1e-12)
        found.append(f"The likelihood is better than the entropy of the data allows, by {below:.1f} standard errors.")
    return found


def describe(result: dict[str, Any]) -> str:
    """An evaluation in a few lines of text."""
    unit = "nats" if "entropy_floor" in result else "bits/dim"
    parts = [
        f"{label} {result[key]:.2g}"
        for label, key in (
            ("test examples", "stderr_data"),
            ("probes", "stderr_probes"),
            ("dequantisation", "stderr_dequantisation"),
        )
        if result[key]
    ]
    lines = [f"test: {result['mean']:.4f} ± {result['stderr']:.4f} {unit} ({', '.join(parts)}; {result['estimator']})"]
    if "entropy_floor" in result:
        lines.append(f"entropy of the data, below which no model can go: {result['entropy_floor']:.4f} nats")
    if result["truncation_bound"]:
        bound = result["truncation_bound"]
        lines.append(f"without what is left to chance, or left out, it would be off by at most {bound:.2g} {unit}")
    if exact := result.get("exact"):
        lines.append(f"exact log-determinant: {exact['mean']:.4f} {unit}; the estimate differs by z = {exact['z']:+.2f}")
    return "\n".join([*lines, *warnings(result)])


def _compare(estimated: Float[np.ndarray, " n"], exact: Float[np.ndarray, " n"]) -> dict[str, float]:
    """Mean of exact values, difference of an estimate of each from it, and that in its standard errors."""
    difference = estimated - exact
    rounding = np.finfo(np.float32).eps * (1 + np.abs(exact).mean())  # differences as small as this mean nothing
    stderr = np.hypot(difference.std(ddof=1) / np.sqrt(len(difference)), rounding)
    return {"mean": float(exact.mean()), "difference": float(difference.mean()), "z": float(difference.mean() / stderr)}


def _everything(source: Source) -> int:
    assert source.images is not None
    return len(source.images.images["test"])


def _cut(estimator: LogdetEstimator) -> SeriesLogdet | KrylovLogdet | None:
    """The estimator whose remainder bounds what the sure terms leave out; None for the exact log-determinant."""
    if isinstance(estimator, SeriesLogdet | KrylovLogdet):
        return estimator
    if isinstance(estimator, RouletteLogdet):
        return SeriesLogdet(max(estimator.num_exact_terms, 1), estimator.num_probes, estimator.probe)
    return None


def _in_words(estimator: LogdetEstimator) -> str:
    if isinstance(estimator, SeriesLogdet):
        return f"series cut after {estimator.num_terms} terms, biased by at most the truncation bound"
    if isinstance(estimator, KrylovLogdet):
        return f"Krylov subspaces of {estimator.num_steps} dimensions, biased by at most the truncation bound"
    if isinstance(estimator, RouletteLogdet):
        tail = {"poisson": "Poisson", "geometric": "geometric"}[estimator.distribution]
        return f"unbiased, {estimator.num_exact_terms} exact terms and a {tail}({estimator.parameter:g}) tail"
    return "exact"
