"""The 8x8 digits: their content and the split that reported numbers belong to."""

import hashlib

import numpy as np
import pytest
from sklearn.datasets import load_digits

from iresnet_jax import data
from iresnet_jax.data.sources import digits

SPLITS = ("train", "validation", "test")
PIXELS, CLASSES = load_digits(return_X_y=True)


@pytest.fixture(params=["file", "scikit-learn"])
def dataset(request, monkeypatch):
    if request.param == "scikit-learn":
        monkeypatch.setattr(digits, "find_spec", lambda _: None)  # the table is kept elsewhere
    return data.load("digits")


def test_digits_keep_their_labels_and_lose_no_image(dataset):
    assert (dataset.num_levels, dataset.num_classes, dataset.event_shape) == (17, 10, (8, 8, 1))
    assert [len(dataset.examples[split]) for split in SPLITS] == [1257, 180, 360]
    images, labels = (np.concatenate([found[split] for split in SPLITS]) for found in (dataset.examples, dataset.labels))
    assert (images.dtype, labels.dtype) == (np.uint8, np.int32)
    places = np.concatenate(list(digits.split_indices(CLASSES).values()))
    np.testing.assert_array_equal(images.reshape(-1, 64), PIXELS[places])
    np.testing.assert_array_equal(labels, CLASSES[places])


def test_split_is_stratified_disjoint_and_pinned():
    """Reported numbers belong to this very split: if the checksum changes, they are void."""
    splits = digits.split_indices(CLASSES)
    np.testing.assert_array_equal(np.sort(np.concatenate(list(splits.values()))), np.arange(1797))
    for split, share in zip(SPLITS, (0.7, 0.1, 0.2), strict=True):
        assert np.all(np.abs(np.bincount(CLASSES[splits[split]]) - share * np.bincount(CLASSES)) < 2)
    text = ";".join(",".join(map(str, splits[split])) for split in SPLITS)
    assert hashlib.sha256(text.encode()).hexdigest() == "09a06fde5fa3dcec27f9c7b1527dd6c48812d3508dc392a3b03ed59dca8a5da9"
