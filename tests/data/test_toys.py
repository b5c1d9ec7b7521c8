"""Samples of toy densities have the entropies that reports compare with."""

import jax
import numpy as np
import pytest
from scipy import spatial, special

from iresnet_jax.data import toys

NUM = 50_000
ATOL = 0.02  # five standard errors of the estimate, of log-densities that vary by 0.8


@pytest.mark.parametrize("name", toys.TOYS)
def test_entropy_is_that_of_the_samples(name):
    """By distances to third neighbours (Kozachenko and Leonenko 1987)."""
    x = np.asarray(jax.jit(toys.TOYS[name].sample, static_argnums=1)(jax.random.key(7), NUM))
    assert x.dtype == np.float32
    distances = spatial.KDTree(x).query(x, k=4)[0][:, 3]
    found = special.digamma(NUM) - special.digamma(3) + np.mean(np.log(np.pi * distances**2))
    assert found == pytest.approx(toys.TOYS[name].entropy, abs=ATOL)
    # of examples that are scaled by 1.02, it would be larger by twice the logarithm
    assert abs(found + 2 * np.log(1.02) - toys.TOYS[name].entropy) > ATOL


def test_points_are_independent():
    """Equal counts a component would have no variance between draws."""
    keys = jax.random.split(jax.random.key(3), 200)
    x = np.asarray(jax.jit(jax.vmap(lambda key: toys.TOYS["8gaussians"].sample(key, 80)))(keys))
    octant = np.round(np.arctan2(x[..., 1], x[..., 0]) / (2 * np.pi / 8)) % 8
    counts = np.sum(octant == 0, axis=1)
    binomial_variance = 80 * (1 / 8) * (7 / 8)
    assert abs(counts.var(ddof=1) / binomial_variance - 1) < 5 * np.sqrt(2 / 199)
