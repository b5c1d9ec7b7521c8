r"""1-Lipschitz activations, by name.

A residual branch with weights of operator norm at most ``c < 1`` is a contraction if its
activations do not expand distances (Behrmann et al. 2019, section 2). Every activation in this file
has a Jacobian of Euclidean operator norm at most 1 for every input and every ``beta``; its
docstring has the proof. Channels are on the last axis.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

_LIPSWISH_BOUND = 1.1  # sup of the slope of x * sigmoid(x) is 1.09984
_CLIPSWISH_BOUND = 1.004  # sup of the norm of the slopes of (LipSwish(x), LipSwish(-x)) is 1.00397
_INITIAL_BETA = 0.5


class Activation(NamedTuple):
    """An activation and its properties.

    Attributes:
        function: ``x -> phi(x)``, or ``(x, beta) -> phi(x)`` in the Swish family.
        slope_lipschitz: Lipschitz constant of the Jacobian in the 2-norm, which `certification`
            reads of the activations in this file; for an elementwise activation, the largest slope
            of the slope. An activation with a ``beta`` multiplies it by ``softplus(beta)``. None if
            the Jacobian jumps: training a density differentiates the Jacobian, and the slopes of a
            piecewise linear activation have no gradient.
        initial_beta: Initial value of ``beta``, the raw parameter of the Swish family; None without
            one.
        channel_factor: Output channels for each input channel, one copy of all channels after the
            other: with ``c`` input channels, output ``k c + i`` depends on input ``i``.
        elementwise: Whether each output entry depends on one input entry alone.
        monotone: Whether it is elementwise with slopes in [0, 1], for every input.
    """

    function: Callable[..., Array]
    slope_lipschitz: float | None = None
    initial_beta: float | None = None
    channel_factor: int = 1
    elementwise: bool = True
    monotone: bool = False

    def apply(
        self, x: Float[Array, "..."], beta: Float[Array, "..."] | float | None = None
    ) -> Float[Array, "..."]:
        """``phi(x)``; the Swish family takes a ``beta`` of the shape ``()`` or ``(c,)``."""
        return self.function(x) if beta is None else self.function(x, beta)


def _sharpness(x: Float[Array, "..."], beta: Float[Array, "..."] | float) -> Float[Array, "..."]:
    """``softplus(beta)`` with the shape and dtype of ``x``."""
    return jnp.broadcast_to(jax.nn.softplus(jnp.asarray(beta, x.dtype)), x.shape)


def lipswish(
    x: Float[Array, "..."], beta: Float[Array, "..."] | float = _INITIAL_BETA
) -> Float[Array, "..."]:
    r"""Swish divided by its Lipschitz constant, with a learnable sharpness.

    ``LipSwish(x) = x sigmoid(b x) / 1.1`` with ``b = softplus(beta)`` (Chen et al. 2019, section
    3.3).

    Guaranteed 1-Lipschitz: with ``t = b x`` the numerator has the slope ``s(t) = sigmoid(t) (1 + t
    sigmoid(-t))``. It depends on ``t`` alone, so its extreme values are the same for every ``b >
    0``. ``s'(t) = 0`` means ``t tanh(t / 2) = 2``, hence ``t = +-2.39936`` and ``s`` lies in
    ``[-0.09984, 1.09984]``. Not monotone.

    Args:
        x: Input.
        beta: Raw sharpness, any real number, one per layer or one per input channel.

    Example:
        >>> lipswish(jnp.array([-1.0, 0.0, 1.0]), beta=0.5)
    """
    # sigmoid(y) = (1 + tanh(y / 2)) / 2, whose second derivatives are twice as fast on XLA:CPU as
    # the sigmoid's.
    return x * (0.5 + 0.5 * jnp.tanh(0.5 * _sharpness(x, beta) * x)) / _LIPSWISH_BOUND


def clipswish(
    x: Float[Array, "... c"], beta: Float[Array, "..."] | float = _INITIAL_BETA
) -> Float[Array, "... 2*c"]:
    r"""Concatenates LipSwish of both signs, which keeps more of the gradient norm at the price of
    twice the channels.

    ``CLipSwish(x) = [LipSwish(x), LipSwish(-x)] / 1.004`` along the last axis (Perugachi-Diaz et
    al. 2021). It takes the arguments of `lipswish`.

    Guaranteed 1-Lipschitz: each input channel feeds two outputs, so without the factor 1.004 the
    Jacobian has the singular values ``sqrt(s(t)^2 + s(-t)^2) / 1.1`` with ``s`` and ``t`` as in
    `lipswish`. As ``s(t) + s(-t) = 1``, the root grows with the distance of ``s`` from 1/2, up to
    ``sqrt(1.09984^2 + 0.09984^2) / 1.1 = 1.00397``.

    Example:
        >>> clipswish(jnp.ones((8, 16, 16, 32))).shape
        (8, 16, 16, 64)
    """
    half = 0.5 / (_LIPSWISH_BOUND * _CLIPSWISH_BOUND)
    odd = jnp.tanh(0.5 * _sharpness(x, beta) * x)  # see `lipswish`
    return jnp.concatenate([x * (half + half * odd), x * (half * odd - half)], axis=-1)


def maxmin(x: Float[Array, "... c"]) -> Float[Array, "... c"]:
    r"""Sorts each pair of neighbouring channels, largest first.

    ``(x_2i, x_2i+1) -> (max, min)`` (Anil et al. 2019, GroupSort with groups of two).

    Guaranteed 1-Lipschitz and gradient-norm preserving: away from ties the Jacobian is a
    permutation. At a tie each of the two channels gets half of the gradient, by the projection
    ``[[.5, .5], [.5, .5]]``, of norm 1.

    Example:
        >>> maxmin(jnp.array([1.0, 3.0, 5.0, 2.0]))
        Array([3., 1., 5., 2.], dtype=float32)
    """
    c = x.shape[-1]
    if c % 2:
        raise ValueError(
            "maxmin sorts pairs of channels and needs an even number of them, got "
            f"{c}: add one channel"
        )
    is_first = jnp.arange(c) % 2 == 0
    # Rolling is faster on XLA:CPU than reshaping into pairs.
    neighbour = jnp.where(is_first, jnp.roll(x, -1, axis=-1), jnp.roll(x, 1, axis=-1))
    return jnp.where(is_first, jnp.maximum(x, neighbour), jnp.minimum(x, neighbour))


@jax.custom_jvp
def elu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    r"""``x`` above 0 and ``exp(x) - 1`` below: slope ``exp(min(x, 0))`` in (0, 1], hence
    1-Lipschitz and monotone.

    Written as ``2 t / (1 - t)`` with ``t = tanh(x / 2)``, which is accurate near 0 and costs
    XLA:CPU little more than half as much as ``expm1``. The slope ``1 + min(y, 0)`` is a function of
    the value ``y``, which the next layer keeps anyway. The division comes last: a cheap last
    operation, such as a selection, would be repeated by XLA wherever its result is used, and its
    operands would stay in memory.

    Example:
        >>> elu(jnp.array([-1.0, 2.0]))
        Array([-0.63212055,  2.        ], dtype=float32)
    """
    t = jnp.tanh(jnp.minimum(x, 0) / 2)
    return jnp.where(x > 0, x, 2 * t) / (1 - t)


@elu.defjvp
def _elu_jvp(primals, tangents):
    y = elu(*primals)
    return y, (1 + jnp.where(y > 0, 0, y)) * tangents[0]


def softplus4(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Sharper softplus, ``softplus(4 x) / 4``: slope ``sigmoid(4 x)`` in (0, 1), hence
    1-Lipschitz and monotone.
    """
    return jax.nn.softplus(4 * x) / 4


