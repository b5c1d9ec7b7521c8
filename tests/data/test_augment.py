"""Crops, flips and transformations of training images."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

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
    np.testing.assert_array_equal(
        CROP_AND_FLIP(KEYS[20:23], images[20:23], padding=1), result[20:23]
    )
    np.testing.assert_array_equal(CROP(KEYS[:5], images[:5], padding=0), images[:5])


def test_transformations_come_with_the_contexts_that_name_them():
    image = np.arange(1, 5 * 5 * 2 + 1, dtype=np.uint8).reshape(5, 5, 2)
    pad = np.pad(image, ((1, 1), (1, 1), (0, 0)))
    expected = {
        "left": pad[1:6, 2:],
        "up": pad[2:, 1:6],
        "transpose": np.transpose(image, (1, 0, 2)),
        "right": pad[1:6, :5],
        "down": pad[:5, 1:6],
        "turn": np.rot90(image, 2),
        "mirror": np.fliplr(image),
        "upside_down": np.flipud(image),
    }
    assert set(expected) == set(augment.TRANSFORMATIONS)
    transform = jax.jit(functools.partial(augment.transformed, names=tuple(expected)))
    images, contexts = map(
        np.asarray, transform(KEYS, jnp.broadcast_to(image, (NUM, *image.shape)))
    )
    assert images.dtype == np.uint8
    kinds = np.where(contexts.any(axis=1), contexts.argmax(axis=1) + 1, 0)
    np.testing.assert_array_equal(contexts, np.eye(9)[kinds][:, 1:])
    np.testing.assert_array_equal(images, np.stack([image, *expected.values()])[kinds])
    shares = np.array([1 / 2] + 8 * [1 / 16])
    assert np.all(
        np.abs(np.bincount(kinds, minlength=9) - NUM * shares) < 5 * np.sqrt(NUM * shares)
    )
