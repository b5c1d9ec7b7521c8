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

ASSUMED = 0.99  # Lipschitz constant in the stopping rule for branches without a bound


class Solver(NamedTuple):
    """Settings of a block's inverse, see `fixed_point.invert_residual`.

    Attributes:
        atol: Tolerance of the preimage (Euclidean norm of an example).
        max_evals: Cap on evaluations of the branch.
        memory: Steps that Anderson's method remembers; 0 is the paper's Banach iteration, without
            `Branch.at_zero`.
        refine: Whether to go on in float64 from the result in float32. The branch's weights may
            stay in float32: they are the same numbers.
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

    Without a bound of the branch, an inverse stops as if ``L`` were `ASSUMED`. Its error bound is
    infinite and ``converged`` False, as nothing is known of ``L``; its residual tells how it went.
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
        info = info._replace(
            error_bound=jnp.full_like(info.error_bound, jnp.inf),
            converged=jnp.zeros_like(info.converged),
        )
    return x, info


class Residual(Bijection):
    """``y = x + g(x)`` with ``Lip(F^-1) <= 1/(1 - Lip(g))``; log-determinants are taken at ``x``.

    Attributes:
        branch: ``g``, see `iresnet_jax.branches.branch`.
        estimator: The log-determinant.
        solver: The inverse.
    """

    def __init__(self, branch: AnyBranch, estimator: LogdetEstimator, solver: Solver = Solver()):
        self.branch, self.estimator, self.solver = branch, estimator, solver
        bound = jnp.inf if branch.lipschitz_bound is None else branch.lipschitz_bound
        self.inverse_lipschitz = block_bounds(bound).inverse

    def forward(self, x):
        """``x + g(x)``."""
        return x + self.branch(x)

    def forward_and_logdet(self, x, key):
        """``x + g(x)``, with the linearisation of ``g`` at ``x``."""
        at = linearize(self.branch, x)
        return x + at.value, *self._logdet(at, x, key)

    def inverse(self, y):
        """See `inverse` of this module."""
        return inverse(self.branch, y, self.solver)

    def inverse_and_logdet(self, y, key):
        """The inverse, and minus the log-determinant there."""
        x, info = self.inverse(y)
        logdet, logdet_info = self._logdet(self.branch, x, key)
        return x, -logdet, logdet_info, info

    def _logdet(self, at, x, key):
        known = {name: getattr(self.branch, name) for name in ("trace", "jacobian", "logdet")}
        with jax.named_scope("log_determinant"):
            return self.estimator(at, x, key, lipschitz_bound=self.branch.lipschitz_bound, **known)
