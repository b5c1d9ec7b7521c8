"""A residual block of a trained model in float64, where examples pass through it."""

from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, Num

from iresnet_jax.branches.branch import Branch
from iresnet_jax.certification.trajectory import in_float64
from iresnet_jax.models.flow import branch_inputs


class PlacedBlock(NamedTuple):
    """A block ``x + g(x)`` of a model.

    Attributes:
        name: "stage0/block03".
        branch: Its branch ``g``, with weights in float64.
        x: Inputs of the branch.
    """

    name: str
    branch: Branch
    x: Float[Array, "b ..."]

    @property
    def lipschitz_bound(self) -> float:
        """Certified bound of ``Lip(g)``."""
        return float(self.branch.lipschitz_bound)


def loosest_block(model: Any, examples: Num[np.ndarray, "n ..."]) -> PlacedBlock:
    """The residual block of the largest Lipschitz bound, the first if there are several, at the examples.

    Levels are in the middle of their cells. To be called under ``jax.enable_x64``.

    Raises:
        ValueError: If a block of the model is not certified a contraction, or the model depends on contexts.
    """
    flow = model.spec.flow
    model.require_bijection()
    if flow.context_dim:
        raise ValueError("the model takes contexts: this figure is for models without")
    bounds = {
        (stage.name, k): float(bound)
        for stage in flow.layout
        for k, bound in enumerate(np.asarray(model.weights[stage.name].branch.lipschitz_bound))
    }
    name, k = max(bounds, key=lambda place: bounds[place])
    if not bounds[name, k] < 1:
        raise ValueError(f"{name}/block{k:02d} is not certified a contraction: this figure is about bounds below 1")
    weights = in_float64(model.weights)
    inputs = jax.jit(branch_inputs, static_argnums=0)(flow, weights, in_float64(model.preprocess(examples)))
    return PlacedBlock(f"{name}/block{k:02d}", jax.tree.map(lambda leaf: leaf[k], weights[name].branch), inputs[name][k])
