"""What a block of a flow may make of its branch, by name."""

from collections.abc import Callable
from typing import Any, NamedTuple

from jaxtyping import Array

from iresnet_jax.bijections import monotone, residual
from iresnet_jax.bijections.bijection import Bijection
from iresnet_jax.branches.branch import AnyBranch
from iresnet_jax.maths.lipschitz_bounds import BiLipschitz, Scalar, block_bounds, monotone_block_bounds


class BlockKind(NamedTuple):
    """A kind of block.

    Attributes:
        bijection: ``(branch, estimator, solver) -> Bijection``.
        forward: ``(branch, x, solver) -> (y, w)``, the output and the point at which the branch stands.
        bounds: Bounds of the block's Lipschitz constants by that of its branch.
        known: ``branch -> dict``: what estimators of the log-determinant at ``w`` take, see `LogdetEstimator`.
        quotient: Whether that is ``log det(I - J) - log det(I + J)``, and the way forward solves an equation.
    """

    bijection: Callable[..., Bijection]
    forward: Callable[..., tuple[Array, Array]]
    bounds: Callable[[Scalar], BiLipschitz]
    known: Callable[[AnyBranch], dict[str, Any]]
    quotient: bool


def _residual_forward(branch, x, solver):
    del solver
    return residual.forward(branch, x), x


BLOCKS = {
    "residual": BlockKind(residual.residual_bijection, _residual_forward, block_bounds, residual.known, quotient=False),
    "monotone": BlockKind(monotone.monotone_bijection, monotone.forward, monotone_block_bounds, monotone.known, quotient=True),
}


def check_name(name: str) -> None:
    """Raises ``ValueError`` unless there is such a kind of block."""
    if name not in BLOCKS:
        raise ValueError(f"block must be one of {', '.join(BLOCKS)}, got {name!r}")
