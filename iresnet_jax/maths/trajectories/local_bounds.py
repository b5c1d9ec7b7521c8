r"""How much a chain of maps stretches and shrinks distances in a ball, from its Jacobians at the centre.

Let ``x`` and ``x'`` lie in the ball of radius ``R`` around a centre whose trajectory is known, ``J_t`` the steps' Jacobians
along it and ``K_t`` their Lipschitz constants. By the mean value theorem ``F_t(x_t) - F_t(x'_t) = J'_t (x_t - x'_t)``, with the
mean Jacobian ``J'_t`` of the segment. If both points are within ``d_t`` of the centre's, ``|J'_t - J_t| <= K_t d_t``. As

    J'_t ... J'_0 = J_t ... J_0 + sum_k J_t ... J_{k+1} (J'_k - J_k) J'_{k-1} ... J'_0,

bounds ``a_t`` of ``|J'_{t-1} ... J'_0|`` follow one after the other from those of the products at the centre,

    a_{t+1} = |J_t ... J_0| + sum_{k <= t} |J_t ... J_{k+1}| K_k d_k a_k,    a_0 = 1,    d_t = a_t R + E_t,

where ``E_t`` is how far the computed centre is from the exact one. ``a_T`` is a Lipschitz constant of ``F`` in the ball. For
the inverses of the mean Jacobians, from ``X' = X - sum_k X_{s,k} (J'_k - J_k) X'_{k,T-1}``, ``X_{s,t} = J_s^-1 ... J_t^-1``,

    b_s = (|X_{s,T-1}| + sum_{k > s} |X_{s,k}| K_k d_k b_k) / (1 - |X_{s,s}| K_s d_s),

and ``|x - x'| <= b_0 |F(x) - F(x')|`` in the ball.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from iresnet_jax.maths.enclosures.upward_rounding import UP

Array = np.ndarray


class LocalBounds(NamedTuple):
    """Constants in a ball; infinite where nothing is known.

    Attributes:
        forward: Lipschitz constant of the chain.
        inverse: Bound of ``|x - x'| / |F(x) - F(x')|``.
    """

    forward: float
    inverse: float


@np.errstate(all="ignore")
def forward_norms(
    norms: Float[Array, "t t"], rounding: Float[Array, "t t"], sizes: Float[Array, " t"], errors: Float[Array, " t"]
) -> Float[Array, "t t"]:
    """Bounds of the norms of the exact ``J_t ... J_s`` from those of the computed ones.

    With ``P_{s,t} = M_t P_{s,t-1} + rounding`` the error of a product is at most ``|M_t|`` times that of the one before, and
    ``|M_t - J_t|`` times the exact one before, and the rounding.

    Args:
        norms: Norms of computed products ``P_{s,t}``, from the diagonal on.
        rounding: Norms of the rounding of each step.
        sizes: Norms of the computed Jacobians ``M_t``.
        errors: Bounds of ``|M_t - J_t|``.
    """
    num = len(sizes)
    exact = np.zeros((num, num))
    for s in range(num):
        error, before = 0.0, 1.0
        for t in range(s, num):
            error = (sizes[t] * error + errors[t] * before + rounding[s, t]) * UP
            exact[s, t] = before = (norms[s, t] + error) * UP
    return exact


@np.errstate(all="ignore")
def in_ball(
    forward: Float[Array, "t t"],
    inverse: Float[Array, "t t"],
    second: Float[Array, " t"],
    residuals: Float[Array, " t"],
    radius: float,
) -> LocalBounds:
    """The constants of the module's formulas.

    Args:
        forward: Bounds of ``|J_t ... J_s|`` at row ``s`` and column ``t``.
        inverse: Bounds of ``|X_{s,t}|``.
        second: ``K_t``.
        residuals: Bounds of what is wrong with each step of the computed centre, ``|F_t(x_t) - x_{t+1}|``.
        radius: ``R``.
    """
    num = len(second)
    stretch, off, changes = np.ones(num + 1), np.zeros(num + 1), np.zeros(num)
    behind = np.vstack([forward, np.zeros((1, num))])  # row k + 1: the products behind step k
    for t in range(num):
        changes[t] = UP * second[t] * (stretch[t] * radius + off[t])
        factors = np.array([*behind[1 : t + 1, t], 1.0])
        stretch[t + 1] = UP * (forward[0, t] + factors @ (changes[: t + 1] * stretch[: t + 1]))
        off[t + 1] = UP * (factors @ (residuals[: t + 1] + second[: t + 1] / 2 * off[: t + 1] ** 2))
    shrink = np.zeros(num)
    for s in reversed(range(num)):
        gap = (1 - inverse[s, s] * changes[s] * UP) / UP
        later = inverse[s, s + 1 :] @ (changes[s + 1 :] * shrink[s + 1 :])
        shrink[s] = UP * (inverse[s, -1] + later) / gap if gap > 0 else np.inf
    known = np.nan_to_num([stretch[-1], shrink[0]], nan=np.inf, posinf=np.inf)
    return LocalBounds(float(known[0]), float(known[1]))
