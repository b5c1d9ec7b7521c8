"""The likelihood of each point under a density of vectors: the least likely test points, and a map of the plane."""

from dataclasses import dataclass

import jax
import numpy as np
from jaxtyping import Float

from iresnet_jax.maths.logdet.exact import ExactLogdet
from iresnet_jax.models.density import Density

FAR_APART = 3  # ratio of the spreads of two coordinates from which each has its own scale in a map
NUM_UNLIKELY, NUM_ENTRIES = 8, 3  # least likely points, and entries of each, that a report names


@dataclass(frozen=True)
class Entry:
    """An entry of a vector: its number, its value, and its distance from the mean of all vectors in standard deviations."""

    index: int
    value: float
    deviations: float


@dataclass(frozen=True)
class Unlikely:
    """A test point with a low likelihood: its row in the test split, log p in nats, and the entries that are furthest out."""

    row: int
    log_prob: float
    entries: tuple[Entry, ...]


@dataclass(frozen=True)
class Points:
    """Likelihood of each test point.

    Attributes:
        file: Name of the ``.npy`` file in the folder of the run with log p of all test points in the order of their rows.
        least_likely: The least likely of them, from the first.
    """

    file: str
    least_likely: tuple[Unlikely, ...]


def least_likely(points: Float[np.ndarray, "n d"], log_prob: Float[np.ndarray, " n"]) -> tuple[Unlikely, ...]:
    """The least likely points, those without a finite likelihood first, each with its entries that are furthest out.

    Entries are compared by their distances from the mean in standard deviations, both over all points.
    """
    deviations = (points - points.mean(axis=0)) / np.maximum(points.std(axis=0), 1e-12)
    order = np.argsort(np.where(np.isnan(log_prob), -np.inf, log_prob), kind="stable")[:NUM_UNLIKELY]
    found = []
    for row in order.tolist():
        furthest = np.argsort(-np.abs(deviations[row]), kind="stable")[:NUM_ENTRIES].tolist()
        entries = tuple(Entry(i, float(points[row, i]), float(deviations[row, i])) for i in furthest)
        found.append(Unlikely(row, float(log_prob[row]), entries))
    return tuple(found)


def log_density_on_grid(
    model: Density, points: Float[np.ndarray, "n 2"], side: int
) -> tuple[Float[np.ndarray, "m m"], tuple[float, float, float, float]]:
    """Exact log-density of a model of the plane on a grid around points, square unless their spreads differ by far.

    Of a model of values on a grid it is that of the dequantised data.

    Args:
        side: Grid points along each axis.

    Returns:
        Natural log of the density, rows along the second coordinate, and (left, right, bottom, top).
    """
    least, most = np.asarray(points, np.float64).min(axis=0), np.asarray(points, np.float64).max(axis=0)
    center, reach = (least + most) / 2, 1.1 * (most - least) / 2
    reach[reach == 0] = reach.max() or 1.0
    if reach.max() < FAR_APART * reach.min():
        reach[:] = reach.max()
    edges = center + ((np.arange(side)[:, None] + 0.5) / side * 2 - 1) * reach
    grid = np.stack(np.meshgrid(*edges.T), axis=-1).astype(np.float32)
    (left, bottom), (right, top) = (center - reach).tolist(), (center + reach).tolist()
    return np.asarray(_log_density(model.continuous.with_(estimator=ExactLogdet()), grid)), (left, right, bottom, top)


@jax.jit
def _log_density(model, grid):
    return jax.lax.map(model.log_prob, grid)
