"""A device for each core, flags for the compiler, and JAX's cache, in which the next process finds programs."""

import dataclasses
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import tiny_runs as runs

from iresnet_jax.runs import machine
from iresnet_jax.runs.allocator import num_cores
from iresnet_jax.runs.config import Config


def config_of(batch_size, num_parts=1):
    config = Config()
    training = dataclasses.replace(config.training, batch_size=batch_size, num_parts=num_parts)
    return dataclasses.replace(config, training=training)


@pytest.mark.parametrize(
    ("batch_size", "cores", "devices"),
    [(64, 2, 2), (64, 1, 1), (64, 3, 2), (63, 2, 1), (63, 4, 3), (16, 16, 2), (15, 2, 1), (128, 12, 8), (1, 4, 1)],
)
def test_devices_share_batches_evenly(batch_size, cores, devices):
    assert machine.num_devices(config_of(batch_size), cores) == devices


def test_devices_share_parts_evenly():
    """A batch in parts that one machine takes is none that another refuses."""
    assert [machine.num_devices(config_of(120, num_parts=2), cores) for cores in (1, 4, 8)] == [1, 4, 6]
    assert machine.num_devices(config_of(64, num_parts=16), 8) == 4


@pytest.mark.parametrize("raised", [AssertionError(), RuntimeError("Unable to initialize backend 'cuda'")])
def test_a_platform_that_is_not_there_is_named(monkeypatch, raised):
    def devices():
        raise raised

    monkeypatch.setattr(machine, "_settings", SimpleNamespace(jax_platforms="cuda"))
    monkeypatch.setattr(machine.jax, "devices", devices)
    with pytest.raises(RuntimeError, match=f"told to use 'cuda' and finds no such device.*{raised}.*unset JAX_PLATFORMS"):
        machine.start_backend()


# --- in processes of their own ----------------------------------------------------------------------------------------

MISSING_TPU = """
import os, jax
from iresnet_jax.runs import machine

os.environ["TPU_NAME"] = "one"
print(machine.ignore_missing_tpu(), jax.config.jax_platforms)
del os.environ["TPU_NAME"]
print(machine.ignore_missing_tpu(), jax.config.jax_platforms)
"""


@pytest.mark.skipif(not machine.PCI.exists(), reason="this system does not list its devices")
def test_libtpu_is_left_alone_where_no_tpu_is(tmp_path):
    (tmp_path / "libtpu.py").touch()
    environment = {name: value for name, value in runs.environment().items() if name != "JAX_PLATFORMS" and "TPU" not in name}
    environment["PYTHONPATH"] = f"{tmp_path}{os.pathsep}{environment.get('PYTHONPATH', '')}"
    run = subprocess.run([sys.executable, "-c", MISSING_TPU], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.splitlines() == ["False None", "True cpu"]


PROGRAM = """
import jax, jax.numpy as jnp
from iresnet_jax.runs import machine
from iresnet_jax.runs.config import Config

events = []
flags = machine.compile_quickly()
devices = machine.use_all_cores(Config())
jax.jit(lambda x: x + 1)(1.0)  # compiled before the cache is there
folder = machine.cache_programs()
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.monitoring.register_event_listener(lambda event, **_: events.append(event.rpartition("/")[2]))
print(len(flags), devices, jax.local_device_count(), machine.use_all_cores(Config()))
print(folder, machine.cache_programs())  # once
print(jax.jit(lambda x: jnp.sin(x) * 3)(2.0), events.count("cache_hits"))
"""


def said(tmp_path, **variables):
    """What a process of its own prints, line by line."""
    apart = ("COMPILATION_CACHE", "XLA_FLAGS", "JAX_NUM_CPU_DEVICES")
    environment = {name: value for name, value in runs.environment().items() if not any(part in name for part in apart)}
    environment |= {"IRESNET_JAX_CACHE_DIR": str(tmp_path / "cache"), "JAX_PLATFORMS": "cpu", **variables}
    run = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True)
    return run.stdout.splitlines()


def test_a_process_has_a_device_a_core_and_finds_what_another_one_compiled(tmp_path):
    used, folder, computed = said(tmp_path)
    num_flags, *devices = map(int, used.split())
    assert num_flags >= 1  # which the compiler knows
    count = machine.num_devices(Config(), num_cores())
    assert devices == [count, count, 0]  # too late, once JAX has started
    assert folder.startswith(str(tmp_path / "cache" / "programs"))
    assert folder.endswith(" None")  # the second call has nothing to do
    result, hits = computed.split()
    assert hits == "0"

    used, again, computed = said(tmp_path, JAX_NUM_CPU_DEVICES=str(count))
    assert used.split()[1:] == ["0", str(count), "0"]  # the user's number of devices holds
    assert (again, computed) == (folder, f"{result} 1")

    for path in (tmp_path / "cache").glob("programs/*/*-cache"):  # cut off
        os.truncate(path, path.stat().st_size // 2)
    used, again, computed = said(tmp_path, XLA_FLAGS=f"--xla_force_host_platform_device_count={count + 1}")
    assert used.split()[1:] == ["0", str(count + 1), "0"]
    assert (again, computed) == (folder, f"{result} 0")


@pytest.mark.parametrize("where", ["switched off", "nowhere to write", "another folder"])
def test_programs_are_not_kept_where_that_is_not_wanted_or_cannot_be(tmp_path, where):
    parent = "/dev/null" if where == "nowhere to write" else tmp_path
    settings = {
        "switched off": {"JAX_ENABLE_COMPILATION_CACHE": "false"},
        "another folder": {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "theirs")},
    }
    _, folders, _ = said(tmp_path, **{"IRESNET_JAX_CACHE_DIR": f"{parent}/cache", **settings.get(where, {})})
    assert folders == "None None"
    assert not (tmp_path / "cache").exists()


def test_old_programs_are_removed_at_a_start(tmp_path):
    for age, name in enumerate(["newest", "new", "old"]):
        (tmp_path / name).write_bytes(bytes(40))
        os.utime(tmp_path / name, (1e9 - age, 1e9 - age))
    machine.remove_oldest(tmp_path, 100)
    assert {path.name for path in tmp_path.iterdir()} == {"newest", "new"}


# --- flags ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def flags(monkeypatch):
    """Environment without flags, on a machine without accelerators."""
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setattr(machine, "_has_cpus_alone", lambda _: True)
    return lambda: set(os.environ["XLA_FLAGS"].split())


def test_flags_are_set_once_and_those_of_the_user_stay(flags, monkeypatch):
    chosen = machine.compile_quickly()
    assert chosen
    assert flags() == set(chosen)
    assert machine.compile_quickly() == ()
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=3")
    chosen = set(machine.compile_quickly())
    assert flags() == {"--xla_backend_optimization_level=3"} | chosen
    assert not any("optimization_level" in flag for flag in chosen)


def test_accelerators_see_no_flags(flags, monkeypatch):
    monkeypatch.setattr(machine, "_has_cpus_alone", lambda _: False)
    assert machine.compile_quickly() == ()
    assert not flags()


def test_other_platforms_are_not_taken_for_cpus(monkeypatch):
    assert machine._has_cpus_alone("cpu")
    assert not machine._has_cpus_alone("cuda,cpu")
    monkeypatch.setattr(machine, "entry_points", lambda group: ["cuda12"])
    assert not machine._has_cpus_alone(None)
