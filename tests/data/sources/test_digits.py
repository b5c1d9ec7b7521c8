"""The 8x8 digits: their content and the split that reported numbers belong to."""

import hashlib

import numpy as np
import pytest

from iresnet_jax import data
from iresnet_jax.data.sources import digits

SPLITS = ("train", "validation", "test")


@pytest.fixture(scope="module")
def dataset():
    return data.load("digits")


def test_digits_have_the_documented_shapes_and_levels(dataset):
    assert (dataset.name, dataset.num_levels, dataset.num_classes) == ("digits", 17, 10)
    assert dataset.event_shape == (8, 8, 1)
    assert {split: len(dataset.examples[split]) for split in SPLITS} == {"train": 1257, "validation": 180, "test": 360}
    for split in SPLITS:
        assert dataset.examples[split].shape == (len(dataset.labels[split]), 8, 8, 1)
        assert dataset.examples[split].dtype == np.uint8
        assert dataset.labels[split].dtype == np.int32
    every_pixel = np.concatenate([dataset.examples[split].ravel() for split in SPLITS])
    assert set(np.unique(every_pixel)) == set(range(17))


def test_digits_keep_their_labels_and_lose_no_image(dataset):
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    expected = sorted((int(y), x.astype(np.uint8).tobytes()) for x, y in zip(pixels, labels, strict=True))
    found = sorted((int(y), x.tobytes()) for s in SPLITS for x, y in zip(dataset.examples[s], dataset.labels[s], strict=True))
    assert found == expected


def test_a_table_that_is_kept_elsewhere_is_found_by_scikit_learn(dataset, monkeypatch):
    monkeypatch.setattr(digits, "find_spec", lambda _: None)
    elsewhere = digits.load()
    for split in SPLITS:
        np.testing.assert_array_equal(elsewhere.examples[split], dataset.examples[split])
        np.testing.assert_array_equal(elsewhere.labels[split], dataset.labels[split])


def test_split_is_stratified(dataset):
    per_class = {split: np.bincount(dataset.labels[split], minlength=10) for split in SPLITS}
    total = sum(per_class.values())
    for split, share in (("train", 0.7), ("validation", 0.1), ("test", 0.2)):
        assert np.all(np.abs(per_class[split] - share * total) < 2)


def test_split_is_disjoint_and_pinned():
    """Reported numbers belong to this very split: if the checksum changes, they are void."""
    from sklearn.datasets import load_digits

    splits = digits.split_indices(load_digits(return_X_y=True)[1])
    assert np.array_equal(np.sort(np.concatenate(list(splits.values()))), np.arange(1797))
    text = ";".join(",".join(map(str, splits[split])) for split in SPLITS)
    assert hashlib.sha256(text.encode()).hexdigest() == "09a06fde5fa3dcec27f9c7b1527dd6c48812d3508dc392a3b03ed59dca8a5da9"
