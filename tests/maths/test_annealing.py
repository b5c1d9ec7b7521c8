"""Annealed particles: against a mixture whose integral and shares are known."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from iresnet_jax.maths.annealing import annealed, systematic

SHARES = (0.2, 0.8)


def two_modes(x):
    """Normal distributions at -8 and 8 in the first entry, of integral 3 together."""
    centers = jnp.asarray([[-8.0, 0.0], [8.0, 0.0]])
    squares = jnp.sum(jnp.square(x[:, None] - centers[None]), axis=2)
    return jax.nn.logsumexp(jnp.log(jnp.asarray(SHARES))[None] - 0.5 * squares, axis=1) - math.log(2 * math.pi) + math.log(3.0)


@functools.cache
def particles():
    return annealed(two_modes, jax.random.key(0), 2000, 2, scale=8.0, final_moves=10)


def test_modes_that_are_far_apart_keep_their_shares():
    x = np.asarray(particles().x)
    is_left = x[:, 0] < 0
    assert np.mean(is_left) == pytest.approx(SHARES[0], abs=0.05)
    assert x[is_left].mean(axis=0) == pytest.approx([-8, 0], abs=0.2)
    assert x[~is_left].std(axis=0) == pytest.approx([1, 1], abs=0.1)


def test_the_integral():
    assert particles().log_z == pytest.approx(math.log(3), abs=0.2)


def test_in_float64(x64):
    found = annealed(two_modes, jax.random.key(0), 50, 2, scale=8.0, final_moves=1)
    assert found.x.dtype == jnp.float64
    assert abs(found.log_z - math.log(3)) < 1


def test_systematic_draws_are_as_often_as_their_weights_say():
    weights = np.random.default_rng(0).dirichlet(np.full(50, 0.5))
    counts = np.bincount(np.asarray(systematic(jax.random.key(1), jnp.log(weights + 1e-30))), minlength=50)
    assert np.abs(counts - 50 * weights).max() < 1.01


def test_a_log_density_that_is_infinite_is_refused():
    with pytest.raises(ValueError, match=r"infinite at \d+ of 500 draws"):
        annealed(lambda x: jnp.where(x[:, 0] > 0, 0.0, -jnp.inf), jax.random.key(0), 500, 2)
