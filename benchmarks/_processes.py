"""Worker processes: pinned to cores before they import anything, asked for work line by line, and
stopped.

    python _processes.py '{"cores": [0], "module": "_steps", "case": "OurSteps", "arguments": {...},
    "answers": 5}'

is such a process. It makes a case of a module beside this one and says so; then the parent writes
lines of JSON, ``[method, arguments]``, and reads a line for each from the file descriptor
``answers``. Nothing but the standard library is imported here, so that the memory of a process is
its case's own.
"""

import contextlib
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time

# of the environment: workers have the defaults, unless they are given others
MEMORY_SETTINGS = ("MALLOC_", "GLIBC_TUNABLES")


class Worker:
    """A process that runs ``case(**arguments)`` of a module on some cores (None: all), with some
    variables set.
    """

    def __init__(self, cores, module, case, arguments, environment=None):
        inherited = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(MEMORY_SETTINGS)
        }
        self._name, self._errors = f"{case} of {module}", tempfile.TemporaryFile("w+")
        read, written = os.pipe()  # a channel of its own: libraries print
        self._answers = os.fdopen(read)
        told = {
            "cores": cores,
            "module": module,
            "case": case,
            "arguments": arguments,
            "answers": written,
        }
        began = time.perf_counter()
        self._process = subprocess.Popen(
            [sys.executable, __file__, json.dumps(told)],
            stdin=subprocess.PIPE,
            stdout=self._errors,
            stderr=self._errors,
            text=True,
            env=inherited | (environment or {}),
            pass_fds=[written],
        )
        os.close(written)
        try:
            self._answer()
        except BaseException:
            self.stop()
            raise
        # from the start of the process until the case was made
        self.ready_s = time.perf_counter() - began

    def ask(self, method, **arguments):
        """The answer of a method of the case; ``RuntimeError`` with the last words of the
        process if it ends instead.
        """
        assert self._process.stdin is not None
        print(json.dumps([method, arguments]), file=self._process.stdin, flush=True)
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
        if not self._errors.closed:
            self._process.kill()
            self._process.communicate()
            self._answers.close()
            self._errors.close()


@contextlib.contextmanager
def workers():
    """`Worker`, but that all end with the context."""
    with contextlib.ExitStack() as stack:

        def start(*arguments):
            worker = Worker(*arguments)
            stack.callback(worker.stop)
            return worker

        yield start


def core_counts():
    """Cores of cases on one core and on two, by their number; one core alone where there is no
    other.
    """
    cores = (
        sorted(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else list(range(os.cpu_count() or 1))
    )
    return {count: cores[:count] for count in (1, 2) if count <= len(cores)}


def most_cores():
    """All cores that are compared."""
    return max(core_counts().values(), key=len)


def pin(cores):
    """Lets this process, and those that it starts, use some cores alone, where the system can."""
    if cores is not None and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)


def main():
    """Works as a process of one case."""
    told = json.loads(sys.argv[1])
    pin(told["cores"])
    case = getattr(importlib.import_module(told["module"]), told["case"])(**told["arguments"])
    with open(told["answers"], "w") as answers:
        print("null", file=answers, flush=True)
        for line in sys.stdin:
            method, arguments = json.loads(line)
            print(json.dumps(getattr(case, method)(**arguments)), file=answers, flush=True)


if __name__ == "__main__":
    main()
