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
_settings: Any = jax.config  # whose fields type checkers cannot see

Find = Callable[[str, Any, Callable[[], Any], tuple[Any, ...], dict[str, Any]], Any]
_find: Find | None = None


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


def find_programs_by(find: Find | None) -> None:
    """Makes a function that every program is asked of before it is traced; None asks none.

    Args:
        find: ``(name, function, lower, arguments, options) ->`` the compiled program of what the function, with all that it is
            bound to, computes of arguments like these; ``lower()`` traces and lowers it, and options are those of XLA. None
            leaves it to JAX.
    """
    global _find
    _find = find


def found(function: Any, lower: Callable[[], Any], arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """The compiled program of a function for arguments like these, as the function of `find_programs_by` knows it, or None."""
    if _find is None:
        return None
    named = function[0] if isinstance(function, tuple) else function
    name = getattr(getattr(named, "func", named), "__name__", "_fun")  # JAX's, too
    return _find(name, function, lower, arguments, options)


class FoundPrograms:
    """The programs of one function that were found, by the arguments that they are for.

    Args:
        function: The function.
    """

    def __init__(self, function: Any):
        self._function, self._programs = function, {}

    def of(
        self, lower: Callable[[], Any], arguments: tuple[Any, ...], *, bound: Any = (), options: dict[str, Any] | None = None
    ) -> Any:
        """The compiled program for arguments, which are arrays; None if there is none, see `find_programs_by`.

        Args:
            lower: Traces and lowers the function.
            arguments: Arrays or pytrees of arrays.
            bound: What the function has been given beside them.
            options: Options of XLA.
        """
        if _find is None or _chosen.value or _settings.jax_disable_jit:
            return None
        leaves, structure = jax.tree.flatten(arguments)
        kinds = [
            (leaf.shape, leaf.dtype, *(getattr(leaf, name, False) for name in ("weak_type", "committed"))) for leaf in leaves
        ]
        # Settings may be those of a thread or of a block of code; some have no value.
        settings = [getattr(_settings, name, None) for name in _settings.values]
        key = bound, structure, tuple(kinds), tuple((options or {}).items()), tuple(settings)
        if key not in self._programs:
            self._programs[key] = found((self._function, bound), lower, arguments, options or {})
        return self._programs[key]


def quick_jit(
    function: Callable[..., Any], *, static_argnums: tuple[int, ...] = (), is_rare: bool = False
) -> Callable[..., Any]:
    """``jax.jit`` by `quick_options`, with products in float32 where an accelerator's default would be coarser.

    Within other programs, which have options of their own, and with objects that JAX does not know, it is the function itself.
    A program that runs rarely is compiled by `RARE`. Programs are looked for by `find_programs_by`.
    """
    programs = FoundPrograms(function)

    @functools.lru_cache
    def program(*options):
        return jax.jit(function, static_argnums=static_argnums, compiler_options=dict(options) or None)

    @functools.wraps(function)
    def call(*arguments):
        given = tuple(argument for place, argument in enumerate(arguments) if place not in static_argnums)
        leaves = jax.tree.leaves(given)
        if not all(isinstance(leaf, _ARRAYS) and not isinstance(leaf, jax.core.Tracer) for leaf in leaves):
            return function(*arguments)
        with _speed("quick"), _precise():
            options = quick_options(is_rare=is_rare)
            jitted = program(*options.items())
            if _find is not None and _settings.jax_default_device is None and all(map(_is_on_first_device, leaves)):
                bound = tuple(arguments[place] for place in static_argnums)
                compiled = programs.of(lambda: jitted.lower(*arguments), given, bound=bound, options=options)
                if compiled is not None:
                    return compiled(*given)
            return jitted(*arguments)

    return call


def _is_on_first_device(leaf: Any) -> bool:
    if isinstance(leaf, jax.Array):
        return leaf.sharding.device_set == {jax.local_devices()[0]}
    return isinstance(leaf, np.ndarray | np.generic)


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
