"""What certificates know of the steps of a flow: residuals in 50 digits, Jacobians, their norms and how fast they vary."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import kept
import numpy as np
import plain_flow as plain
import pytest
from certified_flows import FLOWS, dense_steps, density, followed, steps_of

from iresnet_jax.certification import jacobians, trajectory
from iresnet_jax.certification.jacobians import newton_step
from iresnet_jax.certification.norms import linearize, products_at, step_norms
from iresnet_jax.certification.prepared import PreparedFlow
from iresnet_jax.maths import activations
from iresnet_jax.maths.double_double import DoubleDouble
from iresnet_jax.models.architecture import FlowSpec, StageSpec
from iresnet_jax.models.contractions import freeze
from iresnet_jax.models.density import Density
from iresnet_jax.models.density_spec import DensitySpec

# Shapes, and the share of the constant that is attained: it takes the layer's norm for that of its rows, which is twice as much
# as a pixel of four moves.
TORI = {"one pixel": ((1, 1, 1), 1.0), "two by two": ((2, 2, 1), 0.5)}


@pytest.mark.parametrize("name", ["lipswish", "preactivated", "images"])
def test_residuals_against_decimal_numbers(name):
    """One step of every kind: its residual in 50 digits is within the bound, which is far below float64's rounding."""
    own = density(name)
    flow, points, found = followed(own, np.random.default_rng(0).normal(size=(1, *own.spec.flow.event_shape)))
    start = 0
    for stage, place in zip(flow.spec.layout, flow.places.stages, strict=True):
        active = place.active
        alone = FlowSpec(stage.branch.in_shape, (dataclasses.replace(stage.spec, num_blocks=1, squeeze=1, factor_out=False),))
        for t in range(start, start + stage.spec.num_blocks):
            weights = {"stage0": jax.tree.map(lambda a, k=t - start: a[k : k + 1], own.weights[stage.name])}
            inside = plain.DECIMAL.of(points[0, t, active].reshape(stage.branch.in_shape))
            wanted = plain.forward(plain.DECIMAL, alone, weights, inside) - plain.DECIMAL.of(points[0, t + 1, active])
            error = plain.distance(plain.DECIMAL, found.values[0, t, active], wanted)
            assert error <= found.errors[0, t] <= 1e-16 * np.linalg.norm(found.values[0, t]) + 1e-19
            assert np.linalg.norm(np.delete(found.values[0, t], active)) == 0
        start += stage.spec.num_blocks
    assert flow.places.latents.tolist() != list(range(flow.spec.num_dims)) or name != "images"


