r"""`evaluate_energy`: a density beside an unnormalised one, by importance weights and what they are worth.

Samples ``x_i`` of the model ``q`` have the weights ``w_i = exp(log_density(x_i)) / q(x_i)``, whose mean is an unbiased
estimate of the normalising constant ``Z``. That needs exact log-determinants: a random one of variance ``v``, however
unbiased, makes ``log Z`` too large by ``v / 2``.

Weights see what the model's samples see. Where the model has lost a mode entirely, effective sample size and tail look as good
as ever; samples of the target show it, if there are any, by weights larger than all of those of the model's samples.
"""

import functools
import math
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, Key, Shaped

from iresnet_jax.checked_dataclasses import Count, checked
from iresnet_jax.losses import LogDensity, check_finite, log_density_of
from iresnet_jax.maths.keys import single_key
from iresnet_jax.maths.logdet_exact import ExactLogdet
from iresnet_jax.models.density import Density


class Weights(NamedTuple):
    """Summary of importance weights, by `summarize`.

    Attributes:
        ess: Effective sample size, ``(sum w)^2 / (n sum w^2)``, a share in (0, 1].
        log_z: Logarithm of the mean weight.
        stderr: Standard error of ``log_z``.
        pareto_k: Shape of the generalised Pareto distribution of the largest weights: moments of order ``1 / k`` and above are
            infinite.
        pareto_k_error: Standard error of ``pareto_k``.
        threshold: Largest ``pareto_k`` at which the mean weight means anything, ``min(1 - 1 / log10 n, .7)``.
    """

    ess: float
    log_z: float
    stderr: float
    pareto_k: float
    pareto_k_error: float
    threshold: float


