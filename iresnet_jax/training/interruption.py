"""How a process is told to stop: by Ctrl-C, or by the SIGTERM that schedulers send some time before they kill.

A program calls `take_over` first. From then on a signal ends it at once, in one sentence and with the status that shells give
to the death by that signal; only a training loop that holds steps which are not on disk finishes and saves the one it is in.

Ending at once is `os._exit` from a thread of its own. An exception would wait for native code, which compiles for minutes, and
then take Python down while XLA's threads still run, which crashes. Nothing is lost: files are written
whole (`files.replacing`), and the system frees the lock of a run, as after the SIGKILL that the tests send.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import FrameType
from typing import Any

from absl import logging

SIGNALS = (signal.SIGINT, signal.SIGTERM)

_loop: StopRequests | None = None  # the training loop that runs
_taken_over = False


class Stopped(KeyboardInterrupt):
    """A run ended early because it was told to, and has saved how far it came.

    Args:
        message: A sentence for the user.
        received: The signal that told it.
    """

    def __init__(self, message: str, received: signal.Signals):
        super().__init__(message)
        self.status = 128 + received


def take_over(hint: str) -> None:
    """Makes this process end in a sentence at SIGINT and SIGTERM, whatever it is doing; those that are ignored stay ignored.

    Args:
        hint: What the sentence says behind "stopped by SIGTERM: ".
    """
    global _taken_over
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)  # written to at once, even while native code runs
    for number in _heard():
        signal.signal(number, lambda *_: None)
    threading.Thread(target=_watch, args=(reading, hint), daemon=True, name="signals").start()
    _taken_over = True


def _watch(reading: int, hint: str) -> None:
    while True:
        for number in os.read(reading, 64):
            if number in SIGNALS and not (_loop and _loop.takes(signal.Signals(number))):
                exit_at_once(signal.Signals(number), hint)


def exit_at_once(received: signal.Signals, hint: str) -> None:
    """Ends the process with a sentence, past everything that Python does at its end."""
    sentence = f"stopped by {received.name}: {hint}\n"
    os.write(2, ("\n" * sys.__stderr__.isatty() + sentence).encode() if sys.__stderr__ else b"")
    os._exit(128 + received)


class StopRequests:
    """Within ``with``, the first signal is noted for a training loop to save and stop; the second interrupts at once.

    Signals that the process was told to ignore stay ignored, and outside of the main thread, which alone hears of signals, none
    is noted.

    Attributes:
        received: The signal, or None.
        unsaved: Whether the loop holds steps that are not on disk. In a process that was taken over, a signal ends it at once
            otherwise.

    Example:
        >>> with StopRequests() as stop:
        ...     while stop.received is None:
        ...         break
    """

    def __init__(self):
        self.received: signal.Signals | None = None
        self.unsaved = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequests:
        global _loop
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in _heard()}
            _loop = self
        return self

    def __exit__(self, *exc_info: object) -> None:
        global _loop
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        _loop = None if _loop is self else _loop

    def takes(self, number: signal.Signals) -> bool:
        """Notes a signal if it is the first and there is something to save; otherwise False."""
        if self.received is not None or not self.unsaved:
            return False
        self.received = number
        logging.info("%s: saving after this step; a second one stops at once", number.name)
        return True

    def _note(self, number: int, _: FrameType | None) -> None:
        if _taken_over:  # `_watch` sees to it
            return
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)
        logging.info("%s: saving after this step; a second one stops at once", self.received.name)


def _heard() -> list[signal.Signals]:
    return [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
