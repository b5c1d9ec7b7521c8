"""What a CPU needs to train fast, set up before JAX starts: memory that stays, quick compilation, a device a core.

XLA allocates the temporary arrays of every step anew on a CPU. By default the system finds and clears their memory at every
step, which costs much of its time, in small pages most (`iresnet_jax.runs.interpreter` asks for large ones). And XLA runs
few operations of a step on several cores at once, while devices that share the batch keep a core each. Accelerators see nothing
of this.
"""

import ctypes
import os
import sys
from importlib.metadata import entry_points, version
from importlib.util import find_spec
from typing import Any

import jax

from iresnet_jax.runs.config import Config

LEAST_EXAMPLES = 8  # of each device; smaller shares are computed less efficiently
_LARGEST = 2**31 - 1  # that a C int holds
# Parameters of glibc's mallopt and their values.
_SETTINGS = {
    -1: _LARGEST,  # M_TRIM_THRESHOLD: never return the end of the heap
    -2: 2**26,  # M_TOP_PAD: ask for that much more at a time
    -3: _LARGEST,  # M_MMAP_THRESHOLD: no mapping of their own for large arrays
}
_ONE_ARENA = {-8: 1}  # M_ARENA_MAX


def keep_freed_memory() -> bool:
    """Makes glibc's allocator hold on to memory that is freed; call it before JAX starts its threads.

    An arena of a thread holds arrays of less than 64 MiB, and larger ones are returned all the same; only the first thread's
    has no limit. Where there is one core, all threads share it. On several, compilation would take longer for it.

    Returns:
        Whether the C library could be told so: True on Linux with glibc.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # another C library
        return False
    settings = _SETTINGS | (_ONE_ARENA if num_cores() == 1 else {})
    return all([mallopt(parameter, value) == 1 for parameter, value in settings.items()])


def return_freed_memory() -> bool:
    """Returns what is freed to the system once, such as a compiler's memory before the first step; see `keep_freed_memory`.

    Returns:
        Whether the C library could be told so.
    """
    try:
        return sys.platform.startswith("linux") and ctypes.CDLL(None).malloc_trim(0) == 1
    except (AttributeError, OSError):  # another C library
        return False


def compile_quickly() -> tuple[str, ...]:
    """Sets ``XLA_FLAGS`` that make compiling on a CPU cheaper; call it before JAX touches a device.

    Programs of this library spend their time in convolutions and matrix products, which come compiled with XLA: more than the
    first level of optimisation makes little faster. In jaxlib 0.10 the emitters of fusions hold on to much memory; those before
    them take half of a process' memory and make steps a little longer. A flag that the user has set stays.

    Returns:
        The flags that were set; none where there may be an accelerator.
    """
    settings: Any = jax.config
    if not _has_cpus_alone(settings.jax_platforms):
        return ()
    flags = {"--xla_backend_optimization_level": "1"}
    if version("jaxlib").startswith("0.10."):  # later ones do not know the flag, which they end at
        flags["--xla_cpu_use_fusion_emitters"] = "false"
    given = os.environ.get("XLA_FLAGS", "")
    chosen = tuple(f"{name}={value}" for name, value in flags.items() if name not in given)
    os.environ["XLA_FLAGS"] = " ".join(filter(None, [given, *chosen]))
    return chosen


def _has_cpus_alone(platforms: str | None) -> bool:
    """Whether JAX has no other platform to choose, as far as this can be known before it starts."""
    if platforms:
        return platforms == "cpu"
    return not entry_points(group="jax_plugins") and not any(map(find_spec, ("jax_plugins", "libtpu")))


def use_all_cores(config: Config) -> int:
    """Makes as many CPU devices as `num_devices` says; call it before JAX touches a device, in a run of one process.

    ``JAX_NUM_CPU_DEVICES``, and ``XLA_FLAGS`` with ``--xla_force_host_platform_device_count``, take precedence.

    Returns:
        The number of devices; 0 if the user's own setting holds, JAX has started, or there may be an accelerator.
    """
    settings: Any = jax.config  # whose fields type checkers cannot see
    is_set = settings.jax_num_cpu_devices >= 0 or "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if is_set or not _has_cpus_alone(settings.jax_platforms):
        return 0
    devices = num_devices(config, num_cores())
    try:
        jax.config.update("jax_num_cpu_devices", devices)
    except RuntimeError:  # which JAX raises once its backend is there
        return 0
    return devices


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def num_devices(config: Config, cores: int) -> int:
    """The most devices, up to one a core, that share a config's batches evenly with at least `LEAST_EXAMPLES` each.

    One where log-determinants are exact: their batches of LU factorisations dead-lock on several CPU devices (jaxlib 0.10).
    """
    size = config.training.batch_size
    if config.logdet.kind == "exact":
        return 1
    return max(n for n in range(1, cores + 1) if n == 1 or (size % n == 0 and size >= LEAST_EXAMPLES * n))
