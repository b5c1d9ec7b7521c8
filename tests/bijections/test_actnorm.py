"""ActNorm whitens the batch it is initialised from, on one device or several."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from iresnet_jax.bijections.actnorm import ActNorm

# Compiled: one operation at a time, each is a program of its own.
fit, run = jax.jit(ActNorm.fit), jax.jit(ActNorm.map)
EXACT = 1e-10  # float64, same maths by another route
SINGLE = 1e-5  # float32, same maths by another route
EPS = 1e-5  # of `ActNorm.fit`


def images(seed=0, shape=(6, 3, 4, 5), mean=3.0, std=0.2):
    return np.random.default_rng(seed).normal(mean, std, shape)


def whitening_error(params, x):
    """Distance of the channels' moments from mean 0 and variance var / (var + eps), in float64."""
    flat = np.asarray(x, np.float64).reshape(-1, x.shape[-1])
    variance = flat.var(axis=0)
    y = (flat + np.asarray(params.bias)) * np.exp(np.asarray(params.log_scale))
    return np.abs(y.mean(axis=0)).max() + np.abs(y.var(axis=0) - variance / (variance + EPS)).max()


@pytest.mark.parametrize("shape", [(64, 5), (6, 3, 4, 5)])
def test_fit_whitens_each_channel(x64, shape):
    x = images(shape=shape) * np.arange(1, 6) - 7 * np.arange(5)
    params = fit(x)
    assert whitening_error(params, x) < EXACT
    y, _ = run(params, x)
    np.testing.assert_allclose(np.asarray(y).reshape(-1, 5).mean(axis=0), 0, atol=EXACT)


def test_a_large_mean_costs_no_digits_in_float32():
    x = images(mean=1000.0, std=0.1, shape=(1024, 2))
    single = jnp.asarray(x, jnp.float32)
    params = fit(single)
    assert params.log_scale.dtype == jnp.float32
    std = np.sqrt(np.asarray(single, np.float64).var(axis=0) + EPS)
    # E[x^2] - E[x]^2 would lose all digits here: the squares are 1e8 times the variance.
    np.testing.assert_allclose(params.log_scale, -np.log(std), atol=1e-4)


def test_constant_channels_keep_their_scale_and_finite_gradients():
    x = np.float32(images())
    x[..., :2] = 0.1, 0.0
    params = fit(x)
    np.testing.assert_array_equal(np.asarray(params.log_scale)[:2], 0)
    nearly = np.float32(images() * [1e-4, 1, 1, 1, 1])
    np.testing.assert_allclose(np.exp(np.asarray(fit(nearly).log_scale)[0]), 316, rtol=1e-3)
    y, logdet = run(params, x)
    np.testing.assert_allclose(np.asarray(y)[..., :2], 0, atol=SINGLE)
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(ActNorm.fit(x).forward(x) ** 2)))(x)
    assert np.isfinite(logdet).all()
    assert np.isfinite(gradient).all()


def test_statistics_of_shards_are_those_of_the_whole_batch(x64):
    x = images(shape=(8, 3, 3, 2)) + np.arange(8).reshape(8, 1, 1, 1)  # the shards' means differ
    whole = fit(x)
    shards = x.reshape(2, 4, 3, 3, 2)
    spread = jax.jit(jax.vmap(lambda x: ActNorm.fit(x, axis_name="batch"), axis_name="batch"))(
        shards
    )
    for device in range(2):
        for name in ("bias", "log_scale"):
            np.testing.assert_allclose(
                np.asarray(getattr(spread, name))[device], getattr(whole, name), rtol=0, atol=EXACT
            )
    local = jax.jit(jax.vmap(ActNorm.fit))(shards)
    # The comparison can fail: without the mean over devices the statistics are those of one shard.
    assert np.abs(np.asarray(local.log_scale) - np.asarray(whole.log_scale)).max() > 0.1


def test_the_logdet_has_the_precision_of_the_data(x64):
    log_scale = np.random.default_rng(1).normal(-2.3, 0.3, 12).astype(np.float32)
    _, logdet = run(
        ActNorm(jnp.zeros(12, np.float32), jnp.asarray(log_scale)), np.zeros((1, 16, 16, 12))
    )
    np.testing.assert_allclose(logdet, 256 * np.sum(log_scale, dtype=np.float64), rtol=EXACT)
