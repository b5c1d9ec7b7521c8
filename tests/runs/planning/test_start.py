"""The parts of a start: what is within what, sums, and a start of a small model."""

import jax
import pytest

from iresnet_jax.runs.planning import start
from iresnet_jax.runs.planning.start import Start, Starts

TRACE, LOWER, COMPILE, READ, READ_STORED = start.EVENTS
CONFIG = """
from iresnet_jax.runs.config import default_config

def get_config():
    config = default_config()
    config.data.name = "moons"
    config.preprocessing.transform = "none"
    config.model.stages = ({"num_blocks": 1, "hidden": (2,)},)
    config.logdet.kind = "exact"
    config.training.batch_size = 16
    return config
"""


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "config.py"
    path.write_text(CONFIG)
    return path


def test_work_within_work_counts_once_and_for_the_outermost_program(monkeypatch):
    listeners, now = [], [0.0]
    monkeypatch.setattr(jax.monitoring, "register_event_duration_secs_listener", listeners.append)
    monkeypatch.setattr(start.time, "time", lambda: now[0])
    work = start._Work()
    [note] = listeners

    def ends(event, began, ended, **about):
        now[0] = ended
        note(event, ended - began, **about)

    ends(TRACE, 1.0, 2.0, fun_name="inner")
    ends(COMPILE, 2.5, 3.0, fun_name="jit_constant")
    ends(TRACE, 0.0, 4.0, fun_name="outer")
    ends("/jax/another/event", 0.0, 4.0)
    ends(LOWER, 4.0, 5.0, fun_name="jit(outer)")
    ends(READ, 5.5, 7.0)
    ends(COMPILE, 5.0, 7.5, fun_name="jit_outer")
    ends(READ_STORED, 8.0, 9.0, fun_name="stored program")
    traced, lowered, read, stored = work.take()
    assert traced == ("outer", {"tracing": 3.5, "compiling": 0.5, "programs": 1.0})
    assert lowered == ("outer", {"lowering": 1.0, "programs": 0.0})
    assert read == ("outer", {"reading": 1.5, "compiling": 1.0, "programs": 1.0})
    assert stored == ("stored program", {"reading": 1.0, "programs": 1.0})
    assert not list(work.take())


def test_lines_and_columns_of_a_table_add_up():
    work = {"first step": {"tracing": 1.0, "compiling": 4.0, "programs": 2.0}, "imports": {"imports": 2.0}}
    cold = Start({"imports": 2.5, "first step": 7.0}, 9.0, work, {"first step: f": work["first step"]}, {"jax": 2.0})
    header, *lines = [line.split()[-8:] for line in str(cold).splitlines()]
    assert header == ["seconds", *start.WORK, "rest", "programs"]
    *rows, whole = [[float(number) for number in line] for line in lines]
    for seconds, *parts, _ in (*rows, whole):
        assert seconds == pytest.approx(sum(parts))
    assert [sum(numbers) for numbers in zip(*rows, strict=True)] == pytest.approx(whole)
    assert whole[0] == cold.whole == 9.5
    assert "first step after 9.50 s, 9.00 s of processors" in str(Starts(cold, cold))


@pytest.fixture
def starts(config_file, tmp_path):
    """A start in a process of its own, and one that finds what it left."""
    return [start._started(["--config", str(config_file)], str(tmp_path)) for _ in range(2)]


def test_starts_are_measured_in_processes_of_their_own(starts):
    found, again = starts
    assert [*found.seconds] == ["Python", "imports", "devices", "data", "model", "initial state", "first step"]
    assert all(seconds >= 0 for seconds in found.seconds.values())
    assert found.work["first step"]["programs"] == 1
    assert found.packages["jax"] > 0
    assert "flax" in found.packages
    for part, work in found.work.items():
        assert start._seconds(work) <= found.seconds[part]
    of_parts = sum(start._seconds(work) for part, work in found.work.items() if part != "imports")
    assert sum(map(start._seconds, found.programs.values())) == pytest.approx(of_parts)

    assert again.work["first step"]["programs"] == 1
    assert again.work["first step"].keys() == {"reading", "programs"}  # the step is neither traced nor lowered
    assert again.programs["first step: _fun"]["programs"] == 1
