"""Arrays in memory as data sets: kinds, splits, cells, and what has no density."""

import numpy as np
import pytest

from iresnet_jax import data
from iresnet_jax.data.arrays import Arrays, from_arrays
from iresnet_jax.data.dataset import fraction_masks

RNG = np.random.default_rng(0)
VECTORS = RNG.normal(size=(200, 3))
IMAGES = RNG.integers(0, 17, (40, 4, 4, 1))


def made(x, **options):
    return from_arrays("mine", Arrays(x), **options)


def test_vectors_of_floats_are_continuous_and_split_by_fraction():
    found = made(VECTORS, fractions=(0.1, 0.2))
    assert {split: len(rows) for split, rows in found.examples.items()} == {
        "train": 140,
        "validation": 20,
        "test": 40,
    }
    assert (
        found.event_shape,
        found.num_levels,
        found.num_classes,
        found.marginals,
        found.context_dim,
    ) == ((3,), *[None] * 3, 0)
    together = np.concatenate(list(found.examples.values()))
    np.testing.assert_array_equal(
        np.sort(together, axis=0), np.sort(VECTORS.astype(np.float32), axis=0)
    )


def test_integer_images_are_levels_and_labels_and_contexts_go_with_their_examples():
    found = from_arrays(
        "mine", Arrays(IMAGES, IMAGES[:, 0, 0, 0] % 3, IMAGES[:, 0, 1, 0].astype(float))
    )
    assert (found.num_classes, found.context_dim) == (3, 1)
    for split, examples in found.examples.items():
        assert examples.dtype == np.uint8
        np.testing.assert_array_equal(found.labels[split], examples[:, 0, 0, 0] % 3)
        np.testing.assert_array_equal(found.contexts[split][:, 0], examples[:, 0, 1, 0])
    np.testing.assert_array_equal(found.held_out("test", 2).context, found.contexts["test"][:2])


@pytest.mark.parametrize(
    ("images", "levels"),
    [(IMAGES, 17), (IMAGES * 12, 256), (IMAGES > 8, 2), (RNG.random((40, 4, 4, 1)), None)],
)
def test_the_number_of_levels(images, levels):
    assert made(images).num_levels == levels


def test_labels_become_contexts():
    found = from_arrays("mine", Arrays(VECTORS, np.arange(200) % 3))
    conditioned = data.conditioned_on_labels(found)
    np.testing.assert_array_equal(
        conditioned.contexts["train"].argmax(axis=1), found.labels["train"]
    )
    assert conditioned.context_dim == 3


def test_images_are_padded_with_zeros_and_their_channels_copied():
    found = data.padded(made(IMAGES), padding=2, copies=3)
    images = found.examples["train"]
    assert found.event_shape == (IMAGES.shape[1] + 4, IMAGES.shape[2] + 4, 3)
    for copy in range(3):
        own = images[..., copy : copy + 1]
        np.testing.assert_array_equal(own[:, 2:-2, 2:-2], made(IMAGES).examples["train"])
        assert not own[:, :2].any()
        assert not own[:, :, -2:].any()


def test_cells_are_those_of_all_rows_of_one_array():
    even = 2.0 * RNG.integers(0, 9, 200)
    # alone, in a row that is held out
    even[np.flatnonzero(fraction_masks(200, (0.1, 0.1))["test"])[0]] = 3
    assert (
        made(np.stack([VECTORS[:, 0], even], axis=1), fractions=(0.1, 0.1)).marginals.spacing[1]
        == 1
    )
