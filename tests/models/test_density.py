"""The density as a value: keys, estimators, shared programs, ranges and mistakes;
test_every_model.py has the rest.
"""

import dataclasses
import pickle

import jax
import jax.numpy as jnp
import kept
import numpy as np
import pytest
import scipy.stats

import iresnet_jax as ir
from iresnet_jax.bijections.bounded import Bounded
from iresnet_jax.bijections.equalize import Equalize
from iresnet_jax.bijections.marginals import Marginals
from iresnet_jax.bijections.residual import Solver
from iresnet_jax.bijections.standardize import Center, Standardize
from iresnet_jax.maths.logdet_series import RouletteLogdet, SeriesLogdet
from iresnet_jax.models.architecture import FlowSpec, StageSpec
from iresnet_jax.models.density import Density
from iresnet_jax.models.density_spec import DensitySpec

SINGLE = 1e-4  # float32: sums of a few hundred terms by another route
LEVELS = 8
FLOW = FlowSpec((4, 4, 1), (StageSpec(1, hidden=(6,), activation="clipswish"),))
IMAGES = DensitySpec(FLOW, "logistic", Equalize((0.3, *(0.1,) * 7), alpha=1e-3), LEVELS)
PLANE = DensitySpec(FlowSpec((2,), (StageSpec(2, hidden=(6,), activation="tanh"),)))


# A batch of one size for all tests, which share compiled programs.
X = np.random.default_rng(0).integers(0, LEVELS, (3, 4, 4, 1), np.uint8)
POINTS = np.random.default_rng(0).normal(size=(3, 2)).astype(np.float32)


def keys():
    """One for each example."""
    return jax.random.split(jax.random.key(0), 3)


# Compiled: one operation at a time, loops take seconds.
terms_of, log_prob, encode, decode = (
    jax.jit(m) for m in (Density.terms, Density.log_prob, Density.encode, Density.decode)
)


def test_bits_per_dim_of_the_uniform_density():
    """Centred pixels under a flow that does nothing and a flat prior would need log2(levels)
    bits each.
    """
    spec = DensitySpec(FLOW, transform=Center(), num_levels=LEVELS)
    np.testing.assert_allclose(spec.in_units(jnp.array([-16 * np.log(LEVELS)])), 3, rtol=1e-6)
    assert spec.unit == "bits/dim"
    assert PLANE.unit == "nats"
    np.testing.assert_allclose(PLANE.in_units(jnp.array([-2.5])), 2.5)


def test_other_weights_and_other_numbers_of_data_share_a_program():
    density, traces = kept.model(PLANE), []

    @jax.jit
    def encode(density, x):
        traces.append(0)
        return density.encode(x)

    for mean, low in ((0.5, -9.0), (-0.5, -8.0)):
        transform = Bounded(
            (low, -np.inf), (9.0, np.inf), then=Standardize((mean, 0.0), (2.0, 1.0))
        )
        other = density.with_(spec=dataclasses.replace(PLANE, transform=transform))
        encode(
            other.with_(weights=jax.tree.map(lambda a, mean=mean: mean * a, density.weights)),
            POINTS,
        )
    assert len(traces) == 1
    encode(other.with_(solver=Solver(atol=1e-3)), POINTS)
    assert len(traces) == 2


def test_the_estimator_travels_with_the_model():
    density = kept.model(PLANE)
    exact = terms_of(density, POINTS, keys(), keys())
    assert not np.any(exact.info.truncation_bound)
    series = terms_of(
        density.with_(estimator=SeriesLogdet(3, num_probes=2)), POINTS, keys(), keys()
    )
    assert np.all(series.info.truncation_bound > 0)
    np.testing.assert_array_equal(series.log_prior, exact.log_prior)
    fixed = RouletteLogdet().fix_length(jax.random.key(1))
    length = jax.jit(lambda m: m.how.estimator.length)(density.with_(estimator=fixed))
    assert int(length) == int(fixed.length)


