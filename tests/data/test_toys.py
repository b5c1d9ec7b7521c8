"""Samples of toy densities, and their entropies, against NumPy restatements of the densities."""

import functools
import math

import jax
import numpy as np
import pytest
import scipy.special
from scipy import stats

from iresnet_jax.data import toys

ATOL_MASS = 1e-6  # the grid resolves the narrowest noise (0.08) to 1e-7; 5-sigma tails remain
ATOL_ENTROPY = 2e-4  # stored to 1e-4, and the grid's own error is below that
P_VALUE = 1e-3  # fixed keys, one test a toy: not a lottery
NUM_SAMPLES = 20_000
HALF_WIDTH, CELL, CELLS_PER_BIN = 5.0, 1 / 12, 6  # a grid that holds all the mass of all toys
MIDDLE = np.arange(-HALF_WIDTH + CELL / 2, HALF_WIDTH, CELL)

every_toy = pytest.mark.parametrize("name", toys.TOYS)


# Densities in the middle of every cell of the grid, rows along the first coordinate ---------------


def panels(num_panels=400, order=8):
    """Composite Gauss-Legendre rule in t with u = t^2: smooth for sqrt(u), too."""
    node, weight = np.polynomial.legendre.leggauss(order)
    t = ((np.arange(num_panels)[:, None] + (node + 1) / 2) / num_panels).ravel()
    return t**2, 2 * t * np.tile(weight / 2 / num_panels, num_panels)


def circle(u, radius, turn=2 * np.pi):
    return radius * np.stack([np.cos(turn * u), np.sin(turn * u)], -1)


def gaussian(sigma):
    return lambda offset: stats.norm.pdf(offset, scale=sigma)


def roll(u):
    t = 1.5 * np.pi * (1 + 2 * u)
    return np.stack([t * np.cos(t), t * np.sin(t)], -1) / 5


def spiral(u):
    t = 3 * np.pi * np.sqrt(u)
    return t[:, None] / 3 * np.stack([-np.cos(t), np.sin(t)], -1)


def jittered(low):
    """Noise along an arm: uniform on [low, low + 1/6], convolved with a Gaussian of 0.1."""
    return lambda offset: (
        6 * (stats.norm.cdf((offset - low) / 0.1) - stats.norm.cdf((offset - low - 1 / 6) / 0.1))
    )


# curves or points with equal shares, each with the density of the noise of one coordinate
CURVES = {
    "8gaussians": [
        (lambda u, k=k: circle(np.full_like(u, k / 8), 4 / 1.414), gaussian(0.5 / 1.414))
        for k in range(8)
    ],
    "moons": [
        (lambda u: circle(u, 2, np.pi) + np.array([-1, -0.2]), gaussian(0.2)),
        (
            lambda u: 2 * (np.array([1, 0.5]) - circle(u, 1, np.pi)) + np.array([-1, -0.2]),
            gaussian(0.2),
        ),
    ],
    "circles": [(lambda u, r=r: circle(u, r), gaussian(0.24)) for r in (3, 1.5)],
    "rings": [(lambda u, r=r: circle(u, r), gaussian(0.08)) for r in (3, 2.25, 1.5, 0.75)],
    "2spirals": [(spiral, jittered(0.0)), (lambda u: -spiral(u), jittered(-1 / 6))],
    "swissroll": [(roll, gaussian(0.2))],
}


def along_curves(name):
    u, weight = panels()
    density = 0
    for curve, noise in CURVES[name]:
        first, second = (noise(MIDDLE[:, None] - coordinate) for coordinate in curve(u).T)
        density += (first * weight) @ second.T / len(CURVES[name])
    return density


def on_squares(x, y):
    on_board = np.maximum(abs(x), abs(y)) < 4
    return np.where(on_board & ((np.floor(x / 2) + np.floor(y / 2)) % 2 == 0), 1 / 32, 0)


