"""Requests to stop a process: by Ctrl-C, or by the SIGTERM that schedulers send some time before
they kill.

A library leaves signals to the program that calls it, but for one: who sits in front of a notebook
and interrupts `fit` wants the model. So `heard_in_memory` names Ctrl-C there, and nothing in a
script, which ends as Python's own code would.

Python runs handlers between its own instructions: during a compilation, a signal counts when the
compiler returns.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Collection, Iterator
from contextvars import ContextVar
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)
# the same signal within this time is the same request: timeout(1) signals a process and then its
# whole group
REPEAT_S = 1.0
# within `interrupts_raised`, of one thread of several
_raised: ContextVar[bool] = ContextVar("raised", default=False)


class Stopped(KeyboardInterrupt):
    """A run ended early because of the signal ``received``; ``message`` is a sentence for the
    user.
    """

    def __init__(self, message: str, received: signal.Signals):
        super().__init__(message)
        self.received = received
        self.status = 128 + received  # the exit status that shells give to the death by a signal


def end_at_signals(advice: str) -> None:
    """Makes Ctrl-C and SIGTERM end this process in one sentence, with status 130 or 143; ignored
    signals stay ignored.

    An exception would unwind through XLA, whose threads go on while the interpreter shuts down, and
    that crashes. Cutting a write short is safe: files are written under another name and renamed,
    as they must be to survive SIGKILL.

    Args:
        advice: What the sentence tells the user after "stopped by SIGINT: ".
    """

    def end(number: int, _: FrameType | None) -> None:
        say(f"stopped by {signal.Signals(number).name}: {advice}")
        os._exit(128 + number)

    for number in _not_ignored():
        signal.signal(number, end)


class StopRequests:
    """Within ``with``, the first signal is noted, so that a training loop can save and stop.

    A second signal does what it did before, such as to raise ``KeyboardInterrupt``. Ignored signals
    stay ignored. A thread that is not the main one notes nothing.

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

    def __init__(
        self,
        consequence: str = "saving after this step",
        heard: Collection[signal.Signals] = SIGNALS,
    ):
        self.received: signal.Signals | None = None
        self._consequence, self._heard, self._noted_at = consequence, heard, 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequests:
        if threading.current_thread() is threading.main_thread():
            self._before = {
                number: signal.signal(number, self._note)
                for number in _not_ignored()
                if number in self._heard
            }
        return self

    def __exit__(self, *exc_info: object) -> None:
        for number, before in self._before.items():
            signal.signal(number, signal.SIG_DFL if before is None else before)

    def _note(self, number: int, _: FrameType | None) -> None:
        if self.received is None:
            self.received, self._noted_at = signal.Signals(number), time.monotonic()
            say(f"{self.received.name}: {self._consequence}; a second signal stops at once")
        elif number != self.received or time.monotonic() > self._noted_at + REPEAT_S:
            self.__exit__()
            signal.raise_signal(number)


def heard_in_memory() -> tuple[signal.Signals, ...]:
    """Signals that training in memory notes: Ctrl-C where somebody sits, at Python's prompt or
    in a notebook; else none.
    """
    return (signal.SIGINT,) if hasattr(sys, "ps1") and not _raised.get() else ()


@contextlib.contextmanager
def interrupts_raised() -> Iterator[None]:
    """Within ``with``, Ctrl-C is a ``KeyboardInterrupt`` in a notebook, too, which ends a search
    and not one of its fits.
    """
    before = _raised.set(True)
    try:
        yield
    finally:
        _raised.reset(before)


def _not_ignored() -> list[signal.Signals]:
    return [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]


def say(sentence: str) -> None:
    """Writes a line past Python's buffers, whose locks the interrupted code may hold; below a
    progress bar, not into it.
    """
    with contextlib.suppress(OSError):
        os.write(2, f"{chr(10) if os.isatty(2) else ''}{sentence}\n".encode())
