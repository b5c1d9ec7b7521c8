r"""Guaranteed constants of a flow's steps, everywhere and along a trajectory.

A step is ``F_t(x) = u + g(u)`` with ``u = s (x + b)``, so ``J_t = (I + J_g(u)) diag(s)``. ``J_g =
W_n D_n ... W_1 D_1`` is a product of the layers and of the slopes ``D_i``, which are known to
nearly full precision, see `residuals`.

With the least eigenvalue ``lambda`` of the symmetric part of ``I + J_g``, ``|J_t^-1|_2 <= 1 /
(lambda min s)``, see `iresnet_jax.maths.least_eigenvalue`. In trained blocks this bound is near the
truth, and ``1 / (1 - L)`` is several times larger.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from iresnet_jax.certification.residuals import Layer, PreciseStage, Residuals
from iresnet_jax.maths import activations
from iresnet_jax.maths.double_double import SLOPE_ERROR
from iresnet_jax.maths.least_eigenvalue import (
    RowBlocks,
    behind_activation,
    identity_and_symmetric_part,
    layer_blocks,
    least_eigenvalue_bound,
)
from iresnet_jax.maths.lipschitz_bounds import branch_jacobian_bound
from iresnet_jax.maths.upward_rounding import UP, U, gamma

MOST_ENTRIES = 2**26  # largest size of a step's Jacobian that is computed


class StepConstants(NamedTuple):
    """Guaranteed constants of the steps of a flow, one entry per step.

    Attributes:
        branch: Lipschitz constant of the branch.
        block: Lipschitz constant of ``x + g(x)``.
        curvature: Lipschitz constant of the branch's Jacobian; infinite where a slope jumps.
        largest_scale: Largest scale of the ActNorm.
        least_scale: Least scale of the ActNorm.
        own_error: Bound of the 2-norm of the error of the branch's computed Jacobian for exact
            slopes.
        slope_factor: Factor from an error of all slopes to the error of the Jacobian, in the
            2-norm.
        steepest: Largest Lipschitz constant of a slope.
    """

    branch: Float[np.ndarray, " t"]
    block: Float[np.ndarray, " t"]
    curvature: Float[np.ndarray, " t"]
    largest_scale: Float[np.ndarray, " t"]
    least_scale: Float[np.ndarray, " t"]
    own_error: Float[np.ndarray, " t"]
    slope_factor: Float[np.ndarray, " t"]
    steepest: Float[np.ndarray, " t"]

    @property
    def second(self) -> Float[np.ndarray, " t"]:
        """Lipschitz constant of the step's Jacobian; infinite where a slope jumps."""
        return self.curvature * self.largest_scale**2 * UP

    @property
    def stretch(self) -> Float[np.ndarray, " t"]:
        """Lipschitz constant of the step."""
        return self.block * self.largest_scale * UP

    @property
    def inverse(self) -> Float[np.ndarray, " t"]:
        """Lipschitz constant of the step's inverse, ``1 / (1 - L)`` over the least scale."""
        gap = (1 - self.branch) * self.least_scale
        return np.where(gap > 0, UP / np.where(gap > 0, gap, 1), np.inf)

    def jacobian_errors(
        self, argument_errors: Float[np.ndarray, "... t"]
    ) -> Float[np.ndarray, "... t"]:
        """Bounds of the error of `jacobian_blocks` in the 2-norm, for given errors of the
        activations' arguments.
        """
        slope_errors = 2 * SLOPE_ERROR + self.steepest * argument_errors
        return (self.own_error + self.slope_factor * slope_errors) * UP


def constants_of(stages: Sequence[PreciseStage]) -> StepConstants:
    """The constants of all steps."""
    rows = [_constants(stage, k) for stage in stages for k in range(stage.num_blocks)]
    num = len(StepConstants._fields)
    return StepConstants(*np.array(rows, np.float64).reshape(-1, num).T)