def on_wheel(x, y):
    """Sum over all (a, b) that the pinwheel's map takes to a point."""
    radius, angle = (part.ravel() for part in (np.hypot(x, y) / 2, np.arctan2(y, x)))
    edges = np.linspace(-np.pi, np.pi, 257)

    def arm(point, phi):
        return (phi - 0.25 * np.exp(radius[point] * np.cos(phi)) - angle[point]) * 5 / (2 * np.pi)

    whole = np.floor(arm(np.arange(len(radius))[:, None], edges[None]))
    point, cell = np.nonzero(whole[:, 1:] != whole[:, :-1])
    low, high = edges[cell], edges[cell + 1]
    for _ in range(50):
        middle = (low + high) / 2
        is_left = np.floor(arm(point, middle)) == whole[point, cell]
        low, high = np.where(is_left, middle, low), np.where(is_left, high, middle)
    a, b = radius[point] * np.cos(low), radius[point] * np.sin(low)
    term = (
        stats.norm.pdf(a, 1, 0.3) * stats.norm.pdf(b, 0, 0.1) / (5 * 4 * abs(1 + b * np.exp(a) / 4))
    )
    return np.bincount(point, term, len(radius)).reshape(x.shape)


@functools.cache
def density(name):
    if name in CURVES:
        return along_curves(name)
    return {"checkerboard": on_squares, "pinwheel": on_wheel}[name](
        *np.meshgrid(MIDDLE, MIDDLE, indexing="ij")
    )


@functools.cache
def samples(name):
    with jax.enable_x64(False):
        return np.asarray(
            jax.jit(toys.TOYS[name].sample, static_argnums=1)(jax.random.key(7), NUM_SAMPLES)
        )


def assert_samples_follow(name, x):
    """Chi-square test of a histogram with bins of 0.5 against the integrated density."""
    bins = int(2 * HALF_WIDTH / CELL) // CELLS_PER_BIN
    probability = (
        density(name).reshape(bins, CELLS_PER_BIN, bins, CELLS_PER_BIN).sum((1, 3)) * CELL**2
    )
    edges = np.linspace(-HALF_WIDTH, HALF_WIDTH, bins + 1)
    observed = np.histogram2d(x[:, 0], x[:, 1], [edges, edges])[0].ravel()
    expected = len(x) * probability.ravel()
    rare = expected < 10  # together in one bin, with what is off the grid
    observed = np.append(observed[~rare], len(x) - observed[~rare].sum())
    expected = np.append(expected[~rare], len(x) - expected[~rare].sum())
    if expected[-1] < 1:  # as on the checkerboard
        assert observed[-1] == 0
        observed, expected = observed[:-1], expected[:-1]
    statistic = np.sum((observed - expected) ** 2 / expected)
    assert stats.chi2.sf(statistic, len(expected) - 1) > P_VALUE


# Tests --------------------------------------------------------------------------------------------


@every_toy
def test_entropy_is_that_of_the_density(name):
    mass = density(name) * CELL**2
    assert mass.sum() == pytest.approx(1, abs=ATOL_MASS)
    assert scipy.special.entr(mass).sum() + math.log(CELL**2) == pytest.approx(
        toys.TOYS[name].entropy, abs=ATOL_ENTROPY
    )


@every_toy
def test_samples_follow_the_density(name):
    assert samples(name).dtype == np.float32
    assert_samples_follow(name, samples(name))


def test_mistakes_that_look_right_in_a_scatter_plot_are_rejected():
    with pytest.raises(AssertionError):
        assert_samples_follow("moons", samples("moons") + 0.03)


def test_points_are_independent():
    """Equal counts a component would have no variance between draws."""
    keys = jax.random.split(jax.random.key(3), 200)
    x = np.asarray(jax.jit(jax.vmap(lambda key: toys.TOYS["8gaussians"].sample(key, 80)))(keys))
    octant = np.round(np.arctan2(x[..., 1], x[..., 0]) / (2 * np.pi / 8)) % 8
    counts = np.sum(octant == 0, axis=1)
    binomial_variance = 80 * (1 / 8) * (7 / 8)
    assert abs(counts.var(ddof=1) / binomial_variance - 1) < 5 * np.sqrt(2 / 199)
