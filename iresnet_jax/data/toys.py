r"""2-D toy densities with samplers and known log-densities: what a flow learns of them can be checked to the last digit.

The shapes and scales are the customary ones of the FFJORD (Grathwohl et al. 2019) and Residual Flow (Chen et al. 2019)
experiments, so negative log-likelihoods compare with published ones. Most of those samplers draw equal counts from each
component; here every point is independent, so the entropy is the floor of the expected negative log-likelihood of any model.

Densities are closed forms, or means over a curve by Gauss-Legendre quadrature whose nodes lie closer than the noise is wide:
accurate to rounding wherever a sample may fall (tested to 1e-9 in float64). They follow the dtype of ``x``, are finite
everywhere (only the checkerboard is ``-inf`` off its squares) and work in blocks of points, to bound the memory.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import i0e, log_ndtr, logsumexp
from jaxtyping import Array, Float, Float32, PRNGKeyArray

_BLOCK = 1024  # points evaluated at once: a quadrature of 384 nodes then holds a few MB


class Toy(NamedTuple):
    """A density on the plane.

    Attributes:
        name: Name that `get` knows it by.
        sample: Sampler: ``sample(key, n)`` draws ``n`` independent points; pure, and jit-able with ``n`` static.
        log_prob: Log-density ``log_prob(x)`` in nats.
        entropy: Differential entropy in nats, correct to 1e-4: `log_prob` integrated over a fine grid. A test negative
            log-likelihood clearly below it is a bug.
    """

    name: str
    sample: Callable[[PRNGKeyArray, int], Float32[Array, "n 2"]]
    log_prob: Callable[[Float[Array, "n 2"]], Float[Array, " n"]]
    entropy: float


# Building blocks ------------------------------------------------------------------------------------------------------


def _polar(radius: Float[Array, " n"], angle: Float[Array, " n"]) -> Float[Array, "n 2"]:
    return jnp.stack([radius * jnp.cos(angle), radius * jnp.sin(angle)], axis=-1)


def _normal(key: PRNGKeyArray, n: int) -> Float32[Array, "n 2"]:
    return jax.random.normal(key, (n, 2), jnp.float32)


def _uniform(key: PRNGKeyArray, n: int, low: float = 0.0, high: float = 1.0) -> Float32[Array, " n"]:
    return jax.random.uniform(key, (n,), jnp.float32, low, high)


def _pointwise(
    log_prob_of_point: Callable[[Float[Array, "2"]], Float[Array, ""]], x: Float[Array, "n 2"]
) -> Float[Array, " n"]:
    return jax.lax.map(log_prob_of_point, x, batch_size=_BLOCK)


def _unit_gauss_legendre(num_nodes: int) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and log-weights of Gauss-Legendre quadrature on [0, 1]: a mean over a uniform variable."""
    nodes, weights = np.polynomial.legendre.leggauss(num_nodes)
    return (nodes + 1) / 2, np.log(weights / 2)


def _gaussian_mixture(
    centres: np.ndarray, log_weights: np.ndarray, sigma: float
) -> Callable[[Float[Array, "n 2"]], Float[Array, " n"]]:
    """Mixture of isotropic Gaussians; also a uniform curve plus noise, with quadrature nodes for centres."""

    def log_prob(x: Float[Array, "n 2"]) -> Float[Array, " n"]:
        means, log_masses = jnp.asarray(centres, x.dtype), jnp.asarray(log_weights, x.dtype)

        def of_point(point):
            squared_distance = jnp.sum((point[None] - means) ** 2, axis=-1)
            return logsumexp(log_masses - squared_distance / (2 * sigma**2)) - math.log(2 * np.pi * sigma**2)

        return _pointwise(of_point, x)

    return log_prob


# Eight Gaussians on a circle: exact -----------------------------------------------------------------------------------

_GAUSSIANS_RADIUS, _GAUSSIANS_SIGMA = 4 / 1.414, 0.5 / 1.414  # 1.414, not sqrt(2), is the customary constant


def _sample_8gaussians(key: PRNGKeyArray, n: int) -> Float32[Array, "n 2"]:
    key_component, key_noise = jax.random.split(key)
    angle = jax.random.randint(key_component, (n,), 0, 8).astype(jnp.float32) * (2 * np.pi / 8)
    return _polar(jnp.full_like(angle, _GAUSSIANS_RADIUS), angle) + _GAUSSIANS_SIGMA * _normal(key_noise, n)


