"""Certified normalisation, freezing and whole-model bounds, against singular values and Jacobians in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from iresnet_jax.bijections.transforms.logit import Logit
from iresnet_jax.branches import branch as branches
from iresnet_jax.branches import constraint
from iresnet_jax.maths import activations
from iresnet_jax.maths.lipschitz_bounds import branch_bound
from iresnet_jax.models import density
from iresnet_jax.models import flow as model
from iresnet_jax.models.architecture import FlowSpec, StageSpec

COEFF = 0.9
TIGHT = 0.03  # how far below the bound a norm may lie
SPECS = {
    "dense": FeedforwardSpec((5,), (7, 6), activation="clipswish"),
    "convolutional": FeedforwardSpec((4, 5, 3), (6, 8), (3, 1, 3), activation="lipswish", preactivation=True),
    "periodic": FeedforwardSpec((4, 4, 2), (5,), (3, 2), activation="tanh", padding="CIRCULAR"),
}
FLOW = FlowSpec(
    (4, 4, 2),
    (
        StageSpec(2, hidden=(6,), kernel_sizes=(3, 3), activation="lipswish", squeeze=2, factor_out=True),
        StageSpec(2, hidden=(8, 8), activation="elu"),
    ),
    coeff=0.8,
)


def random_branch(spec, seed, scale=1.0):
    """Drawn by NumPy: JAX would compile a program for each shape."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(spec.initial_weights, jax.random.key(0))
    return jax.tree.map(lambda leaf: jnp.asarray(scale * rng.normal(0, 0.4, leaf.shape), jnp.float32), shapes)


def true_norms(spec, weights):
    """The layers' operator norms by SVD of the unfolded maps."""
    norms = {}
    for layer in spec.layers:
        kernel = np.asarray(weights[layer.name]["kernel"], np.float64)
        if kernel.ndim == 4:
            kernel = oracles.dense_conv_matrix(kernel, *layer.in_shape[:2], padding=spec.padding)
        norms[layer.name] = oracles.operator_norm(kernel)
    return norms


def random_params(spec, seed=0, scale=1.0):
    params, rng = {}, np.random.default_rng(seed)
    for name, stage, _, branch in spec.layout:
        shapes = jax.eval_shape(branch.initial_weights, jax.random.key(0))
        shape = (stage.num_blocks, branch.in_shape[-1])
        blocks = jax.tree.map(lambda leaf, num=stage.num_blocks: np.zeros((num, *leaf.shape)), shapes)
        for layer in blocks.values():
            layer["kernel"] = rng.normal(size=layer["kernel"].shape) / np.sqrt(np.prod(layer["kernel"].shape[1:-1]))
        blocks["actnorm"] = {"bias": np.zeros(shape), "log_scale": 0.3 * rng.normal(size=shape)}
        params[name] = {"blocks": jax.tree.map(lambda w: jnp.asarray(scale * w, jnp.float32), blocks)}
    return params


@functools.cache
def frozen(budget="layer"):
    spec = FlowSpec(FLOW.event_shape, FLOW.stages, FLOW.coeff, budget)
    return spec, jax.jit(functools.partial(model.freeze, spec))(random_params(spec))


@pytest.mark.parametrize("budget", constraint.BUDGETS)
@pytest.mark.parametrize("method", ["exact", "gram"])
@pytest.mark.parametrize("name", SPECS)
def test_certified_normalisation_holds_for_any_weights(name, method, budget):
    spec = SPECS[name]
    normalize = jax.jit(functools.partial(constraint.normalize_certified, spec, coeff=COEFF, method=method, budget=budget))
    for seed, scale in enumerate((1.0, 1e-3, 1e6)):
        weights = random_branch(spec, seed, scale)
        normalized = normalize(weights)
        norms, product = true_norms(spec, normalized.weights), float(normalized.lipschitz)
        assert np.prod(list(norms.values())) <= product <= COEFF
        if budget == "layer":
            assert max(norms.values()) <= COEFF
        if scale >= 1 and method == "exact":  # nothing of the budget is given away beyond the bounds' slack
            used = min(norms.values()) if budget == "layer" else np.prod(list(norms.values())) ** (1 / len(norms))
            assert used >= (COEFF if budget == "layer" else COEFF ** (1 / len(norms))) * (1 - 0.2)
        if scale < 1:
            kernels = [w["kernel"] for w in normalized.weights.values()]
            for kernel, layer in zip(kernels, weights.values(), strict=True):
                np.testing.assert_array_equal(kernel, layer["kernel"])


