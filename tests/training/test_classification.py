"""Training a classifier and everything after it: resumable, equal on any number of devices, and reported honestly."""

import dataclasses
import itertools
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_runs as runs

import iresnet_jax as ir
from iresnet_jax import load as load_model
from iresnet_jax.__main__ import main
from iresnet_jax.data import augment, load
from iresnet_jax.evaluation.classification import evaluate
from iresnet_jax.models.head import apply_head
from iresnet_jax.models.model import FILE_NAME
from iresnet_jax.runs import loop
from iresnet_jax.runs import trained_run as run
from iresnet_jax.runs.config import AugmentationConfig
from iresnet_jax.runs.metrics import read_metrics
from iresnet_jax.runs.objective_from_config import build_augmentation
from iresnet_jax.training import classification
from iresnet_jax.training.constraint import certified_model

SAME = 1e-5  # the same maths by another route, float32


workdir, trained = runs.fixtures_of("classifier")


# --- training -------------------------------------------------------------------------------------------------------


def test_training_improves_validation_and_counts_every_term(workdir):
    records = read_metrics(workdir)
    validation = [record for record in records if record["split"] == "validation"]
    assert len(validation) == 4
    assert validation[-1]["loss"] < validation[0]["loss"]
    assert "accuracy" in validation[-1]
    train = [record for record in records if record["split"] == "train"][-1]
    assert {"loss", "accuracy", "max_sigma", "max_lipschitz", "grad_norm", "learning_rate"} <= set(train)
    assert train["max_lipschitz"] < 0.81 * (1 + 1e-2)
    assert last_state(workdir)["step"] == 8


def last_state(workdir):
    """The arrays of the last checkpoint by name."""
    return runs.arrays_of(workdir, 8)


def test_a_stopped_run_ends_bit_for_bit_like_one_never_stopped(workdir, tmp_path, monkeypatch):
    config = runs.config_of(runs.CLASSIFIER_CONFIG)
    whole = loop.device_batches
    monkeypatch.setattr(loop, "device_batches", lambda *arguments, **options: itertools.islice(whole(*arguments, **options), 4))
    assert int(loop.train(config, tmp_path).step) == 4
    monkeypatch.undo()
    resumed = loop.train(config, tmp_path)
    chex.assert_trees_all_equal(last_state(tmp_path), last_state(workdir))
    assert np.abs(resumed.batch_stats["head"]["var"]).max() > 0


@pytest.mark.parametrize(("padding", "flip"), [(0, False), (1, False), (0, True), (2, True)])
def test_augmentation_is_what_the_config_says(padding, flip):
    images = jnp.asarray(np.random.default_rng(0).integers(0, 17, (6, 8, 8, 1), np.uint8))
    keys = jax.random.split(jax.random.key(1), 6)
    change = build_augmentation(AugmentationConfig(padding, flip), load("digits"))
    found = images if change is None else change(keys, images)
    expected = {
        (0, False): lambda: images,
        (1, False): lambda: augment.random_crop(keys, images, padding=1),
        (0, True): lambda: augment.random_flip(keys, images),
        (2, True): lambda: augment.crop_and_flip(keys, images, padding=2),
    }[padding, flip]()
    np.testing.assert_array_equal(found, expected)
    assert bool(padding or flip) == bool((found != images).any())


def test_checkpoints_are_chosen_by_accuracy_and_ties_broken_by_the_loss():
    best = classification.selection({"accuracy": 0.99, "loss": 9.0})
    assert best < classification.selection({"accuracy": 0.9898, "loss": 0.0})
    of_ties = [classification.selection({"accuracy": 0.99, "loss": loss}) for loss in (0.1, 0.2)]
    assert of_ties[0] < of_ties[1] < best


# --- results --------------------------------------------------------------------------------------------------------