_EIGHTHS = 2 * np.pi / 8 * np.arange(8)
_log_prob_8gaussians = _gaussian_mixture(
    _GAUSSIANS_RADIUS * np.stack([np.cos(_EIGHTHS), np.sin(_EIGHTHS)], axis=-1),
    np.full(8, -math.log(8)),
    _GAUSSIANS_SIGMA,
)


# Checkerboard: uniform on 8 squares of side 2 in [-4, 4)^2, exact -----------------------------------------------------


def _sample_checkerboard(key: PRNGKeyArray, n: int) -> Float32[Array, "n 2"]:
    key_column, key_offset, key_row = jax.random.split(key, 3)
    first = _uniform(key_column, n, -2.0, 2.0)
    row = jax.random.randint(key_row, (n,), -1, 1).astype(jnp.float32)
    second = _uniform(key_offset, n) + 2 * row + jnp.floor(first) % 2
    return 2 * jnp.stack([first, second], axis=-1)


def _log_prob_checkerboard(x: Float[Array, "n 2"]) -> Float[Array, " n"]:
    on_board = jnp.all((x >= -4) & (x < 4), axis=-1)
    on_square = jnp.sum(jnp.floor(x / 2), axis=-1) % 2 == 0
    return jnp.where(on_board & on_square, jnp.asarray(-math.log(32), x.dtype), -jnp.inf)


# Circles and rings: a uniform angle plus Gaussian noise, exact --------------------------------------------------------


def _ring_sampler(radii: tuple[float, ...], sigma: float):
    def sample(key: PRNGKeyArray, n: int) -> Float32[Array, "n 2"]:
        key_ring, key_angle, key_noise = jax.random.split(key, 3)
        ring = jax.random.randint(key_ring, (n,), 0, len(radii))
        angle = _uniform(key_angle, n, 0.0, 2 * np.pi)
        return _polar(jnp.asarray(radii, jnp.float32)[ring], angle) + sigma * _normal(key_noise, n)

    return sample


def _ring_log_prob(radii: tuple[float, ...], sigma: float):
    r"""Mean over rings of ``exp(-(r - R)^2 / 2 sigma^2) e^{-z} I_0(z) / (2 pi sigma^2)`` with ``z = r R / sigma^2``."""

    def log_prob(x: Float[Array, "n 2"]) -> Float[Array, " n"]:
        radius, ring_radius = jnp.linalg.norm(x, axis=-1)[:, None], jnp.asarray(radii, x.dtype)[None]
        log_of_ring = -((radius - ring_radius) ** 2) / (2 * sigma**2) + jnp.log(i0e(radius * ring_radius / sigma**2))
        return logsumexp(log_of_ring, axis=-1) - math.log(len(radii) * 2 * np.pi * sigma**2)

    return log_prob


_CIRCLES = {"radii": (3.0, 1.5), "sigma": 3 * 0.08}  # noise is added before the scaling by 3 ...
_RINGS = {"radii": (3.0, 2.25, 1.5, 0.75), "sigma": 0.08}  # ... and here after it


# Moons: two half circles plus Gaussian noise, by quadrature over the angle --------------------------------------------

_MOONS_SIGMA = 2 * 0.1


def _sample_moons(key: PRNGKeyArray, n: int) -> Float32[Array, "n 2"]:
    key_moon, key_angle, key_noise = jax.random.split(key, 3)
    upper = _polar(jnp.ones(n, jnp.float32), _uniform(key_angle, n, 0.0, np.pi))
    lower = jnp.asarray([[1.0, 0.5]], jnp.float32) - upper
    curve = jnp.where(jax.random.bernoulli(key_moon, shape=(n, 1)), upper, lower)
    return 2 * curve + jnp.asarray([[-1.0, -0.2]], jnp.float32) + _MOONS_SIGMA * _normal(key_noise, n)


def _moons_log_prob():
    nodes, log_weights = _unit_gauss_legendre(64)  # the widest gap is 0.8 sigma: relative error below 1e-10
    upper = np.stack([np.cos(np.pi * nodes), np.sin(np.pi * nodes)], axis=-1)
    centres = 2 * np.concatenate([upper, np.array([1.0, 0.5]) - upper]) + np.array([-1.0, -0.2])
    return _gaussian_mixture(centres, np.concatenate([log_weights, log_weights]) - math.log(2), _MOONS_SIGMA)


# Swiss roll: a spiral plus Gaussian noise, by quadrature over the angle -----------------------------------------------

