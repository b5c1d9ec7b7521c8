"""Memory that is freed stays with the process, where the C library can be told so."""

import subprocess
import sys

import pytest

from iresnet_jax.training import freed_memory

# Read as a file, so that importing the package, and JAX with it, takes no time.
PROGRAM = f"""
import resource, runpy, sys
import numpy as np

keep_freed_memory = runpy.run_path({freed_memory.__file__!r})["keep_freed_memory"]
kept = keep_freed_memory() if sys.argv[1] == "kept" else None
np.ones(2**23)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    np.ones(2**23)
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(name):
    done = subprocess.run([sys.executable, "-c", PROGRAM, name], capture_output=True, text=True, check=True)
    kept, faults = done.stdout.split()
    return kept == "True", int(faults)


def test_arrays_of_one_step_are_not_fetched_again_for_the_next():
    kept, ours = page_faults("kept")
    if not kept:
        pytest.skip("the C library of this system has no mallopt")
    _, default = page_faults("default")
    assert default >= 20 * 2**26 / 2**21  # one a huge page of every array, at least
    assert ours < default / 10
