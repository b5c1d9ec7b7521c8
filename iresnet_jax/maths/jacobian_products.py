"""A branch linearised at a batch: its value, products with its Jacobian, and the gradient that they give an estimate.

Value and products share what they have in common: activations are evaluated, and differentiated in the backward pass, once.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


class Linearized(NamedTuple):
    """A branch ``g`` at a batch ``x``.

    Attributes:
        value: ``g(x)``.
        push: ``v -> J v`` for ``v`` of the shape of ``x``.
    """

    value: Float[Array, "b ..."]
    push: Callable[[Array], Array]


def linearize(branch: Callable[[Array], Array] | Linearized, x: Float[Array, "b ..."]) -> Linearized:
    """The branch at ``x``; itself if it is linearised already."""
    return branch if isinstance(branch, Linearized) else Linearized(*jax.linearize(branch, x))


def jacobian_product(at: Linearized, probes: Float[Array, "p b ..."]) -> Float[Array, "p b ..."]:
    """``J v`` for every probe."""
    return _over_probes(at.push, len(probes))(probes)


def transposed_jacobian(at: Linearized, num_probes: int) -> Callable[[Array], Array]:
    """``u -> J^T u`` for ``u`` of shape ``(p, b, ...)``; its gradient is zero."""
    example = jnp.zeros_like(at.value)
    push, residuals = jax.closure_convert(at.push, example)
    frozen = lax.stop_gradient(residuals)
    transposed = jax.linear_transpose(lambda v: push(v, *frozen), example)
    return _over_probes(lambda u: transposed(u)[0], num_probes)


def with_gradient(
    value: Float[Array, "p b"], pushed: Float[Array, "p b ..."], w: Float[Array, "p b ..."]
) -> Float[Array, "p b"]:
    """``value`` with the gradient of ``<w, J v>``, where ``pushed`` is ``J v`` and ``w`` is held fixed.

    The second derivative is not that of the log-determinant, as ``w`` depends on the point too.
    """
    surrogate = jnp.sum(lax.stop_gradient(w) * pushed, axis=tuple(range(2, pushed.ndim)))
    return lax.stop_gradient(value) + (surrogate - lax.stop_gradient(surrogate))


def _over_probes(function, num_probes):
    """``vmap`` without a batch axis for a single probe, which would cost."""
    return jax.vmap(function) if num_probes > 1 else lambda v: function(v[0])[None]
