"""Paths of points through an ordinary and an invertible residual network that fit the same map (Behrmann et al. 2019, Fig. 1).

Both take [-2, 2] to ``x^3`` at half of their depth and back to ``x`` at its end. Paths of the ordinary network may cross; those
of the invertible one keep their order, because a block ``x + g(x)`` shrinks no distance by more than ``1 - Lip(g)``.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from iresnet_jax.branches.branch import Branch
from iresnet_jax.branches.feedforward import FeedforwardSpec
from iresnet_jax.figures import style
from iresnet_jax.figures.drawing import Drawing

COEFF = 0.97  # largest norm of a layer
NUM_DATA, NOISE = 48, 0.5  # examples, evenly spaced, and the standard deviation of the noise of what they are taken to
NUM_SHOWN = 41  # paths drawn, evenly spaced on [-2, 2]


class Paths(NamedTuple):
    """Where points are after each block.

    Attributes:
        positions: Positions of neighbouring points, which begin in increasing order; the first row is where they begin.
        lipschitz_bounds: Certified bound of ``Lip(g)`` of each block; infinite for the ordinary network.
    """

    positions: Float[np.ndarray, "k n"]
    lipschitz_bounds: Float[np.ndarray, " k"]

    @property
    def num_crossings(self) -> int:
        """Pairs of neighbours that have changed their order after a block, counted after each block."""
        return int((np.diff(self.positions[1:]) <= 0).sum())

    @property
    def worst_error(self) -> float:
        """Largest distance from ``x^3`` at half of the depth, and from ``x`` at its end."""
        start, middle, end = self.positions[0], self.positions[len(self.positions) // 2], self.positions[-1]
        return float(max(np.abs(middle - start**3).max(), np.abs(end - start).max()))


def measure(
    *, num_blocks: int = 20, width: int = 16, num_steps: int = 4000, num_points: int = 401, seed: int = 0
) -> dict[str, Paths]:
    """Fits both networks from the same initial weights, and follows points through them.

    Args:
        num_blocks: Residual blocks; even.
        width: Units of the two hidden layers of a branch.
        num_steps: Updates by Adam.
        num_points: Points that are followed, evenly spaced on [-2, 2].
        seed: Of the weights and the batches.
    """
    spec = FeedforwardSpec((1,), (width, width), activation="elu")
    return {
        name: _fitted(spec, constrained, num_blocks, num_steps, num_points, seed)
        for name, constrained in (("ordinary", False), ("invertible", True))
    }


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _train_and_follow(spec, constrained, num_blocks, num_steps, num_points, key):
    key_weights, key_iterates, key_noise = jax.random.split(key, 3)
    params = jax.vmap(functools.partial(spec.initial_weights, last_scale=0.3))(jax.random.split(key_weights, num_blocks))
    iterates = jax.vmap(spec.initial_iterates)(jax.random.split(key_iterates, num_blocks))
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(optax.cosine_decay_schedule(5e-3, num_steps)))

    def branches(params, iterates):
        if not constrained:
            return Branch(spec, params, jnp.full(num_blocks, jnp.inf), "none"), iterates
        vectors = jax.vmap(functools.partial(spec.singular_vectors, num_steps=2))(jax.lax.stop_gradient(params), iterates)
        found = jax.vmap(functools.partial(spec.constrained, coeff=COEFF, budget="layer"))(params, vectors)
        return found.branch, found.iterates

    def loss(params, iterates):
        branch, iterates = branches(params, iterates)
        positions = follow(branch, x)
        middle, end = positions[num_blocks // 2], positions[-1]
        return jnp.mean((middle - at_half) ** 2) + jnp.mean((end - at_end) ** 2), iterates

    x = jnp.linspace(-2.0, 2.0, NUM_DATA)[:, None]
    noise = NOISE * jax.random.normal(key_noise, (2, NUM_DATA, 1))
    at_half, at_end = x**3 + noise[0], x + noise[1]

    def step(state, _):
        params, iterates, own = state
        gradient, iterates = jax.grad(loss, has_aux=True)(params, iterates)
        updates, own = optimizer.update(gradient, own, params)
        return (optax.apply_updates(params, updates), iterates, own), None

    (params, iterates, _), _ = jax.lax.scan(step, (params, iterates, optimizer.init(params)), length=num_steps)
    branch = Branch(spec, params, jnp.full(num_blocks, jnp.inf), "none")
    if constrained:
        bounds = jax.vmap(spec.norm_bounds)(params)
        branch = jax.vmap(functools.partial(spec.certified, coeff=COEFF, budget="layer"))(params, bounds).branch
    start = jnp.linspace(-2.0, 2.0, num_points)[:, None]
    return follow(branch, start)[..., 0], branch.lipschitz_bound


def follow(branch: Branch, x: Float[Array, "n 1"]) -> Float[Array, "k n 1"]:
    """Positions of points at the start and after each block ``x + g(x)``; the branches are stacked over blocks."""

    def step(x, branch):
        x = x + branch(x)
        return x, x

    return jnp.concatenate([x[None], jax.lax.scan(step, x, branch)[1]])


def _fitted(spec, constrained, num_blocks, num_steps, num_points, seed) -> Paths:
    found = _train_and_follow(spec, constrained, num_blocks, num_steps, num_points, jax.random.key(seed))
    return Paths(*(np.asarray(array, np.float64) for array in found))
