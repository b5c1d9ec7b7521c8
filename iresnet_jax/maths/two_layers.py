r"""The Jacobian ``J = W_2 D_1 W_1 D_0`` of two layers around an elementwise activation, in closed
form.

``D_i`` are the slopes of the activations in front of the layers: ``D_0`` at the input (a batch of
one if it is 1 everywhere), ``D_1`` at the hidden units. Kernels of convolutions are ``(k, k, cin,
cout)`` with odd ``k``, kernels of dense layers ``(cin, cout)``. An activation may make several
channels from one, copy after copy.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from iresnet_jax.maths.convolution import Padding, conv


def trace(
    there: Float[Array, "*taps m h"],
    back: Float[Array, "*taps n c"],
    d0: Float[Array, "_ ..."],
    d1: Float[Array, "b ..."],
    padding: Padding,
) -> Float[Array, " b"]:
    r"""``tr J = sum_p <D_1(p), z(p)>`` with ``z = conv(D_0; M)`` and ``M[t]_(c, j) = W_1[t]_(c, j)
    W_2[-t]_(j, c)``, for a fraction of what ``g`` costs.

    A pixel's output comes back to its own input through the tap ``t`` of ``W_1`` and the mirrored
    tap ``-t`` of ``W_2`` alone. The padding of the convolutions takes care of the border. Where
    ``D_0`` is 1, ``z`` is the same for all examples.
    """
    taps, channels, width = there.shape[:-2], back.shape[-1], there.shape[-1]
    mirrored = jnp.einsum(
        "...scj,...tjc->...sctj",
        there.reshape(*taps, -1, channels, width),
        jnp.flip(back, range(len(taps))).reshape(*taps, -1, width, channels),
    ).reshape(*taps, there.shape[-2], back.shape[-2])
    z = conv(d0, mirrored, padding=padding) if taps else d0 @ mirrored
    return jnp.sum(d1 * z, axis=tuple(range(1, d1.ndim)))


def jacobian(
    there: Float[Array, "m h"],
    back: Float[Array, "n d"],
    d0: Float[Array, "_ m"],
    d1: Float[Array, "b n"],
) -> Float[Array, "b d d"]:
    """``J`` of dense layers as one product of matrices: the slopes of a batch times the weights'
    contribution of each slope.

    Products with unit vectors take as many operations, but XLA:CPU computes the slopes' derivatives
    anew for each of them: at 10 dimensions and 128 hidden units a gradient takes 17 times as long.
    """
    num_dims, width = back.shape[1], there.shape[1]
    copies = len(there) // num_dims
    each = jnp.einsum(
        "tjo,sij->tjsoi", back.reshape(-1, width, num_dims), there.reshape(copies, num_dims, width)
    )
    by_copy = (d1 @ each.reshape(d1.shape[1], -1)).reshape(len(d1), copies, num_dims, num_dims)
    return jnp.sum(by_copy * d0.reshape(-1, copies, 1, num_dims), axis=1)


def through_hidden_units(
    there: Float[Array, "m h"],
    back: Float[Array, "n d"],
    d0: Float[Array, "b m"] | None,
    d1: Float[Array, "b n"],
) -> Float[Array, "b h h"]:
    """``M = D_1 W_1 D_0 W_2`` with ``det(I + M) = det(I + J)`` (Sylvester), with as many rows as
    hidden units.

    ``d0=None`` means ``D_0 = 1``, without an activation in front: all examples then share one
    product of the weights.
    """
    num_dims, width = back.shape[1], there.shape[1]
    there, back = there.reshape(-1, num_dims, width), back.reshape(-1, width, num_dims)
    if d0 is None:
        core = jnp.einsum("toi,sih->toh", back, there)[None]
    else:
        core = jnp.einsum(
            "bsi,toi,sih->btoh", d0.reshape(len(d0), len(there), num_dims), back, there
        )
    return jnp.sum(d1.reshape(len(d1), len(back), width, 1) * core, axis=1)


def stencil(
    there: Float[Array, "k k m h"],
    back: Float[Array, "l l n c"],
    d0: Float[Array, "_ y x m"] | None,
    d1: Float[Array, "b y x n"],
) -> Float[Array, "b y x s s c c"]:
    """``J`` of two convolutions that take zeros beyond the border, as the stencil of
    `logdet_exact`; ``d0=None`` means ``D_0 = 1``.

    A hidden pixel ``q`` carries the input of pixel ``q + a`` to the output of pixel ``q - b``, by
    the tap ``a`` of ``W_1`` and the tap ``b`` of ``W_2``. For each ``b`` one product of matrices
    takes ``D_1`` to these paths; equal ``a + b`` add up.
    """
    b, h, w, _ = d1.shape
    taps, taps_back, width, c = len(there), len(back), there.shape[-1], back.shape[-1]
    there = there.reshape(taps, taps, -1, c, width)
    back = back.reshape(taps_back, taps_back, -1, width, c)
    copies, size = there.shape[2], taps + taps_back - 1
    found = jnp.zeros((b, h, w, size, size, copies, c, c), d1.dtype)

    # Outputs whose hidden pixel lies inside the image, and the distance between the two.
    def pixels(tap, side):
        shift = tap - taps_back // 2
        first = min(max(-shift, 0), side)
        return slice(first, max(min(side, side - shift), first)), shift

    for u, v in np.ndindex(taps_back, taps_back):
        (rows, down), (columns, right) = pixels(u, h), pixels(v, w)
        hidden = d1[
            :, rows.start + down : rows.stop + down, columns.start + right : columns.stop + right
        ]
        pairs = jnp.einsum("xysih,tho->thxysio", there, back[u, v]).reshape(d1.shape[-1], -1)
        paths = (hidden.reshape(-1, d1.shape[-1]) @ pairs).reshape(
            *hidden.shape[:3], taps, taps, copies, c, c
        )
        found = found.at[:, rows, columns, u : u + taps, v : v + taps].add(paths)
    if d0 is not None:
        reach = size // 2
        d0 = jnp.pad(
            d0.reshape(b, h, w, copies, c), ((0, 0), (reach, reach), (reach, reach), (0, 0), (0, 0))
        )
        rows = jnp.stack([d0[:, s : s + h] for s in range(size)], axis=2)
        # (b, h, s, w, t, copies, c)
        neighbours = jnp.stack([rows[:, :, :, t : t + w] for t in range(size)], axis=4)
        found = found * jnp.swapaxes(neighbours, 2, 3)[..., None]
    return jnp.sum(found, axis=5)
