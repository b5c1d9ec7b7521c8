r"""Importance weights: effective sample size, normalising constant with its error, and the tail that says what both are worth.

For samples ``x_i`` of a density ``q`` and an unnormalised density ``p`` with integral ``Z``, the weights
``w_i = p(x_i) / q(x_i)`` have mean ``Z``. The estimate of ``Z`` has a finite variance only if the weights have one.
"""

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

RELIABLE = 0.7  # largest shape of the tail at which the mean of that many weights is of use, for 2000 weights or more
_PRIOR, _PRIOR_STRENGTH = 0.5, 10  # shape to which a fit of few weights shrinks, and the number of weights that it counts as


class Weights(NamedTuple):
    """What importance weights say.

    Attributes:
        ess: Effective sample size, ``(sum w)^2 / (n sum w^2)``, a share in (0, 1].
        log_z: Logarithm of the mean weight.
        stderr: Standard error of ``log_z`` by the delta method, times what slower convergence costs, see `convergence_rate`:
            from the shape .5 on, weights have no variance, and the sample's is too small.
        pareto_k: Shape of the generalised Pareto distribution of the largest weights: moments of order ``1 / k`` and above are
            infinite.
        threshold: Largest ``pareto_k`` at which the numbers above mean anything, ``min(1 - 1 / log10 n, .7)``.
    """

    ess: float
    log_z: float
    stderr: float
    pareto_k: float
    threshold: float

    @property
    def is_reliable(self) -> bool:
        """Whether the weights' tail lets ``log_z`` and ``stderr`` be trusted."""
        return self.pareto_k <= self.threshold


def summarize(log_weights: Float[np.ndarray, " n"]) -> Weights:
    """Effective sample size, normalising constant and tail of weights.

    Args:
        log_weights: Logarithms of at least 100 weights, of independent samples.

    Raises:
        ValueError: If there are fewer.
    """
    log_weights = np.asarray(log_weights, np.float64)
    num = len(log_weights)
    if num < 100:
        raise ValueError(f"at least 100 weights are needed to see their tail, got {num}: draw more samples")
    top = log_weights.max()
    with np.errstate(invalid="ignore"):  # of infinite weights, which `pareto_k` finds
        weights = np.exp(log_weights - top)
    mean, square = weights.mean(), np.square(weights).mean()
    shape = pareto_k(log_weights)
    slower = num ** (0.5 - 0.5 * convergence_rate(shape, num))
    return Weights(
        ess=float(mean**2 / square),
        log_z=float(top + math.log(mean)),
        stderr=slower * math.sqrt(max(square / mean**2 - 1, 0) / (num - 1)),
        pareto_k=shape,
        threshold=min(1 - 1 / math.log10(num), RELIABLE),
    )


def pareto_k(log_weights: Float[np.ndarray, " n"]) -> float:
    """Shape of the tail of weights, by a generalised Pareto distribution of the largest ``min(n / 5, 3 sqrt(n))`` of them.

    The fit is that of Zhang and Stephens (2009), shrunk towards .5 as in Vehtari et al. (2024, appendix C). It is ``-inf`` if
    these weights are all the same, and infinite if one is NaN or infinite or fewer than five stand out.

    Args:
        log_weights: Logarithms of the weights; a common constant does not matter.
    """
    ordered = np.sort(np.asarray(log_weights, np.float64))
    if not ordered[-1] < math.inf:  # NaN is sorted last
        return math.inf
    num = math.ceil(min(len(ordered) / 5, 3 * math.sqrt(len(ordered))))
    excesses = np.exp(ordered[-num:] - ordered[-1]) - np.exp(ordered[-num - 1] - ordered[-1])
    excesses = excesses[excesses > 0]
    if excesses.max(initial=0.0) < 1e-12:
        return -math.inf
    if len(excesses) < 5:
        return math.inf  # a few weights beside which the others vanish: nothing shows how heavy the tail is
    shape = _generalised_pareto_shape(excesses)
    return (len(excesses) * shape + _PRIOR_STRENGTH * _PRIOR) / (len(excesses) + _PRIOR_STRENGTH)


def convergence_rate(shape: float, num: int) -> float:
    """How fast the mean of weights converges: its squared error falls as ``num^-rate`` (Vehtari et al. 2024).

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


def _generalised_pareto_shape(x: Float[np.ndarray, " n"]) -> float:
    """Shape ``k`` of ``p(x) ~ (1 + k x / sigma)^(-1/k - 1)`` for sorted positive numbers (Zhang and Stephens 2009).

    The posterior mean of ``b = -k / sigma`` under a prior that the data scale, on a grid, and ``k = mean log(1 - b x)``.
    """
    num_grid = 30 + math.isqrt(len(x))
    quartile = x[max(math.floor(len(x) / 4 + 0.5) - 1, 0)]
    b = 1 / x[-1] + (1 - np.sqrt(num_grid / (np.arange(1, num_grid + 1) - 0.5))) / (3 * quartile)
    shapes = np.log1p(-b[:, None] * x[None]).mean(axis=1)
    log_likelihood = len(x) * (np.log(-b / shapes) - shapes - 1)
    posterior = np.exp(log_likelihood - log_likelihood.max())
    best = float(np.sum(b * posterior) / np.sum(posterior))
    return float(np.log1p(-best * x).mean())
