"""When a training logs, validates and ends, what it keeps, and its learning rate in time."""

import contextlib
import itertools
import math
import signal
import sys

import numpy as np
import pytest
from one_number import EVERY, NUM_STEPS, At, steps, trained, without_blocks  # noqa: F401 (a fixture)

from iresnet_jax.models.model import STOPPED
from iresnet_jax.training import callbacks, parallel
from iresnet_jax.training.callbacks import Callback, Progress, Validate
from iresnet_jax.training.run import check_finite


def test_it_logs_validates_and_tells_what_it_does():
    said = []
    model, run = trained(Progress(said.append))
    assert steps(run, "train") == [2, 3, 4, 6, 8, 9, 10, 12]
    assert steps(run, "validation") == [3, 6, 9, 12]
    assert run.step == int(run.state.step) == model.history.num_steps == NUM_STEPS
    assert model.history.validation["loss"] == run.losses
    assert run.losses[-1] < run.losses[0] < 3
    assert abs(float(model.number) - 3) == model.history.loss == run.losses[-1]
    assert len(said) == 5
    assert "first step after" in said[0]
    assert "step 12 of 12: validation loss" in said[-1]


def test_metrics_are_means_over_the_steps_since_the_last_line():
    every, second = (trained(log_every=n, every=12)[0].history.train["loss"] for n in (1, 2))
    np.testing.assert_allclose(np.reshape(every, (6, 2)).mean(axis=1), second, rtol=1e-6)


def test_patience_ends_training_and_the_best_model_is_kept():
    model, run = trained(held_out=[3.0, 1.0, 2.0, 4.0, 5.0], steps=100, patience=2)
    assert steps(run, "validation") == [3, 6, 9, 12]
    assert (model.history.step, model.history.loss) == (6, 1.0)
    assert model.history.ended == "validation no longer improved"
    assert model.number != float(run.state.ema["number"])


def test_what_is_not_finite_ends_training():
    with pytest.raises(
        RuntimeError, match=r"loss.* became non-finite between steps 0 and 1: train again"
    ):
        trained(batch=1e30)
    with pytest.raises(RuntimeError, match=r"^grad_norm became"):
        check_finite({"accuracy": 0.5, "grad_norm": math.inf}, 101, 200)


def blow_up(run):
    run.state = run.state._replace(params={"number": run.state.params["number"] * np.nan})


def test_a_training_that_blows_up_gives_its_best_model_with_a_warning():
    with pytest.warns(UserWarning, match=r"non-finite.*The model is the best one"):
        model, run = trained(At(7, blow_up))
    assert (model.history.step, run.step) == (6, 8)
    assert model.history.ended.startswith("blow-up: ")
    assert math.isfinite(model.number)
    with pytest.raises(RuntimeError, match="non-finite"):  # before there is a best one
        trained(At(1, blow_up))
    with pytest.raises(RuntimeError, match="non-finite"):  # that of the start is none
        trained(Validate(at_start=True), At(1, blow_up))


def test_steps_that_blew_up_after_the_last_line_of_the_log_are_noticed():
    ends = At(5, lambda run: run.end("enough"))
    with pytest.raises(RuntimeError, match="non-finite between steps 4 and 5"):
        trained(At(4, blow_up), ends, every=100, log_every=4)


def test_ctrl_c_ends_a_training_where_somebody_sits(monkeypatch):
    interrupts = At(4, lambda run: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        trained(interrupts)
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    model, run = trained(interrupts)
    assert (run.step, model.history.step) == (4, 3)
    assert model.history.ended == STOPPED


def test_callbacks_act_in_their_order_and_surround_each_other_in_the_opposite_one():
    done: list[tuple[object, int]] = []

    class Watches(Callback):
        def __init__(self, order):
            self.order = order

        @contextlib.contextmanager
        def during(self, run):
            done.append(("begins", self.order))
            try:
                yield
            finally:
                done.append(("ends", self.order))

        def after_step(self, run):
            done.append((run.is_validated, self.order))

    trained(Watches(60), Watches(15), Watches(25), steps=3)
    assert done[:3] == [("begins", 60), ("begins", 25), ("begins", 15)]
    assert done[-6:-3] == [(False, 15), (True, 25), (True, 60)]  # `Validate` has order 20
    assert done[-3:] == [("ends", 15), ("ends", 25), ("ends", 60)]


def test_a_start_is_kept_until_a_model_is_clearly_better():
    def best_step(*losses, clear=0.0):
        held_out = [np.float64(each) for each in losses]
        model, _ = trained(Validate(at_start=True, clear=clear), held_out=held_out, steps=9)
        return model.history.step

    noisy, by_more = [0.9, 2.9, 0.4], [1.5, 2.5, 0.5]
    assert best_step([2, 3, 1], [3, 4, 2], noisy, noisy) == 6
    assert best_step([2, 3, 1], [3, 4, 2], noisy, by_more, clear=3.0) == 9
    assert best_step([1, 1, 1], [3, 4, 2], [3, 4, 2], [3, 4, 2]) == 0
    start, better, noisy = np.ones(4), np.full(4, 0.5), np.float64([9, -7, 9, -8])
    assert callbacks.is_clearly_better(better, start)
    assert not callbacks.is_clearly_better(noisy, start)
    assert callbacks.is_clearly_better(None, start)  # single losses are not known
    assert not callbacks.is_clearly_better(better[:1], start[:1])  # one tells nothing


@pytest.fixture
def clock(monkeypatch):
    """Has every reading of the clock take a tenth of a second."""
    readings = itertools.count(0, 0.1)
    monkeypatch.setattr(callbacks.time, "monotonic", lambda: next(readings))


TIME_LIMITS = {
    "minutes": lambda: {"minutes": 1.0, "steps": None},
    "an estimate that several processes agree on": lambda: {"minutes": 1.0, "agree": 2},
}


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize("settings", TIME_LIMITS.values(), ids=TIME_LIMITS)
def test_a_time_limit_ends_training_at_a_learning_rate_of_nearly_zero(settings, monkeypatch):
    settings = {"steps": 5000, "every": 100_000, **settings()}
    if multiple := settings.pop("agree", 0):
        agreed = lambda produce: produce() // multiple * multiple  # noqa: E731
        monkeypatch.setattr(parallel, "from_first", agreed)
    model, run = trained(**settings)
    assert 50 < run.clock.elapsed_s < 63
    assert run.step == run.horizon == int(run.state.horizon) < 5000
    assert model.history.ended == "time was over"
    rates = model.history.train["learning_rate"]
    assert rates[-1] < 0.05 * max(rates)
    assert 15 <= len(steps(run, "validation")) <= 25


def test_a_function_is_called_at_every_validation_with_the_averaged_model_and_ends_training():
    seen = []

    def called(step, model, metrics):
        seen.append((step, abs(float(model.number) - 3), metrics["validation_loss"]))
        return step == 2 * EVERY

    model, run = trained(callback=called)
    assert [step for step, *_ in seen] == [EVERY, 2 * EVERY]
    for _, distance, measured in seen:
        assert distance == measured
    assert (run.step, model.history.ended) == (2 * EVERY, "the callback ended it")
