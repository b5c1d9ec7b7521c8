"""Anderson's method needs no more evaluations than Banach iteration, counted in float64."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from iresnet_jax.bijections import residual
from iresnet_jax.bijections.residual import Solver
from iresnet_jax.branches.branch import CallableBranch
from iresnet_jax.maths.fixed_point import invert_residual

BATCH, TOLERANCE = 8, 1e-5


def linear(matrix, x):
    return x @ matrix.T


def tanh_network(weights, x):
    w1, bias, w2 = weights
    return jnp.tanh(x @ w1.T + bias[None]) @ w2.T


def maxmin_network(weights, x):
    """Orthogonal layers and MaxMin: every slope has the same norm, everywhere."""
    layers, biases = weights
    for w, bias in zip(layers, biases, strict=False):
        pairs = (x @ w.T + bias[None]).reshape(len(x), -1, 2)
        x = jnp.concatenate([pairs.max(-1), pairs.min(-1)], axis=1)
    return x @ layers[-1].T


def absolute(slope, x):
    return slope * jnp.abs(x)


class Case(NamedTuple):
    """``g`` and its weights; cases that share ``g`` and shapes share a program."""

    dim: int
    lipschitz: float
    g: Callable
    weights: Any


def linear_case(matrix, lipschitz):
    """A matrix scaled to a norm, in 30 dimensions, the others left at 0."""
    padded = np.zeros((30, 30))
    padded[: len(matrix), : len(matrix)] = lipschitz * matrix / np.linalg.norm(matrix, 2)
    return Case(len(matrix), lipschitz, linear, padded)


def random_network(rng, dim, lipschitz):
    w1, w2 = (w / np.linalg.norm(w, 2) for w in rng.normal(size=(2, dim, dim)))
    return Case(dim, lipschitz, tanh_network, (w1, rng.normal(size=dim), lipschitz * w2))


def random_maxmin_network(rng, dim, lipschitz):
    layers = [np.linalg.qr(rng.normal(size=(dim, dim)))[0] for _ in range(3)]
    layers[-1] *= lipschitz
    return Case(dim, lipschitz, maxmin_network, (layers, list(rng.normal(size=(2, dim)))))


def make_cases():
    rng = np.random.default_rng(0)
    symmetric, quarter = rng.normal(size=(16, 16)), np.array([[0, -1], [1, 0]])
    angles = rng.uniform(0, np.pi, 5)
    turns = np.kron(np.diag(np.cos(angles)), np.eye(2)) + np.kron(np.diag(np.sin(angles)), quarter)
    return {
        "random, 10-D": random_network(rng, 10, 0.99),
        "MaxMin, 6-D": random_maxmin_network(rng, 6, 0.99),
        "-.99 x": linear_case(-np.eye(3), 0.99),
        "-.99 |x|": Case(3, 0.99, absolute, -0.99),
        "turns by other angles in each plane": linear_case(turns, 0.95),
        "random symmetric": linear_case(symmetric + symmetric.T, 0.95),
        "slopes 0 to -.99": linear_case(np.diag(-np.linspace(0, 0.99, 30)), 0.99),
    }


CASES = make_cases()

SEEN = []  # x and g(x), in the order of their evaluation


@functools.partial(jax.jit, static_argnames=("g", "memory"))
def watched_inverse(g, weights, lipschitz, y, memory):
    """Cases of one function share a program."""

    def watched(x):
        value = g(weights, x)
        # As bits: a callback runs in a thread of its own, where the test's float64 is not switched
        # on.
        bits = lax.bitcast_convert_type(jnp.stack([x, value]), jnp.uint32)
        jax.debug.callback(
            lambda bits: SEEN.append(np.array(bits).view(np.float64)[..., 0]), bits, ordered=True
        )
        return value

    return residual.inverse(
        CallableBranch(watched, lipschitz), y, Solver(atol=TOLERANCE, memory=memory)
    )


def solve_and_watch(case, weights, y, x_true, memory):
    """Evaluations until the solver is done, and until its iterate is truly within the tolerance."""
    SEEN.clear()
    x, info = watched_inverse(case.g, weights, jnp.asarray(case.lipschitz), y, memory)
    jax.block_until_ready(x)
    jax.effects_barrier()
    assert np.all(np.linalg.norm(x - x_true, axis=1) <= TOLERANCE), "is it a contraction?"
    residuals = np.stack([np.linalg.norm(y - (x + g), axis=1) for x, g in SEEN])
    errors = np.stack([np.linalg.norm(y - g - x_true, axis=1) for _, g in SEEN])
    is_best = residuals <= np.minimum.accumulate(residuals)
    best = np.maximum.accumulate(np.where(is_best, np.arange(len(SEEN))[:, None], 0))
    within = np.take_along_axis(errors, best, axis=0) <= TOLERANCE
    return np.asarray(info.num_evals), within.argmax(axis=0) + 1


@pytest.mark.parametrize("name", CASES)
def test_never_more_evaluations_than_banach_iteration(x64, name):
    case = CASES[name]
    x_true = 2 * np.random.default_rng(1).normal(size=(BATCH, case.dim))
    if case.g is linear:
        x_true = np.pad(x_true, ((0, 0), (0, len(case.weights) - case.dim)))
    weights = jax.tree.map(jnp.asarray, case.weights)
    y = jnp.asarray(x_true) + jax.jit(case.g)(weights, jnp.asarray(x_true))
    (of_anderson, anderson), (of_banach, banach) = (
        solve_and_watch(case, weights, y, x_true, memory) for memory in (4, 0)
    )
    # What a caller asks for and waits for; the solver knows its residual, not its error.
    assert np.all(of_anderson <= of_banach)
    # Of the true error, which jumps from step to step, one evaluation is luck.
    assert anderson.mean() <= banach.mean()
    assert np.all(anderson <= banach + 1)


def test_starting_behind_what_a_branch_always_adds(x64):
    rng = np.random.default_rng(0)
    weights = jax.tree.map(jnp.asarray, random_network(rng, 6, 0.9).weights)
    far, x = 30 * jnp.asarray(rng.normal(size=(1, 6))), jnp.asarray(rng.normal(size=(BATCH, 6)))

    def branch(x):
        return (tanh_network(weights, x) + far).astype(x.dtype)

    def solve(at_zero=None, memory=4):
        whole = CallableBranch(branch, 0.9, at_zero=at_zero)
        solver = Solver(atol=TOLERANCE, memory=memory)
        found, info = jax.jit(lambda x: residual.inverse(whole, x + branch(x), solver))(x)
        assert info.converged.all()
        assert (np.linalg.norm(found - x, axis=1) <= info.error_bound).all()
        return info.num_evals

    shared = functools.partial(branch, jnp.zeros((1, 6)))
    assert (solve(at_zero=shared) < solve()).all()
    # the paper's iteration
    np.testing.assert_array_equal(solve(at_zero=shared, memory=0), solve(memory=0))


def test_a_result_does_not_depend_on_batch_mates_or_their_order(x64):
    """Without matrix products, whose rounding depends on the batch."""

    def g(x):
        return 0.95 * (0.6 * jnp.tanh(jnp.roll(x, 1, axis=1)) - 0.4 * jnp.sin(x))

    sizes = np.array([0.01, 0.1, 1, 3, 10, 0])[:, None]
    y = jnp.asarray(np.random.default_rng(2).normal(size=(6, 5)) * sizes)
    solve = jax.jit(lambda y: invert_residual(g, y, lipschitz_bound=0.95, atol=1e-10))
    together = solve(y)
    assert len(set(np.asarray(together[1].num_evals).tolist())) > 2
    order = np.array([3, 5, 0, 1, 4, 2])
    for one, other in zip(jax.tree.leaves(solve(y[order])), jax.tree.leaves(together), strict=True):
        np.testing.assert_array_equal(one, other[order])
    for alone, other in zip(jax.tree.leaves(solve(y[2:3])), jax.tree.leaves(together), strict=True):
        np.testing.assert_allclose(alone[0], other[2], rtol=1e-12, atol=1e-14)
