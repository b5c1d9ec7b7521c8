r"""2-D toy densities with samplers and known log-densities, against which a trained flow can be checked to the last digit.

The shapes and scales are those of the FFJORD (Grathwohl et al. 2019) and Residual Flow (Chen et al. 2019) experiments, so
negative log-likelihoods compare with published ones. The samplers of those experiments mostly draw equal counts from each
component. Here every point is independent: no model's expected negative log-likelihood is below the entropy.

A log-density is a closed form or a mean over a curve. Means are taken by Gauss-Legendre quadrature with nodes closer together
than the noise is wide, which is accurate to rounding wherever a sample may fall (tested to 1e-9 in float64). Log-densities have
the dtype of ``x`` and are finite, except for the checkerboard, which is ``-inf`` off its squares.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import i0e, log_ndtr, logsumexp
from jax.scipy.stats import norm
from jaxtyping import Array, Float, Float32, PRNGKeyArray

_BLOCK = 1024  # points evaluated at once: a quadrature of 384 nodes then holds a few MB

Points = Float32[Array, "n 2"]
LogProb = Callable[[Float[Array, "n 2"]], Float[Array, " n"]]


class Toy(NamedTuple):
    """A density on the plane.

    Attributes:
        name: Name in `TOYS`.
        sample: Sampler ``(key, n) ->`` ``n`` independent points; a pure function, which jit can compile with a static ``n``.
        log_prob: Log-density in nats.
        entropy: Differential entropy in nats, from an integral of the density over a fine grid, correct to 1e-4. A model whose
            test negative log-likelihood is clearly below the entropy has a bug.
    """

    name: str
    sample: Callable[[PRNGKeyArray, int], Points]
    log_prob: LogProb
    entropy: float


def _polar(radius: Any, angle: Any, numpy: Any = jnp) -> Any:
    return numpy.stack([radius * numpy.cos(angle), radius * numpy.sin(angle)], axis=-1)


def _normal(key: PRNGKeyArray, n: int) -> Points:
    return jax.random.normal(key, (n, 2), jnp.float32)


def _uniform(key: PRNGKeyArray, n: int, low: float = 0.0, high: float = 1.0) -> Float32[Array, " n"]:
    return jax.random.uniform(key, (n,), jnp.float32, low, high)


def _mixture(components: Callable[[], tuple[np.ndarray, np.ndarray]], log_kernel: Callable[[Any], Any]) -> LogProb:
    """The log-density of noise around random points, or around a curve whose quadrature nodes are the points.

    Args:
        components: Function that returns the points ``(m, 2)`` and their log-shares, called at the first evaluation.
        log_kernel: Log-density of the noise of one coordinate.
    """
    components = functools.cache(components)

    def log_prob(x: Float[Array, "n 2"]) -> Float[Array, " n"]:
        centres, log_shares = (jnp.asarray(values, x.dtype) for values in components())

        def of_point(point):
            return logsumexp(log_shares + jnp.sum(log_kernel(point[None] - centres), axis=-1))

        return jax.lax.map(of_point, x, batch_size=_BLOCK)

    return log_prob


def _gaussian(sigma: float) -> Callable[[Any], Any]:
    return functools.partial(norm.logpdf, scale=sigma)


def _unit_gauss_legendre(num_nodes: int) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and log-weights of the Gauss-Legendre quadrature of a mean over a uniform variable on [0, 1]."""
    nodes, weights = np.polynomial.legendre.leggauss(num_nodes)
    return (nodes + 1) / 2, np.log(weights / 2)


# The customary constant is 1.414, not sqrt(2).
_GAUSSIANS_CENTRES, _GAUSSIANS_SIGMA = _polar(4 / 1.414, 2 * np.pi / 8 * np.arange(8), np), 0.5 / 1.414


def _sample_8gaussians(key: PRNGKeyArray, n: int) -> Points:
    """Eight Gaussians on a circle."""
    key_component, key_noise = jax.random.split(key)
    centre = jnp.asarray(_GAUSSIANS_CENTRES, jnp.float32)[jax.random.randint(key_component, (n,), 0, 8)]
    return centre + _GAUSSIANS_SIGMA * _normal(key_noise, n)


def _gaussians() -> tuple[np.ndarray, np.ndarray]:
    return _GAUSSIANS_CENTRES, np.full(8, -math.log(8))


def _sample_checkerboard(key: PRNGKeyArray, n: int) -> Points:
    """Uniform on 8 squares of side 2 in [-4, 4)^2."""
    key_column, key_offset, key_row = jax.random.split(key, 3)
    first = _uniform(key_column, n, -2.0, 2.0)
    row = jax.random.randint(key_row, (n,), -1, 1).astype(jnp.float32)
    second = _uniform(key_offset, n) + 2 * row + jnp.floor(first) % 2
    return 2 * jnp.stack([first, second], axis=-1)


