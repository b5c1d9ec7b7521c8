"""Constants of a flow's steps where they are easily too small: kernels wider than a torus, and trajectories that moved."""

import functools

import jax
import jax.numpy as jnp
import kept
import numpy as np
import pytest
from iresnet_jax.certification.dense_linearization import linearize, products_of
from iresnet_jax.certification.problem import Problem

from iresnet_jax.certification import step_jacobians, trajectory
from iresnet_jax.maths.enclosures.double_double import DoubleDouble
from iresnet_jax.models.architecture import FlowSpec, StageSpec
from iresnet_jax.models.density import Density, DensitySpec
from iresnet_jax.models.flow import freeze

# Shapes, and the share of the constant that is attained: it takes the layer's norm for that of its rows, which is twice as much
# as a pixel of four moves.
TORI = {"one pixel": ((1, 1, 1), 1.0), "two by two": ((2, 2, 1), 0.5)}


def torus(shape):
    """One block whose taps are all equal, with 3 x 3 kernels on a torus on which they meet, and no bias."""
    spec = FlowSpec(shape, (StageSpec(1, hidden=(1,), kernel_sizes=(3, 3), activation="softplus", padding="CIRCULAR"),))
    params = jax.tree.map(jnp.zeros_like, kept.random_params(spec, jax.random.key(0)))
    for layer in params["stage0"]["blocks"].values():
        if "kernel" in layer:
            layer["kernel"] = jnp.ones_like(layer["kernel"])
    frozen = jax.jit(lambda params: freeze(spec, params))(params)
    return Density(DensitySpec(spec), frozen, {})


def jacobians(flow, weights, points):
    """Dense Jacobians of every step of a flow of one stage, at points ``(t, d)``, by forward differentiation."""
    [stage] = flow.stages
    step = FlowSpec(flow.event_shape, (StageSpec(**{**vars(stage), "num_blocks": 1}),))

    @jax.jit
    def jacobian(own, point):
        run = functools.partial(trajectory.follow, step, {"stage0": own}, context=None)
        return jax.jacfwd(lambda p: run(x=p.reshape(1, *flow.event_shape))[0, -1])(point)

    blocks = [jax.tree.map(lambda a, t=t: a[t : t + 1], weights["stage0"]) for t in range(len(points))]
    return np.array([jacobian(own, jnp.asarray(point)) for own, point in zip(blocks, points, strict=True)])


@pytest.mark.parametrize("name", TORI)
def test_jacobians_of_kernels_wider_than_the_torus_change_no_faster_than_stated(name, monkeypatch):
    """Where the slopes change fastest, at 0, in the direction of all ones."""
    shape, share = TORI[name]
    own = torus(shape)
    flow = own.spec.flow
    d = flow.num_dims
    with jax.enable_x64(True):
        problem = Problem.of(own)
        length = 1e-3
        ends = [sign * length / 2 * np.ones((1, d)) / np.sqrt(d) for sign in (1, -1)]
        one, other = (jacobians(flow, problem.weights, end)[0] for end in ends)
        quotient = np.linalg.norm(one - other, 2) / length
        assert 0.99 * share * problem.constants.second[0] < quotient <= problem.constants.second[0]
        monkeypatch.setattr(step_jacobians, "taps_meet", lambda branch, layer: False)
        assert quotient > 1.2 * Problem.of(own).constants.second[0]  # rows as long as on a larger image


def test_products_of_a_trajectory_that_moved_have_the_defects_of_where_it_is():
    own = kept.model(kept.POINTS)
    flow = own.spec.flow
    with jax.enable_x64(True):
        problem = Problem.of(own)
        start = np.array([[[0.3, -0.2]], [[1.1, 0.4]]])
        there, here = (np.asarray(trajectory.follow(flow, problem.weights, jnp.asarray(x), None)) for x in start)
        found = trajectory.residuals(problem.stages, DoubleDouble.of(there))
        linearized = linearize(problem, found, DoubleDouble.of(there))
        exact = jacobians(flow, problem.weights, here[0, :-1])
    inverses = np.concatenate([np.asarray(group.matrices[0]) for group in linearized.inverses])
    moved = np.linalg.norm((here - there)[0, :-1], axis=1)
    stated, forgotten = (products_of(problem, linearized, 0, own) for own in (moved, np.zeros_like(moved)))
    for s in range(len(exact)):
        before = np.eye(flow.num_dims)
        for t in range(s, len(exact)):
            product = before @ inverses[t]
            defect = np.linalg.norm(product @ exact[t] - before, 2)
            assert np.linalg.norm(product, 2) <= stated.norms[s, t] * (1 + 1e-12)
            assert 1e-4 < defect <= stated.defects[s, t]
            assert defect > 1e3 * forgotten.defects[s, t]
            before = product
