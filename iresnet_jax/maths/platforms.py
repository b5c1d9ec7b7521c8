"""The kind of device that programs are made for, which need not be the kind that makes them, and how they are compiled.

A few choices that change no result depend on it: the form of convolutions and biases, and whether blocks are unrolled. They
ask `platform` and not JAX, so that a machine without accelerators can compile for one (`iresnet_jax.runs.planning.plan`).
"""

import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from typing import Any

import jax
import jax.core
import numpy as np

# Options of XLA:CPU that make compiling cheaper. Programs of this library spend their time in convolutions and matrix products,
# which come compiled with XLA: more than the first level of optimisation makes little faster. In jaxlib 0.10 the emitters of
# fusions hold on to much memory; those before them take half of a process' memory and make steps a little longer.
QUICK: Mapping[str, int | bool] = {"xla_backend_optimization_level": 1}
if version("jaxlib").startswith("0.10."):  # later ones do not know the option, which they refuse
    QUICK = {**QUICK, "xla_cpu_use_fusion_emitters": False}

# Of programs that run once in a training: LLVM optimises nothing, and compiling takes less than half of the time. Products and
# convolutions run as before, all else takes several times as long: fresh variables gain, certificates of large models do not.
RARE: Mapping[str, int | bool] = {**QUICK, "xla_backend_optimization_level": 0}

_ARRAYS = jax.Array | np.ndarray | np.generic | bool | int | float
_chosen = jax.make_user_context(default_value=None)  # JAX traces a function again if it changes
_speed = jax.make_user_context(default_value=None)  # of compiling: None or "quick"


def platform() -> str:
    """Name of the platform that functions are traced for, such as "cpu", "gpu" or "tpu".

    It is the platform that this process runs on, except within `compiling_for`.
    """
    return _chosen.value or jax.default_backend()


def is_slow_in_place() -> bool:
    """Whether an elementwise operation takes several times as long where its result overwrites an operand.

    It does with XLA:CPU's older emitters of fusions, which training asks for (`QUICK`): LLVM vectorises their loops only for
    arrays that do not overlap; other loops run entry by entry.
    """
    asked = {**_flags(), **(quick_options() if _speed.value else {})}
    return platform() == "cpu" and str(asked.get("xla_cpu_use_fusion_emitters")).lower() == "false"


def quick_options(*, is_rare: bool = False) -> dict[str, int | bool]:
    """`QUICK` or `RARE` on a CPU, less what ``XLA_FLAGS`` says otherwise; nothing on accelerators."""
    options, flags = RARE if is_rare else QUICK, _flags()
    return {name: value for name, value in options.items() if name not in flags} if platform() == "cpu" else {}


def lower_quickly(mapped: Any, *arguments: Any) -> Any:
    """The program of a jitted function for such arguments, for `compile_quickly`."""
    with _speed("quick"):
        return mapped.lower(*arguments)


def compile_quickly(lowered: Any) -> Any:
    """The compiled program of `lower_quickly`, by `quick_options`."""
    return lowered.compile(compiler_options=quick_options() or None)


def quick_jit(
    function: Callable[..., Any], *, static_argnums: tuple[int, ...] = (), is_rare: bool = False
) -> Callable[..., Any]:
    """``jax.jit`` by `quick_options`, with products in float32 where an accelerator's default would be coarser.

    Within other programs, which have options of their own, and with objects that JAX does not know, it is the function itself.
    A program that runs rarely is compiled by `RARE`.
    """

    @functools.lru_cache
    def program(*options):
        return jax.jit(function, static_argnums=static_argnums, compiler_options=dict(options) or None)

    @functools.wraps(function)
    def call(*arguments):
        given = [argument for place, argument in enumerate(arguments) if place not in static_argnums]
        if not all(isinstance(leaf, _ARRAYS) and not isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(given)):
            return function(*arguments)
        with _speed("quick"), _precise():
            return program(*quick_options(is_rare=is_rare).items())(*arguments)

    return call


def _precise() -> contextlib.AbstractContextManager[Any]:
    """Products in float32, unless the user or a run has chosen another precision."""
    settings: Any = jax.config
    chosen = settings.jax_default_matmul_precision
    return contextlib.nullcontext() if chosen or platform() == "cpu" else jax.default_matmul_precision("float32")


def _flags() -> dict[str, str]:
    """The options in ``XLA_FLAGS``."""
    flags = os.environ.get("XLA_FLAGS", "").split()
    return {name.lstrip("-"): value for name, _, value in (flag.partition("=") for flag in flags)}


@contextlib.contextmanager
def compiling_for(name: str) -> Iterator[None]:
    """Traces functions for another platform within ``with``.

    Args:
        name: A platform's name, as `platform` returns it.
    """
    with _chosen(name):
        yield
