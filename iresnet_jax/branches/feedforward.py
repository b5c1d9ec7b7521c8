r"""The branch of the paper: layers one after the other, ``g = W_n phi ... W_2 phi W_1 (phi)``
(Behrmann et al. 2019, sec. 2).

Weights are a dictionary, one entry per layer: ``{"conv0": {"kernel", "bias", "beta"}, "conv1":
...}`` ("dense0" ... for vectors). ``beta`` belongs to the activation in front of its layer and
exists for activations that have one.

**Budget.** With 1-Lipschitz activations ``Lip(g) <= |W_n| ... |W_1|`` (sec. 2.1). Kernels whose
norms are too large are scaled down. Norms are estimated by power iteration, as in the paper, or
bounded from above.

**Contexts.** A conditional branch ``g(x; context)`` shifts the output of every layer by a linear
map of the context, which has no constraint: whatever the context, ``g`` is a contraction in ``x``,
and it may depend on the context in any way. An image may have a context for every pixel.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, reduce
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from iresnet_jax.branches.branch import (
    Branch,
    BranchSpec,
    ConstrainedBranch,
    Norms,
    Weights,
)
from iresnet_jax.branches.layers import LayerSpec, Part, VectorPair
from iresnet_jax.maths import activations, two_layers
from iresnet_jax.maths.convolution import Padding, pads_of
from iresnet_jax.maths.lipschitz_bounds import branch_bound, product_bound
from iresnet_jax.maths.logdet_exact import log_abs_det, stencil_by_products, stencil_logdet
from iresnet_jax.maths.power_iteration import soft_normalize

Context = Float[Array, "b ... k"] | None

# Above this, the d^2 numbers per example and hidden unit of a Jacobian in closed form are too many.
FULL_DIMS = 256

# Allowance per layer for the rounding of its scaled kernel. Entry by entry it is eps / 2, by which
# a norm grows by at most sqrt(taps * min(cin, cout)) eps / 2: 7e-6 for 5 x 5 taps and 512 channels.
_SCALING_MARGIN = 1e-5


@dataclass(frozen=True)
class FeedforwardSpec(BranchSpec):
    """The architecture of a branch of layers.

    Attributes:
        hidden: Widths of the hidden layers; the output has the width of the input.
        kernel_sizes: Taps of every convolution, one more than hidden widths (3, 1, 3 in the paper);
            None for dense layers.
        activation: A name in `activations.ACTIVATIONS`.
        preactivation: Whether the branch begins with the activation, as all branches but the first
            do in the paper.
        padding: Padding of the convolutions, "SAME" (zeros) or "CIRCULAR".
        positional_bias: Whether a convolution has a bias for every pixel instead of one per
            channel. A bias does not enter the Lipschitz constant, and tells a small network the
            place in the image.
    """

    hidden: tuple[int, ...]
    kernel_sizes: tuple[int, ...] | None = None
    activation: str = "elu"
    preactivation: bool = False
    padding: Padding = "SAME"
    positional_bias: bool = False

    # Bound of the relative error of an entry of `operator_kernel`, in units of eps.
    operator_roundings: ClassVar[int] = 0

    def __post_init__(self):
        activations.get(self.activation)  # raises for an unknown name, as the next line
        pads_of(self.padding, (1, 1))
        wanted = (1, None) if self.kernel_sizes is None else (3, len(self.hidden) + 1)
        if (len(self.in_shape), self.kernel_sizes and len(self.kernel_sizes)) != wanted:
            raise ValueError(
                "a branch of images (h, w, c) has one more kernel size than hidden widths, and a "
                f"branch of vectors has none; got examples of shape {self.in_shape}, "
                f"kernel_sizes={self.kernel_sizes} and hidden={self.hidden}"
            )

    def check_slopes(self) -> None:
        """Raises ``ValueError`` unless the activation's slopes are in [0, 1] and kernels have odd
        sizes.
        """
        is_odd = all(size % 2 for size in self.kernel_sizes or ())
        if not (activations.get(self.activation).monotone and is_odd):
            known = [name for name, entry in activations.ACTIVATIONS.items() if entry.monotone]
            raise ValueError(
                f"{type(self).__name__} takes kernels of odd sizes and activations with slopes in "
                f"[0, 1], one of {', '.join(known)}; got kernel_sizes={self.kernel_sizes} and "
                f"{self.activation}"
            )

    @classmethod
    def of_stage(cls, stage: Any, in_shape: tuple[int, ...], context_dim: int) -> "FeedforwardSpec":
        """The branch that a `StageSpec` describes, for examples of this shape."""
        return cls(
            in_shape,
            context_dim=context_dim,
            hidden=stage.hidden,
            kernel_sizes=stage.kernel_sizes,
            activation=stage.activation,
            preactivation=stage.preactivation,
            padding=stage.padding,
            positional_bias=stage.positional_bias,
        )

    @cached_property
    def layers(self) -> tuple[LayerSpec, ...]:
        """The linear layers from input to output."""
        factor = activations.get(self.activation).channel_factor
        *space, cin = self.in_shape
        layers = []
        for i, (cout, size, activated) in enumerate(self._maps):
            activation = self.activation if activated else None
            own = cin * factor if activated else cin
            if self.kernel_sizes is None:
                layers.append(LayerSpec(f"dense{i}", (own, cout), (own,), activation))
            else:
                k = self.kernel_sizes[size]
                layers.append(
                    LayerSpec(
                        f"conv{i}", (k, k, own, cout), (*space, own), activation, self.padding
                    )
                )
            cin = cout
        return tuple(layers)

    @property
    def _maps(self) -> list[tuple[int, int, bool]]:
        """Width of every layer, the place of its kernel size, and whether it has an activation
        in front.
        """
        return [
            (width, i, self.preactivation or i > 0)
            for i, width in enumerate((*self.hidden, self.in_shape[-1]))
        ]

    def initial_weights(
        self, key: Array, *, last_scale: float = 1.0, sharpness: float = 0.0
    ) -> Weights:
        r"""Random kernels with variance ``1 / fan_in``, and biases of zero unless activations are
        sharp.

        A random layer from ``n`` to ``m`` units has the norm ``1 + sqrt(m / n)`` times the size of
        an output (Marchenko and Pastur 1967). Divided by it, outputs are so small that an
        activation of constant sharpness is nearly linear on them.

        Args:
            key: Source of randomness.
            last_scale: Factor on the last layer; small values start the block near the identity.
            sharpness: Sharpness ``s`` of activations of the Swish family, in units of one over the
                size of their inputs; 0 keeps the activation's default. Above 1, an activation bends
                within a fraction ``1 / s`` of its inputs' range, and random biases spread these
                places over the rest.
        """
        activation = activations.get(self.activation)
        sizes = [
            1 / (1 + math.sqrt(layer.kernel_shape[-1] / math.prod(layer.kernel_shape[:-1])))
            for layer in self.layers
        ]
        weights: dict[str, dict[str, Array]] = {}
        for i, (layer, layer_key) in enumerate(
            zip(self.layers, jax.random.split(key, len(self.layers)), strict=True)
        ):
            *fan_in, cout = layer.kernel_shape
            is_last = i == len(self.layers) - 1
            scale = (last_scale if is_last else 1.0) / math.sqrt(math.prod(fan_in))
            bias_shape = (*layer.in_shape[:-1], cout) if self.positional_bias else (cout,)
            bias = jnp.zeros(bias_shape)
            if sharpness > 1 and not is_last and activation.initial_beta is not None:
                bias = (
                    sizes[i]
                    * (1 - 1 / sharpness)
                    * jax.random.normal(jax.random.fold_in(layer_key, 2), bias_shape)
                )
            weights[layer.name] = {
                "kernel": scale * jax.random.normal(layer_key, layer.kernel_shape),
                "bias": bias,
            }
            if layer.activation is not None and activation.initial_beta is not None:
                beta = activation.initial_beta
                if sharpness and i > 0:
                    beta = _inverse_softplus(math.log1p(math.exp(beta)) * sharpness / sizes[i - 1])
                weights[layer.name]["beta"] = jnp.full((), beta, jnp.result_type(float))
            if self.context_dim:
                key_context = jax.random.fold_in(layer_key, 1)
                scale /= math.sqrt(self.context_dim / math.prod(fan_in))  # variance 1 / context_dim
                weights[layer.name]["context"] = scale * jax.random.normal(
                    key_context, (self.context_dim, cout)
                )
        return weights

    def less_context(self, weights: Weights) -> Weights:
        """The last layer subtracts the first entries of the context."""
        name = self.layers[-1].name
        kernel = weights[name]["context"]
        return {
            **weights,
            name: {**weights[name], "context": -jnp.eye(*kernel.shape, dtype=kernel.dtype)},
        }

    def apply(
        self,
        weights: Weights,
        x: Float[Array, "b ..."],
        context: Context = None,
    ) -> Float[Array, "b ..."]:
        """``g(x)`` or ``g(x; context)`` for these weights, without a constraint."""
        h = x
        for layer in self.layers:
            h = layer.apply(weights[layer.name], h, context)
        return h

    def lipschitz_bound(self, weights: Weights) -> Float[Array, ""]:
        """Product of the guaranteed bounds of the parts' constants, rounded up."""
        return self.bound_of_norms(self.norm_bounds(weights))

    # ----------------------------------------------------------------------------------- the budget

    @property
    def chain(self) -> tuple[LayerSpec, ...]:
        """The layers."""
        return self.layers

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        """The layers, whose constants are their operator norms."""
        return tuple(Part(layer.name, (layer.name,), layer) for layer in self.layers)

    def operator_kernel(self, weights: Weights, part: Part) -> Array:
        """Kernel of the operator of a part."""
        return weights[part.name]["kernel"]

    def initial_iterates(self, key: Array) -> dict[str, Array]:
        """Random starts of the power iterations, one per part, of the shape of its operator's
        input.
        """
        keys = jax.random.split(key, len(self.parts))
        return {
            part.name: jax.random.normal(k, part.operator.in_shape)
            for part, k in zip(self.parts, keys, strict=True)
        }

    def singular_vectors(
        self, weights: Weights, iterates: Weights, *, num_steps: int | None
    ) -> dict[str, VectorPair]:
        """The singular vectors ``(u, v)`` of every part's operator, by power iteration without a
        gradient.
        """
        return {
            part.name: part.operator.singular_vectors(
                self.operator_kernel(weights, part), iterates[part.name], num_steps
            )
            for part in self.parts
        }

    def constrained(
        self, weights: Weights, vectors: Weights, *, coeff: float, budget: str
    ) -> ConstrainedBranch:
        """The branch whose kernels are scaled into the budget by the norms along
        `singular_vectors`.
        """

        def constant_of(part: Part) -> Array:
            norm = part.operator.norm_along(self.operator_kernel(weights, part), vectors[part.name])
            power = norm ** len(part.layers)  # may underflow; 0 only if the norm is 0, see below
            return jnp.where(norm > 0, jnp.maximum(power, jnp.finfo(power.dtype).tiny), power)

        norms = {part.name: constant_of(part) for part in self.parts}
        scaled, lipschitz = self._within_budget(weights, norms, coeff=coeff, budget=budget)
        branch = Branch(self, scaled, lipschitz)
        return ConstrainedBranch(branch, {name: v for name, (_, v) in vectors.items()}, norms)

    def norm_bounds(self, weights: Weights, **settings: Any) -> dict[str, Array]:
        """Guaranteed upper bound of every part's constant; ``settings`` go to
        `LayerSpec.norm_bound`.

        An operator's norm is off by at most ``sqrt(taps * min(cin, cout))`` times the relative
        error of its kernel's entries.
        """

        def bound_of(part: Part) -> Array:
            bound = part.operator.norm_bound(self.operator_kernel(weights, part), **settings)
            *taps, cin, cout = part.operator.kernel_shape
            error = (
                self.operator_roundings
                * float(jnp.finfo(bound.dtype).eps)
                * math.sqrt(math.prod(taps) * min(cin, cout))
            )
            return reduce(product_bound, [bound * (1 + error)] * len(part.layers))

        return {part.name: bound_of(part) for part in self.parts}

    def certified(
        self, weights: Weights, bounds: Norms, *, coeff: float, budget: str
    ) -> ConstrainedBranch:
        """The branch whose kernels are scaled into the budget by guaranteed bounds, from the
        first step on, for any weights.
        """
        allowance = len(self.layers) * _SCALING_MARGIN
        within = coeff * (1 - allowance - _SCALING_MARGIN)
        scaled, lipschitz = self._within_budget(weights, bounds, coeff=within, budget=budget)
        return ConstrainedBranch(Branch(self, scaled, lipschitz * (1 + allowance)), {}, bounds)

    def bound_of_norms(self, bounds: Norms) -> Float[Array, ""]:
        """The product of the parts' constants, rounded up."""
        return branch_bound(jnp.stack(list(bounds.values())))

    def of_stored(self, weights: Weights, *, coeff: float) -> Branch:
        """The branch of these weights, which are scaled already."""
        del coeff
        return Branch(self, weights)

    def _within_budget(
        self, weights: Weights, norms: Norms, *, coeff: float, budget: str
    ) -> tuple[dict[str, Any], Float[Array, ""]]:
        """Kernels scaled down, each part to ``coeff`` or all by one factor to a product of
        ``coeff``; and the constant of the scaled branch.
        """
        sizes = jnp.stack([norms[part.name] for part in self.parts])
        if budget == "layer":
            excess = sizes / coeff
        else:  # the geometric mean, which cannot overflow; a zero layer makes the product zero
            all_positive = jnp.all(sizes > 0)
            mean = jnp.exp(jnp.mean(jnp.log(jnp.where(all_positive, sizes, 1))))
            excess = jnp.broadcast_to(
                jnp.where(all_positive, mean, 0) / coeff ** (1 / len(norms)), sizes.shape
            )
        # Kernels whose norm exceeds the largest float stay, with an infinite bound: scaled they
        # would be 0.
        excess = jnp.maximum(jnp.where(jnp.isfinite(excess), excess, 1), 1)
        scaled = dict(weights)
        for i, part in enumerate(self.parts):
            for name in part.layers:
                own = excess[i] if len(part.layers) == 1 else excess[i] ** (1 / len(part.layers))
                scaled[name] = {
                    **weights[name],
                    "kernel": soft_normalize(weights[name]["kernel"], own, 1.0),
                }
        product = reduce(product_bound, list(sizes / excess))
        # An infinite norm beside a layer of zeros gives an infinite bound, not 0.
        product = jnp.where(jnp.any(jnp.isinf(sizes)), jnp.inf, product)
        return scaled, lax.stop_gradient(product)

    # --------------------------------------------------------------------------- what it knows more

    def folded(self, weights: Weights, context: Float[Array, " k"]) -> Weights:
        """Every layer's map of the context is added to its bias."""

        def without_context(own: Mapping[str, Array]) -> dict[str, Array]:
            bias, shift = own["bias"], context @ own["context"]
            shifted = bias + shift.reshape((1,) * (bias.ndim - 1) + shift.shape).astype(bias.dtype)
            return {
                **{name: value for name, value in own.items() if name != "context"},
                "bias": shifted,
            }

        return {name: without_context(own) for name, own in weights.items()}

    @cached_property
    def knows(self) -> frozenset[str]:
        """The closed forms that save time.

        - "trace": two layers around an elementwise activation, with one odd kernel size if
          convolutional; not for periodic images smaller than the kernel, where taps overlap that
          are not mirrored.
        - "jacobian": such a branch with dense layers and at most `FULL_DIMS` dimensions.
        - "logdet": if it takes fewer operations than ``d`` products with the Jacobian, and there is
          no "jacobian".
        """
        sizes, known = self.kernel_sizes, set()
        same_size = sizes is None or (sizes[0] == sizes[-1] and sizes[0] % 2 == 1)
        meets = (
            sizes is not None and self.padding == "CIRCULAR" and min(self.in_shape[:2]) < sizes[0]
        )
        if self._is_elementwise and same_size and not meets:
            known.add("trace")
            if sizes is None and self.in_shape[0] <= FULL_DIMS:
                known.add("jacobian")
        if sizes is None:
            is_cheap = self._is_elementwise and self.hidden[0] < self.in_shape[0]
        else:
            is_cheap = self.padding == "SAME" and (self._has_stencil or self._is_local)
        return frozenset(known | ({"logdet"} if is_cheap and "jacobian" not in known else set()))

    def trace(
        self, weights: Weights, x: Float[Array, "b ..."], context: Context = None
    ) -> Float[Array, " b"]:
        """``tr J_g(x)`` in closed form, see `two_layers.trace`."""
        (there, back), (d0, d1) = self._kernels(weights), self._slopes(weights, x, context)
        return two_layers.trace(there, back, d0, d1, self.padding)

    def jacobian(
        self, weights: Weights, x: Float[Array, "b d"], context: Context = None
    ) -> Float[Array, "b d d"]:
        """``J_g(x)`` of a dense branch of two layers as one product of matrices."""
        (there, back), (d0, d1) = self._kernels(weights), self._slopes(weights, x, context)
        return two_layers.jacobian(there, back, d0, d1)

    def logdet(
        self, weights: Weights, x: Float[Array, "b ..."], context: Context = None
    ) -> Float[Array, " b"]:
        """``log det(I + J_g(x))``, exact to rounding, for ``Lip(g) < 1``.

        A dense branch uses the matrix of its hidden units, a convolutional branch its stencil.
        Leading minors of the former are determinants of the branch with fewer hidden units, which
        is a contraction as well: no rows need to be exchanged.
        """
        if self.kernel_sizes is not None and not self._has_stencil:
            return stencil_logdet(
                stencil_by_products(lambda x: self.apply(weights, x, context), x, self._reach)
            )
        (there, back), (d0, d1) = self._kernels(weights), self._slopes(weights, x, context)
        d0 = d0 if self.preactivation else None
        if self.kernel_sizes is None:
            matrices = two_layers.through_hidden_units(there, back, d0, d1)
            return log_abs_det(jnp.eye(matrices.shape[-1], dtype=x.dtype)[None] + matrices)
        return stencil_logdet(two_layers.stencil(there, back, d0, d1))

    @property
    def _is_elementwise(self) -> bool:
        return len(self.hidden) == 1 and activations.get(self.activation).elementwise

    @property
    def _has_stencil(self) -> bool:
        return self._is_elementwise and all(size % 2 for size in self.kernel_sizes or ())

    @property
    def _is_local(self) -> bool:
        """Whether fewer products than dimensions give the stencil."""
        return any(2 * self._reach + 1 < side for side in self.in_shape[:2])

    @property
    def _reach(self) -> int:
        return sum(
            layer.kernel_shape[0] // 2 for layer in self.layers if self.kernel_sizes is not None
        )

    def _kernels(self, weights: Weights) -> tuple[Array, ...]:
        return tuple(weights[layer.name]["kernel"] for layer in self.layers)

    def _slopes(self, weights: Weights, x: Array, context: Context) -> tuple[Array, Array]:
        """``D_0`` and ``D_1`` of `two_layers`; without a first activation ``D_0`` is a batch of
        one.
        """
        first, second = self.layers
        hidden = first.apply(weights[first.name], x, context)
        if first.activation is None:
            d0 = jnp.ones_like(x[:1])
        else:
            d0 = _slope(first, weights[first.name], x)
        return d0, _slope(second, weights[second.name], hidden)


def _inverse_softplus(y: float) -> float:
    return y + math.log(-math.expm1(-y))


def _slope(layer: LayerSpec, parameters: Mapping[str, Array], h: Array) -> Array:
    """Slope of each output of the elementwise activation in front of a layer."""
    return jax.jvp(lambda h: layer.activate(parameters, h), (h,), (jnp.ones_like(h),))[1]
