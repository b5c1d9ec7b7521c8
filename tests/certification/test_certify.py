"""Certified inverses against Newton's method in decimal numbers of 50 digits, on small flows of every kind."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import kept
import numpy as np
import plain_flow as plain
import pytest
from iresnet_jax.certification.dense_linearization import linearize
from iresnet_jax.certification.problem import Problem
from iresnet_jax.certification.step_norms import newton_step, step_norms

from iresnet_jax import certify
from iresnet_jax.certification import problem as certification_problem
from iresnet_jax.certification import step_blocks, trajectory
from iresnet_jax.maths import activations
from iresnet_jax.maths.enclosures.double_double import DoubleDouble
from iresnet_jax.models.architecture import FlowSpec, StageSpec
from iresnet_jax.models.density import Density, DensitySpec
from iresnet_jax.models.flow import freeze

CONV = {"hidden": (3,), "kernel_sizes": (3, 3)}
FLOWS = {
    "points": FlowSpec((2,), (StageSpec(2, hidden=(6, 5), activation="lipswish"),), coeff=0.9),
    "preactivated": FlowSpec((3,), (StageSpec(2, hidden=(6,), activation="elu", preactivation=True),)),
    "tanh": FlowSpec((2,), (StageSpec(3, hidden=(6,), activation="tanh"),), coeff=0.999),
    "images": FlowSpec(
        (4, 4, 1),
        (
            StageSpec(1, **CONV, activation="clipswish", squeeze=2, factor_out=True, positional_bias=True),
            StageSpec(1, **CONV, activation="softplus4", padding="CIRCULAR"),
            StageSpec(1, hidden=(5,), activation="softplus"),
        ),
    ),
}
JUMPS = {name: FlowSpec((2,), (StageSpec(2, hidden=(6,), activation=name),)) for name in ("relu", "maxmin")}


@functools.cache
def model(name):
    """A density of such a flow, with random weights."""
    spec = {**FLOWS, **JUMPS}[name]
    make = jax.jit(lambda key: freeze(spec, kept.random_params(spec, key)))
    frozen = make(jax.random.key(1))
    weights = jax.tree.map(np.asarray, frozen)
    for stage in weights.values():
        rng = np.random.default_rng(0)
        for layer in stage.branch.values():
            layer["bias"] = (0.3 * rng.normal(size=layer["bias"].shape)).astype(np.float32)
    return Density(DensitySpec(spec), weights, {})


@functools.cache
def exact_inverse(name, scale):
    """Latents of two inputs of that size, in float32, and their preimages in decimal numbers."""
    own = model(name)
    flow = own.spec.flow
    x = scale * np.random.default_rng(2).normal(size=(2, *flow.event_shape))
    with jax.enable_x64(True):
        weights = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), own.weights)
        whole = lambda x: trajectory.follow(flow, weights, x[None], None)[0, -1][trajectory.entries_of(flow).latents]  # noqa: E731
        y, jacobians = jax.jit(lambda x: (jax.vmap(whole)(x), jax.vmap(jax.jacfwd(whole))(x)))(jnp.asarray(x))
        y, jacobians = np.asarray(y).astype(np.float32), np.asarray(jacobians).reshape(2, flow.num_dims, -1)
    preimages = []
    for one, latents, jacobian in zip(x, y, jacobians, strict=True):
        step = np.linalg.inv(jacobian)
        preimages.append(plain.invert(plain.DECIMAL, flow, own.weights, latents, one, step, num_steps=5))
    for latents, preimage in zip(y, preimages, strict=True):
        wrong = plain.forward(plain.DECIMAL, flow, own.weights, preimage) - plain.DECIMAL.of(latents)
        assert max(abs(wrong)) < 1e-25
    return y, preimages


@pytest.fixture(params=["all products", "norms of steps"])
def path(request, monkeypatch):
    """Both ways to bound products of inverses, on the same small flows."""
    if request.param == "norms of steps":
        monkeypatch.setattr(certification_problem, "ALL_PRODUCTS", 0.0)
    return request.param


def rounded(preimages, dtype: type = np.float64):
    return np.array([preimage.astype(np.float64) for preimage in preimages]).astype(dtype)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("name", FLOWS)
def test_bounds_hold_and_are_sharp_from_float32_to_the_last_bit_of_float64(name):
    y, preimages = exact_inverse(name, 1.0)
    noise = np.random.default_rng(3).normal(size=(2, *model(name).spec.flow.event_shape))
    for x in (rounded(preimages), rounded(preimages, np.float32), rounded(preimages) + 1e-4 * noise):
        found = certify.inverse(model(name), y, x)
        errors = np.array([plain.distance(plain.DECIMAL, one, exact) for one, exact in zip(x, preimages, strict=True)])
        assert found.applied.all()
        assert np.all(errors <= found.error_bound)
        assert np.all(found.error_bound <= 1.002 * errors)
        assert np.all(found.h < 1e-3)
        assert np.all(np.isnan(found.estimate))
        for one, bound, exact in zip(found.refined, found.refined_bound, preimages, strict=True):
            assert plain.distance(plain.DECIMAL, one, exact) <= bound + 2.0**-53 * np.linalg.norm(one)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("name", ["points", "tanh"])
@pytest.mark.parametrize("scale", [30.0, 1e3])
def test_bounds_hold_far_from_the_data_and_far_from_the_preimage(name, scale):
    y, preimages = exact_inverse(name, scale)
    for x in (rounded(preimages), rounded(preimages) + scale, np.zeros_like(rounded(preimages))):
        found = certify.inverse(model(name), y, x)
        errors = np.array([plain.distance(plain.DECIMAL, one, exact) for one, exact in zip(x, preimages, strict=True)])
        assert np.all(errors <= found.error_bound)
        assert found.applied.all()
        assert np.all(found.error_bound <= 1.01 * errors + 1e-14 * scale)


@pytest.mark.parametrize("name", JUMPS)
def test_slopes_that_jump_leave_the_bounds_of_the_blocks(name):
    y, preimages = exact_inverse(name, 1.0)
    found = certify.inverse(model(name), y, rounded(preimages, np.float32))
    errors = [
        plain.distance(plain.DECIMAL, one, exact) for one, exact in zip(rounded(preimages, np.float32), preimages, strict=True)
    ]
    assert not found.applied.any()
    assert np.all(np.isinf(found.h))
    assert np.all(errors <= found.error_bound)
    assert np.all(found.error_bound <= np.array(errors) + 1e-12)


@pytest.mark.parametrize("name", FLOWS)
def test_norms_of_steps_against_singular_values(name):
    own, flow = model(name), model(name).spec.flow
    x = np.random.default_rng(0).normal(size=(2, *flow.event_shape))
    with jax.enable_x64(True):
        problem = Problem.of(own)
        points = np.asarray(trajectory.follow(flow, problem.weights, jnp.asarray(x), None))
        found = trajectory.residuals(problem.stages, DoubleDouble.of(points))
        norms = step_norms(problem, found)
        wanted = np.array([dense_steps(name, jnp.asarray(one)) for one in points])
        acted_on = [a for a, s in zip(problem.entries.active, flow.layout, strict=True) for _ in range(s.spec.num_blocks)]
        values = np.zeros_like(found.values)
        for t, active in enumerate(acted_on):
            values[:, t, active] = np.random.default_rng(t).normal(size=(2, len(active)))
        corrections = np.asarray(newton_step(problem, found._replace(values=values)))
    for t, active in enumerate(acted_on):
        for i in range(2):
            exact = 1 / np.linalg.svd(wanted[i, t][np.ix_(active, active)], compute_uv=False)[-1]
            assert exact <= norms.bounds[i, t] <= problem.constants.inverse[t]
            assert norms.bounds[i, t] <= 1.6 * exact  # the symmetric part, and the least scale for all entries
    later = np.zeros((2, flow.num_dims))
    for t in reversed(range(len(acted_on))):
        later = np.linalg.solve(wanted[:, t], (later - values[:, t])[..., None])[..., 0]
        np.testing.assert_allclose(corrections[:, t], later, rtol=0, atol=1e-9)


def test_beyond_the_largest_jacobians_norms_are_estimated_and_the_bounds_are_the_global_ones(monkeypatch):
    y, preimages = exact_inverse("images", 1.0)
    x = rounded(preimages)
    errors = np.array([plain.distance(plain.DECIMAL, one, exact) for one, exact in zip(x, preimages, strict=True)])
    monkeypatch.setattr(certification_problem, "ALL_PRODUCTS", 0.0)
    verified = certify.inverse(model("images"), y, x)
    monkeypatch.setattr(step_blocks, "MOST_ENTRIES", 0)
    found = certify.inverse(model("images"), y, x)
    assert np.all(np.isfinite(found.estimate))
    assert np.all(errors <= found.error_bound)
    assert np.all(found.estimate <= found.error_bound)
    assert np.all(verified.refined_bound < found.refined_bound)
    with jax.enable_x64(True):
        problem = Problem.of(model("images"))
    assert not any(problem.layers)
    own = problem.constants.inverse
    assert np.all(found.beta >= np.prod(np.maximum(own, 1)))  # nothing estimated is in it


def test_an_input_that_is_no_number_has_an_infinite_bound():
    y, preimages = exact_inverse("points", 1.0)
    x = rounded(preimages)
    x[1] = np.nan
    found = certify.inverse(model("points"), y, x)
    assert np.isfinite(found.error_bound[0])
    assert not np.isfinite(found.error_bound[1])


def test_what_cannot_be_certified_is_refused():
    own = model("points")
    y, x = np.zeros((1, 2), np.float32), np.zeros((1, 2), np.float32)
    with pytest.raises(ValueError, match="call freeze"):
        certify.inverse(own.with_(bounds=None), y, x)
    with pytest.raises(ValueError, match="y must have 2 entries"):
        certify.inverse(own, y, x[:, :1])
    with pytest.raises(ValueError, match="up to 1 dimensions, got 2"):
        certification_problem.check_certified(own, most_dims=1)
    weights = {"stage0": {**own.weights["stage0"], "lipschitz": np.ones(2, np.float32)}}
    with pytest.raises(ValueError, match="not certified to be a contraction"):
        certify.inverse(own.with_(weights=weights), y, x)


def test_residuals_against_decimal_numbers():
    """One step of every kind: its residual in 50 digits is within the bound, which is far below float64's rounding."""
    for name in ("points", "preactivated", "images"):
        own, flow = model(name), model(name).spec.flow
        stages = trajectory.precise_stages(flow, own.weights, own.bounds)
        x = np.random.default_rng(0).normal(size=(1, *flow.event_shape))
        with jax.enable_x64(True):
            weights = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), own.weights)
            points = np.asarray(trajectory.follow(flow, weights, jnp.asarray(x), None))
            found = trajectory.residuals(stages, DoubleDouble.of(points))
        entries = trajectory.entries_of(flow)
        start = 0
        for stage, active in zip(flow.layout, entries.active, strict=True):
            alone = dataclasses.replace(stage.spec, num_blocks=1, squeeze=1, factor_out=False)
            step_spec = FlowSpec(stage.branch.in_shape, (alone,))
            for k in range(stage.spec.num_blocks):
                step_weights = {"stage0": jax.tree.map(lambda a, k=k: a[k : k + 1], own.weights[stage.name])}
                t = start + k
                inside = plain.DECIMAL.of(points[0, t, active].reshape(stage.branch.in_shape))
                after = plain.forward(plain.DECIMAL, step_spec, step_weights, inside)
                wanted = after - plain.DECIMAL.of(points[0, t + 1, active])
                error = plain.distance(plain.DECIMAL, found.values[0, t, active], wanted)
                assert error <= found.errors[0, t] <= 1e-16 * np.linalg.norm(found.values[0, t]) + 1e-19
                assert np.linalg.norm(np.delete(found.values[0, t], active)) == 0
            start += stage.spec.num_blocks
        assert entries.latents.tolist() != list(range(flow.num_dims)) or name != "images"


