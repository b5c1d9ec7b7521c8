"""A kind of branch of one's own, in this file alone: a density of it inverts, is measured, saved and certified.

`test_own.py` trains such branches, and has every estimator of their log-determinants.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import iresnet_jax as ir
from iresnet_jax.branches import kinds
from iresnet_jax.models.contractions import as_params, freeze

DIMS = 3
X = np.random.default_rng(0).normal(size=(8, DIMS)).astype(np.float32)


@dataclass(frozen=True)
class WaveSpec(ir.BranchSpec):
    """``g(x) = B sin(A x + b)``, with ``Lip(g) <= |A|_F |B|_F``."""

    width: int = 8

    @classmethod
    def of_stage(cls, stage, in_shape, context_dim):
        return cls(in_shape, width=stage.hidden[0])

    def initial_weights(self, key, *, last_scale=1.0, sharp=False):
        there, back = jax.random.normal(key, (2, self.in_shape[0], self.width)) / np.sqrt(self.width)
        return {"there": there, "back": last_scale * back.T, "bias": jnp.zeros(self.width)}

    def apply(self, weights, x, context):
        return jnp.sin(x @ weights["there"] + weights["bias"][None]) @ weights["back"]

    def lipschitz_bound(self, weights):
        return jnp.linalg.norm(weights["there"]) * jnp.linalg.norm(weights["back"])


@pytest.fixture(scope="module")
def model():
    """A frozen density of random weights."""
    kinds.register("wave", WaveSpec)
    flow = ir.FlowSpec((DIMS,), (ir.StageSpec(3, (8,), kind="wave"),), coeff=0.8)
    blocks = jax.vmap(flow.layout[0].branch.initial_weights)(jax.random.split(jax.random.key(0), 3))
    actnorm = {"bias": jnp.zeros((3, DIMS)), "log_scale": jnp.zeros((3, DIMS))}
    weights = freeze(flow, {"stage0": {"blocks": {**blocks, "actnorm": actnorm}}})
    return ir.Density(ir.DensitySpec(flow), weights, {"mean": jnp.zeros(DIMS), "log_std": jnp.zeros(DIMS)})


def test_it_is_a_contraction(model):
    pairs = jax.random.normal(jax.random.key(2), (2, 200, DIMS))
    for k in range(3):
        branch = jax.tree.map(lambda a, k=k: a[k], model.weights["stage0"].branch)
        ratios = jnp.linalg.norm(branch(pairs[0]) - branch(pairs[1]), axis=1) / jnp.linalg.norm(pairs[0] - pairs[1], axis=1)
        assert 0.1 < ratios.max() <= branch.lipschitz_bound <= 0.8 + 1e-6


def test_it_inverts_and_has_its_logdet(model):
    back, info = model.decode(model.encode(X))
    assert np.all(info.converged)
    np.testing.assert_allclose(back, X, atol=1e-4)
    jacobians = jax.vmap(jax.jacfwd(lambda x: model.encode(x[None])[0]))(X)
    exact = np.linalg.slogdet(np.asarray(jacobians, np.float64))[1]
    np.testing.assert_allclose(model.terms(X, jax.random.key(0), jax.random.key(0)).log_det, exact, atol=1e-4)


def test_it_is_saved_and_certified_on_its_word(model, tmp_path):
    loaded = ir.load(model.save(tmp_path / "model.npz"))
    np.testing.assert_allclose(loaded.log_prob(X), model.log_prob(X), rtol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, as_params(loaded.weights), as_params(model.weights))
    certificate = loaded.certificate()
    assert all(block.word == "user" and block.bound <= 0.8 + 1e-6 for block in certificate.blocks)
    assert "user's word" in str(certificate)
    with pytest.raises(ValueError, match="branches of kind 'wave', which certificates cannot follow"):
        ir.certify.inverse(loaded, X, X)
