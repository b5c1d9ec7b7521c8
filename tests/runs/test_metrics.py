"""Metrics files survive kills and resumes without duplicates; the progress bar keeps quiet in batch jobs."""

import errno
import io
import json
import math
import os
import struct
import sys
import time

import numpy as np
import pytest

from iresnet_jax.runs.metrics import MetricWriter, Progress, read_metrics


def steps(workdir):
    return [record["step"] for record in read_metrics(workdir)]


def tensorboard_events(workdir):
    """Reads event files by their record format: length, its checksum, a protocol buffer, its checksum."""
    from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]: made at run time

    events = []
    for path in sorted((workdir / "tensorboard").iterdir()):
        content = path.read_bytes()
        while content:
            [length] = struct.unpack("<Q", content[:8])
            events.append(Event.FromString(content[12 : 12 + length]))
            content = content[16 + length :]
    return events


# --- writing -----------------------------------------------------------------------------------------------------


def test_a_line_holds_everything_and_is_on_disk_at_once(tmp_path):
    with MetricWriter(tmp_path / "run") as writer:
        writer.write(10, {"bits_per_dim": np.float32(3.5), "loss": 2.0})
        writer.write(10, {"accuracy": 0.5}, split="test")
        train, test = read_metrics(tmp_path / "run")  # before closing
    assert train.pop("wall_time_s") >= 0
    assert train == {"step": 10, "split": "train", "bits_per_dim": 3.5, "loss": 2.0}
    assert (test["split"], test["accuracy"]) == ("test", 0.5)


def test_tensorboard_gets_the_same_numbers(tmp_path):
    with MetricWriter(tmp_path) as writer:
        writer.write(10, {"loss": 2.0})
        writer.write(20, {"loss": 1.5}, split="test")
    found = [
        (event.step, value.tag, value.simple_value) for event in tensorboard_events(tmp_path) for value in event.summary.value
    ]
    assert found == [(10, "train/loss", 2.0), (20, "test/loss", 1.5)]


def test_non_finite_values_come_back_and_names_of_fields_are_reserved(tmp_path):
    with MetricWriter(tmp_path) as writer:
        writer.write(1, {"loss": math.nan, "norm": math.inf})
        with pytest.raises(ValueError, match="cannot be called 'step'"):
            writer.write(1, {"step": 2.0})
    [record] = read_metrics(tmp_path)
    assert math.isnan(record["loss"])
    assert record["norm"] == math.inf


@pytest.mark.parametrize("file", ["_lines", "_events"])
def test_a_full_disk_is_named_and_nothing_waits(tmp_path, file):
    class Full:
        def write(self, *_):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        write_event = close = write

    def write():
        with MetricWriter(tmp_path) as writer:
            writer.write(1, {"loss": 1.0})
            getattr(writer, file).close()
            setattr(writer, file, Full())
            writer.write(2, {"loss": 1.0})

    with pytest.raises(OSError, match=f"{tmp_path} cannot be written to .* free disk space"):
        write()


# --- resuming ----------------------------------------------------------------------------------------------------


def test_resuming_drops_the_steps_that_will_be_repeated(tmp_path):
    with MetricWriter(tmp_path) as writer:
        for step in (10, 20, 30, 40):
            writer.write(step, {"loss": 1.0})
    with MetricWriter(tmp_path) as writer:
        writer.truncate_after(20)
        assert steps(tmp_path) == [10, 20]
        for step in (30, 40):
            writer.write(step, {"loss": 2.0})
    assert steps(tmp_path) == [10, 20, 30, 40]
    assert [record["loss"] for record in read_metrics(tmp_path)] == [1.0, 1.0, 2.0, 2.0]
    session_starts = [event.step for event in tensorboard_events(tmp_path) if event.HasField("session_log")]
    assert session_starts == [21]  # from where on TensorBoard discards older events


def test_wall_time_counts_from_the_start_of_the_process(tmp_path):
    with MetricWriter(tmp_path) as writer:
        time.sleep(0.1)  # the first weights are made
        writer.truncate_after(0)
        writer.write(1, {})
    assert read_metrics(tmp_path)[0]["wall_time_s"] >= 0.1


def test_wall_time_goes_on_where_the_last_process_stopped(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "split": "train", "wall_time_s": 100.0}\n')
    with MetricWriter(tmp_path) as writer:
        writer.write(2, {})
    assert 100.0 <= read_metrics(tmp_path)[1]["wall_time_s"] < 160.0


@pytest.mark.parametrize("cut", [1, 2, 20])
def test_a_killed_process_loses_no_more_than_its_last_line(tmp_path, cut):
    with MetricWriter(tmp_path) as writer:
        for step in (10, 20, 30):
            writer.write(step, {"loss": 1.0})
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    survivors = steps(tmp_path)
    assert survivors == ([10, 20, 30] if cut == 1 else [10, 20])  # cut 1: only the line break is missing
    with MetricWriter(tmp_path) as writer:
        writer.write(40, {"loss": 1.0})
    assert steps(tmp_path) == [*survivors, 40]
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [*survivors, 40]


@pytest.mark.parametrize("damaged", [b'{"st', b"\xff\xfe", b"3", b'{"step": 2, "split": "train"}', b""])
def test_a_damaged_line_is_named_unless_it_is_the_last(tmp_path, damaged):
    line = b'{"step": 1, "split": "train", "wall_time_s": 0.5}\n'
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(line + damaged + b"\n" + line)
    with pytest.raises(ValueError, match=rf"line 2 of {path} is not a measurement: delete or repair"):
        MetricWriter(tmp_path)
    path.write_bytes(line + damaged + b"\n")
    with MetricWriter(tmp_path):
        assert path.read_bytes() == line


def test_a_run_without_measurements_has_none(tmp_path):
    assert read_metrics(tmp_path) == []
    with MetricWriter(tmp_path):
        pass
    assert read_metrics(tmp_path) == []


# --- progress ----------------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(("terminal", "shown"), [(Terminal(), True), (Terminal(), False), (io.StringIO(), True)])
def test_progress_shows_values_step_time_and_time_left_on_a_terminal(monkeypatch, terminal, shown):
    monkeypatch.setattr(sys, "stderr", terminal)
    with Progress(100, initial_step=40, shown=shown) as progress:
        progress.update(50, 100, {"bits/dim": 3.4567})
        progress.update(100, 100, {"bits/dim": 3.25})
    if shown and terminal.isatty():
        for part in ("50/100", "bits/dim 3.457", "bits/dim 3.25", "step/s", "100%", "<00:00"):
            assert part in terminal.getvalue()
    else:
        assert terminal.getvalue() == ""
