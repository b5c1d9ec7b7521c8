"""The report page and its figures: every number shown, nothing loaded, nothing unescaped, nothing claimed too strongly."""

import base64
import copy
import doctest
import io
import math
import re
import sys
import threading
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
from PIL import Image

from iresnet_jax.report import markup, page, plots, style

VOID = {"meta", "img", "br", "hr", "link", "input"}
PIXEL = "data:image/png;base64," + base64.b64encode(b"pixel").decode()


def block(name, *, estimate=0.7012, bound: float | None = 0.7243):
    layers = {
        "conv_in": {"target": 0.9117, "estimate": 0.8913, "bound": 0.9008},
        "conv_out": {"target": None, "estimate": 0.7867, "bound": None},
    }
    return {"name": name, "target": 0.8312, "layers": layers, "estimate": estimate, "bound": bound}


REPORT = {
    "bits_per_dim": {
        "mean": 1.062314,
        "stderr": 0.00213,
        "stderr_data": 0.00202,
        "stderr_probes": 0.00055,
        "stderr_dequantisation": 0.00038,
        "truncation_bound": 3.14e-4,
        "num_examples": 9973,
        "num_probes": 37,
        "num_dequantisations": 11,
        "estimator": "power series of 20 terms",
    },
    "inverse": {
        "max_abs_error": 3.42e-6,
        "max_error_bound": 1.94e-5,
        "fraction_within_bound": 1.0,
        "fraction_converged": 1.0,
        "mean_evals": 23.44,
        "refined": {"max_error_bound": 7.63e-13, "fraction_within_bound": 1.0, "mean_evals": 35.79},
    },
    "lipschitz": {
        "max_block": 0.7243,
        "model_bounds": {"forward": 2.974, "inverse": 13.16},
        "blocks": [block("block_0"), block("block_1", estimate=0.6543)],
    },
    "train": {"steps": 4321, "seconds_per_step": 0.1832, "compile_seconds": 48.21, "total_seconds": 7384.0},
    "environment": {"jax": "0.10.2", "devices": ["cpu:0", "cpu:1"], "commit": "3f9c2ab"},
    "config": {"seed": 17, "model": {"widths": (61, 67), "head": {"kind": "none"}}, "reference": {"Glow": 1.05}},
    "warnings": ["Validation was still falling."],
}
SHOWN = [
    *("1.0623 ± 0.0021", "0.0020", "0.00055", "0.00038", "0.00031", "9,973", "37", "11", "power series of 20 terms"),
    *(
        "3.4 \N{MULTIPLICATION SIGN} 10⁻⁶",
        "1.9 \N{MULTIPLICATION SIGN} 10⁻⁵",
        "100 %",
        "23.4",
        "7.6 \N{MULTIPLICATION SIGN} 10⁻¹³",
        "35.8",
    ),
    *("0.9117", "0.8913", "0.9008", "0.7867", "0.8312", "0.7012", "0.6543", "0.7243", "block_1/conv_out", "2.97", "13.2"),
    *("4,321", "183 ms", "48.2 s", "2 h 3 min"),
    *("0.10.2", "cpu:0, cpu:1", "3f9c2ab", "seed", "17", "61, 67", "kind", "Glow", "1.05", "+0.012"),
    "Validation was still falling.",
]


class Reader(HTMLParser):
    """Checks that every element closes where it must, and collects the text, the ids and what would be loaded."""

    def __init__(self, markup_text):
        super().__init__()
        self.open, self.text, self.ids, self.targets, self.images, self.styles = [], [], [], [], [], []
        self.feed(markup_text)
        self.close()
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        assert len(attributes) == len(attrs), f"repeated attribute in <{tag}>"
        self.targets += [attributes[name] for name in ("src", "href", "srcset", "action", "data") if name in attributes]
        self.ids += [attributes["id"]] if "id" in attributes else []
        self.images += [attributes] if tag == "img" else []
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag, f"</{tag}> is out of place"

    def handle_data(self, data):
        (self.styles if self.open and self.open[-1] == "style" else self.text).append(data)

    @property
    def words(self):
        return " ".join(" ".join(self.text).split())


def read(report, figures=None, title="A run"):
    return Reader(page.render(report, figures or {}, title=title))


