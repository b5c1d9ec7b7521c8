"""Memory in large pages, and garbage collected less often."""

import os
import subprocess
import sys

import pytest

from iresnet_jax.runs import interpreter

RESTARTED = """
import os, sys
from iresnet_jax.training import interpreter

interpreter.use_large_pages()
print(os.environ["GLIBC_TUNABLES"], *sys.argv[1:])
"""


@pytest.mark.skipif(not interpreter._can_ask_for_large_pages(), reason="this system gives no large pages to those who ask")
@pytest.mark.parametrize(
    ("tunables", "expected"),
    [
        ("", "glibc.malloc.hugetlb=1"),
        ("glibc.malloc.tcache_count=7", "glibc.malloc.tcache_count=7:glibc.malloc.hugetlb=1"),
        ("glibc.malloc.hugetlb=0", "glibc.malloc.hugetlb=0"),
    ],
)
def test_a_command_starts_again_with_its_arguments_and_large_pages(tunables, expected):
    command = [sys.executable, "-c", RESTARTED, "--name", "a b"]
    environment = {**os.environ, "GLIBC_TUNABLES": tunables}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert done.stdout == f"{expected} --name a b\n"


def test_a_system_without_large_pages_goes_on(monkeypatch, tmp_path):
    monkeypatch.setattr(interpreter, "_PAGES_ARE_CHOSEN", tmp_path / "missing")
    monkeypatch.setattr(os, "execve", lambda *_: pytest.fail("started again for nothing"))
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    interpreter.use_large_pages()


IMPORTED = """
import gc, runpy, sys
runpy.run_path(sys.argv[1])["prepare"]()
print(gc.get_threshold()[0], *sorted({"jax", "numpy", "iresnet_jax"} & set(sys.modules)))
"""


def test_the_file_runs_before_anything_is_imported():
    command = [sys.executable, "-c", IMPORTED, interpreter.__file__]
    environment = {**os.environ, "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert done.stdout == "50000\n"
