"""`fit`: what it chooses, what it refuses, and that it is the code of ``train.py``."""

import dataclasses
import functools
import json
import math
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest

import iresnet_jax as ir
from iresnet_jax import fitting
from iresnet_jax.__main__ import main
from iresnet_jax.data.arrays import FITTED_ARRAY, Arrays, from_arrays
from iresnet_jax.fit_arguments import seed_of
from iresnet_jax.fit_settings import candidates, choose_settings, plain_candidate
from iresnet_jax.models.history import Attempt, History
from iresnet_jax.runs import run_folder
from iresnet_jax.runs.loop import train
from iresnet_jax.runs.signals import Stopped
from iresnet_jax.training.trainer import BlowUpError, check_finite

RNG = np.random.default_rng(0)
TINY = (ir.StageSpec(num_blocks=1, hidden=(8,)),)
QUICK = {"steps": 12, "architecture": TINY, "progress": False}
BANANA = RNG.normal(size=(400, 2)).astype(np.float32)
BANANA[:, 1] += BANANA[:, 0] ** 2


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """A model of an array, and the folder of its run."""
    folder = tmp_path_factory.mktemp("fit") / "run"
    return ir.fit(BANANA, key=jax.random.key(0), workdir=folder, **QUICK), folder


@pytest.fixture
def raced(fitted, monkeypatch):
    """``(outcomes, minutes) ->`` candidates and lengths of the runs of a race, and its history.

    Outcomes are the loss and best step of the run of a candidate and length, the seconds that it takes and, if it ends early,
    its steps; a loss that is NaN is a blow-up.
    """

    def race(outcomes, minutes=3.0, interrupted=None, **options):
        runs, clock = [], [0.0]
        limits.clear()
        firsts.clear()

        def fit_in_memory(config, data, say, stop, what, most, is_given_up):
            steps, noise = config.training.total_steps or 10**6, config.augmentation.noise
            run = (config.model.prior, config.model.stages[0].num_blocks, round(noise, 2), min(steps, 10**6))
            runs.append(run)
            loss, best_step, seconds, *ended = outcomes.get(run, (9.0, steps, 1.0))
            steps = ended[0] if ended else steps
            clock[0] += seconds
            limits.append(config.training.minutes)
            firsts.append(most)
            check_finite({"nll": loss}, 0, steps, "rest")
            if run == interrupted:
                signal.raise_signal(signal.SIGINT)
            model = fitted[0].with_(history=History({}, {}, step=best_step))
            return fitting.Outcome(Attempt(what, loss, best_step, steps, seconds), lambda: model)

        monkeypatch.setattr(fitting, "_fit_in_memory", fit_in_memory)
        monkeypatch.setattr(fitting.time, "monotonic", lambda: clock[0])
        return runs, ir.fit(MODES, minutes=minutes, progress=False, **options).history

    limits: list[float] = []
    firsts: list[float] = []
    race.limits, race.firsts = limits, firsts
    return race


MODES = (RNG.normal(size=(300, 2)) + 8 * RNG.integers(0, 2, (300, 1))).astype(np.float32)
MIXTURE, GAUSSIAN = ("mixture", 10, 0.0, 1000), ("gaussian", 10, 0.0, 1000)


def test_a_run_that_still_improves_is_followed_by_longer_ones_until_time_is_over(raced):
    longer, last = ("gaussian", 10, 0.0, 4000), ("gaussian", 10, 0.0, 10**6)
    runs, history = raced({GAUSSIAN: (5.0, 1000, 5.0), longer: (4.0, 3950, 20.0), last: (3.0, 30_000, 150.0)})
    assert runs == [MIXTURE, GAUSSIAN, longer, last]
    np.testing.assert_allclose(raced.firsts, [18.0, 18.0, math.inf, math.inf])  # a tenth of three minutes
    assert [attempt.loss for attempt in history.attempts] == [9.0, 5.0, 4.0, 3.0]
    assert history.step == 30_000
    assert "time was over" in str(history)
    runs, history = raced({GAUSSIAN: (5.0, 1000, 5.0), longer: (4.0, 3950, 20.0), last: (6.0, 900, 9.0)})
    assert runs == [MIXTURE, GAUSSIAN, longer, last]  # once
    assert "no longer improved" in history.ended


