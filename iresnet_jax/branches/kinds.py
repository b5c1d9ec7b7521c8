"""The kinds of branches by the names that `StageSpec.kind` knows them by: a new kind is one line here."""

from iresnet_jax.branches.branch import BranchSpec
from iresnet_jax.branches.feedforward import FeedforwardSpec

KINDS: dict[str, type[BranchSpec]] = {"feedforward": FeedforwardSpec}


def get(name: str) -> type[BranchSpec]:
    """The kind of that name.

    Raises:
        ValueError: If there is none.
    """
    if name not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {name!r}: a kind of one's own is added to kinds.KINDS")
    return KINDS[name]
