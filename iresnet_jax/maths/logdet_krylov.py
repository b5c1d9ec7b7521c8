r"""``log det(I + J)`` of a residual block from Krylov subspaces: few products with ``J^T``, even
for ``Lip(g)`` close to 1.

The power series cut after ``n`` terms misses a share ``|z|^n`` of the derivative of ``log(1 + z)``
at an eigenvalue ``z`` near -1. With 8 terms at ``|z| = .94`` this is most of the derivative, and
training then shrinks directions that it should not. Arnoldi's method uses the same number of
products for a polynomial that fits the spectrum of ``J``. It builds an orthonormal basis ``V`` of
``span{v, J^T v, ..., (J^T)^(n-1) v}`` and the upper Hessenberg matrix ``H = V^T J^T V``. Value and
gradient are small problems in this basis (Saad 1992), exact for polynomials of degree ``n`` in
place of ``log(1 + z)`` and of degree ``n - 1`` in place of ``1 / (1 + z)``:

    v^T log(I + J) v = |v|^2 e_1^T log(I + H) e_1,    w = (I + J^T)^-1 v = |v| V (I + H)^-1 e_1

The gradient is ``<w, dJ v>`` as in `logdet_series`. Logarithm and inverses exist if ``|J| < 1``, as
``|H| <= |J|``. With ``y_t = (I + t H)^-1 e_1`` the value and an a posteriori bound of its error are

    e_1^T log(I + H) e_1 = int_0^1 e_1^T H y_t dt
    |error| <= |v|^2 h_(n+1,n) int_0^1 |e_n^T y_t| t L / (1 - t L) dt

Proof of the bound. The exact solution ``x`` of ``(I + t J^T) x = v`` has ``v^T J^T x = (|v|^2 - v^T
x) / t``. The approximation ``x_t = |v| V y_t`` leaves the residual ``-t |v| h_(n+1,n) (e_n^T y_t)
v_(n+1)`` in this equation. As ``v`` and ``v_(n+1)`` are orthogonal, ``v^T (I + t J^T)^-1 v_(n+1) =
-t v^T J^T (I + t J^T)^-1 v_(n+1)``.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from iresnet_jax.maths.logdet_estimator import (
    Branch,
    Linearized,
    ProbingEstimator,
    Scalar,
    Trace,
    draw_probes,
    jacobian_product,
    linearize,
    transposed_jacobian,
    with_gradient,
)
from iresnet_jax.maths.upward_rounding import lipschitz_at_least

NUM_NODES = 24  # nodes of the quadrature
# (L, error): up to the Lipschitz constant L the quadrature errs by at most ``error |v|^2``. It is
# the largest error for ``log(1 + z)`` on ``|z| = L``, by von Neumann's inequality.
QUADRATURE_ERRORS = (
    (0.95, 1e-12),
    (0.98, 5e-10),
    (0.99, 3e-8),
    (0.995, 8e-7),
    (0.999, 2.3e-4),
    (0.9999, 1.8e-2),
)
# A new direction shorter than this many roundings is noise: the Krylov space is exhausted.
EXHAUSTED = 30.0


def arnoldi(
    apply: Callable[[Array], Array], v: Float[Array, "p b ..."], num_steps: int
) -> tuple[Float[Array, "n p b ..."], Float[Array, "m n p b"]]:
    """An orthonormal basis of the Krylov space of every vector, and the map in this basis.

    Args:
        apply: A linear map of each ``v[i, j]`` alone.
        v: Start vectors, not 0.
        num_steps: Applications of the map, ``n``. If a Krylov space has fewer dimensions, its
            further basis vectors are 0.

    Returns:
        The basis, and ``H`` with ``m = n + 1`` rows: ``apply(basis[j]) = sum_i H[i, j] basis[i]``.
        The last row belongs to the direction ``v_(n+1)`` outside of the space.
    """
    shape, num_vectors = v.shape, v.shape[0] * v.shape[1]
    # XLA:CPU sums over several axes at once ten times more slowly than over one.
    v = v.reshape(num_vectors, math.prod(shape[2:]))
    eps = jnp.finfo(v.dtype).eps

    def norm(u):
        return jnp.sqrt(jnp.sum(u**2, axis=1))

    def step(j, carry):
        basis, hessenberg = carry
        u = apply(basis[j].reshape(shape)).reshape(v.shape)
        size = norm(u)
        column = jnp.zeros((num_steps + 1, num_vectors), v.dtype)
        for _ in range(2):  # Gram-Schmidt twice makes the basis orthogonal to rounding
            overlap = jnp.sum(basis * u[None], axis=2)
            u = u - _combine(overlap, basis)
            column = column + overlap
        rest = norm(u)
        new = rest > EXHAUSTED * eps * size
        direction = jnp.where(new, 1 / jnp.where(new, rest, 1), 0)[:, None] * u
        column = column.at[j + 1].set(jnp.where(new, rest, 0))
        return basis.at[j + 1].set(direction), hessenberg.at[:, j].set(column)

    first = v / norm(v)[:, None]
    basis = jnp.zeros((num_steps + 1, *v.shape), v.dtype).at[0].set(first)
    hessenberg = jnp.zeros((num_steps + 1, num_steps, num_vectors), v.dtype)
    basis, hessenberg = lax.fori_loop(0, num_steps, step, (basis, hessenberg))
    return basis[:num_steps].reshape(num_steps, *shape), hessenberg.reshape(
        *hessenberg.shape[:2], *shape[:2]
    )


def _combine(
    coefficients: Float[Array, "n ..."], vectors: Float[Array, "n ... d"]
) -> Float[Array, "... d"]:
    """``sum_i c_i v_i``, written out because XLA:CPU reduces over a leading axis slowly."""
    total = coefficients[0][..., None] * vectors[0]
    for coefficient, vector in zip(coefficients[1:], vectors[1:], strict=True):
        total = total + coefficient[..., None] * vector
    return total


def quadrature() -> tuple[Float[np.ndarray, " q"], Float[np.ndarray, " q"]]:
    """Gauss-Legendre nodes and weights for ``t = 1 - s^2`` in [0, 1], dense near 1, as
    integrands have poles above 1.
    """
    roots, weights = np.polynomial.legendre.leggauss(NUM_NODES)
    s = (1 - roots) / 2
    return 1 - s**2, weights * s  # dt = 2 s ds, on an interval of half the length


def solve_hessenberg(matrix: Float[Array, "n n ..."]) -> Float[Array, "n ..."]:
    """``A^-1 e_1`` for upper Hessenberg matrices ``A (row, column, ...)`` with a positive definite
    symmetric part.

    All pivots are then positive, and elimination needs no exchange of rows. Written out, it takes
    XLA:CPU a seventieth of the time of loops over rows.
    """
    rows, rhs = [matrix[0]], [jnp.ones_like(matrix[0, 0])]
    for k, below in enumerate(matrix[1:]):
        factor = below[k] / rows[k][k]
        rows.append(below - factor[None] * rows[k])
        rhs.append(-factor * rhs[k])
    solution: list[Array] = []
    for row, right in zip(reversed(rows), reversed(rhs), strict=True):
        for entry, y in zip(reversed(row), solution, strict=False):
            right = right - entry * y
        solution.append(right / row[len(matrix) - 1 - len(solution)])
    return jnp.stack(solution[::-1])


@jax.tree_util.register_static
@dataclass(frozen=True)
class KrylovLogdet(ProbingEstimator):
    """Arnoldi's method with ``num_steps`` products (Saad 1992).

    Its bias is at most ``info.truncation_bound`` and usually far smaller. This is the module's a
    posteriori bound for the same probes plus the bound of the quadrature's error. No polynomial
    converges faster than the power series if the spectrum fills the whole disk of radius L; spectra
    of trained blocks do not.

    Attributes:
        num_steps: Products with the transposed Jacobian.
    """

    num_steps: int = 6

    unbiased: ClassVar[bool] = False

    def _samples(self, branch, x, key, lipschitz_bound, trace):
        probes = draw_probes(key, x, self.num_probes)
        samples, bounds = quadratic_form(
            branch, x, probes, self.num_steps, lipschitz_bound=lipschitz_bound, trace=trace
        )
        return samples, jnp.mean(bounds, axis=0)


def _forms(hessenberg, probes, lipschitz_bound, *, without_first_order):
    """``v^T log(I + J) v`` in a subspace, the module's bound of its error, and ``(I + H)^-1 e_1``;
    ``without_first_order`` leaves out ``v^T J v``.
    """
    inner, leaving, dtype = hessenberg[:-1], hessenberg[-1, -1], probes.dtype
    squared = jnp.sum(probes**2, axis=tuple(range(2, probes.ndim)))
    nodes, weights = quadrature()
    weights = jnp.asarray(weights, dtype).reshape(-1, 1, 1)
    # axes: row, column, node, probe, example
    times = jnp.asarray([*nodes, 1.0], dtype).reshape(1, 1, -1, 1, 1)
    solutions = solve_hessenberg(
        jnp.eye(len(inner), dtype=dtype)[:, :, None, None, None] + times * inner[:, :, None]
    )
    resolvents, solution = solutions[:, :-1], solutions[:, -1]
    of_node = jnp.sum(inner[0][:, None] * resolvents, axis=0)  # e_1^T H y_t
    value = squared * (
        jnp.sum(weights * of_node, axis=0) - (inner[0, 0] if without_first_order else 0)
    )

    ell = lax.stop_gradient(lipschitz_at_least(lipschitz_bound, dtype))
    contraction = ell < 1
    margins = 1 - times[0, 0, :-1] * jnp.where(contraction, ell, 0)
    ends, errors = np.array(QUADRATURE_ERRORS).T
    of_quadrature = jnp.asarray([*errors, np.inf], dtype)[
        jnp.searchsorted(jnp.asarray(ends + 1e-6, dtype), ell)
    ]
    of_space = leaving * jnp.sum(
        weights * jnp.abs(resolvents[-1]) * (1 - margins) / margins, axis=0
    )
    bounds = squared * (of_space + of_quadrature)
    return value, lax.stop_gradient(jnp.where(contraction, bounds, jnp.inf)), solution


def quadratic_form(
    branch: Branch | Linearized,
    x: Float[Array, "b ..."],
    probes: Float[Array, "p b ..."],
    num_steps: int,
    *,
    lipschitz_bound: Scalar = jnp.inf,
    trace: Trace | None = None,
) -> tuple[Float[Array, "p b"], Float[Array, "p b"]]:
    """``v^T log(I + J) v`` for every probe ``v``, with the gradient ``<w, dJ v>``.

    Args:
        branch: ``g``, acting on each example alone, or linearised at ``x``. May close over traced
            parameters.
        x: Where to evaluate.
        probes: ``v``; with the columns of ``sqrt(d) I`` as probes the mean over them is the exact
            trace.
        num_steps: Products with the transposed Jacobian.
        lipschitz_bound: Upper bound of ``Lip(g)``, for the bound of the error.
        trace: ``x -> tr J (b,)``, exact and differentiable; replaces the first-order term.

    Returns:
        The estimates and bounds of their errors, infinite without a Lipschitz bound below 1.
    """
    at = linearize(branch, x)
    basis, hessenberg = arnoldi(transposed_jacobian(at, len(probes)), probes, num_steps)
    value, bounds, solution = _forms(
        hessenberg, probes, lipschitz_bound, without_first_order=trace is not None
    )
    size = jnp.sqrt(jnp.sum(probes**2, axis=tuple(range(2, probes.ndim))))
    coefficients = (solution if trace is None else solution.at[0].add(-1)) * size[None]
    flat = basis.reshape(*coefficients.shape, math.prod(x.shape[1:]))
    w = _combine(coefficients, flat).reshape(probes.shape)
    value = with_gradient(value, jacobian_product(at, probes), w)
    return value if trace is None else value + trace(x)[None], bounds