@pytest.mark.parametrize("name", sorted(activations.ACTIVATIONS))
def test_slopes_change_no_faster_than_stated(name):
    """Sampled differences of slopes on a fine grid, in float64: never above the constant, and close to it."""
    entry = activations.ACTIVATIONS[name]
    if not entry.elementwise:
        assert entry.slope_lipschitz is None
        return
    x = np.linspace(-8, 8, 4001)
    beta = 1.3
    apply = functools.partial(entry.apply, beta=beta) if entry.has_beta else entry.apply
    with jax.enable_x64(True):
        slopes = np.asarray(jax.jit(jax.vmap(jax.jacfwd(lambda t: apply(t[None]))))(jnp.asarray(x)))
    steepness = np.linalg.norm(np.diff(slopes, axis=0), axis=1) / np.diff(x)[0]
    if entry.slope_lipschitz is None:
        assert steepness.max() > 100
        return
    stated = entry.slope_lipschitz * (np.log1p(np.exp(beta)) if entry.has_beta else 1)
    assert steepness.max() <= stated * (1 + 1e-6) + 1e-12
    assert steepness.max() >= 0.99 * stated


@pytest.mark.parametrize("name", FLOWS)
def test_jacobians_of_steps_against_forward_differentiation(name):
    own, flow = model(name), model(name).spec.flow
    x = np.random.default_rng(0).normal(size=(1, *flow.event_shape))
    with jax.enable_x64(True):
        problem = Problem.of(own)
        points = np.asarray(trajectory.follow(flow, problem.weights, jnp.asarray(x), None))
        found = trajectory.residuals(problem.stages, DoubleDouble.of(points))
        linearized = linearize(problem, found, DoubleDouble.of(points))
        wanted = np.asarray(dense_steps(name, jnp.asarray(points[0])))
    errors = problem.constants.jacobian_errors(found.argument_errors)[0]
    assert np.all(errors <= 1e-11)
    t = 0
    for group, active in zip(linearized.inverses, problem.entries.active, strict=True):
        for matrix in np.asarray(group.forward[0]):
            np.testing.assert_allclose(matrix, wanted[t][np.ix_(active, active)], rtol=0, atol=1e-13)
            t += 1


