"""The linear layers of branches, dense and convolutional: applying one, and its operator norm,
estimated and guaranteed.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
from jaxtyping import Array, Float

from iresnet_jax.maths import activations, platforms
from iresnet_jax.maths.convolution import Padding, choose_implementation, conv
from iresnet_jax.maths.convolution_certificate import (
    TWISTS,
    Twist,
    conv_norm_bound,
    dense_norm_bound,
)
from iresnet_jax.maths.power_iteration import LinearMap, norm_along, singular_vectors

VectorPair = tuple[Float[Array, "..."], Float[Array, "..."]]


class LayerSpec(NamedTuple):
    """One linear layer of a branch.

    Attributes:
        name: Key among the branch's weights.
        kernel_shape: ``(kh, kw, cin, cout)`` of a convolution, ``(cin, cout)`` of a dense layer.
        in_shape: Shape of one input, without the batch.
        activation: Name of the activation in front of the layer, in `activations.ACTIVATIONS`; None
            without one.
        padding: Padding of a convolution, "SAME" (zeros) or "CIRCULAR".
    """

    name: str
    kernel_shape: tuple[int, ...]
    in_shape: tuple[int, ...]
    activation: str | None
    padding: Padding = "SAME"

    def linear_map(self, *, single: bool = False) -> LinearMap:
        """``(kernel, x) -> W x``, without the bias.

        Args:
            single: For one example without a batch axis, in a form that stays fast under ``vmap``
                over kernels.
        """
        if len(self.kernel_shape) == 2:
            return lambda kernel, x: x @ kernel
        if not single:
            return lambda kernel, x: conv(x, kernel, padding=self.padding)
        thin_in = self.kernel_shape[2] <= self.kernel_shape[3]
        implementation = choose_implementation(self.kernel_shape)
        if implementation == "xla":  # vmap would make it a grouped convolution
            implementation = "patches" if thin_in else "taps"
        return lambda kernel, x: conv(
            x[None], kernel, padding=self.padding, implementation=implementation
        )[0]

    def activate(self, parameters: Mapping[str, Array], h: Array) -> Array:
        """The activation in front of the layer, if there is one; it reads ``parameters["beta"]`` if
        it has a ``beta``.
        """
        if self.activation is None:
            return h
        return activations.get(self.activation).apply(h, parameters.get("beta"))

    def apply(
        self, parameters: Mapping[str, Array], h: Array, context: Array | None = None
    ) -> Array:
        """The layer after its activation, with its bias and a linear map of the context, which
        belongs to an example or to a pixel.
        """
        h = self.linear_map()(parameters["kernel"], self.activate(parameters, h))
        h = _add_bias(h, parameters["bias"])
        if context is not None:
            shift = context @ parameters["context"]
            if shift.ndim != h.ndim:
                shift = shift.reshape(len(h), *(1,) * (h.ndim - 2), shift.shape[-1])
            h = h + shift
        return h

    def singular_vectors(self, kernel: Array, start: Array, num_steps: int | None) -> VectorPair:
        """The singular vectors ``(u, v)`` of the layer's norm, by power iteration from
        ``start``, without a gradient.
        """
        u, v, _ = singular_vectors(self.linear_map(single=True), kernel, start, num_steps=num_steps)
        return u, v

    def norm_along(self, kernel: Array, pair: VectorPair) -> Float[Array, ""]:
        """``<u, W v>``: the norm along singular vectors, an estimate from below, with a gradient by
        the kernel.
        """
        return norm_along(self.linear_map(single=True), kernel, *pair)

    def norm_bound(
        self,
        kernel: Array,
        *,
        num_squarings: int | None = None,
        twists: Sequence[Twist] | None = None,
    ) -> Float[Array, ""]:
        """Guaranteed upper bound of the operator norm at the real image size; nan if a weight is
        not finite.

        Args:
            kernel: The kernel.
            num_squarings: Fewer squarings are cheaper and looser, see `dense_norm_bound`; None
                takes as many as tighten the bound.
            twists: Twists of a convolution's embedding, see `conv_norm_bound`; None takes the
                default there.
        """
        if kernel.ndim == 2:
            return dense_norm_bound(kernel, num_squarings=num_squarings)
        size = (self.in_shape[0], self.in_shape[1])
        return conv_norm_bound(
            kernel, size, padding=self.padding, num_squarings=num_squarings, twists=twists
        )


class Part(NamedTuple):
    """A part of a branch with a Lipschitz constant; the product of all parts' constants bounds
    ``Lip(g)``.

    Attributes:
        name: Key among norms and power iterates.
        layers: Names of the layers that it is made of, whose kernels are scaled together.
        operator: A linear map whose norm, to the power of the number of layers, is the constant of
            the part.
    """

    name: str
    layers: tuple[str, ...]
    operator: LayerSpec


def training_twists(channels: int) -> tuple[Twist, ...]:
    """Twists of the embedding with which a training step bounds norms of convolutions, see
    `conv_norm_bound`.

    All four twists cost four times as much as one, and are taken if a 3 x 3 layer's Gram matrices
    have up to 8 rows. On 8 x 8 and larger images the antiperiodic twist alone is within 2 % of the
    minimum over all; on 4 x 4 images it costs trained kernels up to a quarter of their budget.

    Args:
        channels: Channels of the branch's input.
    """
    return TWISTS if channels <= 8 else ((1, 1),)


@functools.partial(jax.jit, inline=True)
def _add_bias(
    h: Float[Array, "b *space c"], bias: Float[Array, "*pixels c"]
) -> Float[Array, "b *space c"]:
    """``h + bias``, on CPUs as an array of another rank, which XLA does not write over ``h``.

    XLA:CPU's older emitters of fusions (`platforms.CPU_OPTIONS`) vectorise loops only for arrays
    that do not overlap.
    """
    if platforms.platform() == "cpu":
        channels = h.shape[-1]
        return (
            h.reshape(len(h), math.prod(h.shape[1:-1]), channels) + bias.reshape(1, -1, channels)
        ).reshape(h.shape)
    return h + bias.reshape((1,) * (h.ndim - bias.ndim) + bias.shape)
