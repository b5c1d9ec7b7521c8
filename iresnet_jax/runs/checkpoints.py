"""Checkpoints of a training run: the newest few and the best one, each an ``.npz`` file of named arrays, whole or absent.

A file is written under another name and renamed at the end: a killed process or a full disk cannot damage what was there
before. The format keeps a checksum of each array, which finds what a failing disk did since.

The name of an array is its path in the pytree of the state, such as ``params/stage0/block03/conv1/kernel``. Identical blocks
are computed as one scan over arrays stacked along a leading axis, under the dictionary key ``blocks``; a name speaks of one
block, so a file does not depend on the stacking.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, SupportsFloat

import jax
import jax.numpy as jnp
import numpy as np

from iresnet_jax.atomic_files import replacing
from iresnet_jax.models.model import array_name
from iresnet_jax.runs.run_folder import fingerprint
from iresnet_jax.training.optimizers import STACKED

KEPT = 2  # of the newest checkpoints, beside the best one: one is left to fall back to
_METRIC, _RUN = "(metric)", "(run)"  # no array of a state is called that


class Checkpoints:
    """The checkpoints ``workdir/checkpoints/<step>.npz``: the newest to resume from, the best to evaluate.

    Args:
        workdir: Folder of the run, created when needed.

    Raises:
        ValueError: If ``workdir/checkpoints`` is a file.

    Example:
        >>> checkpoints = Checkpoints("runs/moons")
        >>> checkpoints.save(100, state, metric=3.2)  # doctest: +SKIP
        >>> restored = checkpoints.restore_latest(state)  # doctest: +SKIP
    """

    def __init__(self, workdir: str | os.PathLike[str]):
        self._folder = Path(workdir) / "checkpoints"
        if self._folder.exists() and not self._folder.is_dir():
            raise ValueError(f"{self._folder} is a file, where a folder is needed: move it away or choose another workdir")

    def path(self, step: int) -> Path:
        """Returns the file of a step, whether it exists or not."""
        return self._folder / f"{step}.npz"

    def save(self, step: int, state: Any, *, metric: SupportsFloat | None = None) -> None:
        """Writes the checkpoint of a step, then deletes those that are no longer needed.

        Checkpoints of later steps are deleted too: resuming from an earlier step gave up their future.

        Args:
            step: Finished updates, >= 0.
            state: A pytree of arrays, without a device axis.
            metric: What model selection goes by, lower is better, e.g. validation bits/dim. NaN is never the best.

        Raises:
            OSError: If the disk is full or not writable; the checkpoints already there are kept.
            ValueError: If two arrays of the state have one name.
        """
        named = to_named(state) | {_METRIC: np.array(math.nan if metric is None else float(metric))}
        if (run := fingerprint(self._folder.parent)) is not None:
            named[_RUN] = np.array(run)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            for leftover in self._folder.glob("*.incoming"):  # of killed processes
                leftover.unlink()
            with replacing(self.path(step)) as incoming, incoming.open("xb") as file:
                np.savez(file, **named)  # pyright: ignore[reportArgumentType]: of names that no state has
        except OSError as error:
            raise OSError(
                f"the checkpoint of step {step} could not be written to {self._folder} ({_reason(error)}): "
                "free disk space or check permissions and resume; the checkpoints written before are kept"
            ) from error
        past = [other for other in self._steps() if other <= step]
        measured = [(metric, other) for metric, other in self._by_metric() if other in past]
        unread = [other for metric, other in measured if metric == math.inf]  # any of them may be the best
        for other in set(self._steps()) - {*past[:KEPT], *unread, *(other for _, other in measured[:1])}:
            with contextlib.suppress(OSError):
                self.path(other).unlink()

    def restore_latest(self, target: Any) -> tuple[Any, int] | None:
        """Reads the newest checkpoint that is intact.

        Args:
            target: A state, or its ``jax.eval_shape``, that says what structure, shapes and dtypes to restore.

        Returns:
            The state and its step, or None if nothing was saved yet. Falling back past a damaged checkpoint warns.

        Raises:
            RuntimeError: If there are checkpoints and all of them are damaged.
            ValueError: If the newest intact one does not fit ``target``; it names the first difference.
        """
        return self._restore(self._steps(), target)

    def restore_best(self, target: Any) -> tuple[Any, int] | None:
        """Reads the checkpoint with the lowest metric; otherwise like ``restore_latest``.

        One whose metric cannot be read may be the best, so it is tried first, to say that it is damaged.
        """
        return self._restore([step for _, step in sorted(self._by_metric(), key=lambda entry: entry[0] < math.inf)], target)

    def _restore(self, steps: list[int], target: Any) -> tuple[Any, int] | None:
        """Restores the first of ``steps`` that can be read."""
        for step, fallback in itertools.zip_longest(steps, steps[1:]):
            try:
                named = _read(self.path(step))
                named.pop(_METRIC)
            except Exception as error:  # Damage shows as whatever zipfile or NumPy trips over.
                if fallback is None:
                    raise RuntimeError(
                        f"no checkpoint in {self._folder} can be read (step {step}: {_reason(error)}): put back a copy of one, "
                        "or delete this folder to start again"
                    ) from error
                warnings.warn(
                    f"the checkpoint {self.path(step)} is damaged ({_reason(error)}); falling back to step {fallback}",
                    stacklevel=3,
                )
            else:
                self._check_run(step, named.pop(_RUN, None))
                return from_named(named, target), step
        return None

    def _check_run(self, step: int, run: np.ndarray | None) -> None:
        """Raises ``ValueError`` if a checkpoint is not of the run whose settings and model are in the folder."""
        expected = fingerprint(self._folder.parent)
        if run is not None and expected is not None and str(run) != expected:
            raise ValueError(
                f"{self.path(step)} is of another run than config.json and model.json in {self._folder.parent}, or one of "
                "these files was changed after training began: put back what was there"
            )

    def _steps(self) -> list[int]:
        """Lists the steps of complete checkpoints, newest first; unfinished ones have other names."""
        return sorted((int(path.stem) for path in self._folder.glob("*.npz") if path.stem.isdecimal()), reverse=True)

    def _by_metric(self) -> list[tuple[float, int]]:
        """Lists (metric, step) of checkpoints that have a metric, best first."""
        entries = []
        for step in self._steps():
            try:
                metric = float(_read(self.path(step), _METRIC)[_METRIC])
            except Exception:  # Damaged, in whichever way: listed last, so that restoring it can say so.
                metric = math.inf
            entries.append((metric, step))
        return sorted(entry for entry in entries if not math.isnan(entry[0]))


def load_named(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Reads all arrays of one checkpoint by name, without knowing the model it belongs to.

    Raises:
        Exception: If the file is damaged, any that zipfile or NumPy raises; every array is compared with its checksum.

    Example:
        >>> named = load_named("runs/moons/checkpoints/1000.npz")  # doctest: +SKIP
        >>> named["params/stage0/block03/conv1/kernel"].shape  # doctest: +SKIP
    """
    named = _read(Path(path))
    return {name: array for name, array in named.items() if name not in (_METRIC, _RUN)}


