r"""Norms of the inverses of a flow's steps along a trajectory, from banded matrices: for large flows.

A step is ``J = (I + G) diag(s)``. With the least eigenvalue ``lambda`` of the symmetric part of ``I + G``,
``|J^-1|_2 <= 1 / (lambda min s)``, see `iresnet_jax.maths.trajectories.least_eigenvalue`. In trained blocks it is near the
truth, and ``1 / (1 - L)`` several times that. A Cholesky factorisation of a banded matrix gives it.
"""

import functools
import math
from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Float

from iresnet_jax.certification.jacobians import LinearSteps, alike
from iresnet_jax.certification.prepared import PreparedFlow
from iresnet_jax.certification.residuals import PreciseStage, Residuals
from iresnet_jax.maths import activations
from iresnet_jax.maths.enclosures.upward_rounding import UP
from iresnet_jax.maths.trajectories.least_eigenvalue import least_eigenvalue_bound, least_eigenvalue_estimate
from iresnet_jax.maths.trajectories.row_blocks import RowBlocks, behind_activation, identity_and_symmetric_part, layer_blocks

MOST_ENTRIES = 2**26  # of a step's Jacobian that is computed


def step_norms(flow: PreparedFlow, found: Residuals) -> tuple[Float[np.ndarray, "b t"], Float[np.ndarray, "b t"]]:
    """Norms ``|J_t^-1|_2`` of the steps' inverses along trajectories, from the slopes in their residuals.

    Returns:
        Guaranteed bounds, the global one for a step whose slopes jump; and estimates, by Lanczos' method where a Jacobian has
        too many entries, which are no bounds, and the bounds elsewhere.
    """
    constants = flow.constants
    distances = constants.unscaled.jacobian_errors(found.argument_errors) * UP
    bounds = np.broadcast_to(constants.inverse, distances.shape).copy()
    estimates, t = bounds.copy(), 0
    for stage, of_stage, steps in zip(flow.stages, found.slopes, flow.steps, strict=True):
        for k in range(stage.num_blocks):
            layers, margin = layers_of_step(stage, k), 1 - constants.branch[t]
            for i in range(len(bounds)):
                slopes = tuple(None if own is None else own[i, k] for own in of_stage)
                if not (np.isfinite(constants.second[t]) and all(s is None or np.all(np.isfinite(s)) for s in slopes)):
                    continue
                if layers:
                    symmetric = identity_and_symmetric_part(jacobian_blocks(stage, layers, slopes))
                    estimate = least = max(least_eigenvalue_bound(symmetric, margin) - distances[i, t], margin)
                else:
                    step = jax.tree.map(lambda a, k=k: a[k], steps)
                    estimate, _ = least_eigenvalue_estimate(
                        functools.partial(_symmetric_part, step, slopes), len(stage.place.entries)
                    )
                    least = margin
                bounds[i, t] = constants.inverse[t] * margin / least * UP
                estimates[i, t] = constants.inverse[t] * margin / max(estimate, margin) * UP
            t += 1
    return bounds, estimates


def layers_of_step(stage: PreciseStage, k: int) -> tuple[RowBlocks, ...]:
    """The layers of a step as matrices; none if its Jacobian has more than `MOST_ENTRIES` entries."""
    if num_entries(stage) > MOST_ENTRIES:
        return ()
    return tuple(layer_blocks(layer.kernel[k], layer.spec.in_shape, layer.spec.padding) for layer in stage.layers)


def num_entries(stage: PreciseStage) -> int:
    """Numbers in the banded Jacobian of a branch."""
    shapes = [layer.spec.kernel_shape for layer in stage.layers]
    if any(len(shape) == 2 for shape in shapes):
        return math.prod(stage.place.in_shape) ** 2
    height, width, channels = stage.place.in_shape
    seen = min(height, 1 + sum(taps - 1 for taps, *_ in shapes))
    return height * seen * (width * channels) ** 2


def jacobian_blocks(stage: PreciseStage, layers: Sequence[RowBlocks], slopes: Sequence[np.ndarray | None]) -> RowBlocks:
    """``J_g = W_n D_n ... W_1 D_1`` of one branch at slopes of one example, in front of each layer.

    Every entry of a product is a sum of at most as many terms as a layer has taps and channels, which `StepConstants` bounds.
    """
    product = None
    for layer, matrix, slope in zip(stage.layers, layers, slopes, strict=True):
        if slope is not None and layer.spec.activation is not None:
            channels = slope.shape[-1] // activations.get(layer.spec.activation).channel_factor
            matrix = behind_activation(matrix, slope, channels)
        product = matrix if product is None else matrix @ product
    assert product is not None
    return product


@jax.jit
def _symmetric_part(step: LinearSteps, slopes, v):
    """``(I + (G + G^T) / 2) v`` of one example."""
    u, slopes = v.reshape(1, *step.place.in_shape), alike(slopes)
    return (u + (step.push(slopes, u) + step.pull(slopes, u)) / 2).ravel()
