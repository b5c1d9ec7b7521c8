"""Histogram equalisation: what it makes of data, what that costs, round trips of levels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from iresnet_jax.bijections.dequantize import cells, dequantize, quantize
from iresnet_jax.bijections.equalize import Equalize, entry_shares, level_frequencies

EXACT = 1e-12
P_VALUE = 1e-3
ALPHA = 1e-6


def equalized(transform, x):
    """``u`` of the equaliser, and bits/dim of the levels under it."""
    y, logdet = jax.jit(transform.map)(x)
    y = np.asarray(y, np.float64)
    s = 1 / (1 + np.exp(-y))
    log_logit = np.sum(
        np.log((1 - 2 * transform.alpha) / (s * (1 - s))).reshape(len(y), -1), axis=1
    )
    nats = np.asarray(logdet) - log_logit  # of the equaliser alone
    levels = len(transform.frequencies)
    return (s - transform.alpha) / (1 - 2 * transform.alpha), -nats / (
        x[0].size * np.log(2)
    ) + np.log2(levels)


def test_equalized_data_are_uniform_and_cost_the_entropy_of_their_histogram():
    images = (
        np.random.default_rng(0)
        .choice([0, 3, 200, 255], size=(50, 20, 20, 1), p=[0.7, 0.1, 0.15, 0.05])
        .astype(np.uint8)
    )
    frequencies = level_frequencies(images, 256)
    np.testing.assert_allclose(sum(frequencies), 1, rtol=0, atol=EXACT)
    np.testing.assert_allclose(
        frequencies[3], (np.sum(images == 3) + 1) / (images.size + 256), rtol=EXACT
    )
    x = dequantize(jax.random.key(0), jnp.asarray(images))
    u, bits = equalized(Equalize(frequencies, alpha=ALPHA), x)
    assert stats.kstest(u.ravel(), "uniform").pvalue > P_VALUE
    p = np.array([np.mean(images == k) for k in (0, 3, 200, 255)])
    entropy = -np.sum(p * np.log2(p))
    # smoothing by one count a level costs .02
    np.testing.assert_allclose(np.mean(bits), entropy, rtol=0, atol=0.05)
    assert np.mean(bits) > entropy


def images_with_a_background():
    """Images of level 2, on which entries are brighter or darker; and the shares of 2."""
    rng = np.random.default_rng(0)
    shares = np.array([[0.9, 0.5], [0.99, 0.2]])[:, :, None]
    ink = rng.choice(8, size=(4000, 2, 2, 1), p=[0.1, 0.2, 0, 0.1, 0.3, 0.1, 0.1, 0.1])
    return np.where(rng.uniform(size=ink.shape) < shares, 2, ink).astype(np.uint8), shares


def test_every_entry_is_equalized_by_its_own_share_of_the_background():
    images, true_shares = images_with_a_background()
    frequencies = level_frequencies(images, 8)
    shares = entry_shares(images, frequencies)
    np.testing.assert_allclose(shares, true_shares.ravel(), rtol=0, atol=0.03)
    np.testing.assert_allclose(
        shares, 0.99 * (images == 2).mean(axis=0).ravel() + 0.01 * frequencies[2], rtol=EXACT
    )
    x = dequantize(jax.random.key(0), jnp.asarray(images), 8)
    u, bits = equalized(Equalize(frequencies, shares, ALPHA), x)
    of_all, bits_of_all = equalized(Equalize(frequencies, alpha=ALPHA), x)
    for i, j in np.ndindex(2, 2):
        # the weight of all entries, and 4000 draws
        assert stats.kstest(u[:, i, j, 0], "uniform").statistic < 0.03
        assert stats.kstest(of_all[:, i, j, 0], "uniform").statistic > 0.1
    # It gains what the entry says about whether a pixel is background.
    p, p_of_all = true_shares.ravel(), true_shares.mean()
    entropy = -np.mean(p * np.log2(p) + (1 - p) * np.log2(1 - p))
    entropy_of_all = -(p_of_all * np.log2(p_of_all) + (1 - p_of_all) * np.log2(1 - p_of_all))
    np.testing.assert_allclose(
        np.mean(bits_of_all - bits), entropy_of_all - entropy, rtol=0, atol=0.02
    )


def mnist_like():
    """Mostly background, some white, little grey; corners that are never inked."""
    counts = np.concatenate([[800_000], np.full(252, 600), [3000, 9000, 7000]]).astype(float)
    frequencies = tuple(counts / counts.sum())
    return Equalize(frequencies, tuple(np.linspace(0.2, 0.99999, 49)), ALPHA)


@pytest.mark.parametrize(
    "transform",
    [mnist_like(), Equalize(mnist_like().frequencies, alpha=ALPHA)],
    ids=["entrywise", "all"],
)
def test_round_trips_in_float32_return_every_level(transform):
    """At the edges of every cell, at every entry: the least favourable noise there is."""
    smallest, largest = cells(256, np.dtype(np.float32))
    x = jnp.asarray(np.tile(np.concatenate([smallest, largest])[:, None], (1, 49)))
    y, _ = jax.jit(transform.map)(x)
    assert y.dtype == jnp.float32
    back, _ = jax.jit(transform.unmap)(y)
    np.testing.assert_array_equal(quantize(back), quantize(x))
    np.testing.assert_allclose(back, x, rtol=0, atol=1 / 256)
