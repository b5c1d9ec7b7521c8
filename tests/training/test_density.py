"""Validation sees what training exploits; an evaluation's keys are those of its examples."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_runs as runs

from iresnet_jax.data import load
from iresnet_jax.data.augment import transformed
from iresnet_jax.maths.logdet_estimator import LogdetInfo
from iresnet_jax.models.architecture import FlowSpec, StageSpec
from iresnet_jax.models.density import Density, LogProb
from iresnet_jax.models.density_spec import DensitySpec
from iresnet_jax.runs.job import Job
from iresnet_jax.training.density import ALARMING_BIAS, evaluation_keys, make_loss
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


def test_the_loss_is_that_of_transformed_images_given_their_transformations():
    seen = []

    class Watched(Density):
        def terms(self, x, key_noise, key_probe, *, context):
            seen.append((x, context))
            zeros = jnp.zeros(len(x))
            return LogProb(
                jnp.mean(x, axis=(1, 2, 3)), zeros, zeros, zeros, LogdetInfo(zeros, zeros)
            )

    flow = FlowSpec((2, 3, 1), (StageSpec(1, (2,), (3, 3)),), context_dim=2)
    model = Watched(DensitySpec(flow, num_levels=17), {}, {})
    loss = make_loss(transform=functools.partial(transformed, names=("right", "mirror")))
    images = np.random.default_rng(0).integers(1, 17, (40, 2, 3, 1), dtype=np.uint8)
    key = jax.random.key(0)
    keys = Keys(jnp.int32(0), key, key, jax.random.split(jax.random.key(1), 40))
    value = loss(model, (jnp.asarray(images), None), keys).metrics["bits_per_dim"]
    np.testing.assert_allclose(value, -jnp.mean(seen[0][0]) / (6 * np.log(2)), rtol=1e-6)
    x, context = map(np.asarray, seen[0])
    moved = np.pad(images, ((0, 0), (0, 0), (1, 0), (0, 0)))[:, :, :3]
    for vector, expected in (((0, 0), images), ((1, 0), moved), ((0, 1), images[:, :, ::-1])):
        is_this = (context == vector).all(axis=1)
        assert is_this.any()
        np.testing.assert_array_equal(x[is_this], expected[is_this])


@pytest.mark.parametrize("kind", ["roulette", "exact"])
def test_an_unbiased_training_has_no_bias_to_show(kind):
    assert set(untrained(kind=kind)[0]) == {"nll", "log_prior", "log_det"}


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
