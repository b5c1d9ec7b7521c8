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
import json
import logging
import math
import os
import re
import threading
import time
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any, NamedTuple, SupportsFloat

import jax
import jax.numpy as jnp
import numpy as np

from iresnet_jax.models.model import array_name
from iresnet_jax.pytrees import first_difference, tagged
from iresnet_jax.storage import locked, path_of, replacing
from iresnet_jax.training import parallel
from iresnet_jax.training.callbacks import Callback
from iresnet_jax.training.run import LONGEST, Best, Run
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

    def path(self, step: int) -> Path:
        """Returns the file of a step, whether it exists or not."""
        return self._folder / f"{step}.npz"

    def save(
        self,
        step: int,
        state: Any,
        *,
        metric: SupportsFloat = math.nan,
        best: int | None = None,
        about: Mapping[str, Any] | None = None,
    ) -> None:
        """Writes the checkpoint of a step, then deletes all but the newest ones and the best.

        Checkpoints of later steps are deleted too: resuming from an earlier step gave up their
        future. If the disk is full, those that are there are kept.

        Args:
            step: Finished updates, >= 0.
            state: A pytree of arrays, without a device axis.
            metric: What model selection goes by, lower is better, e.g. validation bits/dim. NaN is
                never the best.
            best: Step of the best checkpoint so far; None if there is none.
            about: JSON data to save with it.
        """
        text = json.dumps(dict(about or {})).encode()
        named = to_named(state) | {_METRIC: np.array(float(metric))}
        named |= {_ABOUT: np.frombuffer(text, np.uint8)}
        self._folder.mkdir(exist_ok=True)
        # what cannot be read or deleted now is so after the next one
        with contextlib.suppress(OSError):
            for leftover in self._folder.glob("*.incoming"):  # of killed processes
                leftover.unlink()
        with replacing(self.path(step)) as incoming, incoming.open("xb") as file:
            np.savez(file, **named)  # pyright: ignore[reportArgumentType]: of names that no state has
        with contextlib.suppress(OSError):
            steps = self.steps()
            past = [other for other in steps if other <= step]
            for other in {*steps} - {*past[:KEPT], best}:
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
        """
        steps, damage = self.steps(), []
        for step in sorted(steps, key=self._metric) if best else steps:
            named = self._read(step)
            if isinstance(named, FileNotFoundError):  # its training deleted it just now
                continue
            if isinstance(named, Exception):
                reason = " ".join(str(named).split())
                damage.append(f"The checkpoint {self.path(step)} is damaged ({reason})")
                continue
            metric = float(named.pop(_METRIC, math.nan))
            about = json.loads(named.pop(_ABOUT, np.frombuffer(b"{}", np.uint8)).tobytes())
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

    def _read(self, step: int, names: Sequence[str] = ()) -> dict[str, np.ndarray] | Exception:
        """The arrays of a checkpoint, by default all, or the error that shows its damage."""
        try:
            with self.path(step).open("rb") as file, np.load(file) as archive:
                return {name: archive[name] for name in names or archive.files}
        except (ConnectionError, PermissionError):  # of a bucket: they say nothing of its objects
            raise
        except Exception as error:  # whatever zipfile or NumPy trips over
            return error

    def _metric(self, step: int) -> float:
        """A metric: infinity if there is none, and minus infinity of a file that cannot be read, so
        that `restore` says why.
        """
        found = self._read(step, [_METRIC])
        metric = -math.inf if isinstance(found, Exception) else float(found[_METRIC])
        return math.inf if math.isnan(metric) else metric


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
    """
    wanted = {array_name(path): leaf for path, leaf in jax.tree.leaves_with_path(target)}
    ours, theirs = (
        {name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in leaves.items()}
        for leaves in (wanted, named)
    )
    if difference := first_difference(ours, theirs, "state", ("now", "in the checkpoint")):
        raise ValueError(
            f"the checkpoint does not fit this state, {difference}: give the config, the optimizer "
            "and JAX_ENABLE_X64 of its run"
        )
    return jax.tree.map_with_path(lambda path, _: jnp.array(named[array_name(path)]), target)


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
        self._writing: Future[None] = Future()

    def of(self, name: str) -> "Checkpoints":
        """Checkpoints of one of several trainings."""
        return Checkpoints(self.folder / re.sub(r"\W+", "-", name))

    @contextlib.contextmanager
    def during(self, run: Run) -> Iterator[None]:
        """Claims the folder, and goes on from its newest checkpoint."""
        with contextlib.ExitStack() as stack:
            found: list[Any] = [run.state, (run.state.ema, run.state.batch_stats)]

            def begin() -> dict[str, Any] | None:
                self._check = stack.enter_context(self._claim(run))
                newest = self.store.restore(run.state)
                best = self.store.restore(run.state, best=True)
                if newest is None or best is None:
                    return None
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
            self._writing, self._saved_at = in_background(lambda: None), time.monotonic()
            try:
                yield
            except Exception:  # before one of the writing, which has to end
                wait([self._writing])
                raise
            except Stopped:
                parallel.from_first(self._writing.result)  # nobody leaves before it is written
                raise
            parallel.from_first(self._writing.result)

    def after_step(self, run: Run) -> None:
        """Saves the state where that is due."""
        if run.ended is not None:
            run.means()  # in all processes: a state that blew up is not saved
        is_late = run.logged_at == run.step and time.monotonic() - self._saved_at > SAVE_SECONDS
        is_due = run.is_validated or run.ended is not None or is_late
        if not is_due or not parallel.is_first():
            return
        self._writing.result()  # memory holds one copy of the state
        state = jax.tree.map(np.array, jax.device_get(run.state))  # the next step frees the arrays
        self._writing = in_background(self._save, run.step, state, run.best, run.about())
        self._saved_at = time.monotonic()

    def _save(self, step: int, state: Any, best: Best | None, about: Mapping[str, Any]) -> None:
        self._check()
        metric = best.loss if best and best.step == step else math.nan
        self.store.save(step, state, metric=metric, best=best and best.step, about=about)


