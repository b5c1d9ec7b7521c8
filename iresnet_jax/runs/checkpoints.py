"""Checkpoints of a training run: the newest few and the best one, each an ``.npz`` file of named
arrays, whole or absent.

A file is written under another name and renamed at the end: a killed process or a full disk cannot
damage what was there before. The format keeps a checksum of each array, which finds what a failing
disk did since. The name of an array is its path in the pytree of the state, such as
``params/stage0/blocks/conv1/kernel``.
"""

import contextlib
import itertools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, SupportsFloat

import jax
import jax.numpy as jnp
import numpy as np

from iresnet_jax.atomic_files import replacing
from iresnet_jax.models.model import array_name

KEPT = 2  # of the newest checkpoints, beside the best one: one is left to fall back to
_METRIC = "(metric)"  # no array of a state is called that


class Restored(NamedTuple):
    """A checkpoint that was read.

    Attributes:
        state: The state, of arrays that own their memory and so may be donated.
        step: Its finished updates.
        metric: Number that model selection goes by; NaN if it was saved without one.
        notes: Sentences on damaged checkpoints that it takes the place of.
    """

    state: Any
    step: int
    metric: float
    notes: tuple[str, ...]


class Checkpoints:
    """The checkpoints ``workdir/checkpoints/<step>.npz``: the newest to resume from, the best to
    evaluate.

    Args:
        workdir: Folder of the run, which exists when something is saved.

    Example:
        >>> checkpoints = Checkpoints(Path("runs/moons"))
        >>> checkpoints.save(100, state, metric=3.2)  # doctest: +SKIP
        >>> state = checkpoints.restore(state).state  # doctest: +SKIP
    """

    def __init__(self, workdir: Path):
        self._folder = workdir / "checkpoints"
        self._metrics: dict[int, float] = {}  # that are known: to look one up reads a checkpoint

    def path(self, step: int) -> Path:
        """Returns the file of a step, whether it exists or not."""
        return self._folder / f"{step}.npz"

    def save(self, step: int, state: Any, *, metric: SupportsFloat | None = None) -> None:
        """Writes the checkpoint of a step, then deletes those that are no longer needed.

        Checkpoints of later steps are deleted too: resuming from an earlier step gave up their
        future.

        Args:
            step: Finished updates, >= 0.
            state: A pytree of arrays, without a device axis.
            metric: What model selection goes by, lower is better, e.g. validation bits/dim. NaN is
                never the best.

        Raises:
            OSError: If the disk is full or not writable; the checkpoints already there are kept.
        """
        value = math.nan if metric is None else float(metric)
        named = to_named(state) | {_METRIC: np.array(value)}
        try:
            self._folder.mkdir(exist_ok=True)
            with contextlib.suppress(ConnectionError):  # to a bucket, which has none
                for leftover in self._folder.glob("*.incoming"):  # of killed processes
                    leftover.unlink()
            with replacing(self.path(step)) as incoming, incoming.open("xb") as file:
                np.savez(file, **named)  # pyright: ignore[reportArgumentType]: of names that no state has
        except OSError as error:
            raise OSError(
                f"the checkpoint of step {step} could not be written to {self._folder} "
                f"({_reason(error)}): "
                "free space, check permissions or the connection, and resume; the checkpoints "
                "written before are kept"
            ) from error
        self._metrics[step] = value
        # what cannot be read or deleted now is so after the next one
        with contextlib.suppress(OSError):
            self._prune(step)

    def _prune(self, step: int) -> None:
        """Deletes all checkpoints but the newest up to this step and the best."""
        steps = self.steps()
        past = [other for other in steps if other <= step]
        self._metrics = {
            other: self._metrics[other] if other in self._metrics else self._metric(other)
            for other in past
        }
        best = sorted(
            (other for other in past if math.isfinite(self._metrics[other])),
            key=self._metrics.__getitem__,
        )
        for other in {*steps} - {*past[:KEPT], *best[:1]}:
            with contextlib.suppress(OSError):
                self.path(other).unlink()

    def restore(self, target: Any, *, best: bool = False) -> Restored | None:
        """Reads the newest checkpoint that is intact, or the one with the lowest metric.

        Args:
            target: A state, or its ``jax.eval_shape``, that says what structure, shapes and dtypes
                to restore.
            best: Whether the one with the lowest metric is wanted; without metrics it is the
                newest.

        Returns:
            The checkpoint; None if nothing was saved yet.

        Raises:
            RuntimeError: If there are checkpoints and all of them are damaged.
            ValueError: If the first intact one does not fit ``target``; it names the first
                difference.
        """
        steps, damage = self.steps(), []
        for step in sorted(steps, key=self._metric) if best else steps:
            try:
                with self.path(step).open("rb") as file, np.load(file) as archive:
                    named = {name: archive[name] for name in archive.files}
                metric = float(named.pop(_METRIC))
            except FileNotFoundError:  # deleted by its training just now, for a later one
                continue
            # of a bucket, which says nothing of its objects
            except (ConnectionError, PermissionError):
                raise
            except Exception as error:  # Damage shows as whatever zipfile or NumPy trips over.
                damage.append(f"The checkpoint {self.path(step)} is damaged ({_reason(error)})")
                continue
            notes = tuple(f"{sentence}: step {step} takes its place." for sentence in damage)
            return Restored(from_named(named, target), step, metric, notes)
        if damage:
            raise RuntimeError(
                f"{damage[-1]}, and no other can be read: put back a copy, or "
                "delete its folder to start again"
            )
        return None

    def steps(self) -> list[int]:
        """Lists the steps of complete checkpoints, newest first; unfinished ones have other
        names.
        """
        return sorted(
            (int(path.stem) for path in self._folder.glob("*.npz") if path.stem.isdecimal()),
            reverse=True,
        )

    def _metric(self, step: int) -> float:
        """Reads a metric; infinity if there is none, and minus infinity of a damaged file, so that
        restoring it can say so.

        Raises:
            OSError: If a bucket cannot be reached, or refuses.
        """
        try:
            with self.path(step).open("rb") as file, np.load(file) as archive:
                metric = float(archive[_METRIC])
        except FileNotFoundError:
            return math.inf
        except (ConnectionError, PermissionError):
            raise
        except Exception:  # as above
            return -math.inf
        return math.inf if math.isnan(metric) else metric


