"""Densities of the plane beside their data, with negative log-likelihoods and the entropies of the data."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from iresnet_jax.bijections.transforms.logit import Identity
from iresnet_jax.data.toys import TOYS, Toy
from iresnet_jax.evaluation.points import log_density_on_grid
from iresnet_jax.figures import style
from iresnet_jax.figures.drawing import Drawing, Row
from iresnet_jax.figures.training import trained
from iresnet_jax.models.architecture import StageSpec
from iresnet_jax.models.density import Density
from iresnet_jax.runs.trained_run import Run

COLUMNS = 4  # pairs of pictures a row
POOL = 50_000  # training points
STAGE = StageSpec(8, (32, 32), activation="clipswish")
LEARNING_RATE = 5e-3
NUM_STEPS, BATCH_SIZE = 2000, 256
NUM_TEST = 10_000
SIDE = 128  # points of the grid along each axis
LEVELS = 32  # shades of grey: few make the file small
SHOWN = 0.995  # quantile of the density at which its colours end: narrow ridges would leave the rest black


def figure(run: Run | None) -> Drawing:
    """The figure of a run of a toy, or of fresh densities of all toys.

    Raises:
        ValueError: If the run is of another model or has other data.
    """
    if run is None:
        return drawing_of(fit())
    toy = run.data.generator
    if not isinstance(run.model, Density) or not isinstance(toy, Toy):
        raise ValueError(f"{run.folder} holds no density of a 2-D toy: this figure is for {', '.join(TOYS)}")
    return drawing_of([(toy, run.model)])


def fit() -> list[tuple[Toy, Density]]:
    """Fits a density to each toy by Adam; all of them share one compiled program."""
    key_points, key_weights, key_places = jax.random.split(jax.random.key(0), 3)
    places, fitted = jax.random.randint(key_places, (NUM_STEPS, BATCH_SIZE), 0, POOL), []
    for toy in TOYS.values():
        points = toy.sample(key_points, POOL)
        start = Density.init(key_weights, np.asarray(points[:1024]), stages=[STAGE], transform=Identity())
        fitted.append((toy, trained(start, _loss, [points], places, learning_rate=LEARNING_RATE)))
    return fitted


def _loss(model: Density, points: Float[Array, "b 2"]) -> Array:
    return -model.log_prob(points).mean()


def drawing_of(fitted: Sequence[tuple[Toy, Density]], *, num_test: int = NUM_TEST, side: int = SIDE) -> Drawing:
    """Measures and draws densities, each with the toy that it was fitted to.

    Args:
        fitted: Toys and densities.
        num_test: Points for the likelihood and the picture of the data.
        side: Points of the density's grid along each axis.
    """
    rows, pictures = [], []
    for toy, model in fitted:
        points = np.asarray(toy.sample(jax.random.key(1), num_test))
        log_density, extent = log_density_on_grid(model, points, side)
        rows.append(_row(toy, model, points, log_density, extent))
        pictures.append((points, np.exp(log_density), extent))
    return Drawing(draw(rows, pictures), rows)


def _row(toy, model, points, log_density, extent) -> dict[str, Any]:
    """Numbers of one toy.

    ``divergence_nats`` is the mean of ``log p_toy - log p_model`` over the test points: an estimate of the gap between
    likelihood and entropy with less noise than their difference. ``mass`` is the integral of the density over the picture.
    """
    log_prob = np.asarray(jax.jit(Density.log_prob)(model, points), np.float64)
    excess = np.asarray(toy.log_prob(jnp.asarray(points)), np.float64) - log_prob
    cell = (extent[1] - extent[0]) * (extent[3] - extent[2]) / log_density.size
    return {
        "toy": toy.name,
        "nll_nats": -float(log_prob.mean()),
        "stderr_nats": float(log_prob.std(ddof=1) / np.sqrt(len(points))),
        "entropy_nats": toy.entropy,
        "divergence_nats": float(excess.mean()),
        "divergence_stderr_nats": float(excess.std(ddof=1) / np.sqrt(len(points))),
        "mass": float(np.exp(log_density.astype(np.float64)).sum() * cell),
        "lipschitz_bound": max(float(np.max(block.branch.lipschitz_bound)) for block in model.weights.values()),
    }


def draw(rows: Sequence[Row], pictures: Sequence[tuple[np.ndarray, np.ndarray, tuple[float, float, float, float]]]) -> Any:
    """Histograms of the data above the densities, in grey values that are darker where there is more."""
    from matplotlib import colormaps

    greys = colormaps["Greys"].resampled(LEVELS)
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
            axes.imshow(values, origin="lower", extent=extent, cmap=greys, vmin=0.0, vmax=_top(values), interpolation="none")
        above.set_title(row["toy"], size=8, color=style.INK)
        below.set_title(
            f"{row['nll_nats']:.3f} ± {row['stderr_nats']:.3f} nats, entropy {row['entropy_nats']:.3f}", size=7, color=style.INK
        )
    return figure


def _top(values: np.ndarray) -> float:
    return float(np.quantile(values, SHOWN)) or float(values.max()) or 1.0
