"""The inverse of a residual block by fixed-point iteration, with a verdict and an error bound for every example.

Behrmann et al. 2019, Algorithm 1 and Lemma 2. An example stops on its own residual, never on its batch mates'.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

Branch = Callable[[Array], Array]


class FixedPointInfo(NamedTuple):
    """How the iteration ended, for every example of the batch.

    Attributes:
        num_evals: Evaluations of the branch that this example needed.
        residual: ``|y - x - g(x)|`` (Euclidean norm) at the returned ``x``, as computed.
        error_bound: Upper bound of ``|x - x*|``, rounding of the residual included; needs ``lipschitz_bound`` to be true.
        converged: Whether the residual met the tolerance, or cannot get smaller in this floating-point format.
    """

    num_evals: Int[Array, " b"]
    residual: Float[Array, " b"]
    error_bound: Float[Array, " b"]
    converged: Bool[Array, " b"]


def example_norm(x: Float[Array, "b ..."]) -> Float[Array, " b"]:
    """Euclidean norm of every example."""
    return jnp.sqrt(jnp.sum(x**2, axis=tuple(range(1, x.ndim))))


def broadcast_to_examples(per_example: Array, like: Array) -> Array:
    """Gives ``(b,)`` the trailing axes of ``like``, of length one."""
    return per_example.reshape(per_example.shape + (1,) * (like.ndim - 1))


class _State(NamedTuple):
    step: Array
    x: Array
    best_x: Array
    best_residual: Array
    best_rounding: Array
    stalled_evals: Array
    num_evals: Array
    done: Array


def invert_residual(
    branch: Branch,
    y: Float[Array, "b ..."],
    *,
    lipschitz_bound: float | Float[Array, ""],
    atol: float = 1e-6,
    max_evals: int = 2000,
) -> tuple[Float[Array, "b ..."], FixedPointInfo]:
    r"""Solves ``y = x + g(x)`` for ``x``, example by example.

    Banach iteration ``x_{k+1} = y - g(x_k)`` from ``x_0 = y``. With ``Lip(g) <= L < 1`` every ``x`` satisfies

    ``|x - x*| <= |y - x - g(x)| / (1 - L)``,

    because ``(x - x*) + (g(x) - g(x*))`` is minus the residual. An example stops when this bound is at most ``atol``, or when
    its residual has stopped shrinking at the level of rounding; it is frozen from then on, so its result does not depend on
    its batch mates. ``info.error_bound`` is guaranteed if ``lipschitz_bound`` is, up to rounding inside the branch: the
    residual's own rounding and one unit in the last place of ``g`` are included.

    Convergence is not raised on: read ``info.converged``. When the cap is hit, the iterate of least residual is returned.

    Args:
        branch: ``g``, acting on each example of a batch alone.
        y: Outputs of the block.
        lipschitz_bound: ``L``, an upper bound of ``Lip(g)``; at 1 or above every example reports ``converged=False``.
        atol: Wanted bound of ``|x - x*|`` (Euclidean norm of an example).
        max_evals: Cap on evaluations of ``g``; the contraction needs about ``log(atol) / log(L)``.

    Returns:
        ``x`` and how the iteration ended.

    Raises:
        ValueError: If ``max_evals`` or ``atol`` is not positive.

    Example:
        >>> x, info = invert_residual(lambda x: 0.5 * jnp.tanh(x), y, lipschitz_bound=0.5)
        >>> bool(info.converged.all())
        True
    """
    if max_evals < 1:
        raise ValueError(f"max_evals must be at least 1, got {max_evals}")
    if atol <= 0:
        raise ValueError(f"atol must be positive, got {atol}")
    eps = jnp.finfo(y.dtype).eps
    margin = 1 - jnp.asarray(lipschitz_bound, y.dtype)
    # A contraction shrinks the residual e-fold in this many evaluations; none at all in as many is the rounding floor.
    patience = jnp.clip(1 / jnp.maximum(margin, eps), 1, 1000)
    batch = y.shape[:1]

    def unfinished(state: _State):
        return (state.step < max_evals) & ~jnp.all(state.done)

    def advance(state: _State) -> _State:
        x = state.x
        g = branch(x)
        r = y - x - g
        residual = example_norm(r)
        rounding = eps * (example_norm(x) + example_norm(y) + example_norm(g))
        better = ~state.done & (residual < state.best_residual)
        stalled_evals = jnp.where(better, 0, state.stalled_evals + 1)
        at_floor = (stalled_evals >= patience) & (state.best_residual <= state.best_rounding)
        best_residual = jnp.where(better, residual, state.best_residual)
        return _State(
            step=state.step + 1,
            x=jnp.where(broadcast_to_examples(state.done, y), x, x + r),
            best_x=jnp.where(broadcast_to_examples(better, y), x, state.best_x),
            best_residual=best_residual,
            best_rounding=jnp.where(better, rounding, state.best_rounding),
            stalled_evals=stalled_evals,
            num_evals=state.num_evals + ~state.done,
            done=state.done | (best_residual <= atol * margin) | at_floor,
        )

    start = _State(
        step=jnp.int32(0),
        x=y,
        best_x=y,
        best_residual=jnp.full(batch, jnp.inf, y.dtype),
        best_rounding=jnp.zeros(batch, y.dtype),
        stalled_evals=jnp.zeros(batch, jnp.int32),
        num_evals=jnp.zeros(batch, jnp.int32),
        done=jnp.zeros(batch, bool),
    )
    end = lax.while_loop(unfinished, advance, start)
    contraction = margin > 0
    bound = (end.best_residual + end.best_rounding) / jnp.where(contraction, margin, 1)
    info = FixedPointInfo(
        num_evals=end.num_evals,
        residual=end.best_residual,
        error_bound=jnp.where(contraction, bound, jnp.inf),
        converged=contraction & (end.best_residual <= jnp.maximum(atol * margin, end.best_rounding)),
    )
    return end.best_x, info
