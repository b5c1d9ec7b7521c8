"""The inverse of a residual block by fixed-point iteration, with a verdict and an error bound for every example.

Behrmann et al. 2019, Algorithm 1 and Lemma 2, accelerated (Anderson's method, and Newton's as far as the diagonal of the
Jacobian is known) and differentiable (implicit function theorem). An example stops on its own residual, never on that of its
batch mates, and rounding apart its result does not depend on them.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from iresnet_jax.maths.inverse.anderson import History
from iresnet_jax.maths.rounding import at_least

Branch = Callable[[Array], Array]

# A residual that has stopped shrinking within so many times its own rounding is as good as this format allows: the branch
# rounds inside too.
_ROUNDING_FLOOR = 8

# Below this part of the bound of its own rounding a residual is noise.
_NOISE = 0.25

# Past steps that explain less than this times ``1 - L`` of ``|r|^2`` are coincidence: a Banach step is better than theirs.
_WORTHWHILE = 0.5

# An example asks for the diagonal of the Jacobian where that may be large: after so many evaluations, if at its own rate it
# needs so many more; and once again, so many later, if it then needs twice as many.
_LARGE, _ASK_AFTER, _ASK_IF_LEFT, _ASK_AT_MOST = 0.5, 3, 8, 2


class Diagonal(NamedTuple):
    """What is known of the diagonal of a branch's Jacobian.

    Attributes:
        at: ``x -> diag J_g(x) (b, ...)``, about as expensive as ``g``.
        size: About the largest entry it can have; below 1/2 nobody asks for it.
    """

    at: Branch
    size: float | Float[Array, ""] = 1.0


class FixedPointInfo(NamedTuple):
    """How the iteration ended, for every example of the batch.

    Attributes:
        num_evals: Evaluations of the branch that this example needed, and of the diagonal of its Jacobian if it was given.
        residual: ``|y - x' - g(x')|`` (Euclidean norm), as computed, at the best iterate ``x'``: the returned ``x`` where it
            did not converge, and where it did the one of which ``x`` is the Banach step.
        error_bound: Upper bound of ``|x - x*|``, rounding of the residual included; needs ``lipschitz_bound`` to be true.
        converged: Whether the residual met the tolerance, or cannot get smaller in this floating-point format.
    """

    num_evals: Int[Array, " b"]
    residual: Float[Array, " b"]
    error_bound: Float[Array, " b"]
    converged: Bool[Array, " b"]


def invert_residual(
    branch: Branch,
    y: Float[Array, "b ..."],
    *,
    lipschitz_bound: float | Float[Array, ""],
    atol: float = 1e-6,
    max_evals: int = 2000,
    memory: int = 4,
    start: Float[Array, "b ..."] | None = None,
    diagonal: Diagonal | None = None,
) -> tuple[Float[Array, "b ..."], FixedPointInfo]:
    r"""Solves ``y = x + g(x)`` for ``x``, example by example.

    The Banach step is ``x + r`` with the residual ``r = y - x - g(x)``; it shrinks ``|r|`` by ``L`` at least. Anderson's step
    (type II) subtracts what the last ``memory`` steps ``dx_j``, ``dr_j`` can explain:

    ``x + r - sum_j gamma_j (dx_j + dr_j)``, ``gamma = argmin |r - sum_j gamma_j dr_j|``,

    and is followed by a Banach step from the best iterate whenever it shrank ``|r|`` less than a Banach step is sure to. Where
    the diagonal of the Jacobian is known, what the last steps leave unexplained takes a Newton step as far as that goes instead
    of a Banach step,

    ``xm + rm / (1 + diag J_g)``,  ``xm = x - sum_j gamma_j dx_j``,  ``rm = r - sum_j gamma_j dr_j``.

    It tells what is slow about every entry by itself, which no combination of a few past steps can. With
    ``Lip(g) <= L < 1`` every ``x``, and the Banach step from it, satisfy

    ``|x - x*| <= |r| / (1 - L)``,    ``|x + r - x*| = |g(x) - g(x*)| <= L |r| / (1 - L)``,

    the first because ``(x - x*) + (g(x) - g(x*))`` is minus the residual. An example stops when the second bound is at most
    ``atol``, when its residual is lost in its own rounding, or when the residual has stopped shrinking, as under a false ``L``;
    it is frozen from then on, so its result does not depend on its batch mates. ``info.error_bound`` is guaranteed if
    ``lipschitz_bound`` is, up to rounding inside the branch: the residual's own rounding and one unit in the last place of
    ``g`` are included.

    Convergence is not raised on: read ``info.converged``. Where it is true the Banach step from the iterate of least residual
    is returned, which takes no further evaluation; elsewhere that iterate, which the step may spoil under a false ``L``.

    Derivatives, forward and reverse, are those of the exact solution at the returned ``x`` (implicit function theorem):
    ``dx = (I + J)^-1 (dy - dg)``, with respect to ``y`` and to all that ``branch`` closes over. They are solved for by the same
    iteration; their memory does not depend on the number of evaluations. An example whose derivative does not converge gets
    NaN for it, see `solve_linear`.

    Args:
        branch: ``g``, acting on each example of a batch alone.
        y: Outputs of the block.
        lipschitz_bound: ``L``, an upper bound of ``Lip(g)``; at 1 or above every example reports ``converged=False``.
        atol: Wanted bound of ``|x - x*|`` (Euclidean norm of an example).
        max_evals: Cap on evaluations of ``g``; Banach iteration needs about ``log(atol) / log(L)``.
        memory: Steps that Anderson's method remembers, 3 to 5 as a rule and never more than an example has entries; 0 is plain
            Banach iteration. It saves most where a few directions are slow, as in trained blocks, and nothing where all are
            alike, as under an orthogonal map of many dimensions.
        start: Where to begin; ``y`` by default.
        diagonal: Of the Jacobian of ``g``; an example that is slow asks for it once or twice. It need not be right for the
            result to be.

    Returns:
        ``x`` and how the iteration ended.

    Raises:
        ValueError: If ``max_evals`` or ``atol`` is not positive, or ``memory`` is negative.

    Example:
        >>> x, info = invert_residual(lambda x: 0.5 * jnp.tanh(x), y, lipschitz_bound=0.5)
        >>> bool(info.converged.all())
        True
    """
    if max_evals < 1:
        raise ValueError(f"max_evals must be at least 1, got {max_evals}")
    if atol <= 0:
        raise ValueError(f"atol must be positive, got {atol}")
    if memory < 0:
        raise ValueError(f"memory must not be negative, got {memory}; 0 is plain Banach iteration")
    bound = lax.stop_gradient(at_least(lipschitz_bound, y.dtype))
    settings = {"lipschitz_bound": bound, "max_evals": max_evals, "memory": memory}

    def solve(_, x0):
        where = {"start": x0, "diagonal": diagonal}
        x, info = _iterate(branch, lax.stop_gradient(y), atol=jnp.asarray(atol, y.dtype), **where, **settings)
        return x, tuple(field.astype(y.dtype) for field in info)  # JAX wants tangents for what comes along

    def tangent_solve(linear, b):
        return _solve_linear(linear, b, settings)

    start = y if start is None else lax.stop_gradient(start.astype(y.dtype))
    x, info = lax.custom_root(lambda x: x + branch(x) - y, start, solve, tangent_solve, has_aux=True)
    num_evals, residual, error_bound, converged = (lax.stop_gradient(field) for field in info)
    return x, FixedPointInfo(num_evals.astype(jnp.int32), residual, error_bound, converged > 0)


def solve_linear(
    branch: Branch,
    x: Float[Array, "b ..."],
    b: Float[Array, "b ..."],
    *,
    lipschitz_bound: float | Float[Array, ""],
    adjoint: bool = False,
    max_evals: int = 2000,
    memory: int = 4,
) -> tuple[Float[Array, "b ..."], FixedPointInfo]:
    r"""Solves ``(I + J) u = b``, or ``(I + J^T) u = b``, with ``J`` the branch's Jacobian at ``x``, and says how it went.

    This is the solve behind every derivative of `invert_residual`: ``adjoint=True`` gives the cotangent of ``y`` for the
    cotangent ``b`` of ``x``. ``|J| <= L`` makes it the inverse of a linear residual block, to a relative tolerance of about a
    hundred units of rounding.

    Args:
        branch: ``g``.
        x: Where ``J`` is taken.
        b: Right-hand side.
        lipschitz_bound: ``L``.
        adjoint: Whether to use ``J^T``.
        max_evals: Cap on products with ``J``.
        memory: See `invert_residual`.

    Returns:
        ``u`` and how the iteration ended.
    """
    if adjoint:
        _, pullback = jax.vjp(branch, x)
        product = lambda u: pullback(u)[0]  # noqa: E731
    else:
        product = lambda u: jax.jvp(branch, (x,), (u,))[1]  # noqa: E731
    bound = at_least(lipschitz_bound, x.dtype)
    return _iterate(product, b, lipschitz_bound=bound, atol=_relative_atol(b), max_evals=max_evals, memory=memory)


def _solve_linear(linear: Callable, b: Array, settings: dict) -> Array:
    """``linear^-1 b`` for ``linear = I + J``, as an operation that JAX can transpose; NaN where it did not converge."""

    def solve(matvec, b):
        u, info = _iterate(lambda u: matvec(u) - u, b, atol=_relative_atol(b), **settings)
        return jnp.where(broadcast_to_examples(info.converged, b), u, jnp.nan)

    return lax.custom_linear_solve(linear, b, solve, transpose_solve=solve)


def _relative_atol(b: Float[Array, "b ..."]) -> Float[Array, " b"]:
    return 100 * jnp.finfo(b.dtype).eps * example_norm(b)


def example_norm(x: Float[Array, "b ..."]) -> Float[Array, " b"]:
    """Euclidean norm of every example."""
    return jnp.sqrt(jnp.sum(x**2, axis=tuple(range(1, x.ndim))))


def broadcast_to_examples(per_example: Array, like: Array) -> Array:
    """Gives ``(b,)`` the trailing axes of ``like``, of length one."""
    return per_example.reshape(per_example.shape + (1,) * (like.ndim - 1))


class _Slopes(NamedTuple):
    """The diagonal of the Jacobian at an iterate, ``(b, d)``; how often an example asked for it, and in which step."""

    values: Array
    num_asked: Array
    last_asked: Array

    def ask(self, step: Array, evals_left: Array, compute: Callable[[], Array]) -> "_Slopes":
        """The diagonal as it is now, for the examples that have a long way to go; free of charge if none of the batch has."""
        long = evals_left > _ASK_IF_LEFT * (1 + self.num_asked)
        asks = long & (step - self.last_asked >= _ASK_AFTER) & (self.num_asked < _ASK_AT_MOST)
        values = lax.cond(jnp.any(asks), lambda: jnp.where(asks[:, None], compute(), self.values), lambda: self.values)
        return _Slopes(values, self.num_asked + asks, jnp.where(asks, step, self.last_asked))


class _State(NamedTuple):
    """The iteration on examples as vectors, ``(b, d)``; an image is ``y - g(x)``, the Banach step from ``x``."""

    step: Array
    x: Array
    best_x: Array
    best_image: Array
    best_residual: Array
    best_rounding: Array
    history: History | None
    slopes: _Slopes | None
    first_residual: Array
    stalled_evals: Array
    num_evals: Array
    done: Array


def _iterate(branch, y, *, lipschitz_bound, atol, max_evals, memory, start=None, diagonal=None):
    """`invert_residual` without its derivatives; ``atol`` may be one an example."""
    shape, (batch, size) = y.shape, y.reshape(y.shape[0], -1).shape
    y = y.reshape(batch, size)
    x0 = y if start is None else start.reshape(batch, size)
    eps, y_norm = jnp.finfo(y.dtype).eps, example_norm(y)
    margin = 1 - lipschitz_bound
    contraction = margin > 0
    small_enough = atol * margin / jnp.maximum(lipschitz_bound, eps)  # at most, as under no L a tolerance is met at once
    memory = min(memory, size)  # as many steps explain everything that is linear

    def select(per_example, a, b):
        return jnp.where(per_example[:, None], a, b)

    def advance(state: _State) -> _State:
        x = state.x
        g = branch(x.reshape(shape)).reshape(batch, size)
        image = y - g
        r = image - x
        residual = example_norm(r)
        rounding = eps * (example_norm(x) + y_norm + example_norm(g))
        better = ~state.done & (residual < state.best_residual)
        as_good_as_banach = residual <= lipschitz_bound * state.best_residual
        stalled_evals = jnp.where(better, 0, state.stalled_evals + 1)
        first_residual = jnp.where(state.step == 0, residual, state.first_residual)
        # Residuals that shrank e-fold in p evaluations so far and not at all in the last p have reached the floor of rounding
        # (or L is false).
        rate = jnp.log(first_residual / jnp.maximum(state.best_residual, eps * eps)) / jnp.maximum(state.num_evals, 1)
        patience = jnp.clip(1 / jnp.maximum(rate, eps), 2, 1000)
        hopeless = (stalled_evals >= patience) | ~jnp.isfinite(residual)
        best_x, best_image = select(better, x, state.best_x), select(better, image, state.best_image)
        best_residual = jnp.where(better, residual, state.best_residual)
        best_rounding = jnp.where(better, rounding, state.best_rounding)
        target = jnp.maximum(small_enough, _NOISE * best_rounding)
        done = state.done | (best_residual <= target) | hopeless
        next_x, unexplained = image, r
        history, slopes = state.history, state.slopes
        if history is not None:
            history = history.extend(state.step, image, r)
            accelerated, rest, share = history.extrapolate()
            worthwhile = share >= _WORTHWHILE * margin * residual**2  # not if it is not a number
            next_x, unexplained = select(worthwhile, accelerated, image), select(worthwhile, rest, r)
        if slopes is not None and diagonal is not None:
            evals_left = jnp.log(best_residual / target) / jnp.maximum(rate, eps)
            evals_left = jnp.where(~done & (diagonal.size > _LARGE), evals_left, 0)
            slopes = slopes.ask(state.step, evals_left, lambda: slopes_at(diagonal, x))
            next_x = next_x - slopes.values / (1 + slopes.values) * unexplained
        next_x = select(as_good_as_banach, next_x, best_image)
        return _State(
            step=state.step + 1,
            x=select(state.done, x, next_x),
            best_x=best_x,
            best_image=best_image,
            best_residual=best_residual,
            best_rounding=best_rounding,
            history=history,
            slopes=slopes,
            first_residual=first_residual,
            stalled_evals=stalled_evals,
            num_evals=state.num_evals + ~state.done,
            done=done,
        )

    def slopes_at(diagonal, x):
        slopes = diagonal.at(x.reshape(shape)).reshape(batch, size).astype(y.dtype)
        limit = jnp.minimum(lipschitz_bound, 0.999)  # |J| <= L; and 1 + diag J is no less than a little, under a false L too
        return jnp.clip(jnp.nan_to_num(slopes), -limit, limit)

    nothing = jnp.zeros(batch, jnp.int32)
    begin = _State(
        step=jnp.int32(0),
        x=x0,
        best_x=x0,
        best_image=x0,
        best_residual=jnp.full(batch, jnp.inf, y.dtype),
        best_rounding=jnp.zeros(batch, y.dtype),
        history=History.empty(y, memory) if memory else None,
        slopes=None if diagonal is None else _Slopes(jnp.zeros_like(y), nothing, nothing),
        first_residual=jnp.zeros(batch, y.dtype),
        stalled_evals=nothing,
        num_evals=nothing,
        done=nothing > 0,
    )
    end = lax.while_loop(lambda state: (state.step < max_evals) & ~jnp.all(state.done), advance, begin)
    converged = contraction & (end.best_residual <= jnp.maximum(small_enough, _ROUNDING_FLOOR * end.best_rounding))
    to_go = jnp.where(converged, lipschitz_bound, 1) * end.best_residual
    info = FixedPointInfo(
        num_evals=end.num_evals + (0 if end.slopes is None else end.slopes.num_asked),
        residual=end.best_residual,
        error_bound=jnp.where(contraction, (to_go + end.best_rounding) / jnp.where(contraction, margin, 1), jnp.inf),
        converged=converged,
    )
    return select(converged, end.best_image, end.best_x).reshape(shape), info