_ROLL_SIGMA = 1 / 5


def _sample_swissroll(key: PRNGKeyArray, n: int) -> Float32[Array, "n 2"]:
    key_angle, key_noise = jax.random.split(key)
    angle = _uniform(key_angle, n, 1.5 * np.pi, 4.5 * np.pi)
    return _polar(angle / 5, angle) + _ROLL_SIGMA * _normal(key_noise, n)


def _swissroll_log_prob():
    nodes, log_weights = _unit_gauss_legendre(192)  # the widest gap is 0.8 sigma
    angle = 1.5 * np.pi * (1 + 2 * nodes)
    centres = angle[:, None] / 5 * np.stack([np.cos(angle), np.sin(angle)], axis=-1)
    return _gaussian_mixture(centres, log_weights, _ROLL_SIGMA)


# Two spirals: a spiral jittered in a square, its reflection in the origin, Gaussian noise; by quadrature --------------

_SPIRAL_TURN = 3 * np.pi  # 540 degrees
_SPIRAL_JITTER, _SPIRAL_SIGMA = 0.5 / 3, 0.1


def _sample_2spirals(key: PRNGKeyArray, n: int) -> Float32[Array, "n 2"]:
    key_angle, key_jitter, key_arm, key_noise = jax.random.split(key, 4)
    angle = _SPIRAL_TURN * jnp.sqrt(_uniform(key_angle, n))
    jitter = _SPIRAL_JITTER * jax.random.uniform(key_jitter, (n, 2), jnp.float32)
    arm = _polar(angle / 3, np.pi - angle) + jitter  # the jitter has a mean: the arms are not quite concentric
    sign = jax.random.rademacher(key_arm, (n, 1), jnp.float32)
    return sign * arm + _SPIRAL_SIGMA * _normal(key_noise, n)


def _log_prob_of_jitter(offset: Float[Array, "..."]) -> Float[Array, "..."]:
    r"""Log-density of ``w U + sigma N``: ``log((Phi(z / sigma) - Phi((z - w) / sigma)) / w)``, accurate in both tails."""
    half = _SPIRAL_JITTER / 2
    distance = jnp.abs(offset - half)  # by symmetry both arguments can be kept in the left tail, where log_ndtr is accurate
    log_high = log_ndtr((half - distance) / _SPIRAL_SIGMA)
    log_low = log_ndtr((-half - distance) / _SPIRAL_SIGMA)
    return log_high + jnp.log1p(-jnp.exp(log_low - log_high)) - math.log(_SPIRAL_JITTER)


def _log_prob_2spirals(x: Float[Array, "n 2"]) -> Float[Array, " n"]:
    nodes, log_weights = _SPIRAL_QUADRATURE
    radius = _SPIRAL_TURN * nodes / 3  # nodes are for sqrt(U), whose density is 2 * node
    curve = radius[:, None] * np.stack([-np.cos(3 * radius), np.sin(3 * radius)], axis=-1)
    centres, log_masses = jnp.asarray(curve, x.dtype), jnp.asarray(log_weights + np.log(2 * nodes), x.dtype)

    def of_point(point):
        def of_arm(reflected):
            log_terms = jnp.sum(_log_prob_of_jitter(reflected[None] - centres), axis=-1)
            return logsumexp(log_masses + log_terms)

        return jnp.logaddexp(of_arm(point), of_arm(-point)) - math.log(2)

    return _pointwise(of_point, x)


_SPIRAL_QUADRATURE = _unit_gauss_legendre(384)  # the widest gap is 0.8 sigma


# Pinwheel: a Gaussian whose points are turned by an angle that grows with their first coordinate ----------------------

_WHEEL_ARMS, _WHEEL_RATE = 5, 0.25
_WHEEL_RADIAL, _WHEEL_TANGENTIAL = 0.3, 0.1


def _sample_pinwheel(key: PRNGKeyArray, n: int) -> Float32[Array, "n 2"]:
    key_arm, key_noise = jax.random.split(key)
    arm = jax.random.randint(key_arm, (n,), 0, _WHEEL_ARMS).astype(jnp.float32)
    a, b = (_normal(key_noise, n) * jnp.asarray([[_WHEEL_RADIAL, _WHEEL_TANGENTIAL]], jnp.float32)).T
    a = 1 + a
    turn = 2 * np.pi / _WHEEL_ARMS * arm + _WHEEL_RATE * jnp.exp(a)
    return 2 * _polar(jnp.hypot(a, b), jnp.arctan2(b, a) - turn)