@pytest.mark.parametrize("name", FLOWS)
def test_jacobians_of_steps_change_no_faster_than_stated(name):
    """Sampled pairs of points at all distances, and pairs that climb: gradient ascent on the quotient from the best sample."""
    own, flow = model(name), model(name).spec.flow
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        constants = Problem.of(own).constants
        num = len(constants.second)
        step = jax.jit(lambda points: dense_steps(name, points))
        best, largest = None, np.zeros(num)
        for _ in range(150):
            one = 2 * rng.normal(size=(num, flow.num_dims))
            other = one + 10.0 ** rng.uniform(-3, 0) * rng.normal(size=one.shape)
            quotients = quotient(step, one, other)
            largest = np.maximum(largest, quotients)
            if best is None or quotients.max() > best[0]:
                best = (quotients.max(), one, other)
        _, one, other = best
        for _ in range(150):
            near = [point + 0.1 * rng.normal(size=point.shape) for point in (one, other)]
            quotients = quotient(step, *near)
            if quotients.max() > best[0]:
                best, (one, other) = (quotients.max(), *near), near
            largest = np.maximum(largest, quotients)
    assert np.all(largest <= constants.second)
    assert np.all(constants.second <= 60 * largest)


def quotient(step, one, other):
    entries = np.linalg.norm(one - other, axis=1)
    return np.linalg.norm(np.asarray(step(one)) - np.asarray(step(other)), 2, axis=(1, 2)) / entries