def test_where_first_runs_are_cut_short_the_plain_candidate_learns_for_the_rest_of_the_time(raced):
    last = ("gaussian", 10, 0.0, 10**6)
    runs, history = raced({MIXTURE: (2.0, 0, 18.0, 80), GAUSSIAN: (5.0, 80, 18.0, 80), last: (1.0, 700, 140.0, 700)})
    assert runs == [MIXTURE, GAUSSIAN, last]
    assert (history.step, history.ended) == (700, "time was over")
    patient = (2.0, 0, 5.0, 300)  # ended by itself
    assert raced({MIXTURE: patient, GAUSSIAN: (5.0, 1000, 5.0)})[0][2] != last


def test_a_limit_of_time_is_no_aim(raced):
    runs, history = raced({GAUSSIAN: (5.0, 700, 4.0)})
    assert runs == [MIXTURE, GAUSSIAN]
    assert "no longer improved" in history.ended


def test_first_runs_are_trained_at_once_on_as_many_cores_and_say_whose_lines_are_whose(fitted, monkeypatch, capfd):
    at_once, gaussian_ended = threading.Barrier(2), threading.Event()

    def fit_in_memory(config, data, say, stop, what, most, is_given_up):
        at_once.wait(20)
        say("step 1")
        if config.model.prior == "gaussian":
            gaussian_ended.set()
        else:
            assert gaussian_ended.wait(20)
        return fitting.Outcome(Attempt(what, 1.0, 700, 1000, 1.0), lambda: fitted[0])

    monkeypatch.setattr(fitting, "_fit_in_memory", fit_in_memory)
    monkeypatch.setattr(fitting, "num_cores", lambda: 2)
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    attempts = ir.fit(MODES).history.attempts
    assert [attempt.what.split()[2] for attempt in attempts] == ["2", "gaussian"]  # in the order of the candidates
    said = capfd.readouterr().err
    assert all(f"{attempt.what}: step 1\n" in said for attempt in attempts)


@pytest.mark.parametrize("is_ahead", [True, False])
def test_a_core_that_is_left_starts_on_what_follows_if_that_run_leads(fitted, monkeypatch, capfd, is_ahead):
    """The run with noise starts before the one of the mixture has ended, and counts only if it would have been the next."""
    noise_started, given_up, runs = threading.Event(), threading.Event(), []

    def fit_in_memory(config, data, say, stop, what, most, is_given_up):
        runs.append(what.split(", ", 1)[1])
        if config.model.prior == "mixture":
            assert noise_started.wait(20)
            loss, best_step = 1.0, 700
        elif "noise" in what:
            noise_started.set()
            while not is_ahead and not is_given_up():
                time.sleep(0.01)
            if not is_ahead:
                given_up.set()
            loss, best_step = -1.0, 700
        else:
            loss, best_step = 0.0 if is_ahead else 2.0, 50
        return fitting.Outcome(Attempt(what, loss, best_step, 1000, 1.0), lambda: fitted[0])

    monkeypatch.setattr(fitting, "_fit_in_memory", fit_in_memory)
    monkeypatch.setattr(fitting, "num_cores", lambda: 2)
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    attempts = ir.fit(MODES).history.attempts
    mixture, gaussian, noise = "2 normal distributions as prior", "gaussian prior", "gaussian prior, noise of 0.1"
    assert sorted(runs) == [mixture, gaussian, noise]
    assert [attempt.what.split(", ", 1)[1] for attempt in attempts] == [mixture, gaussian] + [noise] * is_ahead
    assert given_up.is_set() != is_ahead
    assert ("noise of 0.1: ended, as it is not the next run" in capfd.readouterr().err) != is_ahead


def test_no_core_starts_on_another_run_after_a_signal(fitted, monkeypatch):
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    gaussian_ended, runs = threading.Event(), []

    def fit_in_memory(config, data, say, stop, what, most, is_given_up):
        runs.append(what)
        if config.model.prior == "gaussian":
            os.kill(os.getpid(), signal.SIGINT)
            while stop.received is None:
                time.sleep(0.01)
            gaussian_ended.set()
        else:
            assert gaussian_ended.wait(20)
            time.sleep(0.3)  # the other one is seen to have ended first
        return fitting.Outcome(Attempt(what, 1.0, 50, 1000, 1.0), lambda: fitted[0])

    monkeypatch.setattr(fitting, "_fit_in_memory", fit_in_memory)
    monkeypatch.setattr(fitting, "num_cores", lambda: 2)
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert ir.fit(MODES, progress=False).history.ended == "it was stopped"
    assert len(runs) == 2


