"""Certified inverses against Newton's method in 50 digits, on small flows of every kind."""

import functools

import kept
import numpy as np
import plain_flow as plain
import pytest
from certified_flows import FLOWS, density

from iresnet_jax import certify
from iresnet_jax.bijections.standardize import Standardize
from iresnet_jax.certification import norms
from iresnet_jax.models.architecture import FlowSpec, StageSpec
from iresnet_jax.models.density_spec import DensitySpec


@functools.cache
def exact_inverse(name, scale):
    """Latents of two inputs of that size, in float32, and their preimages in decimal numbers."""
    own = density(name)
    flow = own.spec.flow
    x = scale * np.random.default_rng(2).normal(size=(2, *flow.event_shape))
    latents_of = functools.partial(plain.forward, plain.FLOAT, flow, own.weights)
    y, preimages = np.array([latents_of(one) for one in x]).astype(np.float32), []
    moves = 1e-4 * np.eye(flow.num_dims).reshape(-1, *flow.event_shape)
    for one, latents in zip(x, y, strict=True):
        slopes = [(latents_of(one + move) - latents_of(one - move)) / 2e-4 for move in moves]
        step = np.linalg.inv(np.transpose(slopes))
        preimage = plain.invert(
            plain.DECIMAL, flow, own.weights, plain.DECIMAL.of(latents), one, step, num_steps=5
        )
        wrong = plain.forward(plain.DECIMAL, flow, own.weights, preimage) - plain.DECIMAL.of(
            latents
        )
        assert max(abs(wrong)) < 1e-25
        preimages.append(preimage)
    return y, preimages


def rounded(preimages, dtype: type = np.float64):
    return np.array([preimage.astype(np.float64) for preimage in preimages]).astype(dtype)


def errors_of(x, preimages):
    return np.array(
        [plain.distance(plain.DECIMAL, one, exact) for one, exact in zip(x, preimages, strict=True)]
    )


@pytest.mark.parametrize("name", FLOWS)
def test_bounds_hold_and_are_sharp_from_float32_to_the_last_bit_of_float64(name):
    y, preimages = exact_inverse(name, 1.0)
    noise = np.random.default_rng(3).normal(size=rounded(preimages).shape)
    for x in (
        rounded(preimages),
        rounded(preimages, np.float32),
        rounded(preimages) + 1e-4 * noise,
    ):
        found, errors = certify.inverse(density(name), y, x), errors_of(x, preimages)
        assert found.applied.all()
        assert np.all(errors <= found.error_bound)
        assert np.all(found.error_bound <= 1.002 * errors)
        rounding = 2.0**-53 * np.linalg.norm(found.refined.reshape(2, -1), axis=1)
        assert np.all(errors_of(found.refined, preimages) <= found.refined_bound + rounding)


@pytest.mark.parametrize("name", ["lipswish", "tanh"])
def test_bounds_hold_far_from_the_data_and_far_from_the_preimage(name):
    scale = 1e3
    y, preimages = exact_inverse(name, scale)
    for x in (rounded(preimages), rounded(preimages) + scale, np.zeros_like(rounded(preimages))):
        found, errors = certify.inverse(density(name), y, x), errors_of(x, preimages)
        assert np.all(errors <= found.error_bound)
        assert found.applied.all()
        assert np.all(found.error_bound <= 1.01 * errors + 1e-14 * scale)


def test_slopes_that_jump_leave_the_bounds_of_the_blocks():
    """In the last step; in the one before, the theorem applies."""
    y, preimages = exact_inverse("jumps", 1.0)
    x = rounded(preimages, np.float32)
    found, errors = certify.inverse(density("jumps"), y, x), errors_of(x, preimages)
    assert not found.applied.any()
    assert np.all(errors <= found.error_bound)
    assert np.all(found.error_bound <= errors + 1e-12)


def test_beyond_the_largest_jacobians_the_norms_are_the_global_ones(monkeypatch):
    own = density("images")
    y, preimages = exact_inverse("images", 1.0)
    x = rounded(preimages)
    verified = certify.inverse(own, y, x)
    monkeypatch.setattr(norms, "MOST_ENTRIES", 0)
    found = certify.inverse(own, y, x)
    assert np.all(errors_of(x, preimages) <= found.error_bound)
    assert np.all(verified.refined_bound < found.refined_bound)


def test_what_is_no_number_has_an_infinite_bound():
    y, preimages = exact_inverse("lipswish", 1.0)
    x = rounded(preimages)
    x[1] = np.nan
    found = certify.inverse(density("lipswish"), y, x)
    assert np.isfinite(found.error_bound).tolist() == [True, False]


def test_contexts_are_scaled_in_float64():
    """By a network on them, whatever their precision: there is one preimage."""
    flow = FlowSpec((2,), (StageSpec(2, hidden=(6,), activation="tanh"),), context_dim=2)
    model = kept.model(
        DensitySpec(flow, context=Standardize((0.1,) * 3, (0.3,) * 3), context_hidden=(4, 2))
    )
    x, context = np.random.default_rng(4).normal(size=(2, 2, 3)).astype(np.float32)
    one, other = (
        certify.inverse(model, x[:, :2], x[:, :2], context=given)
        for given in (context, context.astype(np.float64))
    )
    np.testing.assert_array_equal(one.refined, other.refined)


X = np.zeros((2, 2), np.float32)
lipswish = functools.partial(density, "lipswish")
