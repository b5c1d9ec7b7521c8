"""Runs in a bucket of a real server, moto's: stopped, killed, refused and cut off, and the same
bits as on a disk.
"""

import contextlib
import os
import signal
import socket
import threading
import time
import urllib.request

import fsspec
import jax
import numpy as np
import pytest
import s3fs
import tiny_runs as runs
from moto.server import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
from one_of_several import start, start_training
from werkzeug.serving import make_server

import iresnet_jax as ir
from iresnet_jax import object_storage
from iresnet_jax.__main__ import main
from iresnet_jax.atomic_files import locked, path_of, replacing
from iresnet_jax.data import load
from iresnet_jax.runs import job
from iresnet_jax.runs.metrics import read_metrics
from iresnet_jax.training.checkpoints import Store
from iresnet_jax.training.run import BlowUpError
from iresnet_jax.training.signals import Stopped

pytestmark = pytest.mark.slow

BEAT_S = 0.1  # the claim of a killed process is taken over after 0.4 s


class QuietHandler(MotoRequestHandler):
    def log(self, *_):
        pass


class Server:
    """The server, on the loopback interface, and what happens at a request.

    Attributes:
        at: Function of the method and the address of a request that is called before it is
            answered; a true result cuts the connection after half of the body.
        put: Addresses of objects that were put.
        environment: Variables by which a process finds the server.
    """

    def __init__(self):
        self.at, self.put = lambda method, address: False, []
        self._moto = DomainDispatcherApplication(create_backend_app)
        self._server = make_server(
            "127.0.0.1", 0, self._answer, threaded=True, request_handler=QuietHandler
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
        patch.setattr(object_storage, "BEAT_S", BEAT_S)
        patch.setattr(object_storage, "_PAUSE_S", 0.05)
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
    """Has something happen once, at the first request that puts an object of this name; the rest
    of `Server.at`.
    """
    left = [event]

    def at(method, address):
        return bool(method == "PUT" and address.endswith(name) and left and left.pop()())

    return at


# --- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("address", ["s3://bucket/files", "memory://bucket/files"])
@pytest.mark.usefixtures("server")
def test_objects_are_read_and_written_as_files(address):
    folder = path_of(address)
    path = folder / "a.npz"
    assert (str(path), path.stem, path.parent, folder.exists()) == (
        f"{address}/a.npz",
        "a",
        folder,
        False,
    )
    for name in ("a.npz", "b.txt", "deep/c.npz"):
        with replacing(folder / name) as incoming:
            incoming.write_text("grün\n", encoding="utf-8")
    with contextlib.suppress(ZeroDivisionError), replacing(path) as incoming:
        incoming.write_text(f"{1 / 0}")
    assert (folder.exists(), folder.is_dir(), folder.is_file(), path.is_file()) == (
        True,
        True,
        False,
        True,
    )
    assert list(folder.glob("*.npz")) == [path]
    assert path.read_text(encoding="utf-8") == "grün\n"
    assert len(path.read_bytes()) == 6
    path.unlink()
    assert not path.exists()
    with pytest.raises(FileNotFoundError, match=f"there is no {path}"):
        path.open("rb")


@pytest.mark.parametrize("address", ["s3://", "s3:///run", "file:///tmp/run", "s3://bucket//run"])
def test_an_address_with_an_empty_name_is_refused(address):
    with pytest.raises(ValueError, match=f"{address} has an empty name in it"):
        path_of(address)


def test_models_and_arrays_travel_through_a_bucket(workdir, on_disk, tmp_path):
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


# --- runs -----------------------------------------------------------------------------------------


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
    for command, folder in (
        ("sample --num=4 --certify=0", workdir),
        ("report", workdir),
        ("evaluate", workdir),
        ("evaluate", on_disk),
    ):
        capsys.readouterr()
        assert main([*command.split(), f"--workdir={folder}"]) == 0
        said.append(capsys.readouterr().out)
    assert said[-1] == said[-2]
    assert {"report.html", "report.json", "samples.npy", "samples.png"} <= {
        path.name for path in workdir.glob("*")
    }


def test_a_run_that_is_killed_in_uploads_resumes_to_the_same_bits(config, server, workdir, on_disk):
    def die_in_upload(name):
        server.at = when_put(name, lambda: process.kill() or True)
        process = start_training(server.environment, BEAT_S, "toy", str(workdir))
        process.join()
        assert process.exitcode == -signal.SIGKILL

    die_in_upload("config.json")
    die_in_upload("checkpoints/4.npz")
    job.train(config, workdir)
    runs.assert_ends_like(workdir, on_disk)


def test_training_goes_on_beside_an_upload_and_outlives_a_server_that_goes_away_in_it(
    config, server, workdir, on_disk, caplog
):
    went_on, waited, sentence = (
        threading.Event(),
        [],
        f"{workdir}/checkpoints/2.npz cannot be reached",
    )

    class GoesOn(ir.Callback):
        def after_step(self, run):
            if run.step == 3:
                went_on.set()

    leaving = when_put(
        "checkpoints/2.npz", lambda: waited.append(went_on.wait(10)) or True
    )  # the driver tries again after 15 s
    server.at = lambda *request: leaving(*request) or (bool(waited) and sentence not in caplog.text)
    job.train(config, workdir, callbacks=(GoesOn(),))
    assert waited == [True]
    assert sentence in caplog.text
    runs.assert_ends_like(workdir, on_disk)


CHEAP = {
    "model.stages": ({"num_blocks": 1, "hidden": (4,), "actnorm": False},),
    "logdet.kind": "exact",
}


def test_two_processes_of_one_run_write_one_folder(server, workdir, tmp_path):
    processes = start(2, [["toy", str(workdir), CHEAP]], tmp_path, environment=server.environment)
    assert [process.wait(240) for process in processes] == [0, 0]
    assert runs.newest(workdir) == runs.TOTAL_STEPS
    assert [address.rpartition("/")[2] for address in server.put].count("config.json") == 1
    assert not list(workdir.glob(".*"))


def test_a_run_that_blows_up_leaves_the_measurements_before(workdir):
    config = runs.config_of(
        runs.TOY_CONFIG,
        **CHEAP,
        **{"optimizer.learning_rate": 1e30, "training.eval_every_steps": 20},
    )
    with pytest.raises(BlowUpError):
        job.train(config, workdir)
    assert {record["step"] for record in read_metrics(workdir)} >= {1}
    assert not (workdir / "checkpoints").exists()


def test_a_damaged_checkpoint_is_stepped_over(server, workdir):
    state = {"w": np.arange(3.0, dtype=np.float32)}
    checkpoints = Store(workdir)
    server.at = lambda method, address: method == "GET" and address.endswith(".npz")
    for step in (1, 2):
        checkpoints.save(step, state)  # without reading one, which may be large
    server.at = lambda method, address: False
    with replacing(checkpoints.path(2)) as incoming:
        incoming.write_bytes(checkpoints.path(2).read_bytes()[:-30])
    [note] = checkpoints.restore(state).notes
    assert note.startswith(f"The checkpoint {workdir}/checkpoints/2.npz is damaged")
    server.at = lambda method, address: address.endswith("1.npz")
    # which says nothing of what is there
    with pytest.raises(ConnectionError, match="cannot be reached"):
        checkpoints.restore(state)


# --- what is refused ------------------------------------------------------------------------------


def test_one_process_at_a_time_trains_in_a_folder(config, server, workdir):
    with (
        locked(workdir / "training"),
        pytest.raises(ValueError, match=f"another process is training in {workdir}: "),
    ):
        job.train(config, workdir)

    def take_over():
        for _ in range(30):  # as one sign of life of the holder's may come in between
            with replacing(workdir / ".training.lock") as incoming:
                incoming.write_text("another 1\n")
            time.sleep(BEAT_S / 10)

    server.at = when_put("checkpoints/4.npz", take_over)
    with pytest.raises(OSError, match=f"another process has taken over {workdir}/.training.lock"):
        job.train(config, workdir)
    assert (workdir / ".training.lock").read_text() == "another 1\n"


def no_server(server):
    server.at = lambda *request: True


def wrong_credentials(server):
    server.permit_requests(0)


@pytest.mark.parametrize(
    ("folder", "fault", "sentence"),
    [
        ("nobucket/run", lambda server: None, "cannot be written, there is no such bucket"),
        ("bucket/run", no_server, "cannot be reached"),
        ("bucket/run", wrong_credentials, "is refused"),
    ],
)
def test_a_fault_is_one_sentence(server, tmp_path, capsys, folder, fault, sentence):
    (tmp_path / "config.py").write_text(runs.TOY_CONFIG)
    fault(server)
    assert runs.train_main(f"--config={tmp_path}/config.py", f"--workdir=s3://{folder}") == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert line.startswith(f"error: s3://{folder}")
    assert sentence in line
