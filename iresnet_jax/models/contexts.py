r"""Contexts of conditional densities: as vectors, their scale, and a network between them and what
depends on them.

**Scale.** Observations of simulators have counts over many orders of magnitude, and outliers. An
entry of a `ContextScale` is ``(asinh((c - center) / width) - mean) / scale``: linear near its
centre and logarithmic far from it, on both sides. Its width is the one, among several and linear,
after which the training data look most like a normal distribution.

**Columns** of a table, such as counts, codes and categories, become `ContextScores`.

**Network.** ``h(c) = A c + W_n phi(... phi(W_1 c + b_1)) + b_n`` has no constraint: whatever it
makes of a context, blocks remain contractions of the example. A branch alone depends on contexts by
linear maps, and learns products of entries slowly.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, Num

from iresnet_jax.arguments import check_unmasked
from iresnet_jax.bijections.marginals import Marginals
from iresnet_jax.bijections.standardize import set_floats
from iresnet_jax.maths.platforms import fast_compile
from iresnet_jax.models.columns import Frame
from iresnet_jax.pytrees import pytree

Contexts = Num[Array, "..."] | Num[np.ndarray, "..."] | Frame
Network = Mapping[str, Mapping[str, Array]]


def numbers(context: Any) -> Any:
    """Contexts as an array; integers of NumPy as floats, as JAX would cut them to 32 bits."""
    if isinstance(context, jax.Array):
        return context
    context = np.asarray(context)
    return context if np.issubdtype(context.dtype, np.floating) else context.astype(float)


def as_vectors(context: Any, dim: int) -> Any:
    """Contexts as vectors ``(..., dim)``: one number, or one per example, is a context of length
    1.
    """
    context = numbers(context)
    are_numbers = dim == 1 and context.ndim < 2 and context.shape != (1,)
    return context[..., None] if are_numbers else context


def for_examples(context: Any, num: int) -> Float[np.ndarray, "n k"]:
    """Contexts of so many examples that a new model is made for, as vectors: one vector or number
    for each example.
    """
    check_unmasked(context, "context")
    context = np.asarray(context, float)
    context = context[:, None] if context.ndim == 1 else context
    if context.ndim != 2 or len(context) != num:
        raise ValueError(
            f"context must be a vector for each of {num} examples, got shape {context.shape}"
        )
    return context


@pytree(arrays=("mean", "scale", "center", "width"))
class ContextScale:
    """``(asinh((c - center) / width) - mean) / scale``, entry by entry.

    Attributes:
        mean: Mean of each squeezed entry.
        scale: Standard deviation of each squeezed entry.
        center: Where each entry is steepest.
        width: Distance from there at which it turns from linear to logarithmic.
    """

    mean: Any
    scale: Any
    center: Any
    width: Any

    def __post_init__(self):
        set_floats(self, "mean", "scale", "center", "width")

    @classmethod
    def fit(cls, x: Float[np.ndarray, "n k"]) -> "ContextScale":
        """Centres and widths that make every entry as normal as they can, and the scale behind
        them; constants keep theirs.
        """
        rows = np.asarray(x, np.float64)
        # they may be sorted
        some = np.random.default_rng(0).choice(len(rows), min(10_000, len(rows)), replace=False)
        center, width = np.array([_likeliest(column) for column in rows[np.sort(some)].T]).T
        squeezed = np.arcsinh((rows - center) / width)
        std = squeezed.std(axis=0)
        return cls(squeezed.mean(axis=0), np.where(std > 0, std, 1), center, width)

    @property
    def num_entries(self) -> int:
        """Length of contexts."""
        return len(self.center)

    def forward(self, c: Float[Array, "b k"]) -> Float[Array, "b k"]:
        """The scaled contexts."""
        mean, scale, center, width = (
            values.astype(c.dtype)[None]
            for values in (self.mean, self.scale, self.center, self.width)
        )
        return (jnp.arcsinh((c - center) / width) - mean) / scale


@pytree(arrays=("scores",))
class ContextScores:
    """Contexts that are columns of a table: the normal scores of their mid-ranks, and 0 or 1 for
    each level of a column of several.

    Attributes:
        scores: Map of every column to scores.
        num_levels: Levels of each column; 0 for one that keeps its score.
    """

    scores: Marginals
    num_levels: tuple[int, ...]

    @property
    def num_entries(self) -> int:
        """Length of contexts."""
        return len(self.num_levels)

    @property
    def num_features(self) -> int:
        """Length of what is made of them."""
        return sum(max(num, 1) for num in self.num_levels)

    def forward(self, c: Float[Array, "b k"]) -> Float[Array, "b f"]:
        """Scores in the middle of values' masses, and indicators of levels."""
        z, parts = self.scores.forward(c), []
        for i, num in enumerate(self.num_levels):
            known = self.scores.values[i, :num].astype(c.dtype)
            parts.append((c[:, i, None] == known[None]).astype(z.dtype) if num else z[:, i, None])
        return jnp.concatenate(parts, axis=1)


