"""Entries within intervals: their ends, and samples that never leave."""

import jax
import jax.numpy as jnp
import numpy as np

import iresnet_jax as ir

SINGLE = 1e-5  # float32
LOW, HIGH = (-1.0, -np.inf, 1e3, -0.5), (3.0, np.inf, 1e3 + 0.5, 4.5)
RNG = np.random.default_rng(0)
POINTS = np.stack(
    [
        RNG.uniform(-1, 3, 50),
        RNG.normal(size=50),
        RNG.uniform(1e3, 1e3 + 0.5, 50),
        RNG.uniform(-0.5, 4.5, 50),
    ],
    1,
)
LINE = ir.Bounded(LOW, HIGH).to_line(POINTS, np)[0]
TRANSFORM = ir.Bounded(LOW, HIGH, then=ir.Standardize.fit(LINE))


def test_the_constant_of_the_inverse_is_attained_in_the_middle(x64):
    alone = ir.Bounded([-1.0], [3.0])
    forward, inverse = alone.bilipschitz()
    flattest = jax.jit(jax.grad(lambda x: alone.to_line(x[None, None])[0][0, 0]))(1.0)
    assert np.isinf(forward)
    assert 0.99 * inverse < 1 / flattest <= inverse
    assert np.isinf(ir.Bounded([0.0], [np.inf]).bilipschitz().inverse)  # the exponential function


def test_values_at_the_ends_have_a_density_and_values_outside_have_none():
    transform = ir.Bounded((0.0, 100.0, -np.inf), (1.0, 101.0, 5.0))
    x = jnp.array(
        [
            [0.0, 100.0, 5.0],
            [1.0, 101.0, -9.0],
            [0.5, 100.5, 0.0],
            [1.001, 100.5, 0.0],
            [0.5, 99.9, 5.1],
        ]
    )
    y, log_det, _ = map(np.asarray, jax.jit(transform.forward_and_logdet)(x))
    assert np.isfinite(y).all()
    assert np.isfinite(log_det).tolist() == [True, True, True, False, False]
    assert np.isneginf(log_det[3:]).all()


def test_slopes_next_to_an_end_at_zero_have_gradients():
    transform, distances = (
        ir.Bounded([0.0], [np.inf]),
        jnp.array([1e-3, 1e-18, 1e-20, 1e-30], jnp.float32),
    )
    for i in range(2):  # the point, and the logarithm of its slope
        slope = jax.grad(lambda x, i=i: transform.to_line(x[None, None])[i][0, 0])
        grad = jax.jit(jax.vmap(slope))(distances)
        np.testing.assert_allclose(grad, (1 - 2 * i) / distances, rtol=SINGLE)


def test_no_latent_leaves_its_interval_and_single_precision_comes_back():
    transform, cells = TRANSFORM, ir.Marginals.lines([0, 0, 0, 1])
    y = jnp.asarray(100 * RNG.standard_cauchy(size=(20_000, 4)), jnp.float32)
    bijection, in_cells = transform, cells

    @jax.jit
    def run(y, points):
        x = bijection.inverse(y)[0]
        return x, in_cells.inverse(x)[0], bijection.inverse(bijection.forward(points))[0]

    points = POINTS.astype(np.float32)
    x, levels, again = map(np.asarray, run(y, points))
    for column in (0, 2, 3):
        inside = x[:, column].astype(np.float64)
        assert LOW[column] < inside.min() < LOW[column] + 0.01
        assert HIGH[column] - 0.01 < inside.max() < HIGH[column]
    assert set(levels[:, 3].tolist()) == {0.0, 1.0, 2.0, 3.0, 4.0}
    np.testing.assert_allclose(again, points, rtol=SINGLE, atol=SINGLE)
