"""Training in memory: when it validates and ends, what it keeps, and how its learning rate
follows its time.
"""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from iresnet_jax.models.contractions import ConstrainedFlow
from iresnet_jax.training import parallel, trainer
from iresnet_jax.training.step import Loss, Objective, TrainingStep, UpdateRule, ValidationResult
from iresnet_jax.training.trainer import Trainer, TrainingConfig, check_finite


class Constant:
    """A model of one number, without blocks."""

    def __init__(self, number=None):
        self.number = number

    def with_(self, *, weights, number):
        return Constant(number)


def objective_of(total_steps, held_out=None):
    """The mean of examples by gradient descent, validated by its distance from 3 or by given
    losses.
    """

    def loss(model, batch, keys):
        value = jnp.mean((model.number - batch) ** 2)
        return Loss(value, {"loss": value})

    losses = iter([]) if held_out is None else iter(held_out)

    def validate(state):
        return ValidationResult({"loss": next(losses, float(abs(state.ema["number"] - 3)))})

    rule = UpdateRule(
        optax.sgd(1.0), optax.linear_schedule(0.2, 0.0, total_steps), total_steps, ema_decay=0.0
    )
    return Objective(
        name="loss",
        training_step=TrainingStep(
            Constant(), loss, lambda params, spectral: ConstrainedFlow({}, spectral, {}), rule
        ),
        make_validation=lambda: validate,
        selection=lambda metrics: metrics["loss"],
        examples=np.zeros(8, np.float32),
        initial_variables=lambda: {"params": {"number": jnp.zeros(())}},
        seed=0,
    )


def run(held_out=None, after_step=lambda made: False, batch=3.0, options=None, **settings):
    """A run that has ended, by itself or as ``after_step`` says so."""
    settings = TrainingConfig(
        **{"total_steps": 12, "eval_every_steps": 3, "log_every_steps": 2, **settings}
    )
    made = Trainer(objective_of(settings.schedule_steps, held_out), settings, **(options or {}))
    for _ in made.steps(itertools.repeat(parallel.shard(np.full(8, batch, np.float32)))):
        if after_step(made):
            break
    return made


def steps(made, split):
    return [record["step"] for record in made.records if record["split"] == split]


def test_it_logs_validates_and_tells_what_it_does():
    said, logged, losses = [], [], []
    made = run(
        options={
            "say": said.append,
            "validated": losses.append,
            "log": lambda split, metrics: logged.append(split),
        }
    )
    assert steps(made, "train") == [2, 3, 4, 6, 8, 9, 10, 12]
    assert steps(made, "validation") == [3, 6, 9, 12]
    assert made.step == int(made.state.step) == 12
    assert losses == [record["loss"] for record in made.records if record["split"] == "validation"]
    assert losses[-1] < losses[0] < 3
    assert logged == [record["split"] for record in made.records]
    assert len(said) == 5
    assert "first step after" in said[0]
    assert "step 12 of 12: validation loss" in said[-1]


def test_metrics_are_means_over_the_steps_since_the_last_line():
    every, second = (
        [
            r["loss"]
            for r in run(log_every_steps=n, eval_every_steps=12).records
            if r["split"] == "train"
        ]
        for n in (1, 2)
    )
    np.testing.assert_allclose(np.reshape(every, (6, 2)).mean(axis=1), second, rtol=1e-6)


def test_patience_ends_training():
    made = run([3.0, 1.0, 2.0, 4.0, 5.0], total_steps=100, patience=2)
    assert steps(made, "validation") == [3, 6, 9, 12]


@pytest.fixture
def clock(monkeypatch):
    """Has every reading of the clock take a tenth of a second."""
    readings = itertools.count(0, 0.1)
    monkeypatch.setattr(trainer.time, "monotonic", lambda: next(readings))


TIME_LIMITS = {
    "minutes": {"minutes": 1.0, "total_steps": 0},
    "seconds of steps": {"options": {"seconds_of_steps": 60.0}, "total_steps": 5000},
    "the shorter one": {
        "options": {"seconds_of_steps": 60.0},
        "minutes": 50.0,
        "total_steps": 5000,
    },
    "an estimate that several processes agree on": {
        "options": {"agree": lambda steps: steps // 2 * 2},
        "minutes": 1.0,
    },
}


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize("settings", TIME_LIMITS.values(), ids=TIME_LIMITS)
def test_a_time_limit_ends_training_at_a_learning_rate_of_nearly_zero(settings):
    made = run(**{"total_steps": 5000, "eval_every_steps": 100_000, **settings})
    assert 50 < made.elapsed_s < 63
    assert made.step == made.horizon == int(made.state.horizon) < 5000
    assert made.ended == "time was over"
    rates = [record["learning_rate"] for record in made.records if record["split"] == "train"]
    assert rates[-1] < 0.05 * max(rates)
    assert 15 <= len(steps(made, "validation")) <= 25


@pytest.mark.usefixtures("clock")
def test_a_run_with_time_for_all_its_steps_takes_them():
    made = run(minutes=50.0, total_steps=100)
    assert (made.step, made.ended) == (100, "")


@pytest.mark.usefixtures("clock")
def test_a_run_that_goes_on_has_the_time_that_is_left():
    state = objective_of(1000).initial_state()._replace(step=jnp.int32(190), horizon=np.int32(200))
    made = run(
        options={"state": state, "seconds_before": 290.0},
        minutes=5.0,
        total_steps=1000,
        log_every_steps=1,
    )
    assert 191 < made.step < 240
    assert made.elapsed_s < 305


def test_what_is_not_finite_ends_training():
    with pytest.raises(
        RuntimeError, match="grad_norm, loss became non-finite between steps 0 and 1"
    ) as raised:
        run(batch=np.nan)
    assert "workdir" not in str(raised.value)  # there is none
    check_finite({"loss": 1.0, "grad_norm": np.float32(2.0)}, 1, 100)
    with pytest.raises(RuntimeError, match=r"^grad_norm became"):
        check_finite({"accuracy": 0.5, "grad_norm": math.inf}, 101, 200)


def test_parameters_without_a_constraint_get_the_gradient_of_the_mean():
    made = run(total_steps=1)
    np.testing.assert_allclose(jax.device_get(made.state.params["number"]), 0.2 * 6, rtol=1e-6)