def test_test_error_by_hand(trained):
    model, images, labels = trained.model, trained.data.examples["test"], trained.data.labels["test"]

    @jax.jit
    def logits_by_steps(model, images):
        scaled = (images / 16 - 0.5) / 0.5
        x = jnp.concatenate([scaled, jnp.zeros_like(scaled)], axis=-1)
        features = model.features_of_input(x)
        return apply_head(model.head, model.statistics["head"], features)

    logits = logits_by_steps(model, images)
    wrong = np.flatnonzero(np.argmax(logits, axis=1) != labels)
    result = evaluate(model, images, labels, trained.config.evaluation.batch_size)
    assert result.num_errors == len(wrong)
    assert result.num_examples == 360
    assert result.error == len(wrong) / 360
    assert [mistake.index for mistake in result.mistakes] == wrong[:32].tolist()
    confusion = np.array(result.confusion)
    np.testing.assert_array_equal(confusion.sum(axis=1), np.bincount(labels))
    assert np.trace(confusion) == 360 - len(wrong)
    log_p = np.asarray(jax.nn.log_softmax(logits), np.float64)
    np.testing.assert_allclose(result.loss, -log_p[np.arange(360), labels].mean(), rtol=SAME)


@pytest.mark.usefixtures("undrawn")
def test_commands_after_training(workdir, capsys):
    command = ("--workdir", str(workdir))
    assert main(["report", *command]) == 0
    assert "inverse: inverted; 360 of 360 test examples converged" in capsys.readouterr().out
    report = json.loads((workdir / "report.json").read_text())
    assert report["classification"]["num_examples"] == report["inverse"]["num_examples"] == 360
    assert report["inverse"]["max_abs_error"] < 1e-4
    assert report["lipschitz"]["certified"]
    assert report["warnings"] == []
    page = (workdir / "report.html").read_text()
    assert page.count("data:image/") >= 5  # curves, confusion, reconstructions, histogram, constants
    assert "somebody" in page
    assert main(["sample", *command]) == 2
    assert "holds no density, so there are no samples" in capsys.readouterr().err


def test_a_kept_classifier_is_the_same_in_one_file(trained, tmp_path, capsys):
    path = run.save(trained, tmp_path / FILE_NAME)
    loaded, model = load_model(path), trained.model
    assert loaded.spec == model.spec

    def arrays(model):
        blocks = {name: (block.actnorm, block.branch.weights) for name, block in model.weights.items()}
        return blocks, model.head, model.statistics

    chex.assert_trees_all_close(arrays(loaded), arrays(model), rtol=SAME)
    images = trained.test_examples()[:4]

    @jax.jit
    def there_and_back(model, images):
        return model.logits(images), model.reconstruct(model.features(images))

    logits, back = there_and_back(loaded, images)
    np.testing.assert_allclose(logits, there_and_back(model, images)[0], atol=SAME)
    assert back.info.converged.all()
    np.testing.assert_allclose(16 * back.images, images, atol=16 * 1e-4)
    assert run.load(tmp_path).step == trained.step
    assert main(["evaluate", "--workdir", str(tmp_path)]) == 0
    found = evaluate(model, trained.test_examples(), trained.data.labels["test"], 256)
    assert capsys.readouterr().out.strip() == str(found)


def test_a_network_without_a_constraint_says_that_nothing_is_promised(trained, tmp_path, capsys):
    model = trained.model
    large = jax.tree.map(lambda leaf: 3 * leaf, ir.Unconstrained.of(model).params)
    spec = dataclasses.replace(model.spec, constrained=False)
    run.save(dataclasses.replace(trained, model=certified_model(spec, large, model.statistics)), tmp_path / FILE_NAME)
    certificate = load_model(tmp_path / FILE_NAME).certificate()
    assert certificate.target is None
    assert not certificate.certified
    assert certificate.max_block > 1
    assert main(["certify", "--workdir", str(tmp_path)]) == 1
    assert "NOT CERTIFIED" in capsys.readouterr().out
    assert main(["reconstruct", "--workdir", str(tmp_path), "--num", "8"]) == 1
    assert "NOT INVERTED; 0 of 8" in capsys.readouterr().out
