"""Contradictions in the numbers of a report are stated, and its file is JSON that holds all of them."""

import dataclasses
import json
import math

import jax
import pytest
from reports import CERTIFICATE, EXACT, INVERSE, POINTS, REPORT, TRIPS, block, changed

from iresnet_jax.evaluation import environment
from iresnet_jax.evaluation.calibration import RankTest
from iresnet_jax.evaluation.samples import SampleConvergence
from iresnet_jax.report.contents import TrainingTimes

FAILED = SampleConvergence(num=12, fraction_converged=0.0, max_error_bound=math.inf, failed=tuple(range(12)))
UNCONSTRAINED = dataclasses.replace(CERTIFICATE, coeff=None, budget=None, blocks=(block("b3", bound=1.03), block("b4")))


def with_part(**parts):
    return dataclasses.replace(REPORT, **parts)


def with_blocks(*blocks):
    return changed("lipschitz", blocks=blocks)


OFF = dataclasses.replace(EXACT, estimate=dataclasses.replace(EXACT.estimate, z=-4.5))
CONTRADICTIONS = {
    "likelihood not finite": (changed("likelihood", mean=math.nan), "The likelihood is not finite."),
    "entropy": (with_part(likelihood=dataclasses.replace(POINTS, mean=2.8077)), "allows, by 4.0 standard errors"),
    "estimate": (with_part(likelihood=OFF), "4.5 standard errors away from the exact one"),
    "calibration": (changed("calibration", tests=(RankTest("log p", (1, 80), 1e-9, 0.5, 0.5),)), "the model is not calibrated"),
    "cross-entropy": (changed("classification", loss=math.nan), "The cross-entropy is not finite"),
    "samples": (with_part(samples=FAILED), "for 12 of 12 samples, numbers 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, ...."),
    "by class": (
        with_part(samples_by_class=dataclasses.replace(FAILED, failed=(3,))),
        "1 of 12 samples by class, numbers 3.",
    ),
    "error": (changed("inverse", max_abs_error=2e-5), "The largest inversion error exceeds its bound"),
    "error not a number": (changed("inverse", max_abs_error=math.nan), "The largest inversion error exceeds its bound"),
    "errors": (changed("inverse", fraction_within_bound=0.98), "2 % of the inversion errors in the precision of training"),
    "errors in float64": (
        changed("inverse", refined=dataclasses.replace(TRIPS, fraction_within_bound=0.97)),
        "3 % of the inversion errors in float64",
    ),
    "convergence": (changed("inverse", fraction_converged=0.96), "did not converge for 4 % of the examples"),
    "block estimate": (with_blocks(block("b3", estimate=1.02)), "b3: Lipschitz estimate 1.02 is not below 1"),
    "block bound": (with_blocks(block("b3", bound=1.03)), "b3: certified bound 1.03 is not below 1"),
    "block bound not a number": (with_blocks(block("b3", bound=math.nan)), "b3: certified bound nan is not below 1"),
    "estimate above bound": (with_blocks(block("b3", bound=0.69)), "0.7012 exceeds the certified bound 0.69."),
    "no constraint": (with_part(lipschitz=UNCONSTRAINED), "1 of its 2 blocks are not certified contractions"),
    "notes": (with_part(notes=("Validation was still falling.",)), "Validation was still falling."),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_contradictions_are_stated(name):
    report, sentence = CONTRADICTIONS[name]
    assert any(sentence in warning for warning in report.warnings()), report.warnings()
    assert sentence in str(report)
    assert sentence in " ".join(report.to_json()["warnings"])


def test_a_sound_report_has_no_warnings():
    biased = dataclasses.replace(EXACT, estimate=dataclasses.replace(EXACT.estimate, z=-40.0, unbiased=False))
    for report in (REPORT, *(with_part(likelihood=sound) for sound in (EXACT, POINTS, biased))):
        assert report.warnings() == []
    without_promise = with_part(lipschitz=UNCONSTRAINED, inverse=dataclasses.replace(INVERSE, fraction_converged=0.5))
    [warning] = without_promise.warnings()
    assert "no inverse is promised" in warning


def test_a_certificate_needs_every_block_below_1():
    assert REPORT.certified
    for bound in (1.0, math.nan, math.inf):
        report = with_blocks(block("a"), block("b", bound=bound))
        assert not report.certified
        assert report.lipschitz.verdict == "NOT CERTIFIED: no bound below 1 for 1 of 2 blocks, the first is b"
    assert math.isnan(with_blocks(block("a", bound=math.nan), block("b")).lipschitz.max_block)


def test_the_file_holds_every_number_and_null_for_what_json_does_not_have():
    facts = REPORT.to_json()
    assert json.loads(json.dumps(facts, allow_nan=False))
    assert {"notes", "nll", "likelihood"}.isdisjoint(facts)
    assert facts["bits_per_dim"]["mean"] == 1.062314
    layer = facts["lipschitz"]["blocks"][1]["layers"][1]
    assert (layer["name"], layer["target"], layer["estimate"], layer["bound"]) == ("conv_out", None, 0.7867, 0.8041)
    assert facts["lipschitz"]["certified"]
    assert facts["lipschitz"]["max_block"] == 0.7243
    assert facts["inverse"]["refined"]["mean_evals"] == 35.79
    assert facts["config"]["model"]["widths"] == [61, 67]
    facts = dataclasses.replace(changed("inverse", max_error_bound=math.inf), likelihood=POINTS, classification=None).to_json()
    assert facts["inverse"]["max_error_bound"] is None
    assert facts["nll"]["entropy_floor"] == 2.8321
    assert {"bits_per_dim", "classification"}.isdisjoint(facts)


def test_the_headline_has_a_line_for_every_part():
    starts = (
        *("test: 1.0623 ± 0.0021 bits/dim", "check: 1.0651"),
        "calibration: p = 0.32",
        *("test error: 4.71 %", "inverse: inverted; 512 of 512", "certified"),
    )
    lines = str(with_part(likelihood=EXACT)).splitlines()
    assert len(lines) == len(starts)
    assert all(line.startswith(start) for line, start in zip(lines, starts, strict=True))


def test_training_times_are_those_of_the_log():
    records = [{"step": 0, "split": "timing", "wall_time_s": 3.0, "compile_seconds": 2.5}]
    for step, seconds in enumerate((9.0, 0.1, 0.2), 1):
        records.append({"step": step, "split": "train", "wall_time_s": 3.0 + step, "seconds_per_step": seconds})
    assert TrainingTimes.from_metrics(records, 2, minutes=0.5) == TrainingTimes(2, 3, 0.2, 2.5, 6.0, 30.0)
    assert TrainingTimes.from_metrics([], 0) == TrainingTimes(steps=0, total_steps=0)


def test_environment_names_versions_and_devices():
    facts = environment.describe()
    assert facts.jax == jax.__version__
    assert facts.cpu_count >= 1
