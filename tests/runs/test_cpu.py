"""Memory that stays with the process, and a device for each core."""

import dataclasses
import os
import subprocess
import sys

import pytest

from iresnet_jax.runs import cpu
from iresnet_jax.runs.config import Config

PROGRAM = """
import os, resource, sys, threading
import numpy as np
from iresnet_jax.training import cpu

if sys.argv[2] == "another":
    os.sched_setaffinity(0, list(os.sched_getaffinity(0))[:1])
kept = cpu.keep_freed_memory() if sys.argv[1] == "kept" else None

def steps():
    np.ones(2**24)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        np.ones(2**24)
    print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

if sys.argv[2] == "another":
    thread = threading.Thread(target=steps)
    thread.start()
    thread.join()
else:
    steps()
"""


def page_faults(name, thread):
    done = subprocess.run([sys.executable, "-c", PROGRAM, name, thread], capture_output=True, text=True, check=True)
    kept, faults = done.stdout.split()
    return kept == "True", int(faults)


@pytest.mark.parametrize("thread", ["the first", "another"])
def test_arrays_of_one_step_are_not_fetched_again_for_the_next(thread):
    """Of any thread, if there is one core."""
    kept, ours = page_faults("kept", thread)
    if not kept:
        pytest.skip("the C library of this system has no mallopt")
    _, default = page_faults("default", thread)
    assert default >= 20 * 2**27 / 2**21  # one a huge page of every array, at least
    assert ours < default / 10


FRAGMENTS = """
import numpy as np
from iresnet_jax.training import cpu

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

kept = cpu.keep_freed_memory()
large, small = zip(*((np.ones(2**17), np.ones(2**9)) for _ in range(200)))
del large  # holes of 1 MiB
before = resident()
print(kept and cpu.return_freed_memory(), before - resident())
"""


def test_holes_between_arrays_are_returned_once():
    done = subprocess.run([sys.executable, "-c", FRAGMENTS], capture_output=True, text=True, check=True)
    returned, difference = done.stdout.split()
    if returned != "True":
        pytest.skip("the C library of this system has no malloc_trim")
    assert int(difference) > 100 * 2**20


def config_of(batch_size, kind="series"):
    config = Config()
    training = dataclasses.replace(config.training, batch_size=batch_size)
    return dataclasses.replace(config, training=training, logdet=dataclasses.replace(config.logdet, kind=kind))


@pytest.mark.parametrize(
    ("batch_size", "cores", "devices"),
    [(64, 2, 2), (64, 1, 1), (64, 3, 2), (63, 2, 1), (63, 4, 3), (16, 16, 2), (15, 2, 1), (128, 12, 8), (1, 4, 1)],
)
def test_devices_share_batches_evenly(batch_size, cores, devices):
    assert cpu.num_devices(config_of(batch_size), cores) == devices


def test_exact_logdets_take_one_device():
    assert cpu.num_devices(config_of(64, "exact"), 4) == 1


DEVICES = """
import jax
from iresnet_jax.training import cpu
from iresnet_jax.runs.config import Config

print(cpu.use_all_cores(Config()), jax.local_device_count(), cpu.use_all_cores(Config()), cpu.num_cores())
"""


def devices_under(**environment):
    plain = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES")}
    done = subprocess.run([sys.executable, "-c", DEVICES], capture_output=True, text=True, check=True, env=plain | environment)
    return tuple(map(int, done.stdout.split()))


def test_every_core_gets_a_device_before_jax_starts_and_not_after():
    chosen, made, chosen_again, cores = devices_under()
    assert chosen == made == cpu.num_devices(Config(), cores)
    assert chosen_again == 0


@pytest.mark.parametrize(
    "setting", [{"JAX_NUM_CPU_DEVICES": "3"}, {"XLA_FLAGS": "--xla_force_host_platform_device_count=3"}], ids=str
)
def test_the_user_s_number_of_devices_holds(setting):
    assert devices_under(**setting)[:2] == (0, 3)


@pytest.fixture
def flags(monkeypatch):
    """Environment without flags, on a machine without accelerators."""
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setattr(cpu, "_has_cpus_alone", lambda _: True)
    return lambda: set(os.environ["XLA_FLAGS"].split())


def test_flags_that_the_user_has_set_stay(flags, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=3")
    chosen = set(cpu.compile_quickly())
    assert flags() == {"--xla_backend_optimization_level=3"} | chosen
    assert not any("optimization_level" in flag for flag in chosen)


def test_flags_are_set_once(flags):
    chosen = cpu.compile_quickly()
    assert chosen
    assert flags() == set(chosen)
    assert cpu.compile_quickly() == ()


def test_accelerators_see_no_flags(flags, monkeypatch):
    monkeypatch.setattr(cpu, "_has_cpus_alone", lambda _: False)
    assert cpu.compile_quickly() == ()
    assert not flags()


def test_other_platforms_are_not_taken_for_cpus(monkeypatch):
    assert cpu._has_cpus_alone("cpu")
    assert not cpu._has_cpus_alone("cuda,cpu")
    monkeypatch.setattr(cpu, "entry_points", lambda group: ["cuda12"])
    assert not cpu._has_cpus_alone(None)


def test_the_compiler_knows_the_flags():
    program = "from iresnet_jax.training import cpu; import jax; cpu.compile_quickly(); print(jax.jit(lambda x: x + 1)(1.0))"
    environment = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == "2.0"
