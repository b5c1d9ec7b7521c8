"""The cache of decoded images under damage, interruption, full disks and several writers at once."""

import contextlib
import errno
import hashlib
import json
import logging
import os
import re
import resource
import shutil
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from iresnet_jax.data import cache
from iresnet_jax.data.sources.source import Contents, Source

IMAGES = np.random.default_rng(0).integers(0, 256, (50, 6, 5, 3), np.uint8)
LABELS = np.arange(50) % 4
NUM_TEST = 10
SHA256 = hashlib.sha256


@pytest.fixture(autouse=True)
def home(tmp_path_factory, monkeypatch):
    """A user's cache folder of its own, not there yet."""
    folder = tmp_path_factory.mktemp("home") / "caches"
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder / "iresnet_jax"


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "set" / "1.0.0"
    made.mkdir(parents=True)
    return made


def make_source(folder, decodings=None, state="one", after_chunk=lambda: None):
    """A source that notes when it is decoded."""

    def chunks(split):
        if decodings is not None:
            decodings.append(split)
        held = {"train": slice(NUM_TEST, None), "test": slice(NUM_TEST)}[split]
        for rows in np.array_split(np.arange(50)[held], 3):
            yield IMAGES[rows], LABELS[rows]
            after_chunk()

    contents = Contents({"train": 50 - NUM_TEST, "test": NUM_TEST}, 4, chunks)
    return Source("x", folder / "iresnet_jax.decoded", state, lambda: contents)


def assert_same(first, second):
    for kind in ("examples", "labels"):
        for split, rows in getattr(first, kind).items():
            np.testing.assert_array_equal(getattr(second, kind)[split], rows)


def names(folder):
    """Everything in a folder but the lock files, which stay."""
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".lock"))


# What it is for -----------------------------------------------------------------------------------------------------------


