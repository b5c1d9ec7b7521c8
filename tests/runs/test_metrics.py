"""Metrics files survive kills and resumes without duplicates; a bar is for terminals."""

import io
import json
import math
import struct
import sys

import pytest
from one_number import trained, without_blocks  # noqa: F401 (a fixture)

from iresnet_jax.runs.metrics import Bar, read_metrics, writing
from iresnet_jax.training import parallel


def steps(workdir):
    return [record["step"] for record in read_metrics(workdir)]


def tensorboard_events(workdir):
    """Event files by their format: length, its checksum, a protocol buffer, its checksum."""
    from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]: made at run time

    events = []
    for path in sorted((workdir / "tensorboard").iterdir()):
        content = path.read_bytes()
        while content:
            [length] = struct.unpack("<Q", content[:8])
            events.append(Event.FromString(content[12 : 12 + length]))
            content = content[16 + length :]
    return events


RECORD = {"split": "train", "wall_time_s": 0.5, "loss": 2.0}


def write(workdir, steps, since=0, **values):
    with writing(workdir, since) as (append, _):
        for step in steps:
            append({"step": step, **RECORD, **values})


def test_a_line_holds_everything_and_is_on_disk_at_once(tmp_path):
    written = [{"step": 10, **RECORD, "norm": math.inf}, {"step": 10, **RECORD, "split": "test"}]
    with writing(tmp_path) as (append, _):
        for record in written:
            append(record)
        assert read_metrics(tmp_path) == written  # before closing
    found = [
        (event.step, v.tag, v.simple_value)
        for event in tensorboard_events(tmp_path)
        for v in event.summary.value
    ]
    assert found == [(10, "train/loss", 2.0), (10, "train/norm", math.inf), (10, "test/loss", 2.0)]


def test_resuming_drops_the_steps_that_will_be_repeated(tmp_path):
    write(tmp_path, (10, 20, 30, 40))
    write(tmp_path, (30, 40), since=20, loss=3.0)
    found = [(record["step"], record["loss"]) for record in read_metrics(tmp_path)]
    assert found == [(10, 2), (20, 2), (30, 3), (40, 3)]
    starts = [event.step for event in tensorboard_events(tmp_path) if event.HasField("session_log")]
    assert starts[-1] == 21  # from where on TensorBoard discards older events


@pytest.mark.parametrize("cut", [1, 20])
def test_a_killed_process_loses_no_more_than_its_last_line(tmp_path, cut):
    write(tmp_path, (10, 20, 30))
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    survivors = [10, 20, 30] if cut == 1 else [10, 20]  # cut 1: only the line break is missing
    assert steps(tmp_path) == survivors
    write(tmp_path, [40], since=30)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [*survivors, 40]


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("terminal", "is_first"), [(Terminal(), True), (Terminal(), False), (io.StringIO(), True)]
)
def test_a_bar_shows_values_step_time_and_time_left_on_a_terminal(monkeypatch, terminal, is_first):
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(parallel, "is_first", lambda: is_first)
    model, _ = trained(Bar())
    if is_first and terminal.isatty():
        last = f"loss {model.history.train['loss'][-1]:.4g}"
        for part in ("2/12", last, "step/s", "100%", "<00:00"):
            assert part in terminal.getvalue()
    else:
        assert terminal.getvalue() == ""
