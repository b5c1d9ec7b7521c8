"""The cache of decoded images: what it holds, interruption, and several writers at once."""

import os
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from iresnet_jax.data.images import Contents, decoded

IMAGES = np.random.default_rng(0).integers(0, 256, (50, 6, 5, 3), np.uint8)
LABELS = np.arange(50) % 4
NUM_TEST = 10
HELD = {"train": slice(NUM_TEST, None), "test": slice(NUM_TEST)}


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """The user's cache folder, not there yet."""
    monkeypatch.setenv("IRESNET_JAX_CACHE_DIR", str(tmp_path / "home" / "caches"))
    return tmp_path / "home" / "caches"


@pytest.fixture
def load(tmp_path):
    """The images of a source that notes when it is decoded."""
    (tmp_path / "images").write_text("a file")

    def load(decodings=None, *, images=IMAGES, labels=LABELS, after_each=lambda: None):
        def read(split):
            if decodings is not None:
                decodings.append(split)
            for number, (image, label) in enumerate(
                zip(images[HELD[split]], labels[HELD[split]], strict=True)
            ):
                yield f"image {number}", image, int(label)
                after_each()

        contents = Contents({"train": 50 - NUM_TEST, "test": NUM_TEST}, 4, read)
        return decoded("x", tmp_path, [tmp_path / "images"], lambda: contents)

    return load


def assert_same(first, second):
    assert first.fingerprint == second.fingerprint
    for kind in ("examples", "labels"):
        for split, rows in getattr(first, kind).items():
            np.testing.assert_array_equal(getattr(second, kind)[split], rows)


def caches(home):
    return [path for path in home.iterdir() if path.is_dir()]


def test_the_second_time_is_mapped_and_not_decoded(load, home, tmp_path):
    decodings = []
    first, second = load(decodings), load(decodings)
    assert decodings == ["train", "test"]
    assert_same(first, second)
    np.testing.assert_array_equal(second.labels["test"], LABELS[:NUM_TEST])
    assert [len(second.examples[split]) for split in ("train", "validation")] == [36, 4]
    assert (second.num_classes, second.num_levels, second.event_shape) == (4, 256, (6, 5, 3))
    with pytest.raises(ValueError, match="read-only"):
        second.examples["train"][0] = 0
    [made] = caches(home)
    # read without the library
    np.testing.assert_array_equal(np.load(made / "test.npy"), IMAGES[:NUM_TEST])
    os.utime(tmp_path / "images", (1e9, 1e9))
    load(decodings)
    assert decodings == ["train", "test"] * 2


def test_writers_that_start_at_once_agree(load):
    decodings = []
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(
            lambda _: load(decodings, after_each=lambda: time.sleep(0.002)), range(2)
        )
    assert_same(first, second)
    assert decodings == ["train", "test"]
