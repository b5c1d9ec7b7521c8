"""Singular values of every layer before and after training, with the certified bound of the largest.

A convolution has those of its matrix at the real size of the image, borders included. A layer whose matrix is too large for a
singular value decomposition has the largest alone, by power iteration, which approaches it from below.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from iresnet_jax.branches.feedforward import FeedforwardSpec
from iresnet_jax.branches.layers import LayerSpec
from iresnet_jax.figures import style
from iresnet_jax.figures.drawing import Drawing, Row
from iresnet_jax.models.architecture import FlowSpec
from iresnet_jax.models.contractions import FlowWeights
from iresnet_jax.runs import objective_from_config
from iresnet_jax.runs.trained_run import Run
from iresnet_jax.training.constraint import certified_weights

MOST_DIMS = 2048  # of the smaller side of a layer's matrix: its decomposition then takes seconds
MOST_ENTRIES = 4e7  # of a layer's matrix
RANKS = 17  # of a layer that are written, evenly spaced from the largest to the smallest

_NAMES = {"before": "before training", "after": "after training"}


def figure(run: Run) -> Drawing:
    """The figure of a run; "before" has the weights that its settings and its seed give in this version of the library.

    Raises:
        ValueError: If no branch of the model has layers, or it is a network with BatchNorm in its branches.
    """
    spec = run.model.spec
    run.model.require_bijection()
    if not run.fingerprint:
        raise ValueError("this model has no record of its training, which says what it was before: give the folder of a run")
    initial = objective_from_config.initial_variables(run.config, spec, run.data)
    weights = {"before": certified_weights(spec, initial["params"]), "after": run.model.weights}
    rows = measure(spec.flow, weights, constrained=spec.constrained)
    return Drawing(draw(rows), rows)


def measure(flow: FlowSpec, weights: Mapping[str, FlowWeights], *, constrained: bool = True) -> list[dict[str, Any]]:
    """Rows of the figure: singular values by layer and rank; ``rank`` 1 is the largest.

    ``bound`` is the certified bound of the layer's norm, ``coeff`` the largest norm that the constraint allows or NaN.

    Args:
        flow: Architecture of the flow.
        weights: Weights "before" and "after" training.
        constrained: Whether training limits the norms.
    """
    coeff = flow.coeff if constrained and flow.budget == "layer" else math.nan
    rows = [row for when, own in weights.items() for row in _rows(flow, own, when, coeff)]
    if not rows:
        raise ValueError("no branch of the model has layers: this figure is about their singular values")
    return rows


def _rows(flow: FlowSpec, weights: FlowWeights, when: str, coeff: float) -> Iterator[dict[str, Any]]:
    for stage in flow.layout:
        branch = weights[stage.name].branch
        layers = stage.branch.layers if isinstance(stage.branch, FeedforwardSpec) else ()
        for k in range(stage.spec.num_blocks):
            for layer in layers:
                values = singular_values(layer, branch.weights[layer.name]["kernel"][k])
                ranks = np.unique(np.linspace(1, len(values), min(RANKS, len(values))).round().astype(int))
                for rank in ranks.tolist():
                    yield {
                        "when": when,
                        "layer": f"{stage.name}/block{k:02d}/{layer.name}",
                        "rank": rank,
                        "num_values": len(values),
                        "singular_value": float(values[rank - 1]),
                        "bound": float((branch.norms or {}).get(layer.name, np.full(k + 1, np.nan))[k]),
                        "coeff": coeff,
                    }


def singular_values(layer: LayerSpec, kernel: Array) -> Float[np.ndarray, " r"]:
    """Singular values of a layer's matrix from the largest down, or the largest alone if the matrix is too large."""
    num_in = math.prod(layer.in_shape)
    num_out = num_in // layer.in_shape[-1] * kernel.shape[-1]
    apply = layer.linear_map()
    if kernel.shape[:2] == (1, 1) and kernel.ndim == 4:
        values = np.linalg.svd(np.asarray(kernel[0, 0], np.float64), compute_uv=False)
        return np.repeat(values, num_in // layer.in_shape[-1])
    if min(num_in, num_out) > MOST_DIMS or num_in * num_out > MOST_ENTRIES:
        start = jax.random.normal(jax.random.key(0), layer.in_shape)
        pair = layer.singular_vectors(kernel, start / jnp.linalg.norm(start))
        return np.asarray([layer.norm_along(kernel, pair)], np.float64)
    units = jnp.eye(num_in, dtype=kernel.dtype).reshape(num_in, *layer.in_shape)
    matrix = np.asarray(jax.jit(apply)(kernel, units), np.float64).reshape(num_in, num_out)
    return np.linalg.svd(matrix, compute_uv=False)


def draw(rows: Sequence[Row]) -> Any:
    """Largest singular value of every layer with its bound on the left, the spectra of all layers on the right."""
    figure = style.figure(width=style.PAGE_WIDTH, height=3.6)
    left, right = figure.subplots(1, 2)
    for which, (when, name) in enumerate(_NAMES.items()):
        layers = _by_layer(rows, when)
        largest = [own[0]["singular_value"] for own in layers.values()]
        style.curve(left, which, range(1, 1 + len(layers)), largest, name, linestyle="none")
        for number, own in enumerate(layers.values()):
            if len(own) > 1:
                share = [(row["rank"] - 1) / (row["num_values"] - 1) for row in own]
                options = {"marker": None, "linewidth": 0.7, "alpha": 0.7}
                style.curve(right, which, share, [row["singular_value"] for row in own], "" if number else name, **options)
    after = list(_by_layer(rows, "after").values())
    bounds = [own[0]["bound"] for own in after]
    left.plot(range(1, 1 + len(after)), bounds, color=style.INK, linestyle="none", marker="_", label="certified bound after")
    coeff = after[0][0]["coeff"]
    if math.isfinite(coeff):
        left.axhline(coeff, color=style.INK, linewidth=0.8, linestyle=(0, (5, 3)), label=f"coefficient {coeff:g}")
    style.label(left, "layer, from the data to the latents", "largest singular value")
    style.label(right, "rank, as a share of all", "singular value")
    style.legend(left)
    style.legend(right)
    return figure


def _by_layer(rows: Sequence[Row], when: str) -> Mapping[str, list[Row]]:
    layers: dict[str, list[Row]] = {}
    for row in rows:
        if row["when"] == when:
            layers.setdefault(row["layer"], []).append(row)
    return layers
