"""Measurements of a run as JSON lines and TensorBoard events, and a progress bar."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from iresnet_jax.storage import growing, replacing
from iresnet_jax.training import parallel
from iresnet_jax.training.callbacks import Callback
from iresnet_jax.training.run import Run

FILENAME = "metrics.jsonl"
_RESERVED = ("step", "split", "wall_time_s")


@contextlib.contextmanager
def writing(
    workdir: Path, step: int = 0
) -> Iterator[tuple[Callable[[Mapping[str, Any]], None], Callable[[], None]]]:
    """Yields a function that appends a measurement to ``workdir/metrics.jsonl`` and to TensorBoard
    events in ``workdir/tensorboard``, and one that publishes them in a bucket, see
    `storage.growing`.

    A line is ``{"step": 100, "split": "train", "wall_time_s": 12.5, "loss": 3.2}``. Every line is
    flushed at once: a killed process loses at most the line that it was writing. Non-finite values
    are written as Python's ``NaN`` and ``Infinity``.

    Args:
        workdir: Folder of the run.
        step: Finished updates of the state from which the run goes on; measurements of later steps
            are dropped.
    """
    # Imported late: it takes longer than the rest of this module. `SummaryWriter` has a thread that
    # a full disk ends, and then waits for it for ever.
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]: made at run time
    from tensorboardX.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]

    kept = [record for record in read_metrics(workdir) if record["step"] <= step]
    with growing(workdir) as (folder, publish):
        with replacing(folder / FILENAME) as incoming:
            text = "".join(json.dumps(record) + "\n" for record in kept)
            incoming.write_text(text, encoding="utf-8")
        (folder / "tensorboard").mkdir(exist_ok=True)
        events = EventsWriter(str(folder / "tensorboard" / "events"))
        # TensorBoard discards older events of these steps.
        restart = SessionLog(status=SessionLog.START)
        events.write_event(Event(step=step + 1, session_log=restart))

        def write(record: Mapping[str, Any]) -> None:
            lines.write(json.dumps(dict(record)) + "\n")
            lines.flush()
            values = [
                Summary.Value(tag=f"{record['split']}/{name}", simple_value=value)
                for name, value in record.items()
                if name not in _RESERVED
            ]
            summary = Summary(value=values)
            events.write_event(Event(wall_time=time.time(), step=record["step"], summary=summary))
            events.flush()

        with (folder / FILENAME).open("a", encoding="utf-8") as lines, contextlib.closing(events):
            yield write, publish


def read_metrics(workdir: Path) -> list[dict[str, Any]]:
    """Reads the measurements that `writing` wrote, in order.

    Other lines, such as a half-written one that a killed process left, are skipped.

    Args:
        workdir: Folder of the run; without measurements the list is empty.
    """
    path = workdir / FILENAME
    lines = path.read_bytes().splitlines() if path.exists() else []
    records = []
    for line in lines:
        # It may not be JSON or UTF-8, be no object, or lack a common field.
        with contextlib.suppress(ValueError, TypeError, KeyError):
            record = json.loads(line)
            records.append({**{name: record[name] for name in _RESERVED}, **record})
    return records


class Metrics(Callback):
    """Writes the records of a training to its folder, see `writing`; with several processes, the
    first one writes.
    """

    order = 90

    def __init__(self, folder: Path):
        self.folder, self._publish = folder, lambda: None

    @contextlib.contextmanager
    def during(self, run: Run) -> Iterator[None]:
        """Listens to the records after the state from which training goes on."""
        if not parallel.is_first():
            yield
            return
        with writing(self.folder, run.step) as (write, self._publish):
            run.listeners.append(write)
            try:
                yield
            finally:
                self._publish()  # the measurements show what went wrong

    def after_step(self, run: Run) -> None:
        """Publishes before a checkpoint, which then has the measurements that led to it."""
        if run.is_validated or run.ended is not None:
            self._publish()


class Bar(Callback):
    """A progress bar with the newest measurements, the time of a step and the time left, if stderr
    is a terminal.
    """

    order = 80

    @contextlib.contextmanager
    def during(self, run: Run) -> Iterator[None]:
        """Shows the bar."""
        from tqdm import tqdm  # late: it takes longer than the rest of this module

        disable = None if parallel.is_first() else True  # None disables it without a terminal
        options = {"unit": "step", "disable": disable, "dynamic_ncols": True}
        with tqdm(total=run.horizon, initial=run.step, **options) as self._bar:
            yield

    def after_step(self, run: Run) -> None:
        """Moves the bar once results of the step are on the host."""
        if run.logged_at != run.step:
            return
        name = run.objective.name
        self._bar.total = run.horizon
        value = next(r[name] for r in reversed(run.records) if r["split"] == "train")
        self._bar.set_postfix_str(f"{name} {value:.4g}", refresh=False)
        self._bar.update(run.step - self._bar.n)
        self._bar.refresh()
