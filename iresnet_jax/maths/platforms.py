"""The kind of device that programs are made for, which need not be the kind that makes them, and
how they are compiled.

A few choices that change no result depend on it: the form of convolutions and biases, and whether
blocks are unrolled. They ask `platform` and not JAX, so that a machine without accelerators can
compile for one (`iresnet_jax.runs.plan`).
"""

import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.extend.core import get_opaque_trace_state

# Options of XLA:CPU that make compiling cheaper. Programs of this library spend their time in
# convolutions and matrix products, which come compiled with XLA: more than the first level of
# optimisation makes little faster. In jaxlib 0.10 the emitters of fusions hold on to much memory;
# those before them take half of a process' memory and make steps a little longer.
CPU_OPTIONS: Mapping[str, int | bool] = {"xla_backend_optimization_level": 1}
if version("jaxlib").startswith("0.10."):  # later ones refuse the option, which they do not know
    CPU_OPTIONS = {**CPU_OPTIONS, "xla_cpu_use_fusion_emitters": False}

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
    """`CPU_OPTIONS` if this process runs on a CPU, without those that ``XLA_FLAGS`` sets; none
    on accelerators.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    return (
        {name: value for name, value in CPU_OPTIONS.items() if name not in flags}
        if jax.default_backend() == "cpu"
        else {}
    )


def fast_compile(
    function: Callable[..., Any], *, static_argnums: tuple[int, ...] = ()
) -> Callable[..., Any]:
    """``jax.jit`` with `compile_options`, and with products in float32 where an accelerator's
    default would be coarser.

    While JAX traces another program, it is the function itself: JAX takes options of whole programs
    alone.
    """

    def precise(*arguments):
        if platform() == "cpu" or jax.config.jax_default_matmul_precision:  # pyright: ignore[reportAttributeAccessIssue]
            return function(*arguments)
        with jax.default_matmul_precision("float32"):
            return function(*arguments)

    @functools.cache
    # not before the first call: the options depend on the platform, and asking for it would start
    # JAX
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

    A batch of them waits for threads of XLA:CPU's pool while it has one itself: two programs that
    run at once, in threads or on several simulated devices, wait for ever (jaxlib 0.10). The
    function cannot be differentiated in reverse.
    """
    looped = jax.custom_batching.sequential_vmap(lambda *matrices: function(*matrices))
    return lambda *matrices: (looped if platform() == "cpu" else function)(*matrices)
