"""Readable names for the arrays of a training state, e.g. ``params/stage0/block03/conv1/kernel``.

A name is the path of an array in its pytree, joined by ``/``. Identical blocks are computed as one scan over arrays
stacked along a leading axis, under the dictionary key ``blocks``. A name speaks of one block, so a file that stores names does
not depend on the stacking.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

STACKED = "blocks"


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
    for path, leaf in jax.tree.leaves_with_path(jax.device_get(tree)):
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
        target: A pytree with the structure, shapes and dtypes to restore, such as the result of ``jax.eval_shape``.

    Returns:
        A pytree like ``target``. A leaf is a NumPy array or a Python number if the target's is; otherwise it is a JAX array
        that owns its memory and so may be donated.

    Raises:
        ValueError: If a name is missing or left over, or a shape or dtype differs; it names the first difference.
    """
    used: set[str] = set()

    def restored(path: Any, leaf: Any) -> Any:
        like = leaf if hasattr(leaf, "dtype") else np.asarray(leaf)  # a Python number
        shape, dtype = tuple(like.shape), np.dtype(like.dtype)
        names, stacked = _names(path, shape)
        used.update(names)
        arrays = [_matching(named, name, shape[1:] if stacked else shape, dtype) for name in names]
        array = (np.stack(arrays) if arrays else np.zeros(shape, dtype)) if stacked else arrays[0]
        if like is not leaf:
            return array.item()
        return array.copy() if isinstance(leaf, np.ndarray | np.generic) else jnp.array(array)  # a copy, which can be donated

    tree = jax.tree.map_with_path(restored, target)
    for name in named:
        if name not in used:
            raise ValueError(_misfit(f"it holds {name!r}, which this state does not have"))
    return tree


def _names(path: tuple[Any, ...], shape: tuple[int, ...]) -> tuple[list[str], bool]:
    """Returns the names of the array at ``path``, and whether there is one for each index of its leading axis."""
    key = jax.tree_util.DictKey(STACKED)
    if key not in path:
        return [_joined(path)], False
    if not shape:
        raise ValueError(
            f"the scalar {_joined(path)!r} lies under {STACKED!r}, where arrays are stacked along a leading axis: "
            "move it out of there or give it one entry a block"
        )
    depth = path.index(key)
    blocks = [jax.tree_util.DictKey(f"block{index:02d}") for index in range(shape[0])]
    return [_joined((*path[:depth], block, *path[depth + 1 :])) for block in blocks], True


def _joined(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


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
