"""The layers of today's branches in the form of tomorrow's; goes when branches are values."""

from typing import Any, NamedTuple

from iresnet_jax.branches.branch import LayerSpec as _Spec
from iresnet_jax.branches.branch import linear_map


class LayerSpec(NamedTuple):
    """One linear layer of a branch and the activation in front of it."""

    name: str
    kernel_shape: tuple[int, ...]
    in_shape: tuple[int, ...]
    activation: str | None
    padding: Any = "SAME"

    @property
    def activated(self) -> bool:
        """Whether there is an activation."""
        return self.activation is not None

    def linear_map(self):
        """``(kernel, x) -> W x``."""
        return linear_map(_Spec(self.name, self.kernel_shape, self.in_shape, self.activated), self.padding)


def layers_of(branch: Any) -> tuple[LayerSpec, ...]:
    """The layers."""
    return tuple(
        LayerSpec(one.name, one.kernel_shape, one.in_shape, branch.activation if one.activated else None, branch.padding)
        for one in branch.layers
    )
