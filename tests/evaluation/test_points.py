"""The least likely points, and the map of a density over the plane."""

import dataclasses

import jax
import jax.numpy as jnp
import kept
import numpy as np
import pytest

from iresnet_jax.bijections.transforms.dequantize import Grid
from iresnet_jax.evaluation.points import least_likely, log_density_on_grid

SAME_RTOL = 1e-5  # the same maths by another route, float32


def test_density_map_has_the_second_coordinate_along_its_rows():
    model, points = kept.model(kept.POINTS), np.random.default_rng(0).normal(size=(64, 2)).astype(np.float32)
    values, (left, right, bottom, top) = log_density_on_grid(model, points, side=8)
    spread = np.ptp(points, axis=0)
    assert (left + right, bottom + top) == pytest.approx(points.min(axis=0) + points.max(axis=0), abs=1e-6)
    assert (right - left, top - bottom) == pytest.approx((1.1 * spread.max(),) * 2)
    first, second = (low + (np.arange(8) + 0.5) * 1.1 * spread.max() / 8 for low in (left, bottom))
    grid = jnp.asarray([[first[5], second[2]]], jnp.float32)
    [expected] = jax.jit(type(model).log_prob)(model, grid)
    np.testing.assert_allclose(values[2, 5], expected, rtol=SAME_RTOL)
    assert abs(values[5, 2] - expected) > 1e-3


def test_the_map_of_data_on_a_grid_is_that_of_the_dequantised_data():
    model, points = kept.model(kept.POINTS), np.random.default_rng(0).normal(size=(64, 2)).astype(np.float32)
    on_grid = model.with_(spec=dataclasses.replace(model.spec, grid=Grid((0.0, 0.0), (0.5, 0.0))))
    expected, _ = log_density_on_grid(model, points, side=8)
    found, _ = log_density_on_grid(on_grid, points, side=8)
    np.testing.assert_allclose(found, expected, rtol=SAME_RTOL)


def test_a_map_is_where_the_points_are():
    points = np.random.default_rng(0).normal((48.85, 2.35), (0.05, 5), (64, 2)).astype(np.float32)
    _, (left, right, bottom, top) = log_density_on_grid(kept.model(kept.POINTS), points, side=2)
    assert (right - left, top - bottom) == pytest.approx(1.1 * np.ptp(points, axis=0), rel=1e-5)
    assert left < points[:, 0].min() < points[:, 0].max() < right
    for few in (points[:1], points * np.array([1, 0], np.float32)):
        _, (left, right, bottom, top) = log_density_on_grid(kept.model(kept.POINTS), few, side=2)
        assert left < right
        assert bottom < top


def test_the_least_likely_points_have_their_entries_that_are_furthest_out():
    points = np.random.default_rng(0).normal(size=(50, 5))
    log_prob = np.linspace(-3, -1, 50)
    points[17], log_prob[17], log_prob[31] = [0, 9, 0, -20, 0], -80.0, np.nan
    found = least_likely(points, log_prob)
    assert [point.row for point in found] == [31, 17, 0, 1, 2, 3, 4, 5]
    assert found[1].log_prob == -80.0
    assert [(entry.index, entry.value) for entry in found[1].entries[:2]] == [(3, -20.0), (1, 9.0)]
    expected = (points[17, 3] - points[:, 3].mean()) / points[:, 3].std()
    assert found[1].entries[0].deviations == pytest.approx(expected)
