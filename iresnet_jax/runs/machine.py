"""JAX on this machine: a CPU's cores and compiler, and the precision of products.

What has to be set before JAX touches a device says so. Memory is the business of `iresnet_jax.runs.allocator`.
"""

import contextlib
import hashlib
import os
import platform
import re
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from iresnet_jax.data.cache import user_folder
from iresnet_jax.maths.platforms import CPU_OPTIONS
from iresnet_jax.runs.allocator import num_cores

MOST_CACHED_BYTES = 2**30  # of compiled programs on disk
LEAST_EXAMPLES = 8  # of each device; smaller shares are computed less efficiently

PCI, GOOGLE = Path("/sys/bus/pci/devices"), "0x1ae0"  # where Linux lists devices, and the vendor of TPUs
TPU_VARIABLES = ("TPU_NAME", "TPU_ACCELERATOR_TYPE", "TPU_WORKER_ID", "TPU_WORKER_HOSTNAMES")

_settings: Any = jax.config  # whose fields type checkers cannot see


def ignore_missing_tpu() -> bool:
    """Keeps JAX from starting libtpu where it is installed, as for ``plan``, but no TPU is there.

    Looking for one writes alarming lines, and holds the lock of its compiler, which serves one process at a time. Call this
    before JAX touches a device.

    Returns:
        Whether JAX was told to use CPUs.
    """
    is_chosen = bool(_settings.jax_platforms) or any(name in os.environ for name in TPU_VARIABLES)
    if is_chosen or entry_points(group="jax_plugins") or find_spec("jax_plugins") or not find_spec("libtpu"):
        return False
    vendors = {path.read_text().strip() for path in PCI.glob("*/vendor")}
    if not vendors or GOOGLE in vendors or any(Path("/dev").glob("accel*")):
        return False
    jax.config.update("jax_platforms", "cpu")
    return True


def start_backend() -> None:
    """Starts JAX on its devices.

    Raises:
        RuntimeError: If it finds none of the platform that it was told to use.
    """
    try:
        jax.devices()
    except (AssertionError, RuntimeError) as error:  # JAX asserts that there is a backend, if CUDA's is not installed
        reason = f" ({' '.join(str(error).split())[:200]})" if str(error) else ""
        raise RuntimeError(
            f"JAX was told to use {_settings.jax_platforms!r} and finds no such device{reason}: unset JAX_PLATFORMS to use "
            "what there is, or install JAX's plugin for it"
        ) from None


def compile_quickly() -> tuple[str, ...]:
    """Sets `platforms.CPU_OPTIONS` as ``XLA_FLAGS``, for programs that ask for no options; call it before JAX touches a device.

    A flag that the user has set stays.

    Returns:
        The flags that were set; none where there may be an accelerator.
    """
    if not _has_cpus_alone(_settings.jax_platforms):
        return ()
    given = os.environ.get("XLA_FLAGS", "")
    chosen = tuple(f"--{name}={str(value).lower()}" for name, value in CPU_OPTIONS.items() if name not in given)
    os.environ["XLA_FLAGS"] = " ".join(filter(None, [given, *chosen]))
    return chosen


def _has_cpus_alone(platforms: str | None) -> bool:
    """Whether JAX has no other platform to choose, as far as this can be known before it starts."""
    if platforms:
        return platforms == "cpu"
    return not entry_points(group="jax_plugins") and not any(map(find_spec, ("jax_plugins", "libtpu")))


def use_all_cores(config: Any) -> int:
    """Makes as many CPU devices as `num_devices` says; call it before JAX touches a device, in a run of one process.

    XLA runs few operations of a step on several cores at once, while devices that share the batch keep a core each.
    ``JAX_NUM_CPU_DEVICES``, and ``XLA_FLAGS`` with ``--xla_force_host_platform_device_count``, take precedence.

    Returns:
        The number of devices; 0 if the user's own setting holds, JAX has started, or there may be an accelerator.
    """
    is_set = _settings.jax_num_cpu_devices >= 0 or "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if is_set or not _has_cpus_alone(_settings.jax_platforms):
        return 0
    devices = num_devices(config, num_cores())
    try:
        jax.config.update("jax_num_cpu_devices", devices)
    except RuntimeError:  # which JAX raises once its backend is there
        return 0
    return devices


def num_devices(config: Any, cores: int) -> int:
    """The most devices, up to one per core, that share batches and their parts evenly, with at least `LEAST_EXAMPLES` each."""
    size, num_parts = config.training.batch_size, config.training.num_parts
    return max(n for n in range(1, cores + 1) if n == 1 or (size % (n * num_parts) == 0 and size >= LEAST_EXAMPLES * n))


def prepare_backend(matmul_precision: str) -> None:
    """Sets the precision of matrix products and convolutions on the accelerators of this process.

    Their default there has 11 bits or fewer: an inverse could not be better than 1e-3, nor norms be trusted.

    Raises:
        RuntimeError: If JAX cannot start, see `start_backend`.
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
    """Switches on JAX's cache of compiled programs on disk, unless JAX's settings name another folder or switch it off.

    At a start, the programs that were not used for longest are removed until the others take at most `MOST_CACHED_BYTES`: JAX
    itself would look at every file before it writes one.

    Returns:
        The folder, under the user's cache folder; None where the user's settings hold, or the folder cannot be written.
    """
    if not _settings.jax_enable_compilation_cache or _settings.jax_compilation_cache_dir is not None:
        return None
    folder = user_folder() / "programs" / _processor()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # who can write there can have code run here
    except OSError:
        return None
    if not os.access(folder, os.W_OK):
        return None
    remove_oldest(folder, MOST_CACHED_BYTES)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.03)  # to look for a program takes time, too
    compilation_cache.reset_cache()  # which programs that were compiled before have fixed
    return folder


def remove_oldest(folder: Path, most_bytes: int) -> None:
    """Removes the files of a folder that were not used for longest until the others take at most ``most_bytes``."""
    left = most_bytes
    with contextlib.suppress(OSError):  # another process removes the same files
        found = [(path.stat(), path) for path in folder.iterdir()]
        for status, path in sorted(found, key=lambda each: max(each[0].st_atime, each[0].st_mtime), reverse=True):
            left -= status.st_size
            if left < 0:
                path.unlink()


def _processor() -> str:
    """A name for processors that can run each other's programs: homes are shared by unlike machines."""
    try:
        flags = re.search(r"^(?:flags|Features)\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:  # not Linux
        flags = None
    known = flags[1] if flags else platform.processor()
    return f"{platform.machine()}-{hashlib.sha256(known.encode()).hexdigest()[:8]}"
