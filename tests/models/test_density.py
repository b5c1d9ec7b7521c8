"""The density as a value: estimators, shared programs, ranges; see test_every_model.py."""

import dataclasses

import jax
import jax.numpy as jnp
import kept
import numpy as np
import scipy.stats

import iresnet_jax as ir

LEVELS = 8
FLOW = ir.FlowSpec((4, 4, 1), (ir.StageSpec(1, hidden=(6,), activation="clipswish"),))
PLANE = ir.DensitySpec(ir.FlowSpec((2,), (ir.StageSpec(2, hidden=(6,), activation="tanh"),)))


POINTS = np.random.default_rng(0).normal(size=(3, 2)).astype(np.float32)


def keys():
    """One for each example."""
    return jax.random.split(jax.random.key(0), 3)


# Compiled: one operation at a time, loops take seconds.
terms_of, log_prob, encode, decode = (
    jax.jit(m)
    for m in (ir.Density.terms, ir.Density.log_prob, ir.Density.encode, ir.Density.decode)
)


def test_bits_per_dim_of_the_uniform_density():
    """A flow that does nothing and a flat prior need log2(levels) bits each."""
    spec = ir.DensitySpec(FLOW, transform=ir.Center(), num_levels=LEVELS)
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
        transform = ir.Bounded(
            (low, -np.inf), (9.0, np.inf), then=ir.Standardize((mean, 0.0), (2.0, 1.0))
        )
        other = density.with_(spec=dataclasses.replace(PLANE, transform=transform))
        encode(
            other.with_(weights=jax.tree.map(lambda a, mean=mean: mean * a, density.weights)),
            POINTS,
        )
    assert len(traces) == 1
    encode(other.with_(solver=ir.Solver(atol=1e-3)), POINTS)
    assert len(traces) == 2


def test_the_estimator_travels_with_the_model():
    density = kept.model(PLANE)
    exact = terms_of(density, POINTS, keys(), keys())
    assert not np.any(exact.info.truncation_bound)
    series = terms_of(
        density.with_(estimator=ir.SeriesLogdet(3, num_probes=2)), POINTS, keys(), keys()
    )
    assert np.all(series.info.truncation_bound > 0)
    np.testing.assert_array_equal(series.log_prior, exact.log_prior)
    fixed = ir.RouletteLogdet().fix_length(jax.random.key(1))
    length = jax.jit(lambda m: m.how.estimator.length)(density.with_(estimator=fixed))
    assert int(length) == int(fixed.length)


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
    assert "no residual blocks" in str(certificate)
    back, info = ir.certify.decode(model, model.encode(x))
    np.testing.assert_allclose(back, x, atol=1e-5)
    assert info.certificate.applied.all()
    assert np.all(np.linalg.norm(back - x, axis=1) <= info.error_bound + 1e-5)
    _, drawn = model.sample(jax.random.key(0), 3)
    np.testing.assert_array_equal(drawn.error_bound, 0)
