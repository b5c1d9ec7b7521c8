"""Measurements of a run as JSON lines and TensorBoard events, and a progress bar."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, SupportsFloat

from iresnet_jax.atomic_files import replacing

FILENAME = "metrics.jsonl"
_RESERVED = ("step", "split", "wall_time_s")


class MetricWriter(contextlib.AbstractContextManager["MetricWriter"]):
    """Appends measurements to ``workdir/metrics.jsonl`` and to TensorBoard events in ``workdir/tensorboard``.

    A line is ``{"step": 100, "split": "train", "wall_time_s": 12.5, "loss": 3.2}``. ``wall_time_s`` counts seconds of
    training over all processes of the run. Every line is flushed at once: a killed process loses at most the line that it was
    writing. Non-finite values are written as Python's ``NaN`` and ``Infinity``.

    Args:
        workdir: Folder of the run, created if needed.

    Raises:
        ValueError: If the folder has measurements that cannot be read, see `read_metrics`.
    """

    def __init__(self, workdir: str | os.PathLike[str]):
        self._began = time.monotonic()
        self._workdir = Path(workdir)
        self._workdir.mkdir(parents=True, exist_ok=True)
        self._path = self._workdir / FILENAME
        self._purge_step: int | None = None
        self._events: Any = None
        self._keep_lines(lambda _: True)

    def write(self, step: int, metrics: Mapping[str, SupportsFloat], *, split: str = "train") -> None:
        """Appends one measurement, scalars by name, of data such as "train" or "test" after so many updates.

        Raises:
            ValueError: If a metric is called "step", "split" or "wall_time_s".
        """
        if clash := [name for name in metrics if name in _RESERVED]:
            raise ValueError(f"a metric cannot be called {clash[0]!r}, which every line has: rename it")
        values = {name: float(value) for name, value in metrics.items()}
        wall_time_s = round(time.monotonic() - self._start, 3)
        record = {"step": int(step), "split": split, "wall_time_s": wall_time_s, **values}
        try:
            self._lines.write(json.dumps(record) + "\n")
            self._lines.flush()
            self._write_event(int(step), {f"{split}/{name}": value for name, value in values.items()})
        except OSError as error:
            reason = error.strerror or error
            message = f"{self._workdir} cannot be written to ({reason}): free disk space, then give the command again"
            raise OSError(message) from error

    @property
    def elapsed_s(self) -> float:
        """Seconds of training so far, over all processes of the run."""
        return time.monotonic() - self._start

    def truncate_after(self, step: int) -> None:
        """Drops the measurements of steps after ``step``: a run that resumes there measures them again."""
        self.close()
        self._keep_lines(lambda record: record["step"] <= step)
        self._purge_step = step + 1

    def close(self) -> None:
        """Closes the files, as leaving ``with`` does; all that could be written is there already."""
        for file in (self._lines, self._events):
            with contextlib.suppress(OSError):  # of a full disk, which `write` has told of
                if file is not None:
                    file.close()
        self._events = None

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _keep_lines(self, keep: Callable[[dict[str, Any]], bool]) -> None:
        """Opens the file for appending after the lines to keep, without a half-written last line."""
        records = [record for record in read_metrics(self._workdir) if keep(record)]
        text = "".join(json.dumps(record) + "\n" for record in records)
        if self._path.exists() and self._path.read_bytes() != text.encode():
            with replacing(self._path) as incoming:
                incoming.write_text(text, encoding="utf-8")
        self._lines = self._path.open("a", encoding="utf-8")
        self._start = self._began - max((record["wall_time_s"] for record in records), default=0.0)

    def _write_event(self, step: int, values: Mapping[str, float]) -> None:
        # Imported late: it takes longer than the rest of this module. `SummaryWriter` has a thread that a full disk ends, and
        # then waits for it for ever.
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]: made at run time
        from tensorboardX.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]

        if self._events is None:
            folder = self._workdir / "tensorboard"
            folder.mkdir(exist_ok=True)
            self._events = EventsWriter(str(folder / "events"))
            if self._purge_step is not None:  # from where on TensorBoard discards older events
                self._events.write_event(Event(step=self._purge_step, session_log=SessionLog(status=SessionLog.START)))
        scalars = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._events.write_event(Event(wall_time=time.time(), step=step, summary=Summary(value=scalars)))
        self._events.flush()


def read_metrics(workdir: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Reads what `MetricWriter` wrote, in that order.

    A half-written last line, left by a killed process, is skipped.

    Args:
        workdir: Folder of the run; without measurements the list is empty.

    Raises:
        ValueError: If another line is not a measurement.
    """
    path = Path(workdir) / FILENAME
    lines = path.read_bytes().splitlines() if path.exists() else []
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            records.append({**{name: record[name] for name in _RESERVED}, **record})
        except (ValueError, TypeError, KeyError):  # not JSON, not UTF-8, not an object, or without a field that all have
            if number < len(lines):
                raise ValueError(f"line {number} of {path} is not a measurement: delete or repair that line") from None
    return records


class Progress(contextlib.AbstractContextManager["Progress"]):
    """A progress bar with the newest measurements, the time of a step and the time left, if stderr is a terminal.

    Args:
        total_steps: Updates in the whole run, as far as is known.
        initial_step: Updates done by earlier processes; the time left does not count them.
        shown: Whether there is a bar on a terminal.
    """

    def __init__(self, total_steps: int, initial_step: int = 0, *, shown: bool = True):
        from tqdm import tqdm  # late, as above

        layout = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"
        disable = None if shown else True  # None asks whether there is a terminal
        self._bar = tqdm(
            total=total_steps, initial=initial_step, unit="step", bar_format=layout, disable=disable, dynamic_ncols=True
        )

    def update(self, step: int, total_steps: int, values: Mapping[str, SupportsFloat]) -> None:
        """Moves the bar to ``step`` of ``total_steps`` and shows ``values``, once that step's results are on the host."""
        self._bar.total = total_steps
        self._bar.set_postfix_str(", ".join(f"{name} {float(value):.4g}" for name, value in values.items()), refresh=False)
        self._bar.update(step - self._bar.n)
        self._bar.refresh()

    def __exit__(self, *exc_info: object) -> None:
        self._bar.close()


class Lines:
    """Lines of progress on stderr, each with the seconds since it was made."""

    def __init__(self):
        self._began = time.monotonic()

    def __call__(self, line: str) -> None:
        """Writes a line."""
        sys.stderr.write(f"[{time.monotonic() - self._began:5.0f} s] {line}\n")  # at once: threads may write lines beside
        sys.stderr.flush()
