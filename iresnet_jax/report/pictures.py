"""Pictures of examples: images in, a matplotlib ``Figure`` or a PNG file out."""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, Num

from iresnet_jax.atomic_files import replacing
from iresnet_jax.evaluation.inverse_problem import Reconstructed
from iresnet_jax.evaluation.inversion import Reconstructions
from iresnet_jax.report import style
from iresnet_jax.report.plots import scatter

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Images = Float[np.ndarray, "n h w c"]

NOT_FINITE = (1.0, 0.0, 0.6)  # the colour of pixels that are NaN or infinite: no image has it by accident
NUM_RECONSTRUCTED = 8  # shown


def examples(
    values: Num[np.ndarray, "n ..."], num_levels: int | None, *, columns: int = 8, captions: Sequence[str] | None = None
) -> "Figure":
    """Draws images by `image_grid`, continuous ones from their 1 % to their 99 % quantile; of vectors two entries."""
    if num_levels is None and values.ndim == 4:
        finite = values[np.isfinite(values)]
        low, high = np.quantile(finite, [0.01, 0.99]) if finite.size else (0.0, 1.0)
        scaled = np.clip((values - low) / max(high - low, 1e-12), 0.0, 1.0)
        return image_grid(scaled if values.shape[-1] in (1, 3) else scaled[..., :1], columns, captions=captions)
    if num_levels is None:
        return scatter(values[:, :2] if values.shape[1] > 1 else np.stack([values[:, 0], np.zeros(len(values))], axis=1))
    return image_grid(values / (num_levels - 1), columns, captions=captions)


def write_samples(
    values: Num[np.ndarray, "n ..."], num_levels: int | None, folder: str | os.PathLike[str]
) -> tuple[Path, Path]:
    """Writes ``samples.png`` and ``samples.npy`` (levels as uint8, points as float32) into a folder."""
    png = write_png(examples(values, num_levels), Path(folder) / "samples.png")
    npy = Path(folder) / "samples.npy"
    with replacing(npy) as incoming, incoming.open("wb") as file:
        np.save(file, values)
    return png, npy


def write_png(figure: "Figure", path: Path) -> Path:
    """Writes a figure to a PNG file."""
    with replacing(path) as incoming:
        figure.savefig(incoming, format="png", dpi=150)
    return path


def reconstructions(result: Reconstructions) -> "Figure | None":
    """Draws the first originals above their reconstructions; None for points, and for images that are not in [0, 1]."""
    if result.originals.ndim != 4 or result.originals.min() < 0 or result.originals.max() > 1:
        return None
    shown = slice(0, NUM_RECONSTRUCTED)
    errors = np.asarray(result.trip.max_abs_error)[shown]
    return reconstruction_pairs(result.originals[shown], result.reconstructions[shown], errors)


