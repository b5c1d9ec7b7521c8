"""The maps that move entries are exact inverses in one documented order."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from iresnet_jax.bijections import reshape

# Entries are moved, not computed: every comparison of values is exact. Only the norm in
# padding_residual rounds.
NORM_RTOL = 1e-6


def squeeze_oracle(x, factor):
    """The index formula of the docstring, entry by entry."""
    b, h, w, c = x.shape
    y = np.full((b, h // factor, w // factor, c * factor**2), np.nan)
    for i, j in itertools.product(range(h // factor), range(w // factor)):
        for di, dj, k in itertools.product(range(factor), range(factor), range(c)):
            y[:, i, j, (di * factor + dj) * c + k] = x[:, i * factor + di, j * factor + dj, k]
    return y


def numbered(shape):
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


@pytest.mark.parametrize(
    ("shape", "factor"), [((1, 1, 1, 1), 1), ((2, 6, 4, 3), 2), ((3, 3, 9, 2), 3)]
)
def test_squeeze_follows_its_formula_and_unsqueeze_inverts_it(shape, factor):
    x = numbered(shape)
    y = reshape.squeeze(jnp.asarray(x), factor)
    np.testing.assert_array_equal(y, squeeze_oracle(x, factor))
    np.testing.assert_array_equal(reshape.unsqueeze(y, factor), x)


def test_padding_residual_is_the_distance_to_the_nearest_padded_array():
    y = np.random.default_rng(0).normal(size=(4, 3, 2, 5)).astype(np.float32)
    y[1, ..., 3:] = 0
    distance = np.linalg.norm(y[..., 3:].reshape(4, -1), axis=1)
    assert distance[1] == 0 < distance[0]
    np.testing.assert_allclose(
        reshape.padding_residual(jnp.asarray(y), 2), distance, rtol=NORM_RTOL
    )
    gradient = jax.grad(lambda y: jnp.sum(reshape.padding_residual(y, 2)))(jnp.asarray(y))
    np.testing.assert_array_equal(gradient[1], 0)
    np.testing.assert_allclose(np.linalg.norm(gradient[0]), 1, rtol=NORM_RTOL)


@pytest.mark.parametrize("event_shape", [(4, 4, 3), (7,), ()])
def test_flatten_is_row_major_and_unflatten_inverts_it(event_shape):
    x = numbered((3, *event_shape))
    z = reshape.flatten(jnp.asarray(x))
    np.testing.assert_array_equal(z, x.reshape(3, -1))
    np.testing.assert_array_equal(reshape.unflatten(z, event_shape), x)
