"""Whole files and locks, and runs in a bucket of moto's server, to the same bits as on a disk."""

import contextlib
import os
import signal
import subprocess
import sys

import fsspec
import pytest
import s3fs
import tiny_runs as runs
from fsspec.implementations.memory import MemoryFileSystem

from iresnet_jax import storage
from iresnet_jax.__main__ import main
from iresnet_jax.runs import job
from iresnet_jax.storage import locked, path_of, replacing
from iresnet_jax.training.signals import Stopped


def test_a_file_is_replaced_when_it_is_whole_also_by_several_at_once(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with replacing(path) as first, replacing(path) as second:
        first.write_text("the first of two")
        second.write_text("the second")
        assert path.read_text() == "old"
    assert path.read_text() == "the first of two"
    assert list(tmp_path.iterdir()) == [path]


def test_a_writer_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with contextlib.suppress(ZeroDivisionError), replacing(path) as incoming:
        incoming.write_text("n")
        incoming.write_text(f"{1 / 0}")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.slow
def test_one_process_at_a_time_and_a_killed_one_lets_go(tmp_path):
    path = tmp_path / "work"
    hold = f"""
import pathlib, runpy, time
locked = runpy.run_path({storage.__file__!r})["locked"]
with locked(pathlib.Path({str(path)!r})):
    print("held", flush=True)
    time.sleep(600)
"""
    holder = subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(TimeoutError), locked(path, timeout_s=0.0):
            pytest.fail("two processes hold the lock")
    finally:
        holder.kill()
        holder.communicate()
    with locked(path, timeout_s=0.0):
        assert not path.exists()


def check_files(address):
    folder = path_of(address)
    path = folder / "a.npz"
    assert (str(path), path.stem, path.parent) == (f"{address}/a.npz", "a", folder)
    assert not folder.exists()
    for name in ("a.npz", "b.txt", "deep/c.npz"):
        with replacing(folder / name) as incoming:
            incoming.write_text("grün\n", encoding="utf-8")
    with contextlib.suppress(ZeroDivisionError), replacing(path) as incoming:
        incoming.write_text(f"{1 / 0}")
    assert folder.exists()
    assert folder.is_dir()
    assert not folder.is_file()
    assert path.is_file()
    assert list(folder.glob("*.npz")) == [path]
    assert not list((folder / "nowhere").glob("*"))
    assert path.read_text(encoding="utf-8") == "grün\n"
    assert len(path.read_bytes()) == 6
    path.unlink()
    assert not path.exists()
    with pytest.raises(FileNotFoundError, match=f"{path}"):
        path.open("rb")


def test_objects_are_read_and_written_as_files():
    check_files("memory://bucket/files")


def test_the_newest_process_holds_the_lock_of_a_bucket():
    folder = path_of("memory://bucket/locked")
    with locked(folder / "training") as first:
        first()
        with locked(folder / "training") as second:
            second()
            with pytest.raises(OSError, match=f"has taken over {folder}/.training.lock"):
                first()
        with pytest.raises(OSError, match="has taken over"):
            first()
        with locked(folder / "training") as third:
            third()
    assert not list(folder.glob("*"))


def test_an_upload_is_tried_again_until_the_time_is_up(monkeypatch, caplog):
    path, failures = path_of("memory://bucket/again.txt"), [3]
    put_file = MemoryFileSystem.put_file

    def failing(*arguments, **options):
        failures[0] -= 1
        if failures[0] >= 0:
            raise RuntimeError("503 at the moment")
        put_file(*arguments, **options)

    monkeypatch.setattr(MemoryFileSystem, "put_file", failing)
    monkeypatch.setattr(storage, "_PAUSE_S", 0.01)
    with replacing(path) as incoming:
        incoming.write_text("there")
    assert caplog.text.count(f"{path} cannot be reached (503 at the moment)") == 3
    assert path.read_text() == "there"
    monkeypatch.setattr(storage, "RETRY_S", 0.0)
    failures[0] = 1
    with pytest.raises(OSError, match=r"cannot be written .*503"), replacing(path) as incoming:
        incoming.write_text("new")


@pytest.fixture
def uploads(monkeypatch):
    """Uploads to a bucket, and what happens before one, by its name."""
    from moto.server import ThreadedMotoServer

    done, events, put_file = [], {}, s3fs.S3FileSystem._put_file

    async def watched(self, lpath, rpath, **options):
        done.append(rpath)
        events.pop(rpath.rpartition("checkpoints/")[2], lambda: None)()
        return await put_file(self, lpath, rpath, **options)

    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    address = "http://{}:{}".format(*server.get_host_and_port())
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "somebody")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", address)
    monkeypatch.setattr(s3fs.S3FileSystem, "_put_file", watched)
    s3fs.S3FileSystem.clear_instance_cache()  # one of another test would not be watched
    fsspec.filesystem("s3").mkdir("bucket")
    yield done, events
    server.stop()


@pytest.mark.slow
def test_a_run_that_is_stopped_in_an_upload_resumes_to_the_same_bits(
    uploads, tmp_path_factory, capsys, monkeypatch
):
    done, events = uploads
    config, workdir = runs.config_of(runs.TOY_CONFIG), path_of("s3://bucket/run")
    on_disk = runs.trained(tmp_path_factory, "toy")
    events["4.npz"] = lambda: os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(Stopped):
        job.train(config, str(workdir))
    assert 4 <= runs.newest(workdir) < runs.TOTAL_STEPS
    assert not list(workdir.glob(".*"))  # the claim was given back
    job.train(config, str(workdir))
    runs.assert_ends_like(workdir, on_disk)
    num_saves = sum("/checkpoints/" in address for address in done)
    # whole each time, so no more often than checkpoints, which are larger, and at two ends
    for log in ("metrics.jsonl", "tensorboard/events"):
        assert sum(f"/{log}" in address for address in done) <= num_saves + 2

    runs.shorten_reports(monkeypatch)
    said = []
    for command, folder in (("report", workdir), ("evaluate", workdir), ("evaluate", on_disk)):
        capsys.readouterr()
        assert main([command, f"--workdir={folder}"]) == 0
        said.append(capsys.readouterr().out)
    assert said[-1] == said[-2]
    assert {"report.html", "report.json"} <= {path.name for path in workdir.glob("*")}
