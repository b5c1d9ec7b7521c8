r"""Jacobians of a flow's steps in float64 at given slopes, how wrong they may be, and how fast they vary.

A step is ``F_t(x) = u + g(u)`` with ``u = s (x + b)``, so ``J_t = (I + J_g(u)) diag(s)``. ``J_g = W_n D_n ... W_1 D_1`` is a
product of the layers and of slopes ``D_i`` that are known to nearly all their bits, see `residuals`.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from iresnet_jax.branches.layers import LayerSpec
from iresnet_jax.certification.residuals import Layer, PreciseStage
from iresnet_jax.certification.trajectory import Place, over_steps
from iresnet_jax.maths import activations
from iresnet_jax.maths.fixed_point import Settings, solve_linear
from iresnet_jax.maths.lipschitz_bounds import branch_jacobian_bound
from iresnet_jax.maths.precise_activations import SLOPE_ERROR
from iresnet_jax.maths.upward_rounding import UP, U, gamma

_MEMORY, _MOST_EVALS = 8, 300  # of the linear solves of a Newton step
_CHUNK_BYTES = 2**26  # of the tangents of one hidden layer that are computed together

FlowSlopes = tuple[tuple[Array | np.ndarray | None, ...], ...]  # (b, k, ...), by stage and layer
Slopes = Sequence[Array | np.ndarray | None]  # in front of each layer of a branch; None where it has no activation


class LinearSteps(NamedTuple):
    """The steps of a stage as linear maps for given slopes, which scans run over: a slice is one step.

    Attributes:
        place: Where they act, and their layers.
        kernels: Kernels of the layers, ``(k, ...)``.
        scale: Scales of the ActNorms, ``(k, ...)`` as the branches' inputs.
        lipschitz: Bounds of the branches.
    """

    place: Place
    kernels: tuple[Array, ...]
    scale: Float[Array, "k ..."]
    lipschitz: Float[Array, " k"]

    @classmethod
    def of(cls, stage: PreciseStage) -> "LinearSteps":
        """Those of the steps in double-double; under ``enable_x64``."""
        scale = np.broadcast_to(stage.scale.high[:, 0], (stage.num_blocks, *stage.place.in_shape))
        kernels = tuple(jnp.asarray(layer.kernel) for layer in stage.layers)
        return cls(stage.place, kernels, jnp.asarray(scale), jnp.asarray(stage.lipschitz))

    def push(self, slopes: Slopes, u: Float[Array, "n ..."]) -> Float[Array, "n ..."]:
        """``J_g u`` of one step at slopes ``(n, ...)`` or ``(1, ...)``."""
        for layer, kernel, slope in zip(self.place.layers, self.kernels, slopes, strict=True):
            if slope is not None:
                u = jnp.concatenate([u] * _copies(layer), axis=-1) * slope
            u = layer.linear_map()(kernel, u)
        return u

    def pull(self, slopes: Slopes, z: Float[Array, "n ..."]) -> Float[Array, "n ..."]:
        """``J_g^T z`` of one step."""
        for layer, kernel, slope in reversed(list(zip(self.place.layers, self.kernels, slopes, strict=True))):
            example = jax.ShapeDtypeStruct((len(z), *layer.in_shape), z.dtype)
            (z,) = jax.linear_transpose(functools.partial(layer.linear_map(), kernel), example)(z)
            if slope is not None:
                z = (z * slope).reshape(*z.shape[:-1], _copies(layer), -1).sum(axis=-2)
        return z


def _copies(layer: LayerSpec) -> int:
    assert layer.activation is not None
    return activations.get(layer.activation).channel_factor


def alike(slopes: Slopes) -> Slopes:
    """Slopes of one example, for all vectors."""
    return [None if slope is None else slope[None] for slope in slopes]


def step_jacobians(steps: LinearSteps, slopes: Slopes) -> Float[Array, "k d d"]:
    """The Jacobians ``(I + J_g) diag(s)`` of the steps of a stage at one point each, from tangents of all unit vectors.

    Args:
        steps: The steps.
        slopes: Slopes in front of each layer, ``(k, ...)``.
    """
    place, d = steps.place, len(steps.place.entries)
    chunk = max(1, min(d, _CHUNK_BYTES // (8 * max(math.prod(layer.in_shape) for layer in place.layers))))

    def of_step(own):
        step, slopes = own

        def of_chunk(first):
            units = jax.nn.one_hot(first + jnp.arange(chunk), d, dtype=step.scale.dtype)
            return step.push(alike(slopes), units.reshape(chunk, *place.in_shape)).reshape(chunk, d)

        transposed = lax.map(of_chunk, jnp.arange(0, d, chunk)).reshape(-1, d)[:d]
        return (jnp.eye(d) + transposed.T) * step.scale.reshape(1, d)

    return lax.map(of_step, (steps, tuple(slopes)))


@jax.jit
def newton_step(steps: Sequence[LinearSteps], slopes: FlowSlopes, residuals: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
    """The correction ``e_t = J_t^-1 (e_{t+1} - r_t)`` of every point of a trajectory but the last, where ``e_T = 0``.

    It promises nothing: residuals say how good it was.
    """

    def step(later, own):
        maps, slopes, r = own
        settings = Settings(maps.lipschitz, _MOST_EVALS, _MEMORY)
        solved, _ = solve_linear(lambda u: maps.push(slopes, u), maps.place.read(later - r), settings)
        now = maps.place.write(later, solved / maps.scale[None])
        return now, now

    stages = _stages(steps, slopes, residuals)
    _, corrections = over_steps(step, jnp.zeros_like(residuals[:, 0]), stages, reverse=True)
    return jnp.moveaxis(jnp.concatenate(corrections), 0, 1)


def _stages(steps: Sequence[LinearSteps], slopes: FlowSlopes, residuals: Float[Array, "b t d"]) -> list[Any]:
    """The steps of each stage with slopes and residuals, the axis of steps in front."""
    by_step = jax.tree.map(lambda own: jnp.moveaxis(own, 1, 0), (slopes, residuals))
    ends = np.cumsum([len(own.lipschitz) for own in steps])[:-1]
    return list(zip(steps, by_step[0], jnp.split(by_step[1], ends), strict=True))


class StepConstants(NamedTuple):
    """Guaranteed constants of the steps of a flow, one each.

    Attributes:
        branch: Lipschitz constant of the branch.
        curvature: Lipschitz constant of the branch's Jacobian; infinite where a slope jumps.
        largest_scale: Largest scale of the ActNorm.
        least_scale: Least one.
        own_error: Bound of the 2-norm of the error of the branch's dense Jacobian for exact slopes.
        slope_factor: What an error of all slopes is multiplied by in that norm.
        steepest: Largest Lipschitz constant of a slope.
    """

    branch: Float[np.ndarray, " t"]
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
        return (1 + self.branch) * self.largest_scale * UP

    @property
    def inverse(self) -> Float[np.ndarray, " t"]:
        """Lipschitz constant of the step's inverse, ``1 / (1 - L)`` over the least scale."""
        gap = (1 - self.branch) * self.least_scale
        return np.where(gap > 0, UP / np.where(gap > 0, gap, 1), np.inf)

    @property
    def unscaled(self) -> "StepConstants":
        """The constants of the maps ``I + g`` alone, without the scales of their ActNorms."""
        ones = np.ones_like(self.branch)
        return self._replace(largest_scale=ones, least_scale=ones)

    def slope_errors(self, argument_errors: Float[np.ndarray, "... t"]) -> Float[np.ndarray, "... t"]:
        """Bounds of the errors of slopes, for such errors of the activations' arguments."""
        return 2 * SLOPE_ERROR + self.steepest * argument_errors

    def jacobian_errors(self, argument_errors: Float[np.ndarray, "... t"]) -> Float[np.ndarray, "... t"]:
        """Bounds of the error of `step_jacobians` in the 2-norm, for such errors of the activations' arguments."""
        of_branch = self.own_error + self.slope_factor * self.slope_errors(argument_errors)
        return of_branch * self.largest_scale * UP


