"""Figures: something is drawn, of the right values, small, readable on light and dark, and without global state."""

import base64
import dataclasses
import functools
import io
import itertools
import math
import sys
import threading

import numpy as np
import pytest
from PIL import Image
from reports import CALIBRATION, CERTIFICATE, block

from iresnet_jax.report import pictures, plots, style


def records(num_steps=300):
    lines = []
    for step in range(1, num_steps + 1):
        line = {"step": step, "wall_time_s": 2.0 * step, "bits_per_dim": 8.0 / step, "log_det": float(step), "grad_norm": 1.0}
        lines.append(line | {"split": "train"})
        if step % 100 == 0:
            lines.append({"step": step, "wall_time_s": 2.0 * step, "bits_per_dim": 9.0 / step, "split": "validation"})
    return lines


RNG = np.random.default_rng(0)
DIGITS = RNG.uniform(size=(6, 8, 8, 1))
GRID_X, GRID_Y = np.meshgrid(np.linspace(-3, 3, 40), np.linspace(-3, 3, 40))
FIGURES = {
    "learning_curves": lambda: plots.learning_curves(records()),
    "image_grid": lambda: pictures.image_grid(DIGITS.astype(np.float32), columns=4),
    "image_grid_rgb": lambda: pictures.image_grid(RNG.uniform(size=(5, 8, 8, 3))),
    "reconstruction_pairs": lambda: pictures.reconstruction_pairs(DIGITS, DIGITS + 1e-6),
    "lipschitz_bars": lambda: plots.lipschitz_bars(CERTIFICATE),
    "density_map": lambda: plots.density_map(-(GRID_X**2) - GRID_Y**2, (-3, 3, -3, 3)),
    "scatter": lambda: plots.scatter(RNG.normal(size=(500, 2))),
    "likelihoods": lambda: plots.likelihoods(RNG.normal(size=(300, 3)), RNG.normal(size=300), RNG.normal(size=200), [7, 9]),
    "error_histogram": lambda: plots.error_histogram(RNG.uniform(1e-7, 1e-6, 200), np.full(200, 1e-5)),
    "confusion_matrix": lambda: plots.confusion_matrix(RNG.integers(0, 3, (4, 4)) + 9 * np.eye(4, dtype=int)),
    "mistakes": lambda: pictures.examples(np.rint(16 * DIGITS).astype(np.uint8), 17, captions=[f"{i} as 0" for i in range(6)]),
    "pairs": lambda: plots.pairs(*RNG.normal(size=(2, 300, 3))),
    "posterior_pairs": lambda: plots.posterior_pairs(RNG.normal(size=(2, 300, 3)), RNG.normal(size=(2, 3))),
    "rank_histograms": lambda: plots.rank_histograms(CALIBRATION),
}
CHARTS = {"learning_curves", "lipschitz_bars", "scatter", "likelihoods", "error_histogram", "pairs"} | {
    "posterior_pairs",
    "rank_histograms",
}


@functools.cache
def drawn(name):
    """A figure, and its data URI as it goes into a page."""
    figure = FIGURES[name]()
    return figure, style.to_svg_or_png(figure)


def decode(uri):
    return base64.b64decode(uri.partition(";base64,")[2])


def ink(figure):
    """The fraction of pixels that are not white."""
    image = Image.open(io.BytesIO(style.rendered(figure, "png", dpi=30, ground="white"))).convert("L")
    return (np.asarray(image) < 240).mean()


@pytest.mark.parametrize("name", sorted(FIGURES))
def test_a_figure_draws_something_of_a_readable_size(name):
    figure, uri = drawn(name)
    width, height = figure.get_size_inches()
    assert 1.0 <= width <= 12.0
    assert 0.5 <= height <= 8.0
    assert uri.startswith("data:image/svg+xml;" if name in CHARTS else "data:image/png;")
    assert len(decode(uri)) <= 200_000
    assert ink(figure) > 0.005


def test_the_check_sees_an_empty_figure():
    assert ink(style.figure(width=4.0, height=3.0)) == 0


