"""Operator norms of linear maps by power and Lanczos iteration, and the soft normalisation that
makes a layer a contraction.

A linear map is any function ``apply(kernel, x)`` that is linear in ``x`` and in ``kernel``; its
transpose comes from ``jax.linear_transpose``, so dense layers and convolutions of every padding and
size share this one implementation (Behrmann et al. 2019, sec. 2.1 and appendix; Gouk et al. 2018).
The iterate ``v`` is explicit state: read in, returned, saved.

Both iterations approach the norm from below. They return estimates; `convolution_certificate` has
upper bounds.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from iresnet_jax.maths.platforms import one_at_a_time

LinearMap = Callable[[Array, Array], Array]


# Vectors of a Lanczos cycle: it needs the memory of 32 inputs, and its eigenproblem is one that
# GPUs solve in batches.
_CYCLE = 32
# If a tolerance asks for more steps than this, up to _WHOLE_SPACE dimensions are solved as a whole
# matrix.
_MANY_STEPS, _WHOLE_SPACE = 20_000, 256
# Chance, over the start, that an iteration to a tolerance misses it (as far as the theory of
# `_least_cycles` goes).
_MISS = 1e-3


class PowerIterationInfo(NamedTuple):
    """End of an iteration.

    Attributes:
        num_steps: Applications of the map and its transpose; the power step that ends tolerance
            mode is not counted.
        converged: Whether the tolerance is met; always False for a fixed number of steps.
    """

    num_steps: Int[Array, ""]
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
) -> tuple[Float[Array, ""], Float[Array, "..."], PowerIterationInfo]:
    r"""Estimates the operator norm of ``x -> apply(kernel, x)`` from below, by products with the
    map and its transpose.

    One power step is ``u = A v / |A v|``, ``v' = A^T u / |A^T u|``, and the estimate ``|A^T u| =
    <u, A v'>`` never decreases. Its gradient with respect to ``kernel`` treats ``u`` and ``v'`` as
    constants, which is exact at convergence.

    With ``num_steps`` these steps are all. In tolerance mode (``num_steps=None``) the estimate ends
    within ``rtol`` of the norm for every spectrum, but for a chance of about one in a thousand over
    the start. No rule that watches the growth of the estimate alone can promise this: a norm that
    stands 1 % above a crowd of singular values shows only once the iteration has found it. So
    cycles of Lanczos on ``A^T A`` are repeated as often as the theory of a random start asks for
    (Kuczynski & Wozniakowski 1992), and then until a cycle adds less than ``rtol / 4``; a power
    step ends it. The start is the sum of ``v`` and a fixed random vector, so that this holds
    whatever ``v`` is. In up to 32 dimensions the eigenvectors of ``A^T A`` are computed instead. If
    ``A v`` has fewer dimensions than ``v``, the iteration uses ``A A^T`` and ``A v`` instead.

    Args:
        apply: Linear in ``x``, and in ``kernel`` for the gradient to be right.
        kernel: The layer's weights; zero, tiny and huge ones are safe.
        v: The iterate of the last call, or a random start; shape of the map's input. Must not be
            zero if ``num_steps`` is set.
        num_steps: Fixed number of power steps, for training with a warm start.
        rtol: Relative tolerance of the estimate when ``num_steps`` is None, in (0, 1). Steps grow
            with ``rtol^(-1/2)``: below 1e-5 in more than 256 dimensions they take minutes.

    Returns:
        The estimate, the new iterate and how the iteration ended.

    Example:
        >>> sigma, v, info = spectral_norm(lambda w, x: x @ w, kernel, v, num_steps=5)
    """
    u, v, info = singular_vectors(apply, kernel, v, num_steps=num_steps, rtol=rtol)
    return norm_along(apply, kernel, u, v), v, info


def norm_along(
    apply: LinearMap, kernel: Float[Array, "..."], u: Float[Array, "..."], v: Float[Array, "..."]
) -> Float[Array, ""]:
    """``<u, A v>``: the norm for leading singular vectors, with the gradient ``u v^T``."""
    return jnp.sum(u * apply(kernel, v))


def singular_vectors(
    apply: LinearMap,
    kernel: Float[Array, "..."],
    v: Float[Array, "..."],
    *,
    num_steps: int | None = None,
    rtol: float = 1e-3,
) -> tuple[Float[Array, "..."], Float[Array, "..."], PowerIterationInfo]:
    """The unit vectors ``u`` and ``v`` of `spectral_norm`, of the same arguments, without a
    gradient.
    """
    if num_steps == 0:
        raise ValueError("after num_steps=0 nothing is known: None iterates to a tolerance")
    v = lax.stop_gradient(v)
    frozen = lax.stop_gradient(kernel)
    largest = jnp.max(jnp.abs(frozen))
    # The division keeps the squares in A^T A within the number range.
    frozen = frozen / jnp.where(largest > 0, largest, 1)

    def forward(x):
        return apply(frozen, x)

    transpose = jax.linear_transpose(forward, v)

    def right(u, v):
        new_v, sigma = unit(transpose(u)[0])
        return jnp.where(sigma > 0, new_v, v)

    def power_step(v):
        u, _ = unit(forward(v))
        return right(u, v), u

    if num_steps is None:
        # The map and its transpose have one norm: iterate in the space of fewer dimensions.
        if jax.eval_shape(forward, v).size < v.size:
            u, info = _iterate_to_tolerance(lambda y: forward(transpose(y)[0]), forward(v), rtol)
            v = right(u, v)
        else:
            v, info = _iterate_to_tolerance(lambda x: transpose(forward(x))[0], v, rtol)
        v, u = power_step(v)
    else:
        if num_steps == 1:
            v, u = power_step(v)
        else:  # in a loop, which compiles one step
            u = jax.eval_shape(forward, v)
            state = v, jnp.zeros(u.shape, u.dtype)
            v, u = lax.fori_loop(0, num_steps, lambda _, state: power_step(state[0]), state)
        info = PowerIterationInfo(jnp.int32(num_steps), jnp.zeros((), bool))
    return u, v, info


def _iterate_to_tolerance(gram, v, rtol):
    """Cycles of Lanczos on ``gram`` from the sum of ``v`` and a random vector: a Ritz vector,
    and how it ended.
    """
    least_steps = _CYCLE * _least_cycles(v.size, rtol)
    if v.size <= _CYCLE or (least_steps > _MANY_STEPS and v.size <= _WHOLE_SPACE):
        return _in_whole_space(gram, v)
    most_steps = max(5000, 4 * least_steps)
    # NumPy draws the signs: XLA is slow to fold a constant of jax.random.
    signs = np.random.default_rng(v.size).choice(np.array([-1, 1], np.int8), v.shape)
    # The parts are unequal, so they cannot cancel.
    start = unit(v)[0] / 2 + unit(jnp.asarray(signs, v.dtype))[0]

    def advance(state):
        k, x, previous, _ = state
        x, sigma = _lanczos_cycle(gram, x)
        return k + _CYCLE, x, sigma, (sigma - previous) / jnp.where(sigma > 0, sigma, 1)

    def finished(state):
        k, _, sigma, change = state
        return (k > 0) & ((sigma == 0) | ((k >= least_steps) & (change <= rtol / 4)))

    zero = jnp.zeros((), v.dtype)
    state = lax.while_loop(
        lambda s: (s[0] < most_steps) & ~finished(s), advance, (jnp.int32(0), start, zero, zero)
    )
    k, x, sigma, _ = state
    return jnp.where(sigma > 0, x, v), PowerIterationInfo(k, finished(state))


_eigh = one_at_a_time(jnp.linalg.eigh)


def _in_whole_space(gram, v):
    """An eigenvector of the whole matrix of ``gram``: as many products as dimensions, and less to
    compile than cycles.
    """
    matrix = jax.vmap(gram)(jnp.eye(v.size, dtype=v.dtype).reshape(-1, *v.shape)).reshape(
        v.size, v.size
    )
    eigenvalues, eigenvectors = _eigh(matrix)
    largest = eigenvalues[-1]
    v = jnp.where(largest > 0, eigenvectors[:, -1].reshape(v.shape), v)
    return v, PowerIterationInfo(jnp.int32(v.size), jnp.isfinite(largest))


def _least_cycles(num_dims: int, rtol: float) -> int:
    """Cycles after which a random start has found the norm, whatever the other singular values are.

    A cycle of ``m`` vectors multiplies the leading component, relative to the components of all
    singular values more than ``rtol`` below the norm, by a Chebyshev polynomial: by at least
    ``T_n(1 + 4 rtol) = cosh(n acosh(1 + 4 rtol))`` with ``n = m - 1``. A random start in ``d``
    dimensions has a leading component above ``miss / sqrt(d)`` with probability about ``1 - miss``.
    """
    gain = math.log(math.cosh(min((_CYCLE - 1) * math.acosh(1 + 4 * rtol), 300.0)))
    return math.ceil(math.log(math.sqrt(num_dims) / _MISS) / gain)


def _lanczos_cycle(gram, v):
    """The Ritz vector of the largest Ritz value of ``gram = A^T A`` in the Krylov space of ``v``,
    and the value's root, an estimate of ``|A|``.
    """

    def extend(carry, j):
        basis, v = carry
        basis = basis.at[j].set(v)
        image = gram(v.reshape(shape)).reshape(-1)
        column = basis @ image
        rest, _ = unit(image - column @ basis)
        rest, kept = unit(rest - (basis @ rest) @ basis)
        # If orthogonalising again shortens the direction by half, it is rounding: the Krylov space
        # is exhausted.
        return (basis, jnp.where(kept > 0.5, rest, 0)), column

    shape = v.shape
    carry = (jnp.zeros((_CYCLE, v.size), v.dtype), unit(v)[0].reshape(-1))
    (basis, _), columns = lax.scan(extend, carry, jnp.arange(_CYCLE))
    # Column j is known in rows 0..j; the matrix is symmetric.
    eigenvalues, eigenvectors = _eigh(jnp.tril(columns) + jnp.tril(columns, -1).T)
    return (eigenvectors[:, -1] @ basis).reshape(shape), jnp.sqrt(jnp.maximum(eigenvalues[-1], 0))


def soft_normalize(
    kernel: Float[Array, "..."], sigma: Float[Array, ""], coeff: float
) -> Float[Array, "..."]:
    """``W * min(1, c / sigma)``: shrinks a layer to norm ``c`` and never stretches it (Behrmann et
    al. 2019, eq. 9).

    The gradient flows through ``sigma``; a layer inside the ball is returned unchanged. A zero
    layer is safe.
    """
    too_large = sigma > coeff
    return kernel * jnp.where(too_large, coeff / jnp.where(too_large, sigma, 1), 1)