def test_each_example_has_the_noise_of_its_key():
    density = kept.model(IMAGES)
    of_keys = log_prob(density, X, keys())
    np.testing.assert_allclose(log_prob(density, X[::-1], keys()[::-1]), of_keys[::-1], rtol=SINGLE)


def test_models_can_be_pickled():
    squeezed = FlowSpec((4, 4, 1), (StageSpec(1, hidden=(6,), kernel_sizes=(3, 3), squeeze=2),))
    density, classifier = (
        kept.model(dataclasses.replace(IMAGES, flow=squeezed)),
        kept.model(kept.CLASSIFIER),
    )
    other_density, other_classifier = pickle.loads(pickle.dumps((density, classifier)))
    np.testing.assert_array_equal(encode(other_density, X), encode(density, X))
    np.testing.assert_array_equal(other_classifier.logits(X), classifier.logits(X))
    assert len({classifier, other_classifier}) == 2  # by identity, as densities are


def test_classes_of_a_conditional_model_take_contexts():
    model = kept.model(dataclasses.replace(kept.GIVEN, num_classes=2))
    z = model.encode(POINTS[:3], context=kept.CONTEXTS[:3])
    by_class = jax.nn.log_softmax(model.prior.log_prob_by_class(z))
    np.testing.assert_allclose(
        model.class_log_probs(POINTS[:3], context=kept.CONTEXTS[:3]), by_class, rtol=SINGLE
    )


def test_values_between_those_of_a_grid_count_as_the_nearest():
    model = kept.model(dataclasses.replace(PLANE, cells=Marginals.lines([1, 0])))
    between, key = POINTS.copy(), jax.random.key(0)
    between[:, 0] = [0.2, 0.8, -1.3]
    nearest = np.stack([between[:, 0].round(), between[:, 1]], axis=1)
    np.testing.assert_array_equal(model.log_prob(between, key), model.log_prob(nearest, key))


def test_a_flow_without_blocks_is_a_flow(tmp_path):
    """Standardised data under a normal prior are normal, and bounds are exact."""
    x = np.random.default_rng(0).normal(1, 3, size=(300, 2)).astype(np.float32)
    model = ir.Density.init(jax.random.key(0), x, stages=())
    expected = scipy.stats.norm(x.mean(axis=0), x.std(axis=0)).logpdf(x).sum(axis=1)
    model.save(tmp_path / "model.npz")
    for own in (model, model.freeze(), ir.load(tmp_path / "model.npz")):
        np.testing.assert_allclose(own.log_prob(x), expected, rtol=1e-5)
    assert model.flow().inverse_lipschitz == 1
    certificate = model.certificate()
    assert certificate.certified
    np.testing.assert_allclose(certificate.inverse, x.std(axis=0).max(), rtol=1e-4)
    assert "0 blocks" in str(certificate)
    back, info = ir.certify.decode(model, model.encode(x))
    np.testing.assert_allclose(back, x, atol=1e-5)
    assert info.certificate.applied.all()
    assert np.all(np.linalg.norm(back - x, axis=1) <= info.error_bound + 1e-5)
    _, drawn = model.sample(jax.random.key(0), 3)
    np.testing.assert_array_equal(drawn.error_bound, 0)


@pytest.mark.slow
def test_a_flow_in_float64_inverts_latents_in_float32(x64):
    model = kept.exact_model(PLANE)
    x, info = model.flow().inverse(jnp.ones((3, 2), jnp.float32))
    assert x.dtype == jnp.float64
    assert info.converged.all()
    np.testing.assert_allclose(model.flow().forward(x), 1, atol=1e-6)


@pytest.mark.slow
def test_a_flow_takes_numbers_of_lower_precision():
    flow, x = kept.model(PLANE).flow(), jnp.asarray(4 * POINTS).astype(jnp.bfloat16)
    found, expected = (
        flow.forward_and_logdet(given, jax.random.key(0))[:2]
        for given in (x, x.astype(jnp.float32))
    )
    for a, b in zip((*found, flow.forward(x)), (*expected, expected[0]), strict=True):
        np.testing.assert_array_equal(a, b)