def test_svg_text_follows_the_colour_scheme_and_large_figures_become_png():
    svg = decode(drawn("lipschitz_bars")[1]).decode()
    assert "prefers-color-scheme:dark" in svg
    assert style.INK not in svg.partition("</style>")[2]
    assert "currentColor" in svg
    fallback = decode(style.to_svg_or_png(FIGURES["lipschitz_bars"](), max_bytes=10_000))
    image = Image.open(io.BytesIO(fallback)).convert("RGBA")
    assert image.getpixel((0, 0)) == (255, 255, 255, 255)  # dark ink needs a light ground


def test_figures_of_long_runs_and_of_noise_stay_small():
    long = [{k: v + RNG.normal() if k == "log_det" else v for k, v in line.items()} for line in records(6_000)]
    images = RNG.uniform(size=(64, 32, 32, 3))  # noise: the worst case for compression
    for figure in (plots.learning_curves(long), pictures.image_grid(images)):
        assert len(decode(style.to_svg_or_png(figure))) <= 300_000  # five of them and their base64 are less than 2 MB


def test_learning_curves_show_what_was_logged():
    by_step, by_time, *panels = plots.learning_curves(records(), 200).axes
    assert by_step.get_title(loc="left") == "evaluated: step 200, validation 0.045"
    assert by_time.get_xlabel() == "wall-clock time [min]"
    assert [axes.get_title(loc="left") for axes in panels] == ["log det", "gradient norm"]
    validation = next(line for line in by_step.lines if line.get_label() == "validation")
    np.testing.assert_array_equal(validation.get_data(), [[100, 200, 300], [9 / 100, 9 / 200, 9 / 300]])
    median = next(line for line in by_step.lines if str(line.get_label()).startswith("train"))
    assert median.get_label() == "train (median of 5)"
    np.testing.assert_array_equal(np.asarray(median.get_data())[:, 0], [3.0, 8.0 / 3.0])  # steps 1..5


def test_learning_curves_survive_gaps_and_blow_ups():
    lines = [
        {"step": 2, "split": "train", "wall_time_s": 1.0, "nll": math.nan},
        {"step": 1, "split": "train", "wall_time_s": 0.5, "nll": 3.0, "grad_norm": math.inf, "note": "text"},
        {"step": 3, "split": "validation", "wall_time_s": None, "nll": 2.5},
    ]
    first = plots.learning_curves(lines, 250).axes[0]
    assert (first.get_ylabel(), first.get_title(loc="left")) == ("NLL [nats]", "")
    np.testing.assert_array_equal(first.lines[0].get_data(), [[1, 2], [3.0, np.nan]])


def pixels_of(figure):
    return np.asarray(figure.axes[0].images[0].get_array())


def test_an_image_grid_is_in_reading_order_with_clear_gaps():
    images = np.arange(3, dtype=np.float64).reshape(3, 1, 1, 1) / 2.0 * np.ones((1, 2, 2, 1))
    mosaic = pixels_of(pictures.image_grid(images, columns=2))
    assert mosaic.shape == (5, 5, 4)
    np.testing.assert_array_equal(mosaic[[0, 0, 3], [0, 3, 0], 0], [0.0, 0.5, 1.0])
    assert (mosaic[2] == 0).all()
    assert (mosaic[3:, 3:] == 0).all()
    images[1, 0, 0] = np.nan
    np.testing.assert_array_equal(pixels_of(pictures.image_grid(images, columns=2))[0, 3, :3], pictures.NOT_FINITE)
    four_channels = np.zeros((1, 2, 2, 4), np.float32)
    four_channels[..., 1] = 0.8  # their mean is shown
    np.testing.assert_allclose(pixels_of(pictures.image_grid(four_channels))[..., :3], 0.2, rtol=1e-6)


def test_reconstruction_maps_hold_the_true_difference():
    shifted = DIGITS.copy()
    shifted[2, 3, 4] += 1e-5
    shifted[0, 0, 0] = np.nan
    figure = pictures.reconstruction_pairs(DIGITS, shifted)
    maps = np.stack([np.asarray(axes.images[0].get_array()) for axes in figure.axes[12:18]])
    expected = np.zeros((6, 8, 8))
    expected[0, 0, 0], expected[2, 3, 4] = np.nan, abs(shifted - DIGITS)[2].max()
    np.testing.assert_array_equal(maps, expected)
    assert [axes.get_xlabel() for axes in figure.axes[12:15]] == ["not finite", "0.0e+00", "1.0e-05"]  # units of the maps


