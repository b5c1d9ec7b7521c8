"""Paths of points through an ordinary and an invertible residual network that fit the same map (Behrmann et al. 2019, Fig. 1).

Both are fitted to noisy examples of ``x -> x^3`` at half of their depth and of ``x -> x`` at its end. Paths of the ordinary
network cross where it follows the noise. Those of the invertible one keep their order whatever it is fitted to, because a block
``x + g(x)`` shrinks no distance by more than the factor ``1 - Lip(g)``.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from iresnet_jax.branches.branch import Branch
from iresnet_jax.branches.feedforward import FeedforwardSpec
from iresnet_jax.figures import style
from iresnet_jax.figures.drawing import Drawing, Row
from iresnet_jax.figures.training import minimise
from iresnet_jax.runs.trained_run import Run

COEFF = 0.97  # largest norm of a layer
NUM_DATA, NOISE = 48, 0.5  # examples, evenly spaced on [-2, 2], and the standard deviation of the noise of what they map to
LEARNING_RATE = 5e-3
NUM_PATHS = 121  # points that are followed, evenly spaced on [-2, 2]
DRAWN_EVERY = 4  # of these, the paths that are drawn

NETWORKS = {"ordinary": False, "invertible": True}  # whether blocks are contractions


def figure(run: Run | None) -> Drawing:
    """The figure, which trains its own networks and takes no run."""
    if run is not None:
        raise ValueError("the figure trajectories trains its own networks: leave --workdir out")
    rows = measure()
    return Drawing(draw(rows), rows)


def measure(*, num_blocks: int = 20, width: int = 16, num_steps: int = 4000) -> list[dict[str, Any]]:
    """Fits both networks from the same initial weights; rows for each point after each number of blocks.

    ``gap`` is the distance to the next point above, negative if the two have changed their order. ``least_gap`` is what the
    certified bound ``L`` of the block leaves of the gap before it, ``(1 - L) gap``; it is minus infinity without a bound.

    Args:
        num_blocks: Residual blocks; even.
        width: Units of each of the two hidden layers of a branch.
        num_steps: Updates by Adam.
    """
    spec = FeedforwardSpec((1,), (width, width), activation="elu")
    rows = []
    for name, constrained in NETWORKS.items():
        found = _fitted_paths(spec, num_blocks, num_steps, jax.random.key(0), constrained=constrained)
        positions, bounds = (np.asarray(array, np.float64) for array in found)
        gaps = np.diff(positions, axis=1)
        for depth, after in enumerate(positions):
            for i, position in enumerate(after[:-1]):
                least = (1 - bounds[depth - 1]) * gaps[depth - 1, i] if depth and constrained else -np.inf
                rows.append(
                    {
                        "network": name,
                        "blocks": depth,
                        "start": float(positions[0, i]),
                        "position": float(position),
                        "gap": float(gaps[depth, i]),
                        "least_gap": float(least),
                    }
                )
    return rows


@functools.partial(jax.jit, static_argnames=("spec", "num_blocks", "num_steps", "constrained"))
def _fitted_paths(
    spec: FeedforwardSpec, num_blocks: int, num_steps: int, key: Array, *, constrained: bool
) -> tuple[Float[Array, "k n"], Float[Array, " m"]]:
    """Positions of all points at the start and after each block of a fitted network, and the bounds of its blocks."""
    key_weights, key_iterates, key_noise = jax.random.split(key, 3)
    params = jax.vmap(functools.partial(spec.initial_weights, last_scale=0.3))(jax.random.split(key_weights, num_blocks))
    iterates = jax.vmap(spec.initial_iterates)(jax.random.split(key_iterates, num_blocks))
    x = jnp.linspace(-2.0, 2.0, NUM_DATA)[:, None]
    at_half, at_end = jnp.stack([x**3, x]) + NOISE * jax.random.normal(key_noise, (2, NUM_DATA, 1))

    def branches(params, iterates):
        if not constrained:
            return Branch(spec, params, jnp.full(num_blocks, jnp.inf), "none"), iterates
        vectors = jax.vmap(functools.partial(spec.singular_vectors, num_steps=2))(jax.lax.stop_gradient(params), iterates)
        found = jax.vmap(functools.partial(spec.constrained, coeff=COEFF, budget="layer"))(params, vectors)
        return found.branch, found.iterates

    def loss(params, iterates, _):
        branch, iterates = branches(params, iterates)
        positions = _follow(branch, x)
        errors = jnp.stack([positions[num_blocks // 2] - at_half, positions[-1] - at_end])
        return 2 * jnp.mean(errors**2), iterates

    params, iterates = minimise(loss, params, iterates, jnp.arange(num_steps), LEARNING_RATE)
    branch, _ = branches(params, iterates)
    if constrained:  # by guaranteed bounds, where training had estimates
        certify = functools.partial(spec.certified, coeff=COEFF, budget="layer")
        branch = jax.vmap(certify)(params, jax.vmap(spec.norm_bounds)(params)).branch
    return _follow(branch, jnp.linspace(-2.0, 2.0, NUM_PATHS)[:, None])[..., 0], branch.lipschitz_bound


def _follow(branch: Branch, x: Float[Array, "n 1"]) -> Float[Array, "k n 1"]:
    """Positions of points at the start and after each block ``x + g(x)``; the branches are stacked over blocks."""

    def step(x, branch):
        x = x + branch(x)
        return x, x

    return jnp.concatenate([x[None], jax.lax.scan(step, x, branch)[1]])


def _crossings(rows: Sequence[Row], network: str) -> Bool[np.ndarray, "k n"]:
    gaps = np.sign(_by_depth(rows, network, "gap"))
    return gaps[1:] != gaps[:-1]


def draw(rows: Sequence[Row]) -> Any:
    """Paths of both networks from the left to the right, with what they are fitted to and a cross for each crossing."""
    figure = style.figure(width=style.PAGE_WIDTH, height=3.8)
    for axes, network in zip(figure.subplots(1, 2, sharey=True), NETWORKS, strict=True):
        positions = _by_depth(rows, network, "position")
        start, depth = positions[0], np.arange(len(positions))
        drawn = start[::DRAWN_EVERY]
        axes.plot(depth, positions[:, ::DRAWN_EVERY], color=style.CURVES[0]["color"], linewidth=0.7)
        for at, image in ((depth[-1] / 2, drawn**3), (depth[-1], drawn)):
            axes.plot(np.full(len(drawn), at), image, color=style.INK, linestyle="none", marker="_", markersize=5)
        before, where = np.nonzero(_crossings(rows, network))
        middle = positions[before, where] + positions[before + 1, where]
        axes.plot(before + 0.5, middle / 2, color=style.CURVES[1]["color"], linestyle="none", marker="x", markersize=4)
        style.label(axes, "blocks", "position" if network == "ordinary" else "", title=f"{network}: {len(before)} crossings")
        axes.set_xticks(range(0, len(depth), max(len(depth) // 4, 1)))
    return figure


def _by_depth(rows: Sequence[Row], network: str, name: str) -> Float[np.ndarray, "k n"]:
    own = [row for row in rows if row["network"] == network]
    depths = 1 + max(row["blocks"] for row in own)
    return np.array([row[name] for row in own]).reshape(depths, -1)
