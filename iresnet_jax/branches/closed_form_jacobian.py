"""A branch's Jacobian in closed form, its trace and its diagonal, for two layers around an elementwise activation."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from iresnet_jax.branches.branch import BranchSpec, Weights, activate, apply_layer
from iresnet_jax.maths import activations
from iresnet_jax.maths.convolution import conv

FULL_DIMS = 256  # at most: `jacobian` makes d^2 numbers of every example and of every hidden unit


def has_trace(spec: BranchSpec) -> bool:
    """Whether `trace` and `jacobian_diagonal` know the branch.

    They do if it has two layers around an elementwise activation, of the same odd kernel size if any. On a torus that is
    smaller than the kernel, taps meet that are not mirrored.
    """
    sizes = spec.kernel_sizes
    same_size = sizes is None or (sizes[0] == sizes[-1] and sizes[0] % 2 == 1)
    if sizes is not None and spec.padding == "CIRCULAR" and min(spec.in_shape[:2]) < sizes[0]:
        return False
    return len(spec.hidden) == 1 and same_size and activations.get(spec.activation).elementwise


def has_diagonal(spec: BranchSpec) -> bool:
    """Whether an inverse gains from `jacobian_diagonal`: of a dense branch it is one entry of many in a row."""
    return has_trace(spec) and spec.kernel_sizes is not None


def has_jacobian(spec: BranchSpec) -> bool:
    """Whether `jacobian` knows the branch: a dense one of those that `trace` knows, of at most `FULL_DIMS` dimensions."""
    return has_trace(spec) and spec.kernel_sizes is None and spec.in_shape[0] <= FULL_DIMS


def trace(
    spec: BranchSpec, weights: Weights, x: Float[Array, "b ..."], context: Float[Array, "b k"] | None = None
) -> Float[Array, " b"]:
    r"""``tr J_g(x)`` in closed form, for a fraction of what ``g`` costs.

    For ``g = W_2 phi W_1 (phi)`` with ``D`` the slopes of the activations, ``J = W_2 D_1 W_1 D_0``. A pixel's output comes back
    to its own input through the tap ``t`` of ``W_1`` and the mirrored tap ``-t`` of ``W_2`` alone, so

    ``tr J = sum_p <D_1(p), z(p)>``,  ``z = conv(D_0; M)``,  ``M[t]_(c, j) = W_1[t]_(c, j) W_2[-t]_(j, c)``.

    The convolution's padding takes care of the border. Without an activation in front ``D_0`` is 1, and ``z`` is the same for
    all examples.

    Arguments are those of `apply_branch`.

    Raises:
        ValueError: If there is no closed form for the branch.
    """
    d0, d1, taps = _slopes_and_taps(spec, weights, x, context)
    z = d0 @ taps if taps.ndim == 2 else conv(d0, taps, padding=spec.padding)
    return jnp.sum(d1 * z, axis=tuple(range(1, x.ndim)))


def jacobian_diagonal(
    spec: BranchSpec, weights: Weights, x: Float[Array, "b ..."], context: Float[Array, "b k"] | None = None
) -> Float[Array, "b ..."]:
    """The diagonal of ``J_g(x)`` in closed form, for what ``g`` costs: the terms of `trace` as the pixel of the input has them.

    In the notation there, ``diag J(p) = D_0(p) conv^T(D_1; M)(p)``. Arguments and errors are those of `trace`.
    """
    d0, d1, taps = _slopes_and_taps(spec, weights, x, context)
    by_copy = (d0 * _transposed(spec, taps, d1)).reshape(*x.shape[:-1], -1, x.shape[-1])
    return jnp.sum(by_copy, axis=-2)


def jacobian(
    spec: BranchSpec, weights: Weights, x: Float[Array, "b ..."], context: Float[Array, "b k"] | None = None
) -> Float[Array, "b d d"]:
    """``J_g(x) = W_2 D_1 W_1 D_0`` as one product of matrices: the slopes of a batch times what the weights make of each slope.

    Products with unit vectors take as many operations, but XLA:CPU computes the slopes' derivatives anew for each of them: at
    10 dimensions and 128 hidden units a gradient takes 17 times as long. Arguments are those of `trace`.

    Raises:
        ValueError: If the branch is not of the kind that `has_jacobian` describes.
    """
    if not has_jacobian(spec):
        raise ValueError(f"the Jacobian has a closed form for dense branches of two layers (see has_jacobian), not for {spec}")
    d0, d1 = slopes(spec, weights, x, context)
    there, back = (weights[layer.name]["kernel"] for layer in spec.layers)
    copies, num_dims, width = d0.shape[1] // x.shape[1], x.shape[1], there.shape[1]
    back = back.reshape(-1, width, num_dims)
    each = jnp.einsum("tjo,sij->tjsoi", back, there.reshape(copies, num_dims, width))
    by_copy = (d1 @ each.reshape(d1.shape[1], -1)).reshape(len(x), copies, num_dims, num_dims)
    return jnp.sum(by_copy * d0.reshape(-1, copies, 1, num_dims), axis=1)


def largest_diagonal(spec: BranchSpec, weights: Weights) -> Float[Array, ""]:
    """The largest absolute value that an entry of the diagonal can have if slopes are between 0 and 1."""
    taps = _taps(spec, weights)
    ones = jnp.ones((1, *spec.in_shape[:-1], taps.shape[-1]), taps.dtype)
    above, below = (_transposed(spec, side(taps, 0), ones) for side in (jnp.maximum, jnp.minimum))
    return jnp.maximum(jnp.max(above), -jnp.min(below))


def _transposed(spec, taps, d1):
    """``conv^T(D_1; M)``."""
    mirrored = jnp.swapaxes(jnp.flip(taps, range(taps.ndim - 2)), -2, -1)
    return d1 @ mirrored if taps.ndim == 2 else conv(d1, mirrored, padding=spec.padding)


def _taps(spec, weights):
    """``M`` of `trace`."""
    if not has_trace(spec):
        raise ValueError(
            f"the trace has a closed form for two layers with an elementwise activation (see has_trace), not for {spec}"
        )
    there, back = (weights[layer.name]["kernel"] for layer in spec.layers)
    taps, channels, width = there.shape[:-2], spec.in_shape[-1], there.shape[-1]
    back = jnp.flip(back, range(len(taps)))
    # An activation may make several channels of one, copy after copy.
    product = jnp.einsum(
        "...scj,...tjc->...sctj", there.reshape(*taps, -1, channels, width), back.reshape(*taps, -1, width, channels)
    )
    return product.reshape(*taps, there.shape[-2], back.shape[-2])


def slopes(spec, weights, x, context):
    """``D_0``, of one example where it is 1, and ``D_1`` of `trace`."""
    first, second = spec.layers
    h = apply_layer(spec, first, weights[first.name], x, context)

    def slope(layer, h):
        return jax.jvp(lambda h: activate(spec, layer, weights[layer.name], h), (h,), (jnp.ones_like(h),))[1]

    return slope(first, x) if first.activated else jnp.ones_like(x[:1]), slope(second, h)


def _slopes_and_taps(spec, weights, x, context):
    """``D_0``, ``D_1`` and ``M`` of `trace`."""
    taps = _taps(spec, weights)
    return *slopes(spec, weights, x, context), taps
