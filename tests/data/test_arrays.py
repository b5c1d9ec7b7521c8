"""Arrays in memory as data sets: kinds, splits, grids, and what has no density."""

import numpy as np
import pytest

from iresnet_jax import data
from iresnet_jax.data.arrays import Arrays, find_grid, from_arrays
from iresnet_jax.data.splits import fraction_masks

RNG = np.random.default_rng(0)
VECTORS = RNG.normal(size=(200, 3))


def made(x, **options):
    return from_arrays("mine", Arrays(x), **options)


def test_vectors_of_floats_are_continuous_and_split_by_fraction():
    found = made(VECTORS, fractions=(0.1, 0.2))
    assert {split: len(rows) for split, rows in found.examples.items()} == {"train": 140, "validation": 20, "test": 40}
    assert (found.event_shape, found.num_levels, found.num_classes, found.grid, found.context_dim) == (
        (3,),
        None,
        None,
        None,
        0,
    )
    together = np.concatenate([found.examples[split] for split in ("train", "validation", "test")])
    np.testing.assert_array_equal(np.sort(together, axis=0), np.sort(VECTORS.astype(np.float32), axis=0))
    assert found.fingerprint == made(VECTORS, fractions=(0.1, 0.2)).fingerprint
    assert found.fingerprint != made(VECTORS + 1e-3, fractions=(0.1, 0.2)).fingerprint


def test_the_split_depends_on_the_number_alone_and_its_parts_are_disjoint():
    masks = fraction_masks(50, (0.1, 0.1))
    assert sum(mask.astype(int) for mask in masks.values()).tolist() == [1] * 50
    assert list(fraction_masks(50, (0.1, 0.0))) == ["train", "validation"]
    np.testing.assert_array_equal(masks["test"], fraction_masks(50, (0.2, 0.1))["test"])
    with pytest.raises(ValueError, match="too few"):
        fraction_masks(3, (0.1, 0.1))
    with pytest.raises(ValueError, match="shares"):
        fraction_masks(30, (0.6, 0.5))


def test_integer_images_are_levels_and_labels_and_contexts_go_with_their_examples():
    images = RNG.integers(0, 17, (40, 4, 4, 1))
    labels = images[:, 0, 0, 0] % 3
    context = images[:, 0, 1, 0].astype(float)
    found = from_arrays("mine", Arrays(images, labels, context))
    assert (found.num_levels, found.num_classes, found.context_dim) == (17, 3, 1)
    for split, examples in found.examples.items():
        assert examples.dtype == np.uint8
        np.testing.assert_array_equal(found.labels[split], examples[:, 0, 0, 0] % 3)
        np.testing.assert_array_equal(found.contexts[split][:, 0], examples[:, 0, 1, 0])
    assert made(RNG.integers(0, 200, (40, 4, 4, 1))).num_levels == 256
    assert made(RNG.random((40, 4, 4, 1)) > 0.5).num_levels == 2
    assert made(images, num_levels=32).num_levels == 32
    np.testing.assert_array_equal(found.held_out_contexts("test", 2), found.contexts["test"][:2])


def test_labels_become_contexts():
    found = from_arrays("mine", Arrays(VECTORS, np.arange(200) % 3))
    conditioned = data.conditioned_on_labels(found)
    np.testing.assert_array_equal(conditioned.contexts["train"].argmax(axis=1), found.labels["train"])
    assert conditioned.context_dim == 3
    with pytest.raises(ValueError, match="no labels"):
        data.conditioned_on_labels(made(VECTORS))


def test_entries_of_few_values_lie_on_a_grid():
    x = np.stack([RNG.normal(size=600), RNG.integers(20, 60, 600), 0.05 * RNG.integers(0, 9, 600) - 1], axis=1)
    grid = find_grid(x.astype(np.float32))
    np.testing.assert_allclose(grid.spacing, [0, 1, 0.05], rtol=1e-4)
    np.testing.assert_allclose(grid.offset, [0, 20, -1], rtol=1e-4)
    assert find_grid(VECTORS) is None
    assert find_grid(RNG.integers(0, 9, (50, 2)).astype(float)).spacing == (1.0, 1.0)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (np.stack([VECTORS[:, 0], np.full(200, 3.0)], axis=1), "column 1 is constant"),
        (np.stack([VECTORS[:, 0], np.sqrt(RNG.integers(1, 9, 200))], axis=1), "column 1 is made of few values"),
        (np.stack([VECTORS[:, 0], 1e6 + RNG.normal(size=200)], axis=1), "column 1 is too far from 0"),
        (np.where(np.arange(600).reshape(200, 3) == 7, np.nan, VECTORS), "row 2, column 1"),
        (np.where(np.arange(600).reshape(200, 3) == 7, np.inf, VECTORS), "missing or infinite"),
        (VECTORS[:, 0], r"got shape \(200,\)"),
        (RNG.random((20, 4, 4)), "add a channel axis"),
        (np.array([["a", "b"], ["c", "d"]]), "must be numbers"),
        (RNG.integers(0, 1000, (20, 4, 4, 1)), "levels 0 to 255"),
        (np.zeros((0, 3)), "got shape"),
        (np.zeros((40, 4, 4, 1)), "channel 0 of the images is constant"),
        (np.where(RNG.random((40, 4, 4, 1)) > 0.5, RNG.random((40, 4, 4, 1)), 0), "grow without bound"),
        (RNG.integers(0, 9, (100, 4, 4, 1)) / 8, "as integers"),
    ],
)
def test_what_has_no_density_is_refused_by_name(x, message):
    with pytest.raises(ValueError, match=message):
        made(x)


def test_columns_are_called_by_their_names():
    with pytest.raises(ValueError, match="column 1 \\('age'\\)"):
        made(np.stack([VECTORS[:, 0], np.full(200, 3.0)], axis=1), column_names=["height", "age"])


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (Arrays(VECTORS, np.zeros(3, int)), "labels must be 200 integers"),
        (Arrays(VECTORS, np.full(200, 0.5)), "np.unique"),
        (Arrays(VECTORS, np.full(200, -1)), "from 0 on"),
        (Arrays(VECTORS, context=np.zeros((3, 2))), "a vector for each of 200"),
        (Arrays(VECTORS, context=np.full((200, 2), np.nan)), "the context"),
        ({"test": Arrays(VECTORS)}, "no training examples"),
        ({"train": Arrays(VECTORS), "test": Arrays(VECTORS[:, :2])}, "one shape"),
        ({"train": Arrays(VECTORS, np.zeros(200, int)), "test": Arrays(VECTORS)}, "or none of them"),
    ],
)
def test_arrays_that_do_not_fit_together_are_refused(arrays, message):
    with pytest.raises(ValueError, match=message):
        from_arrays("mine", arrays)