class EnergyEvaluation(NamedTuple):
    """A model beside an unnormalised density.

    Attributes:
        ess: Effective sample size of the importance weights, a share in (0, 1]; NaN if they say nothing about ``log Z``.
        log_z: Logarithm of the normalising constant, by the mean weight; NaN likewise.
        stderr: Standard error of ``log_z``; NaN likewise.
        pareto_k: Shape of the weights' tail, see `Weights`.
        lower: Expected ``log_density - log q`` under the model, which is at most ``log Z``.
        upper: The same under the target, which is at least ``log Z``; None without samples of the target.
        lost: Share of the target's samples whose weights are above those of all samples of the model; None without them.
        verdict: What the weights are worth, in one or two sentences.
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
            return f"log Z {self.log_z:.4f} ± {self.stderr:.4f}, effective sample size {self.ess:.1%}\n{self.verdict}"
        upper = "" if self.upper is None else f" and at most {self.upper:.4f}, the same over samples of the target"
        return f"{self.verdict}\nlog Z is at least {self.lower:.4f}, the mean logarithm of the weights{upper}."


def evaluate_energy(
    model: Density,
    log_density: LogDensity,
    key: Key[Array, ""],
    num: int = 10_000,
    *,
    samples: Shaped[Array, "m ..."] | Shaped[np.ndarray, "m ..."] | None = None,
) -> EnergyEvaluation:
    """Effective sample size and normalising constant of an unnormalised density by importance weights of a model.

    Args:
        model: The model, whose samples are weighed; its log-determinants are computed exactly.
        log_density: ``(b, ...) -> (b,)``, up to a constant.
        key: Source of the samples.
        num: Number of samples, at least 100.
        samples: Samples of the target, if there are any, such as those of a long Markov chain: they show what the model lost.

    Raises:
        ValueError: If the log-density has the wrong shape, or is NaN or infinite at samples; the message says at how many.

    Example:
        >>> found = evaluate_energy(model, log_density, jax.random.key(0))  # doctest: +SKIP
        >>> print(found)  # doctest: +SKIP
        log Z 0.8032 ± 0.0009, effective sample size 99.2%
        The tail of the weights is light enough for their mean (Pareto k is 0.08, at most 0.70).
    """
    num, key, model = checked(Count, num, "num"), single_key(key), model.with_(estimator=ExactLogdet())
    size = min(num, 1000)
    drawn = [_draw(model, part, size) for part in jax.random.split(key, -(-num // size))]
    values = np.concatenate([np.asarray(log_density_of(log_density, x), np.float64) for x, _, _ in drawn])[:num]
    check_finite(values, "samples of the model")
    log_prob, is_converged = (np.concatenate([np.asarray(part[i]) for part in drawn])[:num] for i in (1, 2))
    log_weights, upper, lost = values - log_prob, None, None
    weights = summarize(log_weights)
    verdict, is_useful = _verdict(weights, num)
    if samples is not None:
        values = np.asarray(log_density_of(log_density, samples), np.float64)
        check_finite(values, "samples of the target")
        parts = np.array_split(np.asarray(samples), -(-len(values) // size))
        of_target = values - np.concatenate([np.asarray(_log_prob(model, part, key)) for part in parts])
        upper, lost = float(of_target.mean()), float(np.mean(of_target > log_weights.max()))
        # Where the model does not see a share s of the target, log Z is too small by -log(1 - s), which is at least s.
        if lost * len(of_target) >= 3 and lost > 2 * weights.stderr:
            is_useful = False
            verdict = (
                f"The model has lost modes: {lost:.1%} of the target's samples have larger weights than all {num} samples of "
                "the model, whose mean leaves out what lies there. Train against samples that reach all modes."
            )
    if failed := int(np.sum(~is_converged)):
        verdict += f" The inverse did not converge for {failed} of {num} samples, whose weights are those of other points."
    ess, log_z, stderr = weights[:3] if is_useful else (math.nan,) * 3
    lower = float(log_weights.mean())
    return EnergyEvaluation(ess, log_z, stderr, weights.pareto_k, lower, upper, lost, verdict, log_weights)


@functools.partial(jax.jit, static_argnums=2)
def _draw(model: Density, key: Key[Array, ""], num: int) -> tuple[Array, Array, Array]:
    found = model.sample_and_log_prob(key, num)
    return found.x, found.log_prob, found.info.converged


@jax.jit
def _log_prob(model: Density, x: Array, key: Key[Array, ""]) -> Array:
    return model.log_prob(x, key)


def _verdict(weights: Weights, num: int) -> tuple[str, bool]:
    """Verdict on the tail of the weights: whether their mean is of use."""
    tail = f"Pareto k is {weights.pareto_k:.2f}"
    if weights.pareto_k > weights.threshold:
        return (
            f"The weights have a heavy tail ({tail}, above {weights.threshold:.2f}): their mean says nothing about log Z; "
            "train longer, or against samples that reach where the target has mass and the model has not.",
            False,
        )
    if weights.pareto_k + weights.pareto_k_error > 0.5:
        return (
            f"The weights may have an infinite variance, as they do from k = .5 on ({tail} ± {weights.pareto_k_error:.2f}): "
            f"log Z is too low more often than too high. Draw more than {num} samples, or train longer.",
            True,
        )
    if weights.ess < 0.01:
        few = f"{weights.ess:.2%} of {num} samples are few: draw more."
        return f"The tail of the weights is light enough ({tail}), but {few}", True
    return f"The tail of the weights is light enough for their mean ({tail}, at most {weights.threshold:.2f}).", True


def summarize(log_weights: Float[np.ndarray, " n"]) -> Weights:
    """Effective sample size, normalising constant and tail of weights.

    The standard error is that of the delta method times what slower convergence costs, see `convergence_rate`: from the shape
    .5 on, weights have no variance, and the sample's is too small. The shape for it is one standard error above the estimate,
    as samples without large weights have both their mean and their shape too low.

    Args:
        log_weights: Logarithms of at least 100 weights, of independent samples.

    Raises:
        ValueError: If there are fewer.
    """
    num = len(log_weights)
    if num < 100:
        raise ValueError(f"at least 100 weights are needed to see their tail, got {num}: draw more samples")
    top = log_weights.max()
    with np.errstate(invalid="ignore"):  # of infinite weights, which `pareto_k` finds
        weights = np.exp(log_weights - top)
    mean, square = weights.mean(), np.square(weights).mean()
    shape, error = pareto_k(log_weights)
    slower = num ** (0.5 - 0.5 * convergence_rate(shape + error, num))
    return Weights(
        ess=float(mean**2 / square),
        log_z=float(top + math.log(mean)),
        stderr=slower * math.sqrt(max(square / mean**2 - 1, 0) / (num - 1)),
        pareto_k=shape,
        pareto_k_error=error,
        threshold=min(1 - 1 / math.log10(num), 0.7),
    )


def pareto_k(log_weights: Float[np.ndarray, " n"]) -> tuple[float, float]:
    """Shape of the tail of weights and its standard error, by the largest ``min(n / 5, 3 sqrt(n))`` of them.

    The generalised Pareto distribution is fitted as by Zhang and Stephens (2009), and its shape shrunk towards .5 as if ten
    more weights had it (Vehtari et al. 2024, appendix C). The shape is ``-inf`` if these weights are all the same, and infinite
    if one is NaN or infinite or fewer than five stand out.

    Args:
        log_weights: Logarithms of the weights; a common constant does not matter.
    """
    ordered = np.sort(np.asarray(log_weights, np.float64))
    if not ordered[-1] < math.inf:  # NaN is sorted last
        return math.inf, 0.0
    num = math.ceil(min(len(ordered) / 5, 3 * math.sqrt(len(ordered))))
    x = np.exp(ordered[-num:] - ordered[-1]) - np.exp(ordered[-num - 1] - ordered[-1])
    x = x[x > 0]
    if x.max(initial=0.0) < 1e-12:
        return -math.inf, 0.0
    if len(x) < 5:
        return math.inf, 0.0  # a few weights beside which the others vanish: nothing shows how heavy the tail is
    # p(x) ~ (1 + k x / sigma)^(-1/k - 1): the posterior mean of b = -k / sigma on a grid, and k = mean log(1 - b x).
    num_grid = 30 + math.isqrt(len(x))
    quartile = x[max(math.floor(len(x) / 4 + 0.5) - 1, 0)]
    b = 1 / x[-1] + (1 - np.sqrt(num_grid / (np.arange(1, num_grid + 1) - 0.5))) / (3 * quartile)
    shapes = np.log1p(-b[:, None] * x[None]).mean(axis=1)
    log_likelihood = len(x) * (np.log(-b / shapes) - shapes - 1)
    posterior = np.exp(log_likelihood - log_likelihood.max())
    best = float(np.sum(b * posterior) / np.sum(posterior))
    shape = (len(x) * float(np.log1p(-best * x).mean()) + 10 * 0.5) / (len(x) + 10)
    return shape, max(1 + shape, 0.0) / math.sqrt(len(x))


def convergence_rate(shape: float, num: int) -> float:
    """Rate at which the mean of weights converges: its squared error falls as ``num^-rate`` (Vehtari et al. 2024).

    It is 1 for weights with a finite variance and many of them, ``1 - 1 / log num`` for the shape .5, and 0 from 1 on.
    """
    if shape <= 0:
        return 1.0
    if shape >= 1:
        return 0.0
    if abs(shape - 0.5) < 1e-6:
        return 1 - 1 / math.log(num)
    top = 2 * (shape - 1) * num ** (2 * shape + 1) + (1 - 2 * shape) * num ** (2 * shape) + num**2
    return min(max(top / ((num - 1) * (num - num ** (2 * shape))), 0.0), 1.0)
