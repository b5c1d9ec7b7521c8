"""The density as a value: terms against their definition, levels in and out, pytree, bounds and mistakes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import kept
import numpy as np
import pytest

from iresnet_jax.bijections.residual import Solver
from iresnet_jax.bijections.transforms.dequantize import dequantize
from iresnet_jax.bijections.transforms.equalize import Equalize
from iresnet_jax.bijections.transforms.logit import Center, Logit
from iresnet_jax.maths.logdet.exact import ExactLogdet
from iresnet_jax.maths.logdet.hutchinson_series import SeriesLogdet
from iresnet_jax.maths.logdet.roulette import RouletteLogdet
from iresnet_jax.models import priors
from iresnet_jax.models.architecture import FlowSpec, StageSpec
from iresnet_jax.models.density import Density, DensitySpec
from iresnet_jax.models.flow import freeze
from iresnet_jax.models.linen import ResidualFlow

EXACT = 1e-9  # float64, dense determinant
SINGLE = 1e-4  # float32: sums of a few hundred terms by another route
LEVELS = 8
FLOW = FlowSpec(
    (4, 4, 1),
    (
        StageSpec(1, hidden=(4,), kernel_sizes=(3, 3), activation="lipswish", squeeze=2, factor_out=True),
        StageSpec(1, hidden=(6,), activation="clipswish"),
    ),
)
IMAGES = DensitySpec(FLOW, "logistic", Equalize((0.3, *(0.1,) * 7), alpha=1e-3), LEVELS)
PLANE = DensitySpec(FlowSpec((2,), (StageSpec(2, hidden=(6,), activation="tanh"),)))


@functools.cache
def model(spec=IMAGES):
    """Frozen weights in float32, whoever asks first."""
    with jax.enable_x64(False):
        return _model(spec)


def _model(spec):
    x = jax.random.normal(jax.random.key(1), (64, *spec.flow.event_shape))
    module = ResidualFlow(spec.flow, spec.prior_family, num_classes=spec.num_classes)

    @jax.jit
    def build(x):
        params = module.init(jax.random.key(0), x)["params"]
        return freeze(spec.flow, params), params["prior"]

    frozen, prior = build(x)
    return Density(spec, frozen, prior)


def images(num=5, seed=0):
    return np.random.default_rng(seed).integers(0, LEVELS, (num, 4, 4, 1), np.uint8)


# Compiled: one operation at a time, loops take seconds.
terms_of, log_prob, encode, decode = (jax.jit(m) for m in (Density.terms, Density.log_prob, Density.encode, Density.decode))
sample = jax.jit(Density.sample, static_argnums=2)


def test_terms_add_up_to_the_change_of_variables():
    x, (key_noise, key_probe) = images(2), jax.random.split(jax.random.key(3))
    with jax.enable_x64(True):
        exact = jax.tree.map(lambda a: a.astype(jnp.float64), model())
        u = jnp.asarray(dequantize(key_noise, jnp.asarray(x), LEVELS), jnp.float64)
        terms = terms_of(exact.continuous, u, key_noise, key_probe)
        z = encode(exact.continuous, u)
        one = jax.jacfwd(lambda v: exact.continuous.encode(v[None])[0])
        jacobians = np.asarray(jax.jit(jax.vmap(one))(u)).reshape(2, 16, 16)
        expected = np.linalg.slogdet(jacobians)[1] + priors.log_prob("logistic", exact.prior, z)
        np.testing.assert_allclose(terms.log_prob, expected, atol=EXACT)
    of_levels = terms_of(model(), x, key_noise, key_probe)
    np.testing.assert_allclose(of_levels.log_prob, np.asarray(terms.log_prob) - 16 * np.log(LEVELS), rtol=SINGLE)
    total = of_levels.log_prior + of_levels.log_det + of_levels.log_det_transform
    np.testing.assert_allclose(of_levels.log_prob, total, rtol=SINGLE)


def test_bits_per_dim_of_the_uniform_density():
    """Centred pixels under a flow that does nothing and a flat prior would need log2(levels) bits each."""
    spec = DensitySpec(FLOW, transform=Center(), num_levels=LEVELS)
    np.testing.assert_allclose(spec.in_units(jnp.array([-16 * np.log(LEVELS)])), 3, rtol=1e-6)
    assert spec.unit == "bits/dim"
    assert PLANE.unit == "nats"
    np.testing.assert_allclose(PLANE.in_units(jnp.array([-2.5])), 2.5)


def test_levels_go_in_and_come_out():
    density, x = model(), images()
    z = encode(density, x)
    back, info = decode(density, z)
    assert info.converged.all()
    assert back.dtype == jnp.uint8
    np.testing.assert_array_equal(back, x)
    samples, info = sample(density, jax.random.key(0), 4)
    assert samples.shape == (4, 4, 4, 1)
    assert samples.dtype == jnp.uint8
    assert info.converged.all()
    smooth, _ = sample(density.continuous, jax.random.key(0), 4)
    np.testing.assert_array_equal(np.clip(np.floor(np.asarray(smooth, np.float64) * LEVELS), 0, LEVELS - 1), samples)


def test_a_model_is_an_argument_like_any_array():
    density, x = model(), jnp.asarray(images(3))
    key = jax.random.split(jax.random.key(0), 3)

    def loss(density, x):
        return -jnp.mean(density.terms(x, key, key).log_prob)

    gradients = jax.jit(jax.grad(loss, allow_int=True))(density, x)
    assert isinstance(gradients, Density)
    assert np.any(gradients.weights["stage0"].branch.weights["conv0"]["kernel"])
    assert gradients.spec == density.spec
    twice = jax.tree.map(lambda a: jnp.stack([a, a]), density)
    both = jax.jit(jax.vmap(lambda m: m.terms(x, key, key).log_prob))(twice)
    np.testing.assert_allclose(both[0], terms_of(density, x, key, key).log_prob, rtol=SINGLE)
    traces = []

    @jax.jit
    def encode(density, x):
        traces.append(0)
        return density.encode(x)

    encode(density, x)
    encode(density.with_(weights=jax.tree.map(lambda a: 0.5 * a, density.weights)), x)
    assert len(traces) == 1  # other weights are other arrays, not another program
    encode(density.with_(solver=Solver(atol=1e-3)), x)
    assert len(traces) == 2


def test_the_estimator_travels_with_the_model():
    density, x = model(), images(4)
    keys = jax.random.split(jax.random.key(0), 4)
    exact = terms_of(density, x, keys, keys)
    assert not np.any(exact.info.truncation_bound)
    series = terms_of(density.with_(estimator=SeriesLogdet(3, num_probes=2)), x, keys, keys)
    assert np.all(series.info.truncation_bound > 0)
    np.testing.assert_array_equal(series.log_prior, exact.log_prior)
    fixed = RouletteLogdet().fix_length(jax.random.key(1))
    length = jax.jit(lambda m: m.estimator.length)(density.with_(estimator=fixed))
    assert int(length) == int(fixed.length)


def test_without_a_key_noise_and_probes_are_fixed():
    density, x = model(), images(3)
    once = log_prob(density, x)
    np.testing.assert_array_equal(log_prob(density, x), once)
    assert np.all(log_prob(density, x, jax.random.key(7)) != once)
    keys = jax.random.split(jax.random.key(2), 3)
    np.testing.assert_allclose(log_prob(density, x[1:], keys[1:]), log_prob(density, x, keys)[1:], rtol=SINGLE)


@pytest.fixture(scope="module")
def with_classes():
    return model(dataclasses.replace(IMAGES, num_classes=3))


def test_bayes_rule(with_classes):
    prior = {**with_classes.prior, "class_logits": jnp.log(jnp.array([0.2, 0.5, 0.3]))}
    prior["mean"] = prior["mean"] + jnp.arange(3.0)[:, None]
    density, x = with_classes.with_(prior=prior), images()
    z = encode(density, x)
    joint = np.stack(
        [
            priors.log_prob("logistic", {name: prior[name][k] for name in ("mean", "log_scale")}, z)
            + np.log([0.2, 0.5, 0.3][k])
            for k in range(3)
        ],
        axis=1,
    )
    expected = joint - np.logaddexp.reduce(joint, axis=1, keepdims=True)
    np.testing.assert_allclose(jax.jit(Density.class_log_probs)(density, x), expected, atol=SINGLE)
    keys = jax.random.split(jax.random.key(0), 5)
    terms = terms_of(density, x, keys, keys)
    np.testing.assert_allclose(terms.log_prior, np.logaddexp.reduce(terms.log_prior_by_class, axis=1), rtol=SINGLE)
    samples, info = sample(density, jax.random.key(0), 4, labels=jnp.array([0, 1, 2, 3]))
    np.testing.assert_array_equal(info.converged, [True, True, True, False])  # there is no class 3
    assert samples.shape == (4, 4, 4, 1)


def test_freezing_certifies(with_classes):
    loose = with_classes.with_(weights=kept.uncertified(with_classes.weights, 3))
    with pytest.raises(ValueError, match=r"not certified: call freeze\(\) first"):
        loose.certificate()
    certificate = jax.jit(Density.freeze)(loose).certificate()
    assert certificate.certified
    assert certificate.coeff == 0.9
    assert [block.name for block in certificate.blocks] == ["stage0/block00", "stage1/block00"]
    for block in certificate.blocks:
        assert 0.97 * 0.81 < block.bound <= 0.81 == pytest.approx(block.target)
        for layer in block.layers:
            assert layer.estimate <= layer.bound * (1 + 1e-6)
            assert layer.bound <= 0.9
    text = str(certificate)
    assert "stage1/block00/dense1" in text
    assert "every one of 2 blocks is a contraction" in text
    assert certificate.max_block == max(block.bound for block in certificate.blocks)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda m: m.encode(images() / LEVELS), "integer levels 0 to 7, got float64: undo the scaling"),
        (lambda m: m.log_prob(images() + np.uint8(1)), "got levels from . to 8"),
        (lambda m: m.log_prob(images()[:, :3]), r"shape \(batch, 4, 4, 1\) .* got an array of shape \(5, 3, 4, 1\)"),
        (lambda m: m.continuous.encode(images()), r"takes floats of shape \(batch, 4, 4, 1\), got uint8"),
        (lambda m: m.class_log_probs(images()), "one prior for all"),
        (lambda m: m.sample(jax.random.key(0), 2, labels=jnp.array([0, 1])), "one prior for all"),
        (lambda m: m.sample(jax.random.key(0), 0), "num must lie in"),
        (lambda m: m.sample(jax.random.key(0), 1, temperature=-1.0), "temperature at least 0"),
    ],
)
def test_mistakes_are_named(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call(model())


def test_labels_that_are_none_are_named(with_classes):
    with pytest.raises(ValueError, match=r"labels must be 2 integers, .* int32 of shape \(1,\)"):
        with_classes.sample(jax.random.key(0), 2, labels=jnp.array([0]))
    with pytest.raises(ValueError, match=r"labels must be 2 integers, .* float32"):
        with_classes.sample(jax.random.key(0), 2, labels=jnp.array([0.0, 1.0]))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"prior_family": "cauchy"}, "prior_family must be one of gaussian, logistic, mixture, got 'cauchy'"),
        ({"prior_family": "mixture"}, "num_components is for the prior mixture, .* got None for the prior mixture"),
        ({"num_components": 2}, "got 2 for the prior logistic"),
        ({"prior_family": "mixture", "num_components": 2}, r"prior of vectors .* got 2 components .* shape \(4, 4, 1\)"),
        ({"prior_family": "mixture", "num_components": 0, "flow": PLANE.flow, "transform": Center()}, "at least 1 .* got 0"),
        (
            {"prior_family": "mixture", "num_components": 2, "num_classes": 3, "flow": PLANE.flow, "transform": Center()},
            "without classes, .* 3 classes",
        ),
        ({"num_classes": 1}, "num_classes must be at least 2, got 1"),
        ({"num_levels": 9}, "equalize needs the frequency of each of 9 levels, got 8"),
        ({"transform": Equalize((0.5, 0.5), (0.5,) * 3), "num_levels": 2}, r"a share for each entry of \(4, 4, 1\), got 3"),
    ],
)
def test_specs_that_contradict_themselves(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        dataclasses.replace(IMAGES, **change)


def test_points_have_no_levels():
    points = np.random.default_rng(0).normal(size=(4, 2)).astype(np.float32)
    density = model(PLANE)
    assert density.continuous == density
    back, info = decode(density, encode(density, points))
    assert info.converged.all()
    np.testing.assert_allclose(back, points, atol=1e-5)
    assert isinstance(density.estimator, ExactLogdet)
    np.testing.assert_allclose(log_prob(density, points), log_prob(density, points, jax.random.key(5)), rtol=1e-6)


def test_a_logit_of_continuous_data_in_the_unit_interval():
    spec = dataclasses.replace(PLANE, transform=Logit(0.05))
    u = np.random.default_rng(0).uniform(size=(4, 2)).astype(np.float32)
    density = model(PLANE).with_(spec=spec)
    back, _ = decode(density, encode(density, u))
    np.testing.assert_allclose(back, u, atol=1e-5)
