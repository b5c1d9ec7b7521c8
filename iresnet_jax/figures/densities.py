"""Densities of the plane beside their data, with negative log-likelihoods and the entropies of the data."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from iresnet_jax.bijections.transforms.logit import Identity
from iresnet_jax.data.toys import TOYS, Toy
from iresnet_jax.evaluation.points import log_density_on_grid
from iresnet_jax.figures import style
from iresnet_jax.figures.drawing import Drawing, Row
from iresnet_jax.models.architecture import StageSpec
from iresnet_jax.models.density import Density
from iresnet_jax.training.unconstrained import Unconstrained

COLUMNS = 4  # pairs of pictures a row
POOL = 50_000  # training points
LEARNING_RATE = 5e-3
NUM_TEST = 10_000
SIDE = 128  # points of the grid along each axis
SHOWN = 0.995  # quantile of the density at which its colours end: narrow ridges would leave the rest black


class Fitted(NamedTuple):
    """A density of the plane, and what it was fitted to."""

    toy: Toy
    model: Density


def fit(
    names: Sequence[str] = tuple(TOYS),
    *,
    num_blocks: int = 8,
    hidden: tuple[int, ...] = (32, 32),
    num_steps: int = 2000,
    batch_size: int = 256,
    seed: int = 0,
) -> list[Fitted]:
    """Fits a density to each toy by Adam; all of them share one compiled program.

    Args:
        names: Names of toys, see `iresnet_jax.data.toys`.
        num_blocks: Residual blocks.
        hidden: Widths of the hidden layers of a branch.
        num_steps: Updates.
        batch_size: Points of an update.
        seed: Of weights and points.
    """
    stages, fitted = (StageSpec(num_blocks, hidden, activation="clipswish"),), []
    for name in names:
        key_points, key_weights, key_batches = jax.random.split(jax.random.key(seed), 3)
        points = TOYS[name].sample(key_points, POOL)
        start = Density.init(key_weights, np.asarray(points[:1024]), stages=stages, transform=Identity())
        batches = jax.random.randint(key_batches, (num_steps, batch_size), 0, POOL)
        fitted.append(Fitted(TOYS[name], _trained(Unconstrained.of(start), points, batches).certified()))
    return fitted


@jax.jit
def _trained(free: Unconstrained[Density], points: Float[Array, "n 2"], batches: Array) -> Unconstrained[Density]:
    schedule = optax.cosine_decay_schedule(LEARNING_RATE, len(batches))
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))

    def step(state, places):
        params, iterates, own = state

        def loss(params):
            model, new = free.with_(iterates=iterates).constrain(params)
            return -model.log_prob(points[places]).mean(), new

        gradient, iterates = jax.grad(loss, has_aux=True)(params)
        updates, own = optimizer.update(gradient, own, params)
        return (optax.apply_updates(params, updates), iterates, own), None

    (params, iterates, _), _ = jax.lax.scan(step, (free.params, free.iterates, optimizer.init(free.params)), batches)
    return free.with_(params=params, iterates=iterates)


def figure(fitted: Sequence[Fitted], *, num_test: int = NUM_TEST, side: int = SIDE, seed: int = 1) -> Drawing:
    """Measures and draws.

    Args:
        fitted: Densities, such as `fit` gives, and the toys that they were fitted to.
        num_test: Points for the likelihood and the picture of the data.
        side: Points of the density's grid along each axis.
        seed: Of these points.
    """
    rows, pictures = [], []
    for toy, model in fitted:
        points = np.asarray(toy.sample(jax.random.fold_in(jax.random.key(seed), 1), num_test))
        log_density, extent = log_density_on_grid(model, points, side)
        rows.append(_row(toy, model, points, log_density, extent))
        pictures.append((points, np.exp(log_density), extent))
    return Drawing(draw(rows, pictures), rows)


def _row(toy, model, points, log_density, extent) -> dict[str, Any]:
    """Numbers of one toy; ``mass`` is the integral of the density over the picture, which is 1 if nothing is outside of it."""
    log_prob = np.asarray(_log_prob(model, points), np.float64)
    cell = (extent[1] - extent[0]) * (extent[3] - extent[2]) / log_density.size
    return {
        "toy": toy.name,
        "nll_nats": -float(log_prob.mean()),
        "stderr_nats": float(log_prob.std(ddof=1) / np.sqrt(len(points))),
        "entropy_nats": toy.entropy,
        "mass": float(np.exp(log_density.astype(np.float64)).sum() * cell),
        "lipschitz_bound": max(float(np.max(block.branch.lipschitz_bound)) for block in model.weights.values()),
    }


_log_prob = jax.jit(lambda model, points: model.log_prob(jnp.asarray(points)))


def draw(rows: Sequence[Row], pictures: Sequence[tuple[np.ndarray, np.ndarray, tuple[float, float, float, float]]]) -> Any:
    """Histograms of the data above the densities, in grey values that are darker where there is more."""
    columns = min(COLUMNS, len(rows))
    lines = -(-len(rows) // columns)
    size = style.PAGE_WIDTH / COLUMNS
    figure = style.figure(width=size * columns, height=(2 * size + 0.35) * lines)
    grid = figure.subplots(2 * lines, columns, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for i, (row, (points, density, extent)) in enumerate(zip(rows, pictures, strict=True)):
        above, below = grid[2 * (i // columns), i % columns], grid[2 * (i // columns) + 1, i % columns]
        counts, *_ = np.histogram2d(points[:, 1], points[:, 0], bins=len(density) // 2, range=[extent[2:], extent[:2]])
        for axes, values in ((above, counts), (below, density)):
            axes.imshow(values, origin="lower", extent=extent, cmap="Greys", vmin=0.0, vmax=_top(values))
        above.set_title(row["toy"], size=8, color=style.INK)
        below.set_title(f"{row['nll_nats']:.3f} nats, entropy {row['entropy_nats']:.3f}", size=7, color=style.INK)
    return figure


def _top(values: np.ndarray) -> float:
    return float(np.quantile(values, SHOWN)) or float(values.max()) or 1.0


def of_run(run: Any) -> list[Fitted]:
    """The density of a run that was trained on a toy.

    Raises:
        ValueError: If it is another model or has other data.
    """
    toy = run.data.generator
    if not isinstance(run.model, Density) or not isinstance(toy, Toy):
        raise ValueError(f"{run.folder} holds no density of a 2-D toy: this figure is for {', '.join(TOYS)}")
    return [Fitted(toy, run.model)]
