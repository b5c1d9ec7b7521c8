"""Scales of contexts and the network on them: what they make of contexts, and a model with both from its file."""

import jax
import jax.numpy as jnp
import kept
import numpy as np
import pytest

import iresnet_jax as ir
from iresnet_jax.models.contexts import ContextScale, apply_network, initial_network

FLOW = ir.FlowSpec((2,), (ir.StageSpec(2, hidden=(4,), activation="tanh"),), context_dim=3)


def columns():
    """A normal entry, a log-normal one over eight orders of magnitude, one with heavy tails, and a constant."""
    generator = np.random.default_rng(0)
    parts = [2 + 3 * generator.normal(size=4000), np.exp(4 * generator.normal(size=4000)), generator.standard_t(2, 4000)]
    return np.stack([*parts, np.ones(4000)], axis=1)


def test_scale_is_linear_for_normal_entries_and_logarithmic_for_others(x64):
    x = columns()
    scale = ContextScale.fit(x)
    bijection = scale.bijection()

    @jax.jit
    def there_and_back(x):
        y, log_det, _ = bijection.forward_and_logdet(x, None)
        dense = jax.vmap(jax.jacfwd(lambda row: bijection.forward(row[None])[0]))(x[:5])
        return y, log_det, bijection.inverse(y)[0], dense

    y, log_det, back, dense = map(np.asarray, there_and_back(x))
    np.testing.assert_allclose(y[:, :3].mean(axis=0), 0, atol=1e-9)
    np.testing.assert_allclose(y[:, :3].std(axis=0), 1, rtol=1e-9)
    np.testing.assert_allclose(y[:, 0], (x[:, 0] - x[:, 0].mean()) / x[:, 0].std(), atol=1e-6)  # linear
    assert np.corrcoef(y[:, 1], np.log(x[:, 1]))[0, 1] > 0.99
    assert np.abs(y[:, 2]).max() < 8 < (np.abs(x[:, 2]) / x[:, 2].std()).max()
    np.testing.assert_allclose(back, x, rtol=1e-6)
    np.testing.assert_allclose(log_det[:5], np.linalg.slogdet(dense)[1], rtol=1e-9)


def test_network_is_its_layers():
    weights = initial_network(jax.random.key(0), 5, (7, 3))
    c = jax.random.normal(jax.random.key(1), (4, 5))
    layers = [np.asarray(weights[name]["kernel"]) for name in ("dense0", "dense1", "skip")]
    expected = np.asarray(jax.nn.gelu(c @ layers[0])) @ layers[1] + c @ layers[2]
    np.testing.assert_allclose(apply_network(weights, c), expected, atol=1e-5)
    assert initial_network(jax.random.key(0), 5, ()) == {}


@pytest.fixture(scope="module")
def model():
    """A conditional density with a network on contexts of length 4."""
    return kept.model(ir.DensitySpec(FLOW, context=ContextScale.fit(columns()), context_hidden=(6, 3)))


def test_the_flow_gets_what_the_network_makes_of_contexts(model):
    x, context = np.random.default_rng(0).normal(size=(3, 2)).astype(np.float32), columns()[:3].astype(np.float32)
    features = apply_network(model.network, model.spec.context.bijection().forward(jnp.asarray(context)))
    bare = model.with_(spec=ir.DensitySpec(FLOW), network={})
    np.testing.assert_allclose(model.log_prob(x, context=context), bare.log_prob(x, context=features), rtol=1e-6)


def test_contexts_of_a_wrong_length_are_refused(model):
    with pytest.raises(ValueError, match="contexts of length 4"):
        model.log_prob(np.zeros((3, 2), np.float32), context=np.zeros((3, 3), np.float32))
    with pytest.raises(ValueError, match="network on contexts gives 5"):
        ir.DensitySpec(FLOW, context=model.spec.context, context_hidden=(5,))
    with pytest.raises(ValueError, match="needs their scale"):
        ir.DensitySpec(FLOW, context_hidden=(3,))
