"""Programs in processes that need not import anything: forks of one that has imported the library and started no device.

Its imports take a core two seconds, those of a fork none.
"""

import multiprocessing
import os
import runpy
import signal
import sys
import warnings
from pathlib import Path

import pytest
from tiny_runs import ROOT

FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(
    [
        "tiny_runs",
        "tensorboardX",
        "iresnet_jax.runs.trained_run",
        "iresnet_jax.report.report",
        "scipy.stats",
        "sklearn.metrics",
    ]
)


class Forked:
    """``python FILE ARGUMENTS`` with warnings ignored; what it writes on its standard streams goes to files.

    Args:
        file: The program, which runs as ``__main__``.
        arguments: Its command line.
        folder: Where to keep ``stdout`` and ``stderr``.
        environment: Variables to set, which JAX reads when it starts its devices; it has read those for imports.
    """

    def __init__(self, file: Path, *arguments: str, folder: Path, **environment: str):
        folder.mkdir(parents=True, exist_ok=True)
        self._stderr = folder / "stderr"
        self._process = FORKSERVER.Process(target=_run, args=(str(file), arguments, str(folder), environment), daemon=True)
        with pytest.MonkeyPatch.context() as patch:  # for the process that is forked, which the first of all starts
            patch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{ROOT / 'tests'}")
            self._process.start()

    def send_signal(self, number: signal.Signals) -> None:
        assert self._process.pid is not None
        os.kill(self._process.pid, number)

    def poll(self) -> int | None:
        """The exit status, as `subprocess.Popen` gives it; None while the process runs."""
        return self._process.exitcode

    def wait(self, timeout_s: float) -> int:
        """The exit status of the process, which has to end in time."""
        self._process.join(timeout_s)
        assert self._process.exitcode is not None, f"after {timeout_s} s it still runs, and has said {self.said()}"
        return self._process.exitcode

    def said(self) -> list[str]:
        """Lines on stderr."""
        return self._stderr.read_text().splitlines() if self._stderr.exists() else []


def _run(file: str, arguments: tuple[str, ...], folder: str, environment: dict[str, str]) -> None:
    for stream, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{folder}/{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    os.environ.update(environment)
    warnings.simplefilter("ignore")
    sys.argv = [file, *arguments]
    runpy.run_path(file, run_name="__main__")
