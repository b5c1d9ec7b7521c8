"""Measurements of a run as JSON lines and TensorBoard events, and a progress bar."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, SupportsFloat

from iresnet_jax.atomic_files import growing, replacing

FILENAME = "metrics.jsonl"
_RESERVED = ("step", "split", "wall_time_s")


class MetricWriter(contextlib.AbstractContextManager["MetricWriter"]):
    """Appends measurements to ``workdir/metrics.jsonl`` and to TensorBoard events in
    ``workdir/tensorboard``.

    A line is ``{"step": 100, "split": "train", "wall_time_s": 12.5, "loss": 3.2}``. Every line is
    flushed at once: a killed process loses at most the line that it was writing. A bucket has the
    lines until the last `publish`. Non-finite values are written as Python's ``NaN`` and
    ``Infinity``.

    Args:
        workdir: Folder of the run.
        step: Finished updates of the state that the run goes on from; measurements of later steps
            are dropped.

    Attributes:
        kept: Measurements that led to this state.
        publish: Function that puts all lines in a bucket; on a disk it does nothing, see
            `atomic_files.growing`.

    Raises:
        ValueError: If the folder has measurements that cannot be read, see `read_metrics`.
    """

    def __init__(self, workdir: Path, step: int = 0):
        self._workdir, self._step = workdir, step
        self.kept = [record for record in read_metrics(workdir) if record["step"] <= step]
        self._stack = contextlib.ExitStack()
        self._folder, self.publish = self._stack.enter_context(growing(workdir))
        path = self._folder / FILENAME
        with replacing(path) as incoming:
            incoming.write_text(
                "".join(json.dumps(record) + "\n" for record in self.kept), encoding="utf-8"
            )
        self._lines, self._events = path.open("a", encoding="utf-8"), None

    def write(self, record: Mapping[str, Any]) -> None:
        """Appends one measurement: step, split, time of training so far, and scalars by name.

        Raises:
            OSError: If the disk is full.
        """
        try:
            self._lines.write(json.dumps(dict(record)) + "\n")
            self._lines.flush()
            self._write_event(record)
        except OSError as error:
            reason = error.strerror or error
            message = (
                f"{self._workdir} cannot be written to ({reason}): free disk space, then "
                "give the command again"
            )
            raise OSError(message) from error

    def __exit__(self, *exc_info: object) -> None:
        with self._stack:
            for file in (self._lines, self._events):
                with contextlib.suppress(OSError):  # of a full disk, which `write` has told of
                    if file is not None:
                        file.close()

    def _write_event(self, record: Mapping[str, Any]) -> None:
        # Imported late: it takes longer than the rest of this module. `SummaryWriter` has a thread
        # that a full disk ends, and then waits for it for ever.
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]: made at run time
        from tensorboardX.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]

        if self._events is None:
            folder = self._folder / "tensorboard"
            folder.mkdir(exist_ok=True)
            self._events = EventsWriter(str(folder / "events"))
            # TensorBoard discards older events of these steps.
            self._events.write_event(
                Event(step=self._step + 1, session_log=SessionLog(status=SessionLog.START))
            )
        values = {
            f"{record['split']}/{name}": value
            for name, value in record.items()
            if name not in _RESERVED
        }
        summary = Summary(
            value=[Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        )
        self._events.write_event(Event(wall_time=time.time(), step=record["step"], summary=summary))
        self._events.flush()


def read_metrics(workdir: Path) -> list[dict[str, Any]]:
    """Reads what `MetricWriter` wrote, in that order.

    A half-written last line, left by a killed process, is skipped.

    Args:
        workdir: Folder of the run; without measurements the list is empty.

    Raises:
        ValueError: If another line is not a measurement.
    """
    path = workdir / FILENAME
    lines = path.read_bytes().splitlines() if path.exists() else []
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            records.append({**{name: record[name] for name in _RESERVED}, **record})
        # not JSON, not UTF-8, not an object, or without a field that all have
        except (ValueError, TypeError, KeyError):
            if number < len(lines):
                raise ValueError(
                    f"line {number} of {path} is not a measurement: delete or repair that line"
                ) from None
    return records


class Progress(contextlib.AbstractContextManager["Progress"]):
    """A progress bar with the newest measurements, the time of a step and the time left, if stderr
    is a terminal.

    Args:
        total_steps: Updates in the whole run, as far as is known.
        initial_step: Updates done by earlier processes; the time left does not count them.
        shown: Whether there is a bar on a terminal.
    """

    def __init__(self, total_steps: int, initial_step: int = 0, *, shown: bool = True):
        from tqdm import tqdm  # late, as above

        layout = (
            "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, "
            "{rate_fmt}{postfix}]"
        )
        disable = None if shown else True  # None asks whether there is a terminal
        self._bar = tqdm(
            total=total_steps,
            initial=initial_step,
            unit="step",
            bar_format=layout,
            disable=disable,
            dynamic_ncols=True,
        )

    def update(self, step: int, total_steps: int, values: Mapping[str, SupportsFloat]) -> None:
        """Moves the bar to ``step`` of ``total_steps`` and shows ``values``, once that step's
        results are on the host.
        """
        self._bar.total = total_steps
        self._bar.set_postfix_str(
            ", ".join(f"{name} {float(value):.4g}" for name, value in values.items()), refresh=False
        )
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
        print(f"[{time.monotonic() - self._began:5.0f} s] {line}", file=sys.stderr, flush=True)
