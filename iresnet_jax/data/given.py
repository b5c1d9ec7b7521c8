"""What a user gives `iresnet_jax.fit`: arrays, data frames, or a tuple of them to validate with, as a data set."""

from typing import Any

import jax.core
import numpy as np

from iresnet_jax.checked_dataclasses import check_unmasked
from iresnet_jax.data.arrays import FITTED_ARRAY, Arrays, from_arrays
from iresnet_jax.data.dataset import DataSet
from iresnet_jax.models.columns import Column, Frame, columns_of, numbers_of


def data_of(
    x: Any,
    labels: Any = None,
    context: Any = None,
    *,
    validation: Any = None,
    validation_fraction: float = 0.1,
    bounds: Any = None,
    is_density: bool = True,
) -> DataSet:
    """The data set of what was given.

    Args:
        x: Examples: an array, or a data frame whose columns are numbers, booleans or categories.
        labels: Classes.
        context: Contexts.
        validation: Examples that validate, an array or a data frame like ``x``, or ``(x, labels, context)``.
        validation_fraction: Share of the examples that validates, without.
        bounds: Ends of columns, see `tables.describe`.
        is_density: Whether a density without classes is to be fitted: entries of vectors then keep to their ranges.

    Raises:
        ValueError: If it does not fit together, or has no density; the message names the column.
    """
    columns = columns_of(x) if isinstance(x, Frame) else None
    arrays = _arrays(columns, x, labels, context)
    is_table = is_density and arrays.x.ndim == 2
    if bounds is not None and not is_table:
        raise ValueError("bounds are for densities of vectors without classes: leave them out")
    splits: Arrays | dict[str, Arrays] = arrays
    if validation is not None:
        if isinstance(validation, list) and any(np.ndim(part) >= arrays.x.ndim for part in validation):
            raise ValueError(
                "validation must be like x, or a tuple (x, labels, context), got a list: None is what there is not"
            )
        if isinstance(validation, tuple) and len(validation) == 2 and labels is None and context is not None:
            raise ValueError("validation of a conditional density is (x, None, context): the second entry holds labels")
        held_out = validation if isinstance(validation, tuple) else (validation,)
        if not 1 <= len(held_out) <= 3:
            raise ValueError(f"validation must be like x, or a tuple (x, labels, context), got {len(held_out)} entries")
        splits = {"train": arrays, "validation": _arrays(columns, *held_out)}
    fractions = validation_fraction, 0.0
    return from_arrays(FITTED_ARRAY, splits, fractions=fractions, columns=columns, bounds=bounds, is_table=is_table)


def _arrays(columns: tuple[Column, ...] | None, x: Any, labels: Any = None, context: Any = None) -> Arrays:
    numbers = x if columns is None or not isinstance(x, Frame) else numbers_of(x, columns)
    others = (None if given is None else _as_array(given, name) for given, name in ((labels, "labels"), (context, "context")))
    return Arrays(_as_array(numbers, "x"), *others)


def _as_array(given: Any, name: str) -> np.ndarray:
    """What was given as an array; ``ValueError`` if it is none, has masked values, or is not known yet, under ``jax.jit``."""
    if isinstance(given, jax.core.Tracer):
        raise ValueError(f"{name} must be an array of numbers that are known: call fit outside of jax.jit")
    check_unmasked(given, name)
    try:
        array = np.asarray(given)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must be an array of numbers: {error}") from None
    if array.ndim == 0:
        raise ValueError(f"{name} must be an array of numbers, got a {type(given).__name__}")
    return array
