"""Densities as distributions of distrax."""

import warnings

import jax
import kept
import numpy as np
import pytest

import iresnet_jax as ir

SAME = {"rtol": 1e-5, "atol": 1e-5}  # float32
KEY = jax.random.key(0)


@pytest.fixture
def distrax():
    """Imported by the one process that runs this file, and not by all, which collect it; it broadcasts implicitly."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TensorFlow Probability asks JAX for names that are on their way out
        found = pytest.importorskip("distrax", reason="distrax is not installed, or does not import", exc_type=Exception)
    with jax.numpy_rank_promotion("allow"):
        yield found


def test_it_is_a_distribution_of_distrax(distrax):
    model = kept.model(kept.GIVEN)
    density = ir.adapters.to_distrax(model, context=kept.CONTEXTS)
    assert isinstance(density, distrax.Distribution)
    assert (density.batch_shape, density.event_shape, density.dtype) == ((5,), (2,), np.float32)
    x, log_prob = density.sample_and_log_prob(seed=KEY, sample_shape=(4,))
    assert x.shape == (4, 5, 2)
    np.testing.assert_allclose(density.sample(seed=KEY, sample_shape=4), x, **SAME)
    np.testing.assert_allclose(density.log_prob(x), log_prob, **SAME)
    np.testing.assert_allclose(model.log_prob(x, context=kept.CONTEXTS), log_prob, **SAME)
    np.testing.assert_allclose(jax.jit(lambda density, x: density.log_prob(x))(density, x), log_prob, **SAME)
    assert jax.eval_shape(lambda: density.sample(seed=7)).shape == (5, 2)


def test_distributions_of_distrax_are_made_of_it(distrax):
    model = kept.model(kept.GIVEN)
    rows = distrax.Independent(ir.adapters.to_distrax(model, context=kept.CONTEXTS), reinterpreted_batch_ndims=1)
    x, log_prob = rows.sample_and_log_prob(seed=KEY)
    np.testing.assert_allclose(log_prob, model.log_prob(x, context=kept.CONTEXTS).sum(), **SAME)
    single = kept.model(kept.POINTS)
    doubled = distrax.Transformed(ir.adapters.to_distrax(single), distrax.Block(distrax.ScalarAffine(1.0, 2.0), 1))
    y, log_prob = doubled.sample_and_log_prob(seed=KEY)
    np.testing.assert_allclose(log_prob, single.log_prob((y - 1) / 2) - 2 * np.log(2), **SAME)
