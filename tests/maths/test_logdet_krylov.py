"""Krylov log-determinants: exact where they must be, within their bound everywhere."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from iresnet_jax.maths.logdet_krylov import quadratic_form

QUADRATURE = 1e-9  # of 24 nodes, relative to the squared norm of a probe, for L up to .98
SINGLE = 2e-5  # float32, relative to the squared norm of a probe


def scaled(matrix, lipschitz):
    """The matrix with that largest singular value."""
    return matrix * (lipschitz / np.linalg.norm(matrix, 2))


def matrices(kind, d, lipschitz, seed):
    rng = np.random.default_rng(seed)
    a = rng.normal(size=(d, d))
    if kind == "symmetric":
        return scaled(a + a.T, lipschitz)
    if kind == "contracting":  # everything towards -L, where the series is at its worst
        q = np.linalg.qr(a)[0]
        return -lipschitz * q @ np.diag(rng.uniform(0.5, 1.0, d)) @ q.T
    if kind == "shrinking":
        return -lipschitz * np.eye(d)
    if kind == "rotation":
        return lipschitz * np.linalg.qr(a)[0]
    if kind == "low rank":
        return scaled(a[:, :2] @ rng.normal(size=(2, d)), lipschitz)
    if kind == "nilpotent":
        return scaled(np.triu(a, 1), lipschitz)
    return scaled(a, lipschitz)


KINDS = ("random", "symmetric", "contracting", "shrinking", "rotation", "low rank", "nilpotent")


def linear(matrix):
    return lambda x: x @ jnp.asarray(matrix, x.dtype).T


@functools.partial(jax.jit, static_argnames="num_steps")
def quadratic_form_of_matrix(matrix, v, lipschitz_bound, *, num_steps):
    """`quadratic_form` of a linear branch, compiled once for all matrices of a size."""
    x = jnp.zeros(v.shape[1:], v.dtype)
    return quadratic_form(linear(matrix), x, v, num_steps, lipschitz_bound=lipschitz_bound)


@pytest.mark.parametrize("kind", KINDS)
def test_the_whole_space_gives_the_logarithm(x64, kind):
    d = 6
    v = np.random.default_rng(4).normal(size=(2, 1, d))
    squared = (v**2).sum(axis=-1)
    for lipschitz in (0.3, 0.98):
        matrix = matrices(kind, d, lipschitz, 3)
        values, bounds = quadratic_form_of_matrix(matrix, v, lipschitz, num_steps=d)
        expected = [u[0] @ scipy.linalg.logm(np.eye(d) + matrix) @ u[0] for u in v]
        np.testing.assert_allclose(values[:, 0], np.real(expected), atol=QUADRATURE * squared.max())
        assert (np.asarray(bounds) < 1e-9 * squared).all()  # nothing leaves the space


@pytest.mark.parametrize("kind", KINDS)
def test_errors_lie_within_their_bound(x64, kind):
    d, num = 24, 40
    rng = np.random.default_rng(5)
    worst = 0.0
    for n in (1, 2, 4, 8):
        for lipschitz in (0.5, 0.9, 0.97):
            matrix = matrices(kind, d, lipschitz, n)
            v = rng.choice([-1.0, 1.0], size=(num, 1, d))
            values, bounds = quadratic_form_of_matrix(matrix, v, lipschitz, num_steps=n)
            exact = np.einsum(
                "pbi,ij,pbj->pb", v, np.real(scipy.linalg.logm(np.eye(d) + matrix)), v
            )
            errors = np.abs(values - exact)
            assert (errors <= np.asarray(bounds) + QUADRATURE * d).all()
            worst = max(worst, float((errors / (np.asarray(bounds) + QUADRATURE * d)).max()))
    # no mere infinity
    assert worst > (0.01 if kind in ("random", "symmetric", "contracting", "nilpotent") else 0)


def test_the_bound_is_as_small_as_it_says(x64):
    """A bound without the resolvent's norm would be below the error here."""
    angle, lipschitz = math.acos(0.9), 0.97
    transposed = scaled(
        np.array([[0.0, lipschitz * math.sin(angle)], [1e-3, -lipschitz * math.cos(angle)]]),
        lipschitz,
    )
    v = np.array([[[1.0, 0.0]]])
    value, bound = quadratic_form_of_matrix(transposed.T, v, lipschitz, num_steps=1)
    error = abs(float(value[0, 0]) - np.real(scipy.linalg.logm(np.eye(2) + transposed))[0, 0])
    assert 0.5e-3 < error < float(bound[0, 0]) < 3e-3


@pytest.mark.parametrize("d", [1, 2])
def test_more_steps_than_dimensions_change_nothing(d):
    rng = np.random.default_rng(0)
    matrix, v = (rng.normal(size=shape).astype(np.float32) for shape in ((d, d), (3, 1, d)))
    matrix = scaled(matrix, 0.9).astype(np.float32)
    values, bounds = quadratic_form_of_matrix(matrix, v, 0.9, num_steps=7)
    exact = np.einsum("pbi,ij,pbj->pb", v, np.real(scipy.linalg.logm(np.eye(d) + matrix)), v)
    np.testing.assert_allclose(values, exact, atol=SINGLE * np.sum(v**2))
    assert (np.asarray(bounds) < 1e-3).all()


def test_bounds_hold_the_error_of_the_quadrature(x64):
    """The Krylov space of a multiple of the identity has one dimension."""
    v = jnp.ones((1, 1, 4))
    for lipschitz in (0.9, 0.98, 0.99, 0.999, 0.9999, 0.99999):
        values, bounds = quadratic_form_of_matrix(-lipschitz * np.eye(4), v, lipschitz, num_steps=2)
        assert abs(float(values[0, 0]) - 4 * np.log1p(-lipschitz)) <= bounds[0, 0]
        assert bounds[0, 0] < 0.1 or lipschitz > 0.9999
