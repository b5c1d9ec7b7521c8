"""Verified and attacked accuracy on digits, and attacks on a network's own radii."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

import iresnet_jax as ir
from iresnet_jax import certify, data
from iresnet_jax.data.objectives import classification_objective, fresh_model
from iresnet_jax.evaluation.classification import least_margins, robustness
from iresnet_jax.runs.config import EvaluationConfig
from iresnet_jax.training.objectives import Margin, measure_classes

RADII = (0.9, 0.3)
RESULTS = Path(__file__).parents[2] / "benchmarks/results"


@pytest.fixture(scope="module")
def digits():
    return data.load("digits")


@pytest.fixture(scope="module")
def model(digits):
    stage = ir.StageSpec(2, (32,), activation="relu", kind="potential", actnorm=False)
    shape = 8, 8, 1
    flow = ir.FlowSpec(shape, (stage,), coeff=0.95)
    spec = ir.ClassifierSpec(flow, shape, 10, 17, mean=(0.0,), std=(1.0,), head="linear")
    objective = classification_objective(
        digits, num=512, batch_size=256, margin=Margin(0.5, temperature=0.25)
    )
    free = fresh_model(digits, spec, seed=0, num=1024)
    train = digits.examples["train"], digits.labels["train"]
    return ir.train(free, objective, train, key=0, steps=300, batch_size=64, progress=False)


@pytest.fixture(scope="module")
def certified(model, digits):
    return certify.radius(model, digits.examples["test"])


@pytest.mark.slow
def test_training_with_a_margin_verifies_and_attacks_find_the_rest(model, digits, certified):
    images, labels = digits.examples["test"], digits.labels["test"]
    found = robustness(model, images, labels, EvaluationConfig(radii=RADII), 0)
    radii = np.where(certified.predicted == labels, certified.radius, 0)
    assert found.clean.fraction > 0.9
    assert found.radii == (0.3, 0.9)
    for size, proven, left in zip(found.radii, found.verified, found.attacked, strict=True):
        assert proven.fraction == np.mean(radii >= size)
        assert proven.interval[0] < proven.fraction <= left.fraction <= found.clean.fraction
    assert found.verified[0].fraction > 0.7
    assert found.attacked[1].fraction < found.verified[0].fraction
    assert found.median_radius == np.median(radii)
    assert found.num_broken == 0
    assert found.lipschitz < 2
    assert not found.warnings()


def test_the_margin_of_the_loss_is_what_radii_verify(model, digits, certified):
    images, labels = digits.examples["test"], digits.labels["test"]
    is_right = certified.predicted == labels
    seen = measure_classes(model, images, labels, 256, Margin(0.3)).metrics
    assert seen["accuracy"] == np.mean(is_right)
    proven = np.mean(is_right & (certified.radius >= 0.3))
    # radii bound rounding
    assert seen["accuracy_at_margin"] == pytest.approx(proven, abs=2 / len(labels))


def test_no_attack_breaks_a_radius_and_larger_ones_break(model, digits, certified):
    images = digits.examples["test"]
    found = certified

    def left(share):
        radii = share * found.radius
        own = (200, 10), 0, len(images)  # steps and starts, seed, batch size
        return least_margins(model, images, found.predicted, radii, *own) > 0

    assert np.all(left(0.999))
    assert np.mean(left(1.5)) < 0.3


@pytest.mark.slow
def test_the_verified_images_of_the_kept_network_are_counted_again():
    if not (Path(os.environ.get("TFDS_DATA_DIR", "")) / "mnist").exists():
        pytest.skip("needs MNIST in the folder TFDS_DATA_DIR")
    mnist, kept = data.load("mnist"), ir.load(RESULTS / "mnist_robust_0.3")
    found = certify.radius(kept, mnist.examples["test"])
    is_verified = (found.predicted == mnist.labels["test"]) & (found.radius >= 0.3)
    report = json.loads((RESULTS / "mnist_robust_0.3/report.json").read_text())
    at = report["robustness"]["radii"].index(0.3)
    assert is_verified.mean() == report["robustness"]["verified"][at]["fraction"]
