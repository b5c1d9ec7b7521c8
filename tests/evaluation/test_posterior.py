"""Models beside the posterior they should be: numbers of models that are right and wrong, and a config end to end."""

import dataclasses
import importlib.util
import json
import math

import jax
import numpy as np
import pytest
import tiny_runs as runs
from known_posterior import linear_gaussian_model

from iresnet_jax.__main__ import main
from iresnet_jax.bijections.transforms.standardize import Standardize
from iresnet_jax.data import simulators
from iresnet_jax.evaluation import posterior
from iresnet_jax.runs import loop, trained_run
from iresnet_jax.runs.config import EvaluationConfig, parse
from iresnet_jax.runs.model_from_config import density_spec

ATOL_F32 = 1e-4  # log-densities in float32, of a flow whose weights are zero
SETTINGS = EvaluationConfig(batch_size=200, num_posteriors=2, num_posterior_samples=200)


def test_the_true_posterior_diverges_by_nothing_and_a_wrong_one_by_its_divergence(monkeypatch):
    """The classifier, which takes its time in 10-D, has a test of its own."""
    monkeypatch.setattr(posterior, "c2st", lambda ours, theirs: float(np.abs(ours.mean(axis=0) - theirs.mean(axis=0)).max()))
    simulator = simulators.SIMULATORS["linear_gaussian"]
    theta, x = map(np.asarray, simulator.sample(jax.random.key(0), 400))
    right = posterior.compare(linear_gaussian_model(), simulator, theta, x, SETTINGS, 0)
    assert abs(right.summary.divergence) < ATOL_F32
    assert right.summary.mean_c2st < 5 * math.sqrt(2 * 0.05 / 200)
    assert right.truth.shape == right.samples.shape == (2, 200, 10)
    np.testing.assert_array_equal(right.contexts, x[:2])
    for samples in (right.truth, right.samples):
        np.testing.assert_allclose(samples.mean(axis=1), x[:2] / 2, atol=5 * math.sqrt(0.05 / 200))
    assert dataclasses.replace(right.summary, divergence=-5e-7, stderr=1e-9).warnings() == []  # rounding of float32
    wrong = posterior.compare(linear_gaussian_model(0.2, 1.5), simulator, theta, x, SETTINGS, 0).summary
    expected = 10 * (math.log(1.5) + (1 + 0.2**2 / 0.05) / (2 * 1.5**2) - 0.5)  # of two normals
    assert abs(wrong.divergence - expected) < 5 * wrong.stderr < 1
    assert wrong.mean_c2st > 0.15
    none = dataclasses.replace(SETTINGS, num_posteriors=0)
    assert posterior.compare(linear_gaussian_model(), simulator, theta, x, none, 0).summary.mean_c2st is None


def test_c2st_tells_what_differs_and_nothing_else():
    a, b = np.random.default_rng(0).normal(size=(2, 150, 2)).astype(np.float32)
    alike = posterior.c2st(a, b)
    assert abs(alike - 0.5) < 5 * 0.5 / math.sqrt(300)
    assert posterior.c2st(a + 5, b) > 0.99
    assert posterior.c2st(3 * a, b) > 0.65
    assert posterior.c2st(a, b) == alike
    assert math.isnan(posterior.c2st(np.full_like(a, np.nan), b))


@pytest.fixture(scope="module")
def config():
    """The config of a simulator, cut down to a few steps of a small model."""
    path = runs.ROOT / "configs" / "posterior.py"
    spec = importlib.util.spec_from_file_location("posterior_config", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config("sbi_two_moons")
    config.model.stages = ({"num_blocks": 1, "hidden": (8,), "activation": "clipswish"},)
    config.optimizer.name = "adam"
    config.training.update({"total_steps": 4, "minutes": 0.0, "batch_size": 32, "eval_every_steps": 4, "log_every_steps": 2})
    config.training.update({"eval_examples": 64, "actnorm_examples": 64, "blocks": "unroll"})
    config.evaluation.update({"num_examples": 64, "batch_size": 64, "num_posteriors": 2, "num_posterior_samples": 32})
    return parse(config)


@pytest.mark.usefixtures("undrawn")
def test_from_training_to_samples_and_report(config, tmp_path, capsys, monkeypatch):
    """All samples are drawn 64 at once, by one program; the classifier has a test of its own, and takes few epochs here."""
    monkeypatch.setattr(posterior, "_MAX_EPOCHS", 5)
    loop.train(config, tmp_path)
    capsys.readouterr()
    assert main(["evaluate", "--workdir", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "true posterior: the model diverges by" in said
    assert "32 samples each for 2 contexts" in said
    assert main(["sample", "--workdir", str(tmp_path), "--num", "64", "--context=0.1,0.1"]) == 0
    assert np.load(tmp_path / "samples.npy").shape == (64, 2)
    assert main(["sample", "--workdir", str(tmp_path), "--num", "5"]) == 2
    assert "takes a context" in capsys.readouterr().err
    np.save(tmp_path / "contexts.npy", np.zeros((3, 2)))
    assert main(["sample", "--workdir", str(tmp_path), "--num", "2", f"--context={tmp_path}/contexts.npy"]) == 2
    assert "give --num 3" in capsys.readouterr().err
    status = main(["calibrate", "--workdir", str(tmp_path), "--num", "40", "--samples", "9"])
    said = capsys.readouterr().out
    assert "ranks of 40 test examples among 9 samples each" in said
    assert status == (1 if "not calibrated" in said else 0)
    assert main(["report", "--workdir", str(tmp_path)]) == 0
    content = json.loads((tmp_path / "report.json").read_text())
    found = content["posterior"]
    assert (len(found["c2st"]), found["num_samples"], found["num_examples"]) == (2, 32, 64)
    assert found["mean_c2st"] == pytest.approx(np.mean(found["c2st"]))
    # The likelihood and the divergence are of the same pairs: they differ by the truth's own likelihood.
    simulator, trained = simulators.SIMULATORS["sbi_two_moons"], trained_run.load(tmp_path)
    truth = -float(np.mean(jax.jit(simulator.log_prob)(trained.test_examples(), trained.test_contexts())))
    assert content["nll"]["mean"] - truth == pytest.approx(found["divergence"], abs=1e-3)
    assert content["nll"]["entropy_floor"] == pytest.approx(simulator.entropy)
    page = (tmp_path / "report.html").read_text()
    assert "Divergence from the posterior" in page
    assert "Samples of the true posterior above samples of the model" in page
    assert len(content["calibration"]["tests"]) == 3
    assert "Histograms of the ranks of test examples" in page
    assert "Marginals and pairs of the first entries of samples, given each" in page


def test_contexts_are_scaled_by_what_a_simulator_draws(config):
    theta, x = simulators.SIMULATORS["sbi_two_moons"].sample(jax.random.key(3), 20_000)
    found = density_spec(config, loop.load_data(config.data))
    assert isinstance(found.transform, Standardize)
    np.testing.assert_allclose(found.transform.scale, np.std(theta, axis=0), rtol=0.03)
    np.testing.assert_allclose(found.context.scale, np.std(x, axis=0), rtol=0.03)
