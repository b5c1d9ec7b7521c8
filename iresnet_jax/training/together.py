"""Several models of one architecture, trained at once on the same data by one program: they differ in their seeds.

The state of all is that of one with a leading axis on whatever depends on the seed, and their step is that of one under
``jax.vmap``. They take equally many steps, with equally many terms of the log-determinant; each keeps its own best state.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from iresnet_jax.maths.platforms import quick_jit
from iresnet_jax.training.step import Objective, TrainingStep, TrainState, ValidationResult
from iresnet_jax.training.trainer import Best, Trainer

SHARED = ("step", "num_terms", "horizon")  # fields of the state that all models have in common


@dataclass(frozen=True, eq=False)
class StepTogether(TrainingStep):
    """The step of all models, of which a batch has an example each along its second axis; metrics are their means.

    Attributes:
        num_members: Models.
    """

    num_members: int = 1

    def __call__(self, state: TrainState, batch: Any) -> tuple[TrainState, dict[str, Any]]:
        """The states after one update, and the means of the metrics, of this device's share of a batch."""
        axes = _axes(state)
        state, metrics = jax.vmap(super().__call__, in_axes=(axes, 1), out_axes=(axes, 0))(state, batch)
        return state, jax.tree.map(lambda of_members: jnp.mean(of_members, axis=0), metrics)


@dataclass(frozen=True, eq=False)
class Together(Objective):
    """The objective of all models, from `Together.of`.

    Attributes:
        members: The objective of each model.
    """

    members: tuple[Objective, ...] = ()

    @classmethod
    def of(cls, members: Sequence[Objective]) -> "Together":
        """The objective of models that differ in nothing but their seeds."""
        first = members[0]
        step = StepTogether(**vars(first.training_step), num_members=len(members))
        changed = {"training_step": step, "make_validation": lambda: _Validations(members)}
        return cls(**{**vars(first), **changed}, members=tuple(members))

    def initial_state(self) -> TrainState:
        """The states of fresh variables."""
        return _stacked([member.initial_state() for member in self.members])

    def abstract_state(self) -> TrainState:
        """Shapes and dtypes of the states."""
        return jax.eval_shape(_stacked, [member.abstract_state() for member in self.members])

    def abstract_batch(self, batch_size: int) -> Any:
        """Shapes and dtypes of a batch."""
        size = batch_size, len(self.members)
        return jax.tree.map(lambda rows: jax.ShapeDtypeStruct((*size, *rows.shape[1:]), rows.dtype), self.examples)


class TrainerTogether(Trainer):
    """A training run of several models in memory; arguments are those of `Trainer`, with a `Together` as objective."""

    def __init__(self, objective: Together, *arguments: Any, **options: Any):
        self._bests: list[Best | None] = [None] * len(objective.members)
        self._measured: list[list[dict[str, Any]]] = [[] for _ in objective.members]
        super().__init__(objective, *arguments, **options)

    def store(self, loss: float | None) -> None:
        """Keeps each model's state if it is its best so far."""
        super().store(loss)
        if loss is None:
            return
        ema, batch_stats = jax.device_get((self.state.ema, self.state.batch_stats))
        for place, found in enumerate(self._validate.latest):
            self._measured[place].append({**self.records[-1], **found.metrics})
            own, best = self._objective.selection(found.metrics), self._bests[place]
            if best is None or own < best.loss:
                of_member = jax.tree.map(lambda leaf, place=place: leaf[place].copy(), (ema, batch_stats))
                self._bests[place] = Best(own, self.step, *of_member)

    @property
    def outcomes(self) -> list[tuple[Best, list[dict[str, Any]]]]:
        """The best state of each model, and its measurements, among which those of training are means of all models."""
        of_all = [record for record in self.records if record["split"] != "validation"]
        pairs = zip(self._bests, self._measured, strict=True)
        return [(best, of_all + measured) for best, measured in pairs if best is not None]


class _Validations:
    """Validates each model; what was found of them last is in `latest`."""

    def __init__(self, members: Sequence[Objective]):
        self._validations: list[Callable[[TrainState], ValidationResult]] = [member.make_validation() for member in members]
        self.latest: list[ValidationResult] = []

    def __call__(self, state: TrainState) -> ValidationResult:
        """The means over the models, and as many terms as one of them asks for."""
        seen = state._replace(params={}, opt_state={})  # of what is validated
        states = (_member(seen, np.int32(place)) for place in range(len(self._validations)))
        self.latest = [validate(own) for validate, own in zip(self._validations, states, strict=True)]
        means = {name: float(np.mean([found.metrics[name] for found in self.latest])) for name in self.latest[0].metrics}
        return ValidationResult(means, max(found.num_terms for found in self.latest))


def _axes(state: TrainState) -> Any:
    """The axis of models in each part of their state; None where they have it in common."""
    of_constants = {name: 0 if name == "seed" else None for name in state.constants}
    return TrainState(**{**dict.fromkeys(TrainState._fields, 0), **dict.fromkeys(SHARED), "constants": of_constants})


@quick_jit
def _stacked(states: Sequence[TrainState]) -> TrainState:
    first = states[0]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
    constants = {**first.constants, "seed": stacked.constants["seed"]}
    return stacked._replace(**{name: getattr(first, name) for name in SHARED}, constants=constants)


@quick_jit
def _member(state: TrainState, place: Int[Array, ""]) -> TrainState:
    """The state of one of the models."""
    return jax.tree.map(
        lambda axis, part: part if axis is None else jax.tree.map(lambda leaf: leaf[place], part),
        _axes(state),
        state,
        is_leaf=lambda axis: axis is None,
    )