def test_no_run_starts_after_an_error_in_one_that_is_trained_beside_others(monkeypatch):
    """Of three candidates on two cores, the third waits for a core."""
    at_once, started = threading.Barrier(2), []
    data = from_arrays("a", Arrays(MODES), fractions=(0.1, 0.0))

    def fit_in_memory(config, data, say, stop, what, most, is_given_up):
        started.append(what)
        at_once.wait(20)
        if len(started) == 2 and what == started[0]:
            raise ValueError("wrong in some way")
        while not is_given_up():
            time.sleep(0.01)
        raise BlowUpError

    monkeypatch.setattr(fitting, "_fit_in_memory", fit_in_memory)
    found = [plain_candidate(choose_settings(data), data)]
    found += [dataclasses.replace(found[0], size=size) for size in ("small", "large")]
    monkeypatch.setattr(fitting, "candidates", lambda *_: found)
    monkeypatch.setattr(fitting, "num_cores", lambda: 2)
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="wrong in some way"):
        ir.fit(MODES, progress=False)
    assert len(started) == 2


def test_an_interrupt_of_a_script_ends_all_runs_that_are_trained_at_once(monkeypatch):
    monkeypatch.delattr(sys, "ps1", raising=False)
    at_once, all_ended = threading.Barrier(2, lambda: os.kill(os.getpid(), signal.SIGINT)), threading.Barrier(3)

    def fit_in_memory(config, data, say, stop, what, most, is_given_up):
        at_once.wait(20)
        while not is_given_up():
            time.sleep(0.01)
        all_ended.wait(20)
        raise BlowUpError

    monkeypatch.setattr(fitting, "_fit_in_memory", fit_in_memory)
    monkeypatch.setattr(fitting, "num_cores", lambda: 2)
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    waiting = threading.Thread(target=all_ended.wait, args=(20,))
    waiting.start()
    with pytest.raises(KeyboardInterrupt):
        ir.fit(MODES, progress=False)
    waiting.join()
    assert not all_ended.broken


def test_a_limit_of_time_is_one_of_all_runs_however_it_is_given(raced):
    runs, history = raced({GAUSSIAN: (5.0, 1000, 80.0)}, settings={"training.minutes": 2.0})
    assert runs == [MIXTURE, GAUSSIAN]
    np.testing.assert_allclose(raced.limits, [2.0, 119 / 60])
    assert "too little time" in history.ended
    runs, _ = raced({GAUSSIAN: (5.0, 500, 1e5)}, minutes=None, settings={"training.minutes": 0.0})
    assert raced.limits == [0.0, 0.0]
    assert raced.firsts == [math.inf, math.inf]


def test_a_candidate_that_blows_up_leaves_the_models_of_others(raced):
    longer = ("gaussian", 10, 0.0, 4000)
    runs, history = raced({MIXTURE: (math.nan, 0, 1.0), GAUSSIAN: (5.0, 1000, 5.0), longer: (math.nan, 0, 20.0)})
    assert runs == [MIXTURE, GAUSSIAN, longer]
    assert [attempt.loss for attempt in history.attempts] == [5.0]
    with pytest.raises(RuntimeError, match="nll became non-finite"):
        raced({MIXTURE: (math.nan, 0, 1.0), GAUSSIAN: (math.nan, 0, 1.0)})


def test_an_interrupt_between_two_runs_keeps_the_models_of_both(raced, monkeypatch):
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    runs, history = raced({GAUSSIAN: (5.0, 1000, 5.0)}, interrupted=GAUSSIAN)
    assert runs == [MIXTURE, GAUSSIAN]
    assert len(history.attempts) == 2
    assert "stopped" in history.ended


def test_what_overfits_is_tried_with_noise(raced):
    noisy, noisier = (("mixture", 10, noise, 1000) for noise in (0.1, 0.3))
    runs, history = raced({MIXTURE: (5.0, 50, 1.0), noisy: (4.0, 100, 1.0), noisier: (3.0, 400, 1.0)})
    assert runs == [MIXTURE, GAUSSIAN, noisy, noisier]
    assert history.step == 400


