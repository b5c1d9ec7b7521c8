"""Entries within intervals: their ends, and samples that never leave."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from iresnet_jax.bijections.bounded import Bounded, Bounds
from iresnet_jax.bijections.cells import Cells
from iresnet_jax.bijections.standardize import Standardize

SINGLE = 1e-5  # float32
INTERVALS = (Bounds(-1.0, 3.0), None, Bounds(1e3, 1e3 + 0.5), Bounds(-0.5, 4.5))
RNG = np.random.default_rng(0)
POINTS = np.stack([RNG.uniform(-1, 3, 50), RNG.normal(size=50), RNG.uniform(1e3, 1e3 + 0.5, 50), RNG.uniform(-0.5, 4.5, 50)], 1)
LINE = Bounded.of(INTERVALS).to_line(POINTS, np)[0]
TRANSFORM = Bounded.of(INTERVALS, Standardize.fit(LINE))


def test_the_constant_of_the_inverse_is_attained_in_the_middle(x64):
    alone = Bounded.of((Bounds(-1.0, 3.0),))
    forward, inverse = alone.bilipschitz()
    flattest = jax.jit(jax.grad(lambda x: alone.to_line(x[None, None])[0][0, 0]))(1.0)
    assert np.isinf(forward)
    assert 0.99 * inverse < 1 / flattest <= inverse


def test_values_at_the_ends_have_a_density_and_values_outside_have_none():
    transform = Bounded.of((Bounds(0.0, 1.0), Bounds(100.0, 101.0)))
    x = jnp.array([[0.0, 100.0], [1.0, 101.0], [0.5, 100.5], [1.001, 100.5], [0.5, 99.9]])
    y, log_det, _ = map(np.asarray, jax.jit(transform.bijection().forward_and_logdet)(x, jax.random.key(0)))
    assert np.isfinite(y).all()
    assert np.isfinite(log_det).tolist() == [True, True, True, False, False]
    assert np.isneginf(log_det[3:]).all()
    assert transform.outside(np.asarray(x)).any(axis=1).tolist() == [False, False, False, True, True]


def test_no_latent_leaves_its_interval_and_single_precision_comes_back():
    transform, cells = TRANSFORM, Cells.of([(), (), (), (0.0, 1.0)])
    y = jnp.asarray(100 * RNG.standard_cauchy(size=(20_000, 4)), jnp.float32)
    bijection, in_cells = transform.bijection(), cells.bijection()

    @jax.jit
    def run(y, points):
        x = bijection.inverse(y)[0]
        return x, in_cells.inverse(x)[0], bijection.inverse(bijection.forward(points))[0]

    points = POINTS.astype(np.float32)
    x, levels, again = map(np.asarray, run(y, points))
    for column, bounds in enumerate(INTERVALS):
        if bounds is not None:
            inside = x[:, column].astype(np.float64)
            assert bounds.low < inside.min() < bounds.low + 0.01
            assert bounds.high - 0.01 < inside.max() < bounds.high
    assert set(levels[:, 3].tolist()) == {0.0, 1.0, 2.0, 3.0, 4.0}
    np.testing.assert_allclose(again, points, rtol=SINGLE, atol=SINGLE)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Bounds(1.0, 1.0), "lower end below"),
        (lambda: Bounds(0.0, float("inf")), "finite"),
        (lambda: Bounds(1e6, 1e6 + 1.0), "subtract the mean"),
        (lambda: Bounded.of((None, None)), "no entry has bounds or heavy tails"),
        (lambda: Bounded.of((Bounds(0.0, 1.0),), Standardize((0.0, 0.0), (1.0, 1.0))), "1 entries and a transform of 2"),
    ],
)
def test_intervals_that_cannot_be_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
