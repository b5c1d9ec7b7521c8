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

from iresnet_jax.atomic_files import replacing
from iresnet_jax.evaluation.calibration import Calibration
from iresnet_jax.models.certificate import Certificate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, GREY = "#2a2f36", "#727b87"
BLUE, ORANGE, PLUM = "#3f83d1", "#de7c22", "#b0479b"  # distinct to readers with the common colour deficiencies
NOT_FINITE = (1.0, 0.0, 0.6)  # pixels that are NaN or infinite: no image has this colour by accident
OBJECTIVES = {"bits_per_dim": "bits/dim", "nll": "NLL [nats]", "accuracy": "accuracy", "loss": "loss"}
MAX_PAIRS, MAX_RANKS = 5, 12  # entries of a vector whose pairs and whose ranks are drawn


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure, with sizes in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def data_uri(figure: "Figure") -> str:
    """A figure as the address of an image that is its own content, for a page that needs no other file."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=120)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def write_png(figure: "Figure", path: Path) -> Path:
    """Writes a figure to a PNG file."""
    with replacing(path) as incoming:
        figure.savefig(incoming, format="png", dpi=150)
    return path


# --- training and bounds --------------------------------------------------------------------------------------------


def learning_curves(records: Sequence[Mapping[str, Any]], evaluated_step: int) -> "Figure":
    """Every logged quantity against the step, the objective first; training with its running median, validation with markers.

    Args:
        records: Lines of the metrics log, in any order: ``step``, ``split``, and numbers that may be missing.
        evaluated_step: Step of the evaluated checkpoint, a vertical line.
    """
    logged = {name for record in records for name, value in record.items() if isinstance(value, int | float)}
    others = logged - {"step", "wall_time_s", *OBJECTIVES}
    names = [*(name for name in OBJECTIVES if name in logged), *sorted(others)]
    columns = 4
    figure = new_figure(10.0, 1.9 * math.ceil(len(names) / columns))
    grid: Any = figure.subplots(math.ceil(len(names) / columns), columns, squeeze=False)
    for axes in grid.flat[len(names) :]:
        axes.set_axis_off()
    for axes, name in zip(grid.flat, names, strict=False):
        for split, color in (("train", BLUE), ("validation", ORANGE)):
            found = sorted(
                (r["step"], r[name]) for r in records if r.get("split") == split and isinstance(r.get(name), int | float)
            )
            if not found:
                continue
            steps, values = np.array(found, np.float64).T
            if split == "validation":
                axes.plot(steps, values, color=color, linewidth=1.4, marker="o", markersize=3, label=split)
                continue
            window = max(len(values) // 60, 1)
            axes.plot(steps, values, color=color, linewidth=0.8, alpha=0.35 if window > 1 else 1.0)
            seen = [np.lib.stride_tricks.sliding_window_view(array, window)[::window] for array in (steps, values)]
            axes.plot(*(np.median(array, axis=1) for array in seen), color=color, linewidth=1.4, label=split)
        axes.axvline(evaluated_step, color=GREY, linewidth=0.8)
        axes.ticklabel_format(axis="y", useOffset=False)
        label(axes, "step", "", OBJECTIVES.get(name, name.replace("_", " ")))
    grid[0, 0].legend(frameon=False, fontsize=8)
    return figure


def lipschitz_bars(certificate: Certificate) -> "Figure":
    """Lipschitz estimate of every block, its certified bound, the target and the limit of invertibility.

    An estimate comes from power iteration, which approaches the norm from below: only the bound proves anything.
    """
    estimates, bounds = ([getattr(block, kind) for block in certificate.blocks] for kind in ("estimate", "bound"))
    figure = new_figure(10.0, 3.2)
    axes = figure.add_subplot()
    place = np.arange(len(bounds))
    axes.bar(place, estimates, width=0.7, color=BLUE, alpha=0.85, label="estimate (from below)")
    axes.scatter(place, bounds, s=26, marker="D", color=ORANGE, zorder=3, label="certified bound")
    if certificate.target is not None:
        axes.axhline(certificate.target, color=PLUM, linestyle="--", label=f"target {certificate.target:g}")
    axes.axhline(1.0, color=INK, linewidth=1.0, label="invertible below 1")
    axes.set_ylim(0.0, 1.04 * max(value for value in (1.0, *estimates, *bounds) if math.isfinite(value)))
    label(axes, "block, from the data to the latents", "Lipschitz constant of g", "")
    axes.legend(frameon=False, fontsize=8, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return figure


def error_histogram(errors: Mapping[str, Float[np.ndarray, " _"]]) -> "Figure":
    """Euclidean errors of examples by name, on a log scale with 0 in the lowest bin; the title counts what is not finite."""
    finite = {name: values[np.isfinite(values)] for name, values in errors.items()}
    positive = np.concatenate([values[values > 0] for values in finite.values()])
    low, high = (positive.min(), positive.max()) if positive.size else (1e-8, 1e-7)
    bins = np.geomspace(low / 1.3, high * 1.3, 41)
    figure = new_figure(10.0, 2.8)
    axes = figure.add_subplot()
    shown = [np.maximum(values, bins[0] * 1.001) for values in finite.values()]
    axes.hist(shown, bins=bins.tolist(), color=[BLUE, ORANGE][: len(shown)], label=list(finite))
    axes.set_xscale("log")
    lost = sum(len(values) for values in errors.values()) - sum(len(values) for values in finite.values())
    label(axes, "Euclidean error of an example", "examples", f"{lost} errors are not finite" if lost else "")
    axes.legend(frameon=False, fontsize=8)
    return figure


# --- vectors --------------------------------------------------------------------------------------------------------


def density_map(log_density: Float[np.ndarray, "n n"], extent: tuple[float, float, float, float]) -> "Figure":
    """A density on the plane, in colours that end at its 99.5 % quantile: narrow ridges would leave the rest black.

    Args:
        log_density: Natural log of the density on a grid; rows run along the second coordinate, upwards.
        extent: (left, right, bottom, top) of the grid.
    """
    figure = new_figure(5.4, 4.6)
    axes = figure.add_subplot()
    density = np.exp(np.where(np.isfinite(log_density), log_density, -np.inf))
    top = float(np.quantile(density, 0.995)) or float(density.max()) or 1.0
    shown = axes.imshow(density, origin="lower", extent=extent, aspect="auto", vmin=0.0, vmax=top)
    label(axes, "", "", "")
    axes.grid(visible=False)
    figure.colorbar(shown, ax=axes, label="density", extend="max")
    return figure


def pairs(data: Float[np.ndarray, "n d"], samples: Float[np.ndarray, "m d"]) -> "Figure":
    """Test data beside samples: marginals of the first entries on the diagonal, pairs of entries below it.

    Both are drawn on the range of the data; the title counts the samples that are outside of it in some entry.
    """
    low, high = np.quantile(data, 0.001, axis=0), np.quantile(data, 0.999, axis=0)
    margin = 0.1 * np.maximum(high - low, 1e-12)
    low, high, shown = low - margin, high + margin, min(data.shape[1], MAX_PAIRS)
    figure = new_figure(10.0, max(1.9 * shown, 3.0))
    grid: Any = figure.subplots(shown, shown, squeeze=False)
    for row, column in np.ndindex(shown, shown):
        axes = grid[row, column]
        if column > row:
            axes.set_axis_off()
            continue
        for (name, points), color in zip({"test data": data, "samples": samples}.items(), (BLUE, ORANGE), strict=True):
            if row == column:
                bins = np.linspace(low[row], high[row], 41).tolist()
                axes.hist(points[:, row], bins=bins, density=True, histtype="step", color=color, label=name)
            else:
                axes.scatter(points[:, column], points[:, row], s=2.0, color=color, alpha=0.35, linewidths=0)
                axes.set_ylim(low[row], high[row])
        axes.set_xlim(low[column], high[column])
        label(axes, f"entry {column}" if row == shown - 1 else "", f"entry {row}" if column == 0 and row else "", "")
    outside = int(np.any((samples < low) | (samples > high) | ~np.isfinite(samples), axis=1).sum())
    grid[0, 0].set_title(f"{outside} of {len(samples)} samples are outside", size=8, loc="left")
    grid[0, 0].legend(frameon=False, fontsize=8)
    return figure


def log_prob_histogram(of_data: Float[np.ndarray, " n"], of_samples: Float[np.ndarray, " m"]) -> "Figure":
    """Log-likelihoods of test points and of samples; those below the 1 % quantile of the test points are in the first bin."""
    finite = of_data[np.isfinite(of_data)] if np.isfinite(of_data).any() else np.zeros(1)
    low, high = float(np.quantile(finite, 0.01)), float(finite.max())
    bins = np.linspace(low, max(high, low + 1e-6), 41)
    figure = new_figure(6.0, 2.8)
    axes = figure.add_subplot()
    for (name, values), color in zip({"test data": of_data, "samples": of_samples}.items(), (BLUE, ORANGE), strict=True):
        shown = np.clip(values[np.isfinite(values)], bins[0], bins[-1])
        axes.hist(shown, bins=bins.tolist(), density=True, histtype="step", color=color, label=name)
    label(axes, "log p [nats]", "share of points", "")
    axes.legend(frameon=False, fontsize=8, loc="upper left")
    return figure


def rank_histograms(calibration: Calibration) -> "Figure":
    """Histograms of ranks, of the first entries and of the log-density, with the band of a calibrated model."""
    tests = [*calibration.tests[:-1][: MAX_RANKS - 1], calibration.tests[-1]]
    columns = min(len(tests), 6)
    rows = math.ceil(len(tests) / columns)
    figure = new_figure(min(2.2 * columns + 0.6, 10.0), 1.9 * rows + 0.3)
    grid: Any = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for axes in grid.flat[len(tests) :]:
        axes.set_axis_off()
    for axes, test in zip(grid.flat, tests, strict=False):
        num = len(test.counts)
        axes.axhspan(*calibration.band(), color=GREY, alpha=0.25, linewidth=0)
        axes.bar((np.arange(num) + 0.5) / num, test.counts, width=0.9 / num, color=BLUE)
        label(axes, "rank", "", f"{test.name}: p = {test.p_value:.2g}")
    return figure


# --- images ---------------------------------------------------------------------------------------------------------


def confusion_matrix(counts: Int[np.ndarray, "k k"]) -> "Figure":
    """Number of examples of each class, by row, taken for each, by column; colour is the share of the class on a log scale."""
    figure = new_figure(5.6, 5.0)
    axes = figure.add_subplot()
    scaled = np.log10(np.maximum(counts / np.maximum(counts.sum(axis=1, keepdims=True), 1), 1e-4))
    axes.imshow(np.where(counts > 0, scaled, np.nan), cmap="Blues", vmin=-4.5, vmax=0.0)
    if len(counts) <= 20:
        axes.set(xticks=range(len(counts)), yticks=range(len(counts)))
        for row, column in np.argwhere(counts > 0):
            ink = "white" if scaled[row, column] > -1.5 else INK
            axes.text(column, row, f"{counts[row, column]}", ha="center", va="center", size=8, color=ink)
    label(axes, "taken for", "class", "")
    axes.grid(visible=False)
    return figure


def examples(
    values: Num[np.ndarray, "n ..."], num_levels: int | None, *, columns: int = 8, captions: Sequence[str] = ()
) -> "Figure":
    """Images in reading order, continuous ones from their 1 % to their 99 % quantile; of vectors a scatter of two entries."""
    if values.ndim != 4:
        figure = new_figure(4.6, 4.6)
        axes = figure.add_subplot()
        points = values if values.shape[1] > 1 else np.pad(values, ((0, 0), (0, 1)))
        axes.scatter(points[:, 0], points[:, 1], s=4.0, color=BLUE, alpha=0.45, linewidths=0)
        lost = int((~np.isfinite(values).all(axis=1)).sum())
        label(axes, "", "", f"{lost} of {len(values)} samples are not finite" if lost else "")
        return figure
    if num_levels is not None:
        pixels = values / (num_levels - 1)
    else:
        low, high = np.nanquantile(np.where(np.isfinite(values), values, np.nan), [0.01, 0.99])
        pixels = (values - low) / max(high - low, 1e-12)
    rows = math.ceil(len(pixels) / columns)
    figure = new_figure(1.0 * columns, rows * (pixels.shape[1] / pixels.shape[2] + (0.3 if captions else 0)))
    grid: Any = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, image in zip(grid.flat, rgb(pixels), strict=False):
        axes.imshow(image, interpolation="nearest")
    for axes, caption in zip(grid.flat, captions, strict=False):
        axes.set_title(caption, size=8)
    return figure


def reconstructions(
    originals: Float[np.ndarray, "n ..."], back: Float[np.ndarray, "n ..."], *, num: int = 8
) -> "Figure | None":
    """First originals above their reconstructions and the largest difference of each; None for points and other units."""
    if originals.ndim != 4 or originals.min() < 0 or originals.max() > 1:
        return None
    originals, back = originals[:num], back[:num]
    figure = new_figure(10.0, 2.6 * max(originals.shape[1] / originals.shape[2], 0.5) + 0.4)
    grid: Any = figure.subplots(2, len(originals), squeeze=False)
    for axes, original, inverted, error in zip(grid.T, rgb(originals), rgb(back), np.abs(back - originals), strict=True):
        for place, image in zip(axes, (original, inverted), strict=True):
            place.imshow(image, interpolation="nearest")
            place.set_axis_off()
        axes[1].set_title(f"off by {error.max():.1e}", size=8)
    return figure


def rgb(pixels: Float[np.ndarray, "n h w c"]) -> Float[np.ndarray, "n h w 3"]:
    """RGB images in [0, 1] of pixels on this scale; the mean of channels that are neither grey nor RGB."""
    three = pixels if pixels.shape[-1] == 3 else np.repeat(pixels.mean(axis=-1, keepdims=True), 3, axis=-1)
    return np.where(np.isfinite(three).all(axis=-1, keepdims=True), np.clip(three, 0.0, 1.0), NOT_FINITE)


def write_samples(values: Num[np.ndarray, "n ..."], num_levels: int | None, folder: Path) -> tuple[Path, Path]:
    """Writes ``samples.png`` and ``samples.npy`` (levels as uint8, points as float32) into a folder."""
    png, npy = write_png(examples(values, num_levels), folder / "samples.png"), folder / "samples.npy"
    with replacing(npy) as incoming, incoming.open("wb") as file:
        np.save(file, values)
    return png, npy


def label(axes: "Axes", x: str, y: str, title: str) -> None:
    """Labels axes and draws their frame and grid in the style of all figures."""
    axes.set_xlabel(x, size=9, color=INK)
    axes.set_ylabel(y, size=9, color=INK)
    axes.set_title(title, size=9, color=INK, loc="left")
    axes.tick_params(labelsize=8, color=GREY)
    axes.grid(visible=True, color=GREY, alpha=0.2, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
