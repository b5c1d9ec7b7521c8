"""Shadowing: the theorem against chains of maps whose exact trajectories are known, and its numbers against dense algebra."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from iresnet_jax.maths import inverse_products, shadowing

T, D = 5, 4


def chain_of_maps(seed, curvature):
    """``F_t(x) = A_t x + c/2 sin(B x)`` with ``|B| <= 1``: ``Lip(J) <= c / 2``, and injective if ``A_t`` beats ``c / 2``."""
    rng = np.random.default_rng(seed)
    matrices = np.eye(D) + 0.3 * rng.normal(size=(T, D, D)) / np.sqrt(D)
    mix = rng.normal(size=(T, D, D))
    mix /= np.linalg.norm(mix, 2, axis=(1, 2))[:, None, None]

    def step(t, x):
        return matrices[t] @ x + curvature / 2 * np.sin(mix[t] @ x)

    def jacobian(t, x):
        return matrices[t] + curvature / 2 * np.cos(mix[t] @ x)[:, None] * mix[t]

    return step, jacobian


def a_case(seed, curvature, noise):
    """A trajectory that is off by noise: the exact one, its residuals and Jacobians."""
    step, jacobian = chain_of_maps(seed, curvature)
    rng = np.random.default_rng(seed + 100)
    true = [rng.normal(size=D)]
    for t in range(T):
        true.append(step(t, true[-1]))
    points = np.array(true)
    points[:-1] += noise * rng.normal(size=(T, D))
    residuals = np.array([step(t, points[t]) - points[t + 1] for t in range(T)])
    jacobians = np.array([jacobian(t, points[t]) for t in range(T)])
    return np.array(true), points, residuals, jacobians


def exact_products(jacobians):
    inverses = np.linalg.inv(jacobians)
    found = np.zeros((T, T, D, D))
    for s in range(T):
        product = np.eye(D)
        for t in range(s, T):
            product = product @ inverses[t]
            found[s, t] = product
    return found


def products_of(approximate, jacobians):
    """Norms of any matrices that stand for the products, and of their defects."""
    norms, defects = np.zeros((2, T, T))
    for s in range(T):
        before = np.eye(D)
        for t in range(s, T):
            norms[s, t] = np.linalg.norm(approximate[s, t], 2)
            defects[s, t] = np.linalg.norm(approximate[s, t] @ jacobians[t] - before, 2)
            before = approximate[s, t]
    return shadowing.Products(norms, defects)


@pytest.mark.parametrize("wrong", [0.0, 1e-3])
@pytest.mark.parametrize("noise", [1e-8, 1e-3, 2e-2])
def test_radii_hold_the_exact_trajectory(noise, wrong):
    applied = 0
    for seed in range(10):
        true, points, residuals, jacobians = a_case(seed, 0.2, noise)
        rng = np.random.default_rng(seed)
        approximate = exact_products(jacobians) * (1 + wrong * rng.normal(size=(T, T, D, D)))
        radii = shadowing.radii(
            products_of(approximate, jacobians), np.linalg.norm(residuals, axis=1), np.full(T, 0.1), np.full(T, np.inf)
        )
        error = np.linalg.norm(true - points, axis=1)[:T]
        assert np.all(error <= radii.radii)
        assert np.all(np.isfinite(radii.radii) == radii.applied)
        applied += np.all(radii.applied)
        if noise < 1e-2:
            assert radii.radii[0] <= 20 * error[0] + 20 * noise
    assert applied >= (5 if noise == 2e-2 else 10)


def test_the_check_rejects_an_understated_curvature():
    """With ``K = 0`` the radii are those of a linear chain, which a curved one leaves."""
    step = lambda t, x: x + 0.45 * np.cos(x)  # noqa: E731
    x, y = np.array([0.5]), np.array([0.9])
    residual, jacobian = step(0, x) - y, 1 - 0.45 * np.sin(x)
    for _ in range(60):
        x_true = y - 0.45 * np.cos(x)
        x = x_true
    error = abs(x - 0.5)
    products = shadowing.Products(1 / jacobian[None], np.zeros((1, 1)))
    honest, linear = (shadowing.radii(products, np.abs(residual), np.array([K]), np.array([np.inf])).radii for K in (0.45, 0.0))
    assert error > linear * 1.001
    assert error <= honest


def test_without_a_root_the_global_bound_takes_over():
    _, _, residuals, jacobians = a_case(0, 0.2, 1e-2)
    products = products_of(exact_products(jacobians), jacobians)
    sizes = np.linalg.norm(residuals, axis=1)
    radii = shadowing.radii(products, sizes, np.full(T, np.inf), np.full(T, 2.0))
    assert not radii.applied.any()
    wanted, behind = np.zeros(T), 0.0
    for s in reversed(range(T)):
        behind = wanted[s] = 2 * (behind + sizes[s])
    np.testing.assert_allclose(radii.radii, wanted, rtol=1e-8)
    assert np.all(radii.radii >= wanted)


def test_one_bad_step_leaves_the_theorem_to_those_behind_it():
    _, _, residuals, jacobians = a_case(0, 0.2, 1e-6)
    products = products_of(exact_products(jacobians), jacobians)
    second = np.full(T, 0.1)
    second[1] = np.inf
    radii = shadowing.radii(products, np.linalg.norm(residuals, axis=1), second, np.full(T, 2.0))
    assert radii.applied.tolist() == [False, False, True, True, True]
    assert np.all(np.isfinite(radii.radii))


def test_nothing_is_promised_of_numbers_that_are_none():
    table = np.full((T, T), np.nan)
    radii = shadowing.radii(shadowing.Products(table, table), np.full(T, np.nan), np.ones(T), np.ones(T))
    assert np.all(np.isinf(radii.radii))
    assert not radii.applied.any()


def test_classical_numbers_against_the_dense_matrix():
    _, _, residuals, jacobians = a_case(3, 0.2, 1e-4)
    rng = np.random.default_rng(0)
    exact = exact_products(jacobians)
    products = products_of(exact * (1 + 1e-3 * rng.normal(size=exact.shape)), jacobians)
    matrix = np.zeros((T * D, T * D))
    for t in range(T):
        matrix[t * D : (t + 1) * D, t * D : (t + 1) * D] = jacobians[t]
        if t + 1 < T:
            matrix[t * D : (t + 1) * D, (t + 1) * D : (t + 2) * D] = -np.eye(D)
    inverse = np.linalg.inv(matrix)
    norms = shadowing.inverse_norms(products)
    for s in range(T):
        for t in range(s, T):
            assert np.linalg.norm(exact[s, t], 2) <= norms[s, t] <= 1.1 * np.linalg.norm(exact[s, t], 2)
    found = shadowing.classical(norms, np.linalg.norm(residuals, axis=1), np.full(T, 0.1))
    beta, eta = np.linalg.norm(inverse, 2), np.linalg.norm(inverse @ residuals.ravel())
    assert beta <= found.beta <= 2 * beta
    assert eta <= found.eta <= 5 * eta
    np.testing.assert_allclose(found.h, found.beta * found.K * found.eta, rtol=1e-8)


def test_the_norm_of_a_small_matrix_is_above_and_close():
    rng = np.random.default_rng(0)
    for _ in range(20):
        matrix = np.triu(rng.uniform(size=(7, 7)))
        exact = np.linalg.norm(matrix, 2)
        assert exact <= shadowing.matrix_norm(matrix) <= 1.001 * exact
    assert shadowing.matrix_norm(np.zeros((3, 3))) <= 1e-6


@pytest.mark.parametrize("num_rows", [T, 1])
def test_products_of_inverses_against_dense_algebra(num_rows):
    """Two groups of steps, of which the second acts on half of the coordinates in another order."""
    rng = np.random.default_rng(0)
    active = (np.array([2, 0, 3, 1]), np.array([3, 0]))
    matrices = [np.eye(len(a)) + 0.4 * rng.normal(size=(n, len(a), len(a))) for a, n in zip(active, (3, 2), strict=True)]
    whole = []
    for entries, group in zip(active, matrices, strict=True):
        for matrix in group:
            embedded = np.eye(D)
            embedded[np.ix_(entries, entries)] = matrix
            whole.append(embedded)
    exact = exact_products(np.array(whole))
    with jax.enable_x64(True):
        inverses = [inverse_products.invert_group(jnp.asarray(group), jnp.full(len(group), 1e-9)) for group in matrices]
        tables = inverse_products.product_tables(
            [own.matrices for own in inverses], [jnp.asarray(a) for a in active], D, num_rows
        )
        values = rng.normal(size=(T, D))
        values[3:, [1, 2]] = 0
        steps = inverse_products.solve_backward(inverses, [jnp.asarray(a) for a in active], jnp.asarray(values))
        inverses, tables, steps = jax.tree.map(np.asarray, (inverses, tables, steps))
    for group, found in zip(matrices, inverses, strict=True):
        for matrix, norm, defect, forward in zip(group, found.norms, found.defects, found.jacobians, strict=True):
            inverse = np.linalg.inv(matrix)
            assert np.linalg.norm(inverse, 2) <= norm <= 1.3 * np.linalg.norm(inverse, 2)
            assert 1e-9 * np.linalg.norm(inverse, 2) <= defect <= 2e-9 * np.linalg.norm(inverse, 2)
            assert np.linalg.norm(matrix, 2) <= forward <= 1.3 * np.linalg.norm(matrix, 2)
    for s in range(num_rows):
        for t in range(T):
            size = np.linalg.norm(exact[s, t], 2)
            assert size <= tables.norms[s, t] * (1 + 1e-12)
            assert tables.norms[s, t] <= 1.42 * size
            assert tables.rounding[s, t] <= 1e-13
    later, wanted = np.zeros(D), np.zeros((T, D))
    for t in reversed(range(T)):
        later = wanted[t] = np.linalg.solve(whole[t], later - values[t])
    np.testing.assert_allclose(steps, wanted, rtol=1e-10, atol=1e-12)


def test_a_singular_matrix_has_no_inverse_to_rely_on():
    with jax.enable_x64(True):
        found = inverse_products.invert(jnp.ones((3, 3)), jnp.asarray(0.0))
    assert not float(found.defects) < 1
