"""The page of a report: every number shown, nothing loaded, nothing unescaped, nothing empty, nothing claimed too strongly."""

import base64
import dataclasses
import doctest
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from reports import EXACT, POINTS, REPORT, block, changed

from iresnet_jax.evaluation.guarantee import InverseGuarantee
from iresnet_jax.report import page
from iresnet_jax.report.page import MINUS

VOID = {"meta", "img", "br", "hr", "link", "input"}
PIXEL = "data:image/png;base64," + base64.b64encode(b"pixel").decode()
TIMES = "\N{MULTIPLICATION SIGN}"
FIGURES = (
    *("learning_curves", "confusion", "mistakes", "samples", "samples_by_class", "density", "likelihoods"),
    *("posterior_pairs", "ranks", "reconstructions", "error_histogram", "lipschitz"),
)
SHOWN = {
    "likelihood": (
        *("1.0623 ± 0.0021", "0.0020", "0.00055", "0.00038", "0.0021", "≤ 0.00031", "9,973", "37", "53"),
        "power series of 20 terms",
    ),
    "classification": ("4.71 %", "157", "3,333", "3.89", "5.68", "95 %", "0.1739"),
    "points": ("6173", f"{MINUS}27.31", "entry 14: 8.46 (+5.8)", f"entry 9: {MINUS}3.19 ({MINUS}4.3)", "points.npy"),
    "calibration": ("p = 0.32", "81", "77"),
    "inverse": (
        *(f"3.4 {TIMES} 10⁻⁶", f"8.1 {TIMES} 10⁻⁶", f"1.9 {TIMES} 10⁻⁵", f"6.4 {TIMES} 10⁻⁷", "100 %", "23.4"),
        *(f"4.6 {TIMES} 10⁻¹⁴", f"5.3 {TIMES} 10⁻¹⁴", f"7.6 {TIMES} 10⁻¹³", "35.8"),
    ),
    "lipschitz": (
        *("0.9117", "0.8913", "0.9008", "0.7867", "0.8041", "0.8312", "0.7012", "0.6543", "0.7243"),
        *("block_1/conv_out", "2.97", "13.2"),
    ),
    "train": ("4,321", "183 ms", "48.2 s", "2 h 3 min", "2 h 5 min"),
    "environment": ("2 x cpu", "0.10.2", "3f9c2ab", "jaxlib"),
    "config": ("seed", "29", "61, 67", "kind"),
    "references": ("Glow", "1.05", "+0.012"),
}
PARTS = ("likelihood", "points", "calibration", "classification", "samples", "inverse", "lipschitz")


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


def render(report=REPORT, figures=None, references=None, title="A run"):
    return page.render(report, figures or {}, title=title, references=references)


def read(*arguments, **options):
    return Reader(render(*arguments, **options))


def shows(words, text):
    """Whether a text stands there, and not as a part of a longer word or number."""
    return re.search(rf"(?<![\w.,]){re.escape(text)}(?!\w|[.,]\d)", words) is not None


def test_the_reader_rejects_broken_markup_and_parts_of_other_numbers():
    for broken in ("<p><b>x</p></b>", "<div><p>x</p>", "</p>", '<p id="a" id="b">x</p>'):
        with pytest.raises(AssertionError):
            Reader(broken)
    words = "0.9117 1.05 2,300"
    assert not any(shows(words, part) for part in ("11", "17", "05", "0.911", "300", "2", "1"))
    assert all(shows(words, part) for part in words.split())


def test_every_number_of_the_report_is_on_the_page():
    words = read(references={"Glow": 1.05}).words
    assert [text for texts in SHOWN.values() for text in texts if not shows(words, text)] == []


@pytest.mark.parametrize("part", PARTS)
def test_a_part_that_a_model_does_not_have_leaves_no_trace(part):
    others = {text for name, texts in SHOWN.items() if name not in (part, "references") for text in texts}
    words = read(dataclasses.replace(REPORT, **{part: None})).words
    assert [text for text in SHOWN.get(part, ()) if text not in others and shows(words, text)] == []
    assert [text for text in others if not shows(words, text)] == []


