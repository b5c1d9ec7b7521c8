"""Figures of a report: numbers in, a matplotlib ``Figure`` out.

Figures are made without pyplot and ``rcParams``, so they need no display and share no state.
"""

import base64
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Int, Num

from iresnet_jax.evaluation.calibration import Calibration
from iresnet_jax.models.columns import Frame, columns_of, numbers_of
from iresnet_jax.storage import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GREY = "#727b87"
# These colours are distinct to readers with the common colour deficiencies.
BLUE, ORANGE = "#3f83d1", "#de7c22"
OBJECTIVES = {
    "bits_per_dim": "bits/dim",
    "nll": "NLL [nats]",
    "accuracy": "accuracy",
    "loss": "loss",
}
COLUMNS = 8  # images in a row
MAX_PAIRS, MAX_RANKS = 5, 12  # entries of a vector whose pairs and whose ranks are drawn
MAX_GAINS = 20  # columns whose gains are drawn


def data_uri(figure: "Figure") -> str:
    """A figure as a data URI, for a page that needs no other file."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=120)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def write_png(figure: "Figure", path: Path) -> Path:
    """Writes a figure to a PNG file."""
    with replacing(path) as incoming:
        figure.savefig(incoming, format="png", dpi=150)
    return path


# --- training -------------------------------------------------------------------------------------


def learning_curves(records: Sequence[Mapping[str, Any]], evaluated_step: int) -> "Figure":
    """Every logged quantity against the step, the objective first: training as a line, validation
    with markers.

    Args:
        records: Lines of the metrics log, in any order: ``step``, ``split``, and numbers that may
            be missing.
        evaluated_step: Step of the evaluated checkpoint, a vertical line.
    """
    logged = {name for record in records for name in record} - {"step", "split", "wall_time_s"}
    names = sorted(logged, key=lambda name: (name not in OBJECTIVES, name))
    styles = {"train": (BLUE, ""), "validation": (ORANGE, "o")}
    figure, grid = panels(len(names), columns=4, height=1.9)
    for axes, name in zip(grid, names, strict=True):
        for split, (color, marker) in styles.items():
            found = [(r["step"], r[name]) for r in records if r["split"] == split and name in r]
            if found:
                steps, values = zip(*sorted(found), strict=True)
                axes.plot(steps, values, color=color, marker=marker, markersize=3, label=split)
        axes.axvline(evaluated_step, color=GREY, linewidth=0.8)
        axes.ticklabel_format(axis="y", useOffset=False)
        axes.set(xlabel="step", title=OBJECTIVES.get(name, name.replace("_", " ")))
    grid[0].legend(frameon=False, fontsize=8)
    return figure


# --- vectors --------------------------------------------------------------------------------------


def density_map(
    log_density: Float[np.ndarray, "n n"], extent: tuple[float, float, float, float]
) -> "Figure":
    """A density on the plane, in colours that end at its 99.5 % quantile: narrow ridges would leave
    the rest black.

    Args:
        log_density: Natural log of the density on a grid; rows run along the second coordinate,
            upwards.
        extent: (left, right, bottom, top) of the grid.
    """
    figure, [axes] = panels(1, 1, 4.6, width=5.4)
    density = np.nan_to_num(np.exp(log_density))
    colours = {"vmin": 0.0, "vmax": np.quantile(density, 0.995)}
    shown = axes.imshow(density, origin="lower", extent=extent, aspect="auto", **colours)
    figure.colorbar(shown, ax=axes, label="density", extend="max")
    return figure


def pairs(points: Mapping[str, Any]) -> "Figure":
    """Marginals of the first entries of vectors on the diagonal, pairs of entries below it, on the
    range of the first set.

    Args:
        points: One or two sets of vectors by name, such as test data and samples, or of rows of
            data frames with the same columns.

    Example:
        >>> pairs({"rows": frame, "samples": model.to_frame(x)})  # doctest: +SKIP
    """
    first = next(iter(points.values()))
    names = [f"entry {place}" for place in range(first.shape[1])]
    if isinstance(first, Frame):
        columns = columns_of(first)
        names = [str(column.name) for column in columns]
        points = {name: numbers_of(frame, columns) for name, frame in points.items()}
        first = next(iter(points.values()))
    finite = first[np.isfinite(first).all(axis=1)]
    finite = finite if len(finite) else np.zeros((1, first.shape[1]))
    low, high = np.quantile(finite, [0.001, 0.999], axis=0)
    margin = 0.1 * np.maximum(high - low, 1e-12)
    low, high, shown = low - margin, high + margin, min(first.shape[1], MAX_PAIRS)
    figure, grid = panels(shown**2, shown, max(1.9, 3.0 / shown))
    for axes, (row, column) in zip(grid, np.ndindex(shown, shown), strict=True):
        if column > row:
            axes.set_axis_off()
            continue
        for (name, values), color in zip(points.items(), (BLUE, ORANGE), strict=False):
            x, y = values[:, column], values[:, row]
            if row == column:
                how: Any = {"bins": 40, "range": (low[row], high[row]), "density": True}
                axes.hist(x, **how, histtype="step", color=color, label=name)
            else:
                axes.scatter(x, y, s=2.0, color=color, alpha=0.35, linewidths=0)
                axes.set_ylim(low[row], high[row])
        axes.set_xlim(low[column], high[column])
        if row == shown - 1:
            axes.set_xlabel(names[column])
        if column == 0 < row:
            axes.set_ylabel(names[row])
    grid[0].legend(frameon=False, fontsize=8)
    return figure


def rank_histograms(calibration: Calibration) -> "Figure":
    """Histograms of the ranks of the first entries and of the log-density, with the band of a
    calibrated model.
    """
    tests = [*calibration.tests[:-1][: MAX_RANKS - 1], calibration.tests[-1]]
    figure, grid = panels(len(tests), columns=6, height=2.1)
    for axes, test in zip(grid, tests, strict=True):
        num = len(test.counts)
        axes.axhspan(*calibration.band(), color=GREY, alpha=0.25, linewidth=0)
        axes.bar((np.arange(num) + 0.5) / num, test.counts, width=0.9 / num, color=BLUE)
        axes.set(xlabel="rank", title=f"{test.name}: p = {test.p_value:.2g}")
    return figure


def gains(values: Float[np.ndarray, "n d"], rows: Sequence[str], names: Sequence[str]) -> "Figure":
    """Nats that each row would gain by another value of a column, in colour from 0 on: the columns
    of the largest gains, at most 20.
    """
    shown = np.sort(np.argsort(-values.max(axis=0))[:MAX_GAINS])
    width = min(3 + 0.45 * len(shown), 10.0)
    figure, [axes] = panels(1, 1, 1.2 + 0.22 * len(rows), width=width)
    drawn = axes.imshow(np.maximum(values[:, shown], 0), cmap="Blues", aspect="auto", vmin=0)
    figure.colorbar(drawn, ax=axes, label="gain [nats]")
    ticks = np.array(names)[shown].tolist()
    axes.set_xticks(range(len(shown)), ticks, rotation=45, ha="right", size=8)
    axes.set_yticks(range(len(rows)), rows, size=8)
    return figure


# --- images ---------------------------------------------------------------------------------------


def confusion_matrix(counts: Int[np.ndarray, "k k"]) -> "Figure":
    """Number of examples by class (row) and predicted class (column), in colours of a log scale."""
    from matplotlib.colors import LogNorm
    from sklearn.metrics import ConfusionMatrixDisplay

    figure, [axes] = panels(1, 1, 5.0, width=5.6)
    how: Any = {"cmap": "Blues", "im_kw": {"norm": LogNorm()}, "include_values": len(counts) <= 20}
    ConfusionMatrixDisplay(counts).plot(ax=axes, colorbar=False, **how)
    axes.set(xlabel="taken for", ylabel="class")
    return figure


def images(
    values: Num[np.ndarray, "n h w c"],
    num_levels: int | None,
    *,
    captions: Sequence[str] = (),
    columns: int = COLUMNS,
) -> "Figure":
    """Images in reading order, black where not finite; continuous images are clipped to their 1 %
    and 99 % quantiles. Other numbers of channels than 3 are averaged to grey.
    """
    low, high = 0, (num_levels or 2) - 1
    if num_levels is None:
        low, high = np.quantile(values[np.isfinite(values)], [0.01, 0.99])
    pixels = (values - low) / max(high - low, 1e-12)
    if pixels.shape[-1] != 3:
        pixels = np.repeat(pixels.mean(axis=-1, keepdims=True), 3, axis=-1)
    height = pixels.shape[1] / pixels.shape[2] + (0.3 if captions else 0)
    figure, grid = panels(len(pixels), columns, height, width=1.0 * columns)
    for axes, image in zip(grid, np.clip(np.nan_to_num(pixels), 0, 1), strict=True):
        axes.imshow(image, interpolation="nearest")
        axes.set_axis_off()
    for axes, caption in zip(grid, captions, strict=False):
        axes.set_title(caption, size=8)
    return figure


def reconstructions(
    originals: Float[np.ndarray, "n ..."], back: Float[np.ndarray, "n ..."]
) -> "Figure | None":
    """First originals above their reconstructions, with the largest difference of each; None unless
    the originals are images in [0, 1].
    """
    if originals.ndim != 4 or originals.min() < 0 or originals.max() > 1:
        return None
    originals, back = originals[:COLUMNS], back[:COLUMNS]
    errors = np.abs(back - originals).max(axis=(1, 2, 3))
    captions = [*[""] * len(back), *(f"off by {error:.1e}" for error in errors)]
    both = np.concatenate([originals, back])
    return images(both, 2, captions=captions, columns=len(back))


def write_samples(
    values: Num[np.ndarray, "n ..."], num_levels: int | None, folder: Path
) -> tuple[Path, Path]:
    """Writes ``samples.png`` and ``samples.npy`` (levels as uint8, points as float32) into a
    folder.
    """
    figure = images(values, num_levels) if values.ndim == 4 else pairs({"samples": values})
    png, npy = write_png(figure, folder / "samples.png"), folder / "samples.npy"
    with replacing(npy) as incoming, incoming.open("wb") as file:
        np.save(file, values)
    return png, npy


def panels(
    num: int, columns: int, height: float, *, width: float = 10.0
) -> tuple["Figure", list["Axes"]]:
    """A figure of ``num`` axes in rows of one height, in inches; the rest of the last row stays
    empty.
    """
    from matplotlib.figure import Figure

    rows = math.ceil(num / columns)
    figure = Figure(figsize=(width, rows * height), layout="constrained")
    grid: Any = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat[num:]:
        axes.set_axis_off()
    return figure, list(grid.flat[:num])
