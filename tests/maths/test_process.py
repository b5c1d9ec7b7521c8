"""A device for each core, and JAX's cache, in which the next process finds programs."""

import dataclasses
import subprocess
import sys

import pytest
import tiny_runs as runs

from iresnet_jax.maths import platforms
from iresnet_jax.runs.config import Config


def config_of(batch_size, num_parts=1):
    config = Config()
    training = dataclasses.replace(config.training, batch_size=batch_size, num_parts=num_parts)
    return dataclasses.replace(config, training=training)


@pytest.mark.parametrize(
    ("batch_size", "cores", "devices"),
    [
        (64, 2, 2),
        (64, 1, 1),
        (64, 3, 2),
        (63, 2, 1),
        (63, 4, 3),
        (16, 16, 2),
        (15, 2, 1),
        (128, 12, 8),
        (1, 4, 1),
    ],
)
def test_devices_share_batches_evenly(batch_size, cores, devices):
    assert platforms.num_devices(config_of(batch_size), cores) == devices


def test_devices_share_parts_evenly():
    """A batch in parts that one machine takes is none that another refuses."""
    assert [platforms.num_devices(config_of(120, num_parts=2), cores) for cores in (1, 4, 8)] == [
        1,
        4,
        6,
    ]
    assert platforms.num_devices(config_of(64, num_parts=16), 8) == 4


# The functions in a process of their own: where nothing is kept, and where something is.
PROGRAM = """
import os
import pathlib
import jax, jax.numpy as jnp
from iresnet_jax.maths import platforms
from iresnet_jax.runs.config import Config

platforms.keep_freed_memory()
devices = platforms.use_all_cores(Config())
jax.jit(lambda x: x + 1)(1.0)  # compiled before the cache is there
print(devices, jax.local_device_count(), platforms.use_all_cores(Config()))
where = os.environ["IRESNET_JAX_CACHE_DIR"]
settings = [("jax_enable_compilation_cache", False), ("jax_compilation_cache_dir", where)]
for name, value in (*settings, ("", "/dev/null/cache")):
    before = getattr(jax.config, name) if name else os.environ["IRESNET_JAX_CACHE_DIR"]
    in_environment = lambda to: os.environ.update(IRESNET_JAX_CACHE_DIR=to)
    change = (lambda to: jax.config.update(name, to)) if name else in_environment
    change(value)
    print(platforms.cache_programs())
    change(before)
print(platforms.cache_programs(), platforms.cache_programs())  # once
events = []
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.monitoring.register_event_listener(lambda event, **_: events.append(event.rpartition("/")[2]))
print(jax.jit(lambda x: jnp.sin(x) * 3)(2.0), events.count("cache_hits"))
statm = pathlib.Path("/proc/self/statm")
pages = lambda: int(statm.read_text().split()[1]) if statm.exists() else 0
kept = [bytearray(2**16) for _ in range(1000)]
kept = kept[::2]  # the end of the heap is in use
before = pages()
platforms.return_freed_memory()
print(pages() < before or not statm.exists())
"""


def said(tmp_path, **variables):
    """What a process of its own prints, line by line."""
    apart = ("COMPILATION_CACHE", "XLA_FLAGS", "JAX_NUM_CPU_DEVICES")
    environment = {
        name: value
        for name, value in runs.environment().items()
        if not any(part in name for part in apart)
    }
    environment |= {
        "IRESNET_JAX_CACHE_DIR": str(tmp_path / "cache"),
        "JAX_PLATFORMS": "cpu",
        **variables,
    }
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True
    )
    return run.stdout.splitlines()


@pytest.mark.slow
def test_a_process_has_a_device_a_core_and_finds_what_another_one_compiled(tmp_path):
    devices, *nowhere, folder, computed, has_returned = said(tmp_path)
    count = platforms.num_devices(Config(), platforms.num_cores())
    assert devices == f"{count} {count} 0"  # too late, once JAX has started
    assert nowhere == ["None"] * 3
    assert folder.startswith(str(tmp_path / "cache" / "programs"))
    assert folder.endswith(" None")  # the second call has nothing to do
    result, hits = computed.split()
    assert hits == "0"
    assert has_returned == "True"
    killed = tmp_path / "cache" / "programs" / folder.split("/")[-1].split()[0] / "jit_killed-cache"
    killed.write_bytes(b"half")
    devices, *_, again, computed, _ = said(tmp_path, JAX_NUM_CPU_DEVICES=str(count))
    # nor in JAX's way, which would keep no program beside one without its time
    assert not killed.exists()
    assert devices == f"0 {count} 0"  # the user's number of devices holds
    assert (again, computed) == (folder, f"{result} 1")
