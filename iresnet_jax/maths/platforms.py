"""The kind of device that programs are made for, which need not be the kind that makes them, and
how they are compiled.

A few choices that change no result depend on it: the form of convolutions and biases, and whether
blocks are unrolled. They ask `platform` and not JAX, so that a machine without accelerators can
compile for one (`iresnet_jax.runs.plan`).
"""

import contextlib
import functools
import math
import os
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from typing import Any, TypeVar

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import get_opaque_trace_state

# Options of XLA:CPU that make compiling cheaper. Programs of this library spend their time in
# convolutions and matrix products, which come compiled with XLA: optimisation beyond the first
# level makes them little faster. In jaxlib 0.10 the emitters of fusions hold on to much memory; the
# older emitters halve a process' memory and make steps a little longer.
CPU_OPTIONS: Mapping[str, int | bool] = {"xla_backend_optimization_level": 1}
if version("jaxlib").startswith("0.10."):  # later versions refuse the option
    CPU_OPTIONS = {**CPU_OPTIONS, "xla_cpu_use_fusion_emitters": False}

T = TypeVar("T")

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
        if platform() == "cpu" or jax.config.jax_default_matmul_precision:  # pyright: ignore[reportAttributeAccessIssue]
            return function(*arguments)
        with jax.default_matmul_precision("float32"):
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
