"""Unnormalised densities of known and unknown normalising constants, on which flows are trained
without data.

Each is a `Target`: a log-density of batches ``(n, d) -> (n,)`` in JAX, its logarithmic normalising
constant where it is known, and exact samples where there are any.

- "two_moons": two crescents in 2 dimensions, of normflows; normalised by quadrature.
- "gaussians": 40 equally likely normal distributions in 2 dimensions with means from [-40, 40]^2
  (Midgley et al. 2023).
- "funnel": Neal's funnel in 10 dimensions, ``x_0 ~ N(0, 9)`` and ``x_i | x_0 ~ N(0, exp(x_0))``.
- "many_wells": 16 independent double wells in 2 dimensions each (Noe et al. 2019, Midgley et al.
  2023), with 2^16 modes.
- "phi4": the scalar field theory on a periodic lattice of 8 x 8 (Albergo et al. 2019, m^2 = -4,
  lambda = 6.008).
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

NUM_GAUSSIANS, GAUSSIANS_WITHIN, GAUSSIAN_STD = 40, 40.0, math.log1p(math.e)
FUNNEL_DIMS, FUNNEL_STD = 10, 3.0
WELLS = 16
SIDE, MASS_SQUARED, COUPLING = 8, -4.0, 6.008
MEANS = np.random.default_rng(0).uniform(-GAUSSIANS_WITHIN, GAUSSIANS_WITHIN, (NUM_GAUSSIANS, 2))


class Target(NamedTuple):
    """An unnormalised density.

    Attributes:
        num_dims: Dimensions.
        log_density: ``x (n, d) -> (n,)``, up to a constant.
        scale: A rough guess of where its mass is: within some of these of the origin, in every
            direction.
        log_z: Logarithm of its integral; None if unknown.
        sample: ``(rng, n) -> (n, d)``, exact; None if there is no such sampler.
    """

    num_dims: int
    log_density: Callable[[Any], Any]
    scale: float
    log_z: float | None
    sample: Callable[[np.random.Generator, int], np.ndarray] | None


def two_moons(x):
    """Log-density of the crescents."""
    radius, side = jnp.linalg.norm(x, axis=1), jnp.abs(x[:, 0])
    return (
        -0.5 * jnp.square((radius - 2) / 0.2)
        - 0.5 * jnp.square((side - 2) / 0.3)
        + jnp.log1p(jnp.exp(-4 * side / 0.09))
    )


def gaussians(x):
    """Log-density of the mixture, normalised."""
    squares = jnp.sum(
        jnp.square((x[:, None] - jnp.asarray(MEANS, x.dtype)[None]) / GAUSSIAN_STD), axis=2
    )
    return jax.nn.logsumexp(-0.5 * squares, axis=1) - math.log(
        NUM_GAUSSIANS * 2 * math.pi * GAUSSIAN_STD**2
    )


def funnel(x):
    """Log-density of the funnel, normalised."""
    first, others = x[:, 0], x[:, 1:]
    log_normal = -0.5 * jnp.square(first / FUNNEL_STD) - math.log(FUNNEL_STD)
    given_first = (
        -0.5 * jnp.exp(-first) * jnp.sum(jnp.square(others), axis=1)
        - 0.5 * (FUNNEL_DIMS - 1) * first
    )
    return log_normal + given_first - 0.5 * FUNNEL_DIMS * math.log(2 * math.pi)


def many_wells(x):
    """Log-density of the double wells."""
    first, second = x[:, ::2], x[:, 1::2]
    return jnp.sum(
        -(first**4) + 6 * jnp.square(first) + 0.5 * first - 0.5 * jnp.square(second), axis=1
    )


def phi4(x):
    """Minus the action of the field, ``sum phi (4 phi - sum of neighbours) + m^2 phi^2 + lambda
    phi^4``.
    """
    field = x.reshape(-1, SIDE, SIDE)
    links = sum(field * jnp.roll(field, 1, axis) for axis in (1, 2))
    return -jnp.sum(
        (4 + MASS_SQUARED) * jnp.square(field) + COUPLING * field**4 - 2 * links, axis=(1, 2)
    )


def _well_grid():
    grid = np.linspace(-4, 4, 20001)
    return grid, np.exp(-(grid**4) + 6 * grid**2 + 0.5 * grid)


def _well_log_z():
    grid, density = _well_grid()
    return WELLS * (math.log(np.trapezoid(density, grid)) + 0.5 * math.log(2 * math.pi))


def _moons_grid():
    axis = np.linspace(-4, 4, 2001)
    points = np.stack(np.meshgrid(axis, axis, indexing="ij"), axis=-1).reshape(-1, 2)
    radius, side = np.linalg.norm(points, axis=1), np.abs(points[:, 0])
    log_density = (
        -0.5 * ((radius - 2) / 0.2) ** 2
        - 0.5 * ((side - 2) / 0.3) ** 2
        + np.log1p(np.exp(-4 * side / 0.09))
    )
    return axis[1] - axis[0], points, np.exp(log_density)


def _moons_log_z():
    spacing, _, density = _moons_grid()
    return math.log(density.sum() * spacing**2)


def _sample_moons(rng, num):
    spacing, points, density = _moons_grid()
    return (
        points[rng.choice(len(points), num, p=density / density.sum())]
        + rng.uniform(-0.5, 0.5, (num, 2)) * spacing
    )


def _sample_gaussians(rng, num):
    return MEANS[rng.integers(NUM_GAUSSIANS, size=num)] + GAUSSIAN_STD * rng.normal(size=(num, 2))


def _sample_funnel(rng, num):
    x = rng.normal(size=(num, FUNNEL_DIMS))
    x[:, 0] *= FUNNEL_STD
    x[:, 1:] *= np.exp(0.5 * x[:, :1])
    return x


def _sample_wells(rng, num):
    grid, density = _well_grid()
    cumulative = np.cumsum(density) / density.sum()
    x = rng.normal(size=(num, 2 * WELLS))
    x[:, ::2] = np.interp(rng.uniform(size=(num, WELLS)), cumulative, grid)
    return x


TARGETS = {
    "two_moons": Target(2, two_moons, 3.0, _moons_log_z(), _sample_moons),
    "gaussians": Target(2, gaussians, 25.0, 0.0, _sample_gaussians),
    "funnel": Target(FUNNEL_DIMS, funnel, 10.0, 0.0, _sample_funnel),
    "many_wells": Target(2 * WELLS, many_wells, 2.0, _well_log_z(), _sample_wells),
    "phi4": Target(SIDE**2, phi4, 1.0, None, None),
}
