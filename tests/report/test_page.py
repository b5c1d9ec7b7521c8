"""The page of a report: every number shown, nothing loaded, nothing unescaped, nothing empty, nothing claimed too strongly."""

import base64
import dataclasses
import math
import re
from html.parser import HTMLParser

import pytest
from reports import EXACT, POINTS, REPORT, block, changed

from iresnet_jax.evaluation.guarantee import InverseGuarantee
from iresnet_jax.report import page
from iresnet_jax.report.page import MINUS

VOID = {"meta", "img", "br", "hr", "link", "input"}
PIXEL = "data:image/png;base64," + base64.b64encode(b"pixel").decode()
TIMES = "\N{MULTIPLICATION SIGN}"
FIGURES = (
    *("learning_curves", "confusion", "mistakes", "samples", "samples_by_class", "density", "likelihoods", "posteriors"),
    *("reconstructions", "error_histogram", "lipschitz"),
)
SHOWN = {
    "likelihood": (
        *("1.0623 ± 0.0021", "0.0020", "0.00055", "0.00038", "0.0021", "≤ 0.00031", "9,973", "37", "53"),
        "power series of 20 terms",
    ),
    "classification": ("4.71 %", "157", "3,333", "3.89", "5.68", "95 %", "0.1739"),
    "points": ("6173", f"{MINUS}27.31", "entry 14: 8.46 (+5.8)", f"entry 9: {MINUS}3.19 ({MINUS}4.3)", "points.npy"),
    "posterior": ("0.0237 ± 0.0034", "7,919", "823", "0.537 to 0.588", "0.562"),
    "inverse": (
        *(f"3.4 {TIMES} 10⁻⁶", f"8.1 {TIMES} 10⁻⁶", f"1.9 {TIMES} 10⁻⁵", f"6.4 {TIMES} 10⁻⁷", "100 %", "23.4"),
        *(f"4.6 {TIMES} 10⁻¹⁴", f"5.3 {TIMES} 10⁻¹⁴", f"7.6 {TIMES} 10⁻¹³", "35.8"),
    ),
    "lipschitz": (
        *("0.9117", "0.8913", "0.9008", "0.7867", "0.8041", "0.8312", "0.7012", "0.6543", "0.7243"),
        *("block_1/conv_out", "2.97", "13.2"),
    ),
    "train": ("4,321", "183 ms", "48.2 s", "2 h 3 min"),
    "environment": ("2 x cpu", "0.10.2", "3f9c2ab", "jaxlib"),
    "config": ("seed", "29", "61, 67", "kind"),
    "references": ("Glow", "1.05", "+0.012"),
}


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


def read(report=REPORT, figures=None, references=None):
    return Reader(page.render(report, figures or {}, title="A run", references=references))


def shows(words, text):
    """Whether a text stands there, and not as a part of a longer word or number."""
    return re.search(rf"(?<![\w.,]){re.escape(text)}(?!\w|[.,]\d)", words) is not None


def test_the_reader_rejects_broken_markup():
    for broken in ("<p><b>x</p></b>", "<div><p>x</p>", "</p>", '<p id="a" id="b">x</p>'):
        with pytest.raises(AssertionError):
            Reader(broken)


def test_a_part_of_another_number_does_not_count():
    words = "0.9117 1.05 2,300"
    assert not any(shows(words, part) for part in ("11", "17", "05", "0.911", "300", "2", "1"))
    assert all(shows(words, part) for part in words.split())


@pytest.mark.parametrize("part", SHOWN)
def test_every_number_of_the_report_is_on_the_page(part):
    words = read(references={"Glow": 1.05}).words
    assert [text for text in SHOWN[part] if not shows(words, text)] == []


PARTS = ("likelihood", "points", "posterior", "classification", "samples", "inverse", "lipschitz")


@pytest.mark.parametrize("part", PARTS)
def test_a_part_that_a_model_does_not_have_leaves_no_trace(part):
    others = {text for name, texts in SHOWN.items() if name != part for text in texts}
    reader = read(dataclasses.replace(REPORT, **{part: None}))
    assert [text for text in SHOWN.get(part, ()) if text not in others and shows(reader.words, text)] == []
    for other in set(SHOWN) - {part, "references"}:
        assert [text for text in SHOWN[other] if not shows(reader.words, text)] == []


def test_no_section_is_empty():
    bare = dataclasses.replace(REPORT, **{**dict.fromkeys(PARTS), "likelihood": EXACT})
    for report, figures in ((bare, {}), (REPORT, {}), (REPORT, dict.fromkeys(FIGURES, PIXEL))):
        reader = read(report, figures)
        assert all(re.sub(r"\s|<h2>.*?</h2>", "", section) for section in sections(report, figures).values())
        assert [target[1:] for target in reader.targets if target.startswith("#")] == reader.ids
    assert set(sections(bare)) == {"result", "time", "environment", "configuration"}
    assert set(sections(REPORT, {"samples": PIXEL})) >= {"samples", "inversion", "lipschitz-constants"}
    assert {"mistakes", "learning-curves"} <= set(sections(REPORT, {"confusion": PIXEL, "learning_curves": PIXEL}))


