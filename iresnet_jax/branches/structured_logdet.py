"""Exact log-determinants of branches whose Jacobian has few numbers: convolutions, and dense layers through few units.

A dense branch ``g = W_2 phi W_1`` has ``J = W_2 D_1 W_1`` in the notation of `closed_form_jacobian`, and Sylvester's identity
gives ``det(I + W_2 D_1 W_1) = det(I + D_1 W_1 W_2)``, a matrix of as many rows as hidden units. The Jacobian of convolutions is
a stencil, see `iresnet_jax.maths.logdet.banded`.
"""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float

from iresnet_jax.branches.branch import BranchSpec, Weights, apply_branch
from iresnet_jax.branches.closed_form_jacobian import slopes
from iresnet_jax.maths import activations
from iresnet_jax.maths.logdet.banded import num_operations, num_products, stencil_by_products, stencil_logdet


def has_logdet(spec: BranchSpec) -> bool:
    """Whether `logdet` knows the branch and takes fewer operations than ``d`` products with the Jacobian."""
    if spec.kernel_sizes is None:
        return _is_elementwise(spec) and spec.hidden[0] < spec.in_shape[0]
    return spec.padding == "SAME" and num_products(spec.in_shape, _reach(spec)) < math.prod(spec.in_shape)


def logdet(
    spec: BranchSpec, weights: Weights, x: Float[Array, "b ..."], context: Float[Array, "b k"] | None = None
) -> Float[Array, " b"]:
    """``log det(I + J_g(x))``, exact to rounding, for a branch with ``Lip(g) < 1``. Arguments are those of `apply_branch`.

    Raises:
        ValueError: If `has_logdet` is false.
    """
    if not has_logdet(spec):
        raise ValueError(f"there is no shorter way to the log-determinant of {spec} than its whole Jacobian (see has_logdet)")
    if spec.kernel_sizes is None:
        matrices = _through_hidden_units(spec, weights, x, context)
        return jnp.linalg.slogdet(jnp.eye(matrices.shape[-1], dtype=x.dtype)[None] + matrices)[1]
    if _has_stencil(spec):
        return stencil_logdet(_stencil(spec, weights, x, context))
    return stencil_logdet(stencil_by_products(lambda x: apply_branch(spec, weights, x, context), x, _reach(spec)))


def operations_of_product(spec: BranchSpec) -> float:
    """Operations of one product with the Jacobian of one example."""
    return sum(2.0 * math.prod(layer.in_shape[:-1]) * math.prod(layer.kernel_shape) for layer in spec.layers)


def cost(spec: BranchSpec) -> float:
    """Operations of the exact log-determinant of one example, in products with its Jacobian."""
    num_dims, product = math.prod(spec.in_shape), operations_of_product(spec)
    if not has_logdet(spec):
        return num_dims + 2 / 3 * num_dims**3 / product
    if spec.kernel_sizes is None:
        return 1 + 2 / 3 * spec.hidden[0] ** 3 / product
    elimination = num_operations(spec.in_shape, _reach(spec)) / product
    if not _has_stencil(spec):
        return num_products(spec.in_shape, _reach(spec)) + elimination
    first, second = (math.prod(layer.kernel_shape) for layer in spec.layers)
    return 2.0 * math.prod(spec.in_shape[:2]) * first * second / spec.hidden[0] / product + elimination


def _is_elementwise(spec):
    return len(spec.hidden) == 1 and activations.get(spec.activation).elementwise


def _has_stencil(spec):
    return _is_elementwise(spec) and all(size % 2 for size in spec.kernel_sizes)


def _reach(spec):
    return sum(size // 2 for size in spec.kernel_sizes)


def _through_hidden_units(spec, weights, x, context):
    """``D_1 W_1 D_0 W_2``, of one matrix an example. An activation may make several entries of one, copy after copy."""
    d0, d1 = slopes(spec, weights, x, context)
    there, back = (weights[layer.name]["kernel"] for layer in spec.layers)
    num_dims, width = back.shape[1], there.shape[1]
    there, back = there.reshape(-1, num_dims, width), back.reshape(-1, width, num_dims)
    if len(d0) == 1:  # no activation in front: one product of the weights for all examples
        core = jnp.einsum("toi,sih->toh", back, there)[None]
    else:
        core = jnp.einsum("bsi,toi,sih->btoh", d0.reshape(len(x), -1, num_dims), back, there)
    return jnp.sum(d1.reshape(len(x), -1, width, 1) * core, axis=1)


def _stencil(spec, weights, x, context):
    """The stencil of ``W_2 D_1 W_1 D_0``; an activation may make several channels of one, copy after copy.

    A hidden pixel ``q`` carries the input of pixel ``q + a`` to the output of pixel ``q - b``, by the tap ``a`` of ``W_1`` and
    the tap ``b`` of ``W_2``. One product of matrices takes ``D_1`` to all these paths; paths with the same ``a + b`` add up.
    """
    d0, d1 = slopes(spec, weights, x, context)
    there, back = (weights[layer.name]["kernel"] for layer in spec.layers)
    b, h, w, c = x.shape
    taps, taps_back, width = len(there), len(back), there.shape[-1]
    there, back = there.reshape(taps, taps, -1, c, width), back.reshape(taps_back, taps_back, -1, width, c)
    copies, size, border = there.shape[2], taps + taps_back - 1, taps_back // 2
    pairs = jnp.einsum("xysih,uvtho->thuvxysio", there, back).reshape(d1.shape[-1], -1)
    paths = (d1.reshape(-1, d1.shape[-1]) @ pairs).reshape(b, h, w, taps_back, taps_back, taps, taps, copies, c, c)
    paths = jnp.pad(paths, ((0, 0), (border, border), (border, border)) + ((0, 0),) * 7)
    stencil = jnp.zeros((b, h, w, size, size, copies, c, c), x.dtype)
    for u in range(taps_back):
        for v in range(taps_back):
            own = paths[:, u : u + h, v : v + w, u, v]
            stencil = stencil.at[:, :, :, u : u + taps, v : v + taps].add(own)
    if spec.preactivation:
        reach = size // 2
        d0 = jnp.pad(d0.reshape(b, h, w, copies, c), ((0, 0), (reach, reach), (reach, reach), (0, 0), (0, 0)))
        rows = jnp.stack([d0[:, s : s + h] for s in range(size)], axis=2)
        neighbours = jnp.stack([rows[:, :, :, t : t + w] for t in range(size)], axis=4)  # (b, h, s, w, t, copies, c)
        stencil = stencil * jnp.swapaxes(neighbours, 2, 3)[..., None]
    return jnp.sum(stencil, axis=5)
