"""Checkpoints of a training run: the newest few and the best one, written through Orbax.

A state of a thousand small arrays is stored as one buffer of bytes and a JSON record that gives every array a readable
name (see ``naming``), its dtype and its shape. That is ten times faster than a thousand small writes, and on a full
disk there is only one write to fail. Orbax writes under a temporary name and renames at the end, so a killed process
cannot damage what was there before; a checksum over everything finds what a failing disk did since.
"""

from __future__ import annotations

import errno
import itertools
import json
import logging
import math
import os
import re
import shutil
import warnings
import zlib
from pathlib import Path
from typing import Any, SupportsFloat

import numpy as np
import orbax.checkpoint as ocp

from iresnet_jax.training.naming import from_named, to_named


class Checkpoints:
    """The checkpoints under ``workdir/checkpoints``: ``latest/<step>`` to resume from and ``best/<step>`` to evaluate.

    For one host; the state must not have a device axis.

    Args:
        workdir: Folder of the run, created when needed.
        keep: How many of the newest checkpoints to keep, >= 1. With 2, one is left to fall back to.

    Raises:
        ValueError: If ``keep`` is less than 1.

    Example:
        >>> checkpoints = Checkpoints("runs/moons")
        >>> checkpoints.save(100, state, metric=3.2)  # doctest: +SKIP
        >>> restored = checkpoints.restore_latest(state)  # doctest: +SKIP
    """

    def __init__(self, workdir: str | os.PathLike[str], keep: int = 2):
        if keep < 1:
            raise ValueError(f"keep must be at least 1, got {keep}: without a checkpoint a run cannot be resumed")
        self._latest = Path(workdir).absolute() / "checkpoints" / "latest"
        self._best = self._latest.parent / "best"
        self._keep = keep

    def save(self, step: int, state: Any, *, metric: SupportsFloat | None = None) -> None:
        """Writes ``latest/<step>`` and, if ``metric`` is the lowest so far, ``best/<step>``.

        Older checkpoints are deleted only once the new one is complete. Those of later steps are deleted too: they
        belong to a future that was given up by resuming from an earlier step.

        Args:
            step: Finished updates, >= 0.
            state: A pytree of arrays.
            metric: What model selection goes by, lower is better, e.g. validation bits/dim. NaN is never the best.

        Raises:
            OSError: If the disk is full or not writable; the checkpoints already there are kept.
            ValueError: If the step is negative or the state has no arrays or two of one name.
        """
        if step < 0:
            raise ValueError(f"step must not be negative, got {step}: it counts finished updates")
        metric = None if metric is None else float(metric)
        for folder in (self._latest.parent, self._latest, self._best):
            if folder.is_file():
                raise NotADirectoryError(f"{folder} is a file: move it away, as it is in the place of a folder of checkpoints")
        named = to_named(state)
        best = self.best_metric
        if metric is not None and not math.isnan(metric) and (best is None or metric < best):
            # First, as a run that is killed in between comes here again only from an earlier step.
            _write(self._best, step, named, metric)
            _delete(self._best, [other for other in _steps(self._best) if other != step])
        _write(self._latest, step, named, metric)
        _delete(self._latest, [old for old in _steps(self._latest) if old > step])
        _delete(self._latest, _steps(self._latest)[self._keep :])

    @property
    def best_metric(self) -> float | None:
        """The lowest metric saved so far, also by earlier processes, or None."""
        return min((metric for metric, _ in self._best_entries() if metric < math.inf), default=None)

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
        return _restore(self._latest, _steps(self._latest), target)

    def restore_best(self, target: Any) -> tuple[Any, int] | None:
        """Reads the checkpoint with the lowest metric; otherwise like ``restore_latest``."""
        return _restore(self._best, [step for _, step in self._best_entries()], target)

    def _best_entries(self) -> list[tuple[float, int]]:
        """Lists (metric, step), best first; more than one only if a process was killed between write and delete."""
        entries = []
        for step in _steps(self._best):
            try:
                metric = float(_read_record(self._best / str(step))["metric"])
            except Exception:  # Damaged, in whichever way: listed last, so that restoring it can say so.
                metric = math.inf
            entries.append((metric, step))
        return sorted(entries)


