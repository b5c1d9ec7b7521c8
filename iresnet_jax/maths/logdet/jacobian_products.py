"""Products with the Jacobian of a branch for many probes at once, and the gradient that they give an estimate."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from iresnet_jax.maths.logdet.estimator import Branch


def transposed_jacobian(branch: Branch, x: Float[Array, "b ..."], num_probes: int) -> Callable[[Array], Array]:
    """``u -> J^T u`` for ``u`` of shape ``(p, b, ...)``; its gradient is zero."""
    pure_branch, parameters = jax.closure_convert(branch, x)
    frozen = lax.stop_gradient(parameters)
    _, pullback = jax.vjp(lambda x: pure_branch(x, *frozen), lax.stop_gradient(x))
    return _over_probes(lambda u: pullback(u)[0], num_probes)


def with_gradient(
    branch: Branch,
    x: Float[Array, "b ..."],
    probes: Float[Array, "p b ..."],
    value: Float[Array, "p b"],
    w: Float[Array, "p b ..."],
) -> Float[Array, "p b"]:
    """``value`` with the gradient of ``<w, J v>``, in which ``w`` and the probes ``v`` are held fixed."""
    pushed = _over_probes(lambda v: jax.jvp(branch, (x,), (v,))[1], len(probes))(probes)
    surrogate = jnp.sum(lax.stop_gradient(w) * pushed, axis=tuple(range(2, probes.ndim)))
    return lax.stop_gradient(value) + (surrogate - lax.stop_gradient(surrogate))


def _over_probes(function, num_probes):
    """``vmap`` without a batch axis for a single probe, which would cost."""
    return jax.vmap(function) if num_probes > 1 else lambda v: function(v[0])[None]