def sections(report, figures=None):
    """The markup of every section by its id."""
    text = page.render(report, figures or {}, title="A run")
    return dict(re.findall(r'<section id="([\w-]+)">(.*?)</section>', text, flags=re.DOTALL))


def test_the_page_of_a_toy_is_in_nats_beside_its_entropy():
    words = read(dataclasses.replace(REPORT, likelihood=POINTS, classification=None)).words
    assert "2.8714 ± 0.0061" in words
    assert "nats" in words
    assert "bits" not in words
    assert re.search(r"entropy of the data 2\.832 \+0\.039", words)
    assert "Read this first" not in words


def test_an_exact_likelihood_is_shown_with_its_check():
    words = read(dataclasses.replace(REPORT, likelihood=EXACT)).words
    assert "Log-determinant: exact log-determinant" in words
    assert all(shows(words, text) for text in ("z = +1.27", "1.0651", "0.0012"))
    assert "roulette of 7 terms" in words
    assert "Truncation bound" not in words
    assert "log-det probes" not in words


def test_the_page_loads_nothing():
    reader = read(figures=dict.fromkeys(FIGURES, PIXEL))
    assert len(reader.images) == len(FIGURES)
    assert all(target.startswith(("data:image/", "#")) for target in reader.targets)
    assert not re.search(r"url\(|@import|https?:", "".join(reader.styles))
    assert "--accent" in "".join(reader.styles)
    assert all(len(image["alt"]) > 10 for image in reader.images)
    with pytest.raises(ValueError, match=r"figure 'samples' must be an image data URI, got 'http://x/y.png'"):
        page.render(REPORT, {"samples": "http://x/y.png"}, title="A run")


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
    text = page.render(INJECTED[place], {}, title="A run")
    assert "<script" not in text
    assert EVIL in Reader(text).words  # shown as written, not dropped


def test_title_references_and_figures_are_escaped():
    text = page.render(REPORT, {"samples": 'data:image/png,"><b>'}, title=EVIL, references={EVIL: 1.0})
    assert "<script" not in text
    assert Reader(text).words.count(EVIL) == 3  # title, heading, reference
    assert Reader(text).images[0]["src"] == 'data:image/png,"><b>'


def grounds(report):
    """The badges of the tiles, by the tiles' names."""
    tiles = re.findall(
        r'<div class="tile"><h3>(.*?)</h3>.*?class="badge (\w+)"', page.render(report, {}, title="A run"), re.DOTALL
    )
    return dict(tiles)


def test_a_bound_is_only_called_guaranteed_when_every_block_is_certified():
    assert grounds(REPORT) == {
        "Test bits per dimension": "estimated",
        "Truncation bound": "guaranteed",
        "Divergence from the posterior": "estimated",
        "C2ST": "estimated",
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
        assert "if the estimated Lipschitz constants are right" in read(report).words
        assert "every block is invertible" not in read(report).words
        assert "(not below 1)" in read(report).words
    assert grounds(dataclasses.replace(REPORT, likelihood=POINTS, lipschitz=None))["Truncation bound"] == "guaranteed"
    assert "No bound holds" in read(changed("inverse", max_error_bound=math.inf)).words


def test_the_guaranteed_error_of_the_whole_flow_stands_in_place_of_the_product():
    found = InverseGuarantee(32, 32, 2.3e-6, 7.7e-6, 1.9e-6, 6.1e-6, 0.98)
    words = read(changed("inverse", guarantee=found)).words
    assert f"within 7.7 {TIMES} 10⁻⁶ of the exact one" in words
    assert "The residual of the solver bounds" not in words
    assert f"largest guaranteed error 7.7 {TIMES} 10⁻⁶" in words
    assert f"6.1 {TIMES} 10⁻⁶" in words
    assert "levels that are certain 98" in words
    jumps = dataclasses.replace(found, num_applied=0, reason="slopes of relu jump")
    words = read(changed("inverse", guarantee=jumps)).words
    assert "The whole flow has no better bound: slopes of relu jump." in words
    none = InverseGuarantee(reason="the weights are not certified")
    assert "no better bound: the weights are not certified" in read(changed("inverse", guarantee=none)).words


def test_warnings_come_first():
    report = dataclasses.replace(changed("likelihood", mean=math.nan), notes=("Validation was still falling.",))
    before = page.render(report, {}, title="A run").partition("<section")[0]
    assert "Validation was still falling." in before
    assert "The likelihood is not finite." in before
    assert "<aside" not in page.render(REPORT, {}, title="A run")


def test_many_blocks_are_folded():
    folded = changed("lipschitz", blocks=tuple(block(f"b{i}") for i in range(48)))
    assert "<details><summary>Every block (48)</summary>" in page.render(folded, {}, title="A run")
    assert "<details open><summary>Every block (2)</summary>" in page.render(REPORT, {}, title="A run")


def test_what_was_not_recorded_is_said():
    times = dataclasses.replace(REPORT.train, seconds_per_step=None, compile_seconds=None)
    report = dataclasses.replace(REPORT, train=times, environment=dataclasses.replace(REPORT.environment, commit=None))
    words = read(report).words
    assert "time per step not recorded compilation not recorded" in words
    assert "commit" not in words