def test_a_budget_by_block_scales_all_layers_by_one_factor():
    spec = SPECS["dense"]
    weights = random_branch(spec, 0)
    settings = {"coeff": COEFF, "budget": "block"}
    by_certificate = jax.jit(functools.partial(constraint.normalize_certified, spec, **settings))(weights)
    vectors = constraint.initial_vectors(spec, jax.random.key(5))
    by_estimate = jax.jit(functools.partial(constraint.normalize, spec, **settings))(weights, vectors)
    for normalized in (by_certificate, by_estimate):
        factors = [float(normalized.weights[n]["kernel"][0, 0] / weights[n]["kernel"][0, 0]) for n in weights]
        np.testing.assert_allclose(factors, factors[0], rtol=1e-6)
        np.testing.assert_allclose(np.prod(list(true_norms(spec, normalized.weights).values())), COEFF, rtol=2e-3)


def test_weights_of_nothing_and_not_numbers():
    spec = SPECS["dense"]
    zero = jax.tree.map(jnp.zeros_like, random_branch(spec, 0))
    for budget in constraint.BUDGETS:
        normalize = functools.partial(constraint.normalize_certified, spec, coeff=COEFF, budget=budget)
        assert float(jax.jit(normalize)(zero).lipschitz) == 0

        def total(weights, normalize=normalize):
            return sum(jnp.sum(a) for a in jax.tree.leaves(normalize(weights, method="gram").weights))

        gradient = jax.jit(jax.grad(total))(zero)
        assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(gradient))
        broken = {**random_branch(spec, 0), "dense1": {"kernel": jnp.full((14, 6), jnp.nan), "bias": jnp.zeros(6)}}
        assert np.isnan(jax.jit(normalize)(broken).lipschitz)


def test_gradient_flows_through_the_certified_norm():
    spec = SPECS["convolutional"]
    weights = random_branch(spec, 2)
    x = jax.random.normal(jax.random.key(7), (2, *spec.in_shape))

    @jax.jit
    def loss(weights):
        normalized = constraint.normalize_certified(spec, weights, coeff=COEFF, method="gram").weights
        return jnp.sum(spec.apply(normalized, x) ** 2)

    with jax.enable_x64(True):
        weights, x = jax.tree.map(lambda a: a.astype(jnp.float64), (weights, x))
        direction = jax.tree.map(lambda a: jax.random.normal(jax.random.key(3), a.shape, a.dtype), weights)
        slope = sum(
            jnp.vdot(g, d) for g, d in zip(*map(jax.tree.leaves, (jax.jit(jax.grad(loss))(weights), direction)), strict=True)
        )
        step = 1e-5
        ahead, behind = (jax.tree.map(lambda w, d, s=s: w + s * d, weights, direction) for s in (step, -step))
        np.testing.assert_allclose(slope, (loss(ahead) - loss(behind)) / (2 * step), rtol=1e-6)


@pytest.mark.parametrize("budget", constraint.BUDGETS)
def test_frozen_weights_are_certified_and_tight(budget):
    spec, fixed = frozen(budget)
    for name, _, _, branch in spec.layout:
        for block, lipschitz in enumerate(fixed.weights[name].branch.lipschitz_bound):
            weights = jax.tree.map(lambda w, block=block: w[block], fixed.weights[name].branch)
            norms = true_norms(branch, weights)
            for layer, norm in norms.items():
                bound = float(fixed.bounds[name][layer][block])
                assert norm <= bound <= norm * (1 + TIGHT)
            assert np.prod(list(norms.values())) <= lipschitz
            assert lipschitz <= (spec.coeff if budget == "block" else spec.coeff ** len(norms)) * (1 + 1e-6)


