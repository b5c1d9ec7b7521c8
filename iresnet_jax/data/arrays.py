"""Data sets of arrays and data frames in memory: `data_of` takes the arguments of
`iresnet_jax.fit`, `from_arrays` arrays by split.

Integer images are levels, floats are continuous. Columns of vectors are described in `tables`.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np

from iresnet_jax.arguments import check_unmasked, finite_numbers
from iresnet_jax.data.dataset import Arrays, DataSet, fraction_masks, validation_mask
from iresnet_jax.data.tables import describe, fit_lines, notes_of
from iresnet_jax.models.columns import Column, Frame, columns_of, numbers_of
from iresnet_jax.models.contexts import for_examples
from iresnet_jax.models.density_spec import check_told_apart

FEWEST = 10  # rows of a density
FITTED_ARRAY = "the array"  # name of data given to `iresnet_jax.fit`; `data.load` does not know it


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
    """
    parts, seen = _by_split(name, arrays, fractions)
    train = parts["train"]
    labels = {split: part.labels for split, part in parts.items() if part.labels is not None}
    if labels:
        present = np.unique(np.concatenate(list(labels.values())))
        num_classes = num_classes or len(present)
        if present[-1] >= num_classes:
            raise ValueError(
                f"labels of {num_classes} classes must lie in 0 to {num_classes - 1}, got "
                f"{present[-1]}: number them with np.unique(labels, return_inverse=True)[1]"
            )
    levels, kinds, marginals, notes = None, (), None, []
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
        kinds = describe(seen, names, levels=of_columns, bounds=bounds, has_tails=is_table)
        marginals = fit_lines(train.x, kinds)
        notes = list(notes_of(seen["train"], names, kinds)) if is_table else []
    else:
        _check_channels(train.x)
    context_kinds = ()
    if train.context is not None:
        rows = np.asarray(given.context).reshape(-1, train.context.shape[1])
        check_told_apart(rows, train.context.dtype, "entry {} of the context".format)
        notes += [
            f"entry {entry} of the context is constant and tells nothing: leave it out"
            for entry in np.flatnonzero(np.ptp(train.context, axis=0) == 0)
        ]
        of_columns = [len(column.categories or ()) for column in context_columns or ()]
        context_kinds = describe({"train": train.context}, levels=of_columns, has_tails=False)
    return DataSet(
        name,
        {split: part.x for split, part in parts.items()},
        {split: of_split.astype(np.int32) for split, of_split in labels.items()},
        {split: part.context for split, part in parts.items() if part.context is not None},
        num_levels=levels,
        num_classes=num_classes if labels else None,
        marginals=marginals,
        kinds=kinds,
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
    parts = {split: _checked(arrays[split]) for split in sorted(arrays, key="train".__ne__)}
    kinds = {
        (str(part.x.dtype), part.x.shape[1:], part.labels is None, np.shape(part.context)[1:])
        for part in parts.values()
    }
    if len(kinds) > 1:
        raise ValueError(
            f"the splits of {name} must agree in type and shape of examples, in having no labels, "
            f"and in the length of contexts, got {sorted(kinds)}"
        )
    seen = {split: part.x for split, part in parts.items()}
    if "validation" not in parts:
        chosen = validation_mask(len(seen["train"]))
        parts |= {"validation": parts["train"].take(chosen), "train": parts["train"].take(~chosen)}
    return parts, seen


def _check_channels(images: np.ndarray) -> None:
    """Raises ``ValueError`` if continuous images have a channel without a density."""
    pixels = images.reshape(-1, images.shape[-1])
    check_told_apart(pixels, images.dtype, "channel {} of the images".format)
    for channel, values in enumerate(pixels.T):
        distinct, counts = np.unique(values, return_counts=True)
        is_coarse = len(distinct) <= 256 and len(values) >= 1000
        if len(distinct) < 2 or is_coarse or counts.max() > len(values) / 4:
            raise ValueError(
                f"channel {channel} of the images has {len(distinct)} different values, and "
                f"{counts.max() / len(values):.0%} are {distinct[counts.argmax()]:g}, so its "
                "density would grow without bound: drop a constant channel, give integer levels "
                "as integers, or add noise"
            )


def _checked(arrays: Arrays) -> Arrays:
    """The arrays in the types that training takes."""
    x, labels, context = (None if array is None else np.asarray(array) for array in arrays)
    assert x is not None
    if x.ndim not in (2, 4) or not x.size:
        raise ValueError(
            f"data must be vectors (n, d) or images (n, h, w, c), got shape {x.shape}: numbers are "
            "vectors of length 1 as x[:, None], grey images have a channel as x[..., None]"
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
        x = finite_numbers(x, "the data", jnp.result_type(float))
    if labels is not None:
        labels = labels[:, 0] if labels.shape == (len(x), 1) else labels
        if labels.shape != (len(x),) or labels.dtype.kind not in "iu" or labels.min() < 0:
            raise ValueError(
                f"labels must be {len(x)} integers from 0 on, one per example, got {labels.dtype} "
                f"of shape {labels.shape}: number the classes with np.unique(labels, "
                "return_inverse=True)[1], or one-hot vectors with labels.argmax(axis=1)"
            )
    if context is not None:
        context = for_examples(context, len(x))
        context = finite_numbers(context, "the context", jnp.result_type(float))
    return Arrays(x, labels, context)


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

    def in_memory(x: Any, labels: Any = None, context: Any = None) -> Arrays:
        x, context = (
            given if known is None or not isinstance(given, Frame) else numbers_of(given, known)
            for given, known in ((x, columns), (context, of_context))
        )
        for name, given in {"x": x, "labels": labels, "context": context}.items():
            check_unmasked(given, name)
        return Arrays(np.asarray(x), labels, context)

    arrays = in_memory(x, labels, context)
    is_table = is_density and arrays.x.ndim == 2
    if is_table and len(arrays.x) < FEWEST:
        raise ValueError(f"a density needs {FEWEST} rows or more, got {len(arrays.x)}")
    if bounds is not None and not is_table:
        raise ValueError("bounds are for densities of vectors without classes: leave them out")
    splits: Arrays | dict[str, Arrays] = arrays
    if validation is not None:
        held_out = validation if isinstance(validation, tuple) else (validation,)
        splits = {"train": arrays, "validation": in_memory(*held_out)}
    return from_arrays(
        FITTED_ARRAY,
        splits,
        fractions=(validation_fraction, 0.0),
        columns=columns,
        context_columns=of_context,
        bounds=bounds,
        is_table=is_table,
    )
