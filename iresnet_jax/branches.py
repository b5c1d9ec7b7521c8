"""Residual branches: ``g = W_n phi ... W_2 phi W_1 (phi)`` on explicit weights, and their Lipschitz constraint.

A branch is described by a `BranchSpec`; its weights are a plain dictionary, one entry a layer:
``{"conv0": {"kernel", "bias", "beta"}, "conv1": ...}`` ("dense0" ... for vectors). ``beta`` belongs to the activation in front
of its layer and exists for activations that have one. `normalize` returns weights of the same form, so that what runs is
always a plain network whose layers already satisfy the constraint (Behrmann et al. 2019, sec. 2.1).

A conditional branch ``g(x; context)`` shifts the output of every layer by a linear map of the context, which has no constraint:
``g`` is a contraction in ``x`` for every context, and any function of the context.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from iresnet_jax import activations, certify
from iresnet_jax.convolution import Padding, choose_implementation, conv
from iresnet_jax.spectral import LinearMap, soft_normalize, spectral_norm

Weights = dict[str, dict[str, Array]]
Vectors = dict[str, Float[Array, "..."]]

BUDGETS = ("layer", "block")

# Allowance a layer for the rounding of its scaled kernel. Entry by entry it is eps / 2, by which a norm grows by at most
# sqrt(taps * min(cin, cout)) eps / 2: 7e-6 for 5 x 5 taps and 512 channels.
_SCALING_MARGIN = 1e-5


class LayerSpec(NamedTuple):
    """One linear layer of a branch.

    Attributes:
        name: Its key among the weights.
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
        padding: Of a convolution.
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
) -> Float[Array, "b ..."]:
    """``g(x)`` or ``g(x; context)`` for weights as they are; constrained if they are (see `normalize`).

    Args:
        spec: The architecture.
        weights: Of every layer.
        x: Inputs.
        context: One an example, if the branch is conditional.
        before_layer: ``(layer, input) -> input``, applied in front of a layer and its activation: where an ordinary residual
            network has its BatchNorm.

    Raises:
        ValueError: If the context is not what the branch takes.
    """
    check_context(spec.context_dim, len(x), context)
    h = x
    for layer in spec.layers:
        h = h if before_layer is None else before_layer(layer.name, h)
        h = _apply_layer(spec, layer, weights[layer.name], h, context)
    return h


def at_zero(spec: BranchSpec, weights: Weights) -> Float[Array, "1 ..."]:
    """``g(0)`` of a branch without context: what it adds to every input, as a batch of one example."""
    return apply_branch(spec, weights, jnp.zeros((1, *spec.in_shape), jnp.result_type(*jax.tree.leaves(weights))))


def _apply_layer(spec, layer, parameters, h, context):
    """One layer with the activation in front of it, if it has one."""
    h = linear_map(layer, spec.padding)(parameters["kernel"], _activate(spec, layer, parameters, h))
    bias = parameters["bias"]
    h = h + bias.reshape((1,) * (h.ndim - bias.ndim) + bias.shape)
    if context is not None:
        h = h + (context @ parameters["context"]).reshape(len(h), *(1,) * (h.ndim - 2), -1)
    return h


def _activate(spec, layer, parameters, h):
    activation = activations.get(spec.activation)
    if not layer.activated:
        return h
    return activation.apply(h, parameters["beta"]) if activation.has_beta else activation.apply(h)


def has_trace(spec: BranchSpec) -> bool:
    """Whether `trace` knows the branch: two layers around an elementwise activation, of the same odd kernel size if any.

    On a torus that is smaller than the kernel, taps meet that are not mirrored.
    """
    sizes = spec.kernel_sizes
    same_size = sizes is None or (sizes[0] == sizes[-1] and sizes[0] % 2 == 1)
    if sizes is not None and spec.padding == "CIRCULAR" and min(spec.in_shape[:2]) < sizes[0]:
        return False
    return len(spec.hidden) == 1 and same_size and activations.get(spec.activation).elementwise


