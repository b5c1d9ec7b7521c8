"""What certificates know of steps: residuals in 50 digits, Jacobians, norms, how fast they vary."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import plain_flow as plain
import pytest
from certified_flows import FLOWS, dense_steps, density, entries_of_steps, followed

from iresnet_jax.certification.norms import step_norms
from iresnet_jax.certification.prepared import PreparedFlow
from iresnet_jax.certification.steps import newton_step
from iresnet_jax.maths import activations
from iresnet_jax.models.architecture import FlowSpec


@pytest.mark.parametrize("name", ["lipswish", "preactivated", "images"])
def test_residuals_against_decimal_numbers(name):
    """One step of every kind: its residual in 50 digits is within the bound."""
    own = density(name)
    flow, points, found = followed(
        own, np.random.default_rng(0).normal(size=(1, *own.spec.flow.event_shape))
    )
    start = 0
    for stage, place in zip(flow.spec.layout, flow.places.stages, strict=True):
        active = place.active
        alone = FlowSpec(
            stage.branch.in_shape,
            (dataclasses.replace(stage.spec, num_blocks=1, squeeze=1, factor_out=False),),
        )
        for t in range(start, start + stage.spec.num_blocks):
            weights = {
                "stage0": jax.tree.map(lambda a, k=t - start: a[k : k + 1], own.weights[stage.name])
            }
            inside = plain.DECIMAL.of(points[0, t, active].reshape(stage.branch.in_shape))
            wanted = plain.forward(plain.DECIMAL, alone, weights, inside) - plain.DECIMAL.of(
                points[0, t + 1, active]
            )
            error = plain.distance(plain.DECIMAL, found.values[0, t, active], wanted)
            assert error <= found.errors[0, t] <= 1e-16 * np.linalg.norm(found.values[0, t]) + 1e-19
            assert np.linalg.norm(np.delete(found.values[0, t], active)) == 0
        start += stage.spec.num_blocks
    assert flow.places.latents.tolist() != list(range(flow.spec.num_dims)) or name != "images"


@pytest.mark.parametrize("name", FLOWS)
def test_norms_of_inverses_and_corrections_against_forward_differentiation(name):
    own = density(name)
    flow, points, found = followed(
        own, np.random.default_rng(0).normal(size=(2, *own.spec.flow.event_shape))
    )
    constants, rng = flow.constants, np.random.default_rng(1)
    assert np.all(constants.jacobian_errors(found.argument_errors) <= 1e-11)
    values, entries = np.zeros_like(found.values), entries_of_steps(flow.spec)
    for t, active in enumerate(entries):
        values[:, t, active] = rng.normal(size=(2, len(active)))
    with jax.enable_x64(True):
        wanted = np.array(
            [dense_steps(flow.spec, own.weights, jnp.asarray(one[:-1])) for one in points]
        )
        backward = np.asarray(
            newton_step(flow.spec, flow.weights, jnp.asarray(points), jnp.asarray(values), None)
        )
    norms = step_norms(flow.stages, constants, found)
    for t, active in enumerate(entries):
        alone = wanted[:, t][:, active[:, None], active[None]]
        exact = 1 / np.linalg.svd(alone, compute_uv=False)[:, -1]
        assert np.all(exact <= norms[:, t])
        assert np.all(norms[:, t] <= constants.inverse[t])
        # the symmetric part, and the least scale for all entries
        assert np.all(norms[:, t] <= 1.6 * exact)
    later = np.zeros((2, flow.spec.num_dims))
    for t in reversed(range(len(entries))):
        later = np.linalg.solve(wanted[:, t], (later - values[:, t])[..., None])[..., 0]
        np.testing.assert_allclose(backward[:, t], later, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", sorted(activations.ACTIVATIONS))
def test_slopes_change_no_faster_than_stated(name):
    """Differences of slopes on a fine grid: never above the constant, and close to it."""
    entry = activations.ACTIVATIONS[name]
    if not entry.elementwise:
        assert entry.slope_lipschitz is None
        return
    x, beta = np.linspace(-8, 8, 4001), 1.3
    apply = functools.partial(entry.apply, beta=beta) if entry.initial_beta else entry.apply
    with jax.enable_x64(True):
        slopes = np.asarray(jax.jit(jax.vmap(jax.jacfwd(lambda t: apply(t[None]))))(jnp.asarray(x)))
    steepness = np.linalg.norm(np.diff(slopes, axis=0), axis=1) / np.diff(x)[0]
    if entry.slope_lipschitz is None:
        assert steepness.max() > 100
        return
    stated = entry.slope_lipschitz * (np.log1p(np.exp(beta)) if entry.initial_beta else 1)
    assert 0.99 * stated <= steepness.max() <= stated * (1 + 1e-6) + 1e-12


@pytest.mark.parametrize("name", FLOWS)
def test_jacobians_change_no_faster_than_stated(name):
    """Sampled pairs of points, and the best pair moves where the quotient grows."""
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
            quotients = np.linalg.norm(
                np.asarray(step(one)) - np.asarray(step(other)), 2, axis=(1, 2)
            )
            quotients /= np.linalg.norm(one - other, axis=1)
            largest = np.maximum(largest, quotients)
            best = (quotients.max(), one, other) if quotients.max() > best[0] else best
    assert np.all(largest <= stated)
    assert np.all(stated <= 60 * largest)
