"""Processes of a run, forked from one that has imported the library, which takes two seconds."""

import gc
import itertools
import multiprocessing
import os
import signal
import socket
import sys
import warnings

import pytest
import tiny_runs as runs

from iresnet_jax.runs import hosts
from iresnet_jax.runs.job import train
from iresnet_jax.training import checkpoints, signals

FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(["one_of_several", "tensorboardX"])
FOLDERS = (runs.ROOT, runs.ROOT / "tests")


class OneOfSeveral:
    """A process that trains with the arguments of `work`, its stderr in a folder's file."""

    def __init__(self, folder, *arguments):
        folder.mkdir(parents=True, exist_ok=True)
        self._stderr = folder / "stderr"
        self._process = _forked(work, str(self._stderr), *arguments)

    def send_signal(self, number: signal.Signals) -> None:
        assert self._process.pid is not None
        os.kill(self._process.pid, number)

    def poll(self) -> int | None:
        """The exit status, as `subprocess.Popen` gives it; None while the process runs."""
        return self._process.exitcode

    def wait(self, timeout_s: float) -> int:
        """The exit status of the process, which has to end in time."""
        self._process.join(timeout_s)
        assert self._process.exitcode is not None, (
            f"after {timeout_s} s it still runs, and has said {self.said()}"
        )
        return self._process.exitcode

    def said(self) -> list[str]:
        """Lines on stderr."""
        return self._stderr.read_text().splitlines() if self._stderr.exists() else []


def start(num_processes, trainings, folder, *, other=None):
    """Starts all processes of trainings one after the other; process 1 may begin with another."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    started = []
    for process in range(num_processes):
        own = [other, *trainings[1:]] if process == 1 and other else trainings
        arguments = address, num_processes, process, own
        started.append(OneOfSeveral(folder / f"process{process}", *arguments))
    return started


def work(stderr, address, num_processes, process, trainings):
    """Trains as one of several processes."""
    os.dup2(os.open(stderr, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    others = [flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag]
    os.environ["XLA_FLAGS"] = " ".join([*others, "--xla_force_host_platform_device_count=1"])
    warnings.simplefilter("ignore")
    gc.set_threshold(50_000, 20, 100)  # makes tracing faster
    signals.end_at_signals("the same command goes on")

    def run():
        hosts.initialize(address, num_processes, process)
        with hosts.ending_together():
            for name, workdir, changes in trainings:
                train(runs.config_of(runs.CONFIGS[name], **changes), workdir)
        return 0

    sys.exit(hosts.explain_failures(run))


def status_of_one_killed_in_a_save(name, workdir, call):
    """The exit status of a training that is killed in its so many-th save."""
    process = _forked(_die_in_a_save, name, workdir, call)
    process.join()
    return process.exitcode


def _forked(target, *arguments):
    # the path is for the process that is forked, which the first of all starts
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(map(str, FOLDERS)))
        process = FORKSERVER.Process(target=target, args=arguments, daemon=True)
        process.start()
    return process


def _die_in_a_save(name, workdir, call):
    calls, to_named = itertools.count(1), checkpoints.to_named

    def deadly(state):
        if next(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return to_named(state)

    checkpoints.to_named = deadly
    train(runs.config_of(runs.CONFIGS[name]), workdir)
