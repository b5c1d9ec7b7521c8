"""How JAX uses this machine: a CPU's cores and compiler, and the precision of products.

What has to be set before JAX touches a device says so. Memory is the business of `iresnet_jax.runs.allocator`, programs on disk
are that of `iresnet_jax.runs.stored_programs`.
"""

import hashlib
import os
import platform
import re
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax

from iresnet_jax.maths.platforms import QUICK
from iresnet_jax.runs.allocator import num_cores

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
    """Sets ``XLA_FLAGS`` that make compiling on a CPU cheaper, see `platforms.QUICK`; call it before JAX touches a device.

    A flag that the user has set stays.

    Returns:
        The flags that were set; none where there may be an accelerator.
    """
    if not _has_cpus_alone(_settings.jax_platforms):
        return ()
    given = os.environ.get("XLA_FLAGS", "")
    chosen = tuple(f"--{name}={str(value).lower()}" for name, value in QUICK.items() if name not in given)
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


def processor() -> str:
    """A name for processors that can run each other's programs: homes are shared by unlike machines."""
    try:
        flags = re.search(r"^(?:flags|Features)\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:  # not Linux
        flags = None
    known = flags[1] if flags else platform.processor()
    return f"{platform.machine()}-{hashlib.sha256(known.encode()).hexdigest()[:8]}"
