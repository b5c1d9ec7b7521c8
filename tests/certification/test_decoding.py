"""Certified decoding: bounds in the units of the data against inverses in float64."""

import functools

import chex
import jax
import jax.numpy as jnp
import kept
import numpy as np
import pytest

from iresnet_jax import certify
from iresnet_jax.bijections.equalize import Equalize
from iresnet_jax.bijections.marginals import Marginals
from iresnet_jax.bijections.residual import Solver
from iresnet_jax.bijections.standardize import Standardize
from iresnet_jax.models.architecture import FlowSpec, StageSpec
from iresnet_jax.models.classifier import Classifier
from iresnet_jax.models.density import Density
from iresnet_jax.models.density_spec import DensitySpec

EXACT = 1e-11  # error of inverses in float64, and of the references made of them
DENSITIES = {
    "images": DensitySpec(
        FlowSpec((4, 4, 1), (StageSpec(1, hidden=(6,)),)),
        transform=Equalize((0.1, 0.2, 0.6, 0.1), alpha=0.05),
        num_levels=4,
    ),
    "cells and a context": DensitySpec(
        FlowSpec((2,), (StageSpec(2, hidden=(8,)),), context_dim=3),
        transform=Standardize((3.0, 0.0), (2.0, 0.1)),
        cells=Marginals.lines([0.5, 0]),
    ),
}


@functools.cache
def case(name):
    """A model, latents, contexts, and the continuous data of the latents in float64."""
    spec = DENSITIES[name]
    model = kept.model(spec)
    z = jax.random.normal(jax.random.key(1), (3, spec.flow.num_dims))
    context = jax.random.normal(jax.random.key(2), (3, 3)) if spec.flow.context_dim else None
    with jax.enable_x64(True):
        precise = in_float64(model).continuous
        x, _ = jax.jit(Density.decode)(
            precise, np.float64(z), context=None if context is None else np.float64(context)
        )
        return model, z, context, np.asarray(x)


def in_float64(model):
    return jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), model).with_(
        solver=Solver(atol=1e-13, refine=True)
    )


def distance(x, exact):
    return np.linalg.norm((np.asarray(x, np.float64) - exact).reshape(len(exact), -1), axis=1)


def levels_of(model, exact):
    with jax.enable_x64(True):
        return np.asarray(model.spec.rounded(jnp.asarray(exact)))


@pytest.mark.parametrize("name", DENSITIES)
def test_bounds_hold_in_the_units_of_the_data_and_certain_levels_are_those_of_float64(name):
    model, z, context, exact = case(name)
    (continuous, info), (x, found) = (
        model.continuous.decode(z, context=context),
        certify.decode(model, z, context=context),
    )
    np.testing.assert_array_equal(model.spec.rounded(continuous), x)
    np.testing.assert_array_equal(info.num_evals, found.num_evals)
    assert found.certificate.applied.all()
    error = distance(continuous, exact)
    assert np.all(error <= found.error_bound + EXACT)
    assert np.all(found.error_bound <= 20 * error + 1e-6)
    assert np.all(found.error_bound < info.error_bound)
    rounded = levels_of(model, exact)
    if name == "cells and a context":
        np.testing.assert_array_equal(found.certain, [[True, False]] * 3)
        np.testing.assert_array_equal(rounded[:, 0], x[:, 0])
    else:
        assert found.certain.mean() > 0.9
        np.testing.assert_array_equal(rounded[found.certain], np.asarray(x)[found.certain])


def test_certificates_of_rough_inverses_are_wider_and_leave_levels_open():
    model, z, _, exact = case("images")
    rough = model.with_(solver=Solver(max_evals=2))
    x, found = certify.decode(rough, z)
    continuous, _ = rough.continuous.decode(z)
    assert np.all(distance(continuous, exact) <= found.error_bound)
    assert not found.certain.all()
    assert (~found.certain | (levels_of(model, exact) == np.asarray(x))).all()


def test_a_classifier_bounds_its_images_and_their_padding():
    model = kept.model(kept.CLASSIFIER)
    images, _ = kept.images(3)
    features = jax.jit(Classifier.encode)(model, images)
    plain, _ = jax.jit(Classifier.decode)(model, features, bounds=model.bounds())
    reconstructed, found = certify.decode(model, features)
    np.testing.assert_array_equal(plain, reconstructed)
    assert found.certificate.applied.all()
    with jax.enable_x64(True):
        wanted, _ = jax.jit(Classifier.decode)(in_float64(model), np.float64(features))
        wanted = np.asarray(wanted)
    error = distance(reconstructed, wanted)
    assert np.all(error <= found.error_bound + EXACT)
    assert np.all(found.error_bound <= 20 * error + 1e-6)
    assert found.certain.all()
    np.testing.assert_array_equal(np.rint(255 * wanted), images)


def test_the_certificate_is_of_the_latents_and_contexts_that_were_given():
    """The model rounds them, and what that costs is in the bound."""
    model, z, context, _ = case("cells and a context")
    beside = np.float64(z) * (1 + 2e-8)  # rounded to the same numbers
    np.testing.assert_array_equal(np.float32(beside), z)
    _, given = certify.decode(model, beside, context=context)
    _, rounded = certify.decode(model, z, context=context)
    _, under = certify.decode(model, z, context=np.float64(context) * (1 + 2e-8))
    one, each = (
        certify.decode(model, z, context=given)
        for given in (context[0], np.tile(context[:1], (len(z), 1)))
    )
    chex.assert_trees_all_equal(one, each)
    exact = rounded.certificate.refined  # to the last bits of float64
    for other in (given, under):
        assert np.abs(other.certificate.refined - exact).max() > 1e-10
