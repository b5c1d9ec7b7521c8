r"""A density beside the unnormalised one that it was trained against: importance weights, and what they are worth.

Samples ``x_i`` of the model ``q`` have the weights ``w_i = exp(log_density(x_i)) / q(x_i)``, whose mean is an unbiased
estimate of the normalising constant ``Z``. That needs the log-density of the model itself. With a random log-determinant of
variance ``v``, however unbiased, the mean weight is ``Z E exp(noise) = Z exp(v / 2)`` for normal noise, so ``log Z`` comes out
too large by ``v / 2``: only exact log-determinants make the weights right.

Weights see what the model's samples see. Where the model has lost a mode entirely, effective sample size and tail look as good
as ever; samples of the target show it, if there are any, by the gap between the two bounds of ``log Z``.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, Key, Shaped

from iresnet_jax.checked_dataclasses import Count, checked
from iresnet_jax.maths import importance
from iresnet_jax.maths.energies import check_finite, log_density_of
from iresnet_jax.maths.keys import single_key
from iresnet_jax.maths.logdet.estimator import LogdetEstimator
from iresnet_jax.maths.logdet.exact import ExactLogdet
from iresnet_jax.models.density import Density

AT_ONCE = 1000  # samples
LOW_ESS = 0.01  # effective sample size below which the verdict says so


class EnergyEvaluation(NamedTuple):
    """A model beside an unnormalised density.

    Attributes:
        ess: Effective sample size of the importance weights, a share in (0, 1]; NaN if their tail is too heavy.
        log_z: Logarithm of the normalising constant, by the mean weight; NaN if their tail is too heavy.
        stderr: Standard error of ``log_z``; NaN likewise.
        pareto_k: Shape of the weights' tail, see `iresnet_jax.maths.importance.Weights`.
        lower: Expected ``log_density - log q`` under the model, which is at most ``log Z``.
        upper: The same under the target, which is at least ``log Z``; None without samples of the target.
        verdict: What the tail of the weights says, in one sentence.
        log_weights: Logarithms of all weights.
    """

    ess: float
    log_z: float
    stderr: float
    pareto_k: float
    lower: float
    upper: float | None
    verdict: str
    log_weights: Float[np.ndarray, " n"]

    def __str__(self) -> str:
        upper = "" if self.upper is None else f" and at most {self.upper:.4f}"
        bounds = f"log Z is at least {self.lower:.4f}{upper}, up to errors of sampling"
        if math.isnan(self.log_z):
            return f"{self.verdict}\n{bounds}"
        return f"log Z {self.log_z:.4f} ± {self.stderr:.4f}, effective sample size {self.ess:.1%}\n{bounds}\n{self.verdict}"


def evaluate_energy(
    model: Density,
    log_density: Callable[[Array], Any],
    key: Key[Array, ""],
    num: int = 10_000,
    *,
    samples: Shaped[Array, "m ..."] | Shaped[np.ndarray, "m ..."] | None = None,
    estimator: LogdetEstimator | None = None,
) -> EnergyEvaluation:
    """Effective sample size and normalising constant of an unnormalised density by importance weights of a model.

    Args:
        model: The model, whose samples are weighed.
        log_density: ``(b, ...) -> (b,)``, up to a constant.
        key: Source of the samples.
        num: Number of samples, at least 100.
        samples: Samples of the target, if there are any, such as those of a long Markov chain: they show what the model lost.
        estimator: Log-determinant; exact by default. Random ones, unbiased or not, make ``log_z`` too large.

    Raises:
        ValueError: If the log-density has the wrong shape, or is NaN or infinite at samples; the message says at how many.

    Example:
        >>> found = evaluate_energy(model, log_density, jax.random.key(0))  # doctest: +SKIP
        >>> print(found)  # doctest: +SKIP
        log Z 0.8032 ± 0.0009, effective sample size 99.2%
    """
    num, key = checked(Count, num, "num"), single_key(key)
    model = model.with_(estimator=ExactLogdet() if estimator is None else estimator)
    size = min(num, AT_ONCE)
    log_weights, values, converged = [], [], []
    for part in jax.random.split(key, -(-num // size)):
        x, log_prob, done = _draw(model, part, size)
        converged.append(np.asarray(done))
        values.append(np.asarray(log_density_of(log_density, x), np.float64))
        log_weights.append(values[-1] - np.asarray(log_prob, np.float64))
    check_finite(np.concatenate(values)[:num], "samples of the model")
    of_model = np.concatenate(log_weights)[:num]
    upper = None
    if samples is not None:
        of_target = np.asarray(log_density_of(log_density, samples), np.float64)
        check_finite(of_target, "samples of the target")
        parts = np.array_split(np.asarray(samples), -(-len(of_target) // AT_ONCE))
        log_prob = np.concatenate([np.asarray(_log_prob(model, part, key), np.float64) for part in parts])
        upper = float(np.mean(of_target - log_prob))
    weights = importance.summarize(of_model)
    ess, log_z, stderr = (weights.ess, weights.log_z, weights.stderr) if weights.is_reliable else (math.nan,) * 3
    lower, verdict = float(of_model.mean()), _verdict(weights, num)
    if failed := int(np.sum(~np.concatenate(converged)[:num])):
        verdict += f" The inverse did not converge for {failed} of {num} samples, whose weights are those of other points."
    return EnergyEvaluation(ess, log_z, stderr, weights.pareto_k, lower, upper, verdict, of_model)


@functools.partial(jax.jit, static_argnums=2)
def _draw(model: Density, key: Key[Array, ""], num: int) -> tuple[Array, Array, Array]:
    found = model.sample_and_log_prob(key, num)
    return found.x, found.log_prob, found.info.converged


@jax.jit
def _log_prob(model: Density, x: Array, key: Key[Array, ""]) -> Array:
    return model.log_prob(x, key)


def _verdict(weights: importance.Weights, num: int) -> str:
    tail = f"Pareto k is {weights.pareto_k:.2f}"
    if not weights.is_reliable:
        return (
            f"The weights have a heavy tail ({tail}, above {weights.threshold:.2f}): their mean says nothing about log Z; "
            "train longer, or against samples that reach where the target has mass and the model has not."
        )
    if weights.ess < LOW_ESS:
        return f"The tail of the weights is light enough ({tail}), but {weights.ess:.2%} of {num} samples are few: draw more."
    return f"The tail of the weights is light enough for their mean ({tail}, at most {weights.threshold:.2f})."
