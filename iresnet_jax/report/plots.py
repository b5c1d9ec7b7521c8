"""Plots of a training run: numbers in, a matplotlib ``Figure`` out."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Int

from iresnet_jax.evaluation.calibration import Calibration
from iresnet_jax.models.certificate import Certificate
from iresnet_jax.report import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Number = float | int

MAX_PAIRS = 5  # entries of a vector that are drawn
MAX_LIKELIHOODS = 2000  # points that are drawn by their likelihood
MAX_RANKS = 12  # quantities whose ranks are drawn
FLAT = 1e-3  # least height of a learning curve's axis, relative to its values
MAX_CURVE_POINTS = 600  # keeps seven panels of two splits below the size at which an SVG is given up

_HEADLINES = {"bits_per_dim": "bits/dim", "nll": "NLL [nats]", "accuracy": "accuracy", "loss": "loss"}
_TERMS = {
    "log_prior": "log prior",
    "log_det": "log det",
    "max_sigma": "largest layer norm",
    "grad_norm": "gradient norm",
    "learning_rate": "learning rate",
}


def learning_curves(records: Sequence[Mapping[str, Any]], evaluated_step: int | None = None) -> "Figure":
    """Draws the objective against step and wall-clock time, and the terms it is made of in small panels below.

    The objective is the first of bits/dim, NLL, accuracy and loss that occurs. Training values are drawn faint with their
    running median on top; a value that is not finite leaves a gap.

    Args:
        records: Lines of the metrics log, in any order: ``step``, ``split``, ``wall_time_s``, and numbers that may be missing.
        evaluated_step: Step of the evaluated checkpoint, for the title.

    Raises:
        ValueError: If no record holds an objective.

    Example:
        >>> records = [{"step": s, "split": "train", "wall_time_s": 2.0 * s, "bits_per_dim": 8 / s} for s in (1, 2, 4)]
        >>> len(learning_curves(records).axes)
        2
    """
    logged = {name for record in records for name, value in record.items() if _is_number(value)}
    headline = next((name for name in _HEADLINES if name in logged), None)
    if headline is None:
        raise ValueError(
            f"the {len(records)} records hold none of {', '.join(_HEADLINES)}: log at least one of them at every step shown"
        )
    terms = [name for name in _TERMS if name in logged]
    terms += sorted(logged - {headline, *terms, "step", "wall_time_s"})
    columns = 4
    rows = math.ceil(len(terms) / columns)
    figure = style.figure(width=10.0, height=3.6 + 1.85 * rows, row_gap=0.09)
    grid = figure.add_gridspec(1 + rows, columns, height_ratios=[2.0, *[1.0] * rows])
    by_step = figure.add_subplot(grid[0, : columns // 2])
    by_time = figure.add_subplot(grid[0, columns // 2 :])
    longest = max((record.get("wall_time_s") or 0.0 for record in records), default=0.0)
    seconds, unit = (3600.0, "h") if longest >= 7200 else (60.0, "min") if longest >= 120 else (1.0, "s")
    _draw_splits(by_step, records, "step", headline)
    _draw_splits(by_time, records, "wall_time_s", headline, x_scale=1.0 / seconds)
    style.label(by_step, "step", _HEADLINES[headline], title=_evaluated(records, headline, evaluated_step))
    style.label(by_time, f"wall-clock time [{unit}]", _HEADLINES[headline])
    if by_step.get_legend_handles_labels()[0]:
        style.legend(by_step)
    for index, name in enumerate(terms):
        axes = figure.add_subplot(grid[1 + index // columns, index % columns])
        _draw_splits(axes, records, "step", name)
        style.label(axes, "step", "", title=_TERMS.get(name, name.replace("_", " ")), size=8)
    return figure


def confusion_matrix(counts: Int[np.ndarray, "k k"]) -> "Figure":
    """Draws how many examples of each class, by row, were taken for each, by column.

    Colour is the share of a class on a log scale, so that single mistakes are seen. With at most 20 classes, every cell also
    shows its count.
    """
    size = len(counts)
    figure = style.figure(width=5.6, height=5.0)
    axes = figure.add_subplot()
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    scaled = np.log10(np.maximum(share, 1e-4))
    axes.imshow(np.where(counts > 0, scaled, np.nan), cmap="Blues", vmin=-4.5, vmax=0.0)
    for row, column in np.argwhere(counts > 0) if size <= 20 else ():
        ink = "white" if scaled[row, column] > -1.5 else style.INK
        axes.text(column, row, f"{counts[row, column]}", ha="center", va="center", size=8, color=ink)
    if size <= 20:
        axes.set(xticks=range(size), yticks=range(size))
    axes.grid(visible=False)
    style.label(axes, "taken for", "class")
    return figure


def lipschitz_bars(certificate: Certificate) -> "Figure":
    """Draws the Lipschitz estimate of every block, its certified bound, the target and the limit of invertibility.

    An estimate comes from power iteration, which approaches the norm from below: only the bound proves anything.
    """
    names, estimates, bounds = zip(*((block.name, block.estimate, block.bound) for block in certificate.blocks), strict=True)
    figure = style.figure(width=10.0, height=3.2)
    axes = figure.add_subplot()
    place = np.arange(len(names))
    axes.bar(place, estimates, width=0.7, color=style.BLUE, alpha=0.85, label="estimate (from below)")
    axes.scatter(place, bounds, s=26, marker="D", color=style.ORANGE, zorder=3, label="certified bound")
    target = certificate.target
    if target is not None:
        axes.axhline(target, color=style.PLUM, linewidth=1.2, linestyle=(0, (5, 3)), label=f"target {target:g}")
    axes.axhline(1.0, color=style.INK, linewidth=1.0, label="invertible below 1")
    every = math.ceil(len(names) / 24)
    turned = max(map(len, names)) * len(names) / every > 100
    axes.set_xticks(place[::every], names[::every], rotation=40 if turned else 0, ha="right" if turned else "center")
    axes.set_xlim(-0.6, len(names) - 0.4)
    axes.set_ylim(0.0, 1.04 * max(value for value in (1.0, *estimates, *bounds) if math.isfinite(value)))
    style.label(axes, "", "Lipschitz constant of g")
    style.legend(axes, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4).set_in_layout(True)
    return figure


def density_map(log_density: Float[np.ndarray, "n n"], extent: tuple[Number, Number, Number, Number]) -> "Figure":
    """Draws a density on the plane.

    The colour scale ends at the 99.5 % quantile: narrow ridges would otherwise leave the rest black.

    Args:
        log_density: Natural log of the density on a grid; rows run along the second coordinate, upwards.
        extent: (left, right, bottom, top) of the grid.
    """
    figure = style.figure(width=5.4, height=4.6)
    axes = figure.add_subplot()
    density = np.exp(np.where(np.isfinite(log_density), log_density, -np.inf))
    top = float(np.quantile(density, 0.995)) or float(density.max()) or 1.0
    colors: dict[str, Any] = {"cmap": "viridis", "vmin": 0.0, "vmax": top, "interpolation": "bilinear"}
    is_square = math.isclose(extent[1] - extent[0], extent[3] - extent[2])
    shown = axes.imshow(density, origin="lower", extent=extent, aspect="equal" if is_square else "auto", **colors)
    style.label(axes, "", "", ink=style.MIDTONE)
    axes.grid(visible=False)
    style.colorbar(figure, shown, [axes], label="density", extend="max")
    return figure


def scatter(samples: Float[np.ndarray, "m 2"]) -> "Figure":
    """Draws points of the plane on equal axes; the title counts those that are not finite."""
    figure = style.figure(width=4.6, height=4.6)
    axes = figure.add_subplot()
    finite = np.isfinite(samples).all(axis=1)
    axes.scatter(*samples[finite].T, s=4.0, color=style.BLUE, alpha=0.45, linewidths=0, rasterized=True)
    axes.set_aspect("equal", adjustable="datalim")
    lost = int((~finite).sum())
    style.label(axes, "", "", title=f"{lost} of {len(samples)} samples are not finite" if lost else "")
    return figure


def pairs(data: Float[np.ndarray, "n d"], samples: Float[np.ndarray, "m d"]) -> "Figure":
    """Draws test data beside samples: marginals of the first entries on the diagonal, pairs of entries below it.

    Both are drawn on the range of the data; the title counts the samples that are outside of it in some entry.
    """
    low, high = np.quantile(data, 0.001, axis=0), np.quantile(data, 0.999, axis=0)
    margin = 0.1 * np.maximum(high - low, 1e-12)
    low, high = low - margin, high + margin
    figure, first = _pairs({"test data": data, "samples": samples}, {}, low, high)
    outside = int(np.any((samples < low) | (samples > high) | ~np.isfinite(samples), axis=1).sum())
    style.label(first, "", "", title=f"{outside} of {len(samples)} samples are outside", size=8)
    return figure


def posterior_pairs(samples: Float[np.ndarray, "c n d"], truth: Float[np.ndarray, "c d"]) -> "Figure":
    """Draws samples of a density given each of the first two contexts: marginals of the first entries, and their pairs.

    Args:
        samples: Samples given each context.
        truth: The example that each context belongs to, which is a line in marginals and a cross in pairs.
    """
    names = [f"context {i}" for i in range(len(samples[:2]))]
    finite = samples[:2][np.all(np.isfinite(samples[:2]), axis=2)]
    whole = np.concatenate([finite, truth[:2]])
    low, high = whole.min(axis=0), whole.max(axis=0)
    margin = 0.05 * np.maximum(high - low, 1e-12)
    of_contexts = dict(zip(names, samples, strict=False))
    return _pairs(of_contexts, dict(zip(names, truth, strict=False)), low - margin, high + margin)[0]


def _pairs(
    kinds: Mapping[str, Float[np.ndarray, "n d"]],
    marks: Mapping[str, Float[np.ndarray, " d"]],
    low: Float[np.ndarray, " d"],
    high: Float[np.ndarray, " d"],
) -> tuple["Figure", "Axes"]:
    """Marginals of the first entries and their pairs, of two kinds of points, some with a mark; and the first of the axes."""
    shown = min(len(low), MAX_PAIRS)
    figure = style.figure(width=10.0, height=max(1.9 * shown, 3.0))
    grid: Any = figure.subplots(shown, shown, squeeze=False)
    for row, column in np.ndindex(shown, shown):
        axes = grid[row, column]
        if column > row:
            axes.set_axis_off()
            continue
        axes.set_xlim(low[column], high[column])
        for (name, points), color in zip(kinds.items(), (style.BLUE, style.ORANGE), strict=False):
            if row == column:
                bins = np.linspace(low[row], high[row], 41).tolist()
                axes.hist(points[:, row], bins=bins, density=True, histtype="step", color=color, linewidth=1.2, label=name)
            else:
                axes.scatter(points[:, column], points[:, row], s=2.0, color=color, alpha=0.35, linewidths=0, rasterized=True)
        for (_, mark), color in zip(marks.items(), (style.BLUE, style.ORANGE), strict=False):
            if row == column:
                axes.axvline(float(mark[row]), color=color, linewidth=1.0, linestyle="--")
            else:
                axes.scatter(mark[column], mark[row], s=60.0, color=style.INK, marker="x", linewidths=2.2)
                axes.scatter(mark[column], mark[row], s=40.0, color=color, marker="x", linewidths=1.2)
        if row != column:
            axes.set_ylim(low[row], high[row])
        style.label(axes, f"entry {column}" if row == shown - 1 else "", f"entry {row}" if column == 0 and row else "", size=8)
    style.legend(grid[0, 0])
    return figure, grid[0, 0]


def rank_histograms(calibration: Calibration) -> "Figure":
    """Draws histograms of ranks, of the first entries and of the log-density, with the band of a calibrated model."""
    tests = [*calibration.tests[:-1][: MAX_RANKS - 1], calibration.tests[-1]]
    columns = min(len(tests), 6)
    rows = -(-len(tests) // columns)
    figure = style.figure(width=min(2.2 * columns + 0.6, 10.0), height=1.9 * rows + 0.3)
    grid: Any = figure.subplots(rows, columns, squeeze=False, sharey=True)
    low, high = calibration.band()
    for axes in grid.ravel()[len(tests) :]:
        axes.set_axis_off()
    for axes, test in zip(grid.ravel(), tests, strict=False):
        num = len(test.counts)
        axes.axhspan(low, high, color=style.MIDTONE, alpha=0.25, linewidth=0)
        axes.axhline(calibration.num_examples / num, color=style.MIDTONE, linewidth=0.8)
        axes.bar((np.arange(num) + 0.5) / num, test.counts, width=0.9 / num, color=style.BLUE)
        axes.set_xlim(0, 1)
        style.label(axes, "rank", "", title=f"{test.name}: p = {min(test.p_chi_square, test.p_ks):.2g}", size=8)
    return figure


def likelihoods(
    data: Float[np.ndarray, "n d"],
    log_prob: Float[np.ndarray, " n"],
    log_prob_of_samples: Float[np.ndarray, " m"],
    unlikely: Sequence[int],
) -> "Figure":
    """Draws histograms of log p of test points and of samples, and the test points in the colour of their log p.

    Longer vectors are drawn by two entries: those in which the least likely points are furthest out. The title counts the
    likelihoods that are not finite. Colours and histograms begin at the 1 % quantile of the test points; what is below is in
    the first bin.

    Args:
        log_prob: Log-likelihood of each test point in nats.
        log_prob_of_samples: The same of samples of the model.
        unlikely: Rows of the least likely points, which are circled.
    """
    figure = style.figure(width=10.0, height=3.6)
    left, right = figure.subplots(1, 2)
    finite = np.isfinite(log_prob)
    values = log_prob[finite] if finite.any() else np.zeros(1)
    low, high = float(np.quantile(values, 0.01)), float(values.max())
    bins = np.linspace(low, high if high > low else low + 1.0, 41)
    for name, found, color in (("test data", log_prob, style.BLUE), ("samples", log_prob_of_samples, style.ORANGE)):
        shown = np.clip(found[np.isfinite(found)], bins[0], bins[-1])
        left.hist(shown, bins=bins.tolist(), density=True, histtype="step", color=color, linewidth=1.2, label=name)
    lost = int((~finite).sum()) + int((~np.isfinite(log_prob_of_samples)).sum())
    style.label(left, "log p [nats]", "share of points", title=f"{lost} likelihoods are not finite" if lost else "")
    left.set_yticks([])
    style.legend(left, loc="upper left")
    circled = np.asarray(unlikely, dtype=int)
    deviations = np.abs(data - data.mean(axis=0)) / np.maximum(data.std(axis=0), 1e-12)
    chosen = np.sort(np.argsort(-deviations[circled].mean(axis=0), kind="stable")[:2]).tolist()
    names = [f"entry {entry}" for entry in chosen]
    points = data[:, chosen]
    if len(chosen) == 1:
        points, names = np.stack([points[:, 0], np.where(finite, log_prob, low)], axis=1), [*names, "log p [nats]"]
    some = finite & (np.arange(len(data)) < MAX_LIKELIHOODS)
    drawn = right.scatter(
        *points[some].T, c=log_prob[some], s=4.0, cmap="viridis", vmin=bins[0], vmax=bins[-1], linewidths=0, rasterized=True
    )
    right.scatter(*points[circled].T, s=40.0, facecolors="none", edgecolors=style.PLUM, linewidths=1.2, label="least likely")
    style.label(right, names[0], names[1])
    style.legend(right, loc="upper left")
    style.colorbar(figure, drawn, [right], label="log p [nats]", extend="min")
    return figure


def error_histogram(errors: Float[np.ndarray, " n"], bounds: Float[np.ndarray, " n"] | None = None) -> "Figure":
    """Draws how the inversion errors of the examples are spread, and beside them the bounds promised for each.

    Bars of errors and bounds stand side by side, so that none hides another. Errors are drawn on a log scale, errors of exactly
    0 in the lowest bin. The title counts the errors that are not finite and the errors that exceed their bound.

    Args:
        errors: Euclidean error of each example, some of them finite.
        bounds: A posteriori bounds of the same errors, if there are any.
    """
    given = {"error": errors} if bounds is None else {"error": errors, "error bound": bounds}
    finite = {name: values[np.isfinite(values)].astype(np.float64) for name, values in given.items()}
    positive = np.concatenate([values[values > 0.0] for values in finite.values()])
    low, high = (positive.min(), positive.max()) if positive.size else (1e-8, 1e-7)
    bins = np.geomspace(low / 1.3, high * 1.3, 41)
    figure = style.figure(width=10.0, height=2.8)
    axes = figure.add_subplot()
    shown, colors = [np.maximum(values, bins[0] * 1.001) for values in finite.values()], (style.BLUE, style.ORANGE)
    axes.hist(shown, bins=bins.tolist(), color=colors[: len(shown)], label=list(finite))  # bars of a bin stand side by side
    axes.set_xscale("log")
    notes = []
    if lost := int((~np.isfinite(errors)).sum()):
        notes.append(f"{lost} of {len(errors)} errors are not finite")
    if bounds is not None and (above := int((errors > bounds).sum())):
        notes.append(f"{above} of {len(errors)} errors exceed their bound")
    style.label(axes, "Euclidean error of an example", "examples", title="; ".join(notes))
    style.legend(axes)
    return figure


def _draw_splits(axes: "Axes", records: Sequence[Mapping[str, Any]], x: str, y: str, *, x_scale: float = 1.0) -> None:
    """Draws one quantity of both splits: training faint with its running median, validation with markers."""
    for split, color in (("train", style.BLUE), ("validation", style.ORANGE)):
        found = [record for record in records if record.get("split") == split and y in record and _is_number(record.get(x))]
        if not found:
            continue
        values = np.array(sorted((r[x] * x_scale, r[y] if _is_number(r[y]) else math.nan) for r in found), dtype=np.float64)
        values[~np.isfinite(values)] = np.nan
        if split == "validation":
            axes.plot(*values.T, color=color, linewidth=1.4, marker="o", markersize=3, label=split, zorder=3)
            continue
        window = len(values) // 60
        faint = values[:: math.ceil(len(values) / MAX_CURVE_POINTS)]
        axes.plot(*faint.T, color=color, linewidth=0.8, alpha=0.35 if window > 1 else 1.0, label="" if window > 1 else split)
        if window > 1:
            smooth = _running_median(values, window)
            axes.plot(*smooth.T, color=color, linewidth=1.6, label=f"{split} (median of {window})")
    _hide_rounding(axes)


def _hide_rounding(axes: "Axes") -> None:
    """Widens the vertical axis to a thousandth of its values: what changes less is drawn as the constant that it is."""
    low, high = axes.get_ylim()
    middle = (low + high) / 2
    if high - low < FLAT * abs(middle):
        axes.set_ylim(middle - FLAT / 2 * abs(middle), middle + FLAT / 2 * abs(middle))
    axes.ticklabel_format(axis="y", useOffset=False)


def _evaluated(records: Sequence[Mapping[str, Any]], name: str, step: int | None) -> str:
    """Says what the validation value of the evaluated checkpoint was; flat tails of curves cannot be read off."""
    values = [r[name] for r in records if r["step"] == step and r.get("split") == "validation" and _is_number(r.get(name))]
    return f"evaluated: step {step:,}, validation {values[-1]:.4g}" if values else ""


def _running_median(values: Float[np.ndarray, "n 2"], window: int) -> Float[np.ndarray, "m 2"]:
    """Medians of consecutive windows, half a window apart; windows without a finite value are gaps."""
    windows = np.lib.stride_tricks.sliding_window_view(values, window, axis=0)[:: max(window // 2, 1)]
    return np.ma.median(np.ma.masked_invalid(windows), axis=-1).filled(np.nan)


def _is_number(value: object) -> bool:
    """True for real numbers, not for booleans, which are ints to Python."""
    return isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
