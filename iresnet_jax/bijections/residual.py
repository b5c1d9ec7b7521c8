"""The residual block ``y = x + g(x)`` with ``Lip(g) < 1`` (Behrmann et al. 2019), on any branch ``g``.

Pure functions of a callable; parameters live in its closure. Log-determinants are of the direction in the function's name.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from iresnet_jax.maths.inverse.fixed_point import Diagonal, FixedPointInfo, invert_residual
from iresnet_jax.maths.logdet.estimator import LogdetEstimator, LogdetInfo, Trace

Branch = Callable[[Array], Array]
AtZero = Callable[[], Array]
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
    trace: Trace | None = None,
) -> tuple[Float[Array, "b ..."], Float[Array, " b"], LogdetInfo]:
    """``y = x + g(x)`` and ``log det(I + J_g(x))``.

    Args:
        branch: ``g``.
        x: Inputs.
        key: One key, or one an example.
        estimator: How to compute the log-determinant.
        lipschitz_bound: Upper bound of ``Lip(g)``, for the truncation bound.
        trace: ``tr J_g`` in closed form, if there is one.
    """
    logdet, info = estimator(branch, x, key, lipschitz_bound=lipschitz_bound, trace=trace)
    return forward(branch, x), logdet, info


def inverse(
    branch: Branch,
    y: Float[Array, "b ..."],
    *,
    lipschitz_bound: Bound,
    atol: float = 1e-6,
    max_evals: int = 2000,
    memory: int = 4,
    refine: bool = False,
    at_zero: AtZero | None = None,
    diagonal: Diagonal | None = None,
) -> tuple[Float[Array, "b ..."], FixedPointInfo]:
    """``x`` with ``y = x + g(x)``; see `fixed_point.invert_residual`.

    With ``at_zero``, which gives ``g(0)`` of one example, the iteration starts from ``y - g(0)`` instead of ``y``, closer by
    what of ``g`` is the same everywhere; with ``diagonal``, that of the Jacobian, it is faster where that is large.
    Plain Banach iteration (``memory=0``) is left as the paper has it.

    With ``refine`` the solution in float32 is where the iteration in float64 starts, and the result is in float64. The branch's
    weights may stay in float32: they are the same numbers.

    Raises:
        ValueError: If ``refine`` is asked for and float64 is switched off.
    """
    settings: dict[str, Any] = {"lipschitz_bound": lipschitz_bound, "max_evals": max_evals, "memory": memory}
    settings["diagonal"] = diagonal if memory > 0 else None
    start = y - at_zero() if at_zero is not None and memory > 0 else y
    if not refine:
        return invert_residual(branch, y, atol=atol, start=start, **settings)
    if jnp.result_type(float) != jnp.float64:
        raise ValueError("refine works in float64: call it under `with jax.enable_x64(True):`")
    y32 = y.astype(jnp.float32)

    def coarsely(x):
        return branch(x).astype(jnp.float32)

    coarse, coarse_info = invert_residual(coarsely, y32, atol=max(atol, 1e-6), start=start.astype(jnp.float32), **settings)
    x, info = invert_residual(branch, y.astype(jnp.float64), atol=atol, start=coarse, **settings)
    return x, info._replace(num_evals=info.num_evals + coarse_info.num_evals)


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
    refine: bool = False,
    at_zero: AtZero | None = None,
    diagonal: Diagonal | None = None,
    trace: Trace | None = None,
) -> tuple[Float[Array, "b ..."], Float[Array, " b"], LogdetInfo, FixedPointInfo]:
    """``x = F^-1(y)`` and ``log|det dx/dy| = -log det(I + J_g(x))``, evaluated at the preimage ``x``."""
    settings = {"atol": atol, "max_evals": max_evals, "memory": memory, "refine": refine}
    knowledge = {"lipschitz_bound": lipschitz_bound, "at_zero": at_zero, "diagonal": diagonal}
    x, solver_info = inverse(branch, y, **knowledge, **settings)
    logdet, info = estimator(branch, x, key, lipschitz_bound=lipschitz_bound, trace=trace)
    return x, -logdet, info, solver_info
