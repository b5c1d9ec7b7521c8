"""Local constants of flows against singular values of dense Jacobians and pairs of points."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from certified_flows import dense_steps, density, followed

from iresnet_jax import certify
from iresnet_jax.certification import prepared, trajectory

RADIUS = 0.02


@pytest.mark.parametrize("all_products", [True, False])
def test_constants_hold_at_a_point_and_in_a_ball(all_products, monkeypatch):
    if not all_products:
        monkeypatch.setattr(prepared, "ALL_PRODUCTS", 0.0)
    own, rng = density("images"), np.random.default_rng(0)
    x = rng.normal(size=(2, *own.spec.flow.event_shape))
    at_point, in_ball = (certify.local_constants(own, x, radius) for radius in (0.0, RADIUS))
    flow, points, _ = followed(own, x)
    assert np.all(at_point.forward <= in_ball.forward)
    assert np.all(at_point.inverse <= in_ball.inverse)
    assert np.all(in_ball.forward <= in_ball.global_forward)
    assert np.all(in_ball.inverse <= in_ball.global_inverse)
    with jax.enable_x64(True):
        for i, one in enumerate(x):
            whole = np.eye(flow.spec.num_dims)
            for jacobian in np.asarray(dense_steps(flow.spec, own.weights, jnp.asarray(points[i, :-1]))):
                whole = jacobian @ whole
            values = np.linalg.svd(whole, compute_uv=False)
            assert values[0] * (1 - 1e-12) <= at_point.forward[i] <= 1.001 * values[0]
            assert (1 - 1e-12) / values[-1] <= at_point.inverse[i] <= 1.001 / values[-1]
            directions = rng.normal(size=(2, 400, flow.spec.num_dims))
            directions /= np.linalg.norm(directions, axis=2, keepdims=True)
            pairs = one.ravel()[None, None] + RADIUS * rng.uniform(size=(2, 400, 1)) ** 0.2 * directions
            ends = [
                np.asarray(trajectory.follow(flow.spec, flow.weights, jnp.asarray(p.reshape(-1, *x.shape[1:])), None))[:, -1]
                for p in pairs
            ]
            ratio = np.linalg.norm(ends[0] - ends[1], axis=1) / np.linalg.norm(pairs[0] - pairs[1], axis=1)
            assert ratio.max() <= in_ball.forward[i]
            assert 1 / ratio.min() <= in_ball.inverse[i]


def test_without_smooth_slopes_local_constants_are_the_global_ones():
    found = certify.local_constants(density("relu"), np.zeros((1, 2)), 0.1)
    assert found.forward[0] == found.global_forward
    assert found.inverse[0] == found.global_inverse
    with pytest.raises(ValueError, match="radius must be at least 0"):
        certify.local_constants(density("relu"), np.zeros((1, 2)), -1.0)