def reconstructed_measurements(found: Reconstructed) -> "Figure":
    """Draws the first measurements above their reconstructions and the images that were measured."""
    shown = slice(0, NUM_RECONSTRUCTED)
    count, (height, width) = len(found.x[shown]), found.x.shape[1:3]
    cell = 9.0 / max(count, 6)
    figure = style.figure(width=0.9 + cell * count, height=0.3 + 3.2 * cell * height / width)
    grid = figure.subplots(3, count, squeeze=False)
    rows = (("measured", found.y), ("reconstructed", found.found), ("image", found.x))
    for row, (name, images) in zip(grid, rows, strict=True):
        row[0].set_ylabel(name, size=9, color=style.MIDTONE)
        for axes, image in zip(row, _rgb(images[shown]), strict=True):
            axes.imshow(_mosaic(image[None], 1, gap=0), interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            for spine in axes.spines.values():
                spine.set_visible(False)
    for axes, error in zip(grid[1], found.relative_error[shown], strict=True):
        axes.set_xlabel(f"{error:.3f}", size=7, color=style.MIDTONE)
    return figure


def image_grid(images: Images, columns: int = 8, *, captions: Sequence[str] | None = None) -> "Figure":
    """Draws images in reading order, without axes.

    Args:
        images: Pixels in [0, 1]; those that are not finite are drawn in magenta.
        columns: Images a row, at least 1.
        captions: A few characters to write below each image.

    Raises:
        ValueError: If there is no image, a pixel is outside [0, 1], or columns < 1.

    Example:
        >>> image_grid(np.zeros((16, 8, 8, 1)), columns=4).get_size_inches().tolist()
        [4.0, 4.0]
    """
    if columns < 1:
        raise ValueError(f"columns must be at least 1, got {columns}: 8 suits a page")
    pixels = _rgb(images)
    finite = pixels[np.isfinite(pixels)]
    if finite.size and (finite.min() < 0.0 or finite.max() > 1.0):
        raise ValueError(f"pixels must lie in [0, 1], got [{finite.min():.3g}, {finite.max():.3g}]: undo the preprocessing")
    columns = min(columns, len(pixels))
    if captions is not None:
        return _captioned(pixels, columns, captions)
    mosaic = _mosaic(pixels, columns)
    rows = math.ceil(len(pixels) / columns)
    figure = style.figure(width=1.0 * columns, height=1.0 * rows * images.shape[1] / images.shape[2], row_gap=None)
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.imshow(mosaic, interpolation="nearest", aspect="auto")
    axes.set_axis_off()
    return figure


def _captioned(pixels: Float[np.ndarray, "n h w 3"], columns: int, captions: Sequence[str]) -> "Figure":
    rows = math.ceil(len(pixels) / columns)
    figure = style.figure(width=1.0 * columns, height=1.25 * rows * pixels.shape[1] / pixels.shape[2])
    for axes, pixel, caption in zip(figure.subplots(rows, columns, squeeze=False).flat, pixels, captions, strict=False):
        axes.imshow(_mosaic(pixel[None], 1, gap=0), interpolation="nearest")
        axes.set_title(caption, size=8, color=style.MIDTONE, pad=2)
    for axes in figure.axes:
        axes.set_axis_off()
    return figure


def reconstruction_pairs(originals: Images, reconstructions: Images, errors: Float[np.ndarray, " n"]) -> "Figure":
    """Draws originals above their reconstructions, with maps of the absolute error below.

    The maps are max over channels of ``|original - reconstruction|``, in grey values of [0, 1], on one colour scale for
    all. Reconstructions are clipped to [0, 1] for display only: the maps see the values as they are.

    Args:
        originals: Pixels in [0, 1].
        reconstructions: Images on the same scale.
        errors: One number an image, printed below its column: the error reported elsewhere, in the model's own units.

    Raises:
        ValueError: If there is no image.
    """
    above, below = _rgb(originals), _rgb(reconstructions)
    maps = np.abs(above - below).max(axis=-1)
    count, height, width, _ = above.shape
    cell = 9.0 / max(count, 6)
    figure = style.figure(width=1.6 + cell * count, height=0.7 + 3.0 * cell * height / width)
    grid = figure.subplots(3, count, squeeze=False)
    largest = np.max(maps, where=np.isfinite(maps), initial=0.0)
    shown = None
    for i in range(count):
        grid[0, i].imshow(_mosaic(above[i : i + 1], 1, gap=0), interpolation="nearest")
        grid[1, i].imshow(_mosaic(below[i : i + 1], 1, gap=0), interpolation="nearest")
        shown = grid[2, i].imshow(maps[i], interpolation="nearest", cmap="magma", vmin=0.0, vmax=largest or 1.0)
        grid[2, i].set_xlabel(f"{errors[i]:.1e}" if np.isfinite(errors[i]) else "not finite", size=7, color=style.MIDTONE)
    for row, name in zip(grid, ("original", "inverted", "|difference|"), strict=True):
        row[0].set_ylabel(name, size=9, color=style.MIDTONE)
        for axes in row:
            axes.set(xticks=[], yticks=[])
            for spine in axes.spines.values():
                spine.set_visible(False)
    if shown is not None:
        style.colorbar(figure, shown, list(grid[2]), label="")
    return figure


def _rgb(images: Images) -> Float[np.ndarray, "n h w 3"]:
    """Images as float64 RGB, not clipped; the mean of channels that are neither grey nor RGB."""
    if not len(images):
        raise ValueError(f"images must be at least one, got {images.shape}")
    images = images.astype(np.float64)
    return images if images.shape[-1] == 3 else np.repeat(images.mean(axis=-1, keepdims=True), 3, axis=-1)


def _mosaic(pixels: Float[np.ndarray, "n h w 3"], columns: int, gap: int = 1) -> Float[np.ndarray, "rows columns 4"]:
    """Tiles images in reading order into one RGBA array, with transparent gaps."""
    count, height, width, _ = pixels.shape
    rows = math.ceil(count / columns)
    opaque = np.ones((count, height, width, 4))
    opaque[..., :3] = np.where(np.isfinite(pixels).all(-1, keepdims=True), np.clip(pixels, 0.0, 1.0), NOT_FINITE)
    canvas = np.zeros((rows * (height + gap) - gap, columns * (width + gap) - gap, 4))
    for i, tile in enumerate(opaque):
        top, left = (i // columns) * (height + gap), (i % columns) * (width + gap)
        canvas[top : top + height, left : left + width] = tile
    return canvas
