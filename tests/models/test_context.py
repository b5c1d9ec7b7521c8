"""Conditional branches ``g(x; context)``: the density, samples, the inverse and gradients with respect to the context."""

import jax
import jax.numpy as jnp
import kept
import numpy as np
import pytest

from iresnet_jax import load
from iresnet_jax.bijections.residual import Solver
from iresnet_jax.bijections.standardize import Standardize
from iresnet_jax.branches.branch import Branch
from iresnet_jax.branches.feedforward import FeedforwardSpec
from iresnet_jax.maths import logdet_estimator
from iresnet_jax.maths.logdet_exact import ExactLogdet
from iresnet_jax.maths.logdet_series import RouletteLogdet
from iresnet_jax.models import density
from iresnet_jax.models.architecture import FlowSpec, StageSpec
from iresnet_jax.models.contexts import initial_network

BATCH, CONTEXT_DIM = 3, 4
PLANE = FlowSpec((2,), (StageSpec(3, hidden=(8,), activation="tanh"),), context_dim=CONTEXT_DIM)
IMAGES = FlowSpec(
    (4, 4, 1),
    (
        StageSpec(1, (3,), (3, 3), activation="tanh", squeeze=2, factor_out=True, positional_bias=True, kind="sandwich"),
        StageSpec(1, (4,), activation="clipswish"),
    ),
    context_dim=CONTEXT_DIM,
)
SOLVER = Solver(atol=1e-12)


# Compiled: one operation at a time, loops take seconds.
encode, decode = jax.jit(density.Density.encode), jax.jit(density.Density.decode)
log_prob = jax.jit(density.Density.log_prob)


def case(spec):
    """In float64, by the fixture of the test."""
    with jax.enable_x64(False):
        frozen = kept.model(density.DensitySpec(spec))
    whole = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), frozen).with_(solver=SOLVER)
    keys = jax.random.split(jax.random.key(1), 2)
    x = jax.random.uniform(keys[0], (BATCH, *spec.event_shape), jnp.float64)
    return whole, x, jax.random.normal(keys[1], (BATCH, CONTEXT_DIM))


def test_integers_beyond_32_bits_are_the_same_contexts_as_floats():
    scale = Standardize((3e9, 0.0, 0.0, 0.0), (1e9, 1.0, 1.0, 1.0))
    model = kept.model(density.DensitySpec(PLANE, context=scale))
    whole = np.array([[4_000_000_000, 1, 0, -1]])
    for context in (whole, whole.astype(float)):
        np.testing.assert_allclose(model.scale_context(context), [[1, 1, 0, -1]], rtol=1e-6)
        x, expected = np.zeros((1, 2), np.float32), whole.astype(np.float32)
        np.testing.assert_allclose(model.log_prob(x, context=context), model.log_prob(x, context=expected), rtol=1e-5)


def test_the_constraint_is_in_x_alone():
    branch = PLANE.layout[0].branch
    weights = jax.tree.map(lambda a: a[0], kept.model(density.DensitySpec(PLANE)).weights["stage0"].branch.weights)
    strong = {name: {**layer, "context": 100 * layer["context"]} for name, layer in weights.items()}
    x = jax.random.normal(jax.random.key(2), (BATCH, 2))
    jacobian_at = jax.jit(jax.jacfwd(lambda x, context: branch.apply(strong, x[None], context)[0]))
    contexts = jax.random.normal(jax.random.key(3), (5, 1, CONTEXT_DIM)) / 100  # so that no activation is flat
    norms = [np.linalg.norm(np.asarray(jacobian_at(x[0], context), np.float64), 2) for context in contexts]
    assert 0.1 < max(norms) < 0.9
    bounds_of = jax.jit(branch.norm_bounds)
    assert len(bounds_of(weights)) == len(branch.layers)
    jax.tree.map(np.testing.assert_array_equal, bounds_of(strong), bounds_of(weights))


def test_a_conditional_density_integrates_to_one(x64):
    whole, _, context = case(PLANE)
    side = jnp.linspace(-12, 12, 240)
    grid = jnp.stack(jnp.meshgrid(side, side), axis=-1).reshape(-1, 2)
    of_context = jnp.broadcast_to(context[:1], (len(grid), CONTEXT_DIM))
    values = np.exp(log_prob(whole, grid, context=of_context))
    np.testing.assert_allclose(np.sum(values) * (side[1] - side[0]) ** 2, 1, atol=1e-3)


