"""Interpolation in latents and in pixels, samples at several temperatures, and the training images nearest to samples."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Num

from iresnet_jax.figures import style
from iresnet_jax.figures.drawing import Drawing, Row
from iresnet_jax.models.density import Density
from iresnet_jax.runs.trained_run import Run

TEMPERATURES = (0.6, 0.8, 1.0)
NUM_STEPS = 9  # images from one to the other, both included
NUM_PAIRS = 2
NUM_SAMPLES = 64  # for each temperature
NUM_COMPARED = 1000  # test images whose nearest training image is found

LINE = "interpolation"  # kind of row

Images = Num[np.ndarray, "_ ..."]


def figure(run: Run) -> Drawing:
    """The figure of a run.

    Raises:
        ValueError: If it is no density of images of integer levels, or one with contexts.
    """
    model, test = run.model, run.test_examples()
    if not isinstance(model, Density) or model.spec.flow.context_dim:
        raise ValueError(f"{run.folder} holds no density without contexts: this figure is about its samples")
    if model.spec.num_levels is None or len(model.spec.flow.event_shape) != 3:
        raise ValueError(f"{run.folder} holds a density of other data than images of integer levels: this figure shows images")
    train = run.data.examples["train"]
    rows, strips = [], {}
    for pair in range(NUM_PAIRS):  # nothing is selected: pairs and samples are the first
        own, images = _interpolated(model, test[2 * pair : 2 * pair + 2], pair + 1)
        rows, strips = rows + own, strips | images
    samples = np.zeros(0)
    for temperature in TEMPERATURES:
        drawn, info = model.sample(jax.random.key(0), NUM_SAMPLES, temperature=temperature)
        samples = np.asarray(drawn)
        strips[f"samples, temperature {temperature:g}"] = samples
        bits = _bits(model, samples)
        rows.append(_row("samples", f"temperature {temperature:g}", bits.mean(), bits.std(ddof=1) / np.sqrt(len(bits))))
        rows[-1]["converged"] = float(np.mean(info.converged))
    compared = {"samples": samples, "test images": test[:NUM_COMPARED]}
    for name, images in compared.items():
        nearest, distance = nearest_images(images, train, model.spec.num_levels)
        rows.append(_row("nearest", name, np.nan, np.nan) | {"distance": float(np.median(distance))})
        if name == "samples":
            strips["nearest training images"] = train[nearest]
    shown = {name: images[:NUM_STEPS] / (model.spec.num_levels - 1) for name, images in strips.items()}
    return Drawing(draw(rows, shown), rows)


def _row(kind: str, name: str, bits: float, stderr: float) -> dict[str, Any]:
    """A row: ``step`` from 0 to 1 of an interpolation, ``distance`` in pixel values of [0, 1], Euclidean."""
    empty = {"step": np.nan, "bits_per_dim": bits, "stderr_bits_per_dim": stderr, "converged": np.nan, "distance": np.nan}
    return {"kind": kind, "name": name, **empty}


def _bits(model: Density, levels: Images) -> Float[np.ndarray, " n"]:
    return -np.asarray(model.log_prob(levels, jax.random.key(0)), np.float64) * model.spec.unit_of_a_nat


def _interpolated(model: Density, ends: Images, pair: int) -> tuple[list[dict[str, Any]], dict[str, Images]]:
    """Images between two, on a straight line of latents and on one of pixels, and the likelihood of each.

    ``distance`` is that to the nearer end: it shows that the line of latents begins and ends at the images.
    """
    assert model.spec.num_levels is not None
    share = np.linspace(0.0, 1.0, NUM_STEPS)
    z = np.asarray(model.encode(ends))
    of_latents, info = model.decode(jnp.asarray((1 - share)[:, None] * z[:1] + share[:, None] * z[1:], z.dtype))
    weights = share[:, None, None, None]
    of_pixels = np.rint((1 - weights) * ends[:1] + weights * ends[1:]).astype(ends.dtype)
    lines = {"latents": np.asarray(of_latents), "pixels": of_pixels}
    rows = []
    for name, images in lines.items():
        _, distance = nearest_images(images, ends, model.spec.num_levels)
        for step, bits, away, converged in zip(share, _bits(model, images), distance, np.asarray(info.converged), strict=True):
            row = _row(LINE, f"pair {pair}, {name}", float(bits), np.nan) | {"step": float(step)}
            known = float(converged) if name == "latents" else np.nan
            rows.append(row | {"distance": float(away), "converged": known})
    return rows, {f"pair {pair}, {name}": images for name, images in lines.items()}


def nearest_images(images: Images, among: Images, num_levels: int) -> tuple[Num[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """Which of other images is nearest to each, and its Euclidean distance, of pixels in [0, 1]."""
    flat, others = (given.reshape(len(given), -1).astype(np.float64) for given in (images, among))
    squares = np.square(flat).sum(axis=1)[:, None] - 2 * flat @ others.T + np.square(others).sum(axis=1)[None]
    places = squares.argmin(axis=1)
    return places, np.linalg.norm(flat - others[places], axis=1) / (num_levels - 1)


def draw(rows: Sequence[Row], strips: Mapping[str, Float[np.ndarray, "_ h w c"]]) -> Any:
    """A line of images for each, with the bits/dim of those between two others below them."""
    height, width = next(iter(strips.values())).shape[1:3]
    bits: dict[str, list[str]] = {name: [] for name in strips}
    for row in rows:
        if row["kind"] == LINE:
            bits[row["name"]].append(f"{row['bits_per_dim']:.2f}")
    size = (style.PAGE_WIDTH - 2.0) / max(map(len, strips.values())) * height / width
    figure = style.figure(width=style.PAGE_WIDTH, height=len(strips) * size + 0.2 * sum(map(bool, bits.values())))
    for axes, (name, images) in zip(figure.subplots(len(strips), 1, squeeze=False).flat, strips.items(), strict=True):
        style.strip(axes, images, f"{name}\n[bits/dim]" if bits[name] else name, captions=bits[name])
    return figure