def test_freezing_shrinks_what_power_iteration_let_through():
    params = random_params(FLOW, scale=3.0)
    starts = {
        name: {
            "blocks": jax.vmap(functools.partial(constraint.initial_vectors, branch))(jax.random.split(jax.random.key(1), 2))
        }
        for name, _, _, branch in FLOW.layout
    }
    hoped = jax.jit(functools.partial(model.constrain, FLOW, num_steps=1))(params, starts).weights
    worst = {"hoped": 0.0, "frozen": 0.0}
    fixed = jax.jit(functools.partial(model.freeze, FLOW))(params).weights
    for label, weights in {"hoped": hoped, "frozen": fixed}.items():
        for name, _, _, branch in FLOW.layout:
            for block in range(2):
                norms = true_norms(branch, jax.tree.map(lambda w, block=block: w[block], weights[name].branch))
                worst[label] = max(worst[label], *norms.values())
    assert worst["frozen"] <= FLOW.coeff < worst["hoped"]


def test_whole_model_bounds_hold_for_jacobians():
    spec, fixed = frozen()
    bounds = Logit(0.05).bilipschitz().compose(model.bilipschitz(spec, fixed.weights))
    x = jax.random.uniform(jax.random.key(4), (5, *spec.event_shape))
    with jax.enable_x64(True):
        weights = jax.tree.map(lambda a: a.astype(jnp.float64), fixed.weights)
        whole = density.Density(density.DensitySpec(spec, transform=Logit(0.05)), weights, {})

        jacobians = jax.jit(jax.vmap(jax.jacfwd(lambda x: whole.encode(x[None])[0])))(jnp.asarray(x, jnp.float64))
        for jacobian in np.asarray(jacobians).reshape(len(x), spec.num_dims, -1):
            sizes = np.linalg.svd(jacobian, compute_uv=False)
            assert sizes[0] <= bounds.forward
            assert 1 / sizes[-1] <= bounds.inverse
    assert 1 < bounds.forward < 1e5


def test_every_activation_is_covered_by_the_certificate():
    """The certificate multiplies norms of linear maps: activations must be 1-Lipschitz as computed, up to rounding."""
    for name, activation in activations.ACTIVATIONS.items():
        width = 4
        x = 3 * jax.random.normal(jax.random.key(1), (200, width))
        for beta in (-3.0, 0.5, 4.0) if activation.has_beta else (None,):
            apply = activation.apply if beta is None else functools.partial(activation.apply, beta=beta)
            jacobians = np.asarray(jax.jit(jax.vmap(jax.jacfwd(apply)))(x), np.float64)
            assert np.linalg.norm(jacobians, 2, axis=(1, 2)).max() <= 1 + 1e-5, name


def test_constrained_training_is_certified_at_every_step():
    constrain = jax.jit(functools.partial(model.constrain_certified, FLOW))
    for seed in range(3):
        params = random_params(FLOW, seed, scale=2.0)
        weights = constrain(params, {name: {} for name in params}).weights
        for name, _, _, branch in FLOW.layout:
            for block in range(2):
                norms = true_norms(branch, jax.tree.map(lambda w, block=block: w[block], weights[name].branch))
                assert max(norms.values()) <= FLOW.coeff
                assert np.prod(list(norms.values())) <= weights[name].branch.lipschitz_bound[block] < 1


def test_mistakes_are_named():
    spec = SPECS["dense"]
    weights = random_branch(spec, 0)
    with pytest.raises(ValueError, match="budget must be one of layer, block, got 'network'"):
        constraint.normalize_certified(spec, weights, coeff=0.9, budget="network")
    with pytest.raises(ValueError, match="budget must be one of layer, block, got 'network'"):
        FlowSpec((5,), (StageSpec(1, hidden=(3,)),), budget="network")
    with pytest.raises(ValueError, match="twists must be auto, all or one, got 'some'"):
        constraint.training_twists(spec, "some")
    with pytest.raises(ValueError, match=r"coeff must lie in \(0, 1\), got 1"):
        constraint.normalize_certified(spec, weights, coeff=1.1)
    with pytest.raises(ValueError, match="method must be"):
        constraint.normalize_certified(spec, weights, coeff=0.9, method="hope")


def test_bounds_of_blocks_are_products_rounded_up():
    _, fixed = frozen()
    bounds = jnp.stack([fixed.bounds["stage1"][f"dense{i}"][0] for i in range(3)])
    assert fixed.weights["stage1"].branch.lipschitz_bound[0] == branch_bound(bounds)
