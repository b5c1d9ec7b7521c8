"""The cache of decoded images under damage, interruption, full disks and several processes at once."""

import errno
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

from iresnet_jax.data import cache, decoded
from iresnet_jax.data.source import Contents, Source

ROOT = Path(__file__).parents[2]
IMAGES = np.random.default_rng(0).integers(0, 256, (50, 6, 5, 3), np.uint8)
LABELS = np.arange(50) % 4
NUM_TEST = 10


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


def make_source(folder, decodings=None, fingerprint="one", images=IMAGES, fail=None):
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
    return Source("x", folder / "iresnet_jax.cache", fingerprint, lambda: contents)


def same(first, second):
    return all(
        np.array_equal(getattr(first, kind)[split], getattr(second, kind)[split])
        for kind in ("images", "labels")
        for split in ("train", "validation", "test")
    )


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# What it is for -----------------------------------------------------------------------------------------------------------


def test_second_time_is_mapped_and_not_decoded(folder):
    decodings = []
    first = decoded.load(make_source(folder, decodings))
    assert decodings == ["train", "test"]
    second = decoded.load(make_source(folder, decodings))
    assert decodings == ["train", "test"]
    assert same(first, second)
    np.testing.assert_array_equal(second.images["test"], IMAGES[:NUM_TEST])
    assert (second.num_classes, second.num_levels, second.image_shape) == (4, 256, (6, 5, 3))
    assert names(folder) == ["iresnet_jax.cache"]
    assert isinstance(second.images["train"].base, np.memmap)


def test_nobody_can_write_through_the_map(folder):
    loaded = decoded.load(make_source(folder))
    with pytest.raises(ValueError, match="read-only"):
        loaded.images["train"][0] = 0


def test_other_data_are_decoded_anew(folder):
    decodings = []
    decoded.load(make_source(folder))
    decoded.load(make_source(folder, decodings, fingerprint="two", images=255 - IMAGES))
    assert decodings == ["train", "test"]
    np.testing.assert_array_equal(decoded.load(make_source(folder, fingerprint="two")).images["test"], 255 - IMAGES[:NUM_TEST])


def test_file_is_readable_as_its_description_says(folder):
    """Read without the library: magic, checksum and JSON in 4096 bytes, arrays where the JSON says."""
    import hashlib
    import json

    decoded.load(make_source(folder))
    content = (folder / "iresnet_jax.cache").read_bytes()
    magic, checksum, text = content[:4096].rstrip().split(b"\n")
    assert magic == b"iresnet_jax arrays 1"
    assert checksum.decode() == hashlib.sha256(text).hexdigest()
    about = json.loads(text)
    assert about["size"] == len(content)
    test = about["arrays"]["test/images"]
    assert test["offset"] % 4096 == 0
    assert content[test["offset"] :][: IMAGES[:NUM_TEST].nbytes] == IMAGES[:NUM_TEST].tobytes()


def test_others_may_read_the_file(folder):
    old = os.umask(0o022)
    try:
        decoded.load(make_source(folder))
    finally:
        os.umask(old)
    assert (folder / "iresnet_jax.cache").stat().st_mode & 0o777 == 0o644


# Where it lies ------------------------------------------------------------------------------------------------------------


def test_read_only_folder_sends_the_cache_home(folder, home):
    folder.chmod(0o555)  # respected even if root runs the tests
    decodings = []
    try:
        first = decoded.load(make_source(folder, decodings))
        second = decoded.load(make_source(folder, decodings))
    finally:
        folder.chmod(0o755)
    assert same(first, second)
    assert decodings == ["train", "test"]
    assert names(folder) == []
    [found] = names(home)
    assert found.startswith("set-1.0.0-")
    assert found.endswith(".cache")


def test_caches_of_equal_names_at_home_do_not_meet(folder, tmp_path):
    other = tmp_path / "elsewhere" / "set" / "1.0.0"
    assert decoded.cache_places(folder / "a.cache")[1] != decoded.cache_places(other / "a.cache")[1]


