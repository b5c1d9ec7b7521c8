"""Residual branches: ``g = W_n phi ... W_2 phi W_1 (phi)`` on explicit weights (Behrmann et al. 2019, sec. 2).

A branch is described by a `BranchSpec`; its weights are a plain dictionary, one entry a layer:
``{"conv0": {"kernel", "bias", "beta"}, "conv1": ...}`` ("dense0" ... for vectors). ``beta`` belongs to the activation in front
of its layer and exists for activations that have one. Weights run as they are: `constraint` makes of any the ones whose layers
satisfy it.

A conditional branch ``g(x; context)`` shifts the output of every layer by a linear map of the context, which has no constraint:
``g`` is a contraction in ``x`` for every context, and any function of the context.
"""

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from iresnet_jax.maths import activations
from iresnet_jax.maths import platforms as target
from iresnet_jax.maths.convolution import Padding, choose_implementation, conv
from iresnet_jax.maths.norms.power_iteration import LinearMap

Weights = Mapping[str, Mapping[str, Array]]


class LayerSpec(NamedTuple):
    """One linear layer of a branch.

    Attributes:
        name: Key among the branch's weights.
        kernel_shape: ``(kh, kw, cin, cout)`` of a convolution, ``(cin, cout)`` of a dense layer.
        in_shape: Shape of one input, without the batch.
        activated: Whether the activation is applied to the layer's input.
    """

    name: str
    kernel_shape: tuple[int, ...]
    in_shape: tuple[int, ...]
    activated: bool


@dataclass(frozen=True)
class BranchSpec:
    """The architecture of a residual branch.

    Attributes:
        in_shape: Shape of one example, ``(h, w, c)`` for convolutions, ``(d,)`` for dense layers.
        hidden: Widths of the hidden layers; the output has the width of the input.
        kernel_sizes: Taps of every convolution, one more than hidden widths (3, 1, 3 in the paper); None for dense layers.
        activation: A name in `activations.ACTIVATIONS`.
        preactivation: Whether the branch begins with the activation, as all but a network's first do in the paper.
        padding: Padding of the convolutions, "SAME" (zeros) or "CIRCULAR".
        positional_bias: Whether a convolution has a bias for every pixel instead of one a channel. A bias does not enter the
            Lipschitz constant, and tells a small network where in the image it is.
        context_dim: Length of the context vector of an example; 0 for none.
    """

    in_shape: tuple[int, ...]
    hidden: tuple[int, ...]
    kernel_sizes: tuple[int, ...] | None = None
    activation: str = "elu"
    preactivation: bool = False
    padding: Padding = "SAME"
    positional_bias: bool = False
    context_dim: int = 0

    def __post_init__(self):
        activations.get(self.activation)
        if self.context_dim < 0:
            raise ValueError(f"context_dim must not be negative, got {self.context_dim}; 0 is no context")
        if not self.hidden or min(self.hidden) < 1:
            raise ValueError(f"hidden must name at least one positive width, got {self.hidden}")
        if self.kernel_sizes is None:
            if len(self.in_shape) != 1:
                raise ValueError(f"a dense branch takes vectors, got examples of shape {self.in_shape}: flatten them first")
            return
        if len(self.in_shape) != 3:
            raise ValueError(f"a convolutional branch takes images (h, w, c), got examples of shape {self.in_shape}")
        if len(self.kernel_sizes) != len(self.hidden) + 1:
            raise ValueError(
                f"kernel_sizes needs {len(self.hidden) + 1} entries, one a layer, for hidden={self.hidden}; "
                f"got {self.kernel_sizes}"
            )
        if self.padding not in ("SAME", "CIRCULAR"):
            raise ValueError(f"a residual branch keeps the image size: padding must be SAME or CIRCULAR, got {self.padding!r}")

    @property
    def layers(self) -> tuple[LayerSpec, ...]:
        """The linear layers from input to output."""
        factor = activations.get(self.activation).channel_factor
        *space, channels = self.in_shape
        widths = (*self.hidden, channels)
        layers, cin = [], channels
        for i, cout in enumerate(widths):
            activated = self.preactivation or i > 0
            cin_of_layer = cin * factor if activated else cin
            if self.kernel_sizes is None:
                layers.append(LayerSpec(f"dense{i}", (cin_of_layer, cout), (cin_of_layer,), activated))
            else:
                k = self.kernel_sizes[i]
                layers.append(LayerSpec(f"conv{i}", (k, k, cin_of_layer, cout), (*space, cin_of_layer), activated))
            cin = cout
        return tuple(layers)


