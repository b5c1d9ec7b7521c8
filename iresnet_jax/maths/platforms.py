"""The kind of device that programs are made for, which need not be the kind that makes them, and how they are compiled.

A few choices that change no result depend on it: the form of convolutions and biases, and whether blocks are unrolled. They
ask `platform` and not JAX, so that a machine without accelerators can compile for one (`iresnet_jax.runs.planning.plan`).
"""

import contextlib
import functools
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
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

_UNKNOWN = object()
_ARRAYS = jax.Array | np.ndarray | np.generic | bool | int | float
_chosen = jax.make_user_context(default_value=None)  # JAX traces a function again if it changes
_speed = jax.make_user_context(default_value=None)  # of compiling: None or "quick"
_settings: Any = jax.config  # whose fields type checkers cannot see

DEBUGGING = ("jax_disable_jit", "jax_debug_nans", "jax_debug_infs")  # settings with which programs are not what they are
MOST_PROGRAMS = 64  # of one function that are kept in memory; those that were not used for longest are dropped
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


def floats(values: Any) -> jax.Array:
    """Numbers as an array of JAX's type of floats, made by NumPy: outside of programs, JAX compiles one for each conversion."""
    return jax.device_put(np.asarray(values, jnp.result_type(float)))


def one_at_a_time(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of LAPACK's, such as a factorisation, that ``vmap`` calls for one matrix after another on a CPU.

    A batch of them waits for threads of XLA:CPU's pool while it has one itself: two programs that run at once, in threads or on
    several simulated devices, wait for ever (jaxlib 0.10). The function cannot be differentiated in reverse.
    """
    looped = jax.custom_batching.sequential_vmap(lambda *matrices: function(*matrices))
    return lambda *matrices: (looped if platform() == "cpu" else function)(*matrices)


def find_programs_by(find: Find | None) -> None:
    """Makes a function that every program is asked of before it is traced; None asks none.

    Args:
        find: ``(name, function, lower, arguments, options) ->`` the compiled program of what the function, with all that it is
            bound to, computes of arguments like these; ``lower()`` traces and lowers it, and options are those of XLA. None
            leaves it to JAX.
    """
    global _find
    _find = find


def kind_of(leaf: Any) -> tuple[Any, ...]:
    """What a program depends on of an argument that is an array, the shape and dtype of one, or a number of Python's."""
    if isinstance(leaf, bool | int | float):
        return (type(leaf).__name__,)
    return leaf.shape, leaf.dtype, getattr(leaf, "weak_type", False), getattr(leaf, "committed", False)


class FoundPrograms:
    """The programs of one function that were found, by the arguments that they are for.

    Args:
        function: The function.
        how: How it is mapped.
    """

    def __init__(self, function: Any, how: Any):
        self._function, self._how, self._programs = function, how, OrderedDict()
        self._lock = threading.RLock()  # of threads that train at once, one compiles and the others wait for it

    def of(
        self, lower: Callable[[], Any], arguments: tuple[Any, ...], *, bound: Any = (), options: dict[str, Any] | None = None
    ) -> Any:
        """The compiled program for arguments; None if there is none, see `find_programs_by`.

        Args:
            lower: Traces and lowers the function.
            arguments: Pytrees of arrays, of their shapes and dtypes, or of Python's numbers.
            bound: What the function has been given beside them.
            options: Options of XLA.
        """
        # What JAX alone looks after: a platform that is compiled for, a mesh, searches for what is not finite.
        is_plain = (
            not _chosen.value
            and jax.sharding.get_abstract_mesh().empty
            and not any(getattr(_settings, name) for name in DEBUGGING)
        )
        if _find is None or not is_plain:
            return None
        leaves, structure = jax.tree.flatten(arguments)
        # Settings may be those of a thread or of a block of code; some have no value.
        settings = [getattr(_settings, name, None) for name in _setting_names()]
        key = bound, structure, tuple(map(kind_of, leaves)), tuple((options or {}).items()), tuple(settings)
        with self._lock:
            program = self._programs.pop(key, _UNKNOWN)
            if program is _UNKNOWN:
                name = getattr(getattr(self._function, "func", self._function), "__name__", "_fun")  # JAX's, too
                program = _find(name, (self._function, self._how, bound), lower, arguments, options or {})
            self._programs[key] = program
            if len(self._programs) > MOST_PROGRAMS:
                self._programs.popitem(last=False)
            return program


@functools.cache
def _setting_names() -> tuple[str, ...]:
    return tuple(_settings.values)


def quick_jit(
    function: Callable[..., Any], *, static_argnums: tuple[int, ...] = (), is_rare: bool = False
) -> Callable[..., Any]:
    """``jax.jit`` by `quick_options`, with products in float32 where an accelerator's default would be coarser.

    Within other programs, which have options of their own, and with objects that JAX does not know, it is the function itself.
    A program that runs rarely is compiled by `RARE`. Programs are looked for by `find_programs_by`.
    """
    programs = FoundPrograms(function, ("jit", static_argnums))

    @functools.lru_cache
    def program(*options):
        return jax.jit(function, static_argnums=static_argnums, compiler_options=dict(options) or None)

    @functools.wraps(function)
    def call(*arguments):
        given = tuple(argument for place, argument in enumerate(arguments) if place not in static_argnums)
        leaves = jax.tree.leaves(given)
        options = quick_options(is_rare=is_rare)
        # Options are of whole programs. While another one is traced, a new array is part of it.
        is_within = any(isinstance(leaf, jax.core.Tracer) for leaf in ([*leaves, jnp.asarray(0.0)] if options else leaves))
        if is_within or not all(isinstance(leaf, _ARRAYS) for leaf in leaves):
            return function(*arguments)
        with _speed("quick"), _precise():
            jitted, found = program(*options.items()), None
            if _find is not None and _are_on_first_device(leaves):
                bound = tuple(arguments[place] for place in static_argnums)
                found = programs.of(lambda: jitted.lower(*arguments), given, bound=bound, options=options)
            return jitted(*arguments) if found is None else found(*given)

    return call


def _are_on_first_device(leaves: list[Any]) -> bool:
    if _settings.jax_default_device is not None:
        return False
    first = {jax.local_devices()[0]}
    return all(leaf.sharding.device_set == first for leaf in leaves if isinstance(leaf, jax.Array))


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
