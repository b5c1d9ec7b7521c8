r"""Samples of an unnormalised density by sequential Monte Carlo from a broad normal distribution.

Particles pass through ``N(0, scale^2)^(1 - t) p^t`` for rising ``t`` (Del Moral, Doucet and Jasra 2006): each step weighs them
with the ratio of two neighbours, draws them again by their weights, and moves them by Hamiltonian Monte Carlo. Steps are as
long as the effective sample size allows, so that separated modes keep the shares that they had while they were connected.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Key

from iresnet_jax.maths.energies import LogDensity, check_finite

KEPT = 0.5  # share of effective particles after a step
MOVES, LEAPFROG_STEPS = 10, 8  # trajectories after each step, and steps of each
TARGET_ACCEPTANCE = 0.75
_ADAPTATION = 0.6  # of the logarithm of the step size by the difference of acceptances
_MOST_STEPS = 1000
_HALVINGS = 40


class Particles(NamedTuple):
    """Samples of an unnormalised density.

    Attributes:
        x: The samples, equally weighted and dependent.
        log_z: Logarithm of the integral of the density, an estimate whose exponential is unbiased but for the adaptation.
        step_size: Step of the last trajectories, in standard deviations of the particles.
    """

    x: Float[Array, "n d"]
    log_z: float
    step_size: float


def annealed(
    log_density: LogDensity, key: Key[Array, ""], num: int, num_dims: int, *, scale: float = 1.0, final_moves: int = 30
) -> Particles:
    """Particles of a density, annealed from a normal distribution.

    Args:
        log_density: ``(n, d) -> (n,)``, up to a constant; differentiable.
        key: Source of randomness.
        num: Number of particles.
        num_dims: Dimensions.
        scale: Standard deviation of the normal distribution, which should reach all of the density's mass.
        final_moves: Trajectories at the end.

    Raises:
        ValueError: If the log-density of draws from the normal distribution is NaN or infinite.
        RuntimeError: If the path takes too many steps.
    """
    key, key_start = jax.random.split(key)
    x = scale * jax.random.normal(key_start, (num, num_dims))
    check_finite(log_density(x), f"draws from the normal distribution of scale {scale:g} in which annealing starts")
    step = jax.jit(functools.partial(_step, log_density, scale))
    t, log_z, size, num_steps = jnp.zeros((), x.dtype), 0.0, jnp.full((), 0.3, x.dtype), 0
    while t < 1:
        key, key_step = jax.random.split(key)
        x, t, change, size = step(key_step, x, t, size)
        log_z, num_steps = log_z + float(change), num_steps + 1
        if num_steps == _MOST_STEPS:
            raise RuntimeError(
                f"annealing is at t = {float(t):.3g} after {num_steps} steps: choose another scale than {scale:g}"
            )
    x, size = jax.jit(functools.partial(moved, log_density), static_argnames="num_moves")(
        jax.random.fold_in(key, 1), x, size, num_moves=final_moves
    )
    return Particles(x, log_z, float(size))


def _step(log_density: LogDensity, scale: float, key: Key[Array, ""], x: Array, t: Array, size: Array):
    """Weighs, draws and moves particles from ``t`` to the next one."""
    key_draw, key_move = jax.random.split(key)

    def start(x):
        return -0.5 * jnp.sum(jnp.square(x / scale), axis=1) - x.shape[1] * (math.log(scale) + 0.5 * math.log(2 * math.pi))

    ratios = log_density(x) - start(x)
    ratios = jnp.where(jnp.isfinite(ratios), ratios, -jnp.inf)

    def share(change):
        weights = change * ratios
        return jnp.exp(2 * jax.nn.logsumexp(weights) - jax.nn.logsumexp(2 * weights)) / len(x)

    def halve(_, ends):
        low, high = ends
        middle = (low + high) / 2
        is_long = share(middle) < KEPT
        return jnp.where(is_long, low, middle), jnp.where(is_long, middle, high)

    left = 1 - t
    low, _ = lax.fori_loop(0, _HALVINGS, halve, (jnp.zeros_like(t), left))
    is_last = share(left) >= KEPT
    change = jnp.where(is_last, left, low)
    t = jnp.where(is_last, 1.0, t + change)
    weights = change * ratios
    log_mean = jax.nn.logsumexp(weights) - math.log(len(x))
    x = x[systematic(key_draw, weights)]
    x, size = moved(lambda x: t * log_density(x) + (1 - t) * start(x), key_move, x, size, num_moves=MOVES)
    return x, t, log_mean, size


def systematic(key: Key[Array, ""], log_weights: Float[Array, " n"]) -> Array:
    """Places of as many particles, each drawn about as often as its weight says: by one random number."""
    cumulative = jnp.cumsum(jax.nn.softmax(log_weights))
    num = len(log_weights)
    places = (jnp.arange(num) + jax.random.uniform(key)) / num * cumulative[-1]
    return jnp.minimum(jnp.searchsorted(cumulative, places), num - 1)


def moved(
    log_density: LogDensity, key: Key[Array, ""], x: Float[Array, "n d"], size: Array, *, num_moves: int
) -> tuple[Float[Array, "n d"], Array]:
    """Particles after Hamiltonian Monte Carlo that leaves the density invariant, and the step size.

    Momenta have the inverse variances of the particles as masses. Each trajectory has a step size of its own, an adapted one
    times ``exp(-e)`` with ``e`` exponential: narrow places need steps that are far shorter than those of most. Where the
    log-density is not finite, a trajectory is refused.
    """
    unit = jnp.std(x, axis=0) + 1e-12
    value_and_grad = jax.value_and_grad(lambda x: (lambda values: (jnp.sum(values), values))(log_density(x)), has_aux=True)

    def gradient(x):
        (_, values), slope = value_and_grad(x)
        return values, jnp.nan_to_num(slope * unit[None], nan=0.0, posinf=0.0, neginf=0.0)

    def move(carry, key):
        x, values, slope, size = carry
        key_momentum, key_size, key_accept = jax.random.split(key, 3)
        momentum = jax.random.normal(key_momentum, x.shape)
        step = size * jnp.exp(-jax.random.exponential(key_size, (len(x), 1)))

        def leap(carry, _):
            x, momentum, values, slope = carry
            momentum = momentum + 0.5 * step * slope
            x = x + step * unit[None] * momentum
            values, slope = gradient(x)
            return (x, momentum + 0.5 * step * slope, values, slope), None

        (new, last, new_values, new_slope), _ = lax.scan(leap, (x, momentum, values, slope), length=LEAPFROG_STEPS)
        energies = new_values - values - 0.5 * jnp.sum(jnp.square(last) - jnp.square(momentum), axis=1)
        energies = jnp.where(jnp.isfinite(energies), energies, -jnp.inf)
        is_accepted = jnp.log(jax.random.uniform(key_accept, energies.shape)) < energies
        acceptance = jnp.mean(jnp.minimum(jnp.exp(energies), 1))
        size = jnp.clip(size * jnp.exp(_ADAPTATION * (acceptance - TARGET_ACCEPTANCE)), 1e-4, 2.0)
        x, slope = (jnp.where(is_accepted[:, None], new, old) for new, old in ((new, x), (new_slope, slope)))
        return (x, jnp.where(is_accepted, new_values, values), slope, size), None

    values, slope = gradient(x)
    (x, _, _, size), _ = lax.scan(move, (x, values, slope, size), jax.random.split(key, num_moves))
    return x, size
