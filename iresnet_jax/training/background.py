"""Writing beside training: calls that a thread makes one after the other."""

import contextlib
import functools
import queue
import threading
from collections.abc import Callable
from typing import Any


class Background(contextlib.AbstractContextManager["Background"]):
    """Makes calls in their order, beside the code of the ``with``, at whose end all are done.

    After a call that fails, those that wait are dropped, and its error is raised by the next one
    that is asked for, or at the end. An error of the ``with`` itself comes first, and Ctrl-C waits
    for nothing.
    """

    def __init__(self):
        self._calls: queue.Queue[Callable[[], Any] | None] = queue.Queue()
        self._failure: Exception | None = None
        threading.Thread(target=self._work, daemon=True).start()

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """Has a function called, later."""
        self._check()
        self._calls.put(functools.partial(function, *args, **kwargs))

    def wait(self) -> None:
        """Returns when all calls are done."""
        self._calls.join()
        self._check()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None or issubclass(kind, Exception):
            self._calls.join()
        self._calls.put(None)
        if kind is None:
            self._check()

    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            try:
                if self._failure is None:
                    call()
            except Exception as error:  # for the other thread to raise
                self._failure = error
            self._calls.task_done()
