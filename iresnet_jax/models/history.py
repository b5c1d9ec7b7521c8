"""The record of a training, as it travels with a model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

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


@dataclass(frozen=True, eq=False)
class History:
    """Measurements of a training run.

    All histories are equal to each other: models that differ in nothing else run the same compiled
    programs. What returns a model from ``jit`` therefore returns the history of the first one.

    Attributes:
        train: Measurements of training steps, averaged between two of them: a list of values by
            name, "step" among them.
        validation: Measurements on the validation split, likewise.
        step: Step whose parameters the model has, the best on validation.
        attempts: Runs that were tried, in their order; empty if there was one run only.
        ended: Why no further one was tried.
    """

    train: Mapping[str, list[float]]
    validation: Mapping[str, list[float]]
    step: int
    attempts: tuple[Attempt, ...] = ()
    ended: str = ""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, History)

    def __hash__(self) -> int:
        return hash(History)

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
