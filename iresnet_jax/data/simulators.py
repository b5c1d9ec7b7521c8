r"""Simulators whose posterior is known, against which a trained conditional density can be checked.

A simulator draws parameters ``theta`` from a prior and an observation ``x`` given them. Examples are parameters and contexts
observations, so a conditional density of the draws is a model of the posterior ``p(theta | x)``. The tasks are those of the
SBI benchmark (Lueckmann et al. 2021, appendix T): ``linear_gaussian`` is T.1, ``sbi_two_moons`` is T.8.

Samples are in float32. Log-densities have the dtype of their arguments.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.stats import norm
from jaxtyping import Array, Float, Float32, PRNGKeyArray

_BLOCK = 1024  # points evaluated at once: a quadrature of 512 nodes then holds a few MB


class Simulator(NamedTuple):
    """A prior of parameters, a simulator of observations, and the posterior.

    Attributes:
        name: Name in `SIMULATORS`.
        num_parameters: Length of ``theta``, the example.
        num_observed: Length of ``x``, the context.
        sample: Sampler ``(key, n) -> (theta, x)`` of ``n`` independent pairs; jit can compile it with a static ``n``.
        log_prob: Posterior log-density ``(theta, x) -> log p(theta | x)`` of pairs, in nats, normalised; ``-inf`` where the
            posterior is zero.
        sample_given: Posterior sampler ``(key, x, n) -> theta`` for one observation ``x``, exact; NaN if no parameters can have
            led to ``x``.
        entropy: Expected entropy ``E[-log p(theta | x)]`` over pairs, in nats, correct to 1e-4. No model's expected negative
            log-likelihood is below it, and the difference is the expected Kullback-Leibler divergence from the posterior.
    """

    name: str
    num_parameters: int
    num_observed: int
    sample: Callable[[PRNGKeyArray, int], tuple[Float32[Array, "n d"], Float32[Array, "n k"]]]
    log_prob: Callable[[Float[Array, "n d"], Float[Array, "n k"]], Float[Array, " n"]]
    sample_given: Callable[[PRNGKeyArray, Float[Array, " k"], int], Float32[Array, "n d"]]
    entropy: float


# Linear Gaussian: theta ~ N(0, .1 I), x | theta ~ N(theta, .1 I), so theta | x ~ N(x / 2, .05 I) --------------------------

_DIMS, _VARIANCE, _POSTERIOR_VARIANCE = 10, 0.1, 0.05


def _sample_linear_gaussian(key: PRNGKeyArray, n: int) -> tuple[Float32[Array, "n d"], Float32[Array, "n k"]]:
    key_prior, key_noise = jax.random.split(key)
    theta = math.sqrt(_VARIANCE) * jax.random.normal(key_prior, (n, _DIMS), jnp.float32)
    return theta, theta + math.sqrt(_VARIANCE) * jax.random.normal(key_noise, (n, _DIMS), jnp.float32)


def _log_prob_linear_gaussian(theta: Float[Array, "n d"], x: Float[Array, "n k"]) -> Float[Array, " n"]:
    return jnp.sum(norm.logpdf(theta, x / 2, math.sqrt(_POSTERIOR_VARIANCE)), axis=-1)


def _sample_linear_gaussian_given(key: PRNGKeyArray, x: Float[Array, " k"], n: int) -> Float32[Array, "n d"]:
    noise = jax.random.normal(key, (n, _DIMS), jnp.float32)
    return x.astype(jnp.float32)[None] / 2 + math.sqrt(_POSTERIOR_VARIANCE) * noise


# Two moons ----------------------------------------------------------------------------------------------------------------
#
# theta ~ U(-1, 1)^2, x = q + (.25 - |u|, v) with u = (t1 + t2) / sqrt 2, v = (t2 - t1) / sqrt 2 and a crescent
# q = (r cos a, r sin a), a ~ U(-pi / 2, pi / 2), r ~ N(.1, .01^2). Given x, each q leaves two parameters, (u, v) and (-u, v),
# with |u| = q1 + .25 - x1 and v = x2 - q2, if |u| >= 0 and |u| + |v| <= sqrt 2, the prior's box. So the posterior is the
# crescent's density, mirrored, over twice the share of the crescent that satisfies both.

_RADIUS, _SPREAD, _OFFSET = 0.1, 0.01, 0.25
_DIAGONAL = math.sqrt(2)
_SLACK = 1e-6  # rounding of float32 may take a point of the crescent across its straight edge by so much
_NO_SHARE = 1e-6  # rounding of a share of the crescent that is 0
_MOST_ROUNDS = 10_000  # of a rejection sampler: enough for an observation whose box leaves a thousandth of the crescent
_NUM_NODES = 512


def _uv_of(theta: Float[Array, "n 2"]) -> tuple[Float[Array, " n"], Float[Array, " n"]]:
    return (theta[:, 0] + theta[:, 1]) / _DIAGONAL, (theta[:, 1] - theta[:, 0]) / _DIAGONAL


def _sample_crescent(key: PRNGKeyArray, n: int) -> Float32[Array, "n 2"]:
    key_angle, key_radius = jax.random.split(key)
    angle = jax.random.uniform(key_angle, (n,), jnp.float32, -np.pi / 2, np.pi / 2)
    radius = _RADIUS + _SPREAD * jax.random.normal(key_radius, (n,), jnp.float32)
    return radius[:, None] * jnp.stack([jnp.cos(angle), jnp.sin(angle)], axis=-1)


def _sample_two_moons(key: PRNGKeyArray, n: int) -> tuple[Float32[Array, "n d"], Float32[Array, "n k"]]:
    key_prior, key_crescent = jax.random.split(key)
    theta = jax.random.uniform(key_prior, (n, 2), jnp.float32, -1.0, 1.0)
    u, v = _uv_of(theta)
    return theta, _sample_crescent(key_crescent, n) + jnp.stack([_OFFSET - jnp.abs(u), v], axis=-1)


def _log_prob_two_moons(theta: Float[Array, "n d"], x: Float[Array, "n k"]) -> Float[Array, " n"]:
    u, v = _uv_of(theta)
    q = x - jnp.stack([_OFFSET - jnp.abs(u), v], axis=-1)
    radius = jnp.maximum(jnp.linalg.norm(q, axis=-1), 1e-9)
    # The angle is uniform over pi, and the area element of polar coordinates is the radius.
    log_crescent = norm.logpdf(radius, _RADIUS, _SPREAD) - jnp.log(np.pi * radius)
    log_share = jax.lax.map(lambda one: jnp.log(_share_in_box(one)), x, batch_size=_BLOCK)
    is_possible = jnp.all(jnp.abs(theta) <= 1, axis=-1) & (q[:, 0] > -_SLACK)
    return jnp.where(is_possible, log_crescent - math.log(2) - log_share, -jnp.inf)


@functools.cache
def _radius_quadrature() -> tuple[np.ndarray, np.ndarray]:
    """Radii within 6 standard deviations and their weights in the mean over ``r``."""
    nodes, weights = np.polynomial.legendre.leggauss(_NUM_NODES)
    deviations = 6 * nodes
    weights = weights * np.exp(-(deviations**2) / 2)
    return _RADIUS + _SPREAD * deviations, weights / weights.sum()


def _share_in_box(x: Float[Array, " 2"]) -> Float[Array, ""]:
    r"""Share of the crescent that the observation ``x`` leaves possible, with an absolute error below 2e-4.

    For a radius ``r``, the angles with ``|u| >= 0`` are ``|a| <= A``, and ``|u| + |v| <= sqrt 2`` fails within ``alpha`` of
    ``-pi / 4`` and within ``beta`` of ``pi / 4``: the share of angles is exact, its mean over ``r`` a quadrature.
    """
    r, weights = (jnp.asarray(values, x.dtype) for values in _radius_quadrature())
    along, across = x[0] - _OFFSET, x[1]

    def arc(cosine):
        return jnp.arccos(jnp.clip(cosine, -1, 1))

    def length(low, high):
        return jnp.maximum(high - low, 0)

    widest = jnp.minimum(arc(along / r), np.pi / 2)
    alpha = arc((_DIAGONAL + along - across) / (_DIAGONAL * r))
    beta = arc((_DIAGONAL + along + across) / (_DIAGONAL * r))
    lower = jnp.maximum(-np.pi / 4 - alpha, -widest), jnp.minimum(-np.pi / 4 + alpha, widest)
    upper = jnp.maximum(np.pi / 4 - beta, -widest), jnp.minimum(np.pi / 4 + beta, widest)
    both = length(jnp.maximum(lower[0], upper[0]), jnp.minimum(lower[1], upper[1]))
    angles = 2 * widest - length(*lower) - length(*upper) + both
    return jnp.sum(weights * angles) / np.pi


def _sample_two_moons_given(key: PRNGKeyArray, x: Float[Array, " k"], n: int) -> Float32[Array, "n d"]:
    """Points of the crescent, drawn again until they are possible, on either side at random; none where no point is."""
    x, (key_side, key_rounds) = x.astype(jnp.float32), jax.random.split(key)
    has_share = _share_in_box(x) > _NO_SHARE

    def uv(q):
        return q[:, 0] + _OFFSET - x[0], x[1] - q[:, 1]

    def is_possible(q):
        u, v = uv(q)
        return (u >= 0) & (u + jnp.abs(v) <= _DIAGONAL)

    def draw(state):
        number, q = state
        drawn = _sample_crescent(jax.random.fold_in(key_rounds, number), n)
        return number + 1, jnp.where(is_possible(q)[:, None], q, drawn)

    def is_incomplete(state):
        number, q = state
        return has_share & (number < _MOST_ROUNDS) & ~jnp.all(is_possible(q))

    _, q = jax.lax.while_loop(is_incomplete, draw, (0, jnp.full((n, 2), jnp.nan, jnp.float32)))
    u, v = uv(q)
    u = u * jax.random.rademacher(key_side, (n,), jnp.float32)
    theta = jnp.stack([u - v, u + v], axis=-1) / _DIAGONAL
    return jnp.where(is_possible(q)[:, None], jnp.clip(theta, -1, 1), jnp.nan)


SIMULATORS: dict[str, Simulator] = {
    "linear_gaussian": Simulator(
        "linear_gaussian",
        _DIMS,
        _DIMS,
        _sample_linear_gaussian,
        _log_prob_linear_gaussian,
        _sample_linear_gaussian_given,
        _DIMS / 2 * math.log(2 * np.pi * np.e * _POSTERIOR_VARIANCE),
    ),
    "sbi_two_moons": Simulator(
        "sbi_two_moons",
        2,
        2,
        _sample_two_moons,
        _log_prob_two_moons,
        _sample_two_moons_given,
        -3.7927,  # of the crescent -4.3492, of its side .6931, and of what the box leaves of it -.1367
    ),
}
