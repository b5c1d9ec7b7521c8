"""Random image data sets for the tests of readers, files that hold them, and what a reader has to make of them."""

import gzip
import struct

import numpy as np

from iresnet_jax.data import splits

NUM_TRAIN, NUM_TEST = 30, 7


def examples(num, shape, seed=0, num_classes=10):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, num_classes, num).astype(np.uint8)
    labels[:2] = 0, num_classes - 1  # so that the number of classes can be told
    return rng.integers(0, 256, (num, *shape), np.uint8), labels


def idx_bytes(array, kind=8):
    return bytes([0, 0, kind, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_idx(folder, train, test, *, suffix="", separator="-"):
    """Images and labels as the files of MNIST are called."""
    folder.mkdir(parents=True, exist_ok=True)
    for prefix, (images, labels) in (("train", train), ("t10k", test)):
        for kind, array in (("images", images), ("labels", labels)):
            path = folder / f"{prefix}-{kind}{separator}idx{array.ndim}-ubyte{suffix}"
            path.write_bytes(gzip.compress(idx_bytes(array)) if suffix == ".gz" else idx_bytes(array))
    return folder


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