def changed(path, value):
    """The report with one entry replaced."""
    report = copy.deepcopy(REPORT)
    *parents, last = path.split(".")
    target: Any = report
    for name in parents:
        target = target[int(name)] if isinstance(target, list) else target[name]
    target[last] = value
    return report


def test_the_reader_rejects_broken_markup():
    for broken in ("<p><b>x</p></b>", "<div><p>x</p>", "</p>", '<p id="a" id="b">x</p>'):
        with pytest.raises(AssertionError):
            Reader(broken)


@pytest.mark.parametrize("number", SHOWN)
def test_every_number_of_the_report_is_on_the_page(number):
    assert number in read(REPORT).words


def test_a_toy_report_is_in_nats_beside_its_entropy():
    words = read({"nll": {"mean": 2.8714, "stderr": 0.0061}, "entropy_floor": 2.832}).words
    assert "2.8714 ± 0.0061" in words
    assert "nats" in words
    assert "bits" not in words
    assert re.search(r"entropy floor 2\.832 \+0\.039", words)
    assert "this is a bug" not in words


def test_the_page_loads_nothing():
    reader = read(REPORT, dict.fromkeys([*page.FIGURES, "an_extra_one"], PIXEL))
    assert len(reader.images) == len(page.FIGURES) + 1
    assert all(target.startswith(("data:image/", "#")) for target in reader.targets)
    assert not re.search(r"url\(|@import|https?:", "".join(reader.styles))
    links = [target[1:] for target in reader.targets if target.startswith("#")]
    assert links == reader.ids  # every section is linked, in order, and every link leads somewhere
    with pytest.raises(ValueError, match=r"figure 'samples' must be an image data URI, got 'http://x/y.png'"):
        page.render({}, {"samples": "http://x/y.png"}, title="A run")


def test_every_image_says_what_it_shows():
    reader = read(REPORT, dict.fromkeys([*page.FIGURES, "an_extra_one"], PIXEL))
    assert all(len(image["alt"]) > 10 for image in reader.images)
    assert "an extra one" in reader.words


@pytest.mark.parametrize(
    "path", ["warnings", "bits_per_dim.estimator", "environment.jax", "config.seed", "lipschitz.blocks.0.name"]
)
def test_text_is_escaped(path):
    evil = '<script>alert("&")</script>'
    text = page.render(changed(path, [evil] if path == "warnings" else evil), {"a<b": PIXEL}, title=evil)
    assert "<script" not in text
    assert evil in Reader(text).words  # shown as written, not dropped
    assert markup.tag("p", evil) == "<p>&lt;script&gt;alert(&quot;&amp;&quot;)&lt;/script&gt;</p>"
    assert markup.tag("a", "x", href='"><b>') == '<a href="&quot;&gt;&lt;b&gt;">x</a>'


def test_an_empty_report_says_what_is_missing():
    words = read({}).words
    for sentence in (
        "The likelihood of the test data has not been evaluated yet.",
        "No training or validation records yet.",
        "No samples were drawn.",
        "The inverse has not been evaluated.",
        "The Lipschitz constants have not been measured.",
        "No training times were recorded.",
        "The environment was not recorded.",
        "The configuration was not recorded.",
    ):
        assert sentence in words


@pytest.mark.parametrize("key", sorted(REPORT))
def test_any_part_may_be_missing_or_empty(key):
    rest = {name: value for name, value in REPORT.items() if name != key}
    for report in (rest, rest | {key: type(REPORT[key])()}):
        assert "A run" in read(report).words
    alone = read({key: REPORT[key]}).words
    assert "A run" in alone


def test_a_bound_is_only_called_guaranteed_when_every_block_is_certified():
    badges = re.compile(r'class="badge (\w+)"')

    def tiles(report):
        return badges.findall(page.render(report, {}, title="A run").partition("<footer>")[0])

    assert tiles(REPORT) == ["estimated", "guaranteed", "measured", "guaranteed"]
    assert tiles(changed("lipschitz.blocks", [block("a"), block("b", bound=None)])) == [
        *("estimated", "conditional", "measured", "estimated")
    ]
    assert "if the estimated Lipschitz constants are right" in read(changed("lipschitz.blocks", [])).words
    assert tiles({"bits_per_dim": {"mean": 1.0, "truncation_bound": 0.0}}) == ["estimated", "guaranteed"]


