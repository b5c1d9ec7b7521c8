"""Branches in bfloat16: what is rounded, what is not, and what is certified then."""

import functools

import jax
import jax.numpy as jnp
import kept
import numpy as np
import pytest
import tiny_runs as runs
from oracles import dense_conv_matrix, operator_norm

from iresnet_jax.branches.feedforward import FeedforwardSpec
from iresnet_jax.data import load
from iresnet_jax.maths import platforms as target
from iresnet_jax.runs import loop
from iresnet_jax.training import parallel

UNIT = 2.0**-8  # spacing of bfloat16 at 1; a rounding is off by half of it


def rounded(x):
    return np.asarray(jnp.asarray(x, jnp.float32).astype(jnp.bfloat16).astype(jnp.float32), np.float64)


@pytest.mark.parametrize("kernel_sizes", [(3, 1, 3), None], ids=["convolutions", "dense"])
def test_layers_take_and_give_rounded_numbers(kernel_sizes):
    shape = (5, 4, 2) if kernel_sizes else (6,)
    spec = FeedforwardSpec(shape, hidden=(7, 6), kernel_sizes=kernel_sizes, activation="tanh")
    weights = spec.initial_weights(jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (3, *shape))
    found = jax.jit(functools.partial(spec.apply, bfloat16=True))(weights, x)
    h = np.asarray(x, np.float64)
    for layer in spec.layers:
        h, kernel = rounded(np.tanh(h) if layer.activation else h), rounded(weights[layer.name]["kernel"])
        matrix = dense_conv_matrix(kernel, *shape[:2]) if kernel_sizes else kernel.T
        h = rounded(h.reshape(3, -1) @ matrix.T).reshape(3, *shape[:-1], -1)
    assert found.dtype == x.dtype
    # tanh in float32 and sums in another order may fall on the other side of a rounding: by one unit an entry, of a few.
    difference = np.abs(np.asarray(found, np.float64) - h)
    assert difference.max() <= 4 * UNIT * np.abs(h).max()
    assert np.median(difference) == 0


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_accelerators_compute_what_cpus_do(platform):
    """The form for them run here: few channels in, few out, and a gradient."""
    spec = FeedforwardSpec((6, 5, 3), hidden=(64,), kernel_sizes=(3, 3), activation="tanh")
    weights = spec.initial_weights(jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (4, *spec.in_shape))

    def value_and_gradients(weights, x):
        run = lambda weights, x: spec.apply(weights, x, bfloat16=True)  # noqa: E731
        y, pull = jax.vjp(run, weights, x)
        return y, pull(jnp.cos(y))

    here = jax.jit(value_and_gradients)(weights, x)
    with target.compiling_for(platform):
        there = jax.jit(value_and_gradients)(weights, x)
    exact = jax.jit(jax.vjp, static_argnums=0)(spec.apply, weights, x)[0]
    for a, b in zip(jax.tree.leaves(here), jax.tree.leaves(there), strict=True):
        scale = float(jnp.sqrt(jnp.mean(a**2)))
        assert float(jnp.sqrt(jnp.mean((a - b) ** 2))) < 2 * UNIT * scale  # their roundings fall elsewhere
    error = float(jnp.sqrt(jnp.mean((there[0] - exact) ** 2)))
    assert 0 < error < 1.1 * float(jnp.sqrt(jnp.mean((here[0] - exact) ** 2)))


def test_the_way_forward_is_rounded_and_the_inverse_is_not():
    model = kept.model(kept.IMAGES)
    fast = model.with_(bfloat16=True)
    images, _ = kept.images(4)
    run = jax.jit(lambda model, images: (model.encode(images), model.log_prob(images)))
    (z, log_prob), (fast_z, fast_log_prob) = run(model, images), run(fast, images)
    scale = float(jnp.abs(z).max())
    assert 0 < float(jnp.abs(fast_z - z).max()) < 4 * UNIT * scale
    assert 0 < float(jnp.abs(fast_log_prob - log_prob).max()) < UNIT * float(jnp.abs(log_prob).max())
    decode = jax.jit(lambda model, z: model.continuous.decode(z)[0])
    np.testing.assert_array_equal(decode(fast, z), decode(model, z))


def test_the_certificate_is_that_of_the_rounded_kernels():
    model = kept.model(kept.IMAGES)
    certificate, plain = model.with_(bfloat16=True).certificate(), model.certificate()
    [stage] = model.spec.flow.layout
    weights = model.weights["stage0"].branch.weights
    differs = False
    for k, block in enumerate(certificate.blocks):
        for layer, own, before in zip(stage.branch.layers, block.layers, plain.blocks[k].layers, strict=True):
            kernel = rounded(weights[layer.name]["kernel"][k])
            norm = operator_norm(dense_conv_matrix(kernel, *layer.in_shape[:2]))
            assert norm <= own.bound < norm * 1.01
            differs |= own.bound != before.bound
    assert differs
    assert certificate.certified
    assert certificate.verdict.endswith("of kernels rounded to bfloat16, in exact arithmetic behind that")
    assert "bfloat16" not in plain.verdict


def test_training_rounds_branches_alone():
    data, start = load("digits"), None

    def after_a_step(bfloat16):
        nonlocal start
        changes = {"training.bfloat16": bfloat16, "optimizer.warmup_steps": 0}
        objective = loop.build_objective(runs.config_of(runs.CLASSIFIER_CONFIG, **changes), data)
        start = start or jax.device_get(runs.random_state(objective))
        batch = jax.tree.map(lambda rows: rows[:32], objective.examples)
        return jax.device_get(parallel.parallelize(objective.training_step)(start, parallel.shard(batch, num_devices=1)))

    (state, metrics), (whole, whole_metrics) = after_a_step(bfloat16=True), after_a_step(bfloat16=False)
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(state.params))
    assert metrics["max_sigma"] == whole_metrics["max_sigma"]
    assert 0 < abs(metrics["loss"] - whole_metrics["loss"]) < 2 * UNIT * abs(whole_metrics["loss"])
    assert any((a != b).any() for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(whole.params), strict=True))


def test_batchnorm_in_the_branches_is_refused():
    changes = {"training.bfloat16": True, "classifier.normalization": "batchnorm", "constraint.norms": "none"}
    with pytest.raises(ValueError, match=r"training\.bfloat16 is for networks with ActNorm"):
        runs.config_of(runs.CLASSIFIER_CONFIG, **changes)
