"""Contexts of densities: scales and networks on them, and densities given one of them."""

import jax
import jax.numpy as jnp
import kept
import numpy as np
import pytest

import iresnet_jax as ir
from iresnet_jax import load
from iresnet_jax.models.contexts import ContextScale, apply_network, initial_network

BATCH, CONTEXT_DIM = 3, 4
PLANE = ir.FlowSpec(
    (2,), (ir.StageSpec(3, hidden=(8,), activation="tanh"),), context_dim=CONTEXT_DIM
)
IMAGES = ir.FlowSpec(
    (4, 4, 1),
    (
        ir.StageSpec(
            1,
            (3,),
            (3, 3),
            activation="tanh",
            squeeze=2,
            factor_out=True,
            positional_bias=True,
            kind="sandwich",
        ),
        ir.StageSpec(1, (4,), activation="clipswish"),
    ),
    context_dim=CONTEXT_DIM,
)


# Compiled: one operation at a time, loops take seconds.
encode, decode = jax.jit(ir.Density.encode), jax.jit(ir.Density.decode)
log_prob = jax.jit(ir.Density.log_prob)


def test_a_conditional_density_integrates_to_one(x64):
    side = np.linspace(-12, 12, 240)
    grid = np.stack(np.meshgrid(side, side), axis=-1).reshape(-1, 2)
    values = np.exp(
        log_prob(kept.exact_model(ir.DensitySpec(PLANE)), grid, context=np.arange(CONTEXT_DIM) / 2)
    )
    np.testing.assert_allclose(np.sum(values) * (side[1] - side[0]) ** 2, 1, atol=1e-3)


def test_a_density_given_a_context_is_the_same_function(x64, tmp_path):
    """Convolutional and dense, of two kinds, with a scale of contexts and a network on them."""
    scale = ir.Standardize((1.0,) * CONTEXT_DIM, (2.0,) * CONTEXT_DIM)
    whole = kept.exact_model(ir.DensitySpec(IMAGES, context=scale, context_hidden=(5, CONTEXT_DIM)))
    rng = np.random.default_rng(0)
    x, context = rng.uniform(size=(BATCH, *IMAGES.event_shape)), rng.normal(size=(2, CONTEXT_DIM))
    given = whole.given(context[0])
    np.testing.assert_allclose(
        log_prob(given, x), log_prob(whole, x, context=context[0]), rtol=1e-13
    )
    assert np.abs(log_prob(given, x) - log_prob(whole, x, context=context[1])).max() > 1e-3
    z = encode(whole, x, context=context[0])
    np.testing.assert_allclose(decode(given, z)[0], x, atol=1e-10)
    loaded = load(given.save(tmp_path / "model.npz"))
    assert loaded.spec == given.spec
    for name, block in loaded.weights.items():
        jax.tree.map(
            np.testing.assert_array_equal, block.branch.weights, given.weights[name].branch.weights
        )
    assert given.certificate().max_block == whole.certificate().max_block


def columns():
    """A normal, a log-normal, a heavy-tailed and a constant entry."""
    generator = np.random.default_rng(0)
    parts = [
        2 + 3 * generator.normal(size=4000),
        np.exp(4 * generator.normal(size=4000)),
        generator.standard_t(2, 4000),
    ]
    return np.stack([*parts, np.ones(4000)], axis=1)


def test_scale_is_linear_for_normal_entries_and_logarithmic_for_others(x64):
    x = columns()
    scale = ContextScale.fit(x)

    y = np.asarray(scale.forward(jnp.asarray(x)))
    np.testing.assert_allclose(y[:, :3].mean(axis=0), 0, atol=1e-9)
    np.testing.assert_allclose(y[:, :3].std(axis=0), 1, rtol=1e-9)
    # linear
    np.testing.assert_allclose(y[:, 0], (x[:, 0] - x[:, 0].mean()) / x[:, 0].std(), atol=1e-6)
    assert np.corrcoef(y[:, 1], np.log(x[:, 1]))[0, 1] > 0.99
    assert np.abs(y[:, 2]).max() < 8 < (np.abs(x[:, 2]) / x[:, 2].std()).max()


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
    return kept.model(
        ir.DensitySpec(PLANE, context=ContextScale.fit(columns()), context_hidden=(6, 4))
    )


def test_the_flow_gets_what_the_network_makes_of_contexts(model):
    x, context = (
        np.random.default_rng(0).normal(size=(3, 2)).astype(np.float32),
        columns()[:3].astype(np.float32),
    )
    features = apply_network(model.network, model.spec.context.forward(jnp.asarray(context)))
    bare = model.with_(spec=ir.DensitySpec(PLANE), network={})
    np.testing.assert_allclose(
        model.log_prob(x, context=context), bare.log_prob(x, context=features), rtol=1e-6
    )
