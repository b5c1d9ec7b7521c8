"""The residual block ``y = x + g(x)`` with ``Lip(g) < 1`` (Behrmann et al. 2019).

A branch is a callable that knows more about itself, see `iresnet_jax.branches.branch`.
Log-determinants belong to the direction in the function's name.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from iresnet_jax.bijections.bijection import Bijection
from iresnet_jax.branches.branch import AnyBranch
from iresnet_jax.maths.fixed_point import FixedPointInfo, invert_residual
from iresnet_jax.maths.lipschitz_bounds import block_bounds
from iresnet_jax.maths.logdet_estimator import LogdetEstimator, linearize

ASSUMED = 0.99  # Lipschitz constant by which inverses of branches without a bound stop


class Solver(NamedTuple):
    """Settings of a block's inverse, see `fixed_point.invert_residual`.

    Attributes:
        atol: Tolerance of the preimage (Euclidean norm of an example).
        max_evals: Cap on evaluations of the branch.
        memory: Steps that Anderson's method remembers; 0 is Banach iteration as the paper has it,
            without `Branch.at_zero`.
        refine: Whether to go on in float64 from what float32 found. The branch's weights may stay
            in float32: they are the same numbers.
    """

    atol: float = 1e-6
    max_evals: int = 2000
    memory: int = 4
    refine: bool = False


def inverse(
    branch: AnyBranch, y: Float[Array, "b ..."], solver: Solver = Solver()
) -> tuple[Float[Array, "b ..."], FixedPointInfo]:
    """``x`` with ``y = x + g(x)``, see `fixed_point.invert_residual`; in float64 if the solver
    refines.

    Without a bound of the branch, an inverse stops as if ``L`` were `ASSUMED`, and its error bound
    is infinite.

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
        x, info = solve(branch, y, start=start, atol=solver.atol)
    elif jnp.result_type(float) != jnp.float64:
        raise ValueError("refine works in float64: call it under `with jax.enable_x64(True):`")
    else:
        y32, start32 = y.astype(jnp.float32), start.astype(jnp.float32)
        coarse, seen = solve(
            lambda x: branch(x).astype(jnp.float32), y32, start=start32, atol=max(solver.atol, 1e-6)
        )
        x, info = solve(branch, y.astype(jnp.float64), start=coarse, atol=solver.atol)
        info = info._replace(num_evals=info.num_evals + seen.num_evals)
    if branch.lipschitz_bound is None:  # nothing is promised
        info = info._replace(error_bound=jnp.full_like(info.error_bound, jnp.inf))
    return x, info


def residual_bijection(
    branch: AnyBranch, estimator: LogdetEstimator, solver: Solver = Solver()
) -> Bijection:
    """``y = x + g(x)`` as a bijection, ``Lip(F^-1) <= 1/(1 - Lip(g))``; log-determinants are
    those at ``x``.
    """

    def logdet(at, x, key):
        known = {"trace": branch.trace, "jacobian": branch.jacobian, "logdet": branch.logdet}
        with jax.named_scope("log_determinant"):
            return estimator(at, x, key, lipschitz_bound=branch.lipschitz_bound, **known)

    def forward_and_logdet(x, key):
        at = linearize(branch, x)
        return x + at.value, *logdet(at, x, key)

    def inverse_and_logdet(y, key):
        x, solver_info = inverse(branch, y, solver)
        log_det, info = logdet(branch, x, key)
        return x, -log_det, info, solver_info

    return Bijection(
        forward=lambda x: x + branch(x),
        forward_and_logdet=forward_and_logdet,
        inverse=lambda y: inverse(branch, y, solver),
        inverse_and_logdet=inverse_and_logdet,
        inverse_lipschitz=block_bounds(
            jnp.inf if branch.lipschitz_bound is None else branch.lipschitz_bound
        ).inverse,
    )