def trace(
    spec: BranchSpec, weights: Weights, x: Float[Array, "b ..."], context: Float[Array, "b k"] | None = None
) -> Float[Array, " b"]:
    r"""``tr J_g(x)`` in closed form, for a fraction of what ``g`` costs.

    For ``g = W_2 phi W_1 (phi)`` with ``D`` the slopes of the activations, ``J = W_2 D_1 W_1 D_0``. A pixel's output comes back
    to its own input through the tap ``t`` of ``W_1`` and the mirrored tap ``-t`` of ``W_2`` alone, so

    ``tr J = sum_p <D_1(p), z(p)>``,  ``z = conv(D_0; M)``,  ``M[t]_(c, j) = W_1[t]_(c, j) W_2[-t]_(j, c)``.

    The convolution's padding takes care of the border. Without an activation in front ``D_0`` is 1, and ``z`` is the same for
    all examples.

    Args:
        spec: The architecture, one for which `has_trace`.
        weights: As in `apply_branch`.
        x: Where to evaluate.
        context: As in `apply_branch`.

    Raises:
        ValueError: If there is no closed form for the branch.
    """
    if not has_trace(spec):
        raise ValueError(
            f"the trace has a closed form for two layers with an elementwise activation (see has_trace), not for {spec}"
        )
    first, second = spec.layers
    h = _apply_layer(spec, first, weights[first.name], x, context)

    def slopes(layer, h):
        return jax.jvp(lambda h: _activate(spec, layer, weights[layer.name], h), (h,), (jnp.ones_like(h),))[1]

    inner = slopes(first, x) if first.activated else jnp.ones_like(x[:1])
    kernels = weights[first.name]["kernel"], weights[second.name]["kernel"]
    taps, channels, width = kernels[0].shape[:-2], x.shape[-1], h.shape[-1]
    there = kernels[0].reshape(*taps, -1, channels, width)
    back = jnp.flip(kernels[1], range(len(taps))).reshape(*taps, -1, width, channels)
    product = jnp.einsum("...scj,...tjc->...sctj", there, back)  # an activation may make several channels of one
    product = product.reshape(*taps, kernels[0].shape[-2], kernels[1].shape[-2])
    z = inner @ product if not taps else conv(inner, product, padding=spec.padding)
    return jnp.sum(slopes(second, h) * z, axis=tuple(range(1, x.ndim)))


def check_context(context_dim: int, batch_size: int, context: Float[Array, "..."] | None) -> None:
    """Raises ``ValueError`` unless there is one context of that length for every example, or none if the length is 0."""
    if context_dim == 0 and context is not None:
        raise ValueError(f"the model takes no context (context_dim=0), got one of shape {context.shape}: leave it out")
    if context_dim and (context is None or context.shape != (batch_size, context_dim)):
        found = "none" if context is None else f"shape {context.shape} for a batch of {batch_size}"
        raise ValueError(f"the model takes a context of shape (batch, {context_dim}), got {found}")


class Normalized(NamedTuple):
    """A branch whose layers satisfy the constraint, and what it took.

    Attributes:
        weights: The branch's weights within the budget, as `norms` have it.
        vectors: The new power iterates, one a layer; empty if none were used.
        norms: The operator norm of every layer before normalisation: estimated, or bounded from above.
        lipschitz: The product of the norms after it: an estimate of the branch's Lipschitz constant, or a bound.
    """

    weights: Weights
    vectors: Vectors
    norms: dict[str, Float[Array, ""]]
    lipschitz: Float[Array, ""]


def normalize(
    spec: BranchSpec,
    weights: Weights,
    vectors: Vectors,
    *,
    coeff: float,
    budget: str = "layer",
    num_steps: int | None = None,
    rtol: float = 1e-3,
) -> Normalized:
    """Constrains a branch by norms that power iteration estimates, starting from ``vectors``.

    Args:
        spec: The architecture.
        weights: Unconstrained weights, as an optimizer holds them.
        vectors: Power iterates, one a layer, of shape ``layer.in_shape``.
        coeff: Largest operator norm, in (0, 1): of a layer, or of the product of a branch's layers.
        budget: "layer" or "block", what ``coeff`` limits.
        num_steps: Power iterations a layer; None iterates to the tolerance.
        rtol: Relative tolerance of the norms.

    Raises:
        ValueError: If ``coeff`` is not in (0, 1) or the budget is unknown.
    """
    new_vectors, norms = {}, {}
    for layer in spec.layers:
        kernel = weights[layer.name]["kernel"]
        apply = linear_map(layer, spec.padding, single=True)
        norms[layer.name], new_vectors[layer.name], _ = spectral_norm(
            apply, kernel, vectors[layer.name], num_steps=num_steps, rtol=rtol
        )
    return Normalized(*_within_budget(weights, new_vectors, norms, coeff=coeff, budget=budget))


def normalize_certified(
    spec: BranchSpec,
    weights: Weights,
    *,
    coeff: float,
    budget: str = "layer",
    method: str = "exact",
    num_squarings: int = 4,
    twists: Sequence[certify.Twist] | None = None,
) -> Normalized:
    """Constrains a branch by guaranteed upper bounds of its layers' norms: ``Lip(g)`` is within the budget by construction.

    There is no state, so this holds from the first step on, after any update and for any weights.

    Args:
        spec: The architecture.
        weights: Unconstrained weights.
        coeff: As in `normalize`.
        budget: As in `normalize`.
        method: "exact", or "gram", which is cheaper and looser; see `certify`.
        num_squarings: Of "gram".
        twists: Of the convolutions' embedding; see `certify.conv_norm_bound`.

    Raises:
        ValueError: As in `normalize`, or if the method is unknown.
    """
    check_coeff(coeff)
    norms = layer_bounds(spec, weights, method=method, num_squarings=num_squarings, twists=twists)
    allowance = len(norms) * _SCALING_MARGIN
    normalized = _within_budget(weights, {}, norms, coeff=coeff * (1 - allowance - _SCALING_MARGIN), budget=budget)
    return normalized._replace(lipschitz=normalized.lipschitz * (1 + allowance))