def test_variable_moves_the_cache(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("IRESNET_JAX_CACHE_DIR", str(tmp_path / "there"))
    decoded.load(make_source(folder))
    assert names(folder) == []
    assert len(names(tmp_path / "there")) == 1


def test_no_writable_folder_at_all(folder, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("IRESNET_JAX_CACHE_DIR", str(tmp_path / "file" / "caches"))
    with pytest.raises(
        OSError, match=r"cannot write the decoded images of x into .*caches: set IRESNET_JAX_CACHE_DIR to a writ"
    ):
        decoded.load(make_source(folder))


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


def flip_a_pixel(content):
    position = content.index(IMAGES[3].tobytes())
    return content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :]


def flip_the_last_label(content):
    return content[:-1] + bytes([content[-1] ^ 1])


def edit_the_header(content):
    return content.replace(b'"num_classes": 4', b'"num_classes": 5')


def change_the_version(content):
    return content.replace(b"arrays 1", b"arrays 0")


DAMAGE = {
    truncate: r"it has \d+ of \d+ bytes",
    append: r"it has \d+ of \d+ bytes",
    lose_most: "its header does not match its checksum",
    empty: "its header does not match its checksum",
    edit_the_header: "its header does not match its checksum",
    change_the_version: "its header does not match its checksum",
    flip_a_pixel: "test/images does not match its checksum",
    flip_the_last_label: "test/labels does not match its checksum",
}


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_damaged_cache_is_reported_and_decoded_again(folder, caplog, damage):
    first = decoded.load(make_source(folder))
    kept = first.images["test"].copy()
    path = folder / "iresnet_jax.cache"
    damaged = damage(path.read_bytes())
    path.unlink()  # the map of the first file stays what it was
    path.write_bytes(damaged)
    with pytest.raises(cache.DamagedCacheError, match=f"the cache {path} is truncated or altered: {DAMAGE[damage]}"):
        cache.read(path)
    decodings = []
    with caplog.at_level(logging.WARNING):
        again = decoded.load(make_source(folder, decodings))
    assert decodings == ["train", "test"]
    [record] = caplog.records
    assert record.getMessage().startswith(f"the cache {path} is truncated or altered: ")
    assert record.getMessage().endswith("; x is decoded again")
    assert same(first, again)
    np.testing.assert_array_equal(first.images["test"], kept)
    assert cache.read(path)
    assert names(folder) == ["iresnet_jax.cache"]


# Interruption and full disks ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fail", [ValueError("broken"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_interrupted_decoding_leaves_nothing(folder, fail):
    with pytest.raises(type(fail)):
        decoded.load(make_source(folder, fail=fail))
    assert names(folder) == []


def test_interrupted_decoding_keeps_the_old_cache(folder):
    first = decoded.load(make_source(folder))
    before = (folder / "iresnet_jax.cache").read_bytes()
    with pytest.raises(ValueError, match="broken"):
        decoded.load(make_source(folder, fingerprint="two", fail=ValueError("broken")))
    assert (folder / "iresnet_jax.cache").read_bytes() == before
    assert same(first, decoded.load(make_source(folder)))


FULL = (
    r"cannot write the cache .*iresnet_jax.cache of 0.1 MB: {}: make room, or set IRESNET_JAX_CACHE_DIR to a folder with room"
)


def test_full_disk_is_noticed_before_decoding(folder, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10_000, 9_999, 1))
    decodings = []
    with pytest.raises(OSError, match=FULL.format(os.strerror(errno.ENOSPC))):
        decoded.load(make_source(folder, decodings))
    assert decodings == ["train"]  # its first images, for their size
    assert names(folder) == []


def test_writing_that_fails_half_way_leaves_nothing(folder):
    """The operating system itself refuses to let the file grow, after it took the first pieces."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))
    try:
        with pytest.raises(OSError, match=FULL.format(os.strerror(errno.EFBIG))):
            decoded.load(make_source(folder))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(folder) == []
    decoded.load(make_source(folder))  # and with room it works


PREAMBLE = f"""
import os, sys, time
from pathlib import Path
import numpy as np
sys.path.insert(0, {str(ROOT)!r})
from iresnet_jax.data import cache, decoded
from iresnet_jax.data.source import Contents, Source

folder = Path(sys.argv[1])
images, labels = np.random.default_rng(0).integers(0, 256, (50, 64, 64, 3), np.uint8), np.arange(50) % 4

def chunks(split):
    with open(folder.parent / "decodings", "a") as log:
        log.write(split + " ")
    for start in range(0, 50, 5):
        time.sleep(PAUSE)
        yield images[start : start + 5], labels[start : start + 5]

PAUSE = 0.0
source = Source("x", folder / "iresnet_jax.cache", "one", lambda: Contents({{"train": 50, "test": 50}}, 4, chunks))
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
            decoded.load(source)
        except OSError as error:
            print(attempt, error)
        print(os.listdir(folder))
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
            f"{attempt} cannot write the cache {tmp_path}/set/iresnet_jax.cache of 1.2 MB: No space left on device"
        )
    assert lines[1::2] == ["[]", "[]"]


# Several processes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("locking", [True, False], ids=["locking", "no locks"])
def test_processes_that_start_at_once_agree(folder, locking):
    body = f"""
    import contextlib, hashlib
    PAUSE = 0.02
    if not {locking}:
        cache.locked = lambda folder: contextlib.nullcontext()
    print("ready", flush=True)
    sys.stdin.readline()
    loaded = decoded.load(source)
    print(hashlib.sha256(b"".join(loaded.images[s].tobytes() for s in ("train", "validation", "test"))).hexdigest())
    """
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    running = [subprocess.Popen([*program(body), str(folder)], **pipes) for _ in range(2)]
    try:
        for process in running:
            assert process.stdout.readline() == "ready\n"
        results = []
        for process in running:
            process.stdin.write("go\n")
            process.stdin.flush()
        for process in running:
            results.append(process.communicate(timeout=60)[0])
    finally:
        for process in running:
            process.kill()
            process.communicate()
    assert len(set(results)) == 1
    assert len(results[0].strip()) == 64
    assert names(folder) == ["iresnet_jax.cache"]
    decodings = (folder.parent / "decodings").read_text().split().count("train")
    assert decodings == 1 if locking else decodings > 1  # without locks they did race


def test_killed_writer_is_cleaned_up_after(folder):
    process = subprocess.Popen(
        [*program("PAUSE = 0.2; decoded.load(source)"), str(folder)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 60
    while not list(folder.glob("*.tmp")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    [abandoned] = folder.iterdir()
    assert abandoned.suffix == ".tmp"
    decoded.load(make_source(folder))
    assert abandoned.exists()  # it might belong to a living writer
    long_ago = time.time() - 2 * 3600
    os.utime(abandoned, (long_ago, long_ago))
    decoded.load(make_source(folder, fingerprint="two"))
    assert names(folder) == ["iresnet_jax.cache"]