def test_second_time_is_mapped_and_neither_decoded_nor_hashed(folder, monkeypatch):
    decodings, hashed = [], []
    first = cache.load(make_source(folder, decodings))
    monkeypatch.setattr(hashlib, "sha256", lambda content=b"": hashed.append(len(content)) or SHA256(content))
    second = cache.load(make_source(folder, decodings))
    assert decodings == ["train", "test"]
    assert 0 < max(hashed) < 1500  # a path and the record, of 4500 bytes of pixels
    assert_same(first, second)
    np.testing.assert_array_equal(second.examples["test"], IMAGES[:NUM_TEST])
    assert (second.num_classes, second.num_levels, second.event_shape) == (4, 256, (6, 5, 3))
    assert second.fingerprint == first.fingerprint
    assert isinstance(second.examples["train"].base, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        second.examples["train"][0] = 0


def test_files_are_readable_by_others_and_as_their_description_says(folder):
    """Read without the library: JSON, and arrays as NumPy saves them."""
    old = os.umask(0o022)
    try:
        loaded = cache.load(make_source(folder))
    finally:
        os.umask(old)
    made = folder / "iresnet_jax.decoded"
    assert made.stat().st_mode & 0o777 == 0o755
    assert {path.stat().st_mode & 0o777 for path in made.iterdir()} == {0o644}
    record = json.loads((made / "record.json").read_text())
    assert {path.stem for path in made.glob("*.npy")} == set(record["arrays"])
    test = np.load(made / "test_examples.npy")
    np.testing.assert_array_equal(test, IMAGES[:NUM_TEST])
    expected = {"dtype": "uint8", "shape": [NUM_TEST, 6, 5, 3], "sha256": SHA256(test.tobytes()).hexdigest()}
    assert record["arrays"]["test_examples"] == expected
    assert (record["num_levels"], record["num_classes"], record["fingerprint"]) == (256, 4, loaded.fingerprint)


# Where it lies ------------------------------------------------------------------------------------------------------------


def test_read_only_folder_sends_the_cache_home(folder, home, tmp_path):
    other = tmp_path / "elsewhere" / "set" / "1.0.0"  # of the same name
    other.mkdir(parents=True)
    decodings = []
    for place in (folder, folder, other):
        place.chmod(0o555)  # respected even if root runs the tests
        try:
            cache.load(make_source(place, decodings))
        finally:
            place.chmod(0o755)
        assert names(place) == []
    assert decodings == ["train", "test"] * 2
    first, second = names(home)
    assert first.startswith("set-1.0.0-")
    assert second.startswith("set-1.0.0-")


def test_variable_moves_the_cache(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("IRESNET_JAX_CACHE_DIR", str(tmp_path / "there"))
    cache.load(make_source(folder))
    assert names(folder) == []
    assert len(names(tmp_path / "there")) == 1
    (tmp_path / "file").touch()
    monkeypatch.setenv("IRESNET_JAX_CACHE_DIR", str(tmp_path / "file" / "caches"))
    with pytest.raises(OSError, match=r"cannot write the decoded images of x into .*caches: set"):
        cache.load(make_source(folder))


# Damage -------------------------------------------------------------------------------------------------------------------


def replaced(old, new):
    def damage(content):
        assert old in content
        return content.replace(old, new)

    return damage


IMAGES_FILE, LABELS_FILE, RECORD = "test_examples.npy", "train_labels.npy", "record.json"


@pytest.mark.parametrize(
    ("file", "damage", "problem"),
    [
        (IMAGES_FILE, lambda content: content[:-1], "length is greater than file size"),
        (LABELS_FILE, lambda content: content[:-1], "length is greater than file size"),
        (IMAGES_FILE, lambda content: content + b"\0", "1029 bytes instead of 1028"),
        (IMAGES_FILE, lambda content: content[:100], "EOF"),
        (IMAGES_FILE, lambda content: b"", "No data left"),
        (IMAGES_FILE, replaced(b"(10, 6, 5, 3)", b"(10, 5, 6, 3)"), r"uint8 of shape \(10, 5, 6, 3\)"),
        (IMAGES_FILE, replaced(b"|u1", b"|i1"), "holds int8"),
        (LABELS_FILE, lambda content: None, "No such file"),
        (RECORD, lambda content: content[:-1], "delimiter"),
        (RECORD, lambda content: b"", "Expecting value"),
        (RECORD, replaced(b'"num_classes": 4', b'"num_classes": 5'), "does not match its fingerprint"),
        (RECORD, replaced(b'"arrays"', b'"array"'), "KeyError: 'arrays'"),
        (RECORD, lambda content: None, None),  # no cache at all
    ],
)
def test_damaged_cache_is_reported_and_decoded_again(folder, caplog, file, damage, problem):
    first = cache.load(make_source(folder))
    place = folder / "iresnet_jax.decoded"
    damaged = damage((place / file).read_bytes())
    (place / file).unlink()  # the map of the first file stays what it was
    if damaged is not None:
        (place / file).write_bytes(damaged)
    with caplog.at_level(logging.WARNING):
        again = cache.load(make_source(folder))
    assert len(caplog.records) == (problem is not None)
    for record in caplog.records:
        assert re.search(f"the cache {place} is incomplete or was altered: .*{problem}", record.getMessage())
    assert_same(first, again)
    assert names(folder) == ["iresnet_jax.decoded"]


def test_file_in_the_place_of_the_cache_is_named(folder):
    """It may be somebody's: it stays, and the message says where."""
    (folder / "iresnet_jax.decoded").write_text("mine")
    with pytest.raises(OSError, match=r"cannot write the cache .*iresnet_jax.decoded of 0.1 MB: Not a directory"):
        cache.load(make_source(folder))
    assert (folder / "iresnet_jax.decoded").read_text() == "mine"


# Interruption and full disks ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_interrupted_decoding_leaves_what_was_there(folder, error):
    def fail():
        raise error

    with pytest.raises(error):
        cache.load(make_source(folder, after_chunk=fail))
    assert names(folder) == []
    first = cache.load(make_source(folder))
    with pytest.raises(error):
        cache.load(make_source(folder, state="two", after_chunk=fail))
    decodings = []
    assert_same(first, cache.load(make_source(folder, decodings)))
    assert not decodings


FULL = r"cannot write the cache .*iresnet_jax.decoded of 0.1 MB: {}: make room, or set IRESNET_JAX_CACHE_DIR"


def test_full_disk_is_noticed_before_decoding(folder, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10_000, 9_999, 1))
    decodings = []
    with pytest.raises(OSError, match=FULL.format(os.strerror(errno.ENOSPC))):
        cache.load(make_source(folder, decodings))
    assert decodings == ["train"]  # its first images, for their size
    assert names(folder) == []


def test_writing_that_fails_half_way_leaves_nothing(folder):
    """The operating system itself refuses to let the file grow, after it took the first pieces."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard))
    try:
        with pytest.raises(OSError, match=FULL.format(os.strerror(errno.EFBIG))):
            cache.load(make_source(folder))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(folder) == []
    cache.load(make_source(folder))  # and with room it works


# Several writers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("locking", [True, False])
def test_writers_that_start_at_once_agree(folder, monkeypatch, locking):
    """With locks one of them decodes; without, both do, and the results are as good."""
    if not locking:
        monkeypatch.setattr(cache, "locked", lambda place: contextlib.nullcontext())
    decodings = []
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(
            cache.load, [make_source(folder, decodings, after_chunk=lambda: time.sleep(0.1)) for _ in range(2)]
        )
    assert_same(first, second)
    np.testing.assert_array_equal(first.examples["test"], IMAGES[:NUM_TEST])
    assert names(folder) == ["iresnet_jax.decoded"]
    assert decodings.count("train") == (1 if locking else 2)


def test_killed_writer_is_cleaned_up_after(folder, tmp_path):
    copies = []

    def be_killed():  # so that nothing is cleaned up: what is on the disk now is put back
        [writing] = folder.glob("*.tmp")
        copies.append(shutil.copytree(writing, tmp_path / writing.name))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.load(make_source(folder, after_chunk=be_killed))
    abandoned = shutil.move(copies[0], folder / copies[0].name)
    long_ago = time.time() - 2 * 3600
    os.utime(abandoned, (long_ago, long_ago))
    cache.load(make_source(folder))
    assert abandoned.exists()  # its files are new: the writer may be alive
    for path in abandoned.iterdir():
        os.utime(path, (long_ago, long_ago))
    cache.load(make_source(folder, state="two"))
    assert names(folder) == ["iresnet_jax.decoded"]