def _log_prob_checkerboard(x: Float[Array, "n 2"]) -> Float[Array, " n"]:
    on_board = jnp.all((x >= -4) & (x < 4), axis=-1)
    on_square = jnp.sum(jnp.floor(x / 2), axis=-1) % 2 == 0
    return jnp.where(on_board & on_square, jnp.asarray(-math.log(32), x.dtype), -jnp.inf)


def _rings(name: str, radii: tuple[float, ...], sigma: float, entropy: float) -> Toy:
    r"""Points on random rings plus Gaussian noise.

    The density is the mean over rings of ``exp(-(r - R)^2 / 2 sigma^2) e^{-z} I_0(z) / (2 pi sigma^2)`` with
    ``z = r R / sigma^2``.
    """

    def sample(key: PRNGKeyArray, n: int) -> Points:
        key_ring, key_angle, key_noise = jax.random.split(key, 3)
        ring = jax.random.randint(key_ring, (n,), 0, len(radii))
        angle = _uniform(key_angle, n, 0.0, 2 * np.pi)
        return _polar(jnp.asarray(radii, jnp.float32)[ring], angle) + sigma * _normal(key_noise, n)

    def log_prob(x: Float[Array, "n 2"]) -> Float[Array, " n"]:
        radius, ring_radius = jnp.linalg.norm(x, axis=-1)[:, None], jnp.asarray(radii, x.dtype)[None]
        log_of_ring = -((radius - ring_radius) ** 2) / (2 * sigma**2) + jnp.log(i0e(radius * ring_radius / sigma**2))
        return logsumexp(log_of_ring, axis=-1) - math.log(len(radii) * 2 * np.pi * sigma**2)

    return Toy(name, sample, log_prob, entropy)


_MOONS_SIGMA = 2 * 0.1


def _sample_moons(key: PRNGKeyArray, n: int) -> Points:
    """Two half circles plus Gaussian noise."""
    key_moon, key_angle, key_noise = jax.random.split(key, 3)
    upper = _polar(1.0, _uniform(key_angle, n, 0.0, np.pi))
    lower = jnp.asarray([[1.0, 0.5]], jnp.float32) - upper
    curve = jnp.where(jax.random.bernoulli(key_moon, shape=(n, 1)), upper, lower)
    return 2 * curve + jnp.asarray([[-1.0, -0.2]], jnp.float32) + _MOONS_SIGMA * _normal(key_noise, n)


def _moons() -> tuple[np.ndarray, np.ndarray]:
    nodes, log_weights = _unit_gauss_legendre(64)  # the widest gap is 0.8 sigma: relative error below 1e-10
    upper = _polar(1.0, np.pi * nodes, np)
    centres = 2 * np.concatenate([upper, np.array([1.0, 0.5]) - upper]) + np.array([-1.0, -0.2])
    return centres, np.tile(log_weights, 2) - math.log(2)


_ROLL_SIGMA = 1 / 5


def _sample_swissroll(key: PRNGKeyArray, n: int) -> Points:
    """A spiral plus Gaussian noise."""
    key_angle, key_noise = jax.random.split(key)
    angle = _uniform(key_angle, n, 1.5 * np.pi, 4.5 * np.pi)
    return _polar(angle / 5, angle) + _ROLL_SIGMA * _normal(key_noise, n)


def _roll() -> tuple[np.ndarray, np.ndarray]:
    nodes, log_weights = _unit_gauss_legendre(192)  # the widest gap is 0.8 sigma
    angle = 1.5 * np.pi * (1 + 2 * nodes)
    return _polar(angle / 5, angle, np), log_weights


_SPIRAL_TURN = 3 * np.pi  # 540 degrees
_SPIRAL_JITTER, _SPIRAL_SIGMA = 0.5 / 3, 0.1


def _sample_2spirals(key: PRNGKeyArray, n: int) -> Points:
    """A spiral or its reflection in the origin, plus uniform jitter and Gaussian noise."""
    key_angle, key_jitter, key_arm, key_noise = jax.random.split(key, 4)
    angle = _SPIRAL_TURN * jnp.sqrt(_uniform(key_angle, n))
    jitter = _SPIRAL_JITTER * jax.random.uniform(key_jitter, (n, 2), jnp.float32)
    arm = _polar(angle / 3, np.pi - angle) + jitter  # the mean of the jitter shifts both arms off the centre
    sign = jax.random.rademacher(key_arm, (n, 1), jnp.float32)
    return sign * arm + _SPIRAL_SIGMA * _normal(key_noise, n)


def _spiral_arm() -> tuple[np.ndarray, np.ndarray]:
    nodes, log_weights = _unit_gauss_legendre(384)  # the widest gap is 0.8 sigma
    angle = _SPIRAL_TURN * nodes  # nodes are for sqrt(U), whose density is 2 * node
    return _polar(angle / 3, np.pi - angle, np), log_weights + np.log(2 * nodes)


