"""Processes meet before JAX joins them; whatever goes wrong there is a sentence in all of them, soon."""

import concurrent.futures
import http.server
import socket
import threading
import time

import pytest

from iresnet_jax.runs import meeting
from iresnet_jax.runs.meeting import meet

SOON_S = 0.3
LONG_S = 20.0


@pytest.fixture
def address(monkeypatch):
    """Where process 0 listens, of processes that soon lose their patience."""
    monkeypatch.setattr(meeting, "PATIENCE_S", SOON_S)
    monkeypatch.setattr(meeting, "_RETRY_S", 0.02)
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return f"localhost:{probe.getsockname()[1]}"


def ends_of(address, *processes, timeout_s=LONG_S):
    """How each of some processes ends, given as (number of processes, own number): None, or its sentence."""

    def end(num_processes, process):
        try:
            meet(address, num_processes, process, timeout_s)
        except RuntimeError as error:
            return str(error)
        return None

    with concurrent.futures.ThreadPoolExecutor(len(processes)) as pool:
        return list(pool.map(end, *zip(*processes, strict=True)))


def test_processes_that_are_all_there_go_on_and_the_port_is_free_again(address):
    for _ in range(2):
        assert ends_of(address, (3, 2), (3, 0), (3, 1)) == [None] * 3
    socket.create_server(("", int(address.rpartition(":")[2]))).close()
    assert ends_of("localhost:1", (1, 0)) == [None]


def test_who_does_not_come_is_named(address, capfd):
    [end] = ends_of(address, (2, 1), timeout_s=SOON_S)
    assert f"process 0 was not met at {address}" in end
    assert "refused" in end
    found = ends_of(address, (4, 0), (4, 2), timeout_s=2 * SOON_S)
    assert all("processes 1, 3 of 4 did not come" in end for end in found)
    assert "for processes 1, 3 of 4, at most" in capfd.readouterr().err


def test_the_same_number_twice_ends_all_before_the_start(address):
    assert all("two processes have --process_id 1" in end for end in ends_of(address, (3, 0), (3, 1), (3, 1)))
    assert all("process 1 was told --num_processes 2" in end for end in ends_of(address, (3, 0), (2, 1)))


def test_a_process_that_is_started_again_replaces_the_one_that_ended(address):
    host, port = address.split(":")
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        first = pool.submit(ends_of, address, (2, 0))
        while True:
            try:
                gone = socket.create_connection((host, int(port)))
                break
            except OSError:
                time.sleep(0.01)
        gone.sendall(b'{"process": 1, "of": 2')  # it ends in the middle of a message
        gone.close()
        assert ends_of(address, (2, 1)) == [None]
        assert first.result() == [None]


@pytest.mark.parametrize("answers", [False, True])
def test_a_port_of_another_program_is_said_to_be_one(address, answers, monkeypatch):
    monkeypatch.setattr(meeting, "_ANSWER_S", 0.1)
    port = int(address.rpartition(":")[2])
    server = http.server.HTTPServer(("localhost", port), http.server.BaseHTTPRequestHandler)
    if answers:
        monkeypatch.setattr(http.server.BaseHTTPRequestHandler, "log_message", lambda *_: None)
        threading.Thread(target=server.serve_forever, daemon=True, kwargs={"poll_interval": 0.01}).start()
    try:
        first, second = ends_of(address, (2, 0), (2, 1))
    finally:
        if answers:
            server.shutdown()
        server.server_close()
    assert f"process 0 cannot listen at port {port}" in first
    assert "another program listens there, or a run that goes on already" in second


@pytest.mark.parametrize("wrong", ["node1", ":1234", "node1:", "node1:99999", "node1:x"])
def test_an_address_that_is_none_is_refused(wrong):
    with pytest.raises(ValueError, match="must be HOST:PORT of process 0"):
        meet(wrong, 2, 0, LONG_S)
