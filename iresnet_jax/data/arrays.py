"""Data sets of arrays and data frames in memory: `data_of` takes the arguments of
`iresnet_jax.fit`, `from_arrays` arrays by split.

Integer images are levels, floats are continuous. Columns of vectors are described in `tables`.
"""

import dataclasses
from typing import Any, NamedTuple

import jax.core
import jax.numpy as jnp
import numpy as np

from iresnet_jax.arguments import check_unmasked, finite_numbers
from iresnet_jax.data.dataset import DataSet, fraction_masks, validation_mask
from iresnet_jax.data.tables import Table, describe
from iresnet_jax.models.columns import Column, Frame, columns_of, numbers_of
from iresnet_jax.models.preprocessing import check_told_apart

FEWEST = 10  # rows of a density
FITTED_ARRAY = "the array"  # name of data given to `iresnet_jax.fit`; `data.load` does not know it


class Arrays(NamedTuple):
    """Examples with their labels and contexts; None if they have none.

    Attributes:
        x: Vectors ``(n, d)`` or images ``(n, h, w, c)``.
        labels: Classes ``(n,)``.
        context: Context vectors ``(n, k)``.
    """

    x: np.ndarray
    labels: np.ndarray | None = None
    context: np.ndarray | None = None

    def take(self, chosen: Any) -> "Arrays":
        """The chosen examples, by places or by a mask."""
        labels, context = (
            None if array is None else array[chosen] for array in (self.labels, self.context)
        )
        return Arrays(self.x[chosen], labels, context)


def from_arrays(
    name: str,
    arrays: Arrays | dict[str, Arrays],
    *,
    fractions: tuple[float, float] = (0.1, 0.1),
    columns: tuple[Column, ...] | None = None,
    context_columns: tuple[Column, ...] | None = None,
    bounds: Any = None,
    is_table: bool = False,
    num_classes: int | None = None,
) -> DataSet:
    """The data set of arrays in memory.

    Integer images have 256 levels if one is above 127, else one more than the largest.

    Args:
        name: Name in messages and reports.
        arrays: All examples, or examples by split, "train" among them; a missing "validation" is
            carved from "train".
        fractions: Shares of all examples that are set aside for validation and test, if the
            examples are not split yet. The choice depends on their number alone, see
            `fraction_masks`.
        columns: Columns of the data frame or table that holds the vectors.
        context_columns: Those of the one that holds the contexts.
        bounds: Ends of columns of a table, see `tables.describe`.
        is_table: Whether to fit a density of vectors whose entries keep to their ranges, see
            `tables`.
        num_classes: Number of classes, if the publisher states it; by default the labels' classes,
            without gaps.

    Raises:
        ValueError: If the arrays do not fit together, are not finite, or have entries without a
            density; it says which.
    """
    parts, seen = _by_split(name, arrays, fractions)
    train = parts["train"]
    labels = {split: part.labels for split, part in parts.items() if part.labels is not None}
    num_classes = (
        _num_classes(np.concatenate(list(labels.values())), num_classes) if labels else None
    )
    levels, table = None, Table(None)
    # These are the examples in the precision in which they were given.
    given = arrays if isinstance(arrays, Arrays) else arrays["train"]
    if np.issubdtype(train.x.dtype, np.integer):
        largest = max(int(part.x.max()) for part in parts.values())
        levels = 256 if largest > 127 else max(largest + 1, 2)
    elif train.x.ndim == 2:
        names = [column.name for column in columns or ()] or list(range(train.x.shape[1]))
        check_told_apart(
            np.asarray(given.x), train.x.dtype, lambda column: f"column {names[column]!r}"
        )
        of_columns = [len(column.categories or ()) for column in columns or ()]
        if np.asarray(given.x).dtype == bool:
            of_columns = [2] * train.x.shape[1]
        table = describe(seen, names, levels=of_columns, bounds=bounds, is_density=is_table)
    else:
        check_channels(train.x)
    constant, context_kinds = [], ()
    if train.context is not None:
        rows = np.asarray(given.context).reshape(-1, train.context.shape[1])
        check_told_apart(rows, train.context.dtype, "entry {} of the context".format)
        constant = np.flatnonzero(np.ptp(train.context, axis=0) == 0).tolist()
        of_columns = [len(column.categories or ()) for column in context_columns or ()]
        context_kinds = describe(
            {"train": train.context}, levels=of_columns, is_density=False
        ).kinds
    data = DataSet.from_arrays(
        name,
        {split: part.x for split, part in parts.items()},
        {split: of_split.astype(np.int32) for split, of_split in labels.items()},
        contexts={split: part.context for split, part in parts.items() if part.context is not None},
        num_levels=levels,
        num_classes=num_classes,
        cells=table.cells,
    )
    notes = [
        *table.notes,
        *(
            f"entry {entry} of the context is constant and tells nothing: leave it out"
            for entry in constant
        ),
    ]
    return dataclasses.replace(
        data,
        ends=table.ends,
        kinds=table.kinds,
        columns=columns,
        context_kinds=context_kinds,
        context_columns=context_columns,
        notes=tuple(notes),
    )


