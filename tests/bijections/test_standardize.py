"""Affine transforms of continuous data: Lipschitz constants, covariances, few examples."""

import jax.numpy as jnp
import mpmath
import numpy as np
from sklearn.covariance import LedoitWolf

from iresnet_jax.bijections.standardize import Standardize, Whiten, shrunk_covariance

SINGLE = 1e-5  # float32
RNG = np.random.default_rng(0)
MIXING = RNG.normal(size=(4, 4)) + 2 * np.eye(4)
DATA = RNG.normal(size=(5000, 4)) @ MIXING.T * [1, 10, 1e-3, 1e3] + [0, 1, -2, 100]
TRANSFORMS = {"standardize": Standardize.fit(DATA), "whiten": Whiten.fit(DATA)}


def test_standardized_data_have_mean_0_and_variance_1_and_whitened_ones_no_correlation():
    x = jnp.asarray(DATA, jnp.float32)
    for name, transform in TRANSFORMS.items():
        single = transform.forward(x)
        assert single.dtype == jnp.float32
        error = np.abs(np.asarray(transform.inverse(single)[0] - x)) / DATA.std(axis=0)
        # the third entry is a thousand of its standard deviations away from 0
        assert error.max() < 100 * SINGLE
        y = np.asarray(single, np.float64)
        np.testing.assert_allclose(y.mean(axis=0), 0, atol=1e-3)
        # correlations shrink by about 1/5000
        np.testing.assert_allclose(y.var(axis=0), 1, atol=2e-2)
        off = np.corrcoef(y.T)[~np.eye(4, dtype=bool)]
        assert (np.abs(off).max() < 2e-2) == (name == "whiten")


def test_few_examples_are_whitened_better_than_by_linear_shrinkage():
    """New examples are likelier, also with fewer examples than entries."""
    rng = np.random.default_rng(2)
    factor = rng.normal(size=(5, 50))
    truth = factor.T @ factor + 0.25 * np.eye(50)
    for num in (30, 200):
        x = rng.multivariate_normal(np.zeros(50), truth, size=num) * np.geomspace(1e-3, 1e3, 50)
        own = np.asarray(Whiten.fit(x).factor, np.float64) / np.geomspace(1e-3, 1e3, 50)[:, None]
        divergences = [
            np.trace(np.linalg.solve(found, truth)) + np.linalg.slogdet(found)[1]
            for found in (
                own @ own.T,
                LedoitWolf().fit(x / np.geomspace(1e-3, 1e3, 50)).covariance_,
            )
        ]
        assert divergences[0] < divergences[1] - 1
    many = rng.normal(size=(20_000, 3)) @ np.array([[1, 0.9, 0], [0, 0.5, 0], [0, 0, 1]])
    many = (many - many.mean(axis=0)) / many.std(axis=0)
    np.testing.assert_allclose(shrunk_covariance(many), np.corrcoef(many.T), atol=5e-3)


def test_bounds_hold_for_columns_of_very_different_scales():
    for factor in (1.0, 1.3, 2.7, 5.9):
        a, b = 1e-6 * factor, 7e5
        forward, inverse = Whiten((0.0, 0.0), ((a, 0.0), (b, b))).bilipschitz()
        with mpmath.workdps(50):
            largest, least = (
                float(value)
                for value in mpmath.svd_r(mpmath.matrix([[a, 0], [b, b]]), compute_uv=False)
            )
        assert 1 / least <= float(forward) <= 1.01 / least
        assert largest <= float(inverse) <= 1.0001 * largest
    forward, inverse = Whiten((0.0, 0.0), ((1e-7, 0.0), (0.0, 1e14))).bilipschitz()
    assert 1e7 <= float(forward) <= 1.0001e7
    assert 1e14 <= float(inverse) <= 1.0001e14
