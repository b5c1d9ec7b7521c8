"""Operator norms of linear maps by power iteration, and the soft normalisation that makes a layer a contraction.

A linear map is any function ``apply(kernel, x)`` that is linear in ``x`` and in ``kernel``; its transpose comes from
``jax.linear_transpose``, so dense layers and convolutions of every stride, padding and size share this one implementation
(Behrmann et al. 2019, sec. 2.1 and appendix; Gouk et al. 2018). The iterate ``v`` is explicit state: read in, returned, saved.

Power iteration approaches the norm from below. What it returns is an estimate; upper bounds are `certify`'s.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

LinearMap = Callable[[Array, Array], Array]


class PowerIterationInfo(NamedTuple):
    """How a power iteration ended.

    Attributes:
        num_steps: Applications of the map and its transpose.
        relative_change: Growth of the estimate in the last step, relative to it.
        converged: Whether the growth fell under the tolerance; always False for a fixed number of steps without tolerance.
    """

    num_steps: Int[Array, ""]
    relative_change: Float[Array, ""]
    converged: Bool[Array, ""]


def unit(x: Float[Array, "..."]) -> tuple[Float[Array, "..."], Float[Array, ""]]:
    """``x / |x|`` and ``|x|``, without overflow or underflow of the squares; zero stays zero."""
    largest = jnp.max(jnp.abs(x))
    scale = jnp.where(largest > 0, largest, 1)
    scaled = x / scale
    norm = jnp.sqrt(jnp.sum(scaled**2))
    return scaled / jnp.where(norm > 0, norm, 1), norm * scale


def spectral_norm(
    apply: LinearMap,
    kernel: Float[Array, "..."],
    v: Float[Array, "..."],
    *,
    num_steps: int | None = None,
    rtol: float = 1e-3,
    max_steps: int = 5000,
) -> tuple[Float[Array, ""], Float[Array, "..."], PowerIterationInfo]:
    r"""Estimates the operator norm of ``x -> apply(kernel, x)`` by power iteration on the map and its transpose.

    One step is ``u = A v / |A v|``, ``v' = A^T u / |A^T u|``, and the estimate ``|A^T u| = <u, A v'>`` never decreases. Its
    gradient with respect to ``kernel`` treats ``u`` and ``v'`` as constants, which is exact at convergence.

    In tolerance mode (``num_steps=None``) the iteration ends when a step raises the estimate by less than ``rtol**2 / 2``
    relatively. Without any gap between the largest singular values the distance to the norm behaves like ``C / k`` and the
    growth like ``C / k^2`` with ``C`` at least about 1/2, so growth under ``rtol^2 / 2`` goes with a distance of about
    ``rtol``; with a gap it is far smaller. This is how the estimate behaves on all layers tested, not a guarantee.

    Args:
        apply: Linear in ``x``, and in ``kernel`` for the gradient to be right.
        kernel: The layer's weights; zero, tiny and huge ones are safe.
        v: The iterate of the last call, or a random start; shape of the map's input. A zero ``v`` stays zero.
        num_steps: Fixed number of steps, for training with a warm start.
        rtol: Relative tolerance of the estimate when ``num_steps`` is None.
        max_steps: Cap in tolerance mode.

    Returns:
        The estimate, the new iterate and how the iteration ended.

    Raises:
        ValueError: If ``num_steps`` is less than one, or ``rtol`` is not positive.

    Example:
        >>> sigma, v, info = spectral_norm(lambda w, x: x @ w, kernel, v, num_steps=5)
    """
    if num_steps is not None and num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, got {num_steps}; use num_steps=None to iterate to a tolerance")
    if rtol <= 0:
        raise ValueError(f"rtol must be positive, got {rtol}")
    frozen = lax.stop_gradient(kernel)

    def forward(x):
        return apply(frozen, x)

    transpose = jax.linear_transpose(forward, v)

    def step(v):
        u, _ = unit(forward(v))
        new_v, sigma = unit(transpose(u)[0])
        return jnp.where(sigma > 0, new_v, v), u, sigma

    v = lax.stop_gradient(v)
    v, u, sigma = step(v)
    state = (jnp.int32(1), v, u, sigma, jnp.ones_like(sigma))

    def advance(state):
        k, v, _, previous, _ = state
        v, u, sigma = step(v)
        change = (sigma - previous) / jnp.where(sigma > 0, sigma, 1)
        return k + 1, v, u, sigma, change

    if num_steps is not None:
        for _ in range(num_steps - 1):
            state = advance(state)
    else:
        # In the working precision the growth cannot be resolved below a few units of rounding.
        threshold = max(rtol**2 / 2, 4 * float(jnp.finfo(v.dtype).eps))

        def unfinished(state):
            k, _, _, sigma, change = state
            return (k < max_steps) & (change > threshold) & (sigma > 0)

        state = lax.while_loop(unfinished, advance, state)
    k, v, u, sigma, change = state
    converged = (change <= rtol**2 / 2) | (sigma == 0)
    # Equal to |A^T u| in value; written this way its gradient is u v^T.
    sigma = jnp.sum(u * apply(kernel, v))
    return sigma, v, PowerIterationInfo(k, change, converged)


def soft_normalize(kernel: Float[Array, "..."], sigma: Float[Array, ""], coeff: float) -> Float[Array, "..."]:
    """``W * min(1, c / sigma)``: shrinks a layer to norm ``c`` and never stretches it (Behrmann et al. 2019, eq. 9).

    The gradient flows through ``sigma``; a layer inside the ball is returned unchanged. A zero layer is safe.

    Raises:
        ValueError: If ``coeff`` is not positive.
    """
    if coeff <= 0:
        raise ValueError(f"coeff must be positive, got {coeff}")
    too_large = sigma > coeff
    return kernel * jnp.where(too_large, coeff / jnp.where(too_large, sigma, 1), 1)
