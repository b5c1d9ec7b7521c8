"""The inverse of a residual block by fixed-point iteration, with a verdict and an error bound for
every example.

Behrmann et al. 2019, Algorithm 1 and Lemma 2, accelerated (Anderson 1965, type II) and
differentiable (implicit function theorem). An example stops on its own residual: rounding apart,
its result does not depend on the rest of its batch.

The iteration is `init`, `step` and `finish`, for whoever wants to watch it:

    >>> equation = Equation.of(branch, y, lipschitz_bound=0.9, atol=1e-6)
    >>> state = init(equation, memory=4)
    >>> state = step(equation, state)  # one evaluation of the branch
    >>> x, info = finish(equation, state)
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Shaped

from iresnet_jax.maths.upward_rounding import (
    as_floats,
    euclidean_norm,
    lipschitz_at_least,
    power_of_two,
)
from iresnet_jax.pytrees import in_words, largest, share

Branch = Callable[[Array], Array]


class FixedPointInfo(NamedTuple):
    """End of the iteration, for every example of the batch.

    Attributes:
        num_evals: Evaluations of the branch.
        residual: ``|y - x' - g(x')|`` (Euclidean norm), as computed, at the best iterate ``x'``. If
            converged, ``x = y - g(x')``; otherwise ``x = x'``.
        error_bound: Upper bound of ``|x - x*|``, rounding of the residual included, if
            ``lipschitz_bound`` is true.
        converged: Whether the residual met the tolerance, or is lost in rounding, and this bounds
            the error: False where the iteration knows no finite bound, however small the residual
            is. Without a Lipschitz bound an iteration that stops has shown nothing.
    """

    num_evals: Int[Array, " b"]
    residual: Float[Array, " b"]
    error_bound: Float[Array, " b"]
    converged: Bool[Array, " b"]

    def __repr__(self) -> str:
        return in_words(
            self,
            lambda: (
                f"{share(self.converged)} converged, error_bound at most "
                f"{largest(self.error_bound)}, at most {largest(self.num_evals)} evaluations"
            ),
        )


def invert_residual(
    branch: Branch,
    y: Shaped[Array | np.ndarray, "..."] | Sequence,
    *,
    lipschitz_bound: float | Float[Array, ""],
    atol: float = 1e-6,
    max_evals: int = 2000,
    memory: int = 4,
    start: Float[Array, "b ..."] | None = None,
) -> tuple[Float[Array, "b ..."], FixedPointInfo]:
    r"""Solves ``y = x + g(x)`` for ``x``, example by example.

    The Banach step is ``x + r`` with the residual ``r = y - x - g(x)``; it shrinks ``|r|`` by ``L``
    at least. Anderson's step (type II) subtracts what the last ``memory`` steps ``dx_j``, ``dr_j``
    can explain:

    ``x + r - sum_j gamma_j (dx_j + dr_j)``, ``gamma = argmin |r - sum_j gamma_j dr_j|``,

    and is followed by a Banach step from the best iterate if ``|r|`` exceeds ``L`` times the least
    one so far. With ``Lip(g) <= L < 1`` every ``x``, and the Banach step from it, satisfy

    ``|x - x*| <= |r| / (1 - L)``,    ``|x + r - x*| = |g(x) - g(x*)| <= L |r| / (1 - L)``,

    the first because ``(x - x*) + (g(x) - g(x*))`` is minus the residual. An example stops when the
    second bound is at most ``atol``, when its residual is lost in its own rounding, or when the
    residual has stopped shrinking, as under a false ``L``. ``info.error_bound`` is guaranteed if
    ``lipschitz_bound`` is, up to rounding inside the branch. Failure raises nothing: read
    ``info.converged``.

    Derivatives, forward and reverse, follow from the implicit function theorem at the returned
    ``x``: ``dx = (I + J)^-1 (dy - dg)``, with respect to ``y`` and to all that ``branch`` closes
    over. The same iteration solves for them; its memory does not depend on the number of
    evaluations. An example whose derivative converges neither within ``max_evals`` nor to a
    guaranteed error of a thousandth of its right-hand side gets NaN for it.

    Args:
        branch: ``g``, acting on each example of a batch alone.
        y: Outputs of the block, a batch; integers and lists become floats.
        lipschitz_bound: ``L``, an upper bound of ``Lip(g)``. If ``L >= 1``, or if ``L`` is negative
            or NaN, every example reports ``converged=False`` and an infinite ``error_bound``.
        atol: Wanted bound of ``|x - x*|`` (Euclidean norm of an example).
        max_evals: Cap on evaluations of ``g``; Banach iteration needs about ``log(atol) / log(L)``.
        memory: Steps that Anderson's method remembers, usually 3 to 5, at most an example's size; 0
            is plain Banach iteration. It helps where few directions are slow, as in trained blocks.
        start: Where to begin; ``y`` by default.

    Returns:
        ``x`` and how the iteration ended.

    Example:
        >>> x, info = invert_residual(lambda x: 0.5 * jnp.tanh(x), y, lipschitz_bound=0.5)
        >>> bool(info.converged.all())
        True
    """
    y = as_floats(y)
    bound = lax.stop_gradient(lipschitz_at_least(lipschitz_bound, y.dtype))
    limits: dict[str, Any] = {"lipschitz_bound": bound, "max_evals": max_evals, "memory": memory}

    def solve(_, x0):
        x, info = _iterate(
            branch, lax.stop_gradient(y), x0, atol=jnp.asarray(atol, y.dtype), **limits
        )
        # JAX wants tangents of auxiliary outputs.
        return x, tuple(field.astype(y.dtype) for field in info)

    def solve_tangent(linear, b):  # NaN marks examples that did not converge
        u, info = solve_linear(lambda u: linear(u) - u, b, **limits)
        # Rounding inside the branch may stop an iteration above its tolerance, at a derivative that
        # is as good as any.
        usable = info.converged | (info.error_bound <= 1e-3 * example_norm(b))
        return jnp.where(usable.reshape(-1, *(1,) * (b.ndim - 1)), u, jnp.nan)

    def tangent_solve(linear, b):  # as an operation that JAX can transpose
        return lax.custom_linear_solve(linear, b, solve_tangent, transpose_solve=solve_tangent)

    start = y if start is None else lax.stop_gradient(start.astype(y.dtype))
    x, info = lax.custom_root(
        lambda x: (x + branch(x) - y).astype(y.dtype), start, solve, tangent_solve, has_aux=True
    )
    num_evals, residual, error_bound, converged = (lax.stop_gradient(field) for field in info)
    return x, FixedPointInfo(num_evals.astype(jnp.int32), residual, error_bound, converged > 0)


def solve_linear(
    product: Branch,
    b: Float[Array, "b ..."],
    *,
    lipschitz_bound: Float[Array, ""],
    max_evals: int = 2000,
    memory: int = 4,
) -> tuple[Float[Array, "b ..."], FixedPointInfo]:
    """Solves ``(I + J) u = b`` for a linear map ``J`` of norm at most ``L``, to a hundred units of
    rounding of ``|b|``.

    This is the solve behind every derivative of `invert_residual`: ``J`` is the branch's Jacobian
    or its transpose.

    Args:
        product: ``u -> J u``.
        b: Right-hand side.
        lipschitz_bound: Bound of ``|J|``.
        max_evals: Cap on products.
        memory: Steps that Anderson's method remembers.
    """
    atol = 100 * jnp.finfo(b.dtype).eps * example_norm(b)
    return _iterate(
        product, b, lipschitz_bound=lipschitz_bound, atol=atol, max_evals=max_evals, memory=memory
    )


def example_norm(x: Float[Array, "b ..."]) -> Float[Array, " b"]:
    """Euclidean norm of every example."""
    return euclidean_norm(x, tuple(range(1, x.ndim)))


class Equation(NamedTuple):
    """The equation ``y = x + g(x)`` on examples as vectors ``(b, d)``, and the tolerance of its
    solution.

    Attributes:
        shape: Shape of the batch.
        branch: ``g`` on vectors.
        y: Right-hand side.
        y_norm: Norm of ``y``, one per example.
        lipschitz_bound: ``L``; infinite promises nothing.
        small_enough: Largest residual at which a Banach step is within ``atol``: ``atol (1 - L) /
            L``.
    """

    shape: tuple[int, ...]
    branch: Branch
    y: Array
    y_norm: Array
    lipschitz_bound: Array
    small_enough: Array

    @classmethod
    def of(
        cls,
        branch: Branch,
        y: Float[Array, "b ..."],
        *,
        lipschitz_bound: float | Float[Array, ""],
        atol: float | Float[Array, "..."],
    ) -> "Equation":
        """The equation of a branch and a batch, with the arguments of `invert_residual`; ``atol``
        may be one per example.
        """
        bound = lipschitz_at_least(lipschitz_bound, y.dtype)
        flat = y.reshape(len(y), math.prod(y.shape[1:]))
        return cls(
            shape=y.shape,
            branch=lambda x: branch(x.reshape(y.shape)).reshape(flat.shape).astype(y.dtype),
            y=flat,
            y_norm=example_norm(flat),
            lipschitz_bound=bound,
            small_enough=atol * (1 - bound) / jnp.maximum(bound, jnp.finfo(y.dtype).eps),
        )

    @property
    def margin(self) -> Array:
        """``1 - L``."""
        return 1 - self.lipschitz_bound


class _Evaluation(NamedTuple):
    """One evaluation at ``x``: ``image = y - g(x)``, the norm of ``r = image - x``, and the
    bound of its rounding.
    """

    x: Array
    image: Array
    residual: Array
    rounding: Array


class History(NamedTuple):
    """The memory of Anderson's method: the last ``m`` steps of an iteration, in rings in which the
    newest step takes the place of the oldest.

    Attributes:
        image: ``y - g(x)`` at the last evaluation.
        r: Residual at the last evaluation.
        images: Steps of ``image``, ``(b, m, d)``.
        residuals: Steps of ``r``, ``(b, m, d)``.
        gram: Inner products of the steps of ``r``, ``(b, m, m)``.
    """

    image: Array
    r: Array
    images: Array
    residuals: Array
    gram: Array

    @classmethod
    def empty(cls, x: Float[Array, "b d"], memory: int) -> "History":
        """Room for ``memory`` steps of examples like ``x``, all zero."""
        nothing, steps = jnp.zeros_like(x), jnp.zeros((len(x), memory, x.shape[1]), x.dtype)
        return cls(nothing, nothing, steps, steps, jnp.zeros((len(x), memory, memory), x.dtype))

    def extend(self, step: Array, image: Array, r: Array) -> "History":
        """Adds the step from the last evaluation to this one."""
        slot = step % self.images.shape[1]
        # the first evaluation is no step, and a zero step explains nothing
        moved = (step > 0).astype(r.dtype)
        latest = moved * (r - self.r)
        residuals = self.residuals.at[:, slot].set(latest)
        products = _inner_products(residuals, latest)
        return History(
            image=image,
            r=r,
            images=self.images.at[:, slot].set(moved * (image - self.image)),
            residuals=residuals,
            gram=self.gram.at[:, slot].set(products).at[:, :, slot].set(products),
        )

    def extrapolate(self) -> tuple[Array, Array]:
        """``image`` less what past steps explain of it, and the part of ``|r|^2`` that they
        explain, one per example.

        The explained part is NaN if the least-squares problem for ``gamma`` has no solution.
        """
        products = _inner_products(self.residuals, self.r)
        gamma = _solve_regularized(self.gram, products)

        explained = sum(gamma[:, j, None] * self.images[:, j] for j in range(gamma.shape[1]))
        return self.image - explained, jnp.sum(gamma * products, axis=1)


def _inner_products(steps: Float[Array, "b m d"], r: Float[Array, "b d"]) -> Float[Array, "b m"]:
    return jnp.einsum("bmd,bd->bm", steps, r, precision="highest")


def _solve_regularized(gram: Float[Array, "b m m"], b: Float[Array, "b m"]) -> Float[Array, "b m"]:
    """Solves ``(gram + ridge I) gamma = b`` for every example; the ridge is a few units of
    rounding.

    Gauss-Jordan elimination in which each entry is a vector over examples; a library's solver would
    run once an example. The matrix is positive definite, so no pivots are needed.
    """
    m, dtype = b.shape[1], b.dtype
    ridge = 10 * jnp.finfo(dtype).eps * sum(gram[:, i, i] for i in range(m)) + jnp.finfo(dtype).tiny
    rows = [
        [gram[:, i, j] + (ridge if i == j else 0) for j in range(m)] + [b[:, i]] for i in range(m)
    ]
    for k in range(m):
        scaled = [entry / rows[k][k] for entry in rows[k]]
        rows = [
            scaled
            if i == k
            else [entry - row[k] * above for entry, above in zip(row, scaled, strict=True)]
            for i, row in enumerate(rows)
        ]
    return jnp.stack([row[m] for row in rows], axis=1)


class State(NamedTuple):
    """The iteration between two evaluations.

    Attributes:
        step: Evaluations so far.
        x: Where to evaluate next.
        best: The evaluation of least residual.
        history: Memory of Anderson's method, None without.
        first_residual: Residual at the start.
        stalled_evals: Evaluations since the best one.
        num_evals: Evaluations that the example needed.
        done: Whether the example has stopped.
    """

    step: Array
    x: Array
    best: _Evaluation
    history: History | None
    first_residual: Array
    stalled_evals: Array
    num_evals: Array
    done: Array


def _iterate(branch, y, start=None, *, lipschitz_bound, atol, max_evals, memory):
    """`invert_residual` without its derivatives; ``atol`` may be one per example."""
    equation = Equation.of(branch, y, lipschitz_bound=lipschitz_bound, atol=atol)

    def go_on(state):
        return (state.step < max_evals) & ~jnp.all(state.done)

    state = init(equation, start, memory=memory)
    return finish(equation, lax.while_loop(go_on, lambda state: step(equation, state), state))


def init(
    equation: Equation, start: Float[Array, "b ..."] | None = None, *, memory: int = 4
) -> State:
    """The state before the first evaluation, whose best residual is infinite; ``start`` is ``y``
    by default.
    """
    x = equation.y if start is None else start.reshape(equation.y.shape)
    memory = min(memory, x.shape[1])  # so many steps explain everything that is linear
    zero, nothing = jnp.zeros(len(x), x.dtype), jnp.zeros(len(x), jnp.int32)
    return State(
        step=jnp.int32(0),
        x=x,
        best=_Evaluation(x, x, zero + jnp.inf, zero),
        history=History.empty(x, memory) if memory else None,
        first_residual=zero,
        stalled_evals=nothing,
        num_evals=nothing,
        done=nothing > 0,
    )


def step(equation: Equation, state: State) -> State:
    """Evaluates the branch once, keeps the best, decides who is done and where to evaluate next."""
    now = _evaluate(equation, state.x)
    better = ~state.done & (now.residual < state.best.residual)
    best = jax.tree.map(
        lambda a, b: jnp.where(better if a.ndim == 1 else better[:, None], a, b), now, state.best
    )
    first_residual = jnp.where(state.step == 0, now.residual, state.first_residual)
    stalled_evals = jnp.where(better, 0, state.stalled_evals + 1)
    rate = _rate(first_residual, state)
    # A residual below the target is noise.
    target = jnp.maximum(equation.small_enough, 0.25 * best.rounding)
    done = state.done | (best.residual <= target) | _hopeless(rate, stalled_evals, now.residual)
    next_x, history = _next_iterate(equation, state, now, best)
    return State(
        step=state.step + 1,
        x=jnp.where(state.done[:, None], state.x, next_x),
        best=best,
        history=history,
        first_residual=first_residual,
        stalled_evals=stalled_evals,
        num_evals=state.num_evals + ~state.done,
        done=done,
    )


def _evaluate(equation: Equation, x: Array) -> _Evaluation:
    """``|fl(r) - r| <= eps (|x| + |y| + |g|)``, plus the loss of entries that are too small for the
    format.
    """
    image = equation.y - equation.branch(x)
    # g is recovered from the image: as a second result of the branch, XLA:CPU would compute it
    # twice.
    r, g = image - x, equation.y - image
    info = jnp.finfo(x.dtype)
    lost = 4 * math.sqrt(x.shape[1]) * float(info.tiny)
    norms = example_norm(x), equation.y_norm, example_norm(g)
    largest = functools.reduce(jnp.maximum, norms)
    scale = power_of_two(jnp.minimum(largest, info.max))  # the sum may overflow
    rounding = info.eps * sum(norm / scale for norm in norms) * scale + lost
    return _Evaluation(x, image, example_norm(r), rounding)


def _rate(first_residual: Array, state: State) -> Array:
    """``log(|r_0| / |r_best|)`` per evaluation before the present one, at least one unit of
    rounding.
    """
    eps = jnp.finfo(first_residual.dtype).eps
    shrunk = jnp.log(first_residual / jnp.maximum(state.best.residual, eps * eps))
    return jnp.maximum(shrunk / jnp.maximum(state.num_evals, 1), eps)


def _hopeless(rate: Array, stalled_evals: Array, residual: Array) -> Array:
    """True after ``1 / rate`` evaluations (2 to 1000) without progress, in which residuals used to
    shrink e-fold: rounding, or a false L.
    """
    return (stalled_evals >= jnp.clip(1 / rate, 2, 1000)) | ~jnp.isfinite(residual)


def _next_iterate(
    equation: Equation, state: State, now: _Evaluation, best: _Evaluation
) -> tuple[Array, History | None]:
    """Anderson's step; a Banach step from the best iterate where ``|r| > L |r_best|``."""
    next_x, history = now.image, state.history
    if history is not None:
        history = history.extend(state.step, now.image, now.image - now.x)
        accelerated, share = history.extrapolate()
        # Steps that explain less than (1 - L) |r|^2 / 2, or whose share is NaN, are worse than a
        # Banach step.
        worthwhile = share >= 0.5 * equation.margin * now.residual**2
        next_x = jnp.where(worthwhile[:, None], accelerated, next_x)
    as_good_as_banach = now.residual <= equation.lipschitz_bound * state.best.residual
    return jnp.where(as_good_as_banach[:, None], next_x, best.image), history


def finish(equation: Equation, end: State) -> tuple[Float[Array, "b ..."], FixedPointInfo]:
    """The solution so far, and how the iteration ended.

    ``|x - x*| <= |r| / (1 - L)`` at the best iterate, ``L |r| / (1 - L)`` after the Banach step
    that follows convergence.
    """
    best, margin = end.best, equation.margin
    contraction = margin > 0
    # A residual that stopped shrinking within 8 roundings counts as converged: the branch rounds
    # inside, too.
    met = contraction & (best.residual <= jnp.maximum(equation.small_enough, 8 * best.rounding))
    to_go = jnp.where(met, equation.lipschitz_bound, 1) * best.residual
    bound = (to_go + best.rounding) / jnp.where(contraction, margin, 1)
    error_bound = jnp.where(contraction, bound, jnp.inf)
    converged = met & jnp.isfinite(error_bound)
    info = FixedPointInfo(end.num_evals, best.residual, error_bound, converged)
    return jnp.where(converged[:, None], best.image, best.x).reshape(equation.shape), info
