"""Checks of arguments: plain data as dataclasses, numbers in their ranges, arrays without gaps.

A field's annotation says what it may hold: `int`, `float`, `bool`, `str`, ``Literal["a", "b"]``,
``tuple[float, ...]``, another dataclass, ``X | None``, and ``Annotated[float, Range("[0, 1)")]``
for numbers within a range. The name under "type" chooses among several dataclasses.
"""

import dataclasses
import difflib
import json
import math
import types
import typing
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

import numpy as np

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Range:
    """An interval of numbers, written as in mathematics: ``[1, inf)`` contains its lower end, ``(0,
    1)`` neither end.
    """

    interval: str

    def __contains__(self, number: Any) -> bool:
        low, high = (float(end) for end in self.interval[1:-1].split(","))
        above = number >= low if self.interval[0] == "[" else number > low
        return above and (number <= high if self.interval[-1] == "]" else number < high)


Count = Annotated[int, Range("[1, inf)")]
CountOrNone = Annotated[int, Range("[0, inf)")]  # 0 switches something off
Positive = Annotated[float, Range("(0, inf)")]
NotNegative = Annotated[float, Range("[0, inf)")]
Decay = Annotated[float, Range("[0, 1)")]  # decay of an average; at 1 it would never move


def to_plain(value: Any) -> dict[str, Any]:
    """A dataclass, or anything with ``to_dict``, as JSON data."""
    plain = value.to_dict() if hasattr(value, "to_dict") else dataclasses.asdict(value)
    return json.loads(json.dumps(plain, default=_number_of_python))


def from_plain(cls: type[T], plain: Any, path: str) -> T:
    """The dataclass that a mapping describes; missing fields keep their default.

    Args:
        path: Name of the mapping in messages, such as ``config``.
    """
    if not isinstance(plain, Mapping):
        raise ValueError(f"{path} must be a dictionary, got {plain!r}")
    plain = dict(plain)
    if plain.pop("type", cls.__name__) != cls.__name__:
        raise ValueError(f"{path} is not of the type {cls.__name__}")
    fields = [field for field in dataclasses.fields(cls) if field.init]  # pyright: ignore[reportArgumentType]
    known = typing.get_type_hints(cls, include_extras=True)
    hints = {field.name: known[field.name] for field in fields}
    for name in plain:
        if name not in hints:
            close = difflib.get_close_matches(name, hints, n=1)
            hint = f"the fields are {', '.join(hints) or 'none'}"
            if close:
                hint = f"did you mean {close[0]!r}?"
            raise ValueError(f"{path} has no field {name!r}: {hint}")
    required = [
        field.name
        for field in fields
        if field.default is field.default_factory is dataclasses.MISSING
    ]
    if missing := [name for name in required if name not in plain]:
        raise ValueError(f"{path} lacks {' and '.join(missing)}")
    values = {
        name: checked(hints[name], plain[name], f"{path}.{name}") for name in hints if name in plain
    }
    try:
        return cls(**values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def checked(kind: Any, value: Any, path: str) -> Any:
    """Plain data as a value of the annotation ``kind``; ``path`` and errors as for `from_plain`."""
    if kind is Any:
        return value
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if value is None and types.NoneType in arguments:
            return None
        return _one_of(arguments, value, path)
    if origin is typing.Annotated:
        number = checked(arguments[0], value, path)
        if number not in arguments[1]:
            raise ValueError(f"{path} must lie in {arguments[1].interval}, got {value!r}")
        return number
    if origin is typing.Literal:
        if value not in arguments:
            raise ValueError(f"{path} must be one of {', '.join(arguments)}, got {value!r}")
        return value
    if origin is tuple:
        return _tuple(arguments, value, path)
    if dataclasses.is_dataclass(kind):
        return value if isinstance(value, kind) else from_plain(kind, value, path)  # pyright: ignore[reportArgumentType]
    value = _number_of_python(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if kind is int and isinstance(value, float) and value.is_integer():  # such as 1e3
        value = int(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ValueError(f"{path} must be {_NAMES[kind]}, got {value!r}")
    if kind is float and math.isnan(value):
        raise ValueError(f"{path} must be a number, got nan")
    return value


def _number_of_python(value: Any) -> Any:
    """A number of NumPy or JAX as a Python number, a dataclass as a dictionary, and any other value
    unchanged.
    """
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        return value.item()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return value


def _one_of(kinds: tuple[Any, ...], value: Any, path: str) -> Any:
    kinds = tuple(kind for kind in kinds if kind is not types.NoneType)
    if len(kinds) == 1:
        return checked(kinds[0], value, path)
    known = {kind.__name__: kind for kind in kinds}
    name = value.get("type") if isinstance(value, Mapping) else None
    if name not in known:
        raise ValueError(f"{path} must be of the type {' or '.join(known)}, got {name!r}")
    return checked(known[name], value, path)


def _tuple(arguments: tuple[Any, ...], value: Any, path: str) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise ValueError(f"{path} must be a tuple, got {value!r}")
    kinds = arguments[:1] * len(value) if arguments[-1] is ... else arguments
    if len(kinds) != len(value):
        raise ValueError(f"{path} must have {len(kinds)} entries, got {value!r}")
    return tuple(
        checked(kind, entry, f"{path}[{i}]")
        for i, (kind, entry) in enumerate(zip(kinds, value, strict=True))
    )


_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "a string"}


def check_unmasked(given: Any, name: str) -> None:
    """Raises ``ValueError`` for masked values, which NumPy and scikit-learn would uncover."""
    if np.ma.is_masked(given):
        raise ValueError(
            f"{name} has {np.ma.count_masked(given)} masked values: fill them in or drop their rows"
        )


def finite_numbers(given: np.ndarray, name: str, dtype: Any) -> np.ndarray:
    """Numbers in a type."""
    with np.errstate(over="ignore"):
        numbers = given.astype(dtype, copy=False)
    are_whole = given.dtype.kind in "biu" and numbers.dtype.kind in "biu"
    for index in np.argwhere(numbers != given if are_whole else ~np.isfinite(numbers))[:1].tolist():
        place = f"the first in row {index[0]}" + (f", column {index[-1]}" if len(index) > 1 else "")
        if np.isfinite(given[tuple(index)]):
            raise ValueError(
                f"{name} holds numbers that are too large for {numbers.dtype}, {place}: scale them"
            )
        raise ValueError(
            f"{name} holds NaN or infinite numbers, {place}: fill them in, or leave such rows out"
        )
    return numbers
