"""Certified inverses against Newton's method in decimal numbers of 50 digits, on small flows of every kind."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import plain_flow as plain
import pytest
from certified_flows import FLOWS, JUMPS, changed, density

from iresnet_jax import certify
from iresnet_jax.certification import banded, prepared, trajectory
from iresnet_jax.certification.prepared import PreparedFlow


@functools.cache
def exact_inverse(name, scale):
    """Latents of two inputs of that size, in float32, and their preimages in decimal numbers."""
    own = density(name)
    flow = own.spec.flow
    x = scale * np.random.default_rng(2).normal(size=(2, *flow.event_shape))
    with jax.enable_x64(True):
        weights = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), own.weights)
        whole = lambda x: trajectory.follow(flow, weights, x[None], None)[0, -1][trajectory.places_of(flow).latents]  # noqa: E731
        y, jacobians = jax.jit(lambda x: (jax.vmap(whole)(x), jax.vmap(jax.jacfwd(whole))(x)))(jnp.asarray(x))
        y, jacobians = np.asarray(y).astype(np.float32), np.asarray(jacobians).reshape(2, flow.num_dims, -1)
    preimages = []
    for one, latents, jacobian in zip(x, y, jacobians, strict=True):
        step = np.linalg.inv(jacobian)
        preimage = plain.invert(plain.DECIMAL, flow, own.weights, latents, one, step, num_steps=5)
        wrong = plain.forward(plain.DECIMAL, flow, own.weights, preimage) - plain.DECIMAL.of(latents)
        assert max(abs(wrong)) < 1e-25
        preimages.append(preimage)
    return y, preimages


def rounded(preimages, dtype: type = np.float64):
    return np.array([preimage.astype(np.float64) for preimage in preimages]).astype(dtype)


def errors_of(x, preimages):
    return np.array([plain.distance(plain.DECIMAL, one, exact) for one, exact in zip(x, preimages, strict=True)])


@pytest.fixture(params=["all products", "norms of steps"])
def path(request, monkeypatch):
    """Both ways to bound products of inverses, on the same small flows."""
    if request.param == "norms of steps":
        monkeypatch.setattr(prepared, "ALL_PRODUCTS", 0.0)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("name", FLOWS)
def test_bounds_hold_and_are_sharp_from_float32_to_the_last_bit_of_float64(name):
    y, preimages = exact_inverse(name, 1.0)
    noise = np.random.default_rng(3).normal(size=rounded(preimages).shape)
    for x in (rounded(preimages), rounded(preimages, np.float32), rounded(preimages) + 1e-4 * noise):
        found, errors = certify.inverse(density(name), y, x), errors_of(x, preimages)
        assert found.applied.all()
        assert np.all(errors <= found.error_bound)
        assert np.all(found.error_bound <= 1.002 * errors)
        assert np.all(found.h < 1e-3)
        assert np.all(np.isnan(found.estimate))
        rounding = 2.0**-53 * np.linalg.norm(found.refined.reshape(2, -1), axis=1)
        assert np.all(errors_of(found.refined, preimages) <= found.refined_bound + rounding)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("name", ["lipswish", "tanh"])
def test_bounds_hold_far_from_the_data_and_far_from_the_preimage(name):
    scale = 1e3
    y, preimages = exact_inverse(name, scale)
    for x in (rounded(preimages), rounded(preimages) + scale, np.zeros_like(rounded(preimages))):
        found, errors = certify.inverse(density(name), y, x), errors_of(x, preimages)
        assert np.all(errors <= found.error_bound)
        assert found.applied.all()
        assert np.all(found.error_bound <= 1.01 * errors + 1e-14 * scale)


@pytest.mark.parametrize("name", JUMPS)
def test_slopes_that_jump_leave_the_bounds_of_the_blocks(name):
    y, preimages = exact_inverse(name, 1.0)
    x = rounded(preimages, np.float32)
    found, errors = certify.inverse(density(name), y, x), errors_of(x, preimages)
    assert not found.applied.any()
    assert np.all(np.isinf(found.h))
    assert np.all(errors <= found.error_bound)
    assert np.all(found.error_bound <= errors + 1e-12)


def test_beyond_the_largest_jacobians_norms_are_estimated_and_the_bounds_are_the_global_ones(monkeypatch):
    own = density("images")
    y, preimages = exact_inverse("images", 1.0)
    x = rounded(preimages)
    monkeypatch.setattr(prepared, "ALL_PRODUCTS", 0.0)
    verified = certify.inverse(own, y, x)
    monkeypatch.setattr(banded, "MOST_ENTRIES", 0)
    found = certify.inverse(own, y, x)
    assert np.all(np.isfinite(found.estimate))
    assert np.all(errors_of(x, preimages) <= found.error_bound)
    assert np.all(found.estimate <= found.error_bound)
    assert np.all(verified.refined_bound < found.refined_bound)
    with jax.enable_x64(True):
        inverse = PreparedFlow.of(own).constants.inverse
    assert np.all(found.beta >= np.prod(np.maximum(inverse, 1)))  # nothing estimated is in it


def test_what_is_no_number_has_an_infinite_bound_and_no_examples_have_none():
    y, preimages = exact_inverse("lipswish", 1.0)
    x = rounded(preimages)
    x[1] = np.nan
    found = certify.inverse(density("lipswish"), y, x)
    assert np.isfinite(found.error_bound).tolist() == [True, False]
    nothing = certify.inverse(density("lipswish"), y[:0], x[:0])
    assert nothing.error_bound.shape == (0,)
    assert nothing.refined.shape == (0, 2)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda own, y, x: certify.inverse(changed(own, word="estimated"), y, x), "call freeze"),
        (lambda own, y, x: certify.inverse(changed(own, lipschitz_bound=np.ones(2, np.float32)), y, x), "not certified to be"),
        (lambda own, y, x: certify.inverse(own, y, x[:, :1]), "y must have 2 entries"),
        (lambda own, y, x: jax.jit(lambda y: certify.inverse(own, y, x))(y), "outside of jit"),
        (lambda own, y, x: jax.jit(lambda y: certify.decode(own, y)[0])(y), "outside of jit"),
        (lambda own, y, x: prepared.check(own, most_dims=1), "up to 1 dimensions, got 2"),
    ],
)
def test_what_cannot_be_certified_is_refused(call, match):
    with pytest.raises(ValueError, match=match):
        call(density("lipswish"), np.zeros((1, 2), np.float32), np.zeros((1, 2), np.float32))