def _likeliest(column: Float[np.ndarray, " n"]) -> tuple[float, float]:
    """Centre and width of an entry: linear, unless others have a clearly straighter
    quantile-quantile plot (Filliben 1975).

    Entries of one sign are also tried with zero as their centre.
    """
    from scipy.special import ndtri

    median = float(np.median(column))
    quantiles = ndtri((np.arange(len(column)) + 0.5) / len(column))
    ordered = np.sort(column)

    def straightness(center, width):
        values = np.arcsinh((ordered - center) / width)
        return float(np.corrcoef(values, quantiles)[0, 1]) if values.std() > 0 else -1.0

    distances = np.abs(column - median)
    if not distances.any():
        return median, 1.0
    mean = float(distances.mean())
    linear, deviation = (median, 1e4 * mean), float(np.median(distances)) or mean
    centers = [0.0, median] if ordered[0] >= 0 or ordered[-1] <= 0 else [median]
    pairs = [
        (center, width * deviation) for center in centers for width in (1.0, 0.1, 0.01, 1e-3, 1e-4)
    ]
    # narrower ones around zero are logarithms already
    smallest = float(np.quantile(np.abs(column), 0.01)) / 10
    curved = [(center, width) for center, width in pairs if center != 0 or width >= smallest]
    best = max(curved, key=lambda pair: straightness(*pair), default=linear)
    return best if straightness(*best) > straightness(*linear) + 2e-3 else linear


@fast_compile
def scaled(scale: Any, context: Any) -> Array:
    """Contexts by their scale, as one program."""
    return scale.forward(context)


@functools.partial(fast_compile, static_argnums=(1, 2))
def initial_network(
    key: Key[Array, ""], num_observed: int, hidden: tuple[int, ...]
) -> dict[str, dict[str, Array]]:
    """Random weights of variance ``1 / fan_in`` and zero biases, of a network with these widths,
    the last of its output.

    No widths are no network.
    """
    if not hidden:
        return {}
    keys = iter(jax.random.split(key, len(hidden) + 1))
    weights = {}
    for i, (cin, cout) in enumerate(zip((num_observed, *hidden), hidden, strict=False)):
        kernel = jax.random.normal(next(keys), (cin, cout)) / math.sqrt(cin)
        weights[f"dense{i}"] = {"kernel": kernel, "bias": jnp.zeros(cout)}
    skip = jax.random.normal(next(keys), (num_observed, hidden[-1])) / math.sqrt(num_observed)
    return {**weights, "skip": {"kernel": skip}}


def apply_network(weights: Network, c: Float[Array, "b k"]) -> Float[Array, "b f"]:
    """``h(c)``, with the layers of `initial_network`."""
    h, num_layers = c, len(weights) - 1
    for i in range(num_layers):
        layer = weights[f"dense{i}"]
        h = (jax.nn.gelu(h) if i else h) @ layer["kernel"] + layer["bias"][None]
    return h + c @ weights["skip"]["kernel"]


def linear_regression(
    c: Float[np.ndarray, "n k"], y: Float[np.ndarray, "n d"]
) -> Float[np.ndarray, "k d"]:
    """Coefficients of the regression of centred data on scaled contexts, with the ridge of the
    best leave-one-out error.
    """
    from sklearn.linear_model import RidgeCV

    found = RidgeCV(np.geomspace(1e-3, 1e4, 15)).fit(c, y)
    return np.asarray(found.coef_).reshape(y.shape[1], -1).T


def with_linear_mean(network: Network, coefficients: Float[np.ndarray, "k d"]) -> Network:
    """Weights of a network whose first outputs are the conditional means of such a regression,
    before it is trained.
    """
    last = f"dense{len(network) - 2}"
    skip = np.array(network["skip"]["kernel"])
    skip[:, : coefficients.shape[1]] = coefficients[:, : skip.shape[1]]
    silent = {**network[last], "kernel": jnp.zeros_like(network[last]["kernel"])}
    return {**network, last: silent, "skip": {"kernel": jnp.asarray(skip)}}