def test_no_section_is_empty():
    bare = dataclasses.replace(REPORT, **{**dict.fromkeys(PARTS), "likelihood": EXACT})
    for report, figures in ((bare, {}), (REPORT, {}), (REPORT, dict.fromkeys(FIGURES, PIXEL))):
        reader = read(report, figures)
        assert all(re.sub(r"\s|<h2>.*?</h2>", "", section) for section in sections(report, figures).values())
        assert [target[1:] for target in reader.targets if target.startswith("#")] == reader.ids
    assert set(sections(bare)) == {"result", "time", "environment", "configuration"}
    assert set(sections(REPORT, {"samples": PIXEL})) >= {"samples", "inversion", "lipschitz-constants"}
    shown = list(sections(REPORT, dict.fromkeys(("confusion", "learning_curves", "samples"), PIXEL)))
    assert shown.index("mistakes") < shown.index("samples") < shown.index("learning-curves")


def sections(report, figures=None):
    """The markup of every section by its id."""
    return dict(re.findall(r'<section id="([\w-]+)">(.*?)</section>', render(report, figures), flags=re.DOTALL))


def test_a_likelihood_is_shown_in_its_unit_beside_its_entropy_or_with_its_check():
    words = read(dataclasses.replace(REPORT, likelihood=POINTS, classification=None)).words
    assert "2.8714 ± 0.0061" in words
    assert "nats" in words
    assert "bits" not in words
    assert re.search(r"entropy of the data 2\.832 \+0\.039", words)
    words = read(dataclasses.replace(REPORT, likelihood=EXACT)).words
    assert "Log-determinant: exact log-determinant" in words
    assert all(shows(words, text) for text in ("z = +1.27", "1.0651", "0.0012", "roulette of 7 terms"))
    assert "Truncation bound" not in words
    assert "log-det probes" not in words


def test_the_page_loads_nothing():
    reader = read(figures=dict.fromkeys(FIGURES, PIXEL))
    assert len(reader.images) == len(FIGURES)
    assert all(target.startswith(("data:image/", "#")) for target in reader.targets)
    assert not re.search(r"url\(|@import|https?:", "".join(reader.styles))
    assert "--accent" in "".join(reader.styles)
    assert all(len(image["alt"]) > 10 for image in reader.images)


EVIL = '<script>alert("&")</script>'
INJECTED = {
    "notes": dataclasses.replace(REPORT, notes=(EVIL,)),
    "estimator": changed("likelihood", estimator=EVIL),
    "environment": changed("environment", jax=EVIL),
    "setting": dataclasses.replace(REPORT, config={"seed": EVIL}),
    "name of a setting": dataclasses.replace(REPORT, config={EVIL: {"seed": 1}}),
    "block": changed("lipschitz", blocks=(block(EVIL),)),
}


@pytest.mark.parametrize("place", INJECTED)
def test_text_is_escaped(place):
    text = render(INJECTED[place])
    assert "<script" not in text
    assert EVIL in Reader(text).words  # shown as written, not dropped


def test_title_references_and_figures_are_escaped():
    text = render(figures={"samples": 'data:image/png,"><b>'}, title=EVIL, references={EVIL: 1.0})
    assert "<script" not in text
    assert Reader(text).words.count(EVIL) == 3  # title, heading, reference
    assert Reader(text).images[0]["src"] == 'data:image/png,"><b>'


def grounds(report):
    """The badges of the tiles, by the tiles' names."""
    return dict(re.findall(r'<div class="tile"><h3>(.*?)</h3>.*?class="badge (\w+)"', render(report), re.DOTALL))


def test_a_bound_is_only_called_guaranteed_when_every_block_is_certified():
    assert grounds(REPORT) == {
        "Test bits per dimension": "estimated",
        "Truncation bound": "guaranteed",
        "Calibration": "estimated",
        "Test error": "measured",
        "Cross-entropy": "measured",
        "Inversion error": "measured",
        "Largest Lipschitz constant": "guaranteed",
    }
    assert "(guaranteed, up to rounding)" in read().words
    for bound in (1.03, math.nan, math.inf):
        report = changed("lipschitz", blocks=(block("a"), block("b", bound=bound)))
        assert grounds(report)["Truncation bound"] == "conditional"
        assert grounds(report)["Largest Lipschitz constant"] == ("guaranteed" if bound == 1.03 else "estimated")
        words = read(report).words
        assert "if the estimated Lipschitz constants are right" in words
        assert "every block is invertible" not in words
        assert "(not below 1)" in words
    report = changed("lipschitz", blocks=(block("a"), dataclasses.replace(block("b"), word="user")))
    assert grounds(report)["Truncation bound"] == grounds(report)["Largest Lipschitz constant"] == "conditional"
    assert "user's word for 1 of 2 blocks" in read(report).words
    assert grounds(dataclasses.replace(REPORT, likelihood=POINTS, lipschitz=None))["Truncation bound"] == "guaranteed"
    assert "No bound holds" in read(changed("inverse", max_error_bound=math.inf)).words