def linear_map(layer: LayerSpec, padding: Padding = "SAME", *, single: bool = False) -> LinearMap:
    """``(kernel, x) -> W x`` of a layer, without its bias.

    Args:
        layer: The layer.
        padding: Padding of a convolution.
        single: For one example without a batch axis, in a form that stays fast under ``vmap`` over kernels.
    """
    if len(layer.kernel_shape) == 2:
        return lambda kernel, x: x @ kernel
    if not single:
        return lambda kernel, x: conv(x, kernel, padding=padding)
    thin_in = layer.kernel_shape[2] <= layer.kernel_shape[3]
    implementation = choose_implementation(layer.kernel_shape)
    if implementation == "xla":  # vmap would make it a grouped convolution
        implementation = "patches" if thin_in else "taps"
    return lambda kernel, x: conv(x[None], kernel, padding=padding, implementation=implementation)[0]


def apply_branch(
    spec: BranchSpec,
    weights: Weights,
    x: Float[Array, "b ..."],
    context: Float[Array, "b k"] | None = None,
    *,
    before_layer: Callable[[str, Array], Array] | None = None,
    bfloat16: bool = False,
) -> Float[Array, "b ..."]:
    """``g(x)`` or ``g(x; context)`` for weights as they are; constrained if they are (see `constraint`).

    Args:
        spec: The architecture.
        weights: Weights of every layer.
        x: Inputs.
        context: One an example, if the branch is conditional.
        before_layer: ``(layer, input) -> input``, applied in front of a layer and its activation: where an ordinary residual
            network has its BatchNorm.
        bfloat16: Whether the linear maps take and give bfloat16, see `apply_layer`.

    Raises:
        ValueError: If the context is not what the branch takes.
    """
    check_context(spec.context_dim, len(x), context)
    h = x
    for layer in spec.layers:
        h = h if before_layer is None else before_layer(layer.name, h)
        h = apply_layer(spec, layer, weights[layer.name], h, context, bfloat16=bfloat16)
    return h


def at_zero(spec: BranchSpec, weights: Weights) -> Float[Array, "1 ..."]:
    """``g(0)`` of a branch without context: what it adds to every input, as a batch of one example."""
    return apply_branch(spec, weights, jnp.zeros((1, *spec.in_shape), jnp.result_type(*jax.tree.leaves(weights))))


def apply_layer(
    spec: BranchSpec,
    layer: LayerSpec,
    parameters: Mapping[str, Array],
    h: Array,
    context: Array | None,
    *,
    bfloat16: bool = False,
) -> Array:
    """One layer with the activation in front of it, if it has one.

    With ``bfloat16`` the convolution or product takes its kernel and input rounded to bfloat16 and gives bfloat16; sums in it,
    biases and activations keep the dtype of ``h``.
    """
    apply = linear_map(layer, spec.padding)
    apply = _in_bfloat16(apply) if bfloat16 else apply
    h = apply(parameters["kernel"], activate(spec, layer, parameters, h))
    h = _add_bias(h, parameters["bias"], apart=target.is_slow_in_place())
    if context is not None:
        h = h + (context @ parameters["context"]).reshape(len(h), *(1,) * (h.ndim - 2), -1)
    return h