def identity(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns ``x``; the branch becomes linear."""
    return x


# The slope s(t) of `lipswish` has the derivative s'(t) = sigmoid'(t) (2 - t tanh(t / 2)), which is
# even, 1/2 at 0, where both factors are largest, and at least -0.08: |s'| <= 1/2. Slopes of the two
# outputs of `clipswish` differ by a constant.
_SWISH_SLOPE = 0.5 / _LIPSWISH_BOUND
ACTIVATIONS: dict[str, Activation] = {  # `register_activation` adds entries
    # slope exp(min(x, 0)): continuous, its own slope at most 1
    "elu": Activation(elu, 1.0, monotone=True),
    "softplus": Activation(jax.nn.softplus, 0.25, monotone=True),  # slope sigmoid(x)
    "softplus4": Activation(softplus4, 1.0, monotone=True),
    # slope 1 - tanh(x)^2, steepest where tanh(x)^2 = 1/3
    "tanh": Activation(jnp.tanh, 4 / (3 * math.sqrt(3)), monotone=True),
    "relu": Activation(jax.nn.relu, None, monotone=True),  # slope 0 or 1
    "lipswish": Activation(lipswish, _SWISH_SLOPE, _INITIAL_BETA),
    "clipswish": Activation(
        clipswish, math.sqrt(2) * _SWISH_SLOPE / _CLIPSWISH_BOUND, _INITIAL_BETA, channel_factor=2
    ),
    "maxmin": Activation(maxmin, None, elementwise=False),
    "identity": Activation(identity, 0.0, monotone=True),
}
PROVEN = frozenset(ACTIVATIONS)  # to be 1-Lipschitz, by the docstrings above


def register_activation(name: str, activation: Activation) -> None:
    """Gives an activation a name, by which specs, configs and files know it in this process.

    A name means one activation for as long as the process lives: compiled programs know activations
    by their names.

    Args:
        name: The name.
        activation: The activation, which has to be 1-Lipschitz. The slope of an elementwise one is
            measured on [-20, 20], which proves nothing: certificates of models with it say "not
            proven", and `certification` refuses them.

    Example:
        >>> register_activation("sine", Activation(jnp.sin))
    """
    if ACTIVATIONS.get(name, activation) != activation:
        raise ValueError(
            f"there is another activation {name!r} already: choose another name, or "
            "start a new process"
        )
    if activation.elementwise:
        x = jnp.linspace(-20.0, 20.0, 4001)  # whose differences rounding changes by 1e-3 at most
        y = activation.apply(x, activation.initial_beta)
        steps = jnp.diff(jnp.reshape(y, (activation.channel_factor, -1)))
        slope = float(jnp.max(jnp.linalg.norm(steps, axis=0) / jnp.diff(x)))
        if slope > 1.01:
            raise ValueError(
                f"the slope of the activation {name!r} reaches {slope:.3g}: certificates need "
                "slopes in [-1, 1], so divide it by the largest"
            )
    ACTIVATIONS[name] = activation


def get(name: str) -> Activation:
    """The entry of ``ACTIVATIONS`` with this name.

    Example:
        >>> activation = get("elu")
        >>> activation.apply(jnp.array([-1.0, 2.0]))
    """
    if name not in ACTIVATIONS:
        raise ValueError(
            f"activation must be one of {', '.join(sorted(ACTIVATIONS))}, got {name!r}: register "
            "your own first"
        )
    return ACTIVATIONS[name]
