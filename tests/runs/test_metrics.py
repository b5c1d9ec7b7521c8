"""Metrics files survive kills and resumes without duplicates; the progress bar keeps quiet in
batch jobs.
"""

import errno
import io
import json
import math
import os
import struct
import sys

import pytest
from one_number import trained, without_blocks  # noqa: F401 (a fixture)

from iresnet_jax.runs.metrics import Bar, MetricWriter, read_metrics
from iresnet_jax.training import parallel


def steps(workdir):
    return [record["step"] for record in read_metrics(workdir)]


def tensorboard_events(workdir):
    """Reads event files by their record format: length, its checksum, a protocol buffer, its
    checksum.
    """
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


def test_a_line_holds_everything_and_is_on_disk_at_once(tmp_path):
    with MetricWriter(tmp_path) as writer:
        written = (
            {"step": 10, **RECORD, "norm": math.inf},
            {"step": 10, **RECORD, "split": "test", "loss": 1.5},
        )
        for record in written:
            writer.write(record)
        assert read_metrics(tmp_path) == list(written)  # before closing
    found = [
        (event.step, v.tag, v.simple_value)
        for event in tensorboard_events(tmp_path)
        for v in event.summary.value
    ]
    assert found == [(10, "train/loss", 2.0), (10, "train/norm", math.inf), (10, "test/loss", 1.5)]


@pytest.mark.parametrize("file", ["_lines", "_events"])
def test_a_full_disk_is_named_and_nothing_waits(tmp_path, file):
    class Full:
        def write(self, *_):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        write_event = close = write

    def write():
        with MetricWriter(tmp_path) as writer:
            writer.write({"step": 1, **RECORD})
            getattr(writer, file).close()
            setattr(writer, file, Full())
            writer.write({"step": 2, **RECORD})

    with pytest.raises(OSError, match=f"{tmp_path} cannot be written to .* free disk space"):
        write()


# --- resuming -------------------------------------------------------------------------------------


def test_resuming_drops_the_steps_that_will_be_repeated(tmp_path):
    with MetricWriter(tmp_path) as writer:
        for step in (10, 20, 30, 40):
            writer.write({"step": step, **RECORD})
    with MetricWriter(tmp_path, 20) as writer:
        assert steps(tmp_path) == [record["step"] for record in writer.kept] == [10, 20]
        for step in (30, 40):
            writer.write({"step": step, **RECORD, "loss": 3.0})
    assert [(record["step"], record["loss"]) for record in read_metrics(tmp_path)] == [
        (10, 2),
        (20, 2),
        (30, 3),
        (40, 3),
    ]
    session_starts = [
        event.step for event in tensorboard_events(tmp_path) if event.HasField("session_log")
    ]
    assert session_starts[-1] == 21  # from where on TensorBoard discards older events


@pytest.mark.parametrize("cut", [1, 2, 20])
def test_a_killed_process_loses_no_more_than_its_last_line(tmp_path, cut):
    with MetricWriter(tmp_path) as writer:
        for step in (10, 20, 30):
            writer.write({"step": step, **RECORD})
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    survivors = [10, 20, 30] if cut == 1 else [10, 20]  # cut 1: only the line break is missing
    assert steps(tmp_path) == survivors
    with MetricWriter(tmp_path, 30) as writer:
        writer.write({"step": 40, **RECORD})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [*survivors, 40]


@pytest.mark.parametrize("damaged", [b'{"st', b'{"step": 2, "split": "train"}'])
def test_a_damaged_line_is_named_unless_it_is_the_last(tmp_path, damaged):
    line = b'{"step": 1, "split": "train", "wall_time_s": 0.5}\n'
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(line + damaged + b"\n" + line)
    with pytest.raises(
        ValueError, match=rf"line 2 of {path} is not a measurement: delete or repair"
    ):
        MetricWriter(tmp_path)
    path.write_bytes(line + damaged + b"\n")
    with MetricWriter(tmp_path, 1):
        assert path.read_bytes() == line


# --- progress -------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("terminal", "is_first"), [(Terminal(), True), (Terminal(), False), (io.StringIO(), True)]
)
def test_a_bar_shows_values_step_time_and_time_left_on_a_terminal(
    monkeypatch, caplog, terminal, is_first
):
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(parallel, "is_first", lambda: is_first)
    with caplog.at_level("INFO"):
        model, _ = trained(Bar())
    assert "step 12 of 12: validation loss" in caplog.text
    if is_first and terminal.isatty():
        last = f"loss {model.history.train['loss'][-1]:.4g}"
        for part in ("2/12", last, "step/s", "100%", "<00:00"):
            assert part in terminal.getvalue()
    else:
        assert terminal.getvalue() == ""