def test_gradients_with_respect_to_the_context(x64):
    """Of the likelihood, by finite differences; of samples, by the implicit function theorem on the whole model."""
    whole, x, context = case(PLANE)
    direction = jax.random.normal(jax.random.key(5), context.shape)

    @jax.jit
    @jax.value_and_grad
    def log_likelihood(context):
        return jnp.sum(whole.log_prob(x, context=context))

    (_, gradient), (ahead, _), (behind, _) = (log_likelihood(context + step * direction) for step in (0.0, 1e-5, -1e-5))
    np.testing.assert_allclose(jnp.vdot(gradient, direction), (ahead - behind) / 2e-5, rtol=1e-7)

    def draw(context):
        return whole.sample(jax.random.key(6), BATCH, context=context)[0]

    weights = jax.random.normal(jax.random.key(7), x.shape)
    samples, tangent = jax.jit(lambda c, d: jax.jvp(draw, (c,), (d,)))(context, direction)
    backwards = jax.jit(lambda c: jax.vjp(draw, c)[1](weights)[0])(context)
    np.testing.assert_allclose(jnp.vdot(backwards, direction), jnp.vdot(weights, tangent), rtol=1e-8)

    def encode_one(x, context):
        return whole.encode(x[None], context=context[None])[0]

    @jax.jit
    @jax.vmap
    def derivatives(x, context, direction):
        return jax.jvp(lambda c: encode_one(x, c), (context,), (direction,))[1], jax.jacfwd(encode_one)(x, context)

    pushed, by_x = derivatives(samples, context, direction)
    np.testing.assert_allclose(tangent, -jnp.linalg.solve(by_x, pushed[..., None])[..., 0], atol=1e-8)


def test_the_estimators_gradient_reaches_the_context(x64, monkeypatch):
    """The series' gradient in expectation over all probes of the plane, of which two are enough, is the exact one."""
    probes = jnp.array([[[1.0, 1.0]], [[1.0, -1.0]]])
    monkeypatch.setattr(logdet_estimator, "draw_probes", lambda key, x, *_: jnp.broadcast_to(probes, (2, *x.shape)))
    whole, x, context = case(PLANE)

    def log_det(context, estimator, key):
        return jnp.sum(whole.with_(estimator=estimator).terms(x, key, key, context=context).log_det)

    exact = jax.jit(jax.grad(log_det), static_argnums=1)(context, ExactLogdet(), jax.random.key(0))
    estimator = RouletteLogdet(num_exact_terms=60, num_probes=2)
    estimate = jax.jit(jax.grad(log_det), static_argnums=1)(context, estimator, jax.random.key(1))
    np.testing.assert_allclose(estimate, exact, atol=1e-5 * float(jnp.abs(exact).max()))


def test_a_density_given_a_context_is_the_same_function(x64, tmp_path):
    """Convolutional and dense, of two kinds, with a scale of contexts and a network on them."""
    scale = Standardize((1.0,) * CONTEXT_DIM, (2.0,) * CONTEXT_DIM)
    spec = density.DensitySpec(IMAGES, context=scale, context_hidden=(5, CONTEXT_DIM))
    network = initial_network(jax.random.key(4), CONTEXT_DIM, (5, CONTEXT_DIM))
    flow_alone, x, context = case(IMAGES)
    whole = flow_alone.with_(spec=spec, network=network)
    given = whole.given(context[0])
    np.testing.assert_allclose(log_prob(given, x), log_prob(whole, x, context=context[0]), rtol=1e-13)
    assert np.abs(log_prob(given, x) - log_prob(whole, x, context=context[1])).max() > 1e-3
    z = encode(whole, x, context=context[0])
    np.testing.assert_allclose(decode(given, z)[0], x, atol=1e-10)
    with pytest.raises(ValueError, match="takes no contexts"):
        given.given(context[0])
    loaded = load(given.save(tmp_path / "model.npz"))
    assert loaded.spec == given.spec
    for name, block in loaded.weights.items():
        jax.tree.map(np.testing.assert_array_equal, block.branch.weights, given.weights[name].branch.weights)
    assert given.certificate().max_block == whole.certificate().max_block


def test_bounds_of_a_density_given_a_context_are_those_of_its_weights():
    whole = kept.model(density.DensitySpec(PLANE))
    changed = whole.with_(weights=jax.tree.map(lambda leaf: 3 * leaf, whole.weights))
    for given in (changed.given(np.zeros(CONTEXT_DIM)), jax.jit(lambda m: m.given(jnp.zeros(CONTEXT_DIM)))(changed)):
        assert given.certificate().max_block == changed.certificate().max_block > whole.certificate().max_block


def test_contexts_of_the_wrong_shape_are_named():
    whole = kept.model(density.DensitySpec(PLANE))
    x = jnp.zeros((BATCH, 2))
    with pytest.raises(ValueError, match=r"takes a context of shape \(batch, 4\), got none"):
        whole.encode(x)
    with pytest.raises(ValueError, match=r"takes a context of shape \(batch, 4\), got shape \(3, 5\) for a batch of 3"):
        whole.encode(x, context=jnp.zeros((BATCH, 5)))
    with pytest.raises(ValueError, match=r"one context of shape \(4,\), got shape \(3, 4\)"):
        whole.given(jnp.zeros((BATCH, 4)))
    with pytest.raises(ValueError, match="context_dim must not be negative, got -1"):
        FeedforwardSpec((2,), (3,), context_dim=-1)
    plain = Branch(FeedforwardSpec((2,), (3,)), {}, 0.5)
    with pytest.raises(ValueError, match=r"takes no context \(context_dim=0\), got one of shape \(3, 4\)"):
        plain.given(jnp.zeros((BATCH, 4)))(x)
