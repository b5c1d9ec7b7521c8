r"""Dense concatenation with learnable weights, as in i-DenseNets (Perugachi-Diaz et al. 2021).

Every layer but the last keeps what it has and adds channels. In the words of the paper, with ``b_0 = x``,

    b_i = [u_i b_{i-1}, v_i phi(W_i b_{i-1} + bias_i)],    u_i^2 + v_i^2 = 1,    g(x) = W_n b_{n-1} + bias_n.              (1)

Between two inputs, ``|b_i - b'_i|^2 <= (u_i^2 + v_i^2 |W_i|^2) |b_{i-1} - b'_{i-1}|^2``, because ``phi`` is 1-Lipschitz. So

    Lip(g) <= |W_n| prod_{i<n} sqrt(u_i^2 + v_i^2 |W_i|^2),                                                                (2)

where no factor of the product is above 1 as long as ``|W_i| <= 1``.

The kernels here are ``V_i = W_i D_{i-1}``. The diagonal ``D_{i-1}`` has the product of all ``u`` and ``v`` on the way of each
channel, ``b_i = D_i a_i``. So the network is a plain concatenation of these very numbers,

    a_0 = x,    a_i = [a_{i-1}, phi(V_i a_{i-1} + bias_i)],    g(x) = V_n a_{n-1} + bias_n,

and ``u`` and ``v`` say in (2) how its Lipschitz constant is shared out.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from iresnet_jax.branches.branch import Norms, Weights, check_budget, check_coeff
from iresnet_jax.branches.feedforward import Context, FeedforwardSpec
from iresnet_jax.branches.layers import LayerSpec, Part
from iresnet_jax.maths import activations
from iresnet_jax.maths.enclosures.upward_rounding import UP
from iresnet_jax.maths.norms.power_iteration import soft_normalize


@dataclass(frozen=True)
class DenseNetSpec(FeedforwardSpec):
    """The architecture of a branch of dense concatenations.

    ``hidden`` are the channels that each layer adds, before an activation makes several of one; the last layer takes everything
    to the channels of the input. Other attributes are those of `FeedforwardSpec`. The weights of a layer behind a concatenation
    have a number "share", of which ``u_i^2`` is the sigmoid.
    """

    operator_roundings: ClassVar[int] = 16  # of the products of shares, and of the quotient

    @cached_property
    def layers(self) -> tuple[LayerSpec, ...]:
        """The linear maps ``V_i``, each with the activation of the channels that came last."""
        factor = activations.get(self.activation).channel_factor
        *space, channels = self.in_shape
        layers, cin, passed = [], channels * (factor if self.preactivation else 1), 0
        for i, cout in enumerate((*self.hidden, channels)):
            activation = self.activation if i or self.preactivation else None
            if self.kernel_sizes is None:
                layers.append(LayerSpec(f"dense{i}", (cin, cout), (cin,), activation, passed=passed))
            else:
                shape = (self.kernel_sizes[i], self.kernel_sizes[i], cin, cout)
                layers.append(LayerSpec(f"conv{i}", shape, (*space, cin), activation, self.padding, passed))
            cin, passed = cin + factor * cout, cin
        return tuple(layers)

    def initial_weights(self, key: Array, *, last_scale: float | Float[Array, ""] = 1.0, sharp: bool = False) -> Weights:
        """The weights of `FeedforwardSpec.initial_weights`, and equal shares."""
        weights = super().initial_weights(key, last_scale=last_scale, sharp=sharp)
        shares = {layer.name: {"share": jnp.zeros(())} for layer in self.layers[1:]}
        return {name: {**own, **shares.get(name, {})} for name, own in weights.items()}

    def apply(
        self, weights: Weights, x: Float[Array, "b ..."], context: Context = None, *, bfloat16: bool = False, **given: Any
    ) -> Float[Array, "b ..."]:
        """``g(x)`` or ``g(x; context)`` for weights as they are."""
        assert not given  # BatchNorm is for feed-forward branches
        h = z = x
        for i, layer in enumerate(self.layers):
            own = weights[layer.name]
            h = layer.activate(own, jnp.concatenate([h, z], axis=-1) if i else x)
            z = layer._replace(activation=None).apply(own, h, context, bfloat16=bfloat16)
        return z

    # ------------------------------------------------------------------------------------------------- the budget

    def _concatenations(self, weights: Weights) -> list[tuple[Any, Any]]:
        """``(u_i^2, v_i^2)``."""
        raw = [jnp.asarray(weights[layer.name]["share"]) for layer in self.layers[1:]]
        return [(jax.nn.sigmoid(share), jax.nn.sigmoid(-share)) for share in raw]

    def operator_kernel(self, weights: Weights, part: Part) -> Array:
        """``W_i`` of a part."""
        kernel = weights[part.name]["kernel"]
        scale = jnp.ones(self.layers[0].in_shape[-1], kernel.dtype)
        for layer, (kept, added) in zip(self.layers, ((1.0, 1.0), *self._concatenations(weights)), strict=True):
            new = layer.in_shape[-1] - len(scale)
            scale = jnp.concatenate([jnp.sqrt(kept) * scale, jnp.full(new, jnp.sqrt(added), scale.dtype)])
            if layer.name == part.name:
                return kernel / scale.reshape(*(1,) * (kernel.ndim - 2), -1, 1)
        raise AssertionError(part.name)

    def factors(self, weights: Weights, norms: Norms) -> list[Any]:
        """The factors of (2), which cover their roundings."""
        *inner, last = (norms[part.name] for part in self.parts)
        shares = self._concatenations(weights)
        up = 1 + 8 * float(jnp.finfo(shares[0][0].dtype).eps)
        return [*((kept + added * norm**2) ** 0.5 * up for (kept, added), norm in zip(shares, inner, strict=True)), last]

    def _within_budget(
        self, weights: Weights, norms: Norms, *, coeff: float, budget: str
    ) -> tuple[dict[str, Any], Float[Array, ""]]:
        """Kernels scaled down to the budget, never up.

        In budget "layer" every ``|W_i|`` is at most ``coeff``. In budget "block" they are at most 1, and the last one takes
        what is left.
        """
        check_coeff(coeff)
        check_budget(budget)
        *inner, last = self.parts
        most = coeff if budget == "layer" else 1.0
        limits = {part.name: jnp.full((), most, norms[part.name].dtype) for part in inner}
        within = {name: jnp.minimum(norms[name], limit) for name, limit in limits.items()}
        *factors, _ = self.factors(weights, {**within, last.name: norms[last.name]})
        before = jnp.prod(jnp.stack(factors))
        limits[last.name] = coeff * jnp.ones_like(before) if budget == "layer" else coeff / before
        scaled = dict(weights)
        for name, limit in limits.items():
            scaled[name] = {**weights[name], "kernel": soft_normalize(weights[name]["kernel"], norms[name] / limit, 1.0)}
        return scaled, lax.stop_gradient(before * jnp.minimum(norms[last.name], limits[last.name]))

    # ------------------------------------------------------------------------------------------ what certificates follow

    @cached_property
    def chain(self) -> tuple[LayerSpec, ...]:
        """The layers, of which all but the last hand on what they are given, in front of what they add."""
        *inner, last = self.layers

        def handing_on(layer: LayerSpec) -> LayerSpec:
            *taps, cin, cout = layer.kernel_shape
            return layer._replace(kernel_shape=(*taps, cin, cin + cout))

        return (*map(handing_on, inner), last)

    def chain_weights(self, weights: Weights, norms: Norms) -> tuple[Weights, Norms]:
        """Weights of `chain`: of kernels ``[I, V_i]``, whose norms are at most ``sqrt(1 + |W_i|^2)``."""
        chained, bounds = dict(weights), dict(norms)
        for layer in self.layers[:-1]:
            own = weights[layer.name]
            kernel, cin = own["kernel"], layer.kernel_shape[-2]
            middle = tuple((size - 1) // 2 for size in layer.kernel_shape[:-2])
            identity = jnp.zeros((*layer.kernel_shape[:-1], cin), kernel.dtype).at[middle].set(jnp.eye(cin, dtype=kernel.dtype))
            padded = {
                name: jnp.concatenate([jnp.zeros((*own[name].shape[:-1], cin), kernel.dtype), own[name]], axis=-1)
                for name in ("bias", "context")
                if name in own
            }
            chained[layer.name] = {**own, **padded, "kernel": jnp.concatenate([identity, kernel], axis=-1)}
            bounds[layer.name] = jnp.sqrt(1 + jnp.asarray(norms[layer.name]) ** 2) * UP
        return chained, bounds

    # ------------------------------------------------------------------------------------------ what it knows more

    @property
    def has_logdet(self) -> bool:
        """Whether `logdet` exists, as it does for convolutions, and takes fewer operations than products with the Jacobian."""
        return self.kernel_sizes is not None and super().has_logdet

    @property
    def _has_stencil(self) -> bool:
        return False

    def trace(self, weights: Weights, x: Float[Array, "b ..."], context: Context = None) -> Float[Array, " b"]:
        """``tr J_g(x)`` of one concatenation in closed form: that of two layers, and of what passes by them."""
        return super().trace(weights, x, context) + jnp.sum(self._passing(weights, x), axis=tuple(range(1, x.ndim)))

    def diagonal(self, weights: Weights, x: Float[Array, "b ..."], context: Context = None) -> Float[Array, "b ..."]:
        """The diagonal of ``J_g(x)`` of one concatenation in closed form, for what ``g`` costs."""
        return super().diagonal(weights, x, context) + self._passing(weights, x)

    def largest_diagonal(self, weights: Weights) -> Float[Array, ""]:
        """The largest absolute value that an entry of the diagonal can have if slopes are between 0 and 1."""
        passed = self._passed(weights)
        return super().largest_diagonal(weights) + jnp.max(jnp.sum(jnp.abs(passed), axis=0))

    def jacobian(self, weights: Weights, x: Float[Array, "b d"], context: Context = None) -> Float[Array, "b d d"]:
        """``J_g(x)`` of one dense concatenation as one product of matrices."""
        slopes = self._first_slopes(weights, x)
        num_dims = self.in_shape[0]
        skip = weights[self.layers[1].name]["kernel"][: slopes.shape[1]].reshape(-1, num_dims, num_dims)
        linear = jnp.einsum("bsi,sio->boi", slopes.reshape(len(slopes), -1, num_dims), skip)
        return super().jacobian(weights, x, context) + linear

    def _kernels(self, weights: Weights) -> tuple[Array, ...]:
        """Of one concatenation: the layer there, and the layer back without what passes."""
        first, second = self.layers
        return weights[first.name]["kernel"], weights[second.name]["kernel"][..., second.passed :, :]

    def _passed(self, weights: Weights) -> Float[Array, "s c"]:
        """What an input's channel sends past a concatenation to its own output, for each copy that an activation makes."""
        second = self.layers[1]
        middle = tuple((size - 1) // 2 for size in second.kernel_shape[:-2])
        centre = weights[second.name]["kernel"][middle][: second.passed]
        return jnp.diagonal(centre.reshape(-1, *[self.in_shape[-1]] * 2), axis1=1, axis2=2)

    def _passing(self, weights: Weights, x: Float[Array, "b ..."]) -> Float[Array, "_ ..."]:
        """The diagonal of the Jacobian of what passes; of a batch of one where it is the same for all examples."""
        passed, slopes = self._passed(weights), self._first_slopes(weights, x)
        by_copy = slopes.reshape(*slopes.shape[:-1], *passed.shape)
        return jnp.einsum("...sc,sc->...c", by_copy, passed)
