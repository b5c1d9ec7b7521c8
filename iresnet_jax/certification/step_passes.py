r"""Passes of vectors through the steps of a flow, backward and forward, with what their rounding may add.

A step is ``F(x) = u + W_n D_n(... W_1 D_1(u))`` with ``u = s (x + b)``, linearized with slopes ``D_i`` that are given, see
`trajectory`. Results are what `iresnet_jax.maths.chains.margin_bounds` takes.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from iresnet_jax.branches.layers import LayerSpec
from iresnet_jax.certification.step_jacobians import taps_meet
from iresnet_jax.certification.trajectory import PreciseStage, entries_of
from iresnet_jax.maths import activations
from iresnet_jax.maths.chains.margin_bounds import Step
from iresnet_jax.maths.enclosures.upward_rounding import UP, U, frobenius_bound, gamma
from iresnet_jax.maths.norms.convolution_certificate import dense_norm_bound
from iresnet_jax.models.architecture import FlowSpec

Slopes = tuple[tuple[Array | None, ...], ...]  # (k, ...) of each layer of each stage

_NUM_SQUARINGS = 5  # of Gram matrices: the norm of one with 784 columns is at most 5 % too large


class Group(NamedTuple):
    """The steps of a stage.

    Attributes:
        kernels: Kernels of the layers, ``(k, ...)``.
        scale: Scales of the ActNorms, one an entry.
    """

    kernels: Mapping[str, Array]
    scale: Float[Array, "k d"]


class Backward(NamedTuple):
    """Gradients of ``c`` functions of the last point.

    Attributes:
        points: In every point of the trajectory.
        outputs: In the outputs of the activations, by stage and layer, ``(k, c, ...)``; None in front of a layer without.
    """

    points: Float[Array, "t+1 c d"]
    outputs: tuple[tuple[Array | None, ...], ...]


class Forward(NamedTuple):
    """Norms of Jacobians in the perturbation, see `iresnet_jax.maths.chains.margin_bounds.Tangents`.

    Attributes:
        points: Bounds of ``|P_t|_2``.
        frobenius: Norms of ``P_t``.
        arguments: Bounds of ``|A|_2``, activation by activation.
        fourth: Bounds of ``|A d|_4^2`` for ``|d| = 1``, as ``sum_k (A d)_k^4 <= sum_k |A_k|^2 (A d)_k^2``.
        forms: Bounds of ``|M|_2`` of each function.
    """

    points: Float[Array, " t+1"]
    frobenius: Float[Array, " t+1"]
    arguments: Float[Array, " a"]
    fourth: Float[Array, " a"]
    forms: Float[Array, " c"]


def group_and_steps(stage: PreciseStage, kernels: Mapping[str, Array]) -> tuple[Group, list[Step]]:
    """The steps of a stage for passes through them, and their constants.

    Args:
        stage: The steps in double-double.
        kernels: Kernels of the layers, ``(k, ...)``, in float64.
    """
    k = len(stage.layers[0].norm)
    scale = np.broadcast_to(stage.scale.high[:, 0], (k, *stage.branch.in_shape)).reshape(k, -1)
    known = {name: np.abs(np.asarray(kernel)) for name, kernel in kernels.items()}
    steps = [
        _constants(stage, {name: kernel[i] for name, kernel in known.items()}, float(np.max(scale[i])), i) for i in range(k)
    ]
    return Group(dict(kernels), jnp.asarray(scale)), steps


def _constants(stage: PreciseStage, sizes: Mapping[str, np.ndarray], scale: float, k: int) -> Step:
    """The constants of a step, from the absolute values of its kernels.

    A product with a layer or its transpose errs by at most ``gamma_n |  |W|  |_2`` times the vector's length, and
    ``|  |W|  |_2^2 <= |W|_1 |W|_inf``, the largest sums of its columns and rows.
    """
    activation = activations.get(stage.branch.activation)
    norms, rows, curvatures, growth, rounding = [], [], [], 1.0, 0.0
    for layer in stage.layers:
        curvature = None
        if layer.spec.activated:
            known = activation.slope_lipschitz
            sharpness = 1.0 if layer.sharpness is None else float(np.max(layer.sharpness.high[k])) * UP
            curvature = math.inf if known is None else known * sharpness * UP
        size, norm = sizes[layer.spec.name], float(layer.norm[k])
        by_output = size.reshape(-1, size.shape[-1])
        by_input = size.sum(axis=-1).reshape(-1, size.shape[-2]).sum(axis=0)
        absolute = float(np.sqrt(np.max(by_output.sum(axis=0)) * np.max(by_input))) * UP
        row = float(np.sqrt(np.max(np.sum(by_output**2, axis=0)))) * UP
        norms.append(norm)
        rows.append(norm if taps_meet(stage.branch, layer.spec) else min(row, norm))
        curvatures.append(curvature)
        growth *= max(absolute, norm, 1.0)
        taps = size.size // (size.shape[-1] * size.shape[-2])
        rounding += gamma(taps * max(size.shape[-2:]) + 4)
    largest = scale * (1 + 4 * U)
    own = largest * (growth * rounding + 8 * U * (1 + growth)) * UP
    return Step(largest, tuple(norms), tuple(rows), tuple(curvatures), own)


def _transposed(layer: LayerSpec, padding, kernel: Array, z: Float[Array, "c ..."]) -> Float[Array, "c ..."]:
    apply = functools.partial(layer.linear_map(), kernel)
    example = jax.ShapeDtypeStruct((len(z), *layer.in_shape), z.dtype)
    return jax.linear_transpose(apply, example)(z)[0]


@functools.partial(jax.jit, static_argnums=0)
def backward(spec: FlowSpec, groups: Sequence[Group], slopes: Slopes, last: Float[Array, "b c d"]) -> Backward:
    """Gradients of functions along trajectories, from those in the last point; results have a leading axis of examples.

    Args:
        spec: Architecture of the flow.
        groups: Its steps.
        slopes: Slopes of the activations, ``(b, k, ...)``.
        last: Gradients in the last point.
    """

    def of_example(own):
        slopes, g = own
        points, outputs = [], []
        for stage, group, of_layers, active in reversed(
            list(zip(spec.layout, groups, slopes, entries_of(spec).active, strict=True))
        ):
            layers = stage.branch.layers

            def step(g, own, stage=stage, layers=layers, active=active):
                kernels, scale, of_layers = own
                z = above = g[:, active].reshape(-1, *stage.branch.in_shape)
                found = []
                for layer, slope in reversed(list(zip(layers, of_layers, strict=True))):
                    z = _transposed(layer, stage.branch.padding, kernels[layer.name], z)
                    found.append(None if slope is None else z)
                    if slope is not None:
                        z = _copies(z * slope[None], activations.get(stage.branch.activation).channel_factor).sum(axis=-2)
                before = g.at[:, active].set((above + z).reshape(len(g), -1) * scale[None])
                return before, (g, tuple(found[::-1]))

            g, (passed, found) = lax.scan(step, g, (dict(group.kernels), group.scale, of_layers), reverse=True)
            points.append(passed)
            outputs.append(found)
        return Backward(jnp.concatenate([g[None], *points[::-1]]), tuple(outputs[::-1]))

    return lax.map(of_example, (slopes, last))


def _copies(values: Float[Array, "... m"], factor: int) -> Float[Array, "... f c"]:
    """The outputs of activations that give several for each input, side by side."""
    return values.reshape(*values.shape[:-1], factor, -1)


def weights_of(outputs: Float[Array, "... m"], name: str) -> Float[Array, "... c"]:
    """``w`` of `maths.chains.margin_bounds` for gradients in the outputs of an activation, one for each of its inputs."""
    activation = activations.get(name)
    own = jnp.maximum(-outputs, 0) if activation.convex else jnp.abs(outputs)
    return _copies(own, activation.channel_factor).sum(axis=-2)


@functools.partial(jax.jit, static_argnums=0)
def forward(
    spec: FlowSpec,
    groups: Sequence[Group],
    slopes: Slopes,
    weights: Sequence[Sequence[Array | None]],
    first: Float[Array, "n d"],
) -> Forward:
    """Norms of the Jacobians of everything on the way, one example after the other.

    Args:
        spec: Architecture of the flow.
        groups: Its steps.
        slopes: Slopes of the activations, ``(b, k, ...)``.
        weights: ``S w`` of ``c`` functions, ``(b, k, c, ...)``, by stage and layer.
        first: Rows of ``P_0^T``, one for each coordinate of the perturbation.
    """

    def of_example(own):
        slopes, weights = own
        num = next(w.shape[1] for group in weights for w in group if w is not None)
        state = (first, jnp.zeros((num, len(first), len(first))), jnp.zeros(num))
        points, arguments = [], []
        for stage, group, *of_layers, active in zip(spec.layout, groups, slopes, weights, entries_of(spec).active, strict=True):

            def step(state, own, stage=stage, active=active):
                tangents, form, rounding = state
                kernels, scale, *of_layers = own
                u = tangents[:, active] * scale[None]
                z, found = u.reshape(-1, *stage.branch.in_shape), []
                for layer, slope, weight in zip(stage.branch.layers, *of_layers, strict=True):
                    if slope is not None:
                        matrix, own = z.reshape(len(z), -1), weight.reshape(num, -1)
                        lengths = jnp.sum(matrix**2, axis=0)
                        found.append(jnp.stack([_norm(matrix), _norm(matrix * jnp.sqrt(lengths)[None]) * UP]))
                        form = form + jax.lax.map(lambda w, matrix=matrix: (matrix * w[None]) @ matrix.T, own)
                        rounding = rounding + gamma(matrix.shape[1] + 64) * (own @ lengths)
                        z = (
                            jnp.concatenate([z] * activations.get(stage.branch.activation).channel_factor, axis=-1)
                            * slope[None]
                        )
                    z = layer.linear_map()(kernels[layer.name], z)
                after = tangents.at[:, active].set(u + z.reshape(len(z), -1))
                return (after, form, rounding), (_sizes(tangents), jnp.array(found).reshape(-1, 2))

            state, (sizes, found) = lax.scan(step, state, (dict(group.kernels), group.scale, *of_layers))
            points.append(sizes)
            arguments.append(found.reshape(-1, 2))
        tangents, form, rounding = state
        points, arguments = jnp.concatenate([*points, _sizes(tangents)[None]]), jnp.concatenate(arguments)
        forms = (lax.map(_norm, form) + rounding) * UP
        return Forward(points[:, 0], points[:, 1], arguments[:, 0], arguments[:, 1], forms)

    return lax.map(of_example, (slopes, weights))


def _sizes(matrix: Float[Array, "n d"]) -> Float[Array, "2"]:
    """Bounds of the 2-norm and of the Frobenius norm."""
    return jnp.stack([_norm(matrix), frobenius_bound(matrix)])


def _norm(matrix: Float[Array, "n m"]) -> Float[Array, ""]:
    return jnp.minimum(dense_norm_bound(matrix, method="gram", num_squarings=_NUM_SQUARINGS), frobenius_bound(matrix))
