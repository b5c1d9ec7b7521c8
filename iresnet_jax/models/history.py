"""The record of a training, as it travels with a model."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

STOPPED = "it was stopped"  # why a training ended that somebody stopped


class Attempt(NamedTuple):
    """One of several training runs, the best of which gave the model.

    Attributes:
        what: What distinguishes it from the others.
        loss: Lowest validation loss.
        best_step: Updates that led to it; 0 is the start.
        num_steps: Updates of the run.
        seconds: Time of the run, without compilation.
    """

    what: str
    loss: float
    best_step: int
    num_steps: int
    seconds: float


@dataclass(frozen=True)
class History:
    """Measurements of a training run.

    Attributes:
        train: Measurements of training steps, averaged between two of them: a list of values by
            name, "step" among them.
        validation: Measurements on the validation split, likewise.
        step: Step whose parameters the model has, the best on validation.
        loss: Validation loss of the model; NaN without validation.
        losses: Its loss on each held-out example; None if only the mean is known.
        num_steps: Updates of the training.
        seconds: Its time, without the compilation of the step.
        attempts: Runs that were tried, in their order; empty if there was one run only.
        ended: Why no further one was tried.
    """

    train: Mapping[str, list[float]]
    validation: Mapping[str, list[float]]
    step: int
    loss: float = math.nan
    losses: np.ndarray | None = None
    num_steps: int = 0
    seconds: float = 0.0
    attempts: tuple[Attempt, ...] = ()
    ended: str = ""

    @classmethod
    def from_records(cls, records: Sequence[Mapping[str, Any]], step: int) -> "History":
        """The history in the records of `runs.metrics.read_metrics`."""
        train, validation = (
            _columns([r for r in records if r["split"] == split])
            for split in ("train", "validation")
        )
        return cls(train, validation, step)

    def __str__(self) -> str:
        names = [name for name in self.validation if name not in ("step", "wall_time_s")]
        lines = (
            ["step  seconds  " + "  ".join(names)]
            if names
            else [f"step {self.step}, no validation"]
        )
        for i, step in enumerate(self.validation.get("step", [])):
            values = "  ".join(f"{self.validation[name][i]:.4f}" for name in names)
            best = "  <- this model" if step == self.step else ""
            lines.append(f"{step:.0f}  {self.validation['wall_time_s'][i]:.1f}  {values}{best}")
        for run in self.attempts:
            lines.append(
                f"{run.what}: {run.loss:.4f} at step {run.best_step} of {run.num_steps}, "
                f"{run.seconds:.1f} s"
            )
        return "\n".join(lines + [f"ended, as {self.ended}"] * bool(self.ended))


def _columns(records: list[Mapping[str, Any]]) -> dict[str, list[float]]:
    names = [
        name
        for name in (records[0] if records else {})
        if name != "split" and all(name in r for r in records)
    ]
    return {name: [float(record[name]) for record in records] for name in names}
