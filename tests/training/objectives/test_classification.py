"""Training a classifier and everything after it: resumable, equal on any number of devices, and reported honestly."""

import itertools
import json
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
from iresnet_jax.training.source import load_source

from iresnet_jax.__main__ import main
from iresnet_jax.data import augment
from iresnet_jax.evaluation import accuracy, frozen, lipschitz, ood, trained
from iresnet_jax.models import classifier
from iresnet_jax.training import loop, parallel, state
from iresnet_jax.training.config import AugmentationConfig
from iresnet_jax.training.metrics import read_metrics
from iresnet_jax.training.objectives import classification

DEVICE_RTOL, DEVICE_ATOL = 1e-4, 1e-5  # the same sums in another order, in float32
SAME = 1e-5  # the same maths by another route, float32

CONFIG = """
from iresnet_jax.training.config import default_config

def get_config():
    config = default_config()
    config.objective = "classification"
    config.model.stages = ({"num_blocks": 2, "hidden": (4,), "kernel_sizes": (3, 1), "squeeze": 2},)
    config.classifier.update({"pad_channels": 1, "label_smoothing": 0.1})
    config.augmentation.update({"crop_padding": 1, "flip": True})
    config.optimizer.update({"name": "sgd", "learning_rate": 0.3, "warmup_steps": 2, "clip_norm": 0.0, "weight_decay": 1e-3})
    config.training.update({"total_steps": 8, "eval_every_steps": 2, "log_every_steps": 2, "batch_size": 64,
        "actnorm_examples": 128, "ema_decay": 0.5, "blocks": "scan"})
    config.references.values = (("somebody", 1.25),)
    return config
"""

pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")


@pytest.fixture(scope="module", autouse=True)
def compilations(tmp_path_factory):
    with runs.shared_compilations(tmp_path_factory):
        yield


