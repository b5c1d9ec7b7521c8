"""Sandwich layers against singular values for slopes in the corners of [0, 1], in float64."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from tiny_runs import random_weights

from iresnet_jax.branches.sandwich import SandwichSpec

COEFF = 0.9
# what guaranteed bounds of small layers add, and what power iteration to its tolerance may miss
TIGHT = 0.01
SPECS = {
    "dense": SandwichSpec((3,), (5, 4), activation="tanh"),
    "convolutional": SandwichSpec((3, 4, 2), (3, 4), (3, 1, 5), "softplus4", preactivation=True),
    "periodic": SandwichSpec((4, 3, 2), (3,), (3, 3), padding="CIRCULAR"),
}


def pairs(spec, weights):
    """``P`` and ``Q`` of every sandwich layer in float64."""
    matrices = []
    for layer in spec.layers:
        kernel = np.asarray(weights[layer.name]["kernel"], np.float64)
        dense = (
            oracles.dense_conv_matrix(kernel, *layer.in_shape[:2], padding=layer.padding)
            if kernel.ndim == 4
            else kernel.T
        )
        matrices.append(dense)
    return list(zip(matrices[::2], matrices[1::2], strict=True))


def slopes(num, low=0.0):
    """Slopes of ``num`` units, low or 1: all of them, or many at random."""
    if num <= 6:
        return np.array(list(itertools.product([low, 1.0], repeat=num)))
    return np.where(np.random.default_rng(1).random((300, num)) < 0.5, low, 1.0)


def largest_norm(there, back, low=0.0):
    """The largest norm of ``Q D P`` for slopes ``D`` of `slopes`."""
    return np.linalg.norm(
        (back[None] * slopes(len(there), low)[:, None]) @ there, 2, axis=(1, 2)
    ).max()


@functools.partial(jax.jit, static_argnums=0, static_argnames="budget")
def both(spec, weights, starts, *, budget):
    """The branch within its budget by guaranteed bounds, and by power iteration to a tolerance."""
    vectors = spec.singular_vectors(weights, starts, num_steps=None)
    certified = spec.certified(weights, spec.norm_bounds(weights), coeff=COEFF, budget=budget)
    return certified, spec.constrained(weights, vectors, coeff=COEFF, budget=budget)


@pytest.mark.parametrize(
    ("name", "budget"), [("dense", "layer"), *((name, "block") for name in SPECS)]
)
def test_a_budget_holds_for_all_slopes_whatever_the_weights(name, budget):
    spec = SPECS[name]
    for scale in (1.0, 1e-3, 1e5):
        weights = random_weights(spec, scale)
        certified, estimated = both(
            spec, weights, spec.initial_iterates(jax.random.key(0)), budget=budget
        )
        for part, norm in estimated.norms.items():
            assert norm * (1 - TIGHT) <= certified.norms[part] <= norm * (1 + TIGHT) + 1e-9
        bound, found = (
            float(certified.branch.lipschitz_bound),
            pairs(spec, certified.branch.weights),
        )
        assert np.prod([largest_norm(there, back) for there, back in found]) <= bound <= COEFF
        if scale < 1:
            jax.tree.map(np.testing.assert_array_equal, certified.branch.weights, weights)
        else:
            assert bound > (COEFF if budget == "block" else COEFF**2) * (1 - TIGHT)


def test_the_constant_is_that_of_its_operator():
    spec = SPECS["dense"]
    weights = random_weights(spec)
    bounds = jax.jit(spec.norm_bounds)(weights)
    for bound, (there, back), layer in zip(
        bounds.values(), pairs(spec, weights), spec.layers[::2], strict=True
    ):
        balance = np.sqrt(np.linalg.norm(back, axis=0) / np.linalg.norm(there, axis=1)) * np.exp(
            weights[layer.name]["psi"]
        )
        balance = balance[:, None]
        exact = np.linalg.norm(np.hstack([there * balance, back.T / balance]), 2) ** 2 / 2
        assert exact <= bound <= exact * (1 + TIGHT)


def test_it_is_attained_at_half_of_the_product_of_norms_and_slopes_below_zero_break_it():
    """Two units of equal weights and opposite effects: ``Q D P = (D_1 - D_2) e e^T``."""
    there, back = np.array([[1.0, 0.0], [1.0, 0.0]]), np.array([[1.0, -1.0], [0.0, 0.0]])
    weights = {
        "dense0": {"kernel": jnp.asarray(there.T), "psi": jnp.zeros(2)},
        "dense1": {"kernel": jnp.asarray(back.T)},
    }
    bound = jax.jit(SandwichSpec((2,), (2,)).norm_bounds)(weights)["sandwich0"]
    assert 1 <= bound <= 1 + TIGHT
    assert largest_norm(there, back) == pytest.approx(1)
    assert largest_norm(there, back, low=-1.0) == pytest.approx(
        np.linalg.norm(there, 2) * np.linalg.norm(back, 2)
    )
