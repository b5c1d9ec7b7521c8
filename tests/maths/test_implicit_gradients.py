"""Derivatives of the inverse against those of a differentiated iteration, in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from jax import lax

from iresnet_jax.bijections import residual
from iresnet_jax.bijections.residual import Solver
from iresnet_jax.branches.branch import CallableBranch
from iresnet_jax.maths.fixed_point import invert_residual, solve_linear
from iresnet_jax.maths.logdet_exact import ExactLogdet

SAME = 1e-8  # two routes to one derivative, at a preimage that is good to 1e-12
ATOL = 1e-12
LIPSCHITZ, NUM_STEPS = 0.7, 100  # Banach iteration is down to 0.7^100 = 3e-16 of its first residual
BATCH, DIM, CONTEXT_DIM = 3, 4, 2


def branch(x, w):
    """``g(x; c) = W2 tanh(W1 x + U c + b)``: its Jacobian ``W2 D W1`` is not symmetric."""
    return jnp.tanh(x @ w["w1"].T + w["context"] @ w["u"].T + w["bias"][None]) @ w["w2"].T


def problem(seed=0):
    """What a solution depends on: ``y``, parameters, and the context of every example."""
    rng = np.random.default_rng(seed)
    w1, w2 = (w / np.linalg.norm(w, 2) for w in rng.normal(size=(2, DIM, DIM)))
    return {
        "y": jnp.asarray(rng.normal(size=(BATCH, DIM))),
        "w1": jnp.asarray(LIPSCHITZ * w1),
        "w2": jnp.asarray(w2),
        "bias": jnp.asarray(0.3 * rng.normal(size=DIM)),
        "u": jnp.asarray(rng.normal(size=(DIM, CONTEXT_DIM))),
        "context": jnp.asarray(rng.normal(size=(BATCH, CONTEXT_DIM))),
    }


def banach(g, y, num_steps=NUM_STEPS):
    """Each step is differentiated, and remembered for it."""
    return lax.scan(lambda x, _: (y - g(x), None), y, length=num_steps)[0]


def unrolled(w):
    return banach(lambda x: branch(x, w), w["y"])


def implicit(w):
    return invert_residual(lambda x: branch(x, w), w["y"], lipschitz_bound=LIPSCHITZ, atol=ATOL)[0]


def assert_same(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for (path, a), b in zip(
        jax.tree.leaves_with_path(actual), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=SAME, atol=SAME, err_msg=jax.tree_util.keystr(path))


def test_both_modes(x64):
    @jax.jit
    def derivatives(w, tangent):
        return [
            (jax.jvp(solve, (w,), (tangent,)), jax.jacrev(solve)(w))
            for solve in (implicit, unrolled)
        ]

    assert_same(*derivatives(problem(), problem(seed=1)))


@pytest.mark.parametrize("adjoint", [False, True])
def test_linear_solves_against_dense_ones(x64, adjoint):
    """``(I + J)^-1 b`` and ``(I + J^T)^-1 b``: a transpose too many or too few is noticed."""
    w, b = problem(), problem(seed=1)["y"]

    @jax.jit
    def run(x, b):
        push = lambda u: jax.jvp(lambda x: branch(x, w), (x,), (u,))[1]  # noqa: E731
        product = (lambda u: jax.linear_transpose(push, x)(u)[0]) if adjoint else push
        return solve_linear(product, b, lipschitz_bound=jnp.asarray(LIPSCHITZ))

    u, info = run(w["y"], b)
    assert info.converged.all()
    for row, right, found, context in zip(
        *(np.asarray(a) for a in (w["y"], b, u, w["context"])), strict=True
    ):
        bias = np.asarray(w["u"] @ context + w["bias"])
        matrix = (
            np.eye(DIM)
            + oracles.tanh_network(row, np.asarray(w["w1"]), bias, np.asarray(w["w2"]))[1]
        )
        ours, other = (
            np.linalg.solve(m, right)
            for m in ((matrix.T, matrix) if adjoint else (matrix, matrix.T))
        )
        np.testing.assert_allclose(found, ours, rtol=1e-10, atol=1e-10)
        assert np.abs(found - other).max() > 1e-3


def test_of_the_inverse_and_its_log_determinant(x64):
    """Gradients reach the log-determinant through the preimage, too."""

    def combine(x, logdet):
        return jnp.sum(jnp.sin(x) * jnp.arange(1.0, DIM + 1)[None]) + jnp.sum(
            logdet * jnp.arange(1.0, BATCH + 1)
        )

    def ours(w):
        g = functools.partial(branch, w=w)
        block, solver = CallableBranch(g, LIPSCHITZ), Solver(atol=ATOL)
        x, logdet, *_ = residual.Residual(block, ExactLogdet(), solver).inverse_and_logdet(
            w["y"], jax.random.key(0)
        )
        return combine(x, logdet)

    def reference(w):
        x = unrolled(w)

        def jacobian(row, context):
            return jax.jacfwd(lambda row: branch(row[None], w | {"context": context[None]})[0])(row)

        jacobians = jax.vmap(jacobian)(x, w["context"])
        return combine(x, -jnp.linalg.slogdet(jnp.eye(DIM)[None] + jacobians)[1])

    assert_same(jax.jit(jax.grad(ours))(problem()), jax.jit(jax.grad(reference))(problem()))


def test_a_linear_solve_that_is_cut_short_says_so(x64):
    slopes, x = jnp.array([0.0, 0.9, 0.0]), jnp.ones((3, 2))
    turn = jnp.array([[0.0, -1.0], [1.0, 0.0]])

    def g(x, slopes):
        return slopes[:, None] * (x @ turn)

    @functools.partial(jax.jit, static_argnames="max_evals")
    def solve(b, max_evals=2000):
        bound = jnp.asarray(0.9)
        return solve_linear(
            lambda u: g(u, slopes), b, lipschitz_bound=bound, max_evals=max_evals, memory=0
        )

    u, info = solve(x, max_evals=5)
    np.testing.assert_array_equal(info.converged, [True, False, True])
    error = np.linalg.norm(u - solve(x)[0], axis=1)
    assert error[1] > 0.1
    # which is of no use where it is large, but true
    assert np.all(error <= np.asarray(info.error_bound) + 1e-13)

    @jax.jit
    def invert(y, slopes):
        return invert_residual(
            lambda x: g(x, slopes), y, lipschitz_bound=0.9, atol=100.0, max_evals=5, memory=0
        )

    # the value is as good as was asked for, its derivative is not
    assert jnp.all(invert(x, slopes)[1].converged)
    of_y, of_slopes = jax.jit(jax.grad(lambda *a: jnp.sum(invert(*a)[0]), (0, 1)))(x, slopes)
    for quantifier in (np.all, np.any):
        np.testing.assert_array_equal(quantifier(np.isnan(of_y), axis=1), [False, True, False])
    np.testing.assert_array_equal(np.isnan(of_slopes), [False, True, False])


def test_rounding_inside_a_branch_leaves_a_derivative():
    """Solves end above their tolerance, and close to the dense solution."""
    rng = np.random.default_rng(0)
    slope, large = rng.normal(size=(2, DIM, DIM))
    slope *= 0.5 / np.linalg.norm(slope, 2)
    whole, part = (jnp.asarray(a, jnp.float32) for a in (slope + 100 * large, 100 * large))
    y, weights = jnp.asarray(rng.normal(size=(2, 256, DIM)), jnp.float32)

    def weighted(y):
        return jnp.vdot(
            weights, invert_residual(lambda x: x @ whole - x @ part, y, lipschitz_bound=0.9)[0]
        )

    wanted = np.linalg.solve(np.eye(DIM) + slope, np.asarray(weights, np.float64).T).T
    np.testing.assert_allclose(
        jax.jit(jax.grad(weighted))(y), wanted, atol=1e-3 * np.linalg.norm(weights, axis=1).max()
    )
