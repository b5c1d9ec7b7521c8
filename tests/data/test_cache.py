"""The cache of decoded images under damage, interruption, full disks and several processes at once."""

import errno
import hashlib
import json
import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest

from iresnet_jax.data import cache, decoding
from iresnet_jax.data.sources.source import Contents, Source

ROOT = Path(__file__).parents[2]
IMAGES = np.random.default_rng(0).integers(0, 256, (50, 6, 5, 3), np.uint8)
LABELS = np.arange(50) % 4
NUM_TEST = 10
SHA256 = hashlib.sha256


@pytest.fixture(autouse=True)
def home(tmp_path_factory, monkeypatch):
    """A user's cache folder of its own, not there yet."""
    monkeypatch.delenv("IRESNET_JAX_CACHE_DIR", raising=False)
    folder = tmp_path_factory.mktemp("home") / "caches"
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder / "iresnet_jax"


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "set" / "1.0.0"
    made.mkdir(parents=True)
    return made


def make_source(folder, decodings=None, state="one", images=IMAGES, fail=None):
    """A source that notes when it is decoded."""

    def chunks(split):
        if decodings is not None:
            decodings.append(split)
        held = {"train": slice(NUM_TEST, None), "test": slice(NUM_TEST)}[split]
        for rows in np.array_split(np.arange(len(images))[held], 3):
            yield images[rows], LABELS[rows]
            if fail:
                raise fail

    contents = Contents({"train": len(images) - NUM_TEST, "test": NUM_TEST}, 4, chunks)
    return Source("x", folder / "iresnet_jax.decoded", state, lambda: contents)


def same(first, second):
    return all(
        np.array_equal(getattr(first, kind)[split], getattr(second, kind)[split])
        for kind in ("examples", "labels")
        for split in ("train", "validation", "test")
    )


def names(folder):
    """Everything in a folder but the lock files, which stay."""
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".lock"))


def contents_of(cached):
    return {path.name: path.read_bytes() for path in cached.iterdir()}


# What it is for -----------------------------------------------------------------------------------------------------------


def test_second_time_is_mapped_and_not_decoded(folder):
    decodings = []
    first = decoding.load(make_source(folder, decodings))
    assert decodings == ["train", "test"]
    second = decoding.load(make_source(folder, decodings))
    assert decodings == ["train", "test"]
    assert same(first, second)
    np.testing.assert_array_equal(second.examples["test"], IMAGES[:NUM_TEST])
    assert (second.num_classes, second.num_levels, second.event_shape) == (4, 256, (6, 5, 3))
    assert names(folder) == ["iresnet_jax.decoded"]
    assert isinstance(second.examples["train"].base, np.memmap)


def test_nobody_can_write_through_the_map(folder):
    loaded = decoding.load(make_source(folder))
    with pytest.raises(ValueError, match="read-only"):
        loaded.examples["train"][0] = 0


def test_other_data_are_decoded_anew(folder):
    decodings = []
    decoding.load(make_source(folder))
    decoding.load(make_source(folder, decodings, state="two", images=255 - IMAGES))
    assert decodings == ["train", "test"]
    np.testing.assert_array_equal(decoding.load(make_source(folder, state="two")).examples["test"], 255 - IMAGES[:NUM_TEST])


def test_files_are_readable_as_their_description_says(folder):
    """Read without the library: JSON, and arrays as NumPy saves them."""
    loaded = decoding.load(make_source(folder))
    record = json.loads((folder / "iresnet_jax.decoded" / "record.json").read_text())
    assert {path.stem for path in (folder / "iresnet_jax.decoded").glob("*.npy")} == set(record["arrays"])
    test = np.load(folder / "iresnet_jax.decoded" / "test_examples.npy")
    np.testing.assert_array_equal(test, IMAGES[:NUM_TEST])
    expected = {"dtype": "uint8", "shape": [NUM_TEST, 6, 5, 3], "sha256": SHA256(test.tobytes()).hexdigest()}
    assert record["arrays"]["test_examples"] == expected
    assert (record["num_levels"], record["num_classes"], record["fingerprint"]) == (256, 4, loaded.fingerprint)