def load_named(directory: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Reads all arrays of one checkpoint by name, without knowing the model it belongs to.

    Args:
        directory: One checkpoint, such as ``workdir/checkpoints/best/1000``.

    Raises:
        ValueError: If the checksum does not match. Other damage raises what Orbax finds.

    Example:
        >>> named = load_named("runs/moons/checkpoints/best/1000")  # doctest: +SKIP
        >>> named["params/stage0/block03/conv1/kernel"].shape  # doctest: +SKIP
    """
    path = Path(directory).absolute()
    record = _read_record(path)
    content = _orbax().restore(path, args=ocp.args.Composite(arrays=ocp.args.PyTreeRestore()))["arrays"]["bytes"]
    if _checksum(record, content) != record["checksum"]:
        raise ValueError(f"the checksum of {path} does not match its contents")
    named, start = {}, 0
    for name, dtype, shape in record["arrays"]:
        stop = start + math.prod(shape) * np.dtype(dtype).itemsize
        named[name] = content[start:stop].copy().view(dtype).reshape(shape)  # a copy starts at an aligned address
        start = stop
    return named


def _write(folder: Path, step: int, named: dict[str, np.ndarray], metric: float | None) -> None:
    """Writes ``folder/<step>``, replacing one of the same step only when the new one is complete."""
    content = np.concatenate([np.zeros(0, np.uint8), *(array.reshape(-1).view(np.uint8) for array in named.values())])
    if not content.size:  # Orbax would refuse it with a riddle
        raise ValueError("the state has no values to save: pass the whole training state")
    arrays = [[name, array.dtype.name, list(array.shape)] for name, array in named.items()]
    record = {"step": step, "metric": metric, "arrays": arrays}
    record["checksum"] = _checksum(record, content)

    incoming = folder / f"{step}.incoming"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _delete_incoming(folder)
        items = ocp.args.Composite(arrays=ocp.args.PyTreeSave({"bytes": content}), record=ocp.args.JsonSave(record))
        _orbax().save(incoming, args=items)
        _delete(folder, [step])
        incoming.rename(folder / str(step))
    except Exception as error:  # TensorStore reports a full disk as a ValueError.
        _delete_incoming(folder)
        raise OSError(
            f"the checkpoint of step {step} could not be written to {folder} ({_reason(error)}): "
            "free disk space or check permissions and resume; the checkpoints written before are kept"
        ) from error


def _restore(folder: Path, steps: list[int], target: Any) -> tuple[Any, int] | None:
    """Restores the first of ``steps`` that can be read."""
    for step, fallback in itertools.zip_longest(steps, steps[1:]):
        try:
            named = load_named(folder / str(step))
        except Exception as error:  # Damage shows as whatever Orbax, TensorStore or JSON trips over.
            if fallback is None:
                raise RuntimeError(
                    f"no checkpoint in {folder} can be read (step {step}: {_reason(error)}): put back a copy of one, "
                    "or delete this folder to start again"
                ) from error
            warnings.warn(
                f"the checkpoint of step {step} in {folder} is damaged ({_reason(error)}); falling back to step {fallback}",
                stacklevel=3,
            )
        else:
            return from_named(named, target), step
    return None


def _read_record(path: Path) -> dict[str, Any]:
    return _orbax().restore(path, args=ocp.args.Composite(record=ocp.args.JsonRestore()))["record"]


def _checksum(record: dict[str, Any], content: np.ndarray) -> int:
    described = {key: value for key, value in record.items() if key != "checksum"}
    return zlib.crc32(content.data, zlib.crc32(json.dumps(described, sort_keys=True).encode()))


def _steps(folder: Path) -> list[int]:
    """Lists the steps of complete checkpoints, newest first; unfinished ones have other names."""
    if not folder.is_dir():
        return []
    return sorted((int(path.name) for path in folder.iterdir() if path.name.isdecimal()), reverse=True)


def _delete(folder: Path, steps: list[int]) -> None:
    for step in steps:
        shutil.rmtree(folder / str(step), ignore_errors=True)


def _delete_incoming(folder: Path) -> None:
    """Deletes what unfinished saves left behind, Orbax's temporary folders included."""
    for path in folder.glob("*.incoming*"):
        shutil.rmtree(path, ignore_errors=True)


def _reason(error: Exception) -> str:
    """Shortens an error of the libraries below to a phrase: the system's own words where it has some."""
    code = re.search(r"os_error_code='(\d+)'", str(error))
    if code:
        return os.strerror(int(code.group(1)))
    if isinstance(error, OSError) and error.errno is not None and error.errno != errno.ENOENT:
        return os.strerror(error.errno)
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 160 else text[:157] + "..."


class _NotFromOrbax(logging.Filter):
    """Drops Orbax's records: dozens a save, and for failures a traceback of what is raised anyway."""

    def filter(self, record: logging.LogRecord) -> bool:
        return "orbax" not in Path(record.pathname).parts


_QUIET = _NotFromOrbax()


def _orbax() -> ocp.Checkpointer:
    logging.getLogger("absl").addFilter(_QUIET)  # does nothing the second time
    return ocp.Checkpointer(ocp.CompositeCheckpointHandler())
