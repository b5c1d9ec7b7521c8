"""Worker processes of `peers.py`, from the parent's side: started, asked in turns, and stopped."""

import contextlib
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from _record import Timing

WORKER = Path(__file__).with_name("_peers_worker.py")
MEMORY_SETTINGS = ("MALLOC_", "GLIBC_TUNABLES")  # of the environment: the peers' memory is that of their defaults

LEAST_TURNS = 3


class Worker:
    """A process that runs one case; see `_peers_worker` for what it is told."""

    def __init__(self, cores, module, case, arguments, environment=None):
        environment = {name: value for name, value in os.environ.items() if not name.startswith(MEMORY_SETTINGS)} | (
            environment or {}
        )
        self._name, self._errors = f"{case} of {module}", tempfile.TemporaryFile("w+")
        read, written = os.pipe()  # a channel of its own: libraries print, and a process may start itself again
        self._answers = os.fdopen(read)
        told = {"cores": cores, "module": module, "case": case, "arguments": arguments, "answers": written}
        began = time.perf_counter()
        self._process = subprocess.Popen(
            [sys.executable, str(WORKER), json.dumps(told)],
            stdin=subprocess.PIPE,
            stdout=self._errors,
            stderr=self._errors,
            text=True,
            env=environment,
            pass_fds=[written],
        )
        os.close(written)
        try:
            self._answer()
        except BaseException:
            self.stop()
            raise
        self.ready_s = time.perf_counter() - began  # from the start of the process until the case was made

    def ask(self, method, **arguments):
        """The answer of a method of the case."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([method, arguments]) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self):
        line = self._answers.readline()
        if not line:
            self._process.wait(60)  # until it has said why
            self._errors.seek(0)
            raise RuntimeError(f"the process of {self._name} ended:\n{self._errors.read()[-3000:]}")
        return json.loads(line)

    def stop(self):
        """Ends the process, if it has not ended."""
        if self._errors.closed:
            return
        self._process.kill()
        self._process.communicate()
        self._answers.close()
        self._errors.close()


@contextlib.contextmanager
def workers():
    """A function that starts workers, all of which end with the context."""
    started = []

    def start(*arguments, **settings):
        started.append(Worker(*arguments, **settings))
        return started[-1]

    try:
        yield start
    finally:
        for worker in started:
            worker.stop()


def take_turns(asked, *, turns, seconds_a_turn, most_seconds=math.inf):
    """Seconds of one unit of work of every worker, in turns.

    Args:
        asked: ``num ->`` seconds of each of ``num`` units, by name.
        turns: Measurements of each, after one that is not counted.
        seconds_a_turn: About what a measurement takes.
        most_seconds: Stops early, but not before `LEAST_TURNS`.
    """
    once = {name: ask(1) for name, ask in asked.items()}
    nums = {name: max(round(seconds_a_turn / seconds), 1) for name, seconds in once.items()}
    measured = {name: [] for name in asked}
    began = time.perf_counter()
    for turn in range(turns):
        if turn >= LEAST_TURNS and time.perf_counter() - began > most_seconds:
            break
        for name, ask in asked.items():
            measured[name].append(ask(nums[name]))
    return {name: Timing(tuple(seconds)) for name, seconds in measured.items()}


@contextlib.contextmanager
def pinned(cores):
    """This process, and those that it starts, on some cores, where the system can."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def core_counts():
    """Cores of cases on one core and on two, by their number; one core alone where there is no other."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    return {count: cores[:count] for count in (1, 2) if count <= len(cores)}
