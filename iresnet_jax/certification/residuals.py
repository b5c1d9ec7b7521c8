r"""The residuals of trajectories in double-double, with guaranteed errors, and the slopes of
activations along them.

The map is defined by the weights as real numbers, which float32 weights represent exactly in every
precision.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from iresnet_jax.branches.branch import BranchSpec, Norms, Weights
from iresnet_jax.branches.layers import LayerSpec
from iresnet_jax.certification.steps import Place, blocks_of
from iresnet_jax.maths.double_double import (
    ACTIVATION_ERROR,
    UNIT,
    DoubleDouble,
    Sliced,
    activate,
    exp,
    product,
    softplus,
)
from iresnet_jax.maths.upward_rounding import UP
from iresnet_jax.models.architecture import FlowSpec
from iresnet_jax.models.flow import FlowWeights


class Layer(NamedTuple):
    """A layer of all blocks of a stage, ready for `residuals`.

    Attributes:
        spec: The layer.
        kernel: Its kernel in float64.
        slices: Its kernel in slices.
        bias: Bias, broadcastable to outputs ``(k, b, p, c)``.
        norm: Bound of the operator norm.
        sharpness: ``softplus(beta)`` of the activation in front, broadcastable to inputs ``(k, b,
            ...)``; None without.
        context: Kernel of the context in slices; None without.
    """

    spec: LayerSpec
    kernel: Float[np.ndarray, "k ..."]
    slices: Sliced
    bias: DoubleDouble
    norm: Float[np.ndarray, " k"]
    sharpness: DoubleDouble | None
    context: Sliced | None


class PreciseStage(NamedTuple):
    """The steps of a stage in double-double.

    Attributes:
        place: Where they act.
        bias: Bias of the ActNorms, broadcastable to ``(k, b, ...)``.
        scale: Scale of the ActNorms, broadcastable to ``(k, b, ...)``.
        layers: Layers of the branches.
        lipschitz: Bounds of the Lipschitz constants of the branches.
        stretch: Bounds of the Lipschitz constants of ``x + g(x)``.
    """

    place: Place
    bias: DoubleDouble
    scale: DoubleDouble
    layers: tuple[Layer, ...]
    lipschitz: Float[np.ndarray, " k"]
    stretch: Float[np.ndarray, " k"]

    @property
    def num_blocks(self) -> int:
        """``k``."""
        return len(self.lipschitz)


class Residuals(NamedTuple):
    """Residuals of trajectories, and the slopes of their activations.

    Attributes:
        values: ``F_t(x_t) - x_{t+1}``, rounded to float64; 0 at entries that a step does not act
            on.
        errors: Bounds of the Euclidean norm of the error of `values`.
        argument_errors: Bounds of the error of every argument of an activation.
        slopes: Slope of every output of an activation, ``(b, k, ...)``, by stage and layer; None
            for a layer without an activation.
    """

    values: Float[np.ndarray, "b t d"]
    errors: Float[np.ndarray, "b t"]
    argument_errors: Float[np.ndarray, "b t"]
    slopes: tuple[tuple[np.ndarray | None, ...], ...]

    @property
    def sizes(self) -> Float[np.ndarray, "b t"]:
        """Bounds of the norms of the exact residuals."""
        return (np.linalg.norm(self.values, axis=2) + self.errors) * UP


def precise_stages(spec: FlowSpec, weights: FlowWeights) -> tuple[PreciseStage, ...]:
    """The steps of a flow in double-double.

    Args:
        spec: Architecture of the flow.
        weights: Weights of its stages, with guaranteed norms of their layers.
    """
    stages = []
    for place, block in blocks_of(spec, weights):
        own = jax.tree.map(lambda a: np.asarray(a, np.float64), block)
        bias, log_scale, branch = own.actnorm.bias, own.actnorm.log_scale, own.branch
        by_channel = (len(bias), *(1,) * len(place.in_shape), -1)
        layer_weights, norms = jax.device_get(
            _chain_weights(branch.spec, branch.weights, branch.norms)
        )
        layers = tuple(
            _layer(layer, layer_weights[layer.name], norms[layer.name])
            for layer in branch.spec.chain
        )
        stages.append(
            PreciseStage(
                place=place,
                bias=DoubleDouble.of(bias.reshape(by_channel)),
                scale=exp(DoubleDouble.of(log_scale.reshape(by_channel))),
                layers=layers,
                lipschitz=branch.lipschitz_bound,
                stretch=np.array(
                    [branch.spec.block_bounds(bound).forward for bound in branch.lipschitz_bound]
                ),
            )
        )
    return tuple(stages)


@functools.partial(jax.jit, static_argnums=0)
def _chain_weights(branch: BranchSpec, weights: Weights, norms: Norms) -> tuple[Weights, Norms]:
    """Weights and norms of the chains of layers of all blocks of a stage."""
    return lax.map(lambda own: branch.chain_weights(*own), (weights, norms))


def _layer(layer: LayerSpec, own: Any, norm: Any) -> Layer:
    num, bias = len(own["kernel"]), own["bias"]
    sharpness = None
    if "beta" in own:
        beta = own["beta"]
        sharpness = softplus(DoubleDouble.of(beta.reshape(num, *(1,) * len(layer.in_shape), -1)))
    return Layer(
        spec=layer,
        kernel=own["kernel"],
        slices=Sliced.of(own["kernel"]),
        bias=DoubleDouble.of(
            bias.reshape(num, *(1,) * (len(layer.in_shape) + 2 - bias.ndim), *bias.shape[1:])
        ),
        norm=np.asarray(norm, np.float64),
        sharpness=sharpness,
        context=Sliced.of(own["context"]) if "context" in own else None,
    )


def ending_at(
    stages: Sequence[PreciseStage],
    points: Float[np.ndarray, "b t d"],
    last: Float[np.ndarray, "b d"],
) -> Float[np.ndarray, "b t d"]:
    """The trajectories with another last point, whose values extend to entries that no later step
    acts on.
    """
    points = np.concatenate([points[:, :-1], last[:, None]], axis=1)
    places = [stage.place for stage in stages for _ in range(stage.num_blocks)]
    for t, place in reversed(list(enumerate(places))):
        left = np.setdiff1d(np.arange(points.shape[2]), place.active)
        points[:, t, left] = points[:, t + 1, left]
    return points


def residuals(
    stages: Sequence[PreciseStage],
    trajectory: DoubleDouble,
    context: Float[np.ndarray, "b k"] | None = None,
) -> Residuals:
    """The residuals of trajectories ``(b, t, d)``, all steps of a stage at once, with guaranteed
    bounds of their errors.

    Entries that a step does not act on must be equal before and after it, see `ending_at`.

    A layer turns an error ``delta`` of its input into at most ``|W| delta``, and an activation is
    1-Lipschitz; the rounding of products, activations and sums is bounded where it arises.
    """
    b, num, d = trajectory.high.shape
    values, slopes, start = np.zeros((b, num - 1, d)), [], 0
    errors, argument_errors = np.zeros((2, b, num - 1))
    for stage in stages:
        k = stage.num_blocks
        now, end = slice(start, start + k), slice(start + 1, start + k + 1)
        x, after = (_inputs(stage, trajectory, points) for points in (now, end))
        u = (x + stage.bias) * stage.scale
        error = 4 * UNIT * _norm(u)
        g, error, of_arguments, of_layers = _branch(stage, u, error, context)
        r = u + g - after
        error = error + 4 * UNIT * _norm(u)  # rounding of u itself, beside its effect on g
        error = error + 4 * UNIT * (_norm(u) + _norm(g) + _norm(after)) + 2.0**-53 * _norm(r)
        values[:, now, stage.place.active] = np.moveaxis(r.high.reshape(k, b, -1), 0, 1)
        errors[:, now], argument_errors[:, now] = error.T * UP, of_arguments.T * UP
        slopes.append(tuple(None if own is None else np.moveaxis(own, 1, 0) for own in of_layers))
        start += k
    return Residuals(values, errors, argument_errors, tuple(slopes))


def _inputs(stage, trajectory, points):
    """Some points of trajectories as inputs ``(k, b, ...)`` of a stage's branches."""

    def of_branch(part):
        entries = np.moveaxis(part[:, points][..., stage.place.active], 0, 1)
        return entries.reshape(*entries.shape[:2], *stage.place.in_shape)

    return trajectory.map(of_branch)


