"""Kinds of branches of a stage: a registered name, a `BranchSpec`, or a user's function that makes
modules.
"""

import math
from typing import Any

from iresnet_jax.branches.branch import BranchSpec
from iresnet_jax.branches.feedforward import FeedforwardSpec
from iresnet_jax.branches.own import Make, OwnSpec
from iresnet_jax.branches.potential import PotentialSpec
from iresnet_jax.branches.sandwich import SandwichSpec

Kind = type[BranchSpec] | Make
KINDS: dict[str, Kind] = {  # `register` adds; a name means one kind
    "feedforward": FeedforwardSpec,
    "sandwich": SandwichSpec,
    "potential": PotentialSpec,
}


def register(name: str, kind: Kind) -> None:
    """Gives a kind of branch a name, by which ``StageSpec(kind=name)``, configs and files know it
    in this process.

    Args:
        name: The name.
        kind: A class of `BranchSpec`, or a function ``key -> module`` as `StageSpec.branch` takes
            it.
    """
    if KINDS.get(name, kind) is not kind:
        raise ValueError(
            f"there is a kind of branch {name!r} already, {KINDS[name]!r}: choose another name"
        )
    KINDS[name] = kind


def get(name: str) -> Kind:
    """The kind with this name."""
    if name not in KINDS:
        raise ValueError(
            f"kind must be one of {', '.join(KINDS)}, got {name!r}: register your own kind "
            "by kinds.register(name, kind)"
        )
    return KINDS[name]


def branch_of(stage: Any, shape: tuple[int, ...], context_dim: int) -> BranchSpec:
    """The branch of a `StageSpec` for examples of this shape, which it flattens if its ``in_shape``
    is flat.
    """
    chosen = get(stage.kind) if stage.branch is None else stage.branch
    flat = (math.prod(shape),)
    if isinstance(chosen, BranchSpec):
        return chosen
    if isinstance(chosen, type) and issubclass(chosen, BranchSpec):
        return chosen.of_stage(stage, flat if stage.kernel_sizes is None else shape, context_dim)
    return OwnSpec(shape, make=chosen, context_dim=context_dim)