def _read(path: Path, only: str | None = None) -> dict[str, np.ndarray]:
    with path.open("rb") as file, np.load(file) as archive:
        return {name: archive[name] for name in ([only] if only else archive.files)}


def _reason(error: Exception) -> str:
    """Shortens an error to a phrase: the system's own words where it has some."""
    cause = error.__cause__ if isinstance(error.__cause__, OSError) else error
    if isinstance(cause, OSError) and cause.strerror:
        return cause.strerror
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 160 else text[:157] + "..."


def to_named(tree: Any) -> dict[str, np.ndarray]:
    """Flattens a pytree of arrays into host arrays by name, one entry a block for stacked arrays.

    Args:
        tree: Any pytree of arrays and Python numbers (NamedTuples, dictionaries, optax states). An array under
            a dictionary key ``blocks`` is stacked: its leading axis counts the blocks.

    Returns:
        The arrays in the order of the tree. They may share memory with it: copy what must outlive a donation.

    Raises:
        ValueError: If two arrays would get one name.

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
    left = dict(named)

    def restored(path: Any, leaf: Any) -> Any:
        like = leaf if hasattr(leaf, "dtype") else np.asarray(leaf)  # a Python number
        names, stacked = _names(path, tuple(like.shape))
        expected = np.dtype(like.dtype), tuple(like.shape[1:] if stacked else like.shape)
        for name in names:
            if name not in left:
                raise _misfit(f"it lacks {name!r}")
            if left[name].dtype.kind == "V":  # bits of a dtype of JAX, such as bfloat16, that NumPy's format does not know
                left[name] = left[name].view(expected[0])
            if (found := (left[name].dtype, left[name].shape)) != expected:
                if {found[0], expected[0]} == {np.dtype(np.float32), np.dtype(np.float64)}:
                    setting = "set" if found[0] == np.float64 else "unset"
                    raise ValueError(
                        f"the run was trained in {found[0]}: {setting} JAX_ENABLE_X64 to go on with it or to read it"
                    )
                raise _misfit(f"{name!r} is {found[0]}{list(found[1])} in it, not {expected[0]}{list(expected[1])}")
        arrays = [left.pop(name) for name in names]
        array = (np.stack(arrays) if arrays else np.zeros(like.shape, expected[0])) if stacked else arrays[0]
        if like is not leaf:
            return array.item()
        return array.copy() if isinstance(leaf, np.ndarray | np.generic) else jnp.array(array)  # a copy, which can be donated

    tree = jax.tree.map_with_path(restored, target)
    if left:
        raise _misfit(f"it holds {next(iter(left))!r}, which this state does not have")
    return tree


def _names(path: tuple[Any, ...], shape: tuple[int, ...]) -> tuple[list[str], bool]:
    """Returns the names of the array at ``path``, and whether there is one for each index of its leading axis."""
    key = jax.tree_util.DictKey(STACKED)
    if key not in path:
        return [array_name(path)], False
    depth = path.index(key)
    blocks = [jax.tree_util.DictKey(f"block{index:02d}") for index in range(shape[0])]
    return [array_name((*path[:depth], block, *path[depth + 1 :])) for block in blocks], True


def _misfit(difference: str) -> ValueError:
    return ValueError(f"the checkpoint does not fit this state, {difference}: build the state from the config of its run")
