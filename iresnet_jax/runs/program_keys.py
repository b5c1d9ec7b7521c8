"""What compiled programs depend on: their function with the values that it is bound to, shapes, sources, versions, settings.

A key says all of it, so that equal keys have equal programs. What it does not see are module variables of this package that a
process has changed.
"""

import dataclasses
import functools
import hashlib
import os
import sys
import time
import types
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np

from iresnet_jax.branches import kinds
from iresnet_jax.maths import platforms
from iresnet_jax.models.architecture import StageSpec
from iresnet_jax.models.history import History
from iresnet_jax.runs import machine
from iresnet_jax.runs.allocator import num_cores

PACKAGE = Path(__file__).parents[1]
LIBRARIES = ("jax", "jaxlib", "numpy", "optax", "flax")  # whose versions a key names
PACKAGES = ("iresnet_jax", *LIBRARIES)  # whose functions and types a key names
VARIABLES = ("XLA_", "LIBTPU_", "TPU_", "CUDA_", "NVIDIA_", "TF_")  # first letters of those that compilers heed
_CACHED = type(functools.lru_cache(len))
_settings: Any = jax.config  # whose fields type checkers cannot see


def _start() -> float:
    """When this process has started, in seconds since the epoch; where only Linux tells, 10 s ago elsewhere."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])  # since the machine has started
        return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + ticks / os.sysconf("SC_CLK_TCK")
    except (AttributeError, IndexError, OSError, ValueError):
        return time.time() - 10


_started = _start()


class UnknownError(ValueError):
    """A program depends on something that a key cannot say."""


def key_of(function: Any, arguments: tuple[Any, ...]) -> bytes:
    """All that the program of a function depends on, or of functions and what they are bound to.

    Raises:
        UnknownError: If something cannot be told, see `described` and `environment`.
    """
    return repr((described(function), described_arguments(arguments), environment())).encode()


def described_arguments(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """What a program depends on of its arguments."""
    leaves, structure = jax.tree.flatten(arguments)
    return described(structure), [str(platforms.kind_of(leaf)) for leaf in leaves]


def environment(*, with_sources: bool = True) -> dict[str, Any]:
    """What all programs of this process depend on, or without the sources of this package what compiling them depends on.

    Raises:
        UnknownError: If a source file of this package was changed since this process has imported it.
    """
    devices, values = jax.local_devices(), _settings.values
    return {
        "versions": (sys.version, *_versions()),
        "sources": _hash_of_sources(_newest_source()) if with_sources else "",
        "devices": [(device.platform, device.device_kind, device.id) for device in devices],
        "runtime": (devices[0].client.platform_version, machine.processor(), num_cores()),
        "platform": (platforms.platform(), sorted(platforms.quick_options().items())),
        "variables": sorted(item for item in os.environ.items() if item[0].startswith(VARIABLES)),
        # Attributes are the values of this thread; some settings have none.
        "settings": [(name, repr(getattr(_settings, name, values[name]))) for name in sorted(values) if "cache" not in name],
    }


@functools.cache
def _versions() -> tuple[str, ...]:
    return tuple(map(version, LIBRARIES))


def _newest_source() -> float:
    # The time of the change, too: tools that copy files may keep that of their content.
    newest = max(max(found.st_mtime, found.st_ctime) for found in map(Path.stat, PACKAGE.rglob("*.py")))
    if newest > _started:
        raise UnknownError("a source file may have been changed since it was imported")
    return newest


@functools.lru_cache(maxsize=1)
def _hash_of_sources(newest: float) -> str:
    del newest  # after which they are read again
    digest = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        digest.update(b"%b %d " % (bytes(path.relative_to(PACKAGE)), path.stat().st_size) + path.read_bytes())
    return digest.hexdigest()


def described(value: Any, within: tuple[int, ...] = ()) -> Any:
    """A value as nested tuples that are equal for equal values alone, in all processes; functions with what they are bound to.

    Args:
        value: Functions and objects of `PACKAGES` and Python, plain data, arrays.
        within: Identities of what holds the value, as functions may refer to themselves.

    Raises:
        UnknownError: If something in the value comes from elsewhere, or is of another kind.
    """
    name = _origin(type(value).__module__, type(value).__qualname__)
    if id(value) in within:
        return name, within.index(id(value))
    match value:
        case None | bool() | int() | float() | complex() | str() | bytes() | types.EllipsisType():
            return name, repr(value)
        case np.ndarray() | np.generic() | jax.Array() if not value.dtype.hasobject:
            return name, str(value.dtype), value.shape, hashlib.sha256(np.asarray(value).tobytes()).hexdigest()
        case type():
            return name, _origin(value.__module__, value.__qualname__)
        case set() | frozenset():
            return name, *sorted((described(part, within) for part in value), key=repr)
        case tuple() | list():
            parts = value
        case dict():
            parts = value.items()
        case functools.partial():
            parts = value.func, value.args, value.keywords
        case _ if isinstance(value, _CACHED):
            parts = (value.__wrapped__,)
        case types.MethodType():
            parts = value.__func__, value.__self__
        case types.CodeType():
            parts = value.co_qualname, value.co_firstlineno, value.co_code, value.co_names, value.co_consts
        case types.FunctionType():
            _origin(value.__globals__["__name__"], value.__qualname__)  # ``functools.wraps`` changes ``__module__``
            cells = [cell.cell_contents for cell in value.__closure__ or ()]
            parts = value.__code__, cells, value.__defaults__, value.__kwdefaults__, vars(value)
        case jax.tree_util.PyTreeDef():
            parts = value.node_data(), value.children()
        case History():  # which no program depends on
            parts = ()
        case _ if dataclasses.is_dataclass(value):
            parts = [getattr(value, field.name) for field in dataclasses.fields(value)]
            if isinstance(value, StageSpec):  # whose kind is a name, and anybody may register one
                parts.append(kinds.get(value.kind))
        case _:
            raise UnknownError(f"{name} is none of the kinds whose values are known")
    return name, *(described(part, (*within, id(value))) for part in parts)


def _origin(module: str, name: str) -> str:
    package = module.partition(".")[0]
    if package not in PACKAGES and package not in sys.stdlib_module_names:
        raise UnknownError(f"{module}.{name} is not from {', '.join(PACKAGES)} or Python")
    return f"{module}.{name}"
