"""Lipschitz bounds of branches, blocks and models against closed forms and dense Jacobians."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from iresnet_jax.maths.lipschitz_bounds import (
    block_bounds,
    branch_bound,
    branch_jacobian_bound,
    model_bounds,
)

EXACT = 1e-11  # a few roundings of float64, upwards


def test_branch_bound_is_the_product_rounded_up():
    bounds = np.random.default_rng(14).uniform(0.1, 2, size=(100, 5)).astype(np.float32)
    exact = np.prod(bounds.astype(np.float64), axis=1)
    result = np.asarray(jax.vmap(branch_bound)(jnp.asarray(bounds)))
    assert (result >= exact).all()
    np.testing.assert_allclose(result, exact, rtol=2e-6)
    np.testing.assert_allclose(branch_bound([0.9, 0.9, 0.9]), 0.729, rtol=2e-6)


def test_bounds_do_not_underflow():
    for num in range(2, 8):
        assert 0 < branch_bound([1e-25] * num) < 1e-30
    assert branch_bound([0.0, 1e-25]) == 0
    bounds = model_bounds([block_bounds(0.0)] * 2, [jnp.full(1, -90.0), jnp.full(1, 90.0)])
    assert bounds.forward >= 1
    assert bounds.inverse >= 1


def test_block_bounds_are_attained_by_scaling_and_know_their_limit(x64):
    bounds = block_bounds(0.5)  # g(x) = 0.5 x attains the first, g(x) = -0.5 x the second
    np.testing.assert_allclose([bounds.forward, bounds.inverse], [1.5, 2], rtol=EXACT)
    assert block_bounds(1.0).inverse == jnp.inf
    assert block_bounds(1.5).inverse == jnp.inf
    assert np.isfinite(jax.grad(lambda b: block_bounds(b).inverse)(0.9))
    for bad in (-0.1, float("nan"), jnp.float32(-1)):  # which promise nothing
        assert all(map(np.isinf, (*block_bounds(bad), branch_bound([0.5, bad]))))


@pytest.mark.parametrize("seed", range(3))
def test_model_bounds_against_the_dense_jacobian(seed, x64):
    """Two blocks and an ActNorm, then the same on the first half of the coordinates."""
    rng = np.random.default_rng(seed)

    def stage(width):
        jacobian, levels = np.eye(width), []
        for level in rng.uniform(0.2, 0.9, size=2):
            branch = rng.normal(size=(width, width))
            jacobian = (np.eye(width) + level * branch / np.linalg.norm(branch, 2)) @ jacobian
            levels.append(block_bounds(level))
        log_scale = rng.normal(size=width)
        return np.exp(log_scale)[:, None] * jacobian, model_bounds(levels, [jnp.asarray(log_scale)])

    (first, first_bounds), (second, second_bounds) = stage(6), stage(3)
    whole = np.block([[second, np.zeros((3, 3))], [np.zeros((3, 3)), np.eye(3)]]) @ first
    bounds = first_bounds.compose(second_bounds.beside_identity())
    singular_values = np.linalg.svd(whole, compute_uv=False)
    assert singular_values[0] <= bounds.forward
    assert 1 / singular_values[-1] <= bounds.inverse


def test_model_bounds_of_scalings_are_equalities(x64):
    log_scales = [jnp.array([0.3, 0.3]), jnp.array([-1.0, -1.0])]
    bounds = model_bounds([block_bounds(0.5), block_bounds(0.25)], log_scales)
    np.testing.assert_allclose(bounds.forward, 1.5 * 1.25 * np.exp(-0.7), rtol=EXACT)
    np.testing.assert_allclose(bounds.inverse, 2 * np.exp(0.7) / 0.75, rtol=EXACT)
    assert model_bounds([block_bounds(0.5), block_bounds(1.0)]).inverse == jnp.inf


def test_bounds_of_a_number_of_python_are_no_bounds_of_a_smaller_one():
    for bound in (0.9, 0.9999, 0.99999):
        assert float(model_bounds([block_bounds(bound)]).inverse) >= 1 / (1 - bound)
        assert float(branch_bound([bound, 1.1])) >= 1.1 * bound


def test_jacobian_of_two_layers_changes_by_slopes_and_both_norms():
    assert 0.9**3 <= branch_jacobian_bound([0.9, 0.9], [0.0, 1.0]) <= 0.9**3 * (1 + 1e-8)
    assert branch_jacobian_bound([0.9, 0.9], [0.0, np.inf]) == np.inf
