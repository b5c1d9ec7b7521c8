"""The kind of device that programs are made for, which need not be the kind that makes them, how
they are compiled, and the process that runs them.

A few choices that change no result depend on it: the form of convolutions and biases, and whether
blocks are unrolled. They ask `platform` and not JAX, so that a machine without accelerators can
compile for one (`iresnet_jax.runs.plan`).
"""

import contextlib
import ctypes
import functools
import hashlib
import math
import os
import platform as hardware
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import entry_points, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.compilation_cache import compilation_cache
from jax.extend.core import get_opaque_trace_state

from iresnet_jax.storage import user_folder

# Options of XLA:CPU that make compiling cheaper. Programs of this library spend their time in
# convolutions and matrix products, which come compiled with XLA: optimisation beyond the first
# level makes them little faster. In jaxlib 0.10 the emitters of fusions hold on to much memory; the
# older emitters halve a process' memory and make steps a little longer.
CPU_OPTIONS: Mapping[str, int | bool] = {"xla_backend_optimization_level": 1}
if version("jaxlib").startswith("0.10."):  # later versions refuse the option
    CPU_OPTIONS = {**CPU_OPTIONS, "xla_cpu_use_fusion_emitters": False}

MOST_CACHED_BYTES = 2**30  # of compiled programs on disk
LEAST_EXAMPLES = 8  # of each device; smaller shares are computed less efficiently

T = TypeVar("T")
_settings: Any = jax.config  # whose fields type checkers cannot see

_chosen = jax.make_user_context(default_value=None)  # JAX traces a function again if it changes


def platform() -> str:
    """Name of the platform that functions are traced for, such as "cpu", "gpu" or "tpu".

    It is the platform that this process runs on, except within `compiling_for`.
    """
    return _chosen.value or jax.default_backend()


@contextlib.contextmanager
def compiling_for(name: str) -> Iterator[None]:
    """Traces functions for another platform within ``with``.

    Args:
        name: A platform's name, as `platform` returns it.
    """
    with _chosen(name):
        yield


@functools.cache
def compile_options() -> dict[str, int | bool]:
    """`CPU_OPTIONS` if this process runs on a CPU, without the options that ``XLA_FLAGS`` sets;
    empty on accelerators.
    """
    if jax.default_backend() != "cpu":
        return {}
    flags = os.environ.get("XLA_FLAGS", "")
    return {name: value for name, value in CPU_OPTIONS.items() if name not in flags}


def fast_compile(
    function: Callable[..., Any], *, static_argnums: tuple[int, ...] = ()
) -> Callable[..., Any]:
    """``jax.jit`` with `compile_options`, and with products in float32 where an accelerator's
    default would be coarser.

    While JAX traces another program, the function itself is called: JAX takes options of whole
    programs only.
    """

    def precise(*arguments):
        chosen = _settings.jax_default_matmul_precision
        with contextlib.nullcontext() if chosen else products_in("float32"):
            return function(*arguments)

    @functools.cache
    # Made at the first call: the options depend on the platform, and asking for it starts JAX.
    def program():
        named = functools.wraps(function)(precise)
        return jax.jit(named, static_argnums=static_argnums, compiler_options=compile_options())

    @functools.wraps(function)
    def call(*arguments):
        is_traced = get_opaque_trace_state(convention="nnx") != _untraced()
        return (function if is_traced else program())(*arguments)

    return call


@functools.cache
def _untraced() -> Any:
    """JAX's state outside of all programs."""
    with jax.core.eval_context():
        return get_opaque_trace_state(convention="nnx")


def floats(values: Any) -> jax.Array:
    """Numbers as an array of JAX's type of floats, made by NumPy: outside of programs, JAX compiles
    one for each conversion.

    JAX's own arrays of floats stay as they are, tracers among them.
    """
    if isinstance(values, jax.Array) and jnp.issubdtype(values.dtype, jnp.floating):
        return values
    return jax.device_put(np.asarray(values, jnp.result_type(float)))


def one_at_a_time(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of LAPACK's, such as a factorisation, that ``vmap`` calls for one matrix after
    another on a CPU.

    A batch of factorisations waits for threads of XLA:CPU's pool while it holds one itself: two
    programs that run at once, in threads or on several simulated devices, wait for ever (jaxlib
    0.10). The function cannot be differentiated in reverse.
    """
    looped = jax.custom_batching.sequential_vmap(lambda *matrices: function(*matrices))
    return lambda *matrices: (looped if platform() == "cpu" else function)(*matrices)


# JAX before 0.12 moves what does not change out of the body of a scan that is differentiated, and
# forgets the rules of `jax.custom_jvp` and `lax.custom_root` in the rest: second derivatives of
# inverses would be 0. Conditions stay as they are.
_FORGETS_DERIVATIVES = jax.__version_info__ < (0, 12)
_MOST_ENTRIES = 16  # entries that one product of `stored` takes together


def scan_or_unroll(
    step: Callable[[Any, Any], Any], carry: T, xs: Any, *, unroll: bool, reverse: bool = False
) -> T:
    """``carry = step(carry, x)`` for every slice ``x`` of the arrays in ``xs``, by ``lax.scan`` or
    one after the other; the slices in reverse order are for steps that solve equations.
    """
    num = len(jax.tree.leaves(xs)[0])
    if unroll:
        for k in reversed(range(num)) if reverse else range(num):
            carry = step(carry, jax.tree.map(lambda x, k=k: x[k], xs))
        return carry

    def in_condition(carry, numbered):
        k, x = numbered
        return lax.cond(k >= 0, lambda carry: step(carry, x), lambda carry: carry, carry), None

    if reverse and _FORGETS_DERIVATIVES:
        return lax.scan(in_condition, carry, (jnp.arange(num), xs), reverse=True)[0]
    return lax.scan(lambda carry, x: (step(carry, x), None), carry, xs, reverse=reverse)[0]


def stored(x: jax.Array) -> jax.Array:
    """The batch ``x``, put into memory before it is used, on CPU.

    Unrolled blocks are one program, in which XLA:CPU fuses the sum ``x + g_1 + g_2 + ...`` into
    everything that reads it. Each later block adds it up again: work that grows with the square of
    depth. ``lax.optimization_barrier`` does not stop it; a matrix product does, and by the identity
    it is exact.
    """
    if platform() != "cpu":
        return x
    # examples stay apart
    k = max(n for n in range(1, _MOST_ENTRIES + 1) if math.prod(x.shape[1:]) % n == 0)
    product = jnp.matmul(x.reshape(-1, k), jnp.eye(k, dtype=x.dtype), precision="highest")
    return product.reshape(x.shape)


# -------------------------------------------------------------------------- the process


def start_backend() -> None:
    """Starts JAX on its devices."""
    try:
        jax.devices()
    except AssertionError:  # without a word, if CUDA's plugin is not installed
        raise RuntimeError(
            f"JAX was told to use {_settings.jax_platforms!r} and finds no such device: unset "
            "JAX_PLATFORMS to use what there is, or install JAX's plugin for it"
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


def products_in(precision: str) -> contextlib.AbstractContextManager[Any]:
    """Matrix products and convolutions of accelerators in a precision, in the body of ``with``.

    CPUs have one precision, and other programs, which are slower, where one is asked for.
    """
    if platform() == "cpu":
        return contextlib.nullcontext()
    return jax.default_matmul_precision(precision)


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
    known = flags[1] if flags else hardware.processor()
    return f"{hardware.machine()}-{hashlib.sha256(known.encode()).hexdigest()[:8]}"
