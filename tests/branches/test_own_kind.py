"""A kind of branch of one's own, in this file alone: a density of it trains, inverts, is measured, saved and certified."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import iresnet_jax as ir
from iresnet_jax.branches import kinds
from iresnet_jax.models.contractions import as_params, freeze

DIMS, BATCH = 3, 64


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

    def apply(self, weights, x, context, *, bfloat16=False):
        return jnp.sin(x @ weights["there"] + weights["bias"][None]) @ weights["back"]

    def lipschitz_bound(self, weights):
        return jnp.linalg.norm(weights["there"]) * jnp.linalg.norm(weights["back"])


@pytest.fixture(scope="module")
def trained():
    """A density that a few steps of Adam made likelier, with the losses before and after."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(kinds.KINDS, "wave", WaveSpec)
        flow = ir.FlowSpec((DIMS,), (ir.StageSpec(3, (8,), kind="wave"),), coeff=0.8)
        spec = ir.DensitySpec(flow)
        x = jax.random.normal(jax.random.key(1), (BATCH, DIMS)) * jnp.array([[1.0, 0.3, 2.0]])
        blocks = jax.vmap(flow.layout[0].branch.initial_weights)(jax.random.split(jax.random.key(0), 3))
        actnorm = {"bias": jnp.zeros((3, DIMS)), "log_scale": jnp.zeros((3, DIMS))}
        params = {"stage0": {"blocks": {**blocks, "actnorm": actnorm}}}
        prior = {"mean": jnp.zeros(DIMS), "log_std": jnp.zeros(DIMS)}
        optimizer = optax.adam(1e-2)

        def loss(params):
            return -ir.Density(spec, ir.constrain(flow, params, {}, num_steps=1).weights, prior).log_prob(x).mean()

        @jax.jit
        def step(state, _):
            params, moments = state
            value, gradients = jax.value_and_grad(loss)(params)
            updates, moments = optimizer.update(gradients, moments)
            return (optax.apply_updates(params, updates), moments), value

        (params, _), losses = jax.lax.scan(step, (params, optimizer.init(params)), None, length=60)
        yield ir.Density(spec, freeze(flow, params), prior), np.asarray(losses), x


def test_it_trains_and_stays_a_contraction(trained):
    model, losses, _ = trained
    assert losses[-1] < losses[0] - 0.3
    pairs = jax.random.normal(jax.random.key(2), (2, 200, DIMS))
    for k in range(3):
        branch = jax.tree.map(lambda a, k=k: a[k], model.weights["stage0"].branch)
        ratios = jnp.linalg.norm(branch(pairs[0]) - branch(pairs[1]), axis=1) / jnp.linalg.norm(pairs[0] - pairs[1], axis=1)
        assert ratios.max() <= branch.lipschitz_bound <= 0.8 + 1e-6


def test_it_inverts_and_samples(trained):
    model, _, x = trained
    back, info = model.decode(model.encode(x))
    assert np.all(info.converged)
    np.testing.assert_allclose(back, x, atol=1e-4)
    assert np.all(model.sample(jax.random.key(3), 5)[1].converged)


def test_every_estimator_finds_its_logdet(trained):
    model, _, x = trained
    y, key = x[:8], jax.random.key(4)
    jacobians = jax.vmap(jax.jacfwd(lambda y: model.encode(y[None])[0]))(y)
    exact = np.linalg.slogdet(np.asarray(jacobians, np.float64))[1]
    probes = 400
    for estimator in (
        ir.ExactLogdet(),
        ir.SeriesLogdet(40, num_probes=probes),
        ir.RouletteLogdet(num_probes=probes),
        ir.KrylovLogdet(3, num_probes=probes),
    ):
        terms = model.with_(estimator=estimator).terms(y, key, key)
        stderr = np.nan_to_num(terms.info.stderr, posinf=0)
        assert np.all(np.abs(terms.log_det - exact) < 5 * stderr + 1e-4), estimator


def test_it_is_saved_and_certified_on_its_word(trained, tmp_path):
    model, _, x = trained
    loaded = ir.load(model.save(tmp_path / "model.npz"))
    np.testing.assert_allclose(loaded.log_prob(x), model.log_prob(x), rtol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, as_params(loaded.weights), as_params(model.weights))
    certificate = loaded.certificate()
    assert all(block.word == "user" and block.bound <= 0.8 + 1e-6 for block in certificate.blocks)
    assert "user's word" in str(certificate)
    z = model.encode(x[:2])
    with pytest.raises(ValueError, match="branches of kind 'wave', which certificates cannot follow"):
        ir.certify.inverse(loaded, z, model.decode(z)[0])