def test_what_overfits_and_may_not_have_noise_is_tried_smaller(raced):
    first, small = ("mixture", 10, 0.2, 1000), ("mixture", 4, 0.2, 1000)
    runs, history = raced({first: (5.0, 50, 1.0), small: (3.0, 400, 1.0)}, settings={"augmentation.noise": 0.2})
    assert runs == [first, ("gaussian", 10, 0.2, 1000), small]
    assert history.step == 400


def test_the_network_grows_with_the_examples():
    def size(num, **arrays):
        data = from_arrays("a", Arrays(RNG.normal(size=(num, 2)), **arrays), fractions=(0.1, 0.0))
        return plain_candidate(choose_settings(data), data).size

    assert [size(num) for num in (16, 20, 10_000, 12_000)] == ["small", "medium", "medium", "large"]
    assert size(200, context=RNG.normal(size=(200, 1))) == "large"


def test_a_conditional_density_trains_twice_as_long_and_against_overfitting_with_weight_decay():
    data = from_arrays("a", Arrays(MODES, context=MODES[:, :1] ** 2), fractions=(0.1, 0.0))
    first, _ = candidates(choose_settings(data), data)
    assert first.longer == 2
    assert first.settings["model.context_hidden"]
    decays = [float(str(first).split()[-1])]
    while (milder := next(first.milder())).size == "large":
        first = milder
        decays.append(first.settings["optimizer.weight_decay"])
    assert sorted(set(decays)) == decays
    assert len(decays) == 3
    assert milder.settings["model.context_hidden"]
    [given] = candidates(choose_settings(data), data, {"optimizer.weight_decay": 0.2})
    assert given.settings["model.context_hidden"]
    assert [candidate.size for candidate in (given, *given.milder())] == ["large", "small"]
    assert "optimizer.weight_decay" not in given.settings


def test_a_density_with_modes_is_at_least_as_good_as_a_mixture_without_any_time_to_train():
    """Both modes and nothing between them: the truth is a mixture."""
    model = ir.fit(MODES, minutes=1e-3, architecture=TINY, progress=False)
    test = (RNG.normal(size=(2000, 2)) + 8 * RNG.integers(0, 2, (2000, 1))).astype(np.float32)
    entropy = 2 * 0.5 * np.log(2 * np.pi * np.e) + np.log(2)
    assert float(model.log_prob(test).mean()) > -entropy - 0.15
    samples, _ = model.sample(jax.random.key(0), 2000)
    assert np.mean((samples.mean(axis=1) > 3) & (samples.mean(axis=1) < 5)) < 0.01


def test_noise_widens_the_density_by_its_variance():
    """A linear flow of 40 examples, and noise as large as they are: without it, their own variance would be found."""
    x = RNG.normal(size=(40, 2)) * [1.0, 100.0]
    held_out = np.repeat(x, 25, axis=0) + x.std(axis=0) * RNG.normal(size=(1000, 2))
    settings = {"optimizer.learning_rate": 0.05, "training.ema_decay": 0.9, "model.prior": "gaussian", "model.last_scale": 0.1}
    settings |= {"augmentation.noise": 1.0, "training.patience": 0}
    linear = (ir.StageSpec(num_blocks=1, hidden=(4,), activation="identity"),)
    model = ir.fit(x, settings=settings, steps=300, architecture=linear, validation=held_out, progress=False)
    grid = np.linspace(-6, 6, 241)
    for entry, scale in enumerate(x.std(axis=0)):
        points = np.repeat(x.mean(axis=0)[None], len(grid), axis=0)
        points[:, entry] += scale * grid
        density = np.exp(np.asarray(model.log_prob(points.astype(np.float32)), np.float64))
        np.testing.assert_allclose(np.sum(density * grid**2) / np.sum(density), 2, rtol=0.15)


def test_training_is_better_than_the_normal_density_that_it_starts_from(fitted):
    losses = fitted[0].history.validation["nll"]
    assert losses[-1] < losses[0] - 0.01
    assert "this model" in str(fitted[0].history)