@pytest.mark.parametrize(
    ("report", "sentence"),
    [
        ({"nll": {"mean": 2.70, "stderr": 0.01}, "entropy_floor": 2.832}, "below the entropy of the data"),
        (changed("bits_per_dim.mean", math.nan), "The likelihood is not finite."),
        (changed("inverse.max_abs_error", 2e-5), "exceeds its bound"),
        (changed("inverse.max_abs_error", math.nan), "exceeds its bound"),
        (changed("inverse.fraction_converged", 0.96), "did not converge for 4 % of the examples"),
        (changed("inverse.refined.fraction_within_bound", 0.97), "3 % of the inversion errors in float64 exceed their bound"),
        (changed("lipschitz.blocks", [block("b3", estimate=1.02, bound=None)]), "b3: Lipschitz estimate 1.020 is not below 1"),
        (changed("lipschitz.blocks", [block("b3", bound=1.03)]), "b3: certified bound 1.030 is not below 1"),
        (changed("lipschitz.blocks", [block("b3", bound=0.69)]), "the estimate 0.7012 exceeds the certified bound 0.6900"),
    ],
)
def test_contradictions_are_stated_first(report, sentence):
    def first(report):
        return Reader(
            page.render(report, {}, title="A run").partition("<aside")[2].partition(">")[2].partition("</aside>")[0]
        ).words

    assert sentence in first(report)
    assert sentence not in first(REPORT)


def test_many_blocks_are_folded():
    folded = page.render(changed("lipschitz.blocks", [block(f"b{i}") for i in range(48)]), {}, title="A run")
    assert "<details><summary>Every block (48)</summary>" in folded
    assert "<details open><summary>Every block (2)</summary>" in page.render(REPORT, {}, title="A run")


@pytest.mark.parametrize(
    ("mean", "stderr", "text"),
    [
        (3.45178, 0.0123, "3.452 ± 0.012"),
        (3.45178, 0.0996, "3.45 ± 0.10"),  # rounds up into the next digit
        (1234.5, 21.0, "1,234 ± 21"),
        (-0.5, 0.1, "\N{MINUS SIGN}0.50 ± 0.10"),
        (2.0, 0.0, "2.000"),
        (2.0, None, "2.000"),
        (2.0, math.nan, "2.000 ± not a number"),
        (math.inf, 0.1, "∞ ± 0.10"),
        (1.0, 3.2e-12, "1.00000000 ± 3.2 \N{MULTIPLICATION SIGN} 10⁻¹²"),
    ],
)
def test_digits_follow_the_uncertainty(mean, stderr, text):
    assert markup.uncertain(mean, stderr) == text


def test_numbers_of_any_kind_are_written():
    values = [np.int64(70000), np.float32(0.25), 0.0, -2.5e-9, 123456.0, math.nan, -math.inf, None]
    assert [markup.number(v, 3) for v in values] == [
        *(
            "70,000",
            "0.250",
            "0",
            "\N{MINUS SIGN}2.50 \N{MULTIPLICATION SIGN} 10⁻⁹",
            "1.23 \N{MULTIPLICATION SIGN} 10⁵",
            "not a number",
            "\N{MINUS SIGN}∞",
            "not recorded",
        )
    ]
    seconds = [2.5e-5, 0.9994, 59.94, 59.96, 3599.9, 360000.0, None]
    assert [markup.duration(s) for s in seconds] == [
        *("25.0 µs", "999 ms", "59.9 s", "1 min 0 s", "1 h 0 min", "100 h 0 min", "not recorded")
    ]


@pytest.mark.parametrize("module", [markup, page, plots, style])
def test_the_examples_of_the_documentation_run(module):
    failed, attempted = doctest.testmod(module)
    assert attempted
    assert not failed


# Figures


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
    "image_grid": lambda: plots.image_grid(DIGITS.astype(np.float32), columns=4),
    "image_grid_rgb": lambda: plots.image_grid(RNG.integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)),
    "reconstruction_pairs": lambda: plots.reconstruction_pairs(DIGITS, DIGITS + 1e-6, np.full(6, 1e-6)),
    "lipschitz_bars": lambda: plots.lipschitz_bars(["a", "b"], [0.7, 0.6], [0.75, None], target=0.729),
    "density_map": lambda: plots.density_map(-(GRID_X**2) - GRID_Y**2, (-3, 3, -3, 3), RNG.normal(size=(50, 2))),
    "scatter": lambda: plots.scatter(RNG.normal(size=(500, 2))),
    "error_histogram": lambda: plots.error_histogram(RNG.uniform(1e-7, 1e-6, 200), np.full(200, 1e-5)),
}
PICTURES = {"image_grid", "image_grid_rgb", "reconstruction_pairs", "density_map"}


