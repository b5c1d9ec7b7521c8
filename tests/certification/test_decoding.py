"""Certified decoding: bounds in the units of the data against inverses in float64."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import kept
import numpy as np
import pytest

from iresnet_jax import certify
from iresnet_jax.bijections.residual import Solver
from iresnet_jax.bijections.transforms.dequantize import Grid
from iresnet_jax.bijections.transforms.equalize import Equalize
from iresnet_jax.bijections.transforms.standardize import Standardize
from iresnet_jax.models.architecture import FlowSpec, StageSpec
from iresnet_jax.models.density import DensitySpec

EXACT = 1e-11  # error of inverses in float64, and of the references made of them
CONTEXT = FlowSpec((2,), (StageSpec(2, hidden=(8,)),), context_dim=3)
DENSITIES = {
    "points": kept.POINTS,
    "images by logit": kept.IMAGES,
    "images by equalize": dataclasses.replace(kept.IMAGES, transform=Equalize((0.1, 0.2, 0.6, 0.1), alpha=0.05), num_levels=4),
    "a grid": dataclasses.replace(
        kept.POINTS, transform=Standardize((3.0, 0.0), (2.0, 0.1)), grid=Grid((0.0, 0.0), (0.5, 0.0))
    ),
    "a context": dataclasses.replace(kept.POINTS, flow=CONTEXT),
}


@functools.cache
def decoded(name):
    """A model, latents, contexts, and both ways to decode them."""
    spec = DENSITIES[name]
    model = kept.model(spec)
    z = jax.random.normal(jax.random.key(1), (3, spec.flow.num_dims))
    context = jax.random.normal(jax.random.key(2), (3, 3)) if spec.flow.context_dim else None
    return model, z, context, model.decode(z, context=context), certify.decode(model, z, context=context)


def precise(name):
    """The flow's input and continuous data of the same latents in float64."""
    model, z, context, _, _ = decoded(name)
    with jax.enable_x64(True):
        model = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), model).with_(solver=Solver(atol=1e-13, refine=True))
        context = None if context is None else jnp.asarray(context, jnp.float64)
        z = jnp.asarray(z, jnp.float64)
        x = jax.jit(lambda model, z, context: model.flow(context).inverse(z)[0])(model, z, context)
        return np.asarray(x), np.asarray(model.spec.transform.bijection().inverse(x)[0])


@pytest.mark.parametrize("name", DENSITIES)
def test_bounds_hold_in_the_units_of_the_data_and_certain_levels_are_those_of_float64(name):
    model, z, context, (plain, info), (x, found) = decoded(name)
    np.testing.assert_array_equal(plain, x)
    np.testing.assert_array_equal(info.num_evals, found.num_evals)
    assert found.certificate.applied.all()
    computed = model.continuous_of_input(model.flow(context).inverse(z)[0])
    _, wanted = precise(name)
    error = np.linalg.norm((np.asarray(computed, np.float64) - wanted).reshape(3, -1), axis=1)
    assert np.all(error <= found.error_bound + EXACT)
    assert np.all(found.error_bound <= 20 * error + 1e-6)
    assert np.all(found.error_bound < info.error_bound)
    with jax.enable_x64(True):
        rounded = np.asarray(model.round_to_data(jnp.asarray(wanted)))
    if name in ("points", "a context"):
        assert found.certain is None
    elif name == "a grid":
        np.testing.assert_array_equal(found.certain, [[True, False]] * 3)
        np.testing.assert_array_equal(rounded[:, 0], x[:, 0])
    else:
        assert found.certain.mean() > 0.9
        np.testing.assert_array_equal(rounded[found.certain], np.asarray(x)[found.certain])


def test_certificates_of_rough_inverses_are_wider_and_leave_levels_open():
    model, z, *_ = decoded("images by logit")
    _, found = certify.decode(model.with_(solver=Solver(max_evals=2)), z)
    _, wanted = precise("images by logit")
    rough, _ = model.with_(solver=Solver(max_evals=2)).continuous.decode(z)
    error = np.linalg.norm((np.asarray(rough, np.float64) - wanted).reshape(3, -1), axis=1)
    assert np.all(error <= found.error_bound)
    assert not found.certain.all()
    with jax.enable_x64(True):
        levels = np.asarray(model.round_to_data(jnp.asarray(wanted)))
    open_or_right = ~found.certain | (levels == np.asarray(model.round_to_data(rough)))
    assert open_or_right.all()


def test_a_classifier_bounds_its_images_and_their_padding():
    model = kept.model(kept.CLASSIFIER)
    images, _ = kept.images(3)
    features = model.features(images)
    plain, (reconstructed, found) = model.reconstruct(features), certify.decode(model, features)
    np.testing.assert_array_equal(plain.images, reconstructed)
    assert found.certificate.applied.all()
    with jax.enable_x64(True):
        own = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), model).with_(solver=Solver(atol=1e-13, refine=True))
        wanted = own.reconstruct(jnp.asarray(features, jnp.float64))
    error = np.linalg.norm((np.asarray(reconstructed, np.float64) - np.asarray(wanted.images)).reshape(3, -1), axis=1)
    assert np.all(error <= found.error_bound + EXACT)
    assert np.all(found.error_bound <= 20 * error + 1e-6)
    assert found.certain.all()
    np.testing.assert_array_equal(np.rint(255 * np.asarray(wanted.images)), images)


def test_slopes_that_jump_keep_the_bounds_of_the_blocks():
    spec = DensitySpec(FlowSpec((2,), (StageSpec(2, hidden=(6,), activation="relu"),)))
    _, info = certify.decode(kept.model(spec), jnp.ones((2, 2)))
    assert not info.certificate.applied.any()
    assert np.all(np.isinf(info.certificate.K))
    assert np.all(info.error_bound < 1e-3)
