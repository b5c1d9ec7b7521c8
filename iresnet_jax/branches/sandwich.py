r"""Sandwich layers ``h -> Q phi(P h + b)``, in which one norm bounds both matrices (Wang and
Manchester 2023).

Layers and closed forms are a feed-forward branch's; only the Lipschitz constant differs. Let every
slope of ``phi`` lie in [0, 1], and let ``Psi`` be any diagonal matrix of positive numbers. Then

    Lip(h -> Q phi(P h + b)) <= s    if    |[Psi P, Psi^-1 Q^T]|_2^2 <= 2 s.    (1)

Proof. If two inputs differ by ``e``, the outputs of ``phi`` differ by ``z = D P e`` with slopes
``D`` in [0, 1], so ``z_j^2 <= z_j (P e)_j`` for every ``j``. With ``w = Psi z`` and ``q = P^T Psi
w`` this says ``|w|^2 <= <q, e>``, and by (1)

    |Q z|^2 = <w, Psi^-1 Q^T Q Psi^-1 w> <= 2 s |w|^2 - |q|^2 <= 2 s <q, e> - |q|^2 <= s^2 |e|^2.

If ``Psi`` is the best multiple of the identity, ``s`` is at most ``|Q| |P|``, the bound for slopes
in [-1, 1], and as little as half of it. Wang and Manchester make ``[A B]`` orthogonal, ``P =
sqrt(2) Psi^-1 B`` and ``Q = sqrt(2) A^T Psi``. By (1) it is enough that ``[A B]`` is a contraction,
so one norm scales both kernels, also for convolutions with zeros beyond the border.

``Psi_j = exp(psi_j) sqrt(|Q_j| / |P_j|)`` for the row ``P_j`` and the column ``Q_j`` of a hidden
channel, so that it does not matter which of the two kernels carries the scale of a channel. ``psi``
is learned, as by Wang and Manchester. It does not enter the function; training uses it to reduce
the norm in (1).
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from iresnet_jax.branches.branch import Norms, Weights
from iresnet_jax.branches.feedforward import FeedforwardSpec
from iresnet_jax.branches.layers import LayerSpec, Part

# of squared norms of rows and columns beside the largest entry, so that a channel of zeros has a
# balance
_FLOOR = 1e-12


@dataclass(frozen=True)
class SandwichSpec(FeedforwardSpec):
    """The architecture of a branch of sandwich layers, with the numbers of hidden channels in
    ``hidden``.

    A layer has as many outputs as hidden channels; the last layer has as many outputs as the input
    has channels. Kernel sizes are assigned as in a feed-forward branch: the first map of a layer
    has the size in front of its hidden channels, and the second map the size behind. Other
    attributes are as in `FeedforwardSpec`. With one entry in ``hidden`` the weights are the same,
    too, apart from "psi".
    """

    operator_roundings: ClassVar[int] = 16  # of the balance, applied twice, and of products

    def __post_init__(self):
        super().__post_init__()
        self.check_slopes()

    @property
    def _maps(self) -> list[tuple[int, int, bool]]:
        """Two linear maps for each sandwich layer, with the activation in between."""
        widths = [*[width for width in self.hidden for _ in range(2)][:-1], self.in_shape[-1]]
        return [
            (width, (i + 1) // 2, i % 2 == 1 or (self.preactivation and i == 0))
            for i, width in enumerate(widths)
        ]

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        """The sandwich layers: the operator of one is ``[Psi P, Psi^-1 Q^T] / sqrt(2)``."""
        parts = []
        for i, (there, back) in enumerate(zip(self.layers[::2], self.layers[1::2], strict=True)):
            *_, cin, width = there.kernel_shape
            channels = cin + back.kernel_shape[-1]
            taps = max(there.kernel_shape[:-2], back.kernel_shape[:-2])
            operator = LayerSpec(
                "", (*taps, channels, width), (*there.in_shape[:-1], channels), None, self.padding
            )
            parts.append(Part(f"sandwich{i}", (there.name, back.name), operator))
        return tuple(parts)

    def initial_weights(
        self, key: Array, *, last_scale: float = 1.0, sharpness: float = 0.0
    ) -> Weights:
        """The weights of `FeedforwardSpec.initial_weights`, and ``psi`` of zeros."""
        weights = dict(super().initial_weights(key, last_scale=last_scale, sharpness=sharpness))
        for layer in self.layers[::2]:
            weights[layer.name] = {**weights[layer.name], "psi": jnp.zeros(layer.kernel_shape[-1])}
        return weights

    def operator_kernel(self, weights: Weights, part: Part) -> Array:
        """Kernel of the operator of a part."""
        there, back = (weights[name]["kernel"] for name in part.layers)
        # This is the kernel of the transposed convolution.
        back = jnp.swapaxes(jnp.flip(back, range(back.ndim - 2)), -2, -1)
        psi = jnp.asarray(weights[part.layers[0]]["psi"]).reshape(*(1,) * (there.ndim - 1), -1)
        balance = jnp.exp(psi) * jnp.sqrt(_row_norms(back) / _row_norms(there)) / math.sqrt(2)
        taps = part.operator.kernel_shape[:-2]
        return jnp.concatenate(
            [_padded(there * balance, taps), _padded(back / (2 * balance), taps)], axis=-2
        )

    def chain_weights(self, weights: Weights, norms: Norms) -> tuple[Weights, Norms]:
        """Weights and guaranteed operator norms of the layers."""
        del norms
        return weights, {
            layer.name: layer.norm_bound(weights[layer.name]["kernel"]) for layer in self.layers
        }


def _row_norms(kernel: Float[Array, "... i h"]) -> Float[Array, "... 1 h"]:
    """Norm of the weights of each output, at least `_FLOOR` of the largest entry; broadcastable to
    the kernel.
    """
    largest = lax.stop_gradient(jnp.max(jnp.abs(kernel)))
    scale = jnp.where(largest > 0, largest, 1)
    axes = tuple(range(kernel.ndim - 1))
    return scale * jnp.sqrt(jnp.sum((kernel / scale) ** 2, axis=axes, keepdims=True) + _FLOOR)


def _padded(kernel: Array, taps: tuple[int, ...]) -> Array:
    """The kernel with zeros around its taps, up to ``taps``."""
    pads = [((want - have) // 2,) * 2 for want, have in zip(taps, kernel.shape, strict=False)]
    return jnp.pad(kernel, (*pads, (0, 0), (0, 0)))
