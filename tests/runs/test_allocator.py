"""Memory that stays with the process, in large pages, and garbage collected less often."""

import os
import subprocess
import sys

import pytest

from iresnet_jax.runs import allocator

# The module is read as a file, as train.py does: a process takes .2 s and not the second of importing JAX.
HEAD = f"""
import os, resource, runpy, sys, threading
allocator = runpy.run_path({allocator.__file__!r})
"""


def said(program, *arguments, **variables):
    """What a process of its own prints."""
    command = [sys.executable, "-c", HEAD + program, *arguments]
    environment = {name: value for name, value in os.environ.items() if name != allocator._RESTARTED} | variables
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout


RESTARTED = """
allocator["use_large_pages"]()
allocator["collect_garbage_rarely"]()
import gc
print(os.environ["GLIBC_TUNABLES"], *sys.argv[1:], gc.get_threshold()[0], *{"jax", "numpy", "iresnet_jax"} & {*sys.modules})
"""


@pytest.mark.skipif(not allocator._can_ask_for_large_pages(), reason="this system gives no large pages to those who ask")
@pytest.mark.parametrize(
    ("tunables", "expected"),
    [
        ("glibc.malloc.tcache_count=7", "glibc.malloc.tcache_count=7:glibc.malloc.hugetlb=1"),
        ("glibc.malloc.hugetlb=0", "glibc.malloc.hugetlb=0"),
    ],
)
def test_a_command_starts_again_with_its_arguments_and_large_pages_before_anything_is_imported(tunables, expected):
    assert said(RESTARTED, "--name", "a b", GLIBC_TUNABLES=tunables) == f"{expected} --name a b 50000\n"


STEPS = """
import numpy as np

if sys.argv[2] == "another":
    os.sched_setaffinity(0, list(os.sched_getaffinity(0))[:1])
kept = sys.argv[1] == "kept" and allocator["keep_freed_memory"]()

def steps():
    np.ones(2**24)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        np.ones(2**24)
    print(int(kept), resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

thread = threading.Thread(target=steps)
thread.start() if sys.argv[2] == "another" else steps()
"""


@pytest.mark.parametrize("thread", ["first", "another"])
def test_arrays_of_one_step_are_not_fetched_again_for_the_next(thread):
    """Of any thread, if there is one core."""
    kept, ours = map(int, said(STEPS, "kept", thread).split())
    if not kept:
        pytest.skip("the C library of this system has no mallopt")
    _, default = map(int, said(STEPS, "default", thread).split())
    assert default >= 20 * 2**27 / 2**21  # one a huge page of every array, at least
    assert ours < default / 10


FRAGMENTS = """
import numpy as np

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

kept = allocator["keep_freed_memory"]()
large, small = zip(*((np.ones(2**17), np.ones(2**9)) for _ in range(200)))
del large  # holes of 1 MiB
before = resident()
print(int(kept and allocator["return_freed_memory"]()), before - resident())
"""


def test_holes_between_arrays_are_returned_once():
    returned, difference = map(int, said(FRAGMENTS).split())
    if not returned:
        pytest.skip("the C library of this system has no malloc_trim")
    assert difference > 100 * 2**20
