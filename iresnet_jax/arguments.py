"""Checks of arguments: numbers in their ranges, arrays without gaps, command lines."""

import argparse
import typing
from dataclasses import dataclass
from typing import Annotated, Any, NoReturn

import numpy as np


@dataclass(frozen=True)
class Range:
    """An interval of numbers, written as in mathematics: ``[1, inf)`` contains its lower end, ``(0,
    1)`` neither end.
    """

    interval: str

    def __contains__(self, number: Any) -> bool:
        low, high = (float(end) for end in self.interval[1:-1].split(","))
        above = number >= low if self.interval[0] == "[" else number > low
        return above and (number <= high if self.interval[-1] == "]" else number < high)

    def __get_pydantic_core_schema__(self, annotated: Any, handler: Any) -> Any:
        """The check of a setting of a config, which is the only use of pydantic."""
        from pydantic import AfterValidator

        return AfterValidator(self._check).__get_pydantic_core_schema__(annotated, handler)

    def _check(self, number: Any) -> Any:
        if number not in self:
            raise ValueError(f"must lie in {self.interval}")
        return number


Count = Annotated[int, Range("[1, inf)")]
CountOrNone = Annotated[int, Range("[0, inf)")]  # 0 switches something off
Positive = Annotated[float, Range("(0, inf)")]
NotNegative = Annotated[float, Range("[0, inf)")]
Decay = Annotated[float, Range("[0, 1)")]  # decay of an average; at 1 it would never move


def checked(kind: Any, value: Any, name: str) -> Any:
    """A number as one of Python's, within the range of its kind, such as `Count`."""
    number, allowed = typing.get_args(kind)
    try:
        if number(value) == value and number(value) in allowed:
            return number(value)
    except (TypeError, ValueError):  # no number
        pass
    advice = ": give a whole number" if number is int else ""
    raise ValueError(f"{name} must lie in {allowed.interval}, got {value!r}{advice}")


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


class Parser(argparse.ArgumentParser):
    """A parser of command lines that raises ``ValueError`` with a sentence instead of printing
    its usage.
    """

    def error(self, message: str) -> NoReturn:
        """Says what was wrong and where to look."""
        raise ValueError(f"{message}; see {self.prog} --help")
