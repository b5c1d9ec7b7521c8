r"""Distance of a computed preimage of a chain of maps from the exact one: shadowing of its trajectory.

``F = F_{T-1} ... F_0`` is a bijection whose steps have Jacobians with a known Lipschitz constant. The bounds of the steps'
inverses multiply, to 1e12 and more for a deep flow; the inverse of the whole is far better conditioned than that. So the
unknown is the trajectory ``x_0, ..., x_{T-1}`` with ``F_t(x_t) = x_{t+1}`` and ``x_T = y``, and the theorem is one of Newton
and Kantorovich for its block-bidiagonal equations.

**Setting.** ``x^_t`` is any trajectory with ``x^_T = y``, ``r_t = F_t(x^_t) - x^_{t+1}`` its residuals, ``J_t`` the Jacobian of
``F_t`` at ``x^_t``, and ``K_t`` a Lipschitz constant of that Jacobian. ``x*_t`` is the exact trajectory, which exists and is
unique, and ``e_t = x*_t - x^_t``, with ``e_T = 0``. Taylor's formula gives

    e_{t+1} = J_t e_t + r_t + q_t,    |q_t| <= K_t / 2 |e_t|^2.                                                        (1)

**Identity.** For any matrices ``P_{s,s}, ..., P_{s,T-1}``, with ``P_{s,s-1} = I`` and ``D_{s,t} = P_{s,t} J_t - P_{s,t-1}``,
multiply (1) by ``P_{s,t}`` and add over ``t >= s``. As ``P_{s,t} e_{t+1} - P_{s,t} J_t e_t = P_{s,t} e_{t+1} - P_{s,t-1} e_t -
D_{s,t} e_t`` telescopes to ``-e_s - sum_t D_{s,t} e_t``,

    e_s = - sum_{t >= s} [P_{s,t} (r_t + q_t) + D_{s,t} e_t].                                                          (2)

Nothing is assumed of how the matrices were computed. They are meant to be ``J_s^-1 ... J_t^-1``; the defects ``D`` measure how
well they are that.

**Theorem.** Let ``|e_t| <= rho_t`` for ``t > s``. With the norms of (2), the numbers

    c = sum_{t >= s} |P_{s,t}| |r_t| + sum_{t > s} (|P_{s,t}| K_t / 2 rho_t^2 + |D_{s,t}| rho_t),
    a = 1 - |D_{s,s}|,    k = |P_{s,s}| K_s / 2

bound the error of step ``s``: if ``a > 0`` and ``4 k c <= a^2``, then ``|e_s| <= rho_s = 2 c / (a + sqrt(a^2 - 4 k c))``, the
lesser root of ``c + k rho^2 = a rho``.

*Proof.* Fix the true ``e_t`` for ``t > s`` and let ``Phi(e)`` be the right-hand side of (2) as a function of ``e = e_s``, which
enters ``q_s`` and ``D_{s,s} e_s``. ``|e| <= rho_s`` gives ``|Phi(e)| <= c + k rho_s^2 + (1 - a) rho_s = rho_s``, so by Brouwer
``Phi`` has a fixed point ``e`` in that ball. ``a > 0`` makes ``P_{s,s}`` invertible, so going back from (2), whose terms
``t > s`` are the true ones, ``e`` solves (1) at ``s``: ``F_s(x^_s + e) = x*_{s+1}``. ``F_s`` is injective, hence ``e = e_s``.

The bounds follow from the last step backward, each from a scalar quadratic. Where one has no root, or ``K_s`` is infinite, the
global bound ``|e_s| <= (|e_{s+1}| + |r_s|) Lip(F_s^-1)`` takes its place and the theorem did not apply.

The classical theorem has one ball for the whole trajectory: ``beta >= |DG^-1|``, ``eta >= |DG^-1 r|``, ``K = max_t K_t`` and
``h = beta K eta <= 1/2``. `classical` gives its numbers. The blocks of ``DG^-1`` are the exact products ``X_{s,t}``, and
multiplying ``P_{s,t} = P_{s,t-1} J_t^-1 + D_{s,t} J_t^-1`` out, ``P_{s,t} = X_{s,t} + sum_{s <= k <= t} D_{s,k} X_{k,t}``.

All arrays here are NumPy's, of a length or a side of ``T``: the sizes of vectors and matrices, bounded from above by the caller
(see `products`). Results are rounded up.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from iresnet_jax.maths.upward_rounding import UP

Array = np.ndarray
_MARGIN = 2.0**-20  # by which a discriminant that decides must be positive, relative to its terms


class Products(NamedTuple):
    """Bounds of the norms of approximate products of inverses and of their defects, for ``s <= t``.

    Attributes:
        norms: ``|P_{s,t}|``, 0 below the diagonal.
        defects: ``|D_{s,t}|``, 0 below the diagonal.
    """

    norms: Float[Array, "t t"]
    defects: Float[Array, "t t"]


def products_of_norms(norms: Float[Array, " t"]) -> Products:
    """Products whose norms are bounded by those of their factors: the exact ones, without defects.

    Args:
        norms: Bounds of ``|J_t^-1|``.
    """
    table = np.zeros((len(norms), len(norms)))
    for s in range(len(norms)):
        table[s, s:] = np.cumprod(norms[s:]) * UP
    return Products(table, np.zeros_like(table))


class Radii(NamedTuple):
    """Guaranteed distances of a trajectory from the exact one.

    Attributes:
        radii: Bound of ``|e_t|`` for every step.
        applied: Whether it is the theorem's; otherwise it comes from the global bound of the step's inverse.
    """

    radii: Float[Array, " t"]
    applied: Bool[Array, " t"]


class Classical(NamedTuple):
    """The numbers of the normwise theorem, see the module.

    Attributes:
        beta: Bound of ``|DG^-1|``.
        eta: Bound of ``|DG^-1 r|``.
        K: Lipschitz constant of ``DG``.
        h: ``beta K eta``; the normwise theorem applies up to 1/2.
    """

    beta: float
    eta: float
    K: float
    h: float


@np.errstate(all="ignore")
def radii(
    products: Products, residuals: Float[Array, " t"], second: Float[Array, " t"], inverse_lipschitz: Float[Array, " t"]
) -> Radii:
    """Bounds of ``|e_t|`` from the last step backward, by the module's theorem.

    Args:
        products: Norms of products and defects.
        residuals: Bounds of ``|r_t|``, rounding included.
        second: Lipschitz constants ``K_t`` of the steps' Jacobians; infinite without one.
        inverse_lipschitz: Global bounds of ``Lip(F_t^-1)``.
    """
    num = len(residuals)
    norms, defects = (np.asarray(table, np.float64) for table in products)
    bounds, applied = np.zeros(num), np.zeros(num, bool)
    behind, quadratic = 0.0, np.zeros(num)
    for s in reversed(range(num)):
        later = slice(s + 1, num)
        c = np.dot(norms[s, s:], residuals[s:]) + np.dot(norms[s, later], quadratic[later])
        c = UP * (c + np.dot(defects[s, later], bounds[later]))
        a, k = (1 - defects[s, s]) / UP, UP * norms[s, s] * second[s] / 2
        blockwise = UP * (behind + residuals[s]) * inverse_lipschitz[s]
        applied[s] = a > 0 and np.isfinite(c) and 4 * k * c <= (1 - _MARGIN) * a * a
        root = UP * 2 * c / (a + np.sqrt(a * a - 4 * k * c)) if applied[s] else np.inf
        bounds[s] = np.nan_to_num(min(root, blockwise), nan=np.inf, posinf=np.inf)
        quadratic[s] = np.nan_to_num(UP * second[s] / 2 * bounds[s] ** 2, nan=np.inf, posinf=np.inf)
        behind = bounds[s]
    return Radii(bounds, applied)


@np.errstate(all="ignore")
def inverse_norms(products: Products) -> Float[Array, "t t"]:
    r"""Bounds of the norms of the exact ``X_{s,t} = J_s^-1 ... J_t^-1``.

    ``|X_{s,t}| <= (|P_{s,t}| + sum_{s < k <= t} |D_{s,k}| |X_{k,t}|) / (1 - |D_{s,s}|)``, from the last row up.
    Infinite in a row whose approximate inverse is none, ``|D_{s,s}| >= 1``.
    """
    norms, defects = products
    num = len(norms)
    exact = np.zeros((num, num))
    for s in reversed(range(num)):
        gap = (1 - defects[s, s]) / UP
        row = norms[s] + defects[s, s + 1 :] @ exact[s + 1 :]
        exact[s, s:] = np.nan_to_num(UP * row[s:] / gap, nan=np.inf, posinf=np.inf) if gap > 0 else np.inf
    return exact


@np.errstate(all="ignore")
def classical(exact: Float[Array, "t t"], residuals: Float[Array, " t"], second: Float[Array, " t"]) -> Classical:
    """The numbers of the normwise theorem from `inverse_norms`.

    The norm of a matrix of blocks is at most that of the matrix of their norms, and ``DG``, whose blocks ``J_t`` vary each with
    its own ``x_t``, has the Lipschitz constant ``max_t K_t``.
    """
    K = float(np.max(second))
    if not np.all(np.isfinite(exact)):
        return Classical(np.inf, np.inf, K, np.inf)
    beta = float(UP * matrix_norm(exact))
    eta = float(UP * np.linalg.norm(exact @ residuals))
    return Classical(beta, eta, K, float(np.nan_to_num(UP * beta * K * eta, nan=np.inf, posinf=np.inf)))


def matrix_norm(matrix: Float[Array, "t t"]) -> float:
    """Bound of the 2-norm of a small nonnegative matrix: ``max_i (A^T A v)_i / v_i`` for any positive ``v`` (Collatz)."""
    gram = matrix.T @ matrix
    v = np.ones(len(gram))
    for _ in range(50):
        v = gram @ v
        v = np.maximum(v / np.max(v), 1e-9) if np.max(v) > 0 else np.ones(len(gram))
    return float(np.sqrt(np.max(gram @ v / v)) * UP)
