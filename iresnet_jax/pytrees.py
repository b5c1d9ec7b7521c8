"""Frozen dataclasses as pytrees and as JSON data with their types, and results in one line."""

import dataclasses
import json
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.tree_util import GetAttrKey

T = TypeVar("T")


@typing.dataclass_transform(
    frozen_default=True, eq_default=False, field_specifiers=(dataclasses.field,)
)
def pytree(arrays: Sequence[str] = ()) -> Callable[[type[T]], type[T]]:
    """Makes a class a frozen dataclass and a pytree: the named fields hold arrays or pytrees, all
    others are static.

    Two instances are equal if their static fields and the numbers in their arrays are equal.
    ``__post_init__`` does not run when JAX rebuilds an instance, as tracers have no values to
    check.
    """

    def register(cls: type[T]) -> type[T]:
        made: Any = dataclasses.dataclass(frozen=True, eq=False)(cls)
        static = tuple(field.name for field in dataclasses.fields(made) if field.name not in arrays)

        def known(value):
            return tuple(getattr(value, name) for name in static)

        def flatten(value):
            return [getattr(value, name) for name in arrays], known(value)

        def flatten_with_keys(value):
            children, others = flatten(value)
            return [*zip(map(GetAttrKey, arrays), children, strict=True)], others

        def unflatten(known, children):
            value = object.__new__(made)
            vars(value).update(zip((*static, *arrays), (*known, *children), strict=True))
            return value

        def equal(value, other):
            if type(other) is not made:
                return NotImplemented
            (ours, structure), (theirs, of_other) = jax.tree.flatten(value), jax.tree.flatten(other)
            return structure == of_other and all(map(np.array_equal, ours, theirs))

        made.__eq__, made.__hash__ = equal, lambda value: hash((made, known(value)))
        jax.tree_util.register_pytree_with_keys(made, flatten_with_keys, unflatten, flatten)
        return made

    return register


def tagged(value: Any) -> Any:
    """A dataclass as JSON data, with the name of every dataclass in it under "type"; arrays are
    lists of their numbers.

    A field with "name" in its metadata holds something that is not data: the function "name"
    returns its name; the field is left out if that is None.
    """
    if dataclasses.is_dataclass(value):
        plain = {"type": type(value).__name__}
        for field in dataclasses.fields(value):
            entry = getattr(value, field.name)
            if field.init and (entry is not None or "name" not in field.metadata):
                plain[field.name] = field.metadata.get("name", tagged)(entry)
        return plain
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        return np.asarray(value).tolist()
    if isinstance(value, tuple):
        return [tagged(entry) for entry in value]
    return value


def from_tagged(plain: Any, classes: Mapping[str, type]) -> Any:
    """The value that `tagged` described, of dataclasses by their names; lists become tuples."""
    if isinstance(plain, Mapping):
        fields = {
            name: from_tagged(value, classes) for name, value in plain.items() if name != "type"
        }
        return classes[plain["type"]](**fields)
    if isinstance(plain, list):
        return tuple(from_tagged(entry, classes) for entry in plain)
    return plain


def in_words(result: Any, facts: Callable[[], str]) -> str:
    """A named tuple of arrays as a prompt shows it: the facts, instead of all numbers; or shapes,
    where there are no numbers, as within ``jit``.
    """
    try:
        return f"{type(result).__name__}: {facts()}"
    except (TypeError, ValueError, RuntimeError):  # of traced, abstract, empty or deleted arrays
        fields = ", ".join(f"{name}={_shape(entry)}" for name, entry in result._asdict().items())
        return f"{type(result).__name__}({fields})"


def _shape(entry: Any) -> str:
    is_array = hasattr(entry, "shape") and hasattr(entry, "dtype")
    return f"{entry.dtype}{list(entry.shape)}" if is_array else repr(entry)


def largest(numbers: Any) -> str:
    """The largest of some numbers, for `in_words`."""
    return f"{np.max(np.asarray(numbers)):.2g}"


def share(is_so: Any) -> str:
    """How many of some booleans are true, for `in_words`."""
    return f"{np.sum(np.asarray(is_so), dtype=int)} of {np.size(is_so)}"


def first_difference(
    ours: Any, theirs: Any, path: str, where: tuple[str, str] = ("now", "before")
) -> str | None:
    """Names the first entry in which plain data differ, with both values; None if they agree.

    Args:
        ours: Some data.
        theirs: Data to compare with.
        path: Name of the data in the sentence.
        where: Names of the two places in the sentence.
    """
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key in sorted({*ours, *theirs}):
            if key not in ours or key not in theirs:
                return f"{path}.{key} is there {where[key in theirs]} alone"
            if difference := first_difference(ours[key], theirs[key], f"{path}.{key}", where):
                return difference
        return None
    if ours == theirs:
        return None
    return f"{path} is {json.dumps(ours)} {where[0]} and {json.dumps(theirs)} {where[1]}"