def test_others_may_read_the_files(folder):
    old = os.umask(0o022)
    try:
        decoding.load(make_source(folder))
    finally:
        os.umask(old)
    made = folder / "iresnet_jax.decoded"
    assert made.stat().st_mode & 0o777 == 0o755
    assert {path.stat().st_mode & 0o777 for path in made.iterdir()} == {0o644}


def test_opening_hashes_no_pixels(folder, monkeypatch):
    first = decoding.load(make_source(folder))
    hashed = []
    monkeypatch.setattr(hashlib, "sha256", lambda content=b"": hashed.append(len(content)) or SHA256(content))
    assert decoding.load(make_source(folder)).fingerprint == first.fingerprint
    assert 0 < max(hashed) < 1500  # a path and the record, of 4500 bytes of pixels


# Where it lies ------------------------------------------------------------------------------------------------------------


def test_read_only_folder_sends_the_cache_home(folder, home):
    folder.chmod(0o555)  # respected even if root runs the tests
    decodings = []
    try:
        first = decoding.load(make_source(folder, decodings))
        second = decoding.load(make_source(folder, decodings))
    finally:
        folder.chmod(0o755)
    assert same(first, second)
    assert decodings == ["train", "test"]
    assert names(folder) == []
    [found] = names(home)
    assert found.startswith("set-1.0.0-")


def test_caches_of_equal_names_at_home_do_not_meet(folder, tmp_path):
    other = tmp_path / "elsewhere" / "set" / "1.0.0"
    assert decoding.cache_places(folder / "a.cache")[1] != decoding.cache_places(other / "a.cache")[1]


