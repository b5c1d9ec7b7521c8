"""A report says its results' numbers, on a page and in JSON, and states contradictions."""

import dataclasses
import json
import math

import kept
import numpy as np
import pytest

from iresnet_jax.evaluation.calibration import Calibration, RankTest
from iresnet_jax.evaluation.classification import summarize
from iresnet_jax.evaluation.likelihood import Likelihood
from iresnet_jax.evaluation.report import (
    Report,
    TrainingTimes,
    describe_environment,
    log_density_on_grid,
)
from iresnet_jax.evaluation.round_trips import Guarantee, Inversion, RoundTrips, SampleConvergence
from iresnet_jax.models.certificate import Certificate, Constant


def block(name, *, estimate=0.7012, bound=0.7243):
    return Constant(name, 0.8312, estimate, bound, (Constant("conv_in", 0.9117, 0.8913, 0.9008),))


LIKELIHOOD = Likelihood(
    mean=1.062314,
    stderr=0.00213,
    unit="bits/dim",
    estimator="exact log-determinant",
    truncation_bound=0.0,
    num_examples=9973,
    num_dequantisations=53,
    num_probes=1,
)
POINTS = dataclasses.replace(LIKELIHOOD, unit="nats", mean=2.8342, entropy_floor=2.8321)
TRIPS = RoundTrips(1.3e-13, 2.4e-13, 5.7e-12, 1.0, 1.0, 35.79)
FOUND = Guarantee(8, 8, 3.3e-7, 6.1e-7, 2.2e-7)
INVERSE = Inversion(1.9e-6, 4.1e-6, 8.8e-6, 1.0, 1.0, 12.34, 512, TRIPS, FOUND, 7e-7)
CERTIFICATE = Certificate(0.97, "layer", (block("b3"), block("b4")), 1.9, 3.6)
RANKS = Calibration((RankTest("log p", (11, 9), 0.16, 0.51),), 20, 99)
CLASSES = summarize(2.0 * np.eye(3)[[0, 1, 1, 2]], np.array([0, 0, 1, 2]), loss=0.513)
REPORT = Report(
    TrainingTimes(1200, 1300, 0.0831, 17.3, 412.0),
    describe_environment(),
    {"model": {"widths": [61, 67]}, "note": "<script>"},
    likelihood=LIKELIHOOD,
    calibration=RANKS,
    classification=CLASSES,
    samples=SampleConvergence(64),
    inverse=INVERSE,
    lipschitz=CERTIFICATE,
)
FAILED = SampleConvergence(num=12, failed=tuple(range(12)))


def with_part(**parts):
    return dataclasses.replace(REPORT, **parts)


def changed(part, **values):
    return with_part(**{part: dataclasses.replace(getattr(REPORT, part), **values)})


def with_blocks(*blocks):
    return changed("lipschitz", blocks=blocks)


CONTRADICTIONS = {
    "entropy": (
        with_part(likelihood=dataclasses.replace(POINTS, mean=2.8210)),
        "allows, by 5.2 standard errors",
    ),
    "samples": (
        with_part(samples=FAILED),
        "for 12 of 12 samples, numbers 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, ....",
    ),
    "bound above 1": (
        with_blocks(block("b3", bound=1.03), block("b4")),
        "NOT CERTIFIED: no bound of Lip(g) below 1 for 1 of 2 blocks",
    ),
    "notes": (with_part(notes=("Validation was still falling.",)), "Validation was still falling."),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_contradictions_are_stated(name):
    report, sentence = CONTRADICTIONS[name]
    assert sentence in " ".join(report.to_json()["warnings"])
    assert sentence in str(report)


def test_a_sound_report_has_no_warnings():
    for report in (REPORT, with_part(likelihood=POINTS)):
        assert report.warnings() == []


def test_the_file_holds_every_number_and_null_for_what_json_does_not_have():
    facts = REPORT.to_json()
    assert json.loads(json.dumps(facts, allow_nan=False))
    assert {"notes", "nll", "likelihood"}.isdisjoint(facts)
    assert facts["bits_per_dim"]["mean"] == 1.062314
    assert facts["lipschitz"]["blocks"][1]["layers"][0]["bound"] == 0.9008
    assert (facts["lipschitz"]["certified"], facts["lipschitz"]["max_block"]) == (True, 0.7243)
    assert facts["inverse"]["refined"]["mean_evals"] == 35.79
    facts = dataclasses.replace(
        changed("inverse", max_error_bound=math.inf), likelihood=POINTS, classification=None
    ).to_json()
    assert facts["inverse"]["max_error_bound"] is None
    assert facts["nll"]["entropy_floor"] == 2.8321
    assert {"bits_per_dim", "classification"}.isdisjoint(facts)


def test_a_map_has_the_density_of_its_places():
    model, points = (
        kept.model(kept.POINTS),
        np.random.default_rng(0).normal(size=(20, 2)) * [1.0, 9.0],
    )
    log_density, (left, right, bottom, top) = log_density_on_grid(model, points, side=3)
    assert left < points[:, 0].min() < points[:, 0].max() < right
    assert bottom < points[:, 1].min() < points[:, 1].max() < top
    row = [
        [left + (right - left) * (i + 0.5) / 3, bottom + (top - bottom) * 5 / 6] for i in range(3)
    ]
    np.testing.assert_allclose(log_density[2], model.log_prob(np.array(row, np.float32)), rtol=1e-5)


def test_training_times_are_those_of_the_log():
    records = [{"step": 0, "split": "timing", "wall_time_s": 3.0, "compile_seconds": 2.5}]
    for step, seconds in enumerate((9.0, 0.1, 0.2), 1):
        records.append(
            {"step": step, "split": "train", "wall_time_s": 3.0 + step, "seconds_per_step": seconds}
        )
    assert TrainingTimes.from_metrics(records, 2) == TrainingTimes(2, 3, 0.2, 2.5, 6.0)
    assert TrainingTimes.from_metrics([], 0) == TrainingTimes(steps=0, total_steps=0)
