"""Pictures of examples: images in, a matplotlib ``Figure`` or a PNG file out."""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Num

from iresnet_jax.atomic_files import replacing
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
    if num_levels is not None:
        return image_grid(values / (num_levels - 1), columns, captions=captions)
    if values.ndim != 4:
        return scatter(values[:, :2] if values.shape[1] > 1 else np.pad(values, ((0, 0), (0, 1))))
    finite = values[np.isfinite(values)]
    low, high = np.quantile(finite, [0.01, 0.99]) if finite.size else (0.0, 1.0)
    scaled = np.clip((values - low) / max(high - low, 1e-12), 0.0, 1.0)
    return image_grid(scaled if values.shape[-1] in (1, 3) else scaled[..., :1], columns, captions=captions)


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


def image_grid(images: Images, columns: int = 8, *, captions: Sequence[str] | None = None) -> "Figure":
    """Draws images in reading order, without axes.

    Args:
        images: Pixels in [0, 1]; those that are not finite are drawn in magenta.
        columns: Images a row.
        captions: A few characters to write below each image.

    Example:
        >>> image_grid(np.zeros((16, 8, 8, 1)), columns=4).get_size_inches().tolist()
        [4.0, 4.0]
    """
    pixels = _rgb(images)
    columns, (count, height, width, _) = min(columns, len(pixels)), pixels.shape
    rows, below = math.ceil(count / columns), 1 if captions is None else 1 + math.ceil(height / 4)
    tiles = np.pad(_opaque(pixels), ((0, rows * columns - count), (0, below), (0, 1), (0, 0)))
    tiles = tiles.reshape(rows, columns, *tiles.shape[1:]).swapaxes(1, 2)
    mosaic = tiles.reshape(rows * (height + below), columns * (width + 1), 4)[:-1, :-1]
    figure = style.figure(width=1.0 * columns, height=1.0 * rows * (height + below - 1) / width, row_gap=None)
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.imshow(mosaic, interpolation="nearest", aspect="auto")
    for i, caption in enumerate(captions or ()):
        row, column = divmod(i, columns)
        place = column * (width + 1) + width / 2 - 0.5, row * (height + below) + height
        axes.text(*place, caption, ha="center", va="top", size=8, color=style.MIDTONE)
    axes.set_axis_off()
    return figure


def reconstructions(result: Reconstructions) -> "Figure | None":
    """Draws the first originals above their reconstructions; None for points, and for images that are not in [0, 1]."""
    if result.originals.ndim != 4 or result.originals.min() < 0 or result.originals.max() > 1:
        return None
    return reconstruction_pairs(result.originals[:NUM_RECONSTRUCTED], result.reconstructions[:NUM_RECONSTRUCTED])


def reconstruction_pairs(originals: Images, reconstructions: Images) -> "Figure":
    """Draws originals above their reconstructions, with maps of the absolute error and the largest of each map below.

    The maps are max over channels of ``|original - reconstruction|``, in grey values of [0, 1], on one colour scale for
    all. Reconstructions are clipped to [0, 1] for display only: the maps see the values as they are.
    """
    above, below = _rgb(originals), _rgb(reconstructions)
    maps = np.abs(above - below).max(axis=-1)
    rows = {"original": _opaque(above), "inverted": _opaque(below), "|difference|": maps}
    largest = np.max(maps, where=np.isfinite(maps), initial=0.0)
    figure, grid = _strips(rows, margins=(1.6, 0.7), cmap="magma", vmin=0.0, vmax=largest or 1.0)
    for axes, error in zip(grid[2], maps.max(axis=(1, 2)), strict=True):
        axes.set_xlabel(f"{error:.1e}" if np.isfinite(error) else "not finite", size=7, color=style.MIDTONE)
    style.colorbar(figure, grid[2, 0].images[0], list(grid[2]), label="")
    return figure


def _strips(rows: Mapping[str, np.ndarray], margins: tuple[float, float], **options: Any) -> "tuple[Figure, np.ndarray]":
    """Draws named rows of RGBA images or of maps, for which the options are; returns the figure and its grid of axes.

    Args:
        margins: Inches beside and between the images, which are 1.5 inches wide at most.
    """
    count, height, width = next(iter(rows.values())).shape[:3]
    cell = 9.0 / max(count, 6)
    figure = style.figure(width=margins[0] + cell * count, height=margins[1] + len(rows) * cell * height / width)
    grid = figure.subplots(len(rows), count, squeeze=False)
    for line, (name, images) in zip(grid, rows.items(), strict=True):
        for axes, image in zip(line, images, strict=True):
            axes.imshow(image, interpolation="nearest", **options)
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
        line[0].set_ylabel(name, size=9, color=style.MIDTONE)
    return figure, grid


def _rgb(images: Images) -> Float[np.ndarray, "n h w 3"]:
    """Images as float64 RGB, not clipped; the mean of channels that are neither grey nor RGB."""
    images = images.astype(np.float64)
    return images if images.shape[-1] == 3 else np.repeat(images.mean(axis=-1, keepdims=True), 3, axis=-1)


def _opaque(pixels: Float[np.ndarray, "n h w 3"]) -> Float[np.ndarray, "n h w 4"]:
    """RGBA images in [0, 1], with the colour `NOT_FINITE` where a channel is not."""
    shown = np.where(np.isfinite(pixels).all(-1, keepdims=True), np.clip(pixels, 0.0, 1.0), NOT_FINITE)
    return np.concatenate([shown, np.ones((*shown.shape[:3], 1))], axis=-1)
