"""The budget of feed-forward branches and freezing, against singular values in float64."""

import functools

import jax
import jax.numpy as jnp
import kept
import numpy as np
import oracles
import pytest
from tiny_runs import random_weights

from iresnet_jax.branches.branch import Branch
from iresnet_jax.branches.feedforward import FeedforwardSpec
from iresnet_jax.branches.sandwich import SandwichSpec
from iresnet_jax.models import contractions as model
from iresnet_jax.models.architecture import FlowSpec, StageSpec

BUDGETS = ("layer", "block")
COEFF = 0.9
TIGHT = 0.03  # how far below the bound a norm may lie
SPECS = {
    "dense": FeedforwardSpec((5,), (7, 6), activation="clipswish"),
    "convolutional": FeedforwardSpec(
        (4, 5, 3), (6, 8), (3, 1, 3), activation="lipswish", preactivation=True
    ),
    "periodic": FeedforwardSpec((4, 4, 2), (5,), (3, 2), activation="tanh", padding="CIRCULAR"),
}
FLOW = FlowSpec(
    (4, 4, 2),
    (
        StageSpec(
            2, hidden=(6,), kernel_sizes=(3, 3), activation="lipswish", squeeze=2, factor_out=True
        ),
        StageSpec(2, hidden=(8,), activation="elu"),
    ),
    coeff=0.8,
)


@functools.partial(jax.jit, static_argnums=0, static_argnames=("budget", "num_squarings"))
def certified(spec, weights, *, budget="layer", num_squarings=None):
    return spec.certified(
        weights, spec.norm_bounds(weights, num_squarings=num_squarings), coeff=COEFF, budget=budget
    ).branch


def true_norms(spec, weights):
    """The layers' operator norms by SVD of the unfolded maps."""
    norms = {}
    for layer in spec.layers:
        kernel = np.asarray(weights[layer.name]["kernel"], np.float64)
        if kernel.ndim == 4:
            kernel = oracles.dense_conv_matrix(kernel, *layer.in_shape[:2], padding=layer.padding)
        norms[layer.name] = oracles.operator_norm(kernel)
    return norms


def random_params():
    """Beyond the budget."""
    return jax.tree.map(lambda leaf: 3 * leaf, kept.random_params(FLOW))


def each_block(spec, weights):
    """Every block's branch of a flow, one by one."""
    for name, stage, *_ in spec.layout:
        for k in range(stage.num_blocks):
            yield jax.tree.map(lambda w, k=k: w[k], weights[name].branch)


@pytest.mark.parametrize(
    ("name", "num_squarings", "budget"),
    [
        *(("dense", None, budget) for budget in BUDGETS),
        ("convolutional", None, "block"),
        ("periodic", None, "layer"),
        ("dense", 4, "layer"),
        ("convolutional", 4, "block"),
    ],
)
def test_a_certified_budget_holds_for_any_weights(name, num_squarings, budget):
    spec = SPECS[name]
    for seed, scale in enumerate((1.0, 1e-3, 1e6)):
        weights = random_weights(spec, scale, seed)
        branch = certified(spec, weights, budget=budget, num_squarings=num_squarings)
        norms, product = true_norms(spec, branch.weights), float(branch.lipschitz_bound)
        assert np.prod(list(norms.values())) <= product <= COEFF
        if budget == "layer":
            assert max(norms.values()) <= COEFF
        # nothing of the budget is given away beyond the bounds' slack
        if scale >= 1 and num_squarings is None:
            used = (
                min(norms.values())
                if budget == "layer"
                else np.prod(list(norms.values())) ** (1 / len(norms))
            )
            assert used >= (COEFF if budget == "layer" else COEFF ** (1 / len(norms))) * (1 - TIGHT)
        if scale < 1:
            for layer, own in weights.items():
                np.testing.assert_array_equal(branch.weights[layer]["kernel"], own["kernel"])


def test_a_budget_by_block_scales_all_layers_by_one_factor():
    spec = SPECS["dense"]
    weights = random_weights(spec)

    @jax.jit
    def by_estimate(weights, iterates):
        vectors = spec.singular_vectors(weights, iterates, num_steps=None)
        return spec.constrained(weights, vectors, coeff=COEFF, budget="block").branch

    estimated = by_estimate(weights, spec.initial_iterates(jax.random.key(5)))
    for branch in (certified(spec, weights, budget="block"), estimated):
        factors = [
            float(branch.weights[n]["kernel"][0, 0] / weights[n]["kernel"][0, 0]) for n in weights
        ]
        np.testing.assert_allclose(factors, factors[0], rtol=1e-6)
        np.testing.assert_allclose(
            np.prod(list(true_norms(spec, branch.weights).values())), COEFF, rtol=2e-3
        )


SANDWICH = SandwichSpec((1,), hidden=(1, 1), activation="elu")