@pytest.fixture
def config():
    return runs.config_of(CONFIG)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The workdir of a run without a report, and its last state."""
    workdir = tmp_path_factory.mktemp("uninterrupted")
    return workdir, loop.train(runs.config_of(CONFIG), workdir)


@pytest.fixture(scope="module")
def model(uninterrupted):
    return trained.load(uninterrupted[0])


# --- training -------------------------------------------------------------------------------------------------------


def test_training_improves_validation_and_counts_every_term(uninterrupted):
    workdir, last = uninterrupted
    records = read_metrics(workdir)
    validation = [record for record in records if record["split"] == "validation"]
    assert len(validation) == 4
    assert validation[-1]["loss"] < validation[0]["loss"]
    assert validation[-1]["accuracy"] > validation[0]["accuracy"]
    train = [record for record in records if record["split"] == "train"][-1]
    assert {"loss", "accuracy", "max_sigma", "max_lipschitz", "grad_norm", "learning_rate"} <= set(train)
    assert train["max_lipschitz"] < 0.81 * (1 + 1e-2)
    assert int(last.step) == 8


def test_a_stopped_run_ends_bit_for_bit_like_one_never_stopped(config, uninterrupted, tmp_path, monkeypatch):
    whole = loop.batches
    monkeypatch.setattr(loop, "batches", lambda *arguments: itertools.islice(whole(*arguments), 4))
    assert int(loop.train(config, tmp_path).step) == 4
    monkeypatch.undo()
    resumed = loop.train(config, tmp_path)
    chex.assert_trees_all_equal(jax.device_get(resumed), jax.device_get(uninterrupted[1]))
    moved = jax.tree.map(lambda a: float(np.abs(a).max()), jax.device_get(resumed.batch_stats))
    assert moved["head"]["var"] > 0


def after_steps(config, num_shares, mapped, num_steps=2):
    """The state after a few steps with the batch in so many shares."""
    source = load_source(config.data.name)
    objective = loop.build_objective(config, source)
    images, labels = objective.examples
    size = config.training.batch_size
    batch = parallel.shard((images[:size], labels[:size]), num_devices=num_shares)
    current = state.create(objective.initial_variables(), objective.optimizer)
    step = mapped(objective.make_step(objective.num_terms))
    for _ in range(num_steps):
        current, metrics = step(current, batch)
    return jax.device_get((current, metrics))


def vmapped(step):
    return jax.jit(jax.vmap(step, axis_name=parallel.AXIS, in_axes=(None, 0), out_axes=(None, None)))


def test_one_and_two_devices_give_the_same_result(config):
    one, two = after_steps(config, 1, vmapped), after_steps(config, 2, parallel.parallelize)
    chex.assert_trees_all_close(one, two, rtol=DEVICE_RTOL, atol=DEVICE_ATOL)


def test_the_comparison_notices_batch_statistics_of_a_share(config, monkeypatch):
    alone = classifier.batch_statistics
    monkeypatch.setattr(classifier, "batch_statistics", lambda x, axis_name=None: alone(x))
    with pytest.raises(ValueError, match="out_axes"):
        after_steps(config, 2, vmapped, num_steps=1)


@pytest.mark.parametrize(("padding", "flip"), [(0, False), (1, False), (0, True), (2, True)])
def test_augmentation_is_what_the_config_says(padding, flip):
    images = jnp.asarray(np.random.default_rng(0).integers(0, 17, (6, 8, 8, 1), np.uint8))
    keys = jax.random.split(jax.random.key(1), 6)
    found = classification.make_augmentation(AugmentationConfig(padding, flip))(keys, images)
    expected = {
        (0, False): lambda: images,
        (1, False): lambda: augment.random_crop(keys, images, padding=1),
        (0, True): lambda: augment.random_flip(keys, images),
        (2, True): lambda: augment.crop_and_flip(keys, images, padding=2),
    }[padding, flip]()
    np.testing.assert_array_equal(found, expected)
    assert bool(padding or flip) == bool((found != images).any())


def test_without_a_constraint_no_norm_is_measured():
    config = runs.config_of(CONFIG, **{"constraint.norms": "none", "training.actnorm_examples": 64})
    current, metrics = after_steps(config, 1, vmapped, num_steps=1)
    assert not {"max_sigma", "max_lipschitz"} & set(metrics)
    assert np.isfinite(list(metrics.values())).all()
    assert int(current.step) == 1


def test_checkpoints_are_chosen_by_accuracy_and_ties_broken_by_the_loss(config):
    loss = loop.build_objective(config, load_source("digits")).loss
    best = loss({"accuracy": 0.99, "loss": 9.0})
    assert best < loss({"accuracy": 0.9898, "loss": 0.0})
    assert loss({"accuracy": 0.99, "loss": 0.1}) < loss({"accuracy": 0.99, "loss": 0.2}) < best


MISTAKES = {
    "objective": (
        {"objective": "clasification"},
        "config.objective must be one of density, classification, hybrid, got 'clasification'",
    ),
    "no labels": ({"data.name": "moons"}, "classification needs labelled images, and moons has none"),
    "density without constraint": (
        {
            "objective": "density",
            "constraint.norms": "none",
            "augmentation.crop_padding": 0,
            "augmentation.flip": False,
        },
        "a density needs blocks that are contractions: constraint.norms = none is for classification alone",
    ),
    "smoothing": ({"classifier.label_smoothing": 1.5}, r"config.classifier.label_smoothing must lie in \[0, 1\), got 1.5"),
    "crop": ({"augmentation.crop_padding": 9}, r"padding must lie in \[0, 8\] for 8x8 images, got 9"),
    "padding": ({"classifier.pad_channels": -1}, r"config.classifier.pad_channels must lie in \[0, inf\), got -1"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_answered_before_a_workdir_is_claimed(name, tmp_path):
    changes, sentence = MISTAKES[name]
    with pytest.raises(ValueError, match=sentence):
        loop.train(runs.config_of(CONFIG, **changes), tmp_path / "new")
    assert not (tmp_path / "new").exists()


# --- results --------------------------------------------------------------------------------------------------------


def test_test_error_by_hand(model):
    images, labels = (model.source.images.images["test"], model.source.images.labels["test"])
    x = classifier.preprocess(model.spec, jnp.asarray(images))
    logits = jax.jit(classifier.logits, static_argnums=0)(model.spec, model.weights, model.head, model.statistics, x)
    wrong = np.flatnonzero(np.argmax(logits, axis=1) != labels)
    result = accuracy.evaluate(model, images, labels, model.config.evaluation.batch_size)
    assert result.num_errors == len(wrong)
    assert result.num_examples == 360
    assert result.error == len(wrong) / 360
    assert [mistake.index for mistake in result.mistakes] == wrong[:32].tolist()
    confusion = np.array(result.confusion)
    np.testing.assert_array_equal(confusion.sum(axis=1), np.bincount(labels))
    assert np.trace(confusion) == 360 - len(wrong)
    log_p = np.asarray(jax.nn.log_softmax(logits), np.float64)
    np.testing.assert_allclose(result.loss, -log_p[np.arange(360), labels].mean(), rtol=SAME)


def test_commands_after_training(model, uninterrupted, tmp_path, capsys):
    workdir = ("--workdir", str(uninterrupted[0]))
    assert main(["evaluate", *workdir]) == 0
    assert capsys.readouterr().out.startswith("test error: ")
    assert main(["report", *workdir]) == 0
    assert "inverse: inverted; 360 of 360 test examples converged" in capsys.readouterr().out
    report = json.loads((uninterrupted[0] / "report.json").read_text())
    assert report["classification"]["num_examples"] == report["inverse"]["num_examples"] == 360
    assert report["inverse"]["fraction_recovered"] == 1
    assert 0 <= report["inverse"]["max_padding_residual"] <= report["inverse"]["max_error_bound"]
    assert report["inverse"]["max_grey_level_error"] < 16 * 1e-4
    assert report["lipschitz"]["certified"]
    assert report["warnings"] == []
    page = (uninterrupted[0] / "report.html").read_text()
    assert page.count("data:image/") >= 5  # curves, confusion, reconstructions, histogram, constants
    assert "somebody" in page
    assert "No samples were drawn" not in page
    assert main(["sample", *workdir]) == 2
    assert "holds a classifier, which has no samples" in capsys.readouterr().err


def test_a_frozen_classifier_is_the_same_in_one_file(model, uninterrupted, tmp_path, capsys):
    path = tmp_path / "model.npz"
    assert main(["freeze", "--workdir", str(uninterrupted[0]), "--output", str(path)]) == 0
    capsys.readouterr()
    loaded = frozen.load(path)
    assert (loaded.spec, loaded.step) == (model.spec, model.step)
    chex.assert_trees_all_equal((loaded.weights, loaded.head, loaded.bounds), (model.weights, model.head, model.bounds))
    images = jnp.asarray(model.source.images.images["test"][:4])
    x = classifier.preprocess(model.spec, images)
    logits = classifier.logits(model.spec, model.weights, model.head, model.statistics, x)
    np.testing.assert_allclose(loaded.logits(images), logits, atol=SAME)
    back = loaded.reconstruct(loaded.features(images))
    assert back.info.converged.all()
    np.testing.assert_allclose(16 * back.images, images, atol=16 * 1e-4)
    path.rename(tmp_path / frozen.FILE_NAME)
    assert main(["evaluate", "--workdir", str(tmp_path)]) == 0
    found = accuracy.evaluate(model, model.source.held_out("test", 360, 0), model.source.labels("test"), 256)
    assert capsys.readouterr().out.strip() == str(found)


def test_a_network_without_a_constraint_says_that_nothing_is_promised(uninterrupted, tmp_path, capsys):
    """Its weights are those of the other run, before they are scaled."""
    workdir = shutil.copytree(uninterrupted[0], tmp_path / "run", ignore=shutil.ignore_patterns("tensorboard", "report.*"))
    for name, section, field, value in (("config", "constraint", "norms", "none"), ("model", "model", "constrained", False)):
        plain = json.loads((workdir / f"{name}.json").read_text())
        plain[section][field] = value
        (workdir / f"{name}.json").write_text(json.dumps(plain))
    vanilla = trained.load(workdir)
    for name, kernel in (("conv0", "kernel"), ("conv1", "kernel")):
        ours = vanilla.weights["stage0"]["branch"][name][kernel]
        assert np.abs(ours).max() > 1.1 * np.abs(trained.load(uninterrupted[0]).weights["stage0"]["branch"][name][kernel]).max()
    certificate = lipschitz.measure(vanilla)
    assert certificate.target is None
    assert not certificate.certified
    assert certificate.max_block > 1
    assert main(["certify", "--workdir", str(workdir)]) == 1
    assert "NOT CERTIFIED" in capsys.readouterr().out
    assert main(["reconstruct", "--workdir", str(workdir), "--num", "8"]) == 1
    assert "NOT INVERTED; 0 of 8" in capsys.readouterr().out


# --- other data -----------------------------------------------------------------------------------------------------


def test_scores_tell_noise_from_digits(model, uninterrupted, capsys):
    result = ood.compare(model, model.source, "noise", model.config.evaluation, 0, num=100)
    assert set(result.scores) == {"energy", "confidence", "distance"}
    assert (result.num_inside, result.num_outside) == (100, 100)
    assert result.scores["distance"].auroc > 0.8
    assert main(["ood", "--workdir", str(uninterrupted[0]), "--against", "rotated", "--num", "50"]) == 0
    said = capsys.readouterr().out
    assert "50 test images against 50 others (rotated)" in said
    assert said.count("AUROC") == 3
    assert "Mahalanobis distance" in said