def test_it_is_the_code_of_training(fitted, tmp_path):
    """The config in the folder of a fit, given to `train` with the same data, makes the same model bit for bit."""
    model, folder = fitted
    config = run_folder.read_config(folder)
    data = from_arrays(FITTED_ARRAY, Arrays(BANANA), fractions=(0.1, 0.0))
    state = train(config, tmp_path / "run", data=data)
    assert int(state.step) == int(state.horizon) == 12
    again = ir.fit(BANANA, key=jax.random.key(0), workdir=tmp_path / "run", **QUICK)  # nothing is left to do
    for ours, theirs in zip(jax.tree.leaves(again), jax.tree.leaves(model), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_another_call_in_the_same_folder_is_refused(fitted):
    with pytest.raises(ValueError, match="other data"):
        ir.fit(BANANA + 1, key=jax.random.key(0), workdir=fitted[1], **QUICK)
    for length in ({"steps": 60}, {"steps": None, "minutes": 2}):
        with pytest.raises(ValueError, match=r"holds a fit with steps=12, got (steps=60|minutes=2)"):
            ir.fit(BANANA, key=jax.random.key(0), workdir=fitted[1], **QUICK | length)
    with pytest.raises(ValueError, match="other bounds"):
        ir.fit(BANANA, key=jax.random.key(0), workdir=fitted[1], bounds={0: (-99, 99)}, **QUICK)


@pytest.fixture
def workdir(fitted, tmp_path):
    """A copy of the folder of a fit: commands write into it."""
    return str(shutil.copytree(fitted[1], tmp_path / "run"))


def test_commands_that_need_no_data_work_on_the_folder_of_a_fit(workdir, capsys):
    assert run_folder.read_config(Path(workdir)).data.name == FITTED_ARRAY
    for command in (["sample", "--num", "4"], ["certify"], ["freeze"]):
        assert main([command[0], "--workdir", workdir, *command[1:]]) == 0, capsys.readouterr().err
    assert np.load(Path(workdir) / "samples.npy").shape == (4, 2)


@pytest.mark.parametrize("command", ["evaluate", "reconstruct", "report"])
def test_commands_that_need_data_say_how_to_give_the_array(command, workdir, capsys):
    assert main([command, "--workdir", workdir]) == 2
    assert capsys.readouterr().err == (
        f"error: {workdir} does not hold the array that its model was fitted to: save the array with numpy.save and add "
        "--data npy:FILE\n"
    )


def test_an_array_in_a_file_is_recognised(workdir, tmp_path, capsys):
    np.save(tmp_path / "same.npy", BANANA)
    np.save(tmp_path / "other.npy", BANANA + 1)
    np.save(tmp_path / "wide.npy", RNG.normal(size=(400, 3)))

    def evaluate(name, status=0):
        assert main(["evaluate", "--workdir", workdir, "--data", f"npy:{tmp_path / name}"]) == status
        out, err = capsys.readouterr()
        return out if status == 0 else err

    same = evaluate("same.npy")
    assert "are among those that validated: the checkpoint was chosen on them." in same
    assert "other data" not in same
    assert " nats (" in same
    assert evaluate("other.npy").startswith("These are other data than the model was trained on")
    assert "the model takes examples of shape (2,)" in evaluate("wide.npy", status=2)


@pytest.mark.parametrize("somebody_sits_there", [True, False])
def test_an_interrupt_gives_the_best_model_so_far_in_a_notebook_and_ends_a_script(somebody_sits_there, capfd, monkeypatch):
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    if not somebody_sits_there:
        monkeypatch.delattr(sys, "ps1")
    stop = threading.Event()

    def interrupt(line):
        if "validation" in line and not stop.is_set():
            stop.set()
            signal.raise_signal(signal.SIGINT)

    class Interrupting(fitting.Lines):
        def __call__(self, line):
            super().__call__(line)
            interrupt(line)

    monkeypatch.setattr(fitting, "Lines", Interrupting)
    options = QUICK | {"steps": 10_000, "progress": True, "settings": {"training.eval_every_steps": 4}}
    if not somebody_sits_there:
        with pytest.raises(KeyboardInterrupt):
            ir.fit(BANANA, **options)
        return
    model = ir.fit(BANANA, **options)
    assert model.certificate().certified
    said = capfd.readouterr().err
    assert "the best model so far" in said
    assert "of 10000" in said
    assert "saving" not in said  # nothing is


def test_a_signal_ends_a_fit_on_disk_and_its_process(fitted, monkeypatch):
    received = []

    def stopped_by(number):
        def train(*_, **__):
            raise Stopped("stopped: the same command goes on from it", number)

        return train

    monkeypatch.delattr(sys, "ps1", raising=False)
    before = signal.signal(signal.SIGTERM, lambda number, _: received.append(number))
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            monkeypatch.setattr(fitting, "train", stopped_by(number))
            with pytest.raises(Stopped):
                ir.fit(BANANA, workdir=fitted[1], **QUICK)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert received == [signal.SIGTERM]


@functools.cache
def conditional(scale, num=400):
    """A model of an entry within bounds, a free one and one on a grid, its data and their contexts."""
    rng = np.random.default_rng(round(scale))
    context = rng.normal(size=(num, 1)).astype(np.float32)
    x = np.clip(context + 0.1 * rng.normal(size=(num, 3)), -3.9, 3.9)
    x[:, 2] = np.round(x[:, 2] * 16) / 16
    x = (scale * x).astype(np.float32)
    options = QUICK | {"steps": 60, "key": jax.random.key(round(scale)), "bounds": {0: (-4 * scale, 4 * scale)}}
    return ir.fit(x, context=scale * context, **options), x, scale * context


def test_a_context_makes_a_conditional_density_which_keeps_to_bounds():
    model, x, context = conditional(1.0)
    assert model.spec.context_hidden
    assert model.spec.grid is not None
    log_prob = jax.jit(ir.Density.log_prob)
    given = log_prob(model, x[:50], context=context[:50])
    wrong = log_prob(model, x[:50], context=-context[:50])
    assert given.mean() > wrong.mean()
    widest, _ = jax.jit(ir.Density.sample, static_argnums=2)(model, jax.random.key(0), 200, context=np.full((200, 1), 5.0))
    assert np.abs(widest[:, 0]).max() <= 4 < np.abs(widest[:, 1]).max()
    with pytest.raises(ValueError, match="context"):
        model.log_prob(x[:5])


def test_labels_make_a_classifier_of_images_and_integers_are_levels(monkeypatch):
    labels = np.arange(80) % 2
    images = (RNG.integers(0, 4, (80, 4, 4, 1)) + 8 * labels[:, None, None, None]).astype(np.uint8)
    stage = (ir.StageSpec(num_blocks=1, hidden=(2,), kernel_sizes=(3, 1), squeeze=2),)
    small = QUICK | {"architecture": stage}
    classifier = ir.fit(images, labels, **small)
    assert isinstance(classifier, ir.Classifier)
    assert classifier.spec.num_levels == 12
    chosen = []

    def fit_in_memory(config, *_, **__):
        chosen.append(config.objective)
        return fitting.Outcome(Attempt("", 0.0, 0, 0, 0.0), lambda: classifier)

    monkeypatch.setattr(fitting, "_fit_in_memory", fit_in_memory)
    ir.fit(images, labels, objective="hybrid", **small)
    assert chosen == ["hybrid"]


def test_settings_follow_the_array():
    def data(x):
        return from_arrays("a", Arrays(x), fractions=(0.1, 0.0))

    few, many, wide = (data(RNG.normal(size=shape)) for shape in ((50, 4), (5000, 4), (400, 300)))
    assert choose_settings(few).training.minutes == 3.0
    assert choose_settings(few, steps=1_000_000).training.total_steps == 1_000_000
    assert [choose_settings(x).preprocessing.transform for x in (few, many, wide)] == ["standardize", "whiten", "standardize"]
    assert [choose_settings(x).logdet.kind for x in (few, many, wide)] == ["exact", "exact", "krylov"]
    images = choose_settings(data(RNG.integers(0, 256, (50, 16, 16, 3))))
    assert [stage.squeeze for stage in images.model.stages] == [2, 2]
    assert images.training.batch_size <= 45


def test_candidates_follow_the_array():
    rng = np.random.default_rng(0)

    def priors_of(x, **given):
        data = from_arrays("a", Arrays(np.asarray(x, np.float32)), fractions=(0.1, 0.0))
        found = candidates(choose_settings(data), data, given)
        return [(candidate.prior, candidate.components) for candidate in found]

    assert priors_of(rng.normal(size=(500, 2))) == [("gaussian", 0)]
    assert priors_of(rng.normal(size=(40, 4))) == [("gaussian", 0)]
    assert priors_of(np.cumsum(rng.normal(size=(40, 4)), axis=1)) == [("mixture", 1), ("gaussian", 0)]  # of all correlations
    assert priors_of(MODES) == [("mixture", 2), ("gaussian", 0)]
    assert priors_of(rng.normal(size=(100, 70))) == [("gaussian", 0)]
    assert priors_of(rng.standard_t(2, size=(300, 70))) == [("logistic", 0)]
    assert priors_of(rng.normal(size=(300, 70)) * rng.lognormal(size=(300, 1))) == [("scales", 16), ("logistic", 0)]
    assert priors_of(MODES, **{"model.prior": "logistic"}) == [(None, 0)]
    data = from_arrays("a", Arrays(np.asarray(MODES, np.float32)), fractions=(0.1, 0.0))
    *_, given = candidates(choose_settings(data), data, ["augmentation.noise", "model.stages"])
    assert not {"augmentation.noise", "model.stages"} & given.settings.keys()
    assert [str(candidate) for candidate in given.milder()] == ["learning rate 0.003, gaussian prior"]


def test_a_key_is_a_seed():
    assert seed_of(None) == 0
    assert seed_of(jax.random.key(1)) == seed_of(jax.random.key(1)) != seed_of(jax.random.key(2))
    with pytest.raises(ValueError, match="key must be a key"):
        seed_of(3)
    with pytest.raises(ValueError, match="loop over them"):
        ir.fit(BANANA, key=jax.random.split(jax.random.key(0), 3))


def test_the_number_of_updates_and_the_data_are_no_settings():
    with pytest.raises(ValueError, match=r"give it as steps="):
        ir.fit(BANANA, settings={"training.total_steps": 500})
    with pytest.raises(ValueError, match=r"data.validation_fraction is no setting of fit"):
        ir.fit(BANANA, settings={"data.validation_fraction": 0.3})


def test_what_is_no_race_has_an_end(tmp_path):
    with pytest.raises(ValueError, match=r"give minutes=\.\.\. or steps="):
        ir.fit(BANANA, settings={"training.minutes": 0.0}, workdir=tmp_path)


def test_a_warm_up_among_the_settings_has_so_many_of_the_steps_that_time_allows():
    data = from_arrays("a", Arrays(BANANA), fractions=(0.1, 0.0))
    training, optimizer = (getattr(choose_settings(data, minutes=1.0), part) for part in ("training", "optimizer"))
    assert (training.total_steps, training.schedule_steps, optimizer.warmup_steps) == (0, 10_000, 500)
    assert choose_settings(data, steps=2000).optimizer.warmup_steps == 100


def test_a_seed_among_the_settings_decides_as_a_key_does():
    first, again, other = (ir.fit(BANANA, settings={"seed": seed}, **QUICK).log_prob(BANANA[:50]) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-2


def test_histories_do_not_make_programs_differ(fitted):
    model, _ = fitted
    traces = []

    @jax.jit
    def count(model):
        traces.append(1)
        return model.prior["mean"]

    count(model)
    count(model.with_(history=History({}, {}, 3)))
    assert len(traces) == 1
    assert json.loads(json.dumps(dict(model.history.validation)))["step"][-1] == 12


# --- which examples train and which validate ---

X = np.random.default_rng(0).normal(size=(96, 2)).astype(np.float32)


@pytest.fixture
def data_of(monkeypatch):
    """The data set that `fit` trains on."""

    class Seen(Exception):
        """Ends `fit` before it trains."""

    def stop(config, data, *_, **__):
        raise Seen(data)

    def fit(*arguments, **options):
        with pytest.raises(Seen) as seen:
            ir.fit(*arguments, steps=1, progress=False, **options)
        return seen.value.args[0]

    monkeypatch.setattr(fitting, "_fit_in_memory", stop)
    return fit


def test_given_validation_examples_validate_and_all_others_train(data_of):
    data = data_of(X[:64], validation=jax.numpy.asarray(X[64:]))
    np.testing.assert_array_equal(data.examples["train"], X[:64])
    np.testing.assert_array_equal(data.examples["validation"], X[64:])


def test_a_share_validates_by_default(data_of):
    data = data_of(X)
    assert {split: len(examples) for split, examples in data.examples.items()} == {"train": 86, "validation": 10}


def test_validation_examples_bring_their_labels_and_contexts(data_of):
    labels = np.arange(96) % 3
    data = data_of(X[:64], labels[:64], validation=(X[64:], labels[64:]))
    np.testing.assert_array_equal(data.labels["validation"], labels[64:])
    context = X[:, :1] ** 2
    data = data_of(X[:64], context=context[:64], validation=(X[64:], None, context[64:]))
    np.testing.assert_array_equal(data.contexts["validation"], context[64:])