@pytest.mark.parametrize("name", FLOWS)
def test_jacobians_their_norms_and_corrections_against_forward_differentiation(name):
    own = density(name)
    flow, points, found = followed(own, np.random.default_rng(0).normal(size=(2, *own.spec.flow.event_shape)))
    num_dims, constants = flow.spec.num_dims, flow.constants
    assert np.all(constants.jacobian_errors(found.argument_errors) <= 1e-11)
    values = np.zeros_like(found.values)
    for t, active in enumerate(steps_of(flow.spec)):
        values[:, t, active] = np.random.default_rng(t).normal(size=(2, len(active)))
    with jax.enable_x64(True):
        linearized, norms = linearize(flow, found, DoubleDouble.of(points)), step_norms(flow, found)[0]
        wanted = np.array([dense_steps(flow.spec, own.weights, jnp.asarray(one[:-1])) for one in points])
        backward = np.asarray(newton_step(flow.steps, found.slopes, jnp.asarray(values)))
    computed = [matrix for group in linearized.inverses for matrix in np.moveaxis(np.asarray(group.forward), 1, 0)]
    for t, active in enumerate(steps_of(flow.spec)):
        alone = wanted[:, t][:, active[:, None], active[None]]
        np.testing.assert_allclose(computed[t], alone, rtol=0, atol=1e-13)
        exact = 1 / np.linalg.svd(alone, compute_uv=False)[:, -1]
        assert np.all(exact <= norms[:, t])
        assert np.all(norms[:, t] <= constants.inverse[t])
        assert np.all(norms[:, t] <= 1.6 * exact)  # the symmetric part, and the least scale for all entries
    later = np.zeros((2, num_dims))
    for t in reversed(range(len(computed))):
        later = np.linalg.solve(wanted[:, t], (later - values[:, t])[..., None])[..., 0]
        np.testing.assert_allclose(backward[:, t], later, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", sorted(activations.ACTIVATIONS))
def test_slopes_change_no_faster_than_stated(name):
    """Sampled differences of slopes on a fine grid, in float64: never above the constant, and close to it."""
    entry = activations.ACTIVATIONS[name]
    if not entry.elementwise:
        assert entry.slope_lipschitz is None
        return
    x, beta = np.linspace(-8, 8, 4001), 1.3
    apply = functools.partial(entry.apply, beta=beta) if entry.has_beta else entry.apply
    with jax.enable_x64(True):
        slopes = np.asarray(jax.jit(jax.vmap(jax.jacfwd(lambda t: apply(t[None]))))(jnp.asarray(x)))
    steepness = np.linalg.norm(np.diff(slopes, axis=0), axis=1) / np.diff(x)[0]
    if entry.slope_lipschitz is None:
        assert steepness.max() > 100
        return
    stated = entry.slope_lipschitz * (np.log1p(np.exp(beta)) if entry.has_beta else 1)
    assert 0.99 * stated <= steepness.max() <= stated * (1 + 1e-6) + 1e-12


@pytest.mark.parametrize("name", FLOWS)
def test_jacobians_change_no_faster_than_stated(name):
    """Sampled pairs of points at all distances, and pairs that climb: the best pair moves where the quotient grows."""
    own, rng = density(name), np.random.default_rng(0)
    flow = own.spec.flow
    with jax.enable_x64(True):
        stated = PreparedFlow.of(own).constants.second
        step = functools.partial(dense_steps, flow, own.weights)
        best, largest = (-1.0, None, None), np.zeros(len(stated))
        for i in range(300):
            if i < 150:
                one = 2 * rng.normal(size=(len(stated), flow.num_dims))
                other = one + 10.0 ** rng.uniform(-3, 0) * rng.normal(size=one.shape)
            else:
                one, other = (point + 0.1 * rng.normal(size=point.shape) for point in best[1:])
            quotients = np.linalg.norm(np.asarray(step(one)) - np.asarray(step(other)), 2, axis=(1, 2))
            quotients /= np.linalg.norm(one - other, axis=1)
            largest = np.maximum(largest, quotients)
            best = (quotients.max(), one, other) if quotients.max() > best[0] else best
    assert np.all(largest <= stated)
    assert np.all(stated <= 60 * largest)


@pytest.mark.parametrize("name", TORI)
def test_jacobians_of_kernels_wider_than_the_torus_change_no_faster_than_stated(name, monkeypatch):
    """All taps equal and no bias: slopes change fastest at 0, in the direction of all ones."""
    shape, share = TORI[name]
    flow = FlowSpec(shape, (StageSpec(1, hidden=(1,), kernel_sizes=(3, 3), activation="softplus", padding="CIRCULAR"),))
    params = jax.tree.map(np.zeros_like, kept.random_params(flow))
    for layer in params["stage0"]["blocks"].values():
        if "kernel" in layer:
            layer["kernel"] = np.ones_like(layer["kernel"])
    own = Density(DensitySpec(flow), freeze(flow, params), {})
    end, length = np.ones((1, flow.num_dims)) / np.sqrt(flow.num_dims), 1e-3
    with jax.enable_x64(True):
        stated = PreparedFlow.of(own).constants.second[0]
        one, other = (np.asarray(dense_steps(flow, own.weights, jnp.asarray(sign * length / 2 * end)))[0] for sign in (1, -1))
        quotient = np.linalg.norm(one - other, 2) / length
        assert 0.99 * share * stated < quotient <= stated
        monkeypatch.setattr(jacobians, "taps_meet", lambda layer: False)
        assert quotient > 1.2 * PreparedFlow.of(own).constants.second[0]  # rows as long as on a larger image


def test_products_of_a_trajectory_that_moved_have_the_defects_of_where_it_is():
    own = density("lipswish")
    flow, there, found = followed(own, np.array([[0.3, -0.2]]))
    with jax.enable_x64(True):
        here = np.asarray(trajectory.follow(flow.spec, flow.weights, jnp.array([[1.1, 0.4]]), None))
        linearized = linearize(flow, found, DoubleDouble.of(there))
        exact = np.asarray(dense_steps(flow.spec, own.weights, jnp.asarray(here[0, :-1])))
    inverses = np.concatenate([np.asarray(group.matrices[0]) for group in linearized.inverses])
    moved = np.linalg.norm((here - there)[0, :-1], axis=1)
    stated, forgotten = (products_at(flow, linearized, 0, own) for own in (moved, np.zeros_like(moved)))
    for s in range(len(exact)):
        before = np.eye(flow.spec.num_dims)
        for t in range(s, len(exact)):
            product = before @ inverses[t]
            defect = np.linalg.norm(product @ exact[t] - before, 2)
            assert np.linalg.norm(product, 2) <= stated.norms[s, t] * (1 + 1e-12)
            assert 1e-4 < defect <= stated.defects[s, t]
            assert defect > 1e3 * forgotten.defects[s, t]
            before = product