def _jitter_and_noise(offset: Float[Array, "..."]) -> Float[Array, "..."]:
    r"""Log-density of ``z = w U + sigma N``, ``log((Phi(z / sigma) - Phi((z - w) / sigma)) / w)``, accurate in both tails."""
    half = _SPIRAL_JITTER / 2
    distance = jnp.abs(offset - half)  # symmetry keeps both arguments in the left tail, where log_ndtr is accurate
    log_high, log_low = (log_ndtr((edge - distance) / _SPIRAL_SIGMA) for edge in (half, -half))
    return log_high + jnp.log1p(-jnp.exp(log_low - log_high)) - math.log(_SPIRAL_JITTER)


_log_prob_of_arm = _mixture(_spiral_arm, _jitter_and_noise)


def _log_prob_2spirals(x: Float[Array, "n 2"]) -> Float[Array, " n"]:
    return jnp.logaddexp(_log_prob_of_arm(x), _log_prob_of_arm(-x)) - math.log(2)


_WHEEL_ARMS, _WHEEL_RATE = 5, 0.25
_WHEEL_RADIAL, _WHEEL_TANGENTIAL = 0.3, 0.1


def _sample_pinwheel(key: PRNGKeyArray, n: int) -> Points:
    """A Gaussian whose points are turned by an angle that grows with their first coordinate, on one of five arms."""
    key_arm, key_noise = jax.random.split(key)
    arm = jax.random.randint(key_arm, (n,), 0, _WHEEL_ARMS).astype(jnp.float32)
    a, b = (_normal(key_noise, n) * jnp.asarray([[_WHEEL_RADIAL, _WHEEL_TANGENTIAL]], jnp.float32)).T
    a = 1 + a
    turn = 2 * np.pi / _WHEEL_ARMS * arm + _WHEEL_RATE * jnp.exp(a)
    return 2 * _polar(jnp.hypot(a, b), jnp.arctan2(b, a) - turn)


def _log_prob_pinwheel(x: Float[Array, "n 2"]) -> Float[Array, " n"]:
    r"""Log of the density summed over every ``(a, b)`` that the sampler maps to ``x``.

    With ``(a, b) = r (cos phi, sin phi)`` and ``r = |x| / 2``, the angle of ``x`` on arm ``k`` is
    ``phi - e^a / 4 - 2 pi k / 5``, and the Jacobian determinant of the map is ``4 (1 + b e^a / 4)``. Several angles ``phi`` may
    map to the same ``x``: a grid of 128 cells brackets these roots, and Newton's method refines them. Two roots in one cell are
    missed. They only occur near the fold ``b = -4 e^{-a}``, which the sampler reaches with a probability below 1e-8.
    """
    edges = jnp.asarray(np.linspace(-np.pi, np.pi, 129), x.dtype)
    arms_per_radian = _WHEEL_ARMS / (2 * np.pi)

    def of_point(point):
        radius, angle = jnp.linalg.norm(point) / 2, jnp.arctan2(point[1], point[0])

        def wind(phi):  # rate * e^a, finite at far points: the bound on a is 17 standard deviations above its mean
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
        log_gaussian = norm.logpdf(a, 1, _WHEEL_RADIAL) + norm.logpdf(b, 0, _WHEEL_TANGENTIAL)
        log_volume = jnp.log(jnp.abs(4 * (1 + b * wind(phi))))
        return logsumexp(jnp.where(is_bracket, log_gaussian - log_volume, -jnp.inf)) - math.log(_WHEEL_ARMS)

    return jax.lax.map(of_point, x, batch_size=_BLOCK)


TOYS: dict[str, Toy] = {
    toy.name: toy
    for toy in (
        Toy("8gaussians", _sample_8gaussians, _mixture(_gaussians, _gaussian(_GAUSSIANS_SIGMA)), 2.8319),
        Toy("checkerboard", _sample_checkerboard, _log_prob_checkerboard, math.log(32)),
        Toy("moons", _sample_moons, _mixture(_moons, _gaussian(_MOONS_SIGMA)), 2.3939),
        _rings("circles", (3.0, 1.5), 3 * 0.08, 3.2681),  # the customary sampler adds the noise before it scales by 3
        _rings("rings", (3.0, 2.25, 1.5, 0.75), 0.08, 2.6232),  # the customary sampler adds the noise after it scales by 3
        Toy("pinwheel", _sample_pinwheel, _log_prob_pinwheel, 2.3178),
        Toy("2spirals", _sample_2spirals, _log_prob_2spirals, 2.6455),
        Toy("swissroll", _sample_swissroll, _mixture(_roll, _gaussian(_ROLL_SIGMA)), 2.6696),
    )
}
