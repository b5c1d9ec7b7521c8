"""Trainings that resume to the bit: the newest few checkpoints and the best one, each an ``.npz``
file of named arrays, whole or absent.

Batches and random numbers are functions of (seed, step), and all else that an update depends on is
in the file. A training that is told to stop saves the step it has reached; its next line of the log
then averages only the steps since. One that is killed loses the steps since its last checkpoint.

A file is written under another name and renamed at the end: a killed process or a full disk cannot
damage what was there before. The format keeps a checksum of each array, which finds what a failing
disk did since. The name of an array is its path in the pytree of the state, such as
``params/stage0/blocks/conv1/kernel``.
"""

import contextlib
import functools
import itertools
import json
import logging
import math
import os
import re
import time
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, SupportsFloat

import jax
import jax.numpy as jnp
import numpy as np

from iresnet_jax.atomic_files import locked, path_of, replacing
from iresnet_jax.models.model import array_name
from iresnet_jax.pytrees import first_difference, tagged
from iresnet_jax.training import parallel
from iresnet_jax.training.background import Background
from iresnet_jax.training.callbacks import Callback
from iresnet_jax.training.run import LONGEST, Run
from iresnet_jax.training.signals import Stopped

_logger = logging.getLogger(__name__)

KEPT = 2  # of the newest checkpoints, beside the best one: one is left to fall back to
SAVE_SECONDS = 600.0  # between checkpoints, where validations are further apart
# no array of a state is called like these
_METRIC, _ABOUT = "(metric)", "(about)"
_FORMER = "num_terms"  # an array of states of before, which nothing depends on


class Restored(NamedTuple):
    """A checkpoint that was read.

    Attributes:
        state: The state, of arrays that own their memory and so may be donated.
        step: Its finished updates.
        metric: Number that model selection goes by; NaN if it was saved without one.
        about: JSON data that were saved with it.
        notes: Sentences on damaged checkpoints that it takes the place of.
    """

    state: Any
    step: int
    metric: float
    about: dict[str, Any]
    notes: tuple[str, ...]


class Store:
    """The checkpoints ``workdir/checkpoints/<step>.npz``: the newest to resume from, the best to
    evaluate.

    Args:
        workdir: Folder of the run, which exists when something is saved.

    Example:
        >>> store = Store(Path("runs/moons"))
        >>> store.save(100, state, metric=3.2)  # doctest: +SKIP
        >>> state = store.restore(state).state  # doctest: +SKIP
    """

    def __init__(self, workdir: Path):
        self._folder = workdir / "checkpoints"
        self._metrics: dict[int, float] = {}  # that are known: to look one up reads a checkpoint

    def path(self, step: int) -> Path:
        """Returns the file of a step, whether it exists or not."""
        return self._folder / f"{step}.npz"

    def save(
        self,
        step: int,
        state: Any,
        *,
        metric: SupportsFloat | None = None,
        about: Mapping[str, Any] | None = None,
    ) -> None:
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
        text = json.dumps(dict(about or {})).encode()
        named = to_named(state)
        named |= {_METRIC: np.array(value), _ABOUT: np.frombuffer(text, np.uint8)}
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
                text = named.pop(_ABOUT, np.frombuffer(b"{}", np.uint8)).tobytes()
                about = json.loads(text)
            except FileNotFoundError:  # deleted by its training just now, for a later one
                continue
            # of a bucket, which says nothing of its objects
            except (ConnectionError, PermissionError):
                raise
            except Exception as error:  # Damage shows as whatever zipfile or NumPy trips over.
                damage.append(f"The checkpoint {self.path(step)} is damaged ({_reason(error)})")
                continue
            notes = tuple(f"{sentence}: step {step} takes its place." for sentence in damage)
            named.pop(_FORMER, None)
            return Restored(from_named(named, target), step, metric, about, notes)
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


