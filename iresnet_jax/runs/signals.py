"""How a process is told to stop: by Ctrl-C, or by the SIGTERM that schedulers send some time before they kill.

A library leaves signals to the program that calls it, but for one: who sits in front of a notebook and interrupts `fit` wants
the model. So `heard_in_memory` names Ctrl-C there, and nothing in a script, which ends as Python's own code would.

A command line calls `end_at_signals` first: from then on a signal ends the process in one sentence, whatever it is doing.
The training loop defers that with `StopRequests` while it holds steps that are not on disk.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Collection, Iterator
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)
INSIST_S = 10.0  # a signal within this time of one that was noted stops at once, whatever runs by then
REPEAT_S = 1.0  # the same signal within this time is the same request: timeout(1) signals a process and then its whole group

# Orders to the watcher, in the pipe that the numbers of signals go through: no signal has these numbers.
_DEFER, _RESUME = 254, 255
_raised = False  # within `interrupts_raised`
_pipe: int | None = None  # where to write orders; None where nobody called `end_at_signals`


class Stopped(KeyboardInterrupt):
    """A run ended early because of the signal ``received``; ``message`` is a sentence for the user."""

    def __init__(self, message: str, received: signal.Signals):
        super().__init__(message)
        self.received = received
        self.status = 128 + received  # the exit status that shells give to the death by a signal


def end_at_signals(advice: str = "") -> None:
    """Makes Ctrl-C and SIGTERM end this process in one sentence, with status 130 or 143; call it once, in the main thread.

    Python runs its handlers when native code returns: after minutes, if it compiles. An exception raised there unwinds through
    XLA, whose threads go on compiling while the interpreter shuts down, and that crashes. So a thread waits for the signal and
    leaves by `os._exit`, which runs no destructor. Cutting a write short is safe: files are written under another name
    and renamed, as they must be to survive SIGKILL.

    Ignored signals stay ignored.

    Args:
        advice: What the sentence tells the user after "stopped by SIGINT: ".
    """
    global _pipe
    reading, _pipe = os.pipe()
    os.set_blocking(_pipe, False)
    signal.set_wakeup_fd(_pipe, warn_on_full_buffer=False)
    for number in _not_ignored():
        signal.signal(number, _leave_to_the_watcher)
    threading.Thread(target=_watch, args=(reading, advice), name="signals", daemon=True).start()


class StopRequests:
    """Within ``with``, the first signal is noted, so that a training loop can save and stop; the second one stops at once.

    In a process that called `end_at_signals`, a signal is noted while ``unsaved`` is True; any other one ends the process. In
    other processes, such as a notebook, the first signal is always noted and the second raises ``KeyboardInterrupt``. Within
    `INSIST_S` it does so in a later ``with``, too, so that a loop of trainings ends. Ignored signals stay ignored. A thread
    that is not the main one notes nothing.

    Args:
        consequence: What the user is told to follow from the first signal.
        heard: Signals to note; others do what they did before.

    Attributes:
        received: The first signal, or None.

    Example:
        >>> with StopRequests() as stop:
        ...     while stop.received is None:
        ...         break
    """

    _noted_at = -math.inf  # when the last signal was noted, in this ``with`` or an earlier one

    def __init__(self, consequence: str = "saving after this step", heard: Collection[signal.Signals] = SIGNALS):
        self._consequence, self._heard = consequence, heard
        self.received: signal.Signals | None = None
        self._unsaved = False
        self._before: dict[signal.Signals, Any] = {}

    @property
    def unsaved(self) -> bool:
        """Whether the loop holds steps that are not on disk; the loop sets it."""
        return self._unsaved

    @unsaved.setter
    def unsaved(self, unsaved: bool) -> None:
        if unsaved != self._unsaved and _pipe is not None and self._before:
            os.write(_pipe, bytes([_DEFER if unsaved else _RESUME]))
        self._unsaved = unsaved

    def __enter__(self) -> StopRequests:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in _not_ignored() if number in self._heard}
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.unsaved = False
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        since, is_first = time.monotonic() - StopRequests._noted_at, self.received is None
        if is_first and (self.unsaved or (_pipe is None and since > INSIST_S)):
            self.received, StopRequests._noted_at = signal.Signals(number), time.monotonic()
            say(f"{self.received.name}: {self._consequence}; a second signal stops at once")
        elif _pipe is None and (is_first or number != self.received or since > REPEAT_S):
            raise KeyboardInterrupt


def heard_in_memory() -> tuple[signal.Signals, ...]:
    """Signals that training in memory notes: Ctrl-C where somebody sits, at Python's prompt or in a notebook; else none."""
    return (signal.SIGINT,) if is_interactive() else ()


def is_interactive() -> bool:
    """Whether somebody sits at Python's prompt or in a notebook, and no caller has asked for interrupts."""
    return hasattr(sys, "ps1") and not _raised


@contextlib.contextmanager
def interrupts_raised() -> Iterator[None]:
    """Within ``with``, Ctrl-C is a ``KeyboardInterrupt`` in a notebook, too, which ends a search and not one of its fits."""
    global _raised
    before, _raised = _raised, True
    try:
        yield
    finally:
        _raised = before


def _watch(reading: int, advice: str) -> None:
    """Ends the process at a signal that is not deferred, or at the second one that is.

    Signals and orders come through one pipe, so their order in time decides, however late this thread gets to run.
    """
    deferred, noted, noted_at = False, 0, 0.0
    while True:
        [number] = os.read(reading, 1)
        if number in (_DEFER, _RESUME):
            deferred, noted = number == _DEFER, 0
        elif number in SIGNALS and deferred and not noted:
            noted, noted_at = number, time.monotonic()
        elif number in SIGNALS and not (number == noted and time.monotonic() < noted_at + REPEAT_S):
            say(f"stopped by {signal.Signals(number).name}" + (f": {advice}" if advice else ""))
            os._exit(128 + number)


def _not_ignored() -> list[signal.Signals]:
    return [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]


def _leave_to_the_watcher(number: int, _: FrameType | None) -> None:
    """Does nothing: with a handler of Python's, a signal's number is written to the pipe."""


def say(sentence: str) -> None:
    """Writes a line past Python's buffers, whose locks the interrupted code may hold; below a progress bar, not into it."""
    with contextlib.suppress(OSError):
        os.write(2, f"{chr(10) if os.isatty(2) else ''}{sentence}\n".encode())