def test_variable_moves_the_cache(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("IRESNET_JAX_CACHE_DIR", str(tmp_path / "there"))
    decoding.load(make_source(folder))
    assert names(folder) == []
    assert len(names(tmp_path / "there")) == 1


def test_no_writable_folder_at_all(folder, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("IRESNET_JAX_CACHE_DIR", str(tmp_path / "file" / "caches"))
    with pytest.raises(
        OSError, match=r"cannot write the decoded images of x into .*caches: set IRESNET_JAX_CACHE_DIR to a writ"
    ):
        decoding.load(make_source(folder))


# Damage -------------------------------------------------------------------------------------------------------------------


def truncate(content):
    return content[:-1]


def lose_most(content):
    return content[:100]


def empty(content):
    del content
    return b""


def append(content):
    return content + b"\0"


def swap_the_sides(content):
    assert b"(10, 6, 5, 3)" in content
    return content.replace(b"(10, 6, 5, 3)", b"(10, 5, 6, 3)")


def become_signed(content):
    assert b"|u1" in content
    return content.replace(b"|u1", b"|i1")


def vanish(content):
    del content


def edit_the_classes(content):
    assert b'"num_classes": 4' in content
    return content.replace(b'"num_classes": 4', b'"num_classes": 5')


def lose_the_arrays(content):
    return content.replace(b'"arrays"', b'"array"')


IMAGES_FILE, LABELS_FILE, RECORD = "test_examples.npy", "train_labels.npy", "record.json"
DAMAGE = {
    (IMAGES_FILE, truncate): "mmap length is greater than file size",
    (LABELS_FILE, truncate): "mmap length is greater than file size",
    (IMAGES_FILE, append): r"test_examples.npy has 1029 bytes instead of 1028",
    (IMAGES_FILE, lose_most): "EOF: reading array header",
    (IMAGES_FILE, empty): "No data left in file",
    (IMAGES_FILE, swap_the_sides): r"test_examples.npy holds uint8 of shape \(10, 5, 6, 3\)",
    (IMAGES_FILE, become_signed): r"test_examples.npy holds int8 of shape \(10, 6, 5, 3\)",
    (LABELS_FILE, vanish): "No such file",
    (RECORD, truncate): "delimiter",
    (RECORD, empty): "Expecting value",
    (RECORD, edit_the_classes): "record.json does not match its fingerprint",
    (RECORD, lose_the_arrays): "record.json lacks 'arrays'",
}


@pytest.mark.parametrize(("file", "damage"), DAMAGE, ids=lambda part: getattr(part, "__name__", part))
def test_damaged_cache_is_reported_and_decoded_again(folder, caplog, file, damage):
    first = decoding.load(make_source(folder))
    kept = first.examples["test"].copy()
    place = folder / "iresnet_jax.decoded"
    damaged = damage((place / file).read_bytes())
    (place / file).unlink()  # the map of the first file stays what it was
    if damaged is not None:
        (place / file).write_bytes(damaged)
    with pytest.raises(
        cache.DamagedCacheError, match=f"the cache {place} is incomplete or was altered: .*{DAMAGE[file, damage]}"
    ):
        cache.read(place)
    decodings = []
    with caplog.at_level(logging.WARNING):
        again = decoding.load(make_source(folder, decodings))
    assert decodings == ["train", "test"]
    [record] = caplog.records
    assert record.getMessage().startswith(f"the cache {place} is incomplete or was altered: ")
    assert record.getMessage().endswith("; x is decoded again")
    assert same(first, again)
    np.testing.assert_array_equal(first.examples["test"], kept)
    assert cache.read(place)
    assert names(folder) == ["iresnet_jax.decoded"]


def test_cache_without_its_record_is_none(folder):
    decoding.load(make_source(folder))
    (folder / "iresnet_jax.decoded" / "record.json").unlink()
    assert cache.read(folder / "iresnet_jax.decoded") is None
    decodings = []
    decoding.load(make_source(folder, decodings))
    assert decodings == ["train", "test"]


def test_file_in_the_place_of_the_cache_is_named(folder):
    """It may be somebody's: it stays, and the message says where."""
    (folder / "iresnet_jax.decoded").write_text("mine")
    with pytest.raises(OSError, match=r"cannot write the cache .*iresnet_jax.decoded of 0.1 MB: Not a directory"):
        decoding.load(make_source(folder))
    assert (folder / "iresnet_jax.decoded").read_text() == "mine"


# Interruption and full disks ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fail", [ValueError("broken"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_interrupted_decoding_leaves_nothing(folder, fail):
    with pytest.raises(type(fail)):
        decoding.load(make_source(folder, fail=fail))
    assert names(folder) == []


def test_interrupted_decoding_keeps_the_old_cache(folder):
    first = decoding.load(make_source(folder))
    before = contents_of(folder / "iresnet_jax.decoded")
    with pytest.raises(ValueError, match="broken"):
        decoding.load(make_source(folder, state="two", fail=ValueError("broken")))
    assert contents_of(folder / "iresnet_jax.decoded") == before
    assert same(first, decoding.load(make_source(folder)))


FULL = (
    r"cannot write the cache .*iresnet_jax.decoded of 0.1 MB: {}: make room, or set IRESNET_JAX_CACHE_DIR to a folder with room"
)


def test_full_disk_is_noticed_before_decoding(folder, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10_000, 9_999, 1))
    decodings = []
    with pytest.raises(OSError, match=FULL.format(os.strerror(errno.ENOSPC))):
        decoding.load(make_source(folder, decodings))
    assert decodings == ["train"]  # its first images, for their size
    assert names(folder) == []


def test_writing_that_fails_half_way_leaves_nothing(folder):
    """The operating system itself refuses to let the file grow, after it took the first pieces."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard))
    try:
        with pytest.raises(OSError, match=FULL.format(os.strerror(errno.EFBIG))):
            decoding.load(make_source(folder))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(folder) == []
    decoding.load(make_source(folder))  # and with room it works


PREAMBLE = f"""
import os, sys, time
from pathlib import Path
import numpy as np
sys.path.insert(0, {str(ROOT)!r})
from iresnet_jax.data import cache, decoding
from iresnet_jax.data.sources.source import Contents, Source

folder = Path(sys.argv[1])
images, labels = np.random.default_rng(0).integers(0, 256, (50, 64, 64, 3), np.uint8), np.arange(50) % 4

def chunks(split):
    with open(folder.parent / "decodings", "a") as log:
        log.write(split + " ")
    for start in range(0, 50, 5):
        time.sleep(PAUSE)
        yield images[start : start + 5], labels[start : start + 5]

PAUSE = 0.0
source = Source("x", folder / "iresnet_jax.decoded", "one", lambda: Contents({{"train": 50, "test": 50}}, 4, chunks))
"""


def program(body):
    return [sys.executable, "-c", PREAMBLE + textwrap.dedent(body)]


def test_really_full_disk(tmp_path):
    """A file system of 256 kB for a cache of 1.2 MB; with and without the check beforehand."""
    if shutil.which("unshare") is None:
        pytest.skip("needs unshare to mount a small file system")
    body = """
    import shutil
    for attempt in ("checked", "unchecked"):
        try:
            decoding.load(source)
        except OSError as error:
            print(attempt, error)
        print([name for name in os.listdir(folder) if not name.endswith(".lock")])
        shutil.disk_usage = lambda path: shutil._ntuple_diskusage(10**9, 0, 10**9)
    """
    mount = f"mount -t tmpfs -o size=256k tmpfs {tmp_path}"
    if subprocess.run(["unshare", "-rm", "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("this machine does not let a user mount a small file system")
    command = f'{mount} && mkdir {tmp_path}/set && exec "$@"'
    run = subprocess.run(
        ["unshare", "-rm", "sh", "-c", command, "sh", *program(body), str(tmp_path / "set")], capture_output=True, text=True
    )
    lines = run.stdout.splitlines()
    assert len(lines) == 4, run.stderr
    for attempt, line in zip(("checked", "unchecked"), lines[::2], strict=True):
        assert line.startswith(
            f"{attempt} cannot write the cache {tmp_path}/set/iresnet_jax.decoded of 1.2 MB: No space left on device"
        )
    assert lines[1::2] == ["[]", "[]"]


# Several processes --------------------------------------------------------------------------------------------------------


def test_processes_that_start_at_once_agree(tmp_path):
    """With locks one of them decodes; without, both do, and the results are as good."""
    body = """
    import contextlib, hashlib
    PAUSE = 0.02
    print("ready", flush=True)
    for locking in (True, False):
        sys.stdin.readline()
        if not locking:
            decoding.locked = lambda place: contextlib.nullcontext()
        folder = Path(sys.argv[1]) / str(locking) / "set"
        source = source._replace(cache_path=folder / "iresnet_jax.decoded")
        examples = decoding.load(source).examples
        digest = hashlib.sha256(b"".join(examples[s].tobytes() for s in ("train", "validation", "test"))).hexdigest()
        print(digest, flush=True)
    """
    for locking in (True, False):
        (tmp_path / str(locking) / "set").mkdir(parents=True)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    running = [subprocess.Popen([*program(body), str(tmp_path)], **pipes) for _ in range(2)]
    try:
        assert [process.stdout.readline() for process in running] == ["ready\n"] * 2
        for locking in (True, False):
            for process in running:
                process.stdin.write("go\n")
                process.stdin.flush()
            first, second = [process.stdout.readline().strip() for process in running]
            assert first == second
            assert len(first) == 64
            assert names(tmp_path / str(locking) / "set") == ["iresnet_jax.decoded"]
            decodings = (tmp_path / str(locking) / "decodings").read_text().split().count("train")
            assert decodings == 1 if locking else decodings > 1  # without locks they did race
    finally:
        for process in running:
            process.kill()
            process.communicate()


def test_killed_writer_is_cleaned_up_after(folder):
    process = subprocess.Popen(
        [*program("PAUSE = 0.2; decoding.load(source)"), str(folder)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 60
    while not list(folder.glob("*.tmp")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    [abandoned] = folder.glob("*.tmp")
    assert names(folder) == [abandoned.name]
    decoding.load(make_source(folder))
    assert abandoned.exists()  # it might belong to a living writer
    long_ago = time.time() - 2 * 3600
    os.utime(abandoned, (long_ago, long_ago))
    decoding.load(make_source(folder, state="two"))
    assert abandoned.exists()  # its files are new: the writer may be alive
    for path in abandoned.iterdir():
        os.utime(path, (long_ago, long_ago))
    decoding.load(make_source(folder, state="three"))
    assert names(folder) == ["iresnet_jax.decoded"]