def sandwich(first, rest):
    """Weights with one number in all kernels of the first part, and one in all others."""
    weights, small = SANDWICH.initial_weights(jax.random.key(0)), SANDWICH.parts[0].layers
    return {
        name: {**own, "kernel": jnp.full_like(own["kernel"], first if name in small else rest)}
        for name, own in weights.items()
    }


def test_squares_that_underflow_are_not_taken_for_zeros():
    weights = sandwich(1e-23, 1e15)
    bounds_of = jax.jit(SANDWICH.norm_bounds)
    assert all(float(bound) > 0 for bound in bounds_of(weights).values())
    found = certified(SANDWICH, weights, budget="block")
    assert 0 < float(found.lipschitz_bound) <= COEFF
    again = SANDWICH.bound_of_norms(bounds_of(found.weights))
    assert 0 < float(again) <= COEFF * (1 + 1e-3)


@pytest.mark.parametrize("budget", BUDGETS)
def test_norms_beyond_the_largest_float_have_no_bound(budget):
    spec = SPECS["dense"]
    weights = jax.tree.map(lambda leaf: jnp.full_like(leaf, 3e38), random_weights(spec))
    branch = certified(spec, weights, budget=budget)
    assert np.isinf(branch.lipschitz_bound)
    first, *_ = weights
    beside_zeros = {**weights, first: jax.tree.map(jnp.zeros_like, weights[first])}
    assert np.isinf(certified(spec, beside_zeros, budget=budget).lipschitz_bound)


def test_weights_of_nothing_and_not_numbers():
    spec = SPECS["dense"]
    zero = jax.tree.map(jnp.zeros_like, random_weights(spec))
    assert float(certified(spec, zero, budget="block").lipschitz_bound) == 0

    def total(weights):
        found = certified(spec, weights, budget="block", num_squarings=4).weights
        return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(found))

    gradient = jax.jit(jax.grad(total))(zero)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    weights = random_weights(spec)
    broken = {**weights, "dense1": {**weights["dense1"], "kernel": jnp.full((14, 6), jnp.nan)}}
    assert np.isnan(certified(spec, broken, budget="block").lipschitz_bound)


def test_certified_training_holds_at_every_step():
    params = random_params()
    constrained = jax.jit(functools.partial(model.constrain_certified, FLOW))(
        params, {name: {} for name in params}
    )
    for branch in each_block(FLOW, constrained.weights):
        norms = true_norms(branch.spec, branch.weights)
        assert max(norms.values()) <= FLOW.coeff
        assert np.prod(list(norms.values())) <= branch.lipschitz_bound < 1


def test_sharp_activations_see_what_others_see_and_bend_in_different_places():
    spec = FeedforwardSpec((6,), hidden=(512,), activation="clipswish", preactivation=True)
    plain, sharp, sharper = (
        spec.initial_weights(jax.random.key(0), sharpness=s) for s in (0.0, 1.0, 3.0)
    )
    for weights in (sharp, sharper):
        assert weights["dense0"]["beta"] == plain["dense0"]["beta"]  # in front of any layer
        np.testing.assert_array_equal(plain["dense0"]["kernel"], weights["dense0"]["kernel"])
        assert not np.any(weights["dense1"]["bias"])  # of the output
    assert not np.any(sharp["dense0"]["bias"])
    kernel = np.asarray(plain["dense0"]["kernel"], np.float64)
    size, norm = np.linalg.norm(kernel, axis=0).mean(), np.linalg.norm(kernel, ord=2)
    one, two, three = (
        np.log1p(np.exp(float(weights["dense1"]["beta"]))) for weights in (plain, sharp, sharper)
    )
    np.testing.assert_allclose(two / one, norm, rtol=0.1)
    np.testing.assert_allclose(three, 3 * two, rtol=1e-5)
    # standard deviation for data of variance 1
    np.testing.assert_allclose(np.std(sharper["dense0"]["bias"]), 2 / 3 * size / norm, rtol=0.1)


def test_weights_have_the_variance_they_say_and_a_branch_knows_its_value_at_zero():
    spec = FeedforwardSpec((50,), (60,), context_dim=40)
    weights = spec.initial_weights(jax.random.key(0))
    for own, fan_in in zip(weights.values(), (50, 60), strict=True):
        np.testing.assert_allclose(np.std(own["kernel"]), fan_in**-0.5, rtol=0.1)
        np.testing.assert_allclose(np.std(own["context"]), 40**-0.5, rtol=0.1)
    plain = {name: {**own, "bias": own["bias"] + 0.3} for name, own in weights.items()}
    branch = Branch(FeedforwardSpec((50,), (60,)), plain, gain=jnp.float32(0.5))
    np.testing.assert_array_equal(branch.at_zero(), branch(jnp.zeros((1, 50))))