def _log_prob_pinwheel(x: Float[Array, "n 2"]) -> Float[Array, " n"]:
    r"""Sums the density over every ``(a, b)`` that the sampler's map takes to ``x``.

    With ``(a, b) = r (cos phi, sin phi)`` and ``r = |x| / 2``, the angle of ``x`` is ``phi - e^a / 4 - 2 pi k / 5`` on arm
    ``k``, and the map's Jacobian has the determinant ``4 (1 + b e^a / 4)``. The map is not one-to-one, so the roots ``phi`` of
    all arms are bracketed on a grid of 128 cells and polished by Newton's method. Two roots in one cell, near the fold
    ``b = -4 e^{-a}``, are missed: the sampler reaches the fold with a probability below 1e-8.
    """
    edges = jnp.asarray(np.linspace(-np.pi, np.pi, 129), x.dtype)
    arms_per_radian = _WHEEL_ARMS / (2 * np.pi)

    def of_point(point):
        radius, angle = jnp.linalg.norm(point) / 2, jnp.arctan2(point[1], point[0])

        def wind(phi):  # rate * e^a; the bound is 17 standard deviations out and keeps far points finite
            return _WHEEL_RATE * jnp.exp(jnp.minimum(radius * jnp.cos(phi), 6.0))

        def arm(phi):  # an integer exactly at the roots
            return (phi - wind(phi) - angle) * arms_per_radian

        left, right, arm_left, arm_right = edges[:-1], edges[1:], arm(edges)[:-1], arm(edges)[1:]
        is_bracket = jnp.floor(arm_left) != jnp.floor(arm_right)
        root = jnp.floor(jnp.maximum(arm_left, arm_right))

        def newton(_, phi):
            slope = (1 + radius * jnp.sin(phi) * wind(phi)) * arms_per_radian
            return jnp.clip(phi - (arm(phi) - root) / jnp.where(slope == 0, 1, slope), left, right)

        phi = jax.lax.fori_loop(0, 6, newton, (left + right) / 2)
        a, b = radius * jnp.cos(phi), radius * jnp.sin(phi)
        log_gaussian = -(((a - 1) / _WHEEL_RADIAL) ** 2 + (b / _WHEEL_TANGENTIAL) ** 2) / 2
        log_volume = jnp.log(jnp.abs(4 * (1 + b * wind(phi))))
        log_constant = math.log(2 * np.pi * _WHEEL_RADIAL * _WHEEL_TANGENTIAL * _WHEEL_ARMS)
        return logsumexp(jnp.where(is_bracket, log_gaussian - log_volume, -jnp.inf)) - log_constant

    return _pointwise(of_point, x)


# The collection -------------------------------------------------------------------------------------------------------

_ALL = (
    Toy("8gaussians", _sample_8gaussians, _log_prob_8gaussians, 2.8319),
    Toy("checkerboard", _sample_checkerboard, _log_prob_checkerboard, math.log(32)),
    Toy("moons", _sample_moons, _moons_log_prob(), 2.3939),
    Toy("circles", _ring_sampler(**_CIRCLES), _ring_log_prob(**_CIRCLES), 3.2681),
    Toy("rings", _ring_sampler(**_RINGS), _ring_log_prob(**_RINGS), 2.6232),
    Toy("pinwheel", _sample_pinwheel, _log_prob_pinwheel, 2.3178),
    Toy("2spirals", _sample_2spirals, _log_prob_2spirals, 2.6455),
    Toy("swissroll", _sample_swissroll, _swissroll_log_prob(), 2.6696),
)
_BY_NAME = {toy.name: toy for toy in _ALL}
TOYS: tuple[str, ...] = tuple(_BY_NAME)


def get(name: str) -> Toy:
    """Returns the toy density called ``name``.

    Example::

        toy = get("moons")
        x = toy.sample(jax.random.key(0), 500)
        excess_nll = -jnp.mean(toy.log_prob(x)) - toy.entropy  # 0 within its standard error

    Args:
        name: Name, one of `TOYS`.

    Raises:
        ValueError: If there is no such toy; the message lists those there are.
    """
    if name not in _BY_NAME:
        raise ValueError(f"unknown 2-D toy {name!r}: known are {', '.join(TOYS)}; iresnet_jax.data.load knows images too")
    return _BY_NAME[name]
