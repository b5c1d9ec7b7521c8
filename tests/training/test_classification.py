"""Training a classifier and everything after it."""

import jax
import jax.numpy as jnp
import kept
import numpy as np
import pytest
import tiny_runs as runs

import iresnet_jax as ir
from iresnet_jax.data import augment
from iresnet_jax.evaluation.classification import evaluate
from iresnet_jax.models.classifier import apply_head
from iresnet_jax.runs.config import AugmentationConfig
from iresnet_jax.runs.job import build_augmentation
from iresnet_jax.runs.metrics import read_metrics
from iresnet_jax.training import objectives
from iresnet_jax.training.objectives import Margin

SAME = 1e-5  # the same maths by another route, float32


workdir, trained = runs.fixtures_of("classifier")


def test_training_improves_validation_and_counts_every_term(workdir):
    records = read_metrics(workdir)
    validation = [record for record in records if record["split"] == "validation"]
    assert len(validation) == 4
    assert validation[-1]["loss"] < validation[0]["loss"]
    train = [record for record in records if record["split"] == "train"][-1]
    assert {"loss", "accuracy", "max_sigma", "max_lipschitz", "grad_norm", "learning_rate"} <= set(
        train
    )
    assert train["max_lipschitz"] < 0.81 * (1 + 1e-2)
    assert last_state(workdir)["step"] == 8


def last_state(workdir):
    """The arrays of the last checkpoint by name."""
    return runs.arrays_of(workdir, 8)


def test_the_model_has_the_running_averages_of_its_step(workdir, trained):
    """Whether the training returned it or its folder has it."""
    arrays = runs.arrays_of(workdir, trained.step)
    for model in (trained.model, ir.load(workdir / runs.RETURNED)):
        for name, own in model.statistics["head"].items():
            np.testing.assert_array_equal(own, arrays[f"batch_stats/head/{name}"])


@pytest.mark.parametrize(("padding", "flip"), [(0, False), (1, False), (0, True), (2, True)])
def test_augmentation_is_what_the_config_says(padding, flip):
    images = jnp.asarray(np.random.default_rng(0).integers(0, 17, (6, 8, 8, 1), np.uint8))
    keys = jax.random.split(jax.random.key(1), 6)
    change = build_augmentation(AugmentationConfig(padding, flip))
    found = images if change is None else change(keys, images)
    expected = {
        (0, False): lambda: images,
        (1, False): lambda: augment.random_crop(keys, images, padding=1),
        (0, True): lambda: augment.random_flip(keys, images),
        (2, True): lambda: augment.crop_and_flip(keys, images, padding=2),
    }[padding, flip]()
    np.testing.assert_array_equal(found, expected)
    assert bool(padding or flip) == bool((found != images).any())


def test_models_are_chosen_by_accuracy_and_ties_broken_by_the_loss(monkeypatch):
    def measured(num_right, loss, margin=Margin(), num_at_margin=0):
        outputs = {
            "logits": np.eye(2)[(np.arange(100) >= num_right).astype(int)],
            "loss": np.full(100, loss),
            "at_margin": np.arange(100) < num_at_margin,
        }
        monkeypatch.setattr(objectives, "classify", lambda *_: outputs)
        return objectives.measure_classes(model, images, np.zeros(100, int), 256, margin).loss

    model, (images, _) = kept.model(kept.CLASSIFIER), kept.images(1)

    best = measured(99, 9.0)
    assert best < measured(98, 0.0)
    assert measured(99, 0.1) < measured(99, 0.2) < best
    assert measured(90, 0.0, Margin(1.0), 80) < measured(100, 0.0, Margin(1.0), 70)


def test_test_error_by_hand(trained):
    model, images, labels = (
        trained.model,
        trained.data.examples["test"],
        trained.data.labels["test"],
    )

    @jax.jit
    def logits_by_steps(model, images):
        scaled = (images / 16 - 0.5) / 0.5
        x = jnp.concatenate([scaled, jnp.zeros_like(scaled)], axis=-1)
        features = model.features_of_input(x)
        return apply_head(model.head, model.statistics, features)

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
