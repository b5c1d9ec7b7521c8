"""Training in memory: when it validates and ends, what it keeps, and how its learning rate follows its time."""

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
    """The mean of examples by gradient descent, validated by its distance from 3 or by given losses."""

    def loss(model, batch, keys):
        value = jnp.mean((model.number - batch) ** 2)
        return Loss(value, {"loss": value})

    losses = iter([]) if held_out is None else iter(held_out)

    def validate(state):
        return ValidationResult({"loss": next(losses, float(abs(state.ema["number"] - 3)))})

    rule = UpdateRule(optax.sgd(1.0), optax.linear_schedule(0.2, 0.0, total_steps), total_steps, ema_decay=0.0)
    return Objective(
        name="loss",
        training_step=TrainingStep(Constant(), loss, lambda params, spectral: ConstrainedFlow({}, spectral, {}), rule),
        make_validation=lambda: validate,
        selection=lambda metrics: metrics["loss"],
        examples=np.zeros(8, np.float32),
        initial_variables=lambda: {"params": {"number": jnp.zeros(())}},
        seed=0,
    )


def run(held_out=None, after_step=lambda made: False, batch=3.0, options=None, **settings):
    """A run that has ended, by itself or as ``after_step`` says so."""
    settings = TrainingConfig(**{"total_steps": 12, "eval_every_steps": 3, "log_every_steps": 2, **settings})
    made = Trainer(objective_of(settings.schedule_steps, held_out), settings, **(options or {}))
    for _ in made.steps(itertools.repeat(parallel.shard(np.full(8, batch, np.float32)))):
        if after_step(made):
            break
    return made


def steps(made, split):
    return [record["step"] for record in made.records if record["split"] == split]


def test_it_logs_validates_and_tells_what_it_does():
    said, logged, losses = [], [], []
    made = run(options={"say": said.append, "validated": losses.append, "log": lambda split, metrics: logged.append(split)})
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
        [r["loss"] for r in run(log_every_steps=n, eval_every_steps=12).records if r["split"] == "train"] for n in (1, 2)
    )
    np.testing.assert_allclose(np.reshape(every, (6, 2)).mean(axis=1), second, rtol=1e-6)


def test_patience_ends_training():
    made = run([3.0, 1.0, 2.0, 4.0, 5.0], total_steps=100, patience=2)
    assert steps(made, "validation") == [3, 6, 9, 12]


def test_a_time_limit_ends_training_at_a_learning_rate_of_nearly_zero(monkeypatch):
    """By a clock of a tenth of a second a reading."""
    clock = itertools.count(0, 0.1)
    monkeypatch.setattr(trainer.time, "monotonic", lambda: next(clock))
    made = run(minutes=5.0, total_steps=0, eval_every_steps=100_000)
    assert 250 < made.elapsed_s < 320
    assert made.step == int(made.state.horizon) < 1000
    rates = [record["learning_rate"] for record in made.records if record["split"] == "train"]
    assert rates[-1] < 0.05 * max(rates)
    assert 15 <= len(steps(made, "validation")) <= 25


@pytest.mark.parametrize("settings", [{"minutes": 5.0}, {}])
def test_the_time_of_steps_can_be_limited(monkeypatch, settings):
    clock = itertools.count(0, 0.1)
    monkeypatch.setattr(trainer.time, "monotonic", lambda: next(clock))
    made = run(options={"seconds_of_steps": 60.0}, total_steps=1000, eval_every_steps=100_000, **settings)
    assert 50 < made.elapsed_s < 75
    assert made.step == int(made.state.horizon) < 300
    rates = [record["learning_rate"] for record in made.records if record["split"] == "train"]
    assert rates[-1] < 0.05 * max(rates)


def test_a_pause_at_its_start_leaves_a_run_alone_that_has_time_for_all_its_steps(monkeypatch):
    now = 0.0
    monkeypatch.setattr(trainer.time, "monotonic", lambda: now)

    def pause(made):
        nonlocal now
        now += 1.5 if len(paused) < 3 else 0.01
        paused.append(now)

    rates = []
    for within in (60.0, math.inf):
        paused = []
        made = run(after_step=pause, options={"seconds_of_steps": within}, total_steps=60, log_every_steps=1)
        rates.append([record["learning_rate"] for record in made.records if record["split"] == "train"])
    assert rates[0] == rates[1]
    assert len(rates[0]) == 60


def test_a_run_that_goes_on_shortly_before_its_end_keeps_its_length(monkeypatch):
    """Its steps so far took nearly all of the time: the length that was estimated then stands, and is estimated anew soon."""
    now = 0.0
    monkeypatch.setattr(trainer.time, "monotonic", lambda: now)
    state = objective_of(1000).initial_state()._replace(step=jnp.int32(190), horizon=np.int32(200))
    horizons = []

    def after_step(made):
        nonlocal now
        now += 0.3
        horizons.append(made.horizon)

    settings = {"minutes": 100 / 60, "total_steps": 1000, "log_every_steps": 1, "eval_every_steps": 100_000}
    made = run(after_step=after_step, options={"state": state, "seconds_before": 90.0}, **settings)
    assert max(horizons) < 240
    assert made.step == made.horizon < 240


@pytest.mark.parametrize("total_steps", [0, 1000])
def test_several_processes_validate_and_end_by_the_estimate_that_they_agree_on(monkeypatch, total_steps):
    monkeypatch.setattr(parallel, "num_processes", lambda: 2)
    made = run(options={"agree": lambda horizon: 40}, minutes=60.0, total_steps=total_steps, eval_every_steps=100_000)
    assert made.step == int(made.state.horizon) == 40
    assert steps(made, "validation") == [*range(3, 40, 3), 40]


def test_what_is_not_finite_ends_training():
    with pytest.raises(RuntimeError, match="grad_norm, loss became non-finite between steps 0 and 1") as raised:
        run(batch=np.nan)
    assert "workdir" not in str(raised.value)  # there is none
    check_finite({"loss": 1.0, "grad_norm": np.float32(2.0)}, 1, 100)
    with pytest.raises(RuntimeError, match=r"^grad_norm became"):
        check_finite({"accuracy": 0.5, "grad_norm": math.inf}, 101, 200)


def test_parameters_without_a_constraint_get_the_gradient_of_the_mean():
    made = run(total_steps=1)
    np.testing.assert_allclose(jax.device_get(made.state.params["number"]), 0.2 * 6, rtol=1e-6)


def test_no_more_than_two_steps_are_queued_behind_the_one_that_runs(monkeypatch):
    """Signals and time limits are of steps that are done."""
    awaited, whole = [], jax.block_until_ready
    monkeypatch.setattr(jax, "block_until_ready", lambda tree: awaited.append(tree) or whole(tree))
    metrics = []

    def watched(training_step):
        step = parallel.parallelize(training_step)

        def take(state, batch):
            state, own = step(state, batch)
            metrics.append(own)
            return state, own

        return take

    run(options={"compile_step": watched}, total_steps=12, log_every_steps=12, eval_every_steps=12)
    for step in range(12 - trainer.AHEAD):
        assert any(tree and tree[0] is metrics[step] for tree in awaited if isinstance(tree, list))
