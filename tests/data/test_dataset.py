"""The data set that training and evaluation see: images and toys behind one interface, and what they are known by."""

import gzip
import os
import shutil

import jax
import numpy as np
import pytest

from iresnet_jax import data
from iresnet_jax.data import toys
from iresnet_jax.data.dataset import DataSet

RNG = np.random.default_rng(0)
IMAGES = {"train": RNG.integers(0, 256, (12, 4, 3, 1), np.uint8), "test": RNG.integers(0, 256, (5, 4, 3, 1), np.uint8)}
LABELS = {"train": np.arange(12, dtype=np.int32) % 3, "test": np.arange(5, dtype=np.int32) % 3}


@pytest.fixture(autouse=True)
def _no_other_cache(monkeypatch):
    monkeypatch.delenv("IRESNET_JAX_CACHE_DIR", raising=False)


def make(images=IMAGES, labels=LABELS, num_levels=256, num_classes=3, name="x"):
    return DataSet.from_arrays(name, images, labels, num_levels=num_levels, num_classes=num_classes)


# Fingerprints -------------------------------------------------------------------------------------------------------------


def with_one_pixel_changed():
    images = {split: array.copy() for split, array in IMAGES.items()}
    images["test"][4, 3, 2, 0] ^= 1
    return make(images)


def with_one_label_changed():
    return make(labels={**LABELS, "train": np.where(np.arange(12) == 7, 2, LABELS["train"]).astype(np.int32)})


CHANGES = {
    "a pixel": with_one_pixel_changed,
    "a label": with_one_label_changed,
    "the order": lambda: make({**IMAGES, "train": IMAGES["train"][::-1]}),
    "the shape": lambda: make({split: array.reshape(-1, 3, 4, 1) for split, array in IMAGES.items()}),
    "the type": lambda: make({split: array.astype(np.int32) for split, array in IMAGES.items()}),
    "the splits": lambda: make({"train": IMAGES["train"], "validation": IMAGES["test"]}),
    "no labels": lambda: make(labels={}),
    "the levels": lambda: make(num_levels=257),
    "the classes": lambda: make(num_classes=4),
}


@pytest.mark.parametrize("change", CHANGES)
def test_other_content_has_another_fingerprint(change):
    assert CHANGES[change]().fingerprint != make().fingerprint


def test_equal_content_has_the_same_fingerprint_whatever_its_name_and_layout_in_memory():
    in_fortran_order = {split: np.asfortranarray(array) for split, array in IMAGES.items()}
    assert make(in_fortran_order, name="y").fingerprint == make().fingerprint
    assert make(dict(reversed(IMAGES.items()))).fingerprint == make().fingerprint


def test_fingerprints_are_pinned():
    """Runs carry them: if one of these changes, no run can be resumed."""
    assert data.load("digits").fingerprint == "84b4816d5cfd35a96837a6074ea70492b45f5b7772b7668ff067c90ba575c038"
    assert data.load("moons").fingerprint == "3d126f0fd0a487d2ffd1fac837b0271c44af2cb1e803c5c6e196576b2302e265"


def test_toys_have_different_fingerprints():
    assert len({data.load(name).fingerprint for name in toys.TOYS}) == len(toys.TOYS)


def write_idx(folder, images, labels, *, compress=False):
    folder.mkdir()
    for split, prefix in (("train", "train"), ("test", "t10k")):
        for kind, array in (("images", images[split][..., 0]), ("labels", labels[split].astype(np.uint8))):
            content = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes() + array.tobytes()
            path = folder / f"{prefix}-{kind}-idx{array.ndim}-ubyte{'.gz' if compress else ''}"
            path.write_bytes(gzip.compress(content) if compress else content)
    return f"idx:{folder}"


def test_fingerprint_of_files_is_that_of_their_content(tmp_path):
    first = data.load(write_idx(tmp_path / "a", IMAGES, LABELS))
    again = data.load(f"idx:{tmp_path}/a")  # from the cache
    in_memory = make(first.examples, first.labels)
    packed = data.load(write_idx(tmp_path / "b", IMAGES, LABELS, compress=True))
    np.savez(tmp_path / "c.npz", x_train=IMAGES["train"], y_train=LABELS["train"], x_test=IMAGES["test"], y_test=LABELS["test"])
    as_npz = data.load(f"npz:{tmp_path}/c.npz")
    assert len({found.fingerprint for found in (first, again, in_memory, packed, as_npz)}) == 1


def test_fingerprint_does_not_depend_on_place_or_time(tmp_path):
    first = data.load(write_idx(tmp_path / "a", IMAGES, LABELS))
    shutil.copytree(tmp_path / "a", tmp_path / "b", ignore=shutil.ignore_patterns("*decoded"))
    for path in (tmp_path / "b").iterdir():
        os.utime(path, (1e9, 1e9))
    assert data.load(f"idx:{tmp_path}/b").fingerprint == first.fingerprint


def test_pixels_changed_on_disk_change_the_fingerprint(tmp_path):
    name = write_idx(tmp_path / "a", IMAGES, LABELS)
    before = data.load(name).fingerprint
    path = tmp_path / "a" / "t10k-images-idx3-ubyte"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert data.load(name).fingerprint != before


# Examples -----------------------------------------------------------------------------------------------------------------


def test_held_out_examples_of_arrays_are_the_first_ones():
    dataset = make()
    np.testing.assert_array_equal(dataset.held_out("test", 3), IMAGES["test"][:3])
    np.testing.assert_array_equal(dataset.held_out("test"), IMAGES["test"])
    assert len(dataset.held_out("test", 100)) == 5
    assert (dataset.event_shape, dataset.draw, dataset.toy, dataset.entropy) == ((4, 3, 1), None, None, None)


def test_held_out_points_of_a_toy_belong_to_their_split_and_seed():
    toy = data.load("moons")
    points = toy.held_out("test", 7, seed=1)
    assert (points.shape, points.dtype, toy.num_levels, toy.num_classes) == ((7, 2), np.float32, None, None)
    np.testing.assert_array_equal(points, toy.held_out("test", 7, seed=1))
    for other in (toy.held_out("validation", 7, seed=1), toy.held_out("test", 7, seed=2)):
        assert not np.any(points == other)
    with pytest.raises(ValueError, match="moons has no end: say how many examples of 'test' to draw"):
        toy.held_out("test")


def test_a_toy_draws_one_example_for_each_key():
    toy = data.load("moons")
    keys = jax.random.split(jax.random.key(0), 5)
    points = jax.jit(jax.vmap(lambda key: toy.draw(key, None)[0]))(keys)
    assert len({tuple(point) for point in np.asarray(points).tolist()}) == 5
    assert toy.entropy == toys.get("moons").entropy


def test_random_training_examples_are_distinct_and_no_more_than_there_are():
    key = jax.random.key(0)
    drawn = np.asarray(make().random_train(key, 8)[0])
    assert len({image.tobytes() for image in drawn} & {image.tobytes() for image in IMAGES["train"]}) == 8
    assert len(make().random_train(key, 100)[0]) == 12
    assert data.load("moons").random_train(key, 7)[0].shape == (7, 2)


def test_unknown_names_and_formats_list_the_known_ones():
    known = r"the images digits, mnist, .*, the toys .*moons.*, the simulators .*, and own data as idx:PATH, "
    expected = r"unknown data set '{}': known are " + known
    for name in ("moon", "h5:/a/b", "../mnist", "", "mnist:", "/etc/passwd"):
        with pytest.raises(ValueError, match=expected.format(name)):
            data.load(name)
