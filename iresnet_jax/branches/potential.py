r"""Gradient steps of convex potentials, which never stretch: such networks are 1-Lipschitz at any
depth.

    g(x; c) = -K^T phi(K x + b + A c) + b' + A' c,        |K|_2^2 <= L < 1,    slopes of phi in [0,
    1]

The Jacobian ``I + J_g = I - K^T D K`` is symmetric, and its eigenvalues are in ``[1 - L, 1]``
(convex potential layers, Meunier et al. 2022, whose step is twice as long). So ``Lip(g) <= L``, as
for other kinds, and ``x + g(x)`` increases no distance: ``n`` blocks are ``((1 - L)^n,
1)``-bi-Lipschitz.

The branch is a feed-forward branch of two layers whose second layer is ``-K^T``, with the same
closed forms.
"""

from dataclasses import dataclass
from functools import cached_property

import jax.numpy as jnp
from jaxtyping import Array, Float

from iresnet_jax.branches.branch import Norms, Weights
from iresnet_jax.branches.feedforward import Context, FeedforwardSpec
from iresnet_jax.branches.layers import Part
from iresnet_jax.maths.lipschitz_bounds import BiLipschitz, block_bounds
from iresnet_jax.maths.upward_rounding import rounded_up


@dataclass(frozen=True)
class PotentialSpec(FeedforwardSpec):
    """The architecture of a potential branch, with one hidden layer.

    It has the attributes of `FeedforwardSpec`. Both convolutions have one odd size, such as
    ``kernel_sizes=(3, 3)``. Weights are a feed-forward branch's without the kernel of the last
    layer.
    """

    def __post_init__(self):
        super().__post_init__()
        self.check_slopes()
        if len(self.hidden) != 1 or self.preactivation or len(set(self.kernel_sizes or (1,))) != 1:
            raise ValueError(
                "potentials have one hidden layer, one kernel size and no activation in front, got "
                f"hidden={self.hidden}, kernel_sizes={self.kernel_sizes} and "
                f"preactivation={self.preactivation}"
            )

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        """The one map ``K``, whose squared norm bounds ``Lip(g)``."""
        first = self.layers[0]
        return (Part(first.name, (first.name,) * 2, first),)

    def block_bounds(self, lipschitz_bound: float | Float[Array, ""]) -> BiLipschitz:
        """``Lip(F) <= max(1, L - 1)``, and ``Lip(F^-1) <= 1 / (1 - L)``."""
        general = block_bounds(lipschitz_bound)
        return general._replace(forward=jnp.maximum(1, general.forward - 2))

    def initial_weights(
        self, key: Array, *, last_scale: float | Float[Array, ""] = 1.0, sharpness: float = 0.0
    ) -> Weights:
        """The weights of `FeedforwardSpec.initial_weights` with ``K`` times the root of
        ``last_scale``.
        """
        weights, (first, last) = super().initial_weights(key, sharpness=sharpness), self.layers
        kernel = weights[first.name]["kernel"] * jnp.sqrt(last_scale)
        behind = {name: value for name, value in weights[last.name].items() if name != "kernel"}
        return {first.name: {**weights[first.name], "kernel": kernel}, last.name: behind}

    def apply(
        self, weights: Weights, x: Float[Array, "b ..."], context: Context = None
    ) -> Float[Array, "b ..."]:
        """``g(x)`` or ``g(x; context)`` for weights as they are."""
        return super().apply(self._of_layers(weights), x, context)

    def chain_weights(self, weights: Weights, norms: Norms) -> tuple[Weights, Norms]:
        """Weights and guaranteed operator norms of the layers; both layers have one norm."""
        norm = rounded_up(jnp.sqrt(norms[self.layers[0].name]), 1)
        return self._of_layers(weights), {layer.name: norm for layer in self.layers}

    def _of_layers(self, weights: Weights) -> Weights:
        """Weights of the feed-forward branch."""
        last = self.layers[1]
        return {**weights, last.name: {**weights[last.name], "kernel": self._kernels(weights)[1]}}

    def _kernels(self, weights: Weights) -> tuple[Array, ...]:
        kernel = weights[self.layers[0].name]["kernel"]
        return kernel, -jnp.swapaxes(jnp.flip(kernel, range(kernel.ndim - 2)), -2, -1)
