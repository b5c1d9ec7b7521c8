"""How programs are compiled, a device for each core, and the cache of programs."""

import dataclasses
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from iresnet_jax.maths import platforms
from iresnet_jax.runs.config import Config
from tests import tiny_runs as runs


@pytest.fixture
def options(monkeypatch):
    """`compile_options` as decided anew by the flags that a test sets."""
    jax.devices()  # XLA reads its flags once, before
    monkeypatch.setattr(platforms, "compile_options", platforms.compile_options.__wrapped__)
    return platforms.compile_options


def test_flags_of_the_user_come_before_options(options, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")
    assert options() == platforms.CPU_OPTIONS
    monkeypatch.setenv(
        "XLA_FLAGS", "--xla_backend_optimization_level=3 --xla_cpu_use_fusion_emitters=true"
    )
    assert options() == {}


def test_a_function_is_traced_once_and_is_part_of_other_programs(options, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")  # other programs refuse parts with options of their own
    inner = platforms.fast_compile(chex.assert_max_traces(lambda x: 2 * x, n=1))
    assert [float(inner(x)) for x in (1.0, 2.0)] == [2, 4]
    within = platforms.fast_compile(lambda x: 2 * x)
    assert float(jax.jit(jax.grad(within))(1.0)) == 2
    constant = jnp.ones(())  # which does not depend on the other program's arguments
    np.testing.assert_array_equal(
        jax.lax.map(lambda x: x * within(constant), np.float32([3, 4])), [6, 8]
    )


def test_products_on_accelerators_are_in_float32_unless_another_precision_was_chosen():
    seen = []

    def asks_for_precision(x):
        seen.append(jax.config.jax_default_matmul_precision)
        return x

    program = platforms.fast_compile(asks_for_precision)
    program(1.0)
    with platforms.compiling_for("gpu"):
        program(1.0)
        with jax.default_matmul_precision("tensorfloat32"):
            program(1.0)
    assert seen == [None, "float32", "tensorfloat32"]


@pytest.mark.parametrize(
    ("batch_size", "num_parts", "cores", "devices"),
    [
        *((64, 1, 2, 2), (64, 1, 3, 2), (63, 1, 4, 3), (16, 1, 16, 2), (15, 1, 2, 1)),
        *((120, 2, 8, 6), (64, 16, 8, 4)),  # in parts
    ],
)
def test_devices_share_batches_and_their_parts_evenly(batch_size, num_parts, cores, devices):
    training = dataclasses.replace(Config().training, batch_size=batch_size, num_parts=num_parts)
    config = dataclasses.replace(Config(), training=training)
    assert platforms.num_devices(config, cores) == devices


# The functions in a process of their own.
PROGRAM = """
import jax, jax.numpy as jnp
from iresnet_jax.maths import platforms
from iresnet_jax.runs.config import Config

devices = platforms.use_all_cores(Config())
jax.jit(lambda x: x + 1)(1.0)  # compiled before the cache is there
print(devices, jax.local_device_count(), platforms.use_all_cores(Config()))
print(platforms.cache_programs(), platforms.cache_programs())  # once
events = []
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.monitoring.register_event_listener(lambda event, **_: events.append(event.rpartition("/")[2]))
print(jax.jit(lambda x: jnp.sin(x) * 3)(2.0), events.count("cache_hits"))
"""


def said(tmp_path, **variables):
    """What a process of its own prints, line by line."""
    apart = ("COMPILATION_CACHE", "XLA_FLAGS", "JAX_NUM_CPU_DEVICES")
    environment = {
        name: value
        for name, value in runs.environment().items()
        if not any(part in name for part in apart)
    }
    cache = str(tmp_path / "cache")
    environment |= {"IRESNET_JAX_CACHE_DIR": cache, "JAX_PLATFORMS": "cpu", **variables}
    command = [sys.executable, "-c", PROGRAM]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return run.stdout.splitlines()


@pytest.mark.slow
def test_a_process_has_a_device_a_core_and_finds_what_another_one_compiled(tmp_path):
    devices, folder, computed = said(tmp_path)
    count = platforms.num_devices(Config(), platforms.num_cores())
    assert devices == f"{count} {count} 0"  # too late, once JAX has started
    assert folder.startswith(str(tmp_path / "cache" / "programs"))
    assert folder.endswith(" None")  # the second call has nothing to do
    result, hits = computed.split()
    assert hits == "0"
    killed = tmp_path / "cache" / "programs" / folder.split("/")[-1].split()[0] / "jit_killed-cache"
    killed.write_bytes(b"half")
    devices, again, computed = said(tmp_path, JAX_NUM_CPU_DEVICES=str(count))
    # nor in JAX's way, which would keep no program beside one without its time
    assert not killed.exists()
    assert devices == f"0 {count} 0"  # the user's number of devices holds
    assert (again, computed) == (folder, f"{result} 1")
