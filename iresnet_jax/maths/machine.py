"""JAX on this machine: a CPU's cores and memory, the precision of products, and compiled programs
on disk.

What has to be set before JAX touches a device says so.
"""

import ctypes
import hashlib
import os
import platform
import re
import sys
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from iresnet_jax.storage import user_folder

MOST_CACHED_BYTES = 2**30  # of compiled programs on disk
LEAST_EXAMPLES = 8  # of each device; smaller shares are computed less efficiently

_settings: Any = jax.config  # whose fields type checkers cannot see


def start_backend() -> None:
    """Starts JAX on its devices."""
    try:
        jax.devices()
    # JAX asserts that there is a backend, if CUDA's is not installed
    except (AssertionError, RuntimeError) as error:
        reason = f" ({' '.join(str(error).split())[:200]})" if str(error) else ""
        raise RuntimeError(
            f"JAX was told to use {_settings.jax_platforms!r} and finds no such device{reason}: "
            "unset JAX_PLATFORMS to use what there is, or install JAX's plugin for it"
        ) from None


def keep_freed_memory() -> None:
    """Makes glibc's allocator hold on to memory that is freed, where there is glibc; call it before
    JAX starts its threads.

    On a CPU, XLA allocates the temporary arrays of every step again. By default the system finds
    and clears their memory at every step, which takes much of its time.
    """
    most = 2**31 - 1
    settings = {-1: most, -2: 2**26, -3: most}  # M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD
    # All threads share the first thread's arena, the only one that keeps arrays of more than 64
    # MiB.
    if num_cores() == 1:
        settings[-8] = 1  # M_ARENA_MAX
    for parameter, value in settings.items():
        _glibc("mallopt", parameter, value)


def return_freed_memory() -> None:
    """Returns freed memory to the system, such as a compiler's after it is done."""
    _glibc("malloc_trim", 0)


def _glibc(function: str, *arguments: int) -> None:
    if sys.platform.startswith("linux") and (found := getattr(ctypes.CDLL(None), function, None)):
        found(*arguments)


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def use_all_cores(config: Any) -> int:
    """Makes as many CPU devices as `num_devices` says; call it before JAX touches a device, in a
    run of one process.

    XLA runs few operations of a step on several cores at once, while devices that share the batch
    keep a core each. ``JAX_NUM_CPU_DEVICES``, and ``XLA_FLAGS`` with
    ``--xla_force_host_platform_device_count``, take precedence.

    Returns:
        The number of devices; 0 if the user's own setting holds, JAX has started, or there may be
        an accelerator.
    """
    is_set = (
        _settings.jax_num_cpu_devices >= 0
        or "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    )
    may_have_others = entry_points(group="jax_plugins") or any(
        map(find_spec, ("jax_plugins", "libtpu"))
    )
    if is_set or (_settings.jax_platforms or ("" if may_have_others else "cpu")) != "cpu":
        return 0
    devices = num_devices(config, num_cores())
    try:
        jax.config.update("jax_num_cpu_devices", devices)
    except RuntimeError:  # JAX has started its backend
        return 0
    return devices


def num_devices(config: Any, cores: int) -> int:
    """The most devices, up to one per core, that share batches and their parts evenly, with at
    least `LEAST_EXAMPLES` each.
    """
    size, num_parts = config.training.batch_size, config.training.num_parts
    return max(
        n
        for n in range(1, cores + 1)
        if n == 1 or (size % (n * num_parts) == 0 and size >= LEAST_EXAMPLES * n)
    )


def prepare_backend(matmul_precision: str) -> None:
    """Sets the precision of matrix products and convolutions on the accelerators of this process.

    Their default there has 11 bits or fewer: an inverse could not be better than 1e-3, nor norms be
    trusted.
    """
    start_backend()
    if jax.default_backend() != "cpu":
        jax.config.update("jax_default_matmul_precision", matmul_precision)


def device_summary() -> str:
    """The devices of a run, such as ``2 x cpu`` or ``4 processes of 8 x NVIDIA H100``."""
    devices, count = jax.local_devices(), jax.process_count()
    own = f"{len(devices)} x {devices[0].device_kind}"
    return own if count == 1 else f"{count} processes of {own}"


def cache_programs() -> Path | None:
    """Switches on JAX's cache of compiled programs on disk, unless JAX's settings name another
    folder or switch it off.

    JAX removes the programs that were not used for longest beyond `MOST_CACHED_BYTES`.

    Returns:
        The folder, under the user's cache folder; None where the user's settings hold, or the
        folder cannot be written.
    """
    if (
        not _settings.jax_enable_compilation_cache
        or _settings.jax_compilation_cache_dir is not None
    ):
        return None
    folder = user_folder() / "programs" / _processor()
    try:
        # Whoever can write there can have code run here.
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError:
        return None
    if not os.access(folder, os.W_OK):
        return None
    # A killed process leaves a program without its time, after which JAX would write no others.
    for program in folder.glob("*-cache"):
        if not program.with_name(program.name.removesuffix("cache") + "atime").exists():
            program.unlink(missing_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", MOST_CACHED_BYTES)
    # Looking for a program takes time, too.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.03)
    compilation_cache.reset_cache()  # programs compiled before have fixed its settings
    return folder


def _processor() -> str:
    """A name for processors that can run each other's programs, as unlike machines may share a
    home.
    """
    try:
        flags = re.search(
            r"^(?:flags|Features)\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE
        )
    except OSError:  # not Linux
        flags = None
    known = flags[1] if flags else platform.processor()
    return f"{platform.machine()}-{hashlib.sha256(known.encode()).hexdigest()[:8]}"
