"""Verified log-determinants against mpmath's of 60 digits."""

import functools

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest

from iresnet_jax.maths.logdet import verified

MP = mpmath.mp.clone()
MP.dps = 60
DIMS = 12


@functools.cache
def matrices(coeff):
    """Matrices ``I + G`` with ``|G|_2 <= coeff``, their log-determinants, and bounds of the norms of their inverses."""
    rng = np.random.default_rng(0)
    g = rng.normal(size=(4, DIMS, DIMS))
    g[3] = -np.outer(g[3, 0], g[3, 0])  # as close to singular as the coefficient allows
    g *= (coeff * (1 - 1e-12) / np.linalg.norm(g, 2, axis=(1, 2)))[:, None, None]
    inverse_norms = np.full(4, 1 / (1 - coeff))
    found = [one + np.eye(DIMS) for one in g]
    exact = [MP.log(abs(MP.det(MP.matrix(one.tolist())))) for one in found]
    return np.array(found), exact, inverse_norms


def factors_of(matrices):
    with jax.enable_x64(True):
        factors = jax.jit(lambda m: jax.lax.map(verified.factorize, m))(jnp.asarray(matrices))
        return verified.Factors(*(np.asarray(part) for part in factors))


def contained(ball, exact):
    middles = [MP.mpf(float(high)) + MP.mpf(float(low)) for high, low in zip(*ball.middle, strict=True)]
    gaps = [abs(middle - value) for middle, value in zip(middles, exact, strict=True)]
    return np.array([gap <= MP.mpf(float(radius)) for gap, radius in zip(gaps, ball.radius, strict=True)])


@pytest.mark.parametrize("coeff", [0.5, 0.95, 0.999999])
def test_intervals_hold_the_exact_log_determinant(coeff):
    found, exact, inverse_norms = matrices(coeff)
    ball = verified.log_abs_det(factors_of(found), np.zeros(4), inverse_norms)
    assert contained(ball, exact).all()
    assert np.all(ball.radius <= 1e-12 / (1 - coeff))


@pytest.mark.parametrize("distance", [1e-9, 1e-4])
def test_a_perturbed_matrix_is_covered_by_its_distance_and_by_nothing_less(distance):
    found, exact, inverse_norms = matrices(0.95)
    wrong = np.random.default_rng(1).normal(size=found.shape)
    moved = found + wrong * (distance / np.linalg.norm(wrong, 2, axis=(1, 2)))[:, None, None]
    factors = factors_of(moved)
    assert contained(verified.log_abs_det(factors, np.full(4, 1.000001 * distance), inverse_norms), exact).all()
    assert not contained(verified.log_abs_det(factors, np.full(4, 1e-4 * distance), inverse_norms), exact).any()


def test_the_bound_is_attained_by_the_worst_perturbation():
    """``A = J (1 + t)`` for a multiple of the identity: every eigenvalue moves by all of the distance."""
    size, t = 0.25, 1e-6
    factors = factors_of(size * (1 + t) * np.eye(DIMS)[None])
    exact = [DIMS * MP.log(MP.mpf(size))]
    ball = verified.log_abs_det(factors, np.array([size * t * 1.0000001]), np.array([1 / size]))
    assert contained(ball, exact).all()
    assert ball.radius[0] <= 1.00001 * DIMS * t
    assert not contained(ball._replace(radius=0.999 * ball.radius), exact).any()


def test_a_wrong_factorisation_is_covered_and_a_wrong_permutation_promises_nothing(monkeypatch):
    found, exact, inverse_norms = matrices(0.5)
    lu = jax.lax.linalg.lu

    def wrong_factors(matrix):
        packed, pivots, permutation = lu(matrix)
        return packed.at[3, 3].multiply(1 + 1e-5), pivots, permutation

    monkeypatch.setattr(jax.lax.linalg, "lu", wrong_factors)
    factors = factors_of(found)
    assert contained(verified.log_abs_det(factors, np.zeros(4), inverse_norms), exact).all()
    trusting = factors._replace(residual=np.zeros(4))
    assert not contained(verified.log_abs_det(trusting, np.zeros(4), inverse_norms), exact).any()

    monkeypatch.setattr(jax.lax.linalg, "lu", lambda matrix: (*lu(matrix)[:2], lu(matrix)[2].at[0].set(lu(matrix)[2][1])))
    assert np.all(np.isinf(factors_of(found).residual))


def test_where_the_theorem_does_not_apply_nothing_is_known():
    found, _, inverse_norms = matrices(0.5)
    factors = factors_of(found)
    for distance in (0.6, np.inf, np.nan):
        lower, upper = verified.log_abs_det(factors, np.full(4, distance), inverse_norms).bounds()
        assert np.all(np.isneginf(lower) & np.isposinf(upper))
    singular = factors_of(np.zeros((1, DIMS, DIMS)))
    assert np.isposinf(verified.log_abs_det(singular, np.zeros(1), np.ones(1)).bounds()[1][0])
