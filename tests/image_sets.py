"""Random image data sets for the tests of readers, and what a reader has to make of them."""

import numpy as np

from iresnet_jax.data import splits

NUM_TRAIN, NUM_TEST = 30, 7


def examples(num, shape, seed=0, num_classes=10):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, num_classes, num).astype(np.uint8)
    labels[:2] = 0, num_classes - 1  # so that the number of classes can be told
    return rng.integers(0, 256, (num, *shape), np.uint8), labels


def assert_holds(loaded, train, test):
    """The published examples, each in its split and with its label, in order."""
    held_out = splits.validation_mask(len(train[0]))
    expected = {"train": (train, ~held_out), "validation": (train, held_out), "test": (test, slice(None))}
    assert set(loaded.examples) == set(expected)
    for split, ((images, labels), rows) in expected.items():
        np.testing.assert_array_equal(loaded.examples[split], images[rows])
        assert loaded.examples[split].dtype == np.uint8
        if labels is None:
            assert loaded.labels == {}
        else:
            np.testing.assert_array_equal(loaded.labels[split], labels[rows])
            assert loaded.labels[split].dtype == np.int32
    assert loaded.num_levels == 256
