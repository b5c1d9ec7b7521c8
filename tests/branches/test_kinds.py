"""Flows of every kind of branch that certificates follow: their constants, Jacobians, gradients and files."""

import functools

import certified_flows as flows
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import iresnet_jax as ir
from iresnet_jax.models.contractions import as_params

CONV = {"hidden": (3,), "kernel_sizes": (3, 3), "squeeze": 2}
FLOWS = {
    "sandwich": ir.FlowSpec(
        (4, 4, 1),
        (
            ir.StageSpec(1, **CONV, activation="softplus4", preactivation=True, kind="sandwich"),
            ir.StageSpec(2, hidden=(4, 3), activation="tanh", kind="sandwich"),
        ),
        budget="block",
    ),
}
X = np.random.default_rng(0).normal(size=(2, 4, 4, 1))


@pytest.fixture(scope="module", params=FLOWS)
def kind(request):
    """A kind, whose model and certificate are made in float32, before a test turns to float64."""
    certificate(request.param)
    return request.param


@functools.cache
def model(kind):
    return flows.density(ir.DensitySpec(FLOWS[kind]))


@functools.cache
def certificate(kind):
    return model(kind).certificate()


@functools.cache
def followed(kind):
    """Dense Jacobians of all steps along the trajectories of `X`, in float64."""
    _, points, _ = flows.followed(model(kind), X)
    with jax.enable_x64(True):
        return np.array([flows.dense_steps(FLOWS[kind], model(kind).weights, jnp.asarray(own[:-1])) for own in points])


def test_constants_of_parts_bound_the_dense_jacobians_of_blocks(kind, x64):
    spec = FLOWS[kind]
    assert certificate(kind).certified
    dense = followed(kind)
    active, t = flows.entries_of_steps(spec), 0
    for stage in spec.layout:
        for log_scale in np.asarray(model(kind).weights[stage.name].actnorm.log_scale, np.float64):
            own = certificate(kind).blocks[t]
            assert (own.word, own.target) == ("certified", spec.coeff)
            assert [part.name for part in own.layers] == [part.name for part in stage.branch.parts]
            assert all(part.estimate <= part.bound * (1 + 1e-6) for part in own.layers)
            steps = dense[:, t][:, active[t][:, None], active[t]]  # (I + J) diag(scale)
            scales = np.tile(np.exp(log_scale), len(active[t]) // len(log_scale))
            norms = np.linalg.norm(steps / scales - np.eye(len(scales)), 2, axis=(1, 2))
            assert 0 < norms.max() <= own.bound <= spec.coeff
            t += 1


def test_every_weight_has_a_gradient_and_is_in_the_file(kind, tmp_path):
    flow, x = FLOWS[kind], jnp.asarray(X, jnp.float32)
    params = jax.tree.map(lambda a: np.float32(1.5) * a, jax.device_get(as_params(model(kind).weights)))
    iterates = {stage.name: {"blocks": stage.initial_iterates(jax.random.key(0))} for stage in flow.layout}

    @jax.jit
    def gradient(params):
        def loss(params):
            weights = ir.constrain(flow, params, iterates, num_steps=1).weights
            return jnp.sum(jnp.sin(model(kind).with_(weights=weights).encode(x)))

        return jax.grad(loss)(params)

    for path, leaf in jax.tree.leaves_with_path(jax.device_get(gradient(params))):
        assert np.all(np.isfinite(leaf)), path
        assert np.any(leaf != 0), path
    loaded = ir.load(model(kind).save(tmp_path / "model.npz"))
    jax.tree.map(np.testing.assert_array_equal, as_params(loaded.weights), as_params(model(kind).weights))
