r"""The importance-weighted bound of the likelihood of discrete data, from the log-weights of
several draws of noise.

With noise ``u_1, ..., u_K`` from ``q(u | x)`` and ``w_k = p(x + u_k) / q(u_k | x)``

    ``log P(x) >= E[log (1/K) sum_k w_k]``,   which grows with ``K`` to ``log P(x)``      (Burda et
    al. 2016; Ho et al. 2019)

and with ``K = 1`` it is the mean of ``log w``, the bound that training uses.

**Estimated log-determinants.** Noise ``e_k`` of mean zero in ``log w_k`` would raise the logarithm
of the mean, a convex function of the ``log w_k``, and the result would not be a bound. The
variational form ``log sum_k w_k = max_pi sum_k pi_k (log w_k - log pi_k)`` keeps it a bound: shares
``pi`` from other probes than ``log w_k`` give a value whose expectation is at most the maximum. So
each draw of probes is summed with the shares that all other draws of probes give. The loss is of
second order. The plain formula errs upwards, also by second order, so the difference of the two
bounds the loss.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float


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