def test_the_guaranteed_error_of_the_whole_flow_stands_in_place_of_the_product():
    found = InverseGuarantee(32, 32, 2.3e-6, 7.7e-6, 1.9e-6, 6.1e-6, 0.98, max_error=3.1e-6)
    words = read(changed("inverse", guarantee=found)).words
    for text in (
        f"7.7 {TIMES} 10⁻⁶ of the exact one",
        f"of given latents 7.7 {TIMES} 10⁻⁶",
        f"6.1 {TIMES} 10⁻⁶",
    ):
        assert text in words
    assert f"its measured counterpart 3.1 {TIMES} 10⁻⁶" in words  # the errors of round trips are other ones
    assert "levels that are certain 98" in words
    assert "The residual of the solver bounds" not in words
    jumps = dataclasses.replace(found, num_applied=0, reason="slopes of relu jump")
    for guarantee in (jumps, InverseGuarantee(reason="the weights are not certified")):
        assert f"The whole flow has no better bound: {guarantee.reason}." in read(changed("inverse", guarantee=guarantee)).words


def test_warnings_come_first():
    report = dataclasses.replace(changed("likelihood", mean=math.nan), notes=("Validation was still falling.",))
    before = render(report).partition("<section")[0]
    assert "Validation was still falling." in before
    assert "The likelihood is not finite." in before
    assert "<aside" not in render()


def test_many_blocks_are_folded_and_what_was_not_recorded_is_said():
    assert "<details open><summary>Every block (2)</summary>" in render()
    times = dataclasses.replace(REPORT.train, seconds_per_step=None, compile_seconds=None)
    report = changed("lipschitz", blocks=tuple(block(f"b{i}") for i in range(48)))
    report = dataclasses.replace(report, train=times, environment=dataclasses.replace(REPORT.environment, commit=None))
    assert "<details><summary>Every block (48)</summary>" in render(report)
    words = read(report).words
    assert "time per step not recorded compilation not recorded" in words
    assert "commit" not in words


@pytest.mark.parametrize(
    ("mean", "stderr", "text"),
    [
        (3.45178, 0.0123, "3.452 ± 0.012"),
        (3.45178, 0.0996, "3.45 ± 0.10"),  # rounds up into the next digit
        (1234.5, 21.0, "1,234 ± 21"),
        (-0.5, 0.1, f"{MINUS}0.50 ± 0.10"),
        (2.0, 0.0, "2.000"),
        (2.0, None, "2.000"),
        (2.0, math.nan, "2.000 ± not a number"),
        (math.inf, 0.1, "∞ ± 0.10"),
        (1.0, 3.2e-12, f"1.00000000 ± 3.2 {TIMES} 10⁻¹²"),
    ],
)
def test_digits_follow_the_uncertainty(mean, stderr, text):
    assert page.uncertain(mean, stderr) == text


def test_numbers_of_any_kind_are_written():
    values = [np.int64(70000), np.float32(0.25), 0.0, -2.5e-9, 123456.0, math.nan, -math.inf, None]
    assert [page.number(v, 3) for v in values] == [
        *("70,000", "0.250", "0", f"{MINUS}2.50 {TIMES} 10⁻⁹", f"1.23 {TIMES} 10⁵", "not a number", f"{MINUS}∞", "not recorded")
    ]
    seconds = [2.5e-5, 0.9994, 59.94, 59.96, 3599.9, 360000.0, None]
    assert [page.duration(s) for s in seconds] == [
        *("25.0 µs", "999 ms", "59.9 s", "1 min 0 s", "1 h 0 min", "100 h 0 min", "not recorded")
    ]
    failed, attempted = doctest.testmod(page)
    assert (failed, attempted) == (0, 4)
