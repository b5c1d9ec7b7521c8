"""Densities as distributions of flowjax: values, samples, conditions, and weights that its training leaves alone."""

import jax
import jax.numpy as jnp
import kept
import numpy as np
import pytest

import iresnet_jax as ir

SAME = {"rtol": 1e-5, "atol": 1e-5}  # float32
KEY = jax.random.key(0)


@pytest.fixture(autouse=True)
def flowjax():
    """Imported by the one process that runs this file, and not by all, which collect it; it broadcasts implicitly."""
    pytest.importorskip("flowjax", reason="flowjax is not installed")
    with jax.numpy_rank_promotion("allow"):
        yield


def test_it_is_a_distribution_of_flowjax():
    import equinox as eqx

    model = kept.model(kept.POINTS)
    density = ir.adapters.to_flowjax(model)
    assert (density.shape, density.cond_shape) == ((2,), None)
    x, log_prob = eqx.filter_jit(lambda density: density.sample_and_log_prob(KEY, (4, 3)))(density)
    assert x.shape == (4, 3, 2)
    np.testing.assert_allclose(density.sample(KEY, (4, 3)), x, **SAME)
    np.testing.assert_allclose(density.log_prob(x), log_prob, **SAME)
    np.testing.assert_allclose(model.log_prob(x), log_prob, **SAME)


def test_the_condition_is_the_context():
    model = kept.model(kept.GIVEN)
    density = ir.adapters.to_flowjax(model)
    assert density.cond_shape == (3,)
    x, log_prob = density.sample_and_log_prob(KEY, (4,), condition=kept.CONTEXTS)
    assert x.shape == (4, 5, 2)
    np.testing.assert_allclose(model.log_prob(x, context=kept.CONTEXTS), log_prob, **SAME)
    np.testing.assert_allclose(density.log_prob(x, kept.CONTEXTS), log_prob, **SAME)


def test_training_moves_what_stands_around_the_model_and_not_its_weights():
    import paramax
    from flowjax.bijections import Affine
    from flowjax.distributions import Transformed
    from flowjax.train import fit_to_data

    model = kept.model(kept.POINTS)
    samples, _ = model.sample(KEY, 500)
    shifted = Transformed(ir.adapters.to_flowjax(model), Affine(jnp.zeros(2)))
    fitted, _ = fit_to_data(KEY, shifted, samples + 1.0, learning_rate=0.05, max_epochs=10, show_progress=False)
    np.testing.assert_allclose(paramax.unwrap(fitted).bijection.loc, 1.0, atol=0.3)
    after = paramax.unwrap(fitted).base_dist.model
    jax.tree.map(np.testing.assert_array_equal, after.weights, model.weights)
