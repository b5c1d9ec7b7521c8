r"""`evaluate_energy`: compares a density with an unnormalised one by importance weights, and judges
the weights.

Samples ``x_i`` of the model ``q`` have the weights ``w_i = exp(log_density(x_i)) / q(x_i)``, whose
mean is an unbiased estimate of the normalising constant ``Z``. That needs exact log-determinants: a
random one of variance ``v``, however unbiased, makes ``log Z`` too large by ``v / 2``.

Weights only see the places of the model's samples. If the model has lost a mode entirely, effective
sample size and tail still look good. Samples of the target, if there are any, reveal the loss:
their weights are larger than the weights of all samples of the model.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import jax
import numpy as np
from blackjax.diagnostics import psis_weights
from jaxtyping import Array, Float, Key, Shaped
from scipy.special import log_softmax

from iresnet_jax.losses import LogDensity, log_density_of
from iresnet_jax.maths.keys import typed_key
from iresnet_jax.maths.logdet_exact import ExactLogdet
from iresnet_jax.models.density import Density


class Weights(NamedTuple):
    """Summary of importance weights, by `weigh`.

    Attributes:
        ess: Effective sample size, ``(sum w)^2 / (n sum w^2)``, a share in (0, 1].
        log_z: Logarithm of the mean weight.
        stderr: Standard error of ``log_z``.
        pareto_k: Shape of the generalised Pareto distribution of the largest weights: moments of
            order ``1 / k`` and above are infinite.
        threshold: Largest ``pareto_k`` at which the mean weight is meaningful, ``min(1 - 1 / log10
            n, .7)``.
    """

    ess: float
    log_z: float
    stderr: float
    pareto_k: float
    threshold: float


@dataclass(frozen=True)
class EnergyEvaluation:
    """A model beside an unnormalised density.

    Attributes:
        ess: Effective sample size of the importance weights, a share in (0, 1]; NaN if the weights
            say nothing about ``log Z``.
        log_z: Logarithm of the normalising constant, by the mean weight; NaN likewise.
        stderr: Standard error of ``log_z``; NaN likewise.
        pareto_k: Shape of the weights' tail, see `Weights`.
        lower: Expected ``log_density - log q`` under the model, which is at most ``log Z``.
        upper: Expected ``log_density - log q`` under the target, at least ``log Z``; None without
            samples of the target.
        lost: Share of the target's samples whose weights exceed the largest weight of the model's
            samples; None without samples of the target.
        verdict: Judgement of the weights, in one or two sentences.
        log_weights: Logarithms of all weights.
    """

    ess: float
    log_z: float
    stderr: float
    pareto_k: float
    lower: float
    upper: float | None
    lost: float | None
    verdict: str
    log_weights: Float[np.ndarray, " n"]

    def __str__(self) -> str:
        if not math.isnan(self.log_z):
            return (
                f"log Z {self.log_z:.4f} ± {self.stderr:.4f}, effective sample size "
                f"{self.ess:.1%}\n{self.verdict}"
            )
        upper = ""
        if self.upper is not None:
            upper = f" and at most {self.upper:.4f}, the same over samples of the target"
        return (
            f"{self.verdict}\nlog Z is at least {self.lower:.4f}, the mean logarithm of the "
            f"weights{upper}."
        )


def evaluate_energy(
    model: Density,
    log_density: LogDensity,
    key: Key[Array, ""],
    num: int = 10_000,
    *,
    samples: Shaped[Array, "m ..."] | Shaped[np.ndarray, "m ..."] | None = None,
) -> EnergyEvaluation:
    """Effective sample size and normalising constant of an unnormalised density by importance
    weights of a model.

    Args:
        model: The model, whose samples are weighed; its log-determinants are computed exactly.
        log_density: ``(b, ...) -> (b,)``, up to a constant.
        key: Source of the samples.
        num: Number of samples.
        samples: Samples of the target, if available, for example from a long Markov chain: they
            show lost modes.

    Example:
        >>> found = evaluate_energy(model, log_density, jax.random.key(0))  # doctest: +SKIP
        >>> print(found)  # doctest: +SKIP
        log Z 0.8032 ± 0.0009, effective sample size 99.2%
        The tail of the weights is light enough for their mean (Pareto k is 0.08, at most 0.70).
    """
    model, size = model.with_(estimator=ExactLogdet()), min(num, 1000)
    keys = jax.random.split(typed_key(key), -(-num // size))
    drawn = [model.sample_and_log_prob(part, size) for part in keys]
    values = [log_density_of(log_density, each.x, "samples of the model") for each in drawn]
    log_probs = np.concatenate([each.log_prob for each in drawn])
    log_weights = (np.concatenate(values).astype(float) - log_probs)[:num]
    weights, upper, lost = weigh(log_weights), None, None
    is_useful, verdict = weights.pareto_k <= weights.threshold, _verdict(weights, num)
    if samples is not None:
        samples = np.asarray(samples)
        values = log_density_of(log_density, samples, "samples of the target")
        parts = np.array_split(samples, -(-len(samples) // size))
        log_probs = np.concatenate([model.log_prob(part, key) for part in parts])
        of_target = np.asarray(values, np.float64) - log_probs
        upper, lost = float(of_target.mean()), float(np.mean(of_target > log_weights.max()))
        # Where the model does not see a share s of the target, log Z is too small by -log(1 - s),
        # which is at least s.
        if lost * len(of_target) >= 3 and lost > 2 * weights.stderr:
            is_useful = False
            verdict = (
                f"The model has lost modes: {lost:.1%} of the target's samples have larger weights "
                f"than all {num} samples of the model, whose mean leaves out what lies there. "
                "Train against samples that reach all modes."
            )
    converged = np.concatenate([each.info.converged for each in drawn])
    if failed := int(np.sum(~converged[:num])):
        verdict += (
            f" The inverse did not converge for {failed} of {num} samples, whose weights "
            "belong to other points."
        )
    ess, log_z, stderr = weights[:3] if is_useful else (math.nan,) * 3
    lower = float(log_weights.mean())
    return EnergyEvaluation(
        ess, log_z, stderr, weights.pareto_k, lower, upper, lost, verdict, log_weights
    )


def _verdict(weights: Weights, num: int) -> str:
    """A sentence on the tail of the weights."""
    tail = f"Pareto k is {weights.pareto_k:.2f}"
    if not weights.pareto_k <= weights.threshold:
        return (
            f"The weights have a heavy tail ({tail}, above {weights.threshold:.2f}): their mean "
            "says nothing about log Z; train longer, or against samples that reach where the "
            "target has mass and the model has not."
        )
    if weights.pareto_k > 0.5:
        return (
            f"The weights have an infinite variance, as they do from k = .5 on ({tail}): log Z is "
            f"too low more often than too high, by more than its error says. Draw more than {num} "
            "samples, or train longer."
        )
    if weights.ess < 0.01:
        return (
            f"The tail of the weights is light enough ({tail}), but {weights.ess:.2%} of {num} "
            "samples are few: draw more."
        )
    return (
        f"The tail of the weights is light enough for their mean ({tail}, at most "
        f"{weights.threshold:.2f})."
    )


def weigh(log_weights: Float[np.ndarray, " n"]) -> Weights:
    """Effective sample size, normalising constant and tail of weights, by Pareto-smoothed
    importance sampling.

    The largest weights are replaced by quantiles of the generalised Pareto distribution that is
    fitted to them (Vehtari et al. 2024); the standard error comes from the delta method. A weight
    that is not finite makes the shape NaN.

    Args:
        log_weights: Logarithms of the weights of independent samples.
    """
    num = len(log_weights)
    with jax.enable_x64():
        # The shares add up to 1.
        shares, shape = map(np.asarray, _smoothed(np.asarray(log_weights, np.float64)))
    # Weights that are equal up to rounding have no tail to fit.
    if np.isnan(shape) and np.ptp(log_weights) < 1:
        shares, shape = log_softmax(log_weights.astype(np.float64)), 0.0
    middle = np.argsort(log_weights)[num // 2]  # this weight is not smoothed
    ess = 1 / (num * np.square(np.exp(shares)).sum())
    return Weights(
        ess=float(ess),
        log_z=float(log_weights[middle] - shares[middle] - math.log(num)),
        stderr=math.sqrt(max(1 / ess - 1, 0.0) / (num - 1)),
        pareto_k=float(shape),
        threshold=min(1 - 1 / math.log10(num), 0.7),
    )


_smoothed = jax.jit(psis_weights)
