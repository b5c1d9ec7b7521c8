"""Readable names for the arrays of a training state, e.g. ``params/stage0/block03/conv1/kernel``.

A name is the path of an array in its pytree, joined by ``/``. Identical blocks are computed as one scan over arrays
stacked along a leading axis, under the dictionary key ``blocks``; a name speaks of one block, so a file
that stores names does not depend on the stacking.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

STACKED = "blocks"


def path_parts(path: tuple[Any, ...]) -> tuple[str, ...]:
    """Returns a ``jax.tree_util`` key path as plain words, whatever containers it went through.

    Example:
        >>> [(path, _)] = jax.tree_util.tree_leaves_with_path({"conv1": {"kernel": 1.0}})
        >>> path_parts(path)
        ('conv1', 'kernel')
    """
    return tuple(str(_word(entry)) for entry in path)


def to_named(tree: Any) -> dict[str, np.ndarray]:
    """Flattens a pytree of arrays into host arrays by name, one entry a block for stacked arrays.

    Args:
        tree: Any pytree of arrays and Python numbers (NamedTuples, dictionaries, optax states). An array under
            a dictionary key ``blocks`` is stacked: its leading axis counts the blocks.

    Returns:
        The arrays in the order of the tree. They may share memory with it: copy what must outlive a donation.

    Raises:
        ValueError: If two arrays would get one name, or an array under ``blocks`` has no leading axis.

    Example:
        >>> list(to_named({"blocks": {"bias": np.zeros((2, 4))}, "step": np.int32(7)}))
        ['block00/bias', 'block01/bias', 'step']
    """
    named: dict[str, np.ndarray] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(jax.device_get(tree)):
        array = np.asarray(leaf)
        names, stacked = _names(path, array.shape)
        for index, name in enumerate(names):
            if name in named:
                raise ValueError(f"two arrays of the state are called {name!r}: rename one of the dictionary keys on its path")
            named[name] = array[index, ...] if stacked else array
    return named


def from_named(named: Mapping[str, np.ndarray], target: Any) -> Any:
    """Rebuilds a pytree from named arrays, restacking blocks; the inverse of ``to_named``, bit by bit.

    Args:
        named: Arrays by name, as ``to_named`` returns them.
        target: A pytree with the structure, shapes and dtypes to restore; its values are not used.
            ``jax.ShapeDtypeStruct`` leaves will do.

    Returns:
        A pytree like ``target``. Leaves are NumPy arrays or Python numbers where the target has them, and
        JAX arrays, which own their memory and so may be donated, everywhere else.

    Raises:
        ValueError: If a name is missing or left over, or a shape or dtype differs; it names the first difference.
    """
    leaves_with_path, treedef = jax.tree_util.tree_flatten_with_path(target)
    used: set[str] = set()
    leaves = []
    for path, leaf in leaves_with_path:
        shape, dtype = _shape_and_dtype(leaf)
        names, stacked = _names(path, shape)
        arrays = [_matching(named, name, shape[1:] if stacked else shape, dtype) for name in names]
        used.update(names)
        if stacked:
            array = np.stack(arrays) if arrays else np.zeros(shape, dtype)
        else:
            [array] = arrays
        leaves.append(_like(leaf, array))
    for name in named:
        if name not in used:
            raise ValueError(_misfit(f"it holds {name!r}, which this state does not have"))
    return jax.tree_util.tree_unflatten(treedef, leaves)


def _word(entry: Any) -> Any:
    """Returns what one entry of a key path calls its child: a key, a field name or a position."""
    for attribute in ("key", "name", "idx"):
        if hasattr(entry, attribute):
            return getattr(entry, attribute)
    return entry


def _names(path: tuple[Any, ...], shape: tuple[int, ...]) -> tuple[list[str], bool]:
    """Returns the names of the array at ``path``, and whether there is one for each index of its leading axis."""
    parts = path_parts(path)
    depth = next((i for i, entry in enumerate(path) if entry == jax.tree_util.DictKey(STACKED)), None)
    if depth is None:
        return ["/".join(parts)], False
    if not shape:
        raise ValueError(
            f"the scalar {'/'.join(parts)!r} lies under {STACKED!r}, where arrays are stacked along a leading axis: "
            "move it out of there or give it one entry a block"
        )
    before, after = parts[:depth], parts[depth + 1 :]
    return ["/".join((*before, f"block{index:02d}", *after)) for index in range(shape[0])], True


def _shape_and_dtype(leaf: Any) -> tuple[tuple[int, ...], np.dtype]:
    if not hasattr(leaf, "dtype"):
        leaf = np.asarray(leaf)  # a Python number
    return tuple(leaf.shape), np.dtype(leaf.dtype)


def _matching(named: Mapping[str, np.ndarray], name: str, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Returns ``named[name]`` after checking that it is what the target needs."""
    if name not in named:
        raise ValueError(_misfit(f"it lacks {name!r}"))
    array = named[name]
    if array.shape != shape:
        raise ValueError(_misfit(f"{name!r} has shape {array.shape} in it, not {shape}"))
    if array.dtype != dtype:
        raise ValueError(_misfit(f"{name!r} has dtype {array.dtype} in it, not {dtype}"))
    return array


def _misfit(difference: str) -> str:
    return (
        f"the checkpoint does not fit this state, {difference}: "
        "build the state from the configuration the checkpoint was saved with"
    )


def _like(leaf: Any, array: np.ndarray) -> Any:
    """Converts a restored array to the kind of its target leaf."""
    if isinstance(leaf, bool | int | float | complex) and not isinstance(leaf, np.generic):
        return array.item()
    if isinstance(leaf, np.ndarray | np.generic):
        return array.copy()
    return jnp.array(array)  # copies: an array that borrows NumPy's memory could not be donated