def decode(uri):
    return base64.b64decode(uri.partition(";base64,")[2])


@pytest.mark.parametrize("name", sorted(FIGURES))
def test_a_figure_draws_something_of_a_readable_size(name):
    figure = FIGURES[name]()
    width, height = figure.get_size_inches()
    assert 1.0 <= width <= 12.0
    assert 0.5 <= height <= 8.0
    uri = plots.to_svg_or_png(figure)
    assert uri.startswith("data:image/png;" if name in PICTURES else "data:image/svg+xml;")
    assert len(decode(uri)) <= 200_000
    pixels = np.asarray(Image.open(io.BytesIO(style._save(figure, "png", dpi=60, ground="white"))).convert("L"))
    assert (pixels < 240).mean() > 0.005  # an empty figure is all white, as the next test shows
    assert pixels.std() > 5.0


def test_an_empty_figure_would_be_noticed():
    empty = style.figure(width=4.0, height=3.0)
    pixels = np.asarray(Image.open(io.BytesIO(style._save(empty, "png", dpi=60, ground="white"))).convert("L"))
    assert (pixels < 240).mean() == 0.0


def test_svg_text_follows_the_colour_scheme_and_large_figures_become_png():
    figure = FIGURES["learning_curves"]()
    svg = decode(plots.to_svg_or_png(figure)).decode()
    assert "prefers-color-scheme:dark" in svg
    assert style.INK not in svg.partition("</style>")[2]
    assert "currentColor" in svg
    fallback = decode(plots.to_svg_or_png(figure, max_bytes=20_000))
    image = Image.open(io.BytesIO(fallback)).convert("RGBA")
    assert image.getpixel((0, 0)) == (255, 255, 255, 255)  # dark ink needs a light ground


def test_the_page_of_a_long_run_stays_small():
    long = [{k: v + RNG.normal() if k == "log_det" else v for k, v in line.items()} for line in records(20_000)]
    images = RNG.integers(0, 256, (64, 32, 32, 3), dtype=np.uint8)  # noise: the worst case for compression
    names = [f"scale_{i // 16}/block_{i}" for i in range(48)]
    drawn = {
        "learning_curves": plots.learning_curves(long),
        "samples": plots.image_grid(images),
        "lipschitz": plots.lipschitz_bars(names, [0.7] * 48, [0.72] * 48, target=0.729),
        "error_histogram": FIGURES["error_histogram"](),
        "reconstructions": plots.reconstruction_pairs(images[:8], images[:8], np.zeros(8)),
    }
    text = page.render(REPORT, {name: plots.to_svg_or_png(figure) for name, figure in drawn.items()}, title="A run")
    assert len(text.encode()) < 1_500_000


def test_learning_curves_show_what_was_logged():
    figure = plots.learning_curves(records(), 200)
    by_step, by_time, *panels = figure.axes
    assert by_step.get_title(loc="left") == "evaluated: step 200, validation 0.045"
    assert not plots.learning_curves(records(), 250).axes[0].get_title(loc="left")
    assert by_time.get_xlabel() == "wall-clock time [min]"
    assert [axes.get_title(loc="left") for axes in panels] == ["log det", "gradient norm"]
    validation = next(line for line in by_step.lines if line.get_label() == "validation")
    np.testing.assert_array_equal(validation.get_xdata(), [100, 200, 300])
    np.testing.assert_array_equal(validation.get_ydata(), [9 / 100, 9 / 200, 9 / 300])
    median = next(line for line in by_step.lines if str(line.get_label()).startswith("train"))
    assert median.get_label() == "train (median of 5)"
    np.testing.assert_array_equal(np.asarray(median.get_data())[:, 0], [3.0, 8.0 / 3.0])  # steps 1..5


