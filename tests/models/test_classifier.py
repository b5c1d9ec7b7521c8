"""The classifier against a plain NumPy network in float64, and the way back to the images."""

import dataclasses
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import plain_flow
import pytest

import iresnet_jax as ir
from iresnet_jax.bijections import reshape
from iresnet_jax.models import contractions
from iresnet_jax.models import linen as modules
from iresnet_jax.models.classifier import cross_entropy

EXACT = 1e-10  # the same maths by another route, float64
SINGLE = 1e-5  # in float32
ROUND_TRIP = 1e-4  # float32, a few blocks
NORM_RTOL = 1e-3  # the tolerance of the norms

STAGE = ir.StageSpec(2, hidden=(3,), kernel_sizes=(3, 1), squeeze=2)
SPEC = ir.ClassifierSpec(
    ir.FlowSpec(
        (4, 4, 3), (STAGE, ir.StageSpec(1, hidden=(5,), kernel_sizes=(1, 3), preactivation=True))
    ),
    image_shape=(4, 4, 2),
    num_classes=3,
    num_levels=17,
    pad_channels=1,
    mean=(0.3, 0.6),
    std=(0.2, 0.5),
)


def images_of(num=5, seed=0):
    """By default in a batch of the size for which programs are compiled."""
    return np.random.default_rng(seed).integers(0, 17, (num, 4, 4, 2), np.uint8)


def variables_of(spec, images, *, scale=3.0):
    """Fresh variables with kernels beyond the budget, and a head that is not the initial one."""
    x = preprocess(spec, images)
    variables = cast(
        Any, jax.jit(modules.Classifier(spec, last_scale=scale).init)(jax.random.key(0), x)
    )
    rng = np.random.default_rng(1)
    head = jax.tree.map(
        lambda a: a + rng.normal(0, 0.3, a.shape).astype(np.float32), variables["params"]["head"]
    )
    return {**variables, "params": {**variables["params"], "head": head}}


def preprocess(spec, images):
    return spec.preprocess(images)


# Compiled: one operation at a time, loops take seconds.
features_of = jax.jit(ir.Classifier.encode)
features_of_input = jax.jit(ir.Classifier.features_of_input)
logits_of = jax.jit(ir.Classifier.logits)
decode = jax.jit(ir.Classifier.decode)


@pytest.fixture(scope="module")
def variables():
    return variables_of(SPEC, images_of(64))


@pytest.fixture(scope="module")
def model(variables):
    frozen = jax.jit(lambda params: contractions.freeze(SPEC.flow, params))(variables["params"])
    return ir.Classifier(SPEC, frozen, variables["params"]["head"], variables["batch_stats"])


def naive_features(weights, images):
    """The flow of another file on images that are scaled and padded here."""
    scaled = (images / 16 - np.array([0.3, 0.6])) / np.array([0.2, 0.5])
    padded = np.concatenate([scaled, np.zeros((*scaled.shape[:3], 1))], axis=-1)
    features = [
        plain_flow.forward(plain_flow.FLOAT, SPEC.flow, jax.device_get(weights), x) for x in padded
    ]
    return np.reshape(features, (len(images), *SPEC.feature_shape))


def naive_head(head, mean, var, features):
    head = jax.tree.map(lambda a: np.asarray(a, np.float64), head)
    mean, var = (np.asarray(a, np.float64) for a in (mean, var))
    h = (features - mean) / np.sqrt(var + 1e-5) * head["norm"]["scale"] + head["norm"]["bias"]
    return np.maximum(h, 0).mean(axis=(1, 2)) @ head["linear"]["kernel"] + head["linear"]["bias"]


