"""Histogram equalisation: what it makes of data, what that costs, and mistakes; its log-determinants are in test_likelihood."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from iresnet_jax.bijections import equalize as histogram
from iresnet_jax.bijections import likelihood
from iresnet_jax.models import density
from iresnet_jax.models import flow as model

EXACT = 1e-12
P_VALUE = 1e-3


def test_equalized_data_are_uniform_and_cost_the_entropy_of_their_histogram():
    images = np.random.default_rng(0).choice([0, 3, 200, 255], size=(50, 20, 20, 1), p=[0.7, 0.1, 0.15, 0.05]).astype(np.uint8)
    frequencies = histogram.level_frequencies(images)
    np.testing.assert_allclose(sum(frequencies), 1, rtol=0, atol=EXACT)
    np.testing.assert_allclose(frequencies[3], (np.sum(images == 3) + 1) / (images.size + 256), rtol=EXACT)
    x = likelihood.dequantize(jax.random.key(0), jnp.asarray(images))
    u, logdet = histogram.equalize_forward_and_logdet(x, frequencies)
    assert stats.kstest(np.asarray(u).ravel(), "uniform").pvalue > P_VALUE
    bits = likelihood.bits_per_dim(logdet, 400)
    p = np.array([np.mean(images == k) for k in (0, 3, 200, 255)])
    entropy = -np.sum(p * np.log2(p))
    np.testing.assert_allclose(np.mean(bits), entropy, rtol=0, atol=0.05)  # smoothing by one count a level costs .02
    assert np.mean(bits) > entropy
    back, _ = histogram.equalize_inverse_and_logdet(u, frequencies)
    np.testing.assert_array_equal(likelihood.quantize(back), images)


def test_a_density_has_a_share_for_each_entry():
    flow = model.FlowSpec((4, 4, 1), (model.StageSpec(1, (4,), kernel_sizes=(3, 3)),))
    with pytest.raises(ValueError, match=r"a share for each entry of \(4, 4, 1\), got 2"):
        density.DensitySpec(flow, transform="equalize", num_levels=2, frequencies=(0.5, 0.5), shares=(0.5, 0.5))


def images_with_a_background():
    """Images of level 2, on which entries are brighter or darker with probabilities of their own; and those of level 2."""
    rng = np.random.default_rng(0)
    shares = np.array([[0.9, 0.5], [0.99, 0.2]])[:, :, None]
    ink = rng.choice(8, size=(4000, 2, 2, 1), p=[0.1, 0.2, 0, 0.1, 0.3, 0.1, 0.1, 0.1])
    return np.where(rng.uniform(size=ink.shape) < shares, 2, ink).astype(np.uint8), shares


def test_every_entry_is_equalized_by_its_own_share_of_the_background():
    images, true_shares = images_with_a_background()
    frequencies = histogram.level_frequencies(images, 8)
    shares = histogram.entry_shares(images, frequencies)
    np.testing.assert_allclose(shares, true_shares, rtol=0, atol=0.03)
    np.testing.assert_allclose(shares, 0.99 * (images == 2).mean(axis=0) + 0.01 * frequencies[2], rtol=EXACT)
    x = likelihood.dequantize(jax.random.key(0), jnp.asarray(images), 8)
    u, logdet = histogram.equalize_forward_and_logdet(x, frequencies, shares)
    assert np.all((u >= 0) & (u < 1))
    of_all, logdet_of_all = histogram.equalize_forward_and_logdet(x, frequencies)
    for i, j in np.ndindex(2, 2):
        uniform = stats.kstest(np.asarray(u)[:, i, j, 0], "uniform")
        assert uniform.statistic < 0.03  # the weight of all entries, and 4000 draws
        assert stats.kstest(np.asarray(of_all)[:, i, j, 0], "uniform").statistic > 0.1
    # What it gains is what the entry says about whether a pixel is background.
    p, p_of_all = true_shares.ravel(), true_shares.mean()
    entropy = -np.mean(p * np.log2(p) + (1 - p) * np.log2(1 - p))
    entropy_of_all = -(p_of_all * np.log2(p_of_all) + (1 - p_of_all) * np.log2(1 - p_of_all))
    gain = np.mean(likelihood.bits_per_dim(logdet_of_all, 4, 8) - likelihood.bits_per_dim(logdet, 4, 8))
    np.testing.assert_allclose(gain, entropy_of_all - entropy, rtol=0, atol=0.02)


def test_rare_ink_survives_single_precision():
    """Where one image in thousands has ink, all its levels share a thousandth of the interval."""
    frequencies = histogram.level_frequencies(np.repeat(np.arange(256, dtype=np.uint8), [25345, *[1] * 255]))
    shares = np.full((255, 1, 1), 0.999)
    images = np.arange(1, 256, dtype=np.uint8)[None, :, None, None]
    x = likelihood.dequantize(jax.random.key(0), jnp.asarray(images))
    u, _ = histogram.equalize_forward_and_logdet(x, frequencies, shares)
    assert u.dtype == jnp.float32
    back, _ = histogram.equalize_inverse_and_logdet(u, frequencies, shares)
    np.testing.assert_array_equal(likelihood.quantize(back), images)


def test_its_slopes_are_those_of_the_map():
    frequencies, shares = (0.15, 0.5, 0.1, 0.25), np.array([[0.999, 0.3], [0.5, 0.01]])[:, :, None]
    for own in (None, shares):
        x = jnp.broadcast_to(jnp.array([0.1, 0.4, 0.6, 0.9]).reshape(4, 1, 1, 1), (4, 2, 2, 1))
        slope = jax.grad(lambda x, own=own: jnp.sum(histogram.equalize_forward_and_logdet(x, frequencies, own)[0]))(x)
        everywhere = np.unique(np.asarray(histogram.all_slopes(frequencies, own), np.float32))
        np.testing.assert_allclose(np.unique(np.round(slope, 6)), np.unique(np.round(everywhere, 6)), rtol=1e-5)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: histogram.level_frequencies(np.array([0, 7]), 4), "below num_levels=4, got 7"),
        (lambda: histogram.equalize_forward_and_logdet(jnp.zeros((1, 2)), (0.5, 0.4)), "add up to 1, got 2 with the sum 0.9"),
        (lambda: histogram.equalize_inverse_and_logdet(jnp.zeros((1, 2)), (0.0, 1.0)), "must be positive"),
        (
            lambda: histogram.equalize_forward_and_logdet(jnp.zeros((1, 2)), (0.5, 0.5), np.array([0.5])),
            r"one for each entry of \(2,\), got \(1,\)",
        ),
        (
            lambda: histogram.equalize_inverse_and_logdet(jnp.zeros((1, 1)), (0.5, 0.5), np.array([1.0])),
            r"must lie in \(0, 1\)",
        ),
    ],
)
def test_caller_mistakes(call, match):
    with pytest.raises(ValueError, match=match):
        call()