def _by_split(
    name: str, arrays: Arrays | dict[str, Arrays], fractions: tuple[float, float]
) -> tuple[dict[str, Arrays], dict[str, np.ndarray]]:
    """The checked examples of each split, and the rows by which columns are described, before any
    split is carved off.
    """
    if isinstance(arrays, Arrays):
        checked = _checked(arrays)
        masks = fraction_masks(len(checked.x), fractions)
        return {split: checked.take(mask) for split, mask in masks.items()}, {"train": checked.x}
    if "train" not in arrays:
        raise ValueError(
            f"{name} has no training examples: its splits are {', '.join(arrays) or 'none'}"
        )
    parts = {split: _checked(arrays[split]) for split in sorted(arrays, key="train".__ne__)}
    if len(parts["train"].x) < 2:
        raise ValueError(f"{name} has one training example: a model is trained on 2 or more")
    shapes = {part.x.shape[1:] for part in parts.values()}
    if len(shapes) > 1:
        raise ValueError(
            f"the splits of {name} must hold examples of one shape, got {sorted(shapes)}"
        )
    if len(dtypes := {str(part.x.dtype) for part in parts.values()}) > 1:
        raise ValueError(
            f"the splits of {name} must hold examples of one type, got "
            f"{' and '.join(sorted(dtypes))}"
        )
    if len({(part.labels is None, part.context is None) for part in parts.values()}) > 1:
        raise ValueError(f"all splits of {name} need labels and contexts, or none of them")
    if (
        len(
            lengths := {
                part.context.shape[1] for part in parts.values() if part.context is not None
            }
        )
        > 1
    ):
        raise ValueError(
            f"the splits of {name} must have contexts of one length, got {sorted(lengths)}"
        )
    seen = {split: part.x for split, part in parts.items()}
    if "validation" not in parts:
        chosen = validation_mask(len(seen["train"]))
        parts |= {"validation": parts["train"].take(chosen), "train": parts["train"].take(~chosen)}
    return parts, seen


def check_channels(images: np.ndarray) -> None:
    """Raises ``ValueError`` if a channel of continuous images is constant or nearly constant, or
    most of its values are equal.
    """
    for channel in range(images.shape[-1]):
        values = np.asarray(images[..., channel]).reshape(-1)
        distinct, counts = np.unique(values, return_counts=True)
        if len(distinct) < 2:
            raise ValueError(
                f"channel {channel} of the images is constant, so there is no density: drop it"
            )
        check_told_apart(
            values[:, None],
            images.dtype,
            lambda _, channel=channel: f"channel {channel} of the images",
        )
        if len(values) >= 1000 and len(distinct) <= 256:
            raise ValueError(
                f"channel {channel} of the images has {len(distinct)} different values: give "
                "images of integer levels as integers, so that their likelihood is one of levels"
            )
        if counts.max() > len(values) / 4:
            raise ValueError(
                f"{counts.max() / len(values):.0%} of channel {channel} of the images are "
                f"{distinct[counts.argmax()]:g}, where a density would grow without bound: add "
                "noise, or give the images as integer levels"
            )


def _checked(arrays: Arrays) -> Arrays:
    """The arrays in the types that training takes."""
    x = np.asarray(arrays.x)
    if x.ndim not in (2, 4) or not x.size:
        hints = {
            1: ": numbers are vectors of length 1 as x[:, None]",
            3: ": add a channel axis with x[..., None]",
        }
        hint = ": there are no examples" if x.ndim and not len(x) else hints.get(x.ndim, "")
        raise ValueError(
            f"data must be vectors (n, d) or images (n, h, w, c), got shape {x.shape}{hint}"
        )
    if x.ndim == 4 and x.shape[1] in (1, 3) and x.shape[2] == x.shape[3] > 4:
        raise ValueError(
            f"images have their channels last, got shape {x.shape}: give x.transpose(0, 2, 3, 1)"
        )
    if x.ndim == 4 and x.dtype.kind in "biu":
        if x.min() < 0 or x.max() > 255:
            raise ValueError(
                f"integer images must have levels 0 to 255, got {x.min()} to {x.max()}: convert "
                "them to floats"
            )
        x = x.astype(np.uint8)
    else:
        x = _finite_floats(x, "the data")
    labels, context = (
        None if given is None else np.asarray(given) for given in (arrays.labels, arrays.context)
    )
    if labels is not None:
        labels = labels[:, 0] if labels.shape == (len(x), 1) else labels
        if labels.shape != (len(x),) or labels.dtype.kind not in "iu" or labels.min() < 0:
            numbered = "np.unique(labels, return_inverse=True)[1]"
            if labels.ndim == 2 and len(labels) == len(x):  # one-hot
                numbered = "labels.argmax(axis=1)"
            raise ValueError(
                f"labels must be {len(x)} integers from 0 on, one per example, got {labels.dtype} "
                f"of shape {labels.shape}: number the classes with {numbered}"
            )
    if context is not None:
        context = context[:, None] if context.ndim == 1 else context
        if context.ndim != 2 or len(context) != len(x) or not context.shape[1]:
            raise ValueError(
                f"context must hold a vector for each of {len(x)} examples, got shape "
                f"{context.shape}"
            )
        context = _finite_floats(context, "the context")
    return Arrays(x, labels, context)


