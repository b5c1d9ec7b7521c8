"""Every activation is 1-Lipschitz, for all inputs and all betas, and has finite derivatives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import brentq

from iresnet_jax.maths import activations
from iresnet_jax.maths.activations import ACTIVATIONS

ROUNDING = 1e-12  # float64: a norm of exactly 1 comes out of an SVD a few ulp above
CLOSED_FORM = 1e-12  # same maths by another route, float64
BETAS = [-5.0, -1.0, 0.0, 0.5, 2.0, 10.0]
# Dense around 0, where slopes are extreme for large beta, and wide enough for b x = 2.4 at beta =
# -5 (x = 357).
GRID = np.concatenate([np.linspace(-6, 6, 4001), np.linspace(-800, 800, 8001), [-1e8, 1e8]])

NAMES = sorted(ACTIVATIONS)
ELEMENTWISE = [name for name in NAMES if name not in ("clipswish", "maxmin")]


def slopes(function, x):
    """Derivative of an elementwise function at each entry of a vector."""
    return jax.jvp(function, (x,), (jnp.ones_like(x),))[1]


@jax.jit
def jacobians_of_all(x, beta):
    """Jacobian of every activation by name, in one program."""
    return {
        name: jax.jacfwd(lambda x, a=activation: a.apply(x, beta if a.initial_beta else None))(x)
        for name, activation in ACTIVATIONS.items()
    }


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_slopes_stay_within_one_on_a_dense_grid(x64, dtype):
    """On inputs of one channel the Jacobian is a column, as long as ClipSwish has outputs."""
    x = jnp.asarray(GRID, dtype)[:, None]
    for name in (name for name in NAMES if ACTIVATIONS[name].elementwise):
        slopes_of = jax.jit(
            lambda x, beta, a=ACTIVATIONS[name]: slopes(lambda x: a.apply(x, beta), x)
        )
        for beta in BETAS if ACTIVATIONS[name].initial_beta else [None]:
            norm = np.linalg.norm(slopes_of(x, beta), axis=-1)
            assert 0.999 < norm.max() <= 1, (name, beta)


@given(
    seed=st.integers(0, 2**31 - 1),
    pairs=st.sampled_from([1, 3]),
    log_scale=st.floats(-3, 3),
    beta=st.floats(-5, 10),
    per_channel=st.booleans(),
)
def test_jacobian_norm_never_exceeds_one(seed, pairs, log_scale, beta, per_channel):
    rng = np.random.default_rng(seed)
    with jax.enable_x64(True):
        x = jnp.asarray(rng.normal(size=2 * pairs) * np.exp(log_scale))
        raw = rng.uniform(-5, 10, 2 * pairs) if per_channel else np.full(2 * pairs, beta)
        for name, jacobian in jacobians_of_all(x, jnp.asarray(raw)).items():
            assert np.linalg.norm(jacobian, ord=2) <= 1 + ROUNDING, name


def test_normalising_constants_are_rounded_up_and_tight(x64):
    # The extremum as derived in the docstrings: t tanh(t / 2) = 2.
    t = brentq(lambda t: t * np.tanh(t / 2) - 2, 1, 5)
    sigmoid = 1 / (1 + np.exp(-t))
    top = sigmoid * (1 + t * (1 - sigmoid))
    column = np.hypot(top, 1 - top) / 1.1
    assert 1.0998 < top < 1.1
    assert 1.0039 < column < 1.004
    x = jnp.asarray([t / np.log1p(np.exp(0.5))])
    for name, norm in (("lipswish", top / 1.1), ("clipswish", column / 1.004)):
        slope = jax.jacfwd(ACTIVATIONS[name].apply)(x)
        np.testing.assert_allclose(np.linalg.norm(slope), norm, rtol=CLOSED_FORM)


def test_elu_is_accurate_near_zero_and_so_are_two_derivatives(x64):
    x = np.concatenate([-np.logspace(-30, 1.5, 200), np.logspace(-30, 1.5, 20)])
    exp = np.where(x > 0, 1, np.exp(x))
    derivatives = (np.where(x > 0, x, np.expm1(x)), exp, np.where(x > 0, 0, exp))
    slope, second = jax.grad(activations.elu), jax.grad(jax.grad(activations.elu))
    for function, expected in zip((activations.elu, slope, second), derivatives, strict=True):
        np.testing.assert_allclose(jax.jit(jax.vmap(function))(x), expected, rtol=1e-14, atol=4e-16)


def test_maxmin_sorts_neighbours_and_splits_ties():
    x = jnp.array([[1.0, 3.0, 5.0, 2.0], [-1.0, -1.0, 0.0, 4.0]])
    np.testing.assert_array_equal(
        jax.jit(activations.maxmin)(x), [[3.0, 1.0, 5.0, 2.0], [-1.0, -1.0, 4.0, 0.0]]
    )
    jacobian = jax.jit(jax.jacfwd(activations.maxmin))(jnp.array([2.0, 2.0]))
    np.testing.assert_array_equal(jacobian, [[0.5, 0.5], [0.5, 0.5]])


def test_two_derivatives_are_finite_and_saturate_quietly():
    largest = float(np.sqrt(np.finfo(np.float32).max))
    x = jnp.array([0.0, -0.0, 1e-30, -1e-30, 90.0, -90.0, 800.0, -800.0, largest, -largest])

    def of_one(activation, x, beta):
        def function(x):
            return activation.apply(x, beta if activation.initial_beta else None)

        second = slopes(lambda x: slopes(function, x), x)
        return slopes(function, x), second, jax.grad(lambda x: jnp.sum(function(x)))(x)

    of_all = jax.jit(
        lambda x, beta: {name: of_one(ACTIVATIONS[name], x, beta) for name in ELEMENTWISE}
    )
    for beta in BETAS:
        for name, (first, second, reverse) in of_all(x, beta).items():
            assert np.isfinite(second).all(), (name, beta)
            np.testing.assert_array_equal(second[-2:], 0)  # every activation is affine far out
            np.testing.assert_allclose(reverse, first, rtol=1e-6, atol=1e-6)
