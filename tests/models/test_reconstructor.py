"""The learned forward operator: shapes, its inverse, the bound of its amplification, and its file."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import kept
import numpy as np
import pytest

from iresnet_jax import certify, load
from iresnet_jax.models.architecture import FlowSpec, StageSpec
from iresnet_jax.models.contractions import freeze
from iresnet_jax.models.reconstructor import Reconstructor, ReconstructorSpec, block_coeff

L = 0.9
STAGES = (StageSpec(2, hidden=(6,), kernel_sizes=(3, 3), squeeze=2), StageSpec(1, hidden=(9,)))  # with a stage of vectors
SPEC = ReconstructorSpec(FlowSpec((4, 4, 1), STAGES, block_coeff(L, 3), "block"), num_levels=17)


@functools.cache
def model():
    params = kept.random_params(SPEC.flow)
    for stage in params.values():
        stage["blocks"]["actnorm"] = jax.tree.map(np.zeros_like, stage["blocks"]["actnorm"])
        stage["blocks"] |= {
            name: {**layer, "kernel": 5 * layer["kernel"]} for name, layer in stage["blocks"].items() if name != "actnorm"
        }
    with jax.enable_x64(False):
        return Reconstructor(SPEC, freeze(SPEC.flow, params))


X = np.random.default_rng(0).uniform(size=(3, 4, 4, 1)).astype(np.float32)

# Compiled, for one size of batch: one operation at a time, loops take seconds.
measure, invert, reconstruct = (jax.jit(m) for m in (Reconstructor.measure, Reconstructor.invert, Reconstructor.reconstruct))


@pytest.mark.parametrize("num_blocks", [1, 4, 50])
@pytest.mark.parametrize("coeff", [0.5, 0.99, 0.999])
def test_constants_of_the_blocks_multiply_to_that_of_the_network(coeff, num_blocks):
    own = block_coeff(coeff, num_blocks)
    assert 0 < own < 1
    np.testing.assert_allclose((1 / (1 - own)) ** num_blocks, 1 / (1 - coeff), rtol=1e-12)


def test_reconstructions_invert_the_operator_and_are_projected():
    y = measure(model(), X)
    assert y.shape == X.shape
    back, info = invert(model(), y)
    assert bool(info.converged.all())
    np.testing.assert_allclose(back, X, atol=1e-5)
    far = 10 * np.asarray(y) - 3
    unprojected, _ = invert(model(), far)
    assert float(unprojected.min()) < 0
    assert float(unprojected.max()) > 1
    np.testing.assert_array_equal(reconstruct(model(), far)[0], np.clip(unprojected, 0, 1))


def test_measurements_keep_the_places_of_pixels():
    """Without branches the operator is the identity, whatever is squeezed on the way."""
    nothing = model().with_(weights=jax.tree.map(jnp.zeros_like, dict(model().weights)))
    np.testing.assert_array_equal(measure(nothing, X), X)
    np.testing.assert_array_equal(invert(nothing, X)[0], X)


def test_noise_amplification_is_the_bound_of_the_jacobian_and_close_to_it_at_most(x64):
    bound = model().noise_amplification
    assert 0.99 / (1 - L) < bound <= 1 / (1 - L)
    precise = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), model())
    of_operator = jax.jit(jax.vmap(jax.jacfwd(lambda x: precise.measure(x[None])[0].ravel())))
    jacobians = np.asarray(of_operator(jnp.asarray(X, jnp.float64))).reshape(len(X), 16, 16)
    largest = 1 / np.linalg.norm(jacobians, ord=-2, axis=(1, 2))  # singular values of the inverse's Jacobian at measurements
    assert (largest <= bound).all()
    assert largest.max() > 1.2  # and the test would see a bound below it


def test_certified_decoding_takes_its_measurements():
    plain, info = invert(model(), X)
    x, found = certify.decode(model(), X)
    np.testing.assert_array_equal(x, plain)
    assert found.certificate.applied.all()
    assert (found.error_bound <= info.error_bound).all()


def test_a_saved_model_is_the_same(tmp_path):
    read = load(model().save(tmp_path / "model.npz"))
    assert isinstance(read, Reconstructor)
    assert read.spec == SPEC
    np.testing.assert_array_equal(measure(read, X), measure(model(), X))
    assert read.noise_amplification == model().noise_amplification


def test_an_ordinary_network_maps_measurements_to_images():
    ordinary = model().with_(spec=dataclasses.replace(SPEC, constrained=False))
    found, info = reconstruct(ordinary, X)
    np.testing.assert_allclose(found, np.clip(measure(model(), X), 0, 1), atol=1e-6)
    assert bool(info.converged.all())
    assert ordinary.noise_amplification == pytest.approx(ordinary.certificate().forward)
    with pytest.raises(ValueError, match="no Lipschitz constraint"):
        ordinary.freeze()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: ReconstructorSpec(FlowSpec((4,), (StageSpec(1, (3,)),))),
            r"takes images \(h, w, c\), got examples of shape \(4,\)",
        ),
        (
            lambda: ReconstructorSpec(FlowSpec((4, 4, 2), (StageSpec(1, (3,), (1, 1), factor_out=True),))),
            "no stage may factor_out channels",
        ),
        (lambda: model().reconstruct(np.zeros((2, 8, 8, 1), np.float32)), r"must have shape \(4, 4, 1\), got \(8, 8, 1\)"),
        (lambda: model().preprocess(np.zeros((2, 4, 4, 1), np.float32)), "integer levels 0 to 16"),
        (lambda: model().with_(weights=kept.uncertified(model().weights)).certificate(), r"call freeze\(\) first"),
    ],
)
def test_mistakes_of_callers(call, message):
    with pytest.raises(ValueError, match=message):
        call()