class Checkpoints(Callback):
    """Makes a training resumable: the same call goes on from the newest checkpoint in the folder,
    to the same bits.

    Validations, the end, and every ten minutes between them leave a checkpoint. From the second
    step on, Ctrl-C and SIGTERM save the step that was reached, and raise `Stopped`. Of several
    processes the first one writes.

    Args:
        folder: A folder of this training alone, also in a bucket.
        claim: ``run ->`` context of a folder that is this training's alone, whose value raises once
            it no longer is; by default `claimed`.

    Example:
        >>> model = train(model, loss, x, callbacks=[Checkpoints("run")])  # doctest: +SKIP
    """

    order = 100
    resumes = True

    def __init__(
        self,
        folder: str | os.PathLike[str],
        claim: Callable[[Run], contextlib.AbstractContextManager[Any]] | None = None,
    ):
        self.folder, self.store = path_of(folder), Store(path_of(folder))
        self._claim = claim or (lambda run: claimed(self.folder, run))
        self._check: Callable[[], None] = lambda: None
        self._saved_at = math.inf

    def of(self, name: str) -> "Checkpoints":
        """Checkpoints of one of several trainings."""
        return Checkpoints(self.folder / re.sub(r"\W+", "-", name))

    @contextlib.contextmanager
    def during(self, run: Run) -> Iterator[None]:
        """Claims the folder, and goes on from its newest checkpoint."""
        with contextlib.ExitStack() as stack:
            self._write = stack.enter_context(Background())
            found: list[Any] = [run.state, (run.state.ema, run.state.batch_stats)]

            def begin() -> dict[str, Any] | None:
                self._check = stack.enter_context(self._claim(run))
                newest = self.store.restore(run.state)
                if newest is None:
                    return None
                best = self.store.restore(run.state, best=True)
                assert best is not None
                for note in dict.fromkeys((*newest.notes, *best.notes)):
                    warnings.warn(note, stacklevel=2)
                found[:] = newest.state, (best.state.ema, best.state.batch_stats)
                about = {"losses": [], "records": [], "seconds": 0.0, "compiling_s": 0.0}
                about |= {"ended": None, **newest.about}
                is_best = math.isfinite(best.metric)
                return about | {"best": [best.metric, best.step] if is_best else None}

            about = parallel.from_first(begin)
            if about is not None:
                state, (ema, batch_stats) = parallel.broadcast(tuple(found))
                best = about["best"] and (*about["best"], ema, batch_stats)
                run.resume(state, best, about)
                _logger.info("resuming from step %d of %d", run.step, run.horizon)
            self._saved_at = time.monotonic()
            try:
                yield
            except Stopped:
                parallel.from_first(self._write.wait)  # nobody leaves before the state is written
                raise
            parallel.from_first(self._write.wait)

    def after_step(self, run: Run) -> None:
        """Saves the state where that is due."""
        if run.ended is not None:
            run.means()  # in all processes: a state that blew up is not saved
        is_late = run.logged_at == run.step and time.monotonic() - self._saved_at > SAVE_SECONDS
        is_due = run.is_validated or run.ended is not None or is_late
        if not is_due or not parallel.is_first():
            return
        self._write.wait()  # memory holds one copy of the state
        state = jax.tree.map(np.array, jax.device_get(run.state))  # the next step frees the arrays
        best = run.best
        metric = best.loss if best is not None and best.step == run.step else None
        self._write(self._check)
        self._write(self.store.save, run.step, state, metric=metric, about=run.about())
        self._saved_at = time.monotonic()


@contextlib.contextmanager
def claimed(folder: Path, run: Run) -> Iterator[Callable[[], None]]:
    """Within ``with``, no other process trains in the folder, which says what trains there.

    Yields what `atomic_files.locked` does.

    Raises:
        ValueError: If another process trains there, or another training has begun there.
    """
    steps = run.most if run.most < LONGEST else None
    about = {"seed": int(run.fixed.seed), "batch_size": run.batch_size, "steps": steps}
    rows = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(run.data)]
    about["data"] = functools.reduce(lambda found, leaf: zlib.crc32(leaf, found), rows, 0)
    about = json.loads(json.dumps(about | {"model": tagged(run.free.spec)}))
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        try:
            check = stack.enter_context(locked(folder / "training", timeout_s=0.0))
        except TimeoutError:
            raise ValueError(
                f"another process is training in {folder}: wait until it has ended, or choose "
                "another folder"
            ) from None
        path = folder / "training.json"
        if path.exists():
            theirs = json.loads(path.read_text(encoding="utf-8"))
            if difference := first_difference(about, theirs, "training"):
                raise ValueError(
                    f"{folder} holds another training: {difference}; choose another folder or "
                    "delete it"
                )
        else:
            with replacing(path) as incoming:
                incoming.write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
        yield check
