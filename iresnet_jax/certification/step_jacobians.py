r"""Dense Jacobians of a flow's steps in float64, how wrong they may be, and how fast they vary.

``J_t = (I + J_g(u)) diag(s)`` with ``u = s (x + b)``. ``J_g = W_n D_n ... W_1 D_1`` is a product of the layers and of slopes
that are known to nearly all their bits, see `trajectory`.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from iresnet_jax.branches.feedforward import FeedforwardSpec
from iresnet_jax.branches.layers import LayerSpec
from iresnet_jax.certification.trajectory import PreciseStage
from iresnet_jax.maths import activations
from iresnet_jax.maths.enclosures.precise_activations import SLOPE_ERROR
from iresnet_jax.maths.enclosures.upward_rounding import UP, U, gamma
from iresnet_jax.maths.lipschitz_bounds import branch_jacobian_bound

_CHUNK_BYTES = 2**26  # of the tangents of one hidden layer that are computed together


class StepConstants(NamedTuple):
    """Guaranteed constants of the steps of a flow, one each.

    Attributes:
        second: Lipschitz constant of the Jacobian; infinite where a slope jumps.
        branch: Lipschitz constant of the branch.
        largest_scale: Largest scale of the ActNorm.
        inverse: Lipschitz constant of the step's inverse, ``1 / (1 - L)`` over the least scale.
        own_error: Bound of the 2-norm of the error of `step_jacobians` for exact slopes.
        slope_factor: What an error of all slopes is multiplied by in that norm.
        steepest: Largest Lipschitz constant of a slope.
    """

    second: Float[np.ndarray, " t"]
    branch: Float[np.ndarray, " t"]
    largest_scale: Float[np.ndarray, " t"]
    inverse: Float[np.ndarray, " t"]
    own_error: Float[np.ndarray, " t"]
    slope_factor: Float[np.ndarray, " t"]
    steepest: Float[np.ndarray, " t"]

    def jacobian_errors(self, argument_errors: Float[np.ndarray, "... t"]) -> Float[np.ndarray, "... t"]:
        """Bounds of the error of `step_jacobians` in the 2-norm, for such errors of the activations' arguments."""
        slopes = 2 * SLOPE_ERROR + self.steepest * argument_errors
        return (self.own_error + self.slope_factor * slopes) * UP


def step_constants(
    stages: Sequence[PreciseStage], kernels: Sequence[Mapping[str, Any]], lipschitz: Sequence[Any]
) -> StepConstants:
    """The constants of all steps.

    Args:
        stages: The steps in double-double, with the norms of their layers.
        kernels: Kernels of the layers, by stage and layer, ``(k, ..., cout)``.
        lipschitz: Bounds of the branches, by stage.
    """
    rows = []
    for stage, own, of_branches in zip(stages, kernels, lipschitz, strict=True):
        scales = stage.scale.high.reshape(len(stage.scale.high), -1) * (1 + 4 * U)
        on_host = {name: np.asarray(kernel, np.float64) for name, kernel in own.items()}
        bounds = np.asarray(of_branches, np.float64)
        rows += [
            _constants(stage, {name: kernel[k] for name, kernel in on_host.items()}, k, scales[k], float(bounds[k]))
            for k in range(len(scales))
        ]
    return StepConstants(*np.array(rows).T)


def _constants(stage: PreciseStage, kernels, k: int, scale: np.ndarray, lipschitz: float) -> tuple[float, ...]:
    d, activation = math.prod(stage.branch.in_shape), activations.get(stage.branch.activation)
    slopes, rows, growth, rounding, num_activated = [], [], 1.0, 0.0, 0
    for layer in stage.layers:
        steepness = 0.0
        if layer.spec.activated:
            known = activation.slope_lipschitz
            sharpness = 1.0 if layer.sharpness is None else float(np.max(layer.sharpness.high[k])) * UP
            steepness = math.inf if known is None else known * sharpness * UP
            num_activated += 1
        slopes.append(steepness)
        matrix = np.abs(kernels[layer.spec.name])
        by_output = matrix.reshape(-1, matrix.shape[-1])
        rows.append(
            layer.norm[k] if taps_meet(stage.branch, layer.spec) else float(np.sqrt(np.max(np.sum(by_output**2, axis=0)))) * UP
        )
        by_input = matrix.sum(axis=-1).reshape(-1, matrix.shape[-2]).sum(axis=0)
        size = float(np.sqrt(np.max(by_output.sum(axis=0)) * np.max(by_input))) * UP
        growth *= max(size, layer.norm[k])
        rounding += gamma(len(by_output) + 2)
    largest, least = float(np.max(scale)), float(np.min(scale)) * (1 - 16 * U)
    second = branch_jacobian_bound([float(layer.norm[k]) for layer in stage.layers], slopes, rows) * largest**2 * UP
    own_error = largest * math.sqrt(d) * (growth * rounding + 4 * U * (1 + growth)) * UP
    slope_factor = 2 * largest * math.sqrt(d) * growth * num_activated * UP
    inverse = UP / ((1 - lipschitz) * least) if lipschitz < 1 and least > 0 else math.inf
    return second, lipschitz, largest, inverse, own_error, slope_factor, max(slopes)


def taps_meet(branch: FeedforwardSpec, layer: LayerSpec) -> bool:
    """Whether two taps of a layer read the same entry, as on a torus smaller than the kernel: rows are sums of taps then."""
    if len(layer.kernel_shape) == 2 or branch.padding != "CIRCULAR":
        return False
    return any(size < taps for size, taps in zip(branch.in_shape[:2], layer.kernel_shape[:2], strict=True))


@functools.partial(jax.jit, static_argnums=0)
def step_jacobians(
    branch: FeedforwardSpec, kernels: Mapping[str, Array], scale: Float[Array, "k d"], slopes: Sequence[Array | None]
) -> Float[Array, "k d d"]:
    """The Jacobians of the steps of a stage at one point each: tangents of all unit vectors, some at a time.

    Args:
        branch: Architecture of the branches.
        kernels: Kernels of their layers.
        scale: Scales of the ActNorms, one an entry.
        slopes: Slopes in front of each layer, ``(k, ...)``.
    """
    d = scale.shape[1]
    widest = max(math.prod(layer.in_shape) for layer in branch.layers)
    chunk = max(1, min(d, _CHUNK_BYTES // (8 * widest)))

    def of_step(own):
        kernels, scale, slopes = own

        def of_chunk(first):
            tangents = jax.nn.one_hot(first + jnp.arange(chunk), d, dtype=scale.dtype).reshape(chunk, *branch.in_shape)
            for layer, slope in zip(branch.layers, slopes, strict=True):
                if slope is not None:
                    copies = slope.shape[-1] // tangents.shape[-1]
                    tangents = jnp.concatenate([tangents] * copies, axis=-1) * slope[None]
                tangents = layer.linear_map()(kernels[layer.name], tangents)
            return tangents.reshape(chunk, d)

        transposed = lax.map(of_chunk, jnp.arange(0, d, chunk)).reshape(-1, d)[:d]
        return (jnp.eye(d) + transposed.T) * scale[None]

    return lax.map(of_step, (dict(kernels), scale, tuple(slopes)))
