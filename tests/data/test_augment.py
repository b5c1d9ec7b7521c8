"""Crops and flips of training images."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from iresnet_jax.data import augment

CROP_AND_FLIP = jax.jit(augment.crop_and_flip, static_argnames="padding")
CROP = jax.jit(augment.random_crop, static_argnames="padding")
NUM = 4000
KEYS = jax.random.split(jax.random.key(0), NUM)


def test_crops_are_all_windows_of_the_symmetric_padding_equally_often():
    image = np.arange(5 * 4 * 2, dtype=np.uint8).reshape(5, 4, 2)
    padded = np.pad(image, ((2, 2), (2, 2), (0, 0)), mode="symmetric")
    windows = {padded[y : y + 5, x : x + 4].tobytes(): (y, x) for y in range(5) for x in range(5)}
    assert len(windows) == 25
    crops = np.asarray(CROP(KEYS, jnp.broadcast_to(image, (NUM, 5, 4, 2)), padding=2))
    assert crops.dtype == np.uint8
    drawn = [windows[crop.tobytes()] for crop in crops]  # a KeyError: not a window of it
    counts = np.array([drawn.count(window) for window in windows.values()])
    assert np.all(np.abs(counts - NUM / 25) < 5 * np.sqrt(NUM / 25))


def test_shifts_and_flips_of_an_example_are_independent_of_each_other_and_of_its_batch():
    row = jnp.broadcast_to(jnp.arange(8)[None, None, :, None], (NUM, 9, 8, 1))
    column = jnp.broadcast_to(jnp.arange(9)[None, :, None, None], (NUM, 9, 8, 1))
    images = jnp.concatenate([column, row], axis=-1)
    result = np.asarray(CROP_AND_FLIP(KEYS, images, padding=1))
    down, across = result[:, 4, 4, 0] - 4, result[:, 4, :, 1]
    mirrored = across[:, 3] > across[:, 4]
    right = np.where(mirrored, across[:, 3], across[:, 4]) - 4
    states = np.unique(np.stack([down, right, mirrored]), axis=1, return_counts=True)[1]
    assert len(states) == 3 * 3 * 2
    assert np.all(np.abs(states - NUM / 18) < 5 * np.sqrt(NUM / 18))
    np.testing.assert_array_equal(CROP_AND_FLIP(KEYS[20:23], images[20:23], padding=1), result[20:23])
    np.testing.assert_array_equal(CROP(KEYS[:5], images[:5], padding=0), images[:5])


@pytest.mark.parametrize("padding", [-1, 4])
def test_impossible_padding_is_refused(padding):
    with pytest.raises(ValueError, match=rf"padding must lie in \[0, 3\] for 4x3 images, got {padding}"):
        augment.random_crop(KEYS[:2], jnp.zeros((2, 4, 3, 1)), padding=padding)
