"""The residual block ``y = x + g(x)`` with ``Lip(g) < 1`` (Behrmann et al. 2019).

A branch is a callable that knows more about itself, see `iresnet_jax.branches.branch`. Log-determinants belong to the direction
in the function's name.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from iresnet_jax.bijections.bijection import Bijection
from iresnet_jax.branches.branch import AnyBranch
from iresnet_jax.maths.fixed_point import FixedPointInfo, invert_residual
from iresnet_jax.maths.lipschitz_bounds import block_bounds
from iresnet_jax.maths.logdet_estimator import LogdetEstimator, LogdetInfo, linearize

ASSUMED = 0.99  # Lipschitz constant by which inverses of branches without a bound stop


class Solver(NamedTuple):
    """Settings of a block's inverse, see `fixed_point.invert_residual`.

    Attributes:
        atol: Tolerance of the preimage (Euclidean norm of an example).
        max_evals: Cap on evaluations of the branch.
        memory: Steps that Anderson's method remembers; 0 is Banach iteration as the paper has it, without `Branch.at_zero`.
        refine: Whether to go on in float64 from what float32 found. The branch's weights may stay in float32: they are the
            same numbers.
    """

    atol: float = 1e-6
    max_evals: int = 2000
    memory: int = 4
    refine: bool = False


def forward(branch: AnyBranch, x: Float[Array, "b ..."]) -> Float[Array, "b ..."]:
    """``y = x + g(x)``."""
    return x + branch(x)


def forward_and_logdet(
    branch: AnyBranch, x: Float[Array, "b ..."], key: Key[Array, "..."], estimator: LogdetEstimator
) -> tuple[Float[Array, "b ..."], Float[Array, " b"], LogdetInfo]:
    """``y = x + g(x)`` and ``log det(I + J_g(x))``; one key, or one per example."""
    at = linearize(branch, x)
    logdet, info = _logdet(at, branch, x, key, estimator)
    return x + at.value, logdet, info


def _logdet(at, branch, x, key, estimator):
    known = {"trace": branch.trace, "jacobian": branch.jacobian, "logdet": branch.logdet}
    with jax.named_scope("log_determinant"):
        return estimator(at, x, key, lipschitz_bound=branch.lipschitz_bound, **known)


def inverse(
    branch: AnyBranch, y: Float[Array, "b ..."], solver: Solver = Solver()
) -> tuple[Float[Array, "b ..."], FixedPointInfo]:
    """``x`` with ``y = x + g(x)``, see `fixed_point.invert_residual`; in float64 if the solver refines.

    Without a bound of the branch, an inverse stops as if ``L`` were `ASSUMED`, and its error bound is infinite.

    Raises:
        ValueError: If the solver refines and float64 is switched off.
    """
    start = y - branch.at_zero() if branch.at_zero is not None and solver.memory else y
    solve = functools.partial(
        invert_residual,
        lipschitz_bound=ASSUMED if branch.lipschitz_bound is None else branch.lipschitz_bound,
        max_evals=solver.max_evals,
        memory=solver.memory,
    )
    if not solver.refine:
        return _promising(branch, *solve(branch, y, start=start, atol=solver.atol))
    if jnp.result_type(float) != jnp.float64:
        raise ValueError("refine works in float64: call it under `with jax.enable_x64(True):`")
    y32, start32 = y.astype(jnp.float32), start.astype(jnp.float32)
    coarse, coarse_info = solve(lambda x: branch(x).astype(jnp.float32), y32, start=start32, atol=max(solver.atol, 1e-6))
    x, info = solve(branch, y.astype(jnp.float64), start=coarse, atol=solver.atol)
    return _promising(branch, x, info._replace(num_evals=info.num_evals + coarse_info.num_evals))


def _promising(branch, x, info):
    """The inverse, which promises nothing without a bound of the branch."""
    if branch.lipschitz_bound is None:
        info = info._replace(error_bound=jnp.full_like(info.error_bound, jnp.inf))
    return x, info


def inverse_and_logdet(
    branch: AnyBranch, y: Float[Array, "b ..."], key: Key[Array, "..."], estimator: LogdetEstimator, solver: Solver = Solver()
) -> tuple[Float[Array, "b ..."], Float[Array, " b"], LogdetInfo, FixedPointInfo]:
    """``x = F^-1(y)`` and ``log|det dx/dy| = -log det(I + J_g(x))``, evaluated at the preimage ``x``."""
    x, solver_info = inverse(branch, y, solver)
    logdet, info = _logdet(branch, branch, x, key, estimator)
    return x, -logdet, info, solver_info


def residual_bijection(branch: AnyBranch, estimator: LogdetEstimator, solver: Solver = Solver()) -> Bijection:
    """``y = x + g(x)`` as a bijection, ``Lip(F^-1) <= 1/(1 - Lip(g))``."""
    return Bijection(
        forward=lambda x: forward(branch, x),
        forward_and_logdet=lambda x, key: forward_and_logdet(branch, x, key, estimator),
        inverse=lambda y: inverse(branch, y, solver),
        inverse_and_logdet=lambda y, key: inverse_and_logdet(branch, y, key, estimator, solver),
        inverse_lipschitz=block_bounds(jnp.inf if branch.lipschitz_bound is None else branch.lipschitz_bound).inverse,
    )
