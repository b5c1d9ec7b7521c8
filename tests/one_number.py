"""A training of one number, which compiles in a tenth of a second."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import iresnet_jax as ir
from iresnet_jax.models.contractions import ConstrainedFlow
from iresnet_jax.models.model import MODELS, How, Model
from iresnet_jax.training.callbacks import Callback
from iresnet_jax.training.run import Measured, Objective
from iresnet_jax.training.step import Loss
from iresnet_jax.training.train import train

SPEC = ir.DensitySpec(ir.FlowSpec((1,), (ir.StageSpec(1, (1,)),)))
NUM_STEPS, EVERY = 12, 3


@dataclasses.dataclass(frozen=True)
class Number(Model):
    """A model without blocks."""

    spec: Any
    weights: Any
    how: Any
    number: Any
    history: Any = None


@pytest.fixture(autouse=True)
def without_blocks(monkeypatch):
    """Models of densities are the number alone."""

    def built(self, params=None, *_):
        return self.build({}, params)

    monkeypatch.setitem(MODELS, ir.DensitySpec, Number)
    monkeypatch.setattr(
        ir.Free,
        "constraint_of_step",
        lambda self, params, iterates: ConstrainedFlow({}, iterates, {}),
    )
    monkeypatch.setattr(ir.Free, "validated", built)
    monkeypatch.setattr(ir.Free, "certified", built)


class Sees(Callback):
    """Keeps the run, and how many steps were taken."""

    def __init__(self):
        self.taken = 0

    def during(self, run):
        self.run = run
        return super().during(run)

    def after_step(self, run):
        self.taken += 1


class At(Callback):
    """Does something after so many steps."""

    order = 35  # before signals are looked at

    def __init__(self, step, event):
        self.step, self.event = step, event

    def after_step(self, run):
        if run.step == self.step:
            self.event(run)


def objective(held_out=None):
    """The distance from noisy examples, validated by that from 3 or by given losses."""

    def loss(model, batch, keys):
        noise = jax.vmap(jax.random.normal)(keys.examples)
        value = jnp.mean((model.number - batch - 0.1 * noise) ** 2)
        return Loss(value, {"loss": value})

    def measure(model):
        found = abs(float(model.number) - 3) if losses is None else next(losses)
        mean = float(np.mean(found))
        return Measured({"loss": mean}, mean, found if np.ndim(found) else None)

    losses = None if held_out is None else iter(held_out)
    return Objective(loss, measure=measure)


def trained(*callbacks, held_out=None, batch=3.0, **options):
    """The trained number, whose `history` tells how it went, and the run that callbacks saw."""
    free = ir.Free({"number": jnp.zeros(())}, {}, {}, options.pop("spec", SPEC), How())
    settings = {"key": 0, "steps": NUM_STEPS, "every": EVERY, "log_every": 2, "patience": 0}
    settings |= {"batch_size": 8, "ema_decay": 0.5, "progress": False} | options
    length = settings["steps"] or 1000
    sees, x = Sees(), np.full(16, batch, np.float32) + np.linspace(-1, 1, 16, dtype=np.float32)
    model = train(
        free,
        objective(held_out),
        x,
        optimizer=optax.sgd(1.0),
        schedule=optax.linear_schedule(0.2, 0.0, length),
        schedule_steps=length,
        callbacks=[*callbacks, sees],
        **settings,
    )
    return model, sees.run


def steps(run, split):
    """The steps of a run's records."""
    return [record["step"] for record in run.records if record["split"] == split]


def assert_same(found, expected):
    """The same bits in two results of `trained`, and the same validations."""
    (model, run), (other, other_run) = found, expected
    assert model.number == other.number
    assert (model.history.step, run.step, run.losses) == (
        *(other.history.step, other_run.step, other_run.losses),
    )
    for own, its in zip(*map(jax.tree.leaves, (run.state, other_run.state)), strict=True):
        assert np.asarray(own).tobytes() == np.asarray(its).tobytes()
