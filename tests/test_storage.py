"""Whole files and locks, and runs in a bucket of moto's server, to the same bits as on a disk."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import urllib.request

import fsspec
import jax
import numpy as np
import pytest
import s3fs
import tiny_runs as runs
from fsspec.implementations.memory import MemoryFileSystem
from one_of_several import start_training

import iresnet_jax as ir
from iresnet_jax import storage
from iresnet_jax.__main__ import main
from iresnet_jax.data import load
from iresnet_jax.runs import job
from iresnet_jax.storage import locked, path_of, replacing
from iresnet_jax.training.signals import Stopped

# --- files and locks ------------------------------------------------------------------------------


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


# --- objects --------------------------------------------------------------------------------------


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


def test_an_address_that_pathlib_would_change_is_refused():
    for address in ("s3://", "s3:///run", "file:///tmp/run", "s3://bucket//run"):
        with pytest.raises(ValueError, match=f"{address} has an empty name in it"):
            path_of(address)


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


# --- runs in a bucket -----------------------------------------------------------------------------


class Server:
    """The server; `at` is asked at each request, and true cuts the connection in its body."""

    def __init__(self):
        from moto.server import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
        from werkzeug.serving import make_server

        self.at, self.put = lambda method, address: False, []
        self._moto = DomainDispatcherApplication(create_backend_app)
        quiet = type("Quiet", (MotoRequestHandler,), {"log": lambda *_: None})
        self._server = make_server(
            "127.0.0.1", 0, self._answer, threaded=True, request_handler=quiet
        )
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        keys = {
            "AWS_ACCESS_KEY_ID": "somebody",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        self.environment = {**keys, "AWS_ENDPOINT_URL": self.address, "AWS_MAX_ATTEMPTS": "1"}

    def _answer(self, environ, start_response):
        if environ["REQUEST_METHOD"] == "PUT":
            self.put.append(environ["PATH_INFO"])
        if self.at(environ["REQUEST_METHOD"], environ["PATH_INFO"]):
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0) // 2)
            environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
            raise ConnectionAbortedError
        return self._moto(environ, start_response)

    def permit_requests(self, number):
        """Checks the credentials of all requests but so many; nobody's are right."""
        content = {"data": str(number).encode(), "headers": {"Content-Type": "text/plain"}}
        urllib.request.urlopen(
            urllib.request.Request(f"{self.address}/moto-api/reset-auth", **content)
        ).close()

    def close(self):
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture(scope="module")
def running():
    server = Server()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        patch.setattr(storage, "_PAUSE_S", 0.05)
        patch.setattr(s3fs.S3FileSystem, "retries", 1)
        fsspec.filesystem("s3").mkdir("bucket")
        yield server
    server.close()


@pytest.fixture
def server(running):
    running.put.clear()
    yield running
    running.at = lambda method, address: False
    running.permit_requests(np.inf)


@pytest.fixture
def workdir(server, request):
    return path_of(f"s3://bucket/{request.node.name.replace('[', '-').rstrip(']')}")


@pytest.fixture(scope="module")
def config():
    return runs.config_of(runs.TOY_CONFIG)


@pytest.fixture(scope="module")
def on_disk(tmp_path_factory):
    """The run that was never stopped, in a folder of this machine."""
    return runs.trained(tmp_path_factory, "toy")


def when_put(name, event):
    """Has something happen once, at the first request that puts an object of this name."""
    left = [event]

    def at(method, address):
        return bool(method == "PUT" and address.endswith(name) and left and left.pop()())

    return at


@pytest.mark.slow
def test_files_models_and_arrays_travel_through_a_bucket(workdir, on_disk, tmp_path):
    check_files(f"{workdir}/files")
    model = ir.load(on_disk)
    model.save(workdir / "model.npz")
    x, key = np.random.default_rng(0).normal(size=(8, 2)).astype(np.float32), jax.random.key(0)
    for place in (f"{workdir}/model.npz", f"{workdir}"):
        np.testing.assert_array_equal(
            ir.load(place).log_prob(x, key=key), model.log_prob(x, key=key)
        )
    np.savez(tmp_path / "x.npz", x=x)
    with replacing(workdir / "x.npz") as incoming:
        incoming.write_bytes((tmp_path / "x.npz").read_bytes())
    assert load(f"npz:{workdir}/x.npz").fingerprint == load(f"npz:{tmp_path}/x.npz").fingerprint


@pytest.mark.slow
def test_a_run_that_is_stopped_in_an_upload_resumes_to_the_same_bits(
    config, server, workdir, on_disk, capsys, monkeypatch
):
    server.at = when_put("checkpoints/4.npz", lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Stopped):
        job.train(config, str(workdir))
    stopped = runs.newest(workdir)
    assert 4 <= stopped < runs.TOTAL_STEPS
    assert not list(workdir.glob(".*"))  # the claim was given back
    job.train(config, str(workdir))
    runs.assert_ends_like(workdir, on_disk)
    num_saves = sum("/checkpoints/" in address for address in server.put)
    # whole each time, so no more often than checkpoints, which are larger, and at two ends
    for log in ("metrics.jsonl", "tensorboard/events"):
        assert sum(f"/{log}" in address for address in server.put) <= num_saves + 2

    runs.shorten_reports(monkeypatch)
    said = []
    for command, folder in (("report", workdir), ("evaluate", workdir), ("evaluate", on_disk)):
        capsys.readouterr()
        assert main([command, f"--workdir={folder}"]) == 0
        said.append(capsys.readouterr().out)
    assert said[-1] == said[-2]
    assert {"report.html", "report.json"} <= {path.name for path in workdir.glob("*")}


@pytest.mark.slow
def test_a_run_that_is_killed_in_uploads_resumes_to_the_same_bits(config, server, workdir, on_disk):
    def die_in_upload(name):
        server.at = when_put(name, lambda: process.kill() or True)
        process = start_training(server.environment, "toy", str(workdir))
        process.join()
        assert process.exitcode == -signal.SIGKILL

    die_in_upload("config.json")
    die_in_upload("checkpoints/4.npz")
    job.train(config, workdir)
    runs.assert_ends_like(workdir, on_disk)


@pytest.mark.slow
def test_a_run_that_a_second_start_takes_over_stops_and_leaves_checkpoints_of_the_same_bits(
    config, server, workdir, on_disk
):
    """The second job begins and ends within an upload of the first one."""

    def second():
        process = start_training(server.environment, "toy", str(workdir))
        process.join()
        assert process.exitcode == 0

    server.at = when_put("checkpoints/2.npz", second)
    with pytest.raises(OSError, match=f"another process has taken over {workdir}/.training.lock"):
        job.train(config, workdir)
    assert runs.newest(workdir) == 2  # its upload was under way
    job.train(config, workdir)
    runs.assert_ends_like(workdir, on_disk)