def test_bars_are_the_estimates_and_diamonds_the_bounds_whatever_they_are():
    blocks = (block("a", estimate=0.6, bound=0.7), block("b", estimate=1.2, bound=1.5), block("c", bound=math.inf))
    [axes] = plots.lipschitz_bars(dataclasses.replace(CERTIFICATE, blocks=blocks)).axes
    assert [bar.get_height() for bar in axes.patches] == [0.6, 1.2, 0.7012]
    assert np.asarray(axes.collections[0].get_offsets())[:2, 1].tolist() == [0.7, 1.5]
    assert [line.get_ydata()[0] for line in axes.lines] == [0.8312, 1.0]
    assert axes.get_ylim() == (0.0, 1.04 * 1.5)
    free = tuple(dataclasses.replace(b, target=None) for b in blocks)
    assert len(plots.lipschitz_bars(dataclasses.replace(CERTIFICATE, blocks=free)).axes[0].lines) == 1


def test_likelihoods_are_drawn_in_the_entries_in_which_the_least_likely_are_furthest_out():
    data, log_prob = RNG.normal(size=(300, 4)), RNG.normal(size=300)
    data[[5, 8], 1], data[[5, 8], 3] = 9.0, -9.0
    log_prob[[5, 8]], log_prob[20] = -50.0, np.nan
    left, right, _ = plots.likelihoods(data, log_prob, np.array([0.0, 1.0, -np.inf]), [5, 8]).axes
    assert left.get_title(loc="left") == "2 likelihoods are not finite"
    assert (right.get_xlabel(), right.get_ylabel()) == ("entry 1", "entry 3")
    points, circles = right.collections[:2]
    assert len(np.asarray(points.get_offsets())) == 299
    np.testing.assert_array_equal(circles.get_offsets(), [[9.0, -9.0]] * 2)
    alone = plots.likelihoods(data[:, :1], log_prob, np.zeros(3), [5]).axes[1]
    assert (alone.get_xlabel(), alone.get_ylabel()) == ("entry 0", "log p [nats]")


def test_figures_say_how_many_values_they_cannot_show():
    points = np.array([[0.0, 0.0], [np.nan, 1.0], [1.0, 1.0]])
    assert plots.scatter(points).axes[0].get_title(loc="left") == "1 of 3 samples are not finite"
    errors, bounds = np.array([0.0, 1e-6, np.inf, 1e-4]), np.full(4, 1e-5)
    title = plots.error_histogram(errors, bounds).axes[0].get_title(loc="left")
    assert title == "1 of 4 errors are not finite; 2 of 4 errors exceed their bound"
    assert len(plots.error_histogram(np.zeros(3)).axes[0].patches) > 0  # exact inverses are drawn, too


def test_bars_of_errors_and_bounds_do_not_hide_each_other():
    errors = np.geomspace(1e-7, 1e-5, 200)
    [axes] = plots.error_histogram(errors, errors).axes
    bars = sorted((bar.get_x(), bar.get_x() + bar.get_width()) for bar in axes.patches if bar.get_height())
    assert len(bars) > 60
    assert all(end <= start * (1 + 1e-9) for (_, end), (start, _) in itertools.pairwise(bars))


def test_axes_of_curves_that_hardly_change_have_plain_numbers():
    lines = [{"step": s, "split": "train", "wall_time_s": s, "nll": 2 / s, "max_sigma": 0.9 + 1e-8 * s} for s in (1, 2, 3)]
    figure = plots.learning_curves(lines)
    style.rendered(figure, "png", dpi=30, ground="white")
    axes = figure.axes[2]
    assert axes.yaxis.get_offset_text().get_text() == ""
    assert max(len(label.get_text()) for label in axes.get_yticklabels()) <= 6


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: plots.learning_curves([{"step": 1}]), "hold none of bits_per_dim"),
    ],
)
def test_mistakes_are_explained(draw, message):
    with pytest.raises(ValueError, match=message):
        draw()


def test_figures_are_drawn_in_threads_and_leave_no_global_state(monkeypatch):
    monkeypatch.delitem(sys.modules, "matplotlib.pyplot", raising=False)  # which another test may have needed
    results = {}
    names = ("error_histogram", "image_grid", "scatter")
    threads = [threading.Thread(target=lambda n=n: results.update({n: style.to_svg_or_png(FIGURES[n]())})) for n in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(results) == set(names)
    assert "matplotlib.pyplot" not in sys.modules
