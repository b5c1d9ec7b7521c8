"""2-D toy densities with samplers and known entropies, the lower bounds of a model's expected
negative log-likelihood.

Shapes and scales follow the experiments of FFJORD (Grathwohl et al. 2019) and Residual Flow (Chen
et al. 2019), so negative log-likelihoods compare with published ones. The samplers of those
experiments mostly draw equal counts from each component. Here every point is independent.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, PRNGKeyArray

Points = Float32[Array, "n 2"]


class Toy(NamedTuple):
    """A density on the plane.

    Attributes:
        name: Name in `TOYS`.
        sample: Sampler ``(key, n) ->`` ``n`` independent points; a pure function, which jit can
            compile with a static ``n``.
        entropy: Differential entropy in nats, from an integral of the density over a fine grid,
            correct to 1e-4. A model whose test negative log-likelihood is clearly below the entropy
            has a bug.
    """

    name: str
    sample: Callable[[PRNGKeyArray, int], Points]
    entropy: float


def _polar(radius: Any, angle: Any) -> Any:
    return jnp.stack([radius * jnp.cos(angle), radius * jnp.sin(angle)], axis=-1)


def _normal(key: PRNGKeyArray, n: int) -> Points:
    return jax.random.normal(key, (n, 2), jnp.float32)


def _uniform(
    key: PRNGKeyArray, n: int, low: float = 0.0, high: float = 1.0
) -> Float32[Array, " n"]:
    return jax.random.uniform(key, (n,), jnp.float32, low, high)


def _sample_8gaussians(key: PRNGKeyArray, n: int) -> Points:
    """Eight Gaussians on a circle."""
    radius, sigma = 4 / 1.414, 0.5 / 1.414  # the customary constant is 1.414, not sqrt(2)
    angles = 2 * np.pi / 8 * np.arange(8)
    centres = radius * np.stack([np.cos(angles), np.sin(angles)], axis=-1)
    key_component, key_noise = jax.random.split(key)
    centre = jnp.asarray(centres, jnp.float32)[jax.random.randint(key_component, (n,), 0, 8)]
    return centre + sigma * _normal(key_noise, n)


def _sample_checkerboard(key: PRNGKeyArray, n: int) -> Points:
    """Uniform on 8 squares of side 2 in [-4, 4)^2."""
    key_column, key_offset, key_row = jax.random.split(key, 3)
    first = _uniform(key_column, n, -2.0, 2.0)
    row = jax.random.randint(key_row, (n,), -1, 1).astype(jnp.float32)
    second = _uniform(key_offset, n) + 2 * row + jnp.floor(first) % 2
    return 2 * jnp.stack([first, second], axis=-1)


def _rings(name: str, radii: tuple[float, ...], sigma: float, entropy: float) -> Toy:
    """Points on random rings plus Gaussian noise."""

    def sample(key: PRNGKeyArray, n: int) -> Points:
        key_ring, key_angle, key_noise = jax.random.split(key, 3)
        ring = jax.random.randint(key_ring, (n,), 0, len(radii))
        angle = _uniform(key_angle, n, 0.0, 2 * np.pi)
        return _polar(jnp.asarray(radii, jnp.float32)[ring], angle) + sigma * _normal(key_noise, n)

    return Toy(name, sample, entropy)


def _sample_moons(key: PRNGKeyArray, n: int) -> Points:
    """Two half circles plus Gaussian noise."""
    key_moon, key_angle, key_noise = jax.random.split(key, 3)
    upper = _polar(1.0, _uniform(key_angle, n, 0.0, np.pi))
    lower = jnp.asarray([[1.0, 0.5]], jnp.float32) - upper
    curve = jnp.where(jax.random.bernoulli(key_moon, shape=(n, 1)), upper, lower)
    return 2 * curve + jnp.asarray([[-1.0, -0.2]], jnp.float32) + 0.2 * _normal(key_noise, n)


def _sample_swissroll(key: PRNGKeyArray, n: int) -> Points:
    """A spiral plus Gaussian noise."""
    key_angle, key_noise = jax.random.split(key)
    angle = _uniform(key_angle, n, 1.5 * np.pi, 4.5 * np.pi)
    return _polar(angle / 5, angle) + 0.2 * _normal(key_noise, n)


def _sample_2spirals(key: PRNGKeyArray, n: int) -> Points:
    """A spiral or its reflection in the origin, plus uniform jitter and Gaussian noise."""
    key_angle, key_jitter, key_arm, key_noise = jax.random.split(key, 4)
    angle = 3 * np.pi * jnp.sqrt(_uniform(key_angle, n))
    jitter = 0.5 / 3 * jax.random.uniform(key_jitter, (n, 2), jnp.float32)
    # The mean of the jitter shifts both arms off the centre.
    arm = _polar(angle / 3, np.pi - angle) + jitter
    sign = jax.random.rademacher(key_arm, (n, 1), jnp.float32)
    return sign * arm + 0.1 * _normal(key_noise, n)


def _sample_pinwheel(key: PRNGKeyArray, n: int) -> Points:
    """A Gaussian whose points are turned by an angle that grows with their first coordinate, on
    one of five arms.
    """
    key_arm, key_noise = jax.random.split(key)
    arm = jax.random.randint(key_arm, (n,), 0, 5).astype(jnp.float32)
    a, b = (_normal(key_noise, n) * jnp.asarray([[0.3, 0.1]], jnp.float32)).T
    a = 1 + a
    turn = 2 * np.pi / 5 * arm + 0.25 * jnp.exp(a)
    return 2 * _polar(jnp.hypot(a, b), jnp.arctan2(b, a) - turn)


TOYS: dict[str, Toy] = {
    toy.name: toy
    for toy in (
        Toy("8gaussians", _sample_8gaussians, 2.8319),
        Toy("checkerboard", _sample_checkerboard, math.log(32)),
        Toy("moons", _sample_moons, 2.3939),
        # The customary sampler adds the noise before it scales by 3.
        _rings("circles", (3.0, 1.5), 3 * 0.08, 3.2681),
        # The customary sampler adds the noise after it scales by 3.
        _rings("rings", (3.0, 2.25, 1.5, 0.75), 0.08, 2.6232),
        Toy("pinwheel", _sample_pinwheel, 2.3178),
        Toy("2spirals", _sample_2spirals, 2.6455),
        Toy("swissroll", _sample_swissroll, 2.6696),
    )
}