def test_features_and_logits_agree_with_a_plain_network(model):
    images = images_of(seed=2)
    expected, head = naive_features(model.weights, images), model.statistics["head"]
    by_hand = naive_head(model.head, head["mean"], head["var"], expected)
    with jax.enable_x64(True):
        found = reshape.unflatten(features_of(model, images), SPEC.feature_shape)
        assert found.shape == (5, *SPEC.feature_shape) == (5, 2, 2, 12)
        np.testing.assert_allclose(found, expected, atol=EXACT)
        np.testing.assert_allclose(logits_of(model, images), by_hand, atol=EXACT)


def test_modules_apply_what_the_model_computes(variables, model):
    images, module = images_of(), modules.Classifier(SPEC)

    @jax.jit
    def both(variables, x):
        return module.apply(variables, x), contractions.constrain(
            SPEC.flow, variables["params"], variables["spectral"]
        )

    found, constrained = cast(Any, both(variables, preprocess(SPEC, images)))
    np.testing.assert_allclose(
        found, logits_of(model.with_(weights=constrained.weights), images), atol=SINGLE
    )
    assert (constrained.weights["stage0"].branch.lipschitz_bound <= 0.81 * (1 + NORM_RTOL)).all()


def test_a_fresh_one_is_certified_and_its_head_knows_the_moments_of_features():
    images, stage = images_of(64), ir.StageSpec(1, (3,), (3, 1), squeeze=2)
    preprocessing = {"num_levels": 17, "pad_channels": 1, "mean": (0.3, 0.6), "std": (0.2, 0.5)}
    fresh = ir.Classifier.init(jax.random.key(0), images, 3, stages=[stage], **preprocessing)
    assert fresh.spec == dataclasses.replace(SPEC, flow=ir.FlowSpec((4, 4, 3), (stage,)))
    assert fresh.certificate().certified
    features, head = np.reshape(features_of(fresh, images), (-1, 12)), fresh.statistics["head"]
    np.testing.assert_allclose(features.mean(axis=0), head["mean"], atol=1e-4)
    np.testing.assert_allclose(features.var(axis=0), head["var"], rtol=1e-3)


def test_cross_entropy_with_smoothing_against_its_definition():
    logits = np.random.default_rng(0).normal(size=(6, 4))
    labels = jnp.array([0, 1, 2, 3, 0, 3])
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    for smoothing in (0.0, 0.1):
        target = (1 - smoothing) * np.eye(4)[labels] + smoothing / 4
        found = cross_entropy(jnp.asarray(logits, jnp.float32), labels, label_smoothing=smoothing)
        np.testing.assert_allclose(found, -(target * log_p).sum(axis=1), rtol=SINGLE)


def test_features_of_images_lead_back_to_them(model):
    images = images_of()
    back, info = decode(model, features_of(model, images), bounds=model.bounds())
    assert info.converged.all()
    np.testing.assert_allclose(back * 16, images, atol=16 * ROUND_TRIP)
    assert (info.padding_residual < ROUND_TRIP).all()
    assert (info.padding_residual <= 2 * info.flow_error_bound).all()


def test_the_padding_tells_features_of_no_image(model):
    """Features off the image manifold come back with padding channels that are not zero."""
    x = preprocess(SPEC, images_of())
    features = reshape.flatten(features_of_input(model, x.at[..., 2].add(0.5)))
    back, info = decode(model, features, bounds=model.bounds())
    assert info.converged.all()
    np.testing.assert_allclose(info.padding_residual, 0.5 * 4, atol=ROUND_TRIP)
    np.testing.assert_allclose(back, SPEC.unpad(x), atol=ROUND_TRIP)


def test_padding_and_normalisation_have_an_exact_inverse():
    images = np.random.default_rng(0).uniform(size=(3, 4, 4, 2)).astype(np.float32)
    x = SPEC.pad(jnp.asarray(images))
    assert x.shape == (3, 4, 4, 3)
    np.testing.assert_array_equal(x[..., 2], 0)
    np.testing.assert_allclose(SPEC.unpad(x), images, atol=1e-6)
    np.testing.assert_allclose(SPEC.bilipschitz(), [5, 0.5], rtol=1e-5)
