"""Programs that were compiled are found again by the next process, unless the user says otherwise."""

import os
import subprocess
import sys

import jax
import pytest
import runs

from iresnet_jax.runs import compilation_cache
from iresnet_jax.runs.compilation_cache import keep_compiled_programs

PROGRAM = """
import jax, jax.numpy as jnp
from iresnet_jax.training import compilation_cache
compilation_cache.LEAST_S = 0.0
jax.jit(lambda x: x + 1)(1.0)  # compiled before the cache is there
print(compilation_cache.keep_compiled_programs())
from jax._src import monitoring
monitoring.register_event_listener(lambda event, **_: print(event) if event.endswith(("cache_hits", "cache_misses")) else None)
print(jax.jit(lambda x: jnp.sin(x) * 3)(2.0))
"""


def said(tmp_path, **variables):
    """What a process of its own prints, line by line."""
    environment = {name: value for name, value in runs.environment().items() if "COMPILATION_CACHE" not in name}
    environment |= {"IRESNET_JAX_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": str(runs.ROOT), **variables}
    run = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True)
    return run.stdout.splitlines()


def test_the_next_process_finds_what_one_compiled(tmp_path):
    folder, *first, result = said(tmp_path)
    assert folder.startswith(str(tmp_path / "cache" / "programs"))
    assert not any("cache_hits" in line for line in first)
    again, *events, same = said(tmp_path)
    assert any("cache_hits" in line for line in events)
    assert (again, same) == (folder, result)


def test_programs_that_were_not_used_for_longest_make_room(tmp_path):
    folder = tmp_path / "cache" / "programs" / compilation_cache._processor()
    folder.mkdir(parents=True)
    for used, (name, size) in enumerate([("older", 2**28), ("old", 2**29), ("new", 2**29), ("newest", 2**29)]):
        path = folder / f"{name}-cache"
        path.touch()
        os.truncate(path, size)
        os.utime(path, (used, used))
    said(tmp_path)
    kept = {path.name for path in folder.glob("*-cache")}
    assert {"new-cache", "newest-cache"} <= kept
    assert not {"old-cache", "older-cache"} & kept


def test_a_program_that_was_cut_off_is_compiled_again(tmp_path):
    _, *_, result = said(tmp_path)
    for path in (tmp_path / "cache").glob("programs/*/*-cache"):
        os.truncate(path, path.stat().st_size // 2)
    _, *events, same = said(tmp_path)
    assert same == result
    assert not any("cache_hits" in line for line in events)


@pytest.mark.parametrize(
    "variables",
    [{"JAX_ENABLE_COMPILATION_CACHE": "false"}, {"IRESNET_JAX_CACHE_DIR": "/dev/null/folder"}],
    ids=["switched off", "nowhere to write"],
)
def test_nothing_is_kept_where_that_is_not_wanted_or_cannot_be(tmp_path, variables):
    assert said(tmp_path, **variables)[0] == "None"
    assert not (tmp_path / "cache").exists()


def test_a_folder_that_the_user_chose_stays():
    chosen = jax.config.jax_compilation_cache_dir
    assert chosen
    assert keep_compiled_programs() is None
    assert jax.config.jax_compilation_cache_dir == chosen
