"""The inverse of a residual block against closed forms and dense Newton solutions in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
from hypothesis import example, given
from hypothesis import strategies as st

from iresnet_jax.maths.fixed_point import (
    example_norm,
    invert_residual,
)

ATOL = 1e-6  # the default tolerance of the inverse
NEWTON = 1e-12  # what the dense solution is good for, and rounding in our comparison with it


@functools.partial(jax.jit, static_argnames=("memory", "max_evals"))
def invert_multiple(slope, y, lipschitz_bound, *, memory=4, max_evals=2000):
    """The inverse behind ``g(x) = slope x``, as one program for all slopes and bounds."""
    return invert_residual(
        lambda x: slope * x, y, lipschitz_bound=lipschitz_bound, memory=memory, max_evals=max_evals
    )


def error(x, x_true):
    return np.linalg.norm((np.asarray(x, np.float64) - x_true).reshape(len(x), -1), axis=1)


def assert_bound_holds(info, true_error, slack=0.0):
    assert np.all(true_error <= np.asarray(info.error_bound, np.float64) + slack), (
        f"error {true_error}, claimed {info.error_bound}"
    )


def test_the_hardest_linear_contraction_in_float32():
    y = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)), jnp.float32)
    # x - 0.99 x = y with the factor as float32 has it
    true = np.asarray(y, np.float64) / (1 - np.float64(np.float32(0.99)))
    for memory in (0, 4):
        x, info = invert_multiple(-0.99, y, 0.99, memory=memory)
        assert_bound_holds(info, error(x, true))
        assert jnp.all(info.num_evals < 1900)  # it sees that it cannot get any further
    # Banach steps of 1 % of the residual get lost in the last place of x before that.
    assert np.all(error(x, true) <= 1e-5 * np.linalg.norm(true, axis=1))
    assert jnp.all(info.converged)


def test_the_cap_returns_the_best_iterate_and_a_true_bound(x64):
    y = jnp.array([[1.0, -2.0], [0.0, 0.0]])
    x, info = invert_multiple(-0.99, y, 0.99, max_evals=10, memory=0)
    np.testing.assert_array_equal(info.converged, [False, True])  # 0 is its own preimage
    np.testing.assert_array_equal(info.num_evals, [10, 1])
    assert_bound_holds(info, error(x, 100 * np.asarray(y)))
    np.testing.assert_allclose(info.residual[0], np.linalg.norm(y[0] - 0.01 * x[0]), rtol=NEWTON)
    assert info.residual[0] < np.linalg.norm(0.99 * y[0])  # better than where it started


def test_of_oscillating_iterates_the_best_is_kept():
    # 2 x is no contraction: residuals grow, so the start is the best that was seen.
    y = jnp.ones((1, 2))
    x, info = invert_multiple(2.0, y, 0.5, max_evals=50)
    np.testing.assert_array_equal(x, y)
    assert not info.converged[0]


def test_without_a_contraction_nothing_is_claimed():
    for lipschitz_bound in (1.0, -0.5, float("nan")):
        _, info = invert_multiple(0.5, jnp.ones((1, 2)), lipschitz_bound, max_evals=50)
        assert not info.converged[0]
        assert jnp.isinf(info.error_bound[0])


def test_whoever_has_no_finite_bound_has_not_converged():
    """Norms of entries next to the largest float, and the sum of their norms, may overflow."""
    y = jnp.asarray([[1e37], [1e38]], jnp.float32) * jnp.ones((1, 4), jnp.float32)
    x, info = invert_multiple(-0.9, y, 0.9)
    np.testing.assert_allclose(x[0], 1e38, rtol=1e-5)
    np.testing.assert_array_equal(info.converged, [True, False])  # 1e39 is no float
    np.testing.assert_array_equal(np.isfinite(info.error_bound), [True, False])
    large = jnp.full((1, 2), 2e38, jnp.float32)  # 1 / 2^127 would be 0
    np.testing.assert_allclose(jax.jit(example_norm)(large), 2e38 * np.sqrt(2), rtol=1e-6)


def test_a_branch_that_returns_nan_spoils_its_own_example_only():
    y = jnp.array([[1.0], [-1.0]])
    x, info = jax.jit(
        lambda y: invert_residual(
            lambda x: jnp.where(x < 0, jnp.nan, half(x)), y, lipschitz_bound=0.5
        )
    )(y)
    np.testing.assert_array_equal(info.converged, [True, False])
    assert jnp.isinf(info.error_bound[1])
    assert info.num_evals[1] == 1  # there is no way back from NaN
    np.testing.assert_allclose(x[0], 2 / 3, atol=ATOL)


def network(x, w1, bias, w2):
    return jnp.tanh(x @ w1.T + bias[None]) @ w2.T


@functools.partial(jax.jit, static_argnames="memory")
def invert_network(y, w1, bias, w2, lipschitz_bound, memory=4):
    branch = functools.partial(network, w1=w1, bias=bias, w2=w2)
    return invert_residual(branch, y, lipschitz_bound=lipschitz_bound, memory=memory)


def random_contraction(seed, dim, coeff):
    rng = np.random.default_rng(seed)
    w1, w2 = (w / oracles.operator_norm(w) for w in rng.normal(size=(2, dim, dim)))
    return coeff * w1, rng.normal(size=dim), w2, 2 * rng.normal(size=(3, dim))


@given(
    seed=st.integers(0, 10**6),
    dim=st.sampled_from([1, 5]),
    coeff=st.floats(0.0, 0.98),
    double=st.booleans(),
)
@example(seed=0, dim=5, coeff=0.98, double=False)
# ends in a cycle of a few units in the last place
@example(seed=101, dim=1, coeff=0.9375, double=False)
def test_random_contractions_against_newton(seed, dim, coeff, double):
    with jax.enable_x64(double):
        dtype = jnp.float64 if double else jnp.float32
        w1, bias, w2, y = (jnp.asarray(a, dtype) for a in random_contraction(seed, dim, coeff))
        # rounding the weights may stretch them
        bound = max(coeff, 1e-3) * (1 if double else 1 + 1e-6)
        x, info = invert_network(y, w1, bias, w2, jnp.asarray(bound, dtype))
    w1, bias, w2, y = (np.asarray(a, np.float64) for a in (w1, bias, w2, y))
    true = np.stack(
        [
            oracles.invert_by_newton(lambda x: oracles.tanh_network(x, w1, bias, w2), row)
            for row in y
        ]
    )
    assert np.all(info.converged)
    assert_bound_holds(info, error(x, true), slack=NEWTON)
    if double:
        assert np.all(np.asarray(info.error_bound) <= 1.01 * ATOL)


def half(x):
    return 0.5 * x


def test_the_error_of_tiny_and_huge_examples_is_within_its_bound():
    """Squares underflow below 1e-19 and overflow above 1e19; norms must not."""
    y = np.float32([1e-15, 1e-19, 1e-30, 1e-38, 1e-42, 1e25])[:, None] * np.ones((1, 3), np.float32)
    x, info = invert_multiple(0.5, y, 0.5, max_evals=3, memory=0)
    found, bound = error(x, y.astype(np.float64) / 1.5), np.asarray(info.error_bound)
    assert np.all((found > 0) & (found <= bound))
    assert np.all(bound < np.maximum(np.linalg.norm(y.astype(np.float64), axis=1), 1e-36))


def test_bounds_hold_at_the_default_level_of_the_compiler():
    """A fused residual may round in another way than the suite's programs."""
    rng, lipschitz = np.random.default_rng(0), 0.95
    matrix = rng.normal(size=(24, 24))
    matrix = (lipschitz * (1 - 1e-6) * matrix / np.linalg.norm(matrix, 2)).astype(np.float32)
    y = (rng.normal(size=(16, 24)) * 10.0 ** rng.integers(-6, 6, size=(16, 1))).astype(np.float32)

    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 3})
    def solve(y):
        return invert_residual(lambda x: x @ matrix.T, y, lipschitz_bound=lipschitz)

    x, info = solve(y)
    exact = np.linalg.solve(np.eye(24) + matrix.astype(np.float64), y.astype(np.float64).T).T
    error = np.linalg.norm(x - exact, axis=1)
    assert info.converged.all()
    assert (error <= info.error_bound).all()
    assert (np.asarray(info.error_bound) <= 1e-6 + 1e-4 * np.linalg.norm(y, axis=1)).all()
