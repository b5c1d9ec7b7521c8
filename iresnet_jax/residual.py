"""The residual block ``y = x + g(x)`` with ``Lip(g) < 1`` (Behrmann et al. 2019), on any branch ``g``.

Pure functions of a callable; parameters live in its closure. Log-determinants are of the direction in the function's name.
"""

from collections.abc import Callable

from jaxtyping import Array, Float, Key

from iresnet_jax.fixed_point import FixedPointInfo, invert_residual
from iresnet_jax.logdet import LogdetEstimator, LogdetInfo

Branch = Callable[[Array], Array]
Bound = float | Float[Array, ""]


def forward(branch: Branch, x: Float[Array, "b ..."]) -> Float[Array, "b ..."]:
    """``y = x + g(x)``."""
    return x + branch(x)


def forward_and_logdet(
    branch: Branch,
    x: Float[Array, "b ..."],
    key: Key[Array, "..."],
    estimator: LogdetEstimator,
    *,
    lipschitz_bound: Bound | None = None,
) -> tuple[Float[Array, "b ..."], Float[Array, " b"], LogdetInfo]:
    """``y = x + g(x)`` and ``log det(I + J_g(x))``.

    Args:
        branch: ``g``.
        x: Inputs.
        key: One key, or one an example.
        estimator: How to compute the log-determinant.
        lipschitz_bound: Upper bound of ``Lip(g)``, for the truncation bound.
    """
    logdet, info = estimator(branch, x, key, lipschitz_bound=lipschitz_bound)
    return forward(branch, x), logdet, info


def inverse(
    branch: Branch,
    y: Float[Array, "b ..."],
    *,
    lipschitz_bound: Bound,
    atol: float = 1e-6,
    max_evals: int = 2000,
    memory: int = 4,
) -> tuple[Float[Array, "b ..."], FixedPointInfo]:
    """``x`` with ``y = x + g(x)``; see `fixed_point.invert_residual`."""
    return invert_residual(branch, y, lipschitz_bound=lipschitz_bound, atol=atol, max_evals=max_evals, memory=memory)


def inverse_and_logdet(
    branch: Branch,
    y: Float[Array, "b ..."],
    key: Key[Array, "..."],
    estimator: LogdetEstimator,
    *,
    lipschitz_bound: Bound,
    atol: float = 1e-6,
    max_evals: int = 2000,
    memory: int = 4,
) -> tuple[Float[Array, "b ..."], Float[Array, " b"], LogdetInfo, FixedPointInfo]:
    """``x = F^-1(y)`` and ``log|det dx/dy| = -log det(I + J_g(x))``, evaluated at the preimage ``x``."""
    x, solver_info = inverse(branch, y, lipschitz_bound=lipschitz_bound, atol=atol, max_evals=max_evals, memory=memory)
    logdet, info = estimator(branch, x, key, lipschitz_bound=lipschitz_bound)
    return x, -logdet, info, solver_info