def _num_classes(labels: np.ndarray, published: int | None) -> int:
    """The number of classes, from the labels of all splits."""
    present = np.unique(labels)
    if published is not None and present[-1] >= published:
        raise ValueError(
            f"labels must lie in 0 to {published - 1}, got {present[-1]}: correct "
            "them, or fetch the file again"
        )
    if len(present) < 2 and (published or 0) < 2:
        raise ValueError(
            f"labels must be of 2 classes or more, and all are {present[0]}: leave them out"
        )
    if published is None and len(present) <= present[-1]:
        lacking = np.setdiff1d(np.arange(len(present)), present)[0]
        raise ValueError(
            f"labels must number the classes from 0 on without gaps, got none of {lacking} and "
            f"{present[-1]} as the largest: number the classes with np.unique(labels, "
            "return_inverse=True)[1]"
        )
    return published or len(present)


def _finite_floats(array: np.ndarray, what: str) -> np.ndarray:
    if not (jnp.issubdtype(array.dtype, jnp.floating) or array.dtype.kind in "biu"):
        raise ValueError(
            f"{what} must be numbers, got {array.dtype}: encode text, categories and "
            "booleans as numbers first"
        )
    return finite_numbers(array, what, jnp.result_type(float))


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
    """The data set of the arrays or data frame that `iresnet_jax.fit` is given.

    Args:
        x: Examples: an array, or a data frame whose columns are numbers, booleans or categories.
        labels: Classes.
        context: Contexts.
        validation: Examples for validation, an array or a data frame like ``x``, or ``(x, labels,
            context)``.
        validation_fraction: Share of the examples for validation, if ``validation`` is None.
        bounds: Ends of columns, see `tables.describe`.
        is_density: Whether to fit a density without classes: entries of vectors then keep to their
            ranges.
    """
    columns, of_context = (columns_of(t) if isinstance(t, Frame) else None for t in (x, context))
    arrays = _arrays(columns, of_context, x, labels, context)
    is_table = is_density and arrays.x.ndim == 2
    if is_table and len(arrays.x) < FEWEST:
        raise ValueError(f"a density needs {FEWEST} rows or more, got {len(arrays.x)}")
    if bounds is not None and not is_table:
        raise ValueError("bounds are for densities of vectors without classes: leave them out")
    splits: Arrays | dict[str, Arrays] = arrays
    if validation is not None:
        if isinstance(validation, list) and any(
            np.ndim(part) >= arrays.x.ndim for part in validation
        ):
            raise ValueError(
                "validation must be like x, or a tuple (x, labels, context), got a list: None is "
                "what there is not"
            )
        if (
            isinstance(validation, tuple)
            and len(validation) == 2
            and labels is None
            and context is not None
        ):
            raise ValueError(
                "validation of a conditional density is (x, None, context): the "
                "second entry holds labels"
            )
        held_out = validation if isinstance(validation, tuple) else (validation,)
        if not 1 <= len(held_out) <= 3:
            raise ValueError(
                "validation must be like x, or a tuple (x, labels, context), got "
                f"{len(held_out)} entries"
            )
        splits = {"train": arrays, "validation": _arrays(columns, of_context, *held_out)}
    fractions = validation_fraction, 0.0
    return from_arrays(
        FITTED_ARRAY,
        splits,
        fractions=fractions,
        columns=columns,
        context_columns=of_context,
        bounds=bounds,
        is_table=is_table,
    )


def _arrays(
    columns: tuple[Column, ...] | None,
    of_context: tuple[Column, ...] | None,
    x: Any,
    labels: Any = None,
    context: Any = None,
) -> Arrays:
    numbers, context = (
        given if known is None or not isinstance(given, Frame) else numbers_of(given, known)
        for given, known in ((x, columns), (context, of_context))
    )
    others = (
        None if given is None else _as_array(given, name)
        for given, name in ((labels, "labels"), (context, "context"))
    )
    return Arrays(_as_array(numbers, "x"), *others)


def _as_array(given: Any, name: str) -> np.ndarray:
    """An array of numbers; ``ValueError`` for anything else, for masked values, and for traced
    arrays.
    """
    if isinstance(given, jax.core.Tracer):
        raise ValueError(
            f"{name} must be an array of numbers that are known: call fit outside of jax.jit"
        )
    check_unmasked(given, name)
    try:
        array = np.asarray(given)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must be an array of numbers: {error}") from None
    if array.ndim == 0:
        raise ValueError(f"{name} must be an array of numbers, got a {type(given).__name__}")
    return array
