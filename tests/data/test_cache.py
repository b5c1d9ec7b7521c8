"""The cache of decoded images: where it lies, what it holds, interruption, damage, and several writers at once."""

import errno
import os
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from iresnet_jax.data.cache import Contents, decoded

IMAGES = np.random.default_rng(0).integers(0, 256, (50, 6, 5, 3), np.uint8)
LABELS = np.arange(50) % 4
NUM_TEST = 10
HELD = {"train": slice(NUM_TEST, None), "test": slice(NUM_TEST)}


@pytest.fixture(autouse=True)
def home(tmp_path_factory, monkeypatch):
    """A user's cache folder of its own, not there yet."""
    folder = tmp_path_factory.mktemp("home") / "caches"
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    monkeypatch.delenv("IRESNET_JAX_CACHE_DIR", raising=False)
    return folder / "iresnet_jax"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").write_text("a file")
    return tmp_path


def load(folder, decodings=None, *, images=IMAGES, labels=LABELS, after_each=lambda: None):
    """The images of a source that notes when it is decoded."""

    def read(split):
        if decodings is not None:
            decodings.append(split)
        for number, (image, label) in enumerate(zip(images[HELD[split]], labels[HELD[split]], strict=True)):
            yield f"image {number}", image, int(label)
            after_each()

    contents = Contents({"train": 50 - NUM_TEST, "test": NUM_TEST}, 4, read)
    return decoded("x", folder, [folder / "images"], lambda: contents)


def assert_same(first, second):
    assert first.fingerprint == second.fingerprint
    for kind in ("examples", "labels"):
        for split, rows in getattr(first, kind).items():
            np.testing.assert_array_equal(getattr(second, kind)[split], rows)


def caches(folder):
    return [path for path in folder.iterdir() if path.is_dir()]


def test_the_second_time_is_mapped_and_not_decoded(folder):
    decodings = []
    first, second = load(folder, decodings), load(folder, decodings)
    assert decodings == ["train", "test"]
    assert_same(first, second)
    np.testing.assert_array_equal(second.examples["test"], IMAGES[:NUM_TEST])
    np.testing.assert_array_equal(second.labels["test"], LABELS[:NUM_TEST])
    assert [len(second.examples[split]) for split in ("train", "validation")] == [36, 4]
    assert (second.num_classes, second.num_levels, second.event_shape) == (4, 256, (6, 5, 3))
    with pytest.raises(ValueError, match="read-only"):
        second.examples["train"][0] = 0
    [made] = caches(folder)
    np.testing.assert_array_equal(np.load(made / "test.npy"), IMAGES[:NUM_TEST])  # read without the library
    os.utime(folder / "images", (1e9, 1e9))
    load(folder, decodings)
    assert decodings == ["train", "test"] * 2


def test_a_variable_or_a_folder_that_is_not_writable_moves_the_cache(folder, home, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    load(folder)
    assert (len(caches(folder)), len(caches(home))) == (0, 1)
    monkeypatch.setenv("IRESNET_JAX_CACHE_DIR", str(tmp_path / "there"))
    load(folder)
    assert len(caches(tmp_path / "there")) == 1


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), KeyboardInterrupt("Ctrl-C")])
def test_interrupted_decoding_leaves_nothing(folder, error):
    def fail():
        raise error

    with pytest.raises(type(error), match=r"x cannot be written into .*No space left on device|Ctrl-C"):
        load(folder, after_each=fail)
    assert caches(folder) == []
    load(folder)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"images": IMAGES.astype(np.uint16)}, "image 0 has uint16 pixels"),
        ({"labels": LABELS + 1}, "classes of x must lie in 0 to 3, got 1 to 4"),
        ({"images": IMAGES[:45], "labels": LABELS[:45]}, "is damaged, delete it"),
    ],
)
def test_images_that_break_the_word_of_their_source_are_refused(folder, changed, message):
    with pytest.raises(ValueError, match=message):
        load(folder, **changed)
    assert caches(folder) == []


def test_a_damaged_cache_is_named(folder):
    load(folder)
    [made] = caches(folder)
    (made / "test.npy").write_bytes((made / "test.npy").read_bytes()[:-1])
    with pytest.raises(ValueError, match=rf"{made} is damaged, delete it"):
        load(folder)


def test_writers_that_start_at_once_agree(folder):
    decodings = []
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: load(folder, decodings, after_each=lambda: time.sleep(0.002)), range(2))
    assert_same(first, second)
    assert decodings == ["train", "test"]
