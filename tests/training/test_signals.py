"""Ctrl-C and SIGTERM end a process in one sentence and the right status, whatever it is doing."""

import signal
import subprocess
import sys

import pytest

from iresnet_jax.training import signals
from iresnet_jax.training.signals import SIGNALS, StopRequests

pytestmark = pytest.mark.slow

# Read as a file, so that a process takes 0.1 s and not the second of importing JAX.
HEAD = f"""
import hashlib, os, runpy, signal, sys, threading, time
owner = runpy.run_path({signals.__file__!r})
names = "StopRequests", "Stopped", "end_at_signals"
StopRequests, Stopped, end_at_signals = (owner[name] for name in names)
ready = lambda: print("ready", flush=True)
# one call, in which threads run
native = lambda seconds: hashlib.pbkdf2_hmac("sha256", b"", b"", int(3e6 * seconds))

def until(condition):
    while not condition():
        time.sleep(0.001)

"""
MOST_S = 10.0  # how long a process may take to end; those that are not told to stop take a minute
OWNED = "end_at_signals('go on')\n"
NOTED = "SIGTERM: saving after this step; a second signal stops at once\n"


def run(program, *sent):
    """Status and output of a program that gets signals one after the other, each when it says
    that it is ready.
    """
    process = subprocess.Popen(
        [sys.executable, "-c", HEAD + program],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        for number in sent:
            assert process.stdout.readline() == "ready\n"
            process.send_signal(number)
        out, err = process.communicate(timeout=MOST_S)
    finally:
        process.kill()
    return process.returncode, out, err


LOOP = """
with StopRequests() as stop:
    ready()
    {wait}
    assert stop.received == signal.SIGTERM
    print("saved", flush=True)
    sys.exit(Stopped("", stop.received).status)
"""
# What the loop does, the signals that it gets meanwhile, and its status and output.
DEFERRED = [
    ("native(0.5)", [signal.SIGTERM], (143, "saved\n", NOTED)),
    (
        "until(lambda: stop.received); ready(); until(lambda: False)",
        [signal.SIGTERM, signal.SIGINT],
        (130, "", NOTED + "stopped by SIGINT: go on\n"),
    ),
    (  # the same signal at once again is no second one
        "until(lambda: stop.received); ready(); native(0.3)",
        [signal.SIGTERM] * 2,
        (143, "saved\n", NOTED),
    ),
]


@pytest.mark.parametrize(("wait", "sent", "end"), DEFERRED)
def test_a_loop_saves_first_and_the_second_signal_ends_it_at_once(wait, sent, end):
    assert run(OWNED + LOOP.format(wait=wait), *sent) == end


def test_training_in_memory_hears_an_interrupt_where_somebody_sits(monkeypatch):
    monkeypatch.delattr(sys, "ps1", raising=False)
    assert signals.heard_in_memory() == ()
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    assert signals.heard_in_memory() == (signal.SIGINT,)
    with signals.interrupts_raised():
        assert signals.heard_in_memory() == ()
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    with StopRequests(heard=signals.heard_in_memory()):
        assert signal.getsignal(signal.SIGTERM) is handlers[signal.SIGTERM]
        assert signal.getsignal(signal.SIGINT) is not handlers[signal.SIGINT]