def test_learning_curves_survive_gaps_and_blow_ups():
    lines = [
        {"step": 2, "split": "train", "wall_time_s": 1.0, "nll": math.nan},
        {"step": 1, "split": "train", "wall_time_s": 0.5, "nll": 3.0, "grad_norm": math.inf, "note": "text"},
        {"step": 3, "split": "validation", "wall_time_s": None, "nll": 2.5},
    ]
    figure = plots.learning_curves(lines)
    assert figure.axes[0].get_ylabel() == "NLL [nats]"
    train = figure.axes[0].lines[0]
    np.testing.assert_array_equal(train.get_xdata(), [1, 2])
    np.testing.assert_array_equal(train.get_ydata(), [3.0, np.nan])
    assert plots.to_svg_or_png(figure)
    with pytest.raises(ValueError, match="hold none of bits_per_dim"):
        plots.learning_curves([{"step": 1}])


def test_images_of_other_channels_than_grey_and_rgb_are_shown_by_their_mean():
    images = np.zeros((1, 2, 2, 4), np.float32)
    images[..., 1] = 0.8
    [mosaic] = [np.asarray(plots.image_grid(images).axes[0].images[0].get_array())]
    np.testing.assert_allclose(mosaic[..., :3], 0.2, rtol=1e-6)


def test_an_image_grid_is_in_reading_order_with_clear_gaps():
    images = np.arange(3, dtype=np.float64).reshape(3, 1, 1, 1) / 2.0 * np.ones((1, 2, 2, 1))
    mosaic = np.asarray(plots.image_grid(images, columns=2).axes[0].images[0].get_array())
    assert mosaic.shape == (5, 5, 4)
    np.testing.assert_array_equal(mosaic[[0, 0, 3], [0, 3, 0], 0], [0.0, 0.5, 1.0])
    assert (mosaic[2] == 0).all()
    assert (mosaic[3:, 3:] == 0).all()
    images[1, 0, 0] = np.nan
    mosaic = np.asarray(plots.image_grid(images, columns=2).axes[0].images[0].get_array())
    np.testing.assert_array_equal(mosaic[0, 3, :3], plots.NOT_FINITE)


def test_reconstruction_maps_hold_the_true_difference():
    shifted = DIGITS.copy()
    shifted[2, 3, 4] += 1e-5
    figure = plots.reconstruction_pairs(DIGITS, shifted, np.full(6, np.nan))
    maps = np.stack([np.asarray(axes.images[0].get_array()) for axes in figure.axes[12:18]])
    expected = np.zeros((6, 8, 8))
    expected[2, 3, 4] = abs(shifted - DIGITS).max()
    np.testing.assert_array_equal(maps, expected)
    assert figure.axes[12].get_xlabel() == "not finite"


def test_figures_say_how_many_values_they_cannot_show():
    points = np.array([[0.0, 0.0], [np.nan, 1.0], [1.0, 1.0]])
    assert plots.scatter(points).axes[0].get_title(loc="left") == "1 of 3 samples are not finite"
    errors, bounds = np.array([0.0, 1e-6, np.inf, 1e-4]), np.full(4, 1e-5)
    title = plots.error_histogram(errors, bounds).axes[0].get_title(loc="left")
    assert title == "1 of 4 errors are not finite; 2 of 4 errors exceed their bound"
    counts = plots.error_histogram(np.zeros(3)).axes[0].patches
    assert len(counts) == 2  # exact inverses are drawn, too


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: plots.image_grid(DIGITS, columns=0), "columns must be at least 1, got 0"),
        (lambda: plots.image_grid(DIGITS * 255.0), r"must lie in \[0, 1\], got \[.*25"),
        (lambda: plots.image_grid(np.zeros((0, 4, 4, 1))), "at least one"),
        (lambda: plots.lipschitz_bars(["a"], [0.1, 0.2], target=0.9), "equally long and not empty, got 1, 2 and 1"),
        (lambda: plots.lipschitz_bars([], [], target=0.9), "not empty"),
        (lambda: plots.error_histogram(np.full(3, np.nan)), "none of the 3 errors is finite"),
    ],
)
def test_mistakes_are_explained(draw, message):
    with pytest.raises(ValueError, match=message):
        draw()


def test_figures_are_drawn_in_threads_and_leave_no_global_state(monkeypatch):
    monkeypatch.delitem(sys.modules, "matplotlib.pyplot", raising=False)  # which another test may have needed
    results = {}
    threads = [threading.Thread(target=lambda n=n: results.update({n: plots.to_svg_or_png(FIGURES[n]())})) for n in FIGURES]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(results) == set(FIGURES)
    assert "matplotlib.pyplot" not in sys.modules
