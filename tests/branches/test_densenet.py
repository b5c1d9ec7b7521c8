"""Dense concatenation: the network of its shares and normalised layers, and its constant, by dense matrices in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from tiny_runs import random_weights

from iresnet_jax.branches.densenet import DenseNetSpec

COEFF = 0.9
TIGHT = 0.01  # what guaranteed bounds of small layers add, and what power iteration to its tolerance may miss
SPECS = {
    "dense": DenseNetSpec((3,), (4, 2), activation="lipswish"),
    "convolutional": DenseNetSpec((3, 4, 2), (3, 2), (3, 1, 3), "clipswish", preactivation=True),
}


def normalised(spec, weights):
    """``W_i`` as matrices, and ``(u_i, v_i)``, in float64."""
    matrices, pairs = [], []
    channels = np.ones(spec.layers[0].in_shape[-1])
    for layer in spec.layers:
        own = {name: np.asarray(values, np.float64) for name, values in weights[layer.name].items()}
        if "share" in own:
            u, v = np.sqrt(1 / (1 + np.exp([-own["share"], own["share"]])))
            pairs.append((u, v))
            channels = np.concatenate([u * channels, np.full(layer.in_shape[-1] - len(channels), v)])
        kernel = own["kernel"] / channels[:, None]
        dense = oracles.dense_conv_matrix(kernel, *layer.in_shape[:2], padding=layer.padding) if kernel.ndim == 4 else kernel.T
        matrices.append(dense)
    return matrices, pairs


def constant(spec, weights):
    """Norms of the normalised layers, and what they make of the branch."""
    matrices, pairs = normalised(spec, weights)
    norms = [oracles.operator_norm(matrix) for matrix in matrices]
    return norms, norms[-1] * np.prod([np.hypot(u, v * norm) for (u, v), norm in zip(pairs, norms, strict=False)])


@functools.partial(jax.jit, static_argnums=0, static_argnames="budget")
def both(spec, weights, starts, *, budget):
    """The branch within its budget by guaranteed bounds, and by power iteration to a tolerance."""
    vectors = spec.singular_vectors(weights, starts)
    certified = spec.certified(weights, spec.norm_bounds(weights), coeff=COEFF, budget=budget)
    return certified, spec.constrained(weights, vectors, coeff=COEFF, budget=budget)


@pytest.mark.parametrize(("name", "budget"), [("dense", "layer"), ("dense", "block"), ("convolutional", "block")])
def test_a_budget_holds_whatever_the_weights(name, budget):
    spec = SPECS[name]
    for scale in (1.0, 1e-3, 1e5):
        weights = random_weights(spec, scale)
        certified, estimated = both(spec, weights, spec.initial_iterates(jax.random.key(0)), budget=budget)
        before, _ = constant(spec, weights)
        for part, norm in zip(spec.parts, before, strict=True):
            assert norm <= certified.norms[part.name] <= norm * (1 + TIGHT)
            np.testing.assert_allclose(estimated.norms[part.name], norm, rtol=TIGHT)
        norms, lipschitz = constant(spec, certified.branch.weights)
        assert lipschitz <= certified.branch.lipschitz_bound <= COEFF
        assert max(norms[:-1]) <= (COEFF if budget == "layer" else 1)
        if scale < 1:
            jax.tree.map(np.testing.assert_array_equal, certified.branch.weights, weights)
        elif budget == "block":
            assert lipschitz > COEFF * (1 - 2 * TIGHT)
        else:
            assert min(norms) > COEFF * (1 - TIGHT)


def test_it_is_the_network_of_the_paper(x64):
    spec = SPECS["dense"]
    weights, x = random_weights(spec), np.random.default_rng(1).normal(size=(5, 3))
    matrices, pairs = normalised(spec, weights)
    b = x
    for i, (matrix, layer) in enumerate(zip(matrices, spec.layers, strict=True)):
        z = b @ matrix.T + np.asarray(weights[layer.name]["bias"], np.float64)
        if i < len(pairs):
            u, v = pairs[i]
            sharpness = np.log1p(np.exp(np.float64(weights[spec.layers[i + 1].name]["beta"])))
            b = np.concatenate([u * b, v * z / (1 + np.exp(-sharpness * z)) / 1.1], axis=1)
    negative = spec.negated(weights)
    for sign, own in ((1, weights), (-1, negative)):
        np.testing.assert_allclose(spec.apply(jax.tree.map(jnp.float64, own), jnp.asarray(x)), sign * z, rtol=1e-12)
    assert constant(spec, negative) == constant(spec, weights)


def test_other_shares_have_another_constant():
    spec = SPECS["dense"]
    weights = random_weights(spec)
    other = {**weights, "dense1": {**weights["dense1"], "share": np.float32(2.0)}}
    assert abs(constant(spec, other)[1] / constant(spec, weights)[1] - 1) > 5 * TIGHT
    for own in (weights, other):
        bound = float(jax.jit(spec.lipschitz_bound)(own))
        assert constant(spec, own)[1] <= bound <= constant(spec, own)[1] * (1 + TIGHT)
