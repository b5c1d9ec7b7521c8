"""Validation sees what training exploits; an evaluation's keys are those of its examples."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import tiny_runs as runs

import iresnet_jax as ir
from iresnet_jax.data import load
from iresnet_jax.data.augment import transformed
from iresnet_jax.data.objectives import ALARMING_BIAS
from iresnet_jax.models.density import LogProb
from iresnet_jax.runs.job import Job
from iresnet_jax.training.objectives import density_loss, evaluation_keys
from iresnet_jax.training.step import Keys


def untrained(**settings):
    """What validation measures of that block without training, and the block."""
    config = runs.one_block(**settings)
    made = Job.of(config, load(config.data.name))
    model = made.free().validated()
    return made.objective.measure(model).metrics, model


def test_validation_says_what_training_gains_by_what_it_cuts_off(caplog):
    many = {"kind": "series", "num_probes": 1000}
    with caplog.at_level("WARNING"):
        means, model = untrained(num_terms=1, **many)  # whose trace is exact
    x = jnp.asarray(load("moons").held_out("validation", 32, 0).x)
    jacobians = jax.jit(jax.vmap(jax.jacfwd(lambda x: model.flow().forward(x[None])[0])))(x)
    scales = np.exp(model.weights["stage0"].actnorm.log_scale[0])
    of_block = np.asarray(jacobians / scales[None, None, :], np.float64)
    # log det(I + J) - tr J
    missed = np.linalg.slogdet(of_block)[1] - (np.trace(of_block, axis1=1, axis2=2) - 2)
    np.testing.assert_allclose(means["training_bias"], missed.mean(), atol=1e-3)  # of 32,000 probes
    assert missed.mean() < -ALARMING_BIAS
    assert f"reads nll lower by {-means['training_bias']:.3f}" in caplog.text
    assert "training exploited what its 1 terms cut off" in caplog.text
    caplog.clear()
    # with the same probes, even few
    with caplog.at_level("WARNING"):
        means, _ = untrained(kind="krylov", num_terms=20)
    assert abs(means["training_bias"]) < 1e-4
    assert not caplog.text


class Watched(ir.Density):
    """A density that keeps what it is asked about."""

    def terms(self, x, key_noise, key_probe, *, context):
        self.seen.append((x, context))
        zeros = jnp.zeros(len(x))
        info = ir.LogdetInfo(zeros, zeros)
        return LogProb(jnp.mean(x.reshape(len(x), -1), axis=1), zeros, zeros, zeros, info)


def asked(spec, loss, x):
    """What a loss asks a density of a spec about, contexts, and its metrics."""
    model, key = Watched(spec, {}, {}), jax.random.key(0)
    object.__setattr__(model, "seen", [])
    keys = Keys(jnp.int32(0), key, key, jax.random.split(jax.random.key(1), len(x)))
    metrics = loss(model, (jnp.asarray(x), None), keys).metrics
    return *model.seen[0], metrics


def test_the_loss_is_that_of_transformed_images_given_their_transformations():
    flow = ir.FlowSpec((2, 3, 1), (ir.StageSpec(1, (2,), (3, 3)),), context_dim=2)
    loss = density_loss(transform=functools.partial(transformed, names=("right", "mirror")))
    images = np.random.default_rng(0).integers(1, 17, (40, 2, 3, 1), dtype=np.uint8)
    x, context, metrics = asked(ir.DensitySpec(flow, num_levels=17), loss, images)
    np.testing.assert_allclose(metrics["bits_per_dim"], -x.mean() / (6 * np.log(2)), rtol=1e-6)
    x, context = np.asarray(x), np.asarray(context)
    moved = np.pad(images, ((0, 0), (0, 0), (1, 0), (0, 0)))[:, :, :3]
    for vector, expected in (((0, 0), images), ((1, 0), moved), ((0, 1), images[:, :, ::-1])):
        is_this = (context == vector).all(axis=1)
        assert is_this.any()
        np.testing.assert_array_equal(x[is_this], expected[is_this])


def test_noise_has_the_scale_of_the_data_on_the_line_where_entries_have_bounds():
    scaled = ir.Standardize((0.0, 0.0), (2.0, 0.3))
    spec = ir.DensitySpec(
        ir.FlowSpec((2,), ()), transform=ir.Bounded((0.0, -np.inf), (1.0, np.inf), then=scaled)
    )
    x, _, _ = asked(spec, density_loss(noise=0.5), np.tile(np.float32([0.3, 5.0]), (4000, 1)))
    line = np.stack([np.log(x[:, 0] / (1 - x[:, 0])), x[:, 1]], axis=1)
    errors = np.array([1.0, 0.15]) / np.sqrt(4000)
    assert np.all(np.abs(line.mean(axis=0) - [np.log(0.3 / 0.7), 5.0]) < 5 * errors)
    np.testing.assert_allclose(line.std(axis=0), [1.0, 0.15], rtol=0.06)
    assert abs(np.corrcoef(line.T)[0, 1]) < 0.08


def test_probe_draws_share_their_noise_and_nothing_else_is_shared():
    draws = {
        (s, p): evaluation_keys(jax.random.key(0), np.arange(3), s, p)
        for s in range(2)
        for p in range(2)
    }
    noise = {draw: jax.random.key_data(keys[0]).tolist() for draw, keys in draws.items()}
    assert noise[0, 0] == noise[0, 1]
    distinct = [*noise[0, 0], *noise[1, 0]]
    for _, key_probe in draws.values():
        distinct += jax.random.key_data(key_probe).tolist()
    assert len({tuple(key) for key in distinct}) == len(distinct) == 2 * 3 + 4 * 3


def test_an_example_has_its_keys_in_whatever_batch_it_stands():
    whole = evaluation_keys(jax.random.key(0), np.arange(6), 1, 2)
    part = evaluation_keys(jax.random.key(0), np.array([4, 2]), 1, 2)
    for keys, some in zip(whole, part, strict=True):
        np.testing.assert_array_equal(
            jax.random.key_data(keys)[np.array([4, 2])], jax.random.key_data(some)
        )