def _constants(stage: PreciseStage, k: int) -> tuple[float, ...]:
    """The constants of a step.

    A product with a layer errs by at most ``gamma_n |  |W|  |_2`` times the vector's length, with
    ``n`` terms in a sum, and ``|  |W|  |_2^2 <= |W|_1 |W|_inf``, the largest sums of its columns
    and rows. A Jacobian is a product with ``d`` unit vectors. Computed slopes belong to a
    1-Lipschitz activation at a computed argument, so an error ``e`` of all slopes changes ``J_g``
    by at most ``2 e prod |W|`` for each activation, which may have two outputs.
    """
    norms, curvatures, growth, pushed = [], [], 1.0, 0.0
    for layer in stage.layers:
        size, norm = np.abs(layer.kernel[k]), float(layer.norm[k])
        by_output = size.reshape(-1, size.shape[-1])
        by_input = size.sum(axis=-1).reshape(-1, size.shape[-2]).sum(axis=0)
        absolute = float(np.sqrt(np.max(by_output.sum(axis=0)) * np.max(by_input))) * UP
        norms.append(norm)
        curvatures.append(_curvature(layer, k))
        growth *= max(absolute, norm, 1.0)
        pushed += gamma(len(by_output) + 2)
    scales = stage.scale.high[k]
    largest, least = float(np.max(scales)) * (1 + 4 * U), float(np.min(scales)) * (1 - 16 * U)
    slopes = [slope or 0.0 for slope in curvatures]
    curvature = branch_jacobian_bound(norms, slopes) * UP
    own_error = (
        math.sqrt(math.prod(stage.place.in_shape)) * (growth * pushed + 4 * U * (1 + growth)) * UP
    )
    slope_factor = 2 * math.prod(norms) * sum(slope is not None for slope in curvatures) * UP
    constants = float(stage.lipschitz[k]), float(stage.stretch[k])
    return (*constants, curvature, largest, least, own_error, slope_factor, max(slopes))


def _curvature(layer: Layer, k: int) -> float | None:
    """Lipschitz constant of the slope of the activation in front of a layer; None without one,
    infinite where it jumps.
    """
    if layer.spec.activation is None:
        return None
    known = activations.get(layer.spec.activation).slope_lipschitz
    sharpness = 1.0 if layer.sharpness is None else float(np.max(layer.sharpness.high[k])) * UP
    return math.inf if known is None else known * sharpness * UP


def step_norms(
    stages: Sequence[PreciseStage], constants: StepConstants, found: Residuals
) -> Float[np.ndarray, "b t"]:
    """Bounds of the norms ``|J_t^-1|_2`` of the steps' inverses along trajectories, from the slopes
    in `Residuals`.

    The global bound replaces the norm of a step whose slopes jump, or whose Jacobian has more than
    `MOST_ENTRIES` entries.
    """
    errors = constants.jacobian_errors(found.argument_errors)
    bounds, t = np.broadcast_to(constants.inverse, errors.shape).copy(), 0
    for stage, of_stage in zip(stages, found.slopes, strict=True):
        for k in range(stage.num_blocks):
            if np.isfinite(constants.curvature[t]) and _num_entries(stage) <= MOST_ENTRIES:
                layers = [
                    layer_blocks(layer.kernel[k], layer.spec.in_shape, layer.spec.padding)
                    for layer in stage.layers
                ]
                margin = 1 - constants.branch[t]
                for i in range(len(bounds)):
                    slopes = [None if own is None else own[i, k] for own in of_stage]
                    if all(slope is None or np.all(np.isfinite(slope)) for slope in slopes):
                        symmetric = identity_and_symmetric_part(
                            jacobian_blocks(stage, layers, slopes)
                        )
                        least = max(
                            least_eigenvalue_bound(symmetric, margin) - errors[i, t], margin
                        )
                        bounds[i, t] = constants.inverse[t] * margin / least * UP
            t += 1
    return bounds


def _num_entries(stage: PreciseStage) -> int:
    """Numbers in the banded Jacobian of a branch."""
    shapes = [layer.spec.kernel_shape for layer in stage.layers]
    if any(len(shape) == 2 for shape in shapes):
        return math.prod(stage.place.in_shape) ** 2
    height, width, channels = stage.place.in_shape
    seen = min(height, 1 + sum(taps - 1 for taps, *_ in shapes))
    return height * seen * (width * channels) ** 2


def jacobian_blocks(
    stage: PreciseStage, layers: Sequence[RowBlocks], slopes: Sequence[np.ndarray | None]
) -> RowBlocks:
    """``J_g = W_n D_n ... W_1 D_1`` of one branch at slopes of one example, in front of each layer.

    Every entry of a product is a sum of at most as many terms as a layer has taps and channels,
    which `StepConstants` bounds.
    """
    product = None
    for layer, matrix, slope in zip(stage.layers, layers, slopes, strict=True):
        if slope is not None and layer.spec.activation is not None:
            channels = slope.shape[-1] // activations.get(layer.spec.activation).channel_factor
            matrix = behind_activation(matrix, slope, channels)
        product = matrix if product is None else matrix @ product
    assert product is not None
    return product