def _branch(stage, h, error, context):
    """``g``, a bound of its error, bounds of the errors of activations' arguments, and the slopes;
    ``error`` bounds the error of the input.
    """
    slopes, of_arguments = [], np.zeros_like(error)
    for layer in stage.layers:
        slope = None
        if layer.spec.activation is not None:
            of_arguments = np.maximum(of_arguments, error)
            size = _norm(h) + np.sqrt(np.prod(h.high.shape[2:]))
            error = error + ACTIVATION_ERROR * size
            h, slope = activate(layer.spec.activation, h, layer.sharpness)
        slopes.append(slope)
        h, own = product(h, layer.slices, functools.partial(_apply, layer.spec))
        h = h + layer.bias
        if layer.context is not None:
            contexts = DoubleDouble.of(np.broadcast_to(context, (len(layer.norm), *context.shape)))
            shift, of_shift = product(
                contexts, layer.context, lambda inputs, kernels: inputs @ kernels[:, None]
            )
            shape = (*shift.high.shape[:2], *(1,) * (h.high.ndim - 3), -1)
            h, own = h + shift.map(lambda part, shape=shape: part.reshape(shape)), own + of_shift
        positions = np.prod(h.high.shape[2:-1])
        own = np.sqrt(positions * np.sum(np.square(own), axis=-1)) * UP
        error = layer.norm[:, None] * error + own + 4 * UNIT * _norm(h)
    return h, error, of_arguments, tuple(slopes)


@functools.partial(jax.jit, static_argnums=0)
def _apply(
    layer: LayerSpec, inputs: Float[Array, "k i b ..."], kernels: Float[Array, "k ..."]
) -> Array:
    """A layer's linear map of slices: the sums are exact in every order."""
    apply = layer.linear_map()

    def of_block(block):
        h, kernel = block
        return apply(kernel, h.reshape(-1, *h.shape[2:])).reshape(
            *h.shape[:2], *layer.in_shape[:-1], -1
        )

    return lax.map(of_block, (inputs, kernels))


def _norm(x: DoubleDouble) -> Float[np.ndarray, "k b"]:
    """Euclidean norm of each example, rounded up."""
    return np.sqrt(np.sum(np.square(x.high), axis=tuple(range(2, x.high.ndim)))) * UP + 1e-150