@functools.partial(jax.jit, static_argnames="apart", inline=True)
def _add_bias(h: Float[Array, "b *space c"], bias: Float[Array, "*pixels c"], *, apart: bool) -> Float[Array, "b *space c"]:
    """``h + bias``; ``apart`` makes it an array of another rank, which XLA does not write over ``h``: `is_slow_in_place`."""
    if apart:
        channels = h.shape[-1]
        return (h.reshape(len(h), math.prod(h.shape[1:-1]), channels) + bias.reshape(1, -1, channels)).reshape(h.shape)
    return h + bias.reshape((1,) * (h.ndim - bias.ndim) + bias.shape)


def _in_bfloat16(apply: LinearMap) -> LinearMap:
    """The linear map on rounded kernels and inputs, with rounded results.

    CPUs have no products of bfloat16, and XLA leaves out conversions there and back: numbers that are rounded and stay in
    float32 give the same results and no less speed.
    """

    def rounded(x: Array) -> Array:
        if target.platform() == "cpu":
            return lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
        return x.astype(jnp.bfloat16)

    return lambda kernel, x: rounded(apply(rounded(kernel), rounded(x))).astype(x.dtype)


def activate(spec: BranchSpec, layer: LayerSpec, parameters: Mapping[str, Array], h: Array) -> Array:
    """The activation in front of a layer, if it has one."""
    activation = activations.get(spec.activation)
    if not layer.activated:
        return h
    return activation.apply(h, parameters["beta"]) if activation.has_beta else activation.apply(h)


def check_context(context_dim: int, batch_size: int, context: Float[Array, "..."] | None) -> None:
    """Raises ``ValueError`` unless there is one context of that length for every example, or none if the length is 0."""
    if context_dim == 0 and context is not None:
        raise ValueError(f"the model takes no context (context_dim=0), got one of shape {context.shape}: leave it out")
    if context_dim and (context is None or context.shape != (batch_size, context_dim)):
        found = "none" if context is None else f"shape {context.shape} for a batch of {batch_size}"
        raise ValueError(f"the model takes a context of shape (batch, {context_dim}), got {found}")


def initial_weights(spec: BranchSpec, key: Array, *, last_scale: float = 1.0, sharp: bool = False) -> Weights:
    r"""Random kernels with variance ``1 / fan_in``, zero biases.

    Args:
        spec: The architecture.
        key: Source of randomness.
        last_scale: Factor on the last layer; small values start the block near the identity.
        sharp: Whether activations are as much sharper as the constraint makes their inputs smaller. A random layer from ``n``
            to ``m`` units has the norm ``1 + sqrt(m / n)`` times the size of an output (Marchenko and Pastur 1967); divided by
            it, its outputs are so small that an activation of constant sharpness is nearly linear on them.
    """
    activation = activations.get(spec.activation)
    weights: dict[str, dict[str, Array]] = {}
    for i, (layer, layer_key) in enumerate(zip(spec.layers, jax.random.split(key, len(spec.layers)), strict=True)):
        *fan_in, cout = layer.kernel_shape
        scale = (last_scale if i == len(spec.layers) - 1 else 1.0) / math.sqrt(math.prod(fan_in))
        weights[layer.name] = {
            "kernel": scale * jax.random.normal(layer_key, layer.kernel_shape),
            "bias": jnp.zeros((*layer.in_shape[:-1], cout) if spec.positional_bias else (cout,)),
        }
        if layer.activated and activation.initial_beta is not None:
            beta = activation.initial_beta
            if sharp and i > 0:
                *before, width = spec.layers[i - 1].kernel_shape
                sharpness = math.log1p(math.exp(beta)) * (1 + math.sqrt(width / math.prod(before)))
                beta = math.log(math.expm1(sharpness))  # of which the activation takes the softplus
            weights[layer.name]["beta"] = jnp.full((), beta, jnp.result_type(float))
        if spec.context_dim:
            key_context = jax.random.fold_in(layer_key, 1)
            scale /= math.sqrt(spec.context_dim / math.prod(fan_in))  # variance 1 / context_dim
            weights[layer.name]["context"] = scale * jax.random.normal(key_context, (spec.context_dim, cout))
    return weights