def in_background(function: Callable[..., Any], *arguments: Any) -> Future[Any]:
    """Calls a function in a thread, for which no end of a process waits."""
    future: Future[Any] = Future()

    def call() -> None:
        try:
            future.set_result(function(*arguments))
        except Exception as error:
            future.set_exception(error)

    threading.Thread(target=call, daemon=True).start()
    return future


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[Callable[[], None]]:
    """Within ``with``, no other process trains in the folder; the lock ends with its process.

    Yields what `storage.locked` does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        try:
            check = stack.enter_context(locked(folder / "training", timeout_s=0.0))
        except TimeoutError:
            raise ValueError(
                f"another process is training in {folder}: wait until it has ended, or choose "
                "another folder"
            ) from None
        yield check


@contextlib.contextmanager
def claimed(folder: Path, run: Run) -> Iterator[Callable[[], None]]:
    """`alone` in the folder, which says what trains there."""
    steps = run.most if run.most < LONGEST else None
    about = {"seed": int(run.fixed.seed), "batch_size": run.batch_size, "steps": steps}
    rows = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(run.data)]
    about["data"] = functools.reduce(lambda found, leaf: zlib.crc32(leaf, found), rows, 0)
    about = json.loads(json.dumps(about | {"model": tagged(run.free.spec)}))
    with alone(folder) as check:
        path = folder / "training.json"
        if path.exists():
            theirs = json.loads(path.read_text(encoding="utf-8"))
            if difference := first_difference(about, theirs, "training"):
                raise ValueError(
                    f"{folder} holds another training: {difference}; choose another folder, and "
                    "start from the model of this one to go on with other settings or for longer"
                )
        else:
            with replacing(path) as incoming:
                incoming.write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
        yield check