def layer_bounds(
    spec: BranchSpec,
    weights: Weights,
    *,
    method: str = "exact",
    num_squarings: int = 4,
    twists: Sequence[certify.Twist] | None = None,
) -> dict[str, Float[Array, ""]]:
    """A guaranteed upper bound of every layer's operator norm, see `certify`; nan if a weight is not finite."""
    settings = {"method": method, "num_squarings": num_squarings}
    bounds = {}
    for layer in spec.layers:
        kernel = weights[layer.name]["kernel"]
        if kernel.ndim == 2:
            bounds[layer.name] = certify.dense_norm_bound(kernel, **settings)
        else:
            size = (layer.in_shape[0], layer.in_shape[1])
            bounds[layer.name] = certify.conv_norm_bound(kernel, size, padding=spec.padding, twists=twists, **settings)
    return bounds


def training_twists(spec: BranchSpec, choice: str = "auto") -> tuple[certify.Twist, ...]:
    """The twists of the embedding by which a training step bounds norms; see `certify.conv_norm_bound`.

    All four cost four times as much as one. On 8 x 8 and larger images the antiperiodic one alone is within 2 % of their
    minimum, on 4 x 4 images trained kernels lose up to a quarter of their budget to it.

    Args:
        spec: The architecture.
        choice: "all", "one", or "auto", which takes all where a 3 x 3 layer's Gram matrices have up to 8 rows.

    Raises:
        ValueError: If the choice is unknown.
    """
    if choice not in ("auto", "all", "one"):
        raise ValueError(f"twists must be auto, all or one, got {choice!r}")
    return certify.TWISTS if choice == "all" or (choice == "auto" and spec.in_shape[-1] <= 8) else ((1, 1),)


def _within_budget(weights, vectors, norms, *, coeff, budget) -> Normalized:
    """Scales kernels down to the budget, never up: each to norm ``coeff``, or all by one factor to a product of ``coeff``."""
    check_coeff(coeff)
    if budget not in BUDGETS:
        raise ValueError(f"budget must be one of {', '.join(BUDGETS)}, got {budget!r}")
    sizes = jnp.stack(list(norms.values()))
    if budget == "layer":
        excess = sizes / coeff
    else:  # the geometric mean, which cannot overflow; a zero layer makes the product zero
        all_positive = jnp.all(sizes > 0)
        mean = jnp.exp(jnp.mean(jnp.log(jnp.where(all_positive, sizes, 1))))
        excess = jnp.broadcast_to(jnp.where(all_positive, mean, 0) / coeff ** (1 / len(norms)), sizes.shape)
    normalized = {
        name: {**weights[name], "kernel": soft_normalize(weights[name]["kernel"], excess[i], 1.0)}
        for i, name in enumerate(norms)
    }
    lipschitz = jnp.prod(sizes / jnp.maximum(excess, 1))
    return Normalized(normalized, vectors, norms, lax.stop_gradient(lipschitz))


def check_coeff(coeff: float) -> None:
    """Raises ``ValueError`` unless ``coeff`` is in (0, 1)."""
    if not 0 < coeff < 1:
        raise ValueError(f"coeff must lie in (0, 1), got {coeff}: the inverse only exists for a contraction")


def initial_weights(spec: BranchSpec, key: Array, *, last_scale: float = 1.0) -> Weights:
    """Random kernels with variance ``1 / fan_in``, zero biases.

    Args:
        spec: The architecture.
        key: Source of randomness.
        last_scale: Factor on the last layer; small values start the block near the identity.
    """
    activation = activations.get(spec.activation)
    weights: Weights = {}
    for i, (layer, layer_key) in enumerate(zip(spec.layers, jax.random.split(key, len(spec.layers)), strict=True)):
        *fan_in, cout = layer.kernel_shape
        scale = (last_scale if i == len(spec.layers) - 1 else 1.0) / math.sqrt(math.prod(fan_in))
        weights[layer.name] = {
            "kernel": scale * jax.random.normal(layer_key, layer.kernel_shape),
            "bias": jnp.zeros((*layer.in_shape[:-1], cout) if spec.positional_bias else (cout,)),
        }
        if layer.activated and activation.initial_beta is not None:
            weights[layer.name]["beta"] = jnp.full((), activation.initial_beta)
        if spec.context_dim:
            key_context = jax.random.fold_in(layer_key, 1)
            scale /= math.sqrt(spec.context_dim / math.prod(fan_in))  # variance 1 / context_dim
            weights[layer.name]["context"] = scale * jax.random.normal(key_context, (spec.context_dim, cout))
    return weights


def initial_vectors(spec: BranchSpec, key: Array) -> Vectors:
    """Random starts of the power iterations."""
    keys = jax.random.split(key, len(spec.layers))
    return {layer.name: jax.random.normal(k, layer.in_shape) for layer, k in zip(spec.layers, keys, strict=True)}