def _reason(error: Exception) -> str:
    """Shortens an error to a phrase: the system's own words where it has some."""
    cause = error.__cause__ or error
    return (
        getattr(cause, "strerror", None)
        or " ".join(str(cause).split())[:160]
        or type(cause).__name__
    )


def to_named(tree: Any) -> dict[str, np.ndarray]:
    """The arrays of a pytree on the host, by name. They may share memory with it: copy what must
    outlive a donation.

    Example:
        >>> list(to_named({"stage0": {"bias": np.zeros((2, 4))}, "step": np.int32(7)}))
        ['stage0/bias', 'step']
    """
    return {
        array_name(path): np.asarray(leaf)
        for path, leaf in jax.tree.leaves_with_path(jax.device_get(tree))
    }


def from_named(named: Mapping[str, np.ndarray], target: Any) -> Any:
    """Rebuilds a pytree from named arrays; the inverse of `to_named`, bit by bit.

    Args:
        named: Arrays by name, as `to_named` returns them.
        target: A pytree with the structure, shapes and dtypes to restore, such as the result of
            ``jax.eval_shape``.

    Raises:
        ValueError: If a name is missing or left over, or a shape or dtype differs; it names the
            first difference.
    """

    def restored(path: Any, leaf: Any) -> jax.Array:
        name, expected = array_name(path), (leaf.dtype, leaf.shape)
        if name not in named:
            raise _misfit(f"it lacks {name!r}")
        dtype, shape = named[name].dtype, named[name].shape
        if {dtype, leaf.dtype} == {np.dtype(np.float32), np.dtype(np.float64)}:
            setting = "set" if dtype == np.float64 else "unset"
            raise ValueError(
                f"the run was trained in {dtype}: {setting} JAX_ENABLE_X64 to go on "
                "with it or to read it"
            )
        if (dtype, shape) != expected:
            raise _misfit(
                f"{name!r} is {dtype}{list(shape)} in it, not {leaf.dtype}{list(leaf.shape)}"
            )
        return jnp.array(named[name])

    tree = jax.tree.map_with_path(restored, target)
    known = {array_name(path) for path, _ in jax.tree.leaves_with_path(target)}
    if left := next(itertools.filterfalse(known.__contains__, named), None):
        raise _misfit(f"it holds {left!r}, which this state does not have")
    return tree


def _misfit(difference: str) -> ValueError:
    return ValueError(
        f"the checkpoint does not fit this state, {difference}: build the state from "
        "the config of its run"
    )
