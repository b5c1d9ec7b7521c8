"""What `fit` is called with, checked before anything is computed: a mistake is a ``ValueError`` that names the argument."""

import os
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import jax
import jax.core
import numpy as np

from iresnet_jax.checked_dataclasses import Count, Positive, Range, checked
from iresnet_jax.data.arrays import Arrays
from iresnet_jax.maths.keys import typed_key
from iresnet_jax.models.architecture import StageSpec

KINDS: dict[str, Any] = {
    "minutes": Positive,
    "steps": Count,
    "objective": Literal["density", "classification", "hybrid"],
    "architecture": tuple[StageSpec, ...],
    "validation_fraction": Annotated[float, Range("(0, 1)")],
}


def checked_options(**options: Any) -> dict[str, Any]:
    """Options of `fit` as plain numbers, tuples and dictionaries.

    Raises:
        ValueError: If one of them is of another kind than `KINDS` says, or both minutes and steps are given.
    """
    settings, workdir = options.pop("settings", None) or {}, options.pop("workdir", None)
    if not isinstance(settings, Mapping) or not all(isinstance(name, str) for name in settings):
        raise ValueError(f'settings must be a dictionary such as {{"optimizer.learning_rate": 1e-3}}, got {settings!r}')
    if not isinstance(workdir, str | os.PathLike | None):
        raise ValueError(f"workdir must be the path of a folder, got {workdir!r}")
    if options.get("objective") == "inversion":
        raise ValueError("fit has no objective inversion: train a reconstructor by train.py --config=configs/deblurring.py")
    chosen = {name: value for name, value in options.items() if value is not None or name == "validation_fraction"}
    found = dict.fromkeys(options) | {name: checked(KINDS[name], value, name) for name, value in chosen.items()}
    if found.get("minutes") is not None and found.get("steps") is not None:
        raise ValueError(f"give minutes or steps, not both: got {found['minutes']} and {found['steps']}")
    return {**found, "settings": dict(settings), "workdir": workdir}


def seed_of(key: Any) -> int:
    """The seed of a run for a key; 0 without one.

    Raises:
        ValueError: If it is no key, or several.
    """
    if key is None:
        return 0
    if (key := typed_key(key)).shape:
        raise ValueError(f"key must be a single key, got keys of shape {key.shape}: choose one of them")
    return int(jax.random.bits(key))


def as_arrays(x: Any, labels: Any = None, context: Any = None) -> Arrays:
    """The examples in the arrays that hold them.

    Raises:
        ValueError: If one of them is no array.
    """
    others = (None if value is None else _as_array(value, name) for name, value in (("labels", labels), ("context", context)))
    return Arrays(_as_array(x, "x"), *others)


def validation_arrays(validation: Any) -> Arrays:
    """The examples that validate, from an array or a tuple ``(x, labels, context)``.

    Raises:
        ValueError: If it is a tuple of another length, or one of its entries is no array.
    """
    parts = validation if isinstance(validation, tuple) else (validation,)
    if not 1 <= len(parts) <= 3:
        raise ValueError(f"validation must be an array like x, or a tuple (x, labels, context), got {len(parts)} entries")
    return as_arrays(*parts)


def _as_array(value: Any, name: str) -> np.ndarray:
    if isinstance(value, jax.core.Tracer):
        raise ValueError(f"{name} must be an array of numbers that are known: call fit outside of jax.jit")
    try:
        array = np.asarray(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must be an array of numbers: {error}") from None
    if array.ndim == 0:
        raise ValueError(f"{name} must be an array of numbers, got a {type(value).__name__}")
    return array
