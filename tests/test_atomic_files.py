import subprocess
import sys

import pytest

from iresnet_jax import atomic_files
from iresnet_jax.atomic_files import locked, replacing


def test_a_file_is_replaced_when_it_is_whole(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with replacing(path) as incoming:
        incoming.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_writers_at_once_do_not_share_a_file(tmp_path):
    path = tmp_path / "a.txt"
    with replacing(path) as first, replacing(path) as second:
        first.write_text("the first of two")
        second.write_text("the second")
    assert path.read_text() == "the first of two"
    assert list(tmp_path.iterdir()) == [path]


def test_a_writer_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def fail(incoming):
        incoming.write_text("n")
        raise OSError("no room left on the disk")

    with pytest.raises(OSError, match="disk"), replacing(path) as incoming:
        fail(incoming)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.slow
def test_one_process_at_a_time_and_a_killed_one_lets_go(tmp_path):
    path = tmp_path / "work"
    hold = f"""
import pathlib, runpy, time
locked = runpy.run_path({atomic_files.__file__!r})["locked"]
with locked(pathlib.Path({str(path)!r})):
    print("held", flush=True)
    time.sleep(600)
"""
    holder = subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(TimeoutError), locked(path, timeout_s=0.0):
            pytest.fail("two processes hold the lock")
    finally:
        holder.kill()
        holder.communicate()
    with locked(path, timeout_s=0.0):
        assert not path.exists()


def test_without_a_lock_file_everybody_may_enter(tmp_path):
    with locked(tmp_path / "nowhere" / "work", timeout_s=0.0):
        pass
    (tmp_path / ".work.lock").mkdir()
    with locked(tmp_path / "work", timeout_s=0.0):
        pass
