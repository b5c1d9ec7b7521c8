"""The data set that training and evaluation see, and what it is known by."""

import numpy as np

from iresnet_jax import data
from iresnet_jax.data.dataset import DataSet, validation_mask
from iresnet_jax.data.toys import TOYS

RNG = np.random.default_rng(0)
IMAGES = {
    "train": RNG.integers(0, 256, (12, 4, 3, 1), np.uint8),
    "test": RNG.integers(0, 256, (5, 4, 3, 1), np.uint8),
}
LABELS = {"train": np.arange(12, dtype=np.int32) % 3, "test": np.arange(5, dtype=np.int32) % 3}


def make(images=IMAGES, labels=LABELS, num_levels=256, num_classes=3, name="x"):
    return DataSet(name, images, labels, num_levels=num_levels, num_classes=num_classes)


def test_other_content_has_another_fingerprint_and_equal_content_the_same():
    """Whatever its name, its order and its layout in memory."""
    pixel = (np.arange(60) == 59).reshape(5, 4, 3, 1)
    others = [
        make({**IMAGES, "test": IMAGES["test"] ^ pixel}),
        make({**IMAGES, "train": IMAGES["train"][::-1]}),
        make(labels={**LABELS, "train": LABELS["train"][::-1]}),
        make(labels={}),
    ]
    assert make().fingerprint not in {other.fingerprint for other in others}
    in_fortran_order = {split: np.asfortranarray(array) for split, array in IMAGES.items()}
    assert make(in_fortran_order, name="y").fingerprint == make().fingerprint
    assert make(dict(reversed(IMAGES.items()))).fingerprint == make().fingerprint


def test_fingerprints_are_pinned():
    """Runs carry them: if one of these changes, no run can be resumed."""
    assert (
        data.load("digits").fingerprint
        == "84b4816d5cfd35a96837a6074ea70492b45f5b7772b7668ff067c90ba575c038"
    )
    assert (
        data.load("moons").fingerprint
        == "3d126f0fd0a487d2ffd1fac837b0271c44af2cb1e803c5c6e196576b2302e265"
    )
    assert len({data.load(name).fingerprint for name in TOYS}) == len(TOYS)


def test_validation_takes_examples_from_the_whole_split_with_their_labels_and_contexts():
    """Files may be sorted: patches by the picture that they are of, rows by class."""
    rows = np.arange(12, dtype=np.float32)[:, None]
    dataset = DataSet(
        "x",
        {"train": rows, "validation": rows},
        {"train": rows[:, 0].astype(np.int32), "validation": rows[:, 0].astype(np.int32)},
        contexts={"train": rows, "validation": rows},
        num_levels=None,
        num_classes=12,
    )
    for num in (1, 5, 11, 12, 99, None):
        examples, labels, contexts = map(np.ravel, dataset.held_out("validation", num))
        assert len(examples) == len(set(examples)) == min(num or 12, 12)
        np.testing.assert_array_equal(examples, contexts)
        np.testing.assert_array_equal(examples, labels)
    halves = dataset.held_out("validation", 6).x >= 6
    assert 0 < halves.sum() < 6


def test_held_out_examples_of_endless_data_belong_to_their_split_and_seed():
    dataset = data.load("moons")
    assert (dataset.is_endless, dataset.entropy, dataset.context_dim) == (
        True,
        TOYS["moons"].entropy,
        0,
    )

    def drawn(split, seed):
        return dataset.held_out(split, 7, seed=seed).x

    found = drawn("test", 1)
    assert (found.shape, found.dtype) == ((7, 2), np.float32)
    np.testing.assert_array_equal(found, drawn("test", 1))
    for other in (drawn("validation", 1), drawn("test", 2)):
        assert not np.any(found == other)


def test_validation_split_is_pinned():
    """Reported numbers belong to this very split: if one of these changes, they are void."""
    assert np.flatnonzero(validation_mask(30)).tolist() == [8, 20, 23]
    assert [validation_mask(n).sum() for n in (2, 19, 20, 1000, 50_000, 60_000)] == [
        1,
        1,
        2,
        100,
        5000,
        5000,
    ]
    assert np.flatnonzero(validation_mask(60_000))[:4].tolist() == [8, 20, 23, 31]
