"""Enclosures of the preprocessing against mpmath's numbers of 50 digits, and beside the transforms' own values in float64."""

import functools

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import plain_flow as plain
import plain_likelihood
import pytest

from iresnet_jax.bijections.transforms import forward_enclosure
from iresnet_jax.bijections.transforms.dequantize import Grid, dequantize
from iresnet_jax.bijections.transforms.equalize import Equalize, entry_shares, level_frequencies
from iresnet_jax.bijections.transforms.logit import Center, Identity, Logit
from iresnet_jax.bijections.transforms.standardize import Standardize, Whiten

SHAPE, LEVELS = (3, 3, 2), 17
NUMBERS = plain.mpmath_numbers(50)
IMAGES = np.random.default_rng(0).integers(0, LEVELS, (40, *SHAPE)) * np.random.default_rng(1).integers(0, 2, (40, *SHAPE))
FREQUENCIES = level_frequencies(IMAGES, LEVELS)
VECTORS = np.random.default_rng(2).normal(size=(50, 4)) @ np.random.default_rng(3).normal(size=(4, 4)) + 3.0
ON_UNIT = {
    "identity": Identity(),
    "center": Center(),
    "logit": Logit(0.05),
    "logit of little alpha": Logit(1e-6),
    "equalize": Equalize(FREQUENCIES),
    "equalize by entry": Equalize(FREQUENCIES, entry_shares(IMAGES, FREQUENCIES), alpha=1e-6),
    "standardize images": Standardize((0.1, 0.4), (0.3, 1e-4)),
}
ON_VECTORS = {"standardize": Standardize.fit(VECTORS), "whiten": Whiten.fit(VECTORS)}


@functools.cache
def noisy():
    """Float32 data with noise, and floats at the edges of cells."""
    u = np.array(dequantize(jax.random.key(0), jnp.asarray(IMAGES[:4]), LEVELS))
    u[0, 0, 0, 0], u[1, 0, 0, 0] = np.float32(IMAGES[0, 0, 0, 0] / LEVELS), 0.0
    levels = IMAGES[:4].copy()
    levels[1, 0, 0, 0] = 0
    return u, levels


def distances(ball, exact):
    """By how much of the radius exact numbers miss the middles, at most."""
    of, radii = np.vectorize(mpmath.mpf, otypes=[object]), ball.radius.ravel()
    with mpmath.workdps(50):
        middle = of(ball.middle.high.ravel()) + of(ball.middle.low.ravel())
        gaps = [abs(a - mpmath.mpf(str(b))) for a, b in zip(middle, np.asarray(exact, object).ravel(), strict=True)]
        return np.array([float(gap - mpmath.mpf(float(r))) for gap, r in zip(gaps, radii, strict=True)])


@pytest.mark.parametrize("name", [*ON_UNIT, *ON_VECTORS])
def test_enclosures_hold_values_and_log_determinants(name):
    transform = {**ON_UNIT, **ON_VECTORS}[name]
    u, levels = noisy() if name in ON_UNIT else (VECTORS[:4], VECTORS[:4])
    with jax.enable_x64(True):
        y, log_det = forward_enclosure.enclose_forward(transform, u)
        ours = [np.asarray(part) for part in transform.bijection().forward_and_logdet(jnp.asarray(u, jnp.float64), None)[:2]]
    assert y.radius.shape == u.shape
    exact = [
        plain_likelihood._transform(NUMBERS, transform, NUMBERS.of(one), level) for one, level in zip(u, levels, strict=True)
    ]
    assert np.all(distances(y, np.array([value for value, _ in exact])) <= 0)
    assert np.all(distances(log_det, [value for _, value in exact]) <= 0)
    assert np.all(y.radius <= 1e-20 * (1 + np.abs(y.middle.high)))
    assert np.all(log_det.radius <= 1e-20 * (1 + np.abs(log_det.middle.high)))
    if name != "identity":
        moved = y._replace(middle=y.middle.map(lambda part: part + 1e-18 if part is y.middle.low else part))
        assert np.any(distances(moved, np.array([value for value, _ in exact])) > 0)
    at_edges = np.unravel_index([0, u[0].size], u.shape)  # there float64 may read another level off float32's number
    mine = y.middle.high.copy()
    mine[at_edges] = ours[0][at_edges]
    np.testing.assert_allclose(mine, ours[0], rtol=0, atol=1e-9)
    np.testing.assert_allclose(log_det.middle.high[2:], ours[1][2:], rtol=1e-11)


def test_cells_have_the_volume_that_the_bijections_say():
    grid = Grid((0.0, 1.0, 2.0), (0.5, 0.0, 3.0))
    with jax.enable_x64(True):
        ours = float(grid.bijection().forward_and_logdet(jnp.zeros((1, 3)), jax.random.key(0))[1][0])
    for ball, value, exact in (
        (forward_enclosure.enclose_cells(256, None, 7), -7 * np.log(256.0), -7 * mpmath.log(256)),
        (forward_enclosure.enclose_cells(None, grid, 3), ours, mpmath.log(mpmath.mpf("1.5"))),
        (forward_enclosure.enclose_cells(None, None, 3), 0.0, mpmath.mpf(0)),
    ):
        lower, upper = ball.bounds()
        assert lower <= float(exact) <= upper
        assert upper - lower <= 1e-14 * abs(value) + 1e-25
        np.testing.assert_allclose(lower, value, rtol=1e-14, atol=1e-25)


def test_a_factor_that_float64_cannot_invert_promises_nothing():
    factor = ((1.0, 0.0), (1e300, 1e-300))
    with jax.enable_x64(True), np.errstate(all="ignore"):
        y, _ = forward_enclosure.enclose_forward(Whiten((0.0, 0.0), factor), np.ones((1, 2)))
    assert np.all(np.isneginf(y.bounds()[0]))


def test_other_transforms_are_refused():
    with pytest.raises(ValueError, match=r"has no guaranteed enclosure: certify\.log_det"):
        forward_enclosure.enclose_forward(object(), np.zeros((1, 2)))