def constants_of(stages: Sequence[PreciseStage]) -> StepConstants:
    """The constants of all steps."""
    rows = [_constants(stage, k) for stage in stages for k in range(stage.num_blocks)]
    return StepConstants(*np.array(rows, np.float64).T)


def _constants(stage: PreciseStage, k: int) -> tuple[float, ...]:
    """The constants of a step.

    A product with a layer errs by at most ``gamma_n |  |W|  |_2`` times the vector's length, with ``n`` terms in a sum, and
    ``|  |W|  |_2^2 <= |W|_1 |W|_inf``, the largest sums of its columns and rows. A dense Jacobian is a pass of ``d`` unit
    vectors. Computed slopes are those of a 1-Lipschitz activation at a computed argument, so an error of all slopes by ``e``
    changes ``J_g`` by at most ``2 e prod |W|`` for each activation, which may have two outputs.
    """
    norms, rows, curvatures, growth, pushed = [], [], [], 1.0, 0.0
    for layer in stage.layers:
        size, norm = np.abs(layer.kernel[k]), float(layer.norm[k])
        by_output = size.reshape(-1, size.shape[-1])
        by_input = size.sum(axis=-1).reshape(-1, size.shape[-2]).sum(axis=0)
        absolute = float(np.sqrt(np.max(by_output.sum(axis=0)) * np.max(by_input))) * UP
        row = float(np.sqrt(np.max(np.sum(by_output**2, axis=0)))) * UP
        norms.append(norm)
        rows.append(norm if taps_meet(layer.spec) else min(row, norm))
        curvatures.append(_curvature(layer, k))
        growth *= max(absolute, norm, 1.0)
        pushed += gamma(len(by_output) + 2)
    scales = stage.scale.high[k]
    largest, least = float(np.max(scales)) * (1 + 4 * U), float(np.min(scales)) * (1 - 16 * U)
    slopes = [slope or 0.0 for slope in curvatures]
    curvature = branch_jacobian_bound(norms, slopes, rows) * UP
    own_error = math.sqrt(math.prod(stage.place.in_shape)) * (growth * pushed + 4 * U * (1 + growth)) * UP
    slope_factor = 2 * math.prod(norms) * sum(slope is not None for slope in curvatures) * UP
    return (float(stage.lipschitz[k]), curvature, largest, least, own_error, slope_factor, max(slopes))


def _curvature(layer: Layer, k: int) -> float | None:
    """Lipschitz constant of the slope of the activation in front of a layer; None without one, infinite where it jumps."""
    if layer.spec.activation is None:
        return None
    known = activations.get(layer.spec.activation).slope_lipschitz
    sharpness = 1.0 if layer.sharpness is None else float(np.max(layer.sharpness.high[k])) * UP
    return math.inf if known is None else known * sharpness * UP


def taps_meet(layer: LayerSpec) -> bool:
    """Whether two taps of a layer read the same entry, as on a torus smaller than the kernel: rows are sums of taps then."""
    if len(layer.kernel_shape) == 2 or layer.padding != "CIRCULAR":
        return False
    return any(size < taps for size, taps in zip(layer.in_shape[:2], layer.kernel_shape[:2], strict=True))