@functools.partial(jax.jit, static_argnums=0)
def dense_steps(name, points):
    """Jacobians of all steps at points ``(t, d)`` on the whole vector, by forward differentiation in float64."""
    own, flow = model(name), model(name).spec.flow
    found, start = [], 0
    for stage, active in zip(flow.layout, trajectory.entries_of(flow).active, strict=True):
        weights = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), own.weights[stage.name])

        def step(block, u, stage=stage):
            scale, bias = jnp.exp(block.actnorm.log_scale), block.actnorm.bias
            u = ((u.reshape(-1, len(scale)) + bias[None]) * scale[None]).reshape(1, *stage.branch.in_shape)
            return (u + stage.branch.apply(block.branch, u)).ravel()

        own_points = points[start : start + stage.spec.num_blocks][:, active]
        jacobians = jax.vmap(jax.jacfwd(step, argnums=1))(weights, own_points)
        whole = jnp.tile(jnp.eye(flow.num_dims), (stage.spec.num_blocks, 1, 1))
        found.append(whole.at[:, active[:, None], active[None]].set(jacobians))
        start += stage.spec.num_blocks
    return jnp.concatenate(found)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("name", FLOWS)
def test_local_constants_against_singular_values_and_pairs_of_points(name):
    own, flow = model(name), model(name).spec.flow
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, *flow.event_shape))
    entries = trajectory.entries_of(flow)
    at_point = certify.local_constants(own, x, 0.0)
    radius = 0.02
    in_ball = certify.local_constants(own, x, radius)
    with jax.enable_x64(True):
        weights = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), own.weights)
        run = jax.jit(lambda x: trajectory.follow(flow, weights, x, None))
        for i, one in enumerate(x):
            whole = np.eye(flow.num_dims)
            for jacobian in np.asarray(dense_steps(name, np.asarray(run(one[None]))[0, :-1])):
                whole = jacobian @ whole
            values = np.linalg.svd(whole, compute_uv=False)
            assert values[0] * (1 - 1e-12) <= at_point.forward[i] <= 1.001 * values[0]
            assert (1 - 1e-12) / values[-1] <= at_point.inverse[i] <= 1.001 / values[-1]
            directions = rng.normal(size=(2, 400, flow.num_dims))
            directions /= np.linalg.norm(directions, axis=2, keepdims=True)
            pairs = one.ravel()[None, None] + radius * rng.uniform(size=(2, 400, 1)) ** 0.2 * directions
            images = [np.asarray(run(p.reshape(-1, *flow.event_shape)))[:, -1][:, entries.latents] for p in pairs]
            ratio = np.linalg.norm(images[0] - images[1], axis=1) / np.linalg.norm(pairs[0] - pairs[1], axis=1)
            assert ratio.max() <= in_ball.forward[i]
            assert 1 / ratio.min() <= in_ball.inverse[i]
            assert at_point.forward[i] <= in_ball.forward[i] <= in_ball.global_forward
            assert at_point.inverse[i] <= in_ball.inverse[i] <= in_ball.global_inverse


def test_without_smooth_slopes_local_constants_are_the_global_ones():
    found = certify.local_constants(model("relu"), np.zeros((1, 2)), 0.1)
    assert found.forward[0] == found.global_forward
    assert found.inverse[0] == found.global_inverse
    with pytest.raises(ValueError, match="radius must be at least 0"):
        certify.local_constants(model("relu"), np.zeros((1, 2)), -1.0)
