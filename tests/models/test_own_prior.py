"""A prior of one's own, which a density takes, saves and loads."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import kept
import numpy as np
import pytest
from jax.tree_util import register_dataclass

import iresnet_jax as ir
from iresnet_jax.models import priors
from iresnet_jax.models.mixtures import EntryMixtures

FLOW = ir.FlowSpec((2,), (ir.StageSpec(1, hidden=(4,), activation="tanh"),))
SPEC = ir.DensitySpec(FLOW, prior_family="own")
X = jax.random.normal(jax.random.key(0), (16, 2))


@functools.partial(register_dataclass, data_fields=["log_scale"], meta_fields=["dims"])
@dataclasses.dataclass(frozen=True)
class Laplace:
    """Independent Laplace distributions of one scale."""

    log_scale: jax.Array | float
    dims: int = 2

    def log_prob(self, z):
        return -jnp.sum(jnp.abs(z) * jnp.exp(-self.log_scale) + self.log_scale + np.log(2), axis=1)

    def sample(self, key, shape):
        return jnp.exp(self.log_scale) * jax.random.laplace(key, (*shape, self.dims))


def density(prior):
    return ir.Density(SPEC, kept.weights(FLOW), prior)


def test_it_is_the_density_of_latents_and_their_source():
    model = density(Laplace(jnp.float32(0.3)))
    z = np.asarray(model.encode(X), np.float64)
    log_prior = -np.sum(np.abs(z) / np.exp(0.3) + 0.3 + np.log(2), axis=1)
    terms = model.terms(X, jax.random.key(0), jax.random.key(0))
    np.testing.assert_allclose(terms.log_prior, log_prior, rtol=1e-5)
    latents = model.sample_latents(jax.random.key(1), 2000)
    assert np.mean(np.abs(latents)) == pytest.approx(np.exp(0.3), rel=0.1)
    assert model.sample(jax.random.key(1), 3)[0].shape == (3, 2)


def test_its_numbers_have_gradients():
    z = np.asarray(density(Laplace(0.0)).encode(X), np.float64)
    found = jax.jit(jax.grad(lambda prior: density(prior).log_prob(X).mean()))(
        Laplace(jnp.float32(0))
    )
    assert found.log_scale == pytest.approx(np.mean(np.sum(np.abs(z) - 1, axis=1)), rel=1e-4)


def test_a_file_holds_its_numbers(tmp_path):
    model = density(Laplace(jnp.float32(0.3)))
    path = model.save(tmp_path / "model.npz")
    loaded = ir.load(path, prior=Laplace(jnp.float32(7)))
    np.testing.assert_allclose(loaded.log_prob(X), model.log_prob(X), rtol=1e-6)


def test_independent_mixtures_of_the_library_need_no_template(tmp_path):
    model = ir.Density.init(
        jax.random.key(0), X, stages=FLOW.stages, prior=EntryMixtures.fit(np.asarray(X), 3)
    )
    assert (model.spec.prior_family, model.spec.num_components) == ("marginals", 3)
    file = model.save(tmp_path / "model.npz")
    np.testing.assert_allclose(ir.load(file).log_prob(X), model.log_prob(X), rtol=1e-6)
    # arrays of NumPy are no constants here
    fetched = jax.device_get(model).save(tmp_path / "fetched.npz")
    np.testing.assert_array_equal(ir.load(fetched).prior.mean, model.prior.mean)
    with jax.enable_x64(True):
        assert ir.load(file).prior.mean.shape == model.prior.mean.shape


def test_numbers_and_arrays_of_numpy_are_constants(tmp_path):
    for constant in (0.3, np.float32(0.3)):
        prior = priors.trainable(Laplace(constant))
        assert not jax.tree.leaves(prior)
        assert prior.module == Laplace(constant)
        path = density(Laplace(constant)).save(tmp_path / "model.npz")
        loaded = ir.load(path, prior=Laplace(constant))
        np.testing.assert_allclose(
            jax.jit(ir.Density.log_prob)(loaded, X), density(prior).log_prob(X), rtol=1e-6
        )
