"""How a training run is told to stop: by Ctrl-C, or by the SIGTERM that schedulers send some time before they kill."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

from absl import logging

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(KeyboardInterrupt):
    """A run ended early because it was told to, and has saved how far it came.

    Args:
        message: A sentence for the user.
        received: The signal that told it.
    """

    def __init__(self, message: str, received: signal.Signals):
        super().__init__(message)
        self.status = 128 + received  # the exit status that shells give to the death by a signal


class StopRequests:
    """Within ``with``, notes the first signal to stop instead of dying of it; the second interrupts at once.

    Signals that the process was told to ignore stay ignored, and outside of the main thread, which alone hears of signals, none
    is noted.

    Attributes:
        received: The signal, or None.

    Example:
        >>> with StopRequests() as stop:
        ...     while stop.received is None:
        ...         break
    """

    def __init__(self):
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequests:
        if threading.current_thread() is threading.main_thread():
            heard = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
            self._before = {number: signal.signal(number, self._note) for number in heard}
        return self

    def __exit__(self, *exc_info: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)
        logging.info("%s: saving after this step; a second one stops at once", self.received.name)
