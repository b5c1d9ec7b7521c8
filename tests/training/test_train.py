"""Training from its command line: the same after a kill and on any number of devices; mistakes are answered in a sentence."""

import itertools
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_runs as runs
from tiny_runs import EVAL_EVERY, ROOT, TOTAL_STEPS

from iresnet_jax.__main__ import main
from iresnet_jax.data import load
from iresnet_jax.json_dataclasses import to_plain
from iresnet_jax.runs import loop
from iresnet_jax.runs.checkpoints import load_named, to_named
from iresnet_jax.runs.command_line import DEFAULT_CONFIG, parse_train_flags
from iresnet_jax.runs.compiled_steps import Programs
from iresnet_jax.runs.config import parse
from iresnet_jax.runs.metrics import read_metrics
from iresnet_jax.runs.run_folder import alone_in, read_config, read_model
from iresnet_jax.runs.signals import SIGNALS, Stopped
from iresnet_jax.training import parallel
from iresnet_jax.training.objectives.likelihood import ALARMING_BIAS, TOLERATED_BIAS, evaluation_keys

# The same sums in another order, in float32; Adam divides by the root of tiny second moments, which magnifies their rounding.
DEVICE_RTOL, DEVICE_ATOL = 1e-4, 1e-5

PROGRAMS = Programs()

# ml_collections loads config files in a way that Python is going to drop.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("configs") / "tiny_moons.py"
    path.write_text(runs.TOY_CONFIG)
    return path


@pytest.fixture(scope="module")
def config():
    return runs.config_of(runs.TOY_CONFIG)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The workdir of the run that was never stopped."""
    return runs.trained(tmp_path_factory, "toy")


@pytest.fixture(autouse=True)
def share_steps(monkeypatch):
    """Runs of one config share its step, which the library does not do for endless data, of which there are moons only here."""
    compiler = loop._step_compiler
    monkeypatch.setattr(loop, "_step_compiler", lambda *arguments: compiler(*arguments[:-1], PROGRAMS))


def measurements(workdir):
    """What a run wrote down, without the times."""
    timed = ("wall_time_s", "seconds_per_step", "compile_seconds")
    kept = [{k: v for k, v in record.items() if k not in timed} for record in read_metrics(workdir)]
    return [record for record in kept if record["split"] != "timing"]


def newest(workdir):
    """The step of the newest checkpoint."""
    return max(steps_of(workdir))


def steps_of(workdir):
    return [int(path.stem) for path in (workdir / "checkpoints").glob("*.npz")]


def last_state(workdir):
    """The arrays of the newest checkpoint by name."""
    return load_named(workdir / "checkpoints" / f"{newest(workdir)}.npz")


def assert_ends_like(workdir, reference):
    """The same bits in the last state, and the same measurements."""
    ours, theirs = last_state(workdir), last_state(reference)
    assert {name: array.tobytes() for name, array in ours.items()} == {name: array.tobytes() for name, array in theirs.items()}
    assert measurements(workdir) == measurements(reference)


# --- one run --------------------------------------------------------------------------------------------------------


def test_training_improves_validation_and_never_recompiles(uninterrupted):
    assert (uninterrupted / runs.TRACES).read_text() == "2"  # of ActNorm's initialisation, and of the step
    assert newest(uninterrupted) == TOTAL_STEPS == last_state(uninterrupted)["step"]
    validation = [record["nll"] for record in measurements(uninterrupted) if record["split"] == "validation"]
    assert len(validation) == TOTAL_STEPS // EVAL_EVERY
    assert validation[-1] < validation[0]


def test_a_killed_run_ends_bit_for_bit_like_one_never_stopped(config, config_file, uninterrupted, tmp_path):
    command = [sys.executable, str(ROOT / "train.py"), f"--config={config_file}", f"--workdir={tmp_path}"]
    process = subprocess.Popen(command, env=runs.environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not steps_of(tmp_path):
        assert process.poll() is None, "the process ended by itself"
        assert time.monotonic() < deadline, "no checkpoint was written"
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 0 < newest(tmp_path) < TOTAL_STEPS, "it was not killed in the middle"

    resumed = loop.train(config, tmp_path)
    assert_ends_like(tmp_path, uninterrupted)
    chex.assert_trees_all_equal(to_named(resumed), last_state(uninterrupted))  # what is returned is what is saved
    with pytest.raises(AssertionError):  # the comparison can fail
        chex.assert_trees_all_equal(to_named(resumed._replace(params=resumed.ema)), last_state(uninterrupted))


def test_a_finished_run_is_not_trained_further(config, uninterrupted, monkeypatch):
    monkeypatch.setattr(loop, "batches", lambda *_: iter(()))
    before = measurements(uninterrupted)
    again = loop.train(config, uninterrupted)
    chex.assert_trees_all_equal(to_named(again), last_state(uninterrupted))
    assert measurements(uninterrupted) == before


# --- told to stop ---------------------------------------------------------------------------------------------------


@pytest.fixture
def happens_before(monkeypatch):
    """Has something happen while a step waits for its batch."""

    def arrange(step, event):
        def eventful(config, examples, first_step):
            for k, batch in enumerate(feed(config, examples, first_step), first_step):
                if k == step:
                    event()
                yield batch

        monkeypatch.setattr(loop, "batches", eventful)

    feed = loop.batches
    return arrange


def send(*signals):
    return lambda: [signal.raise_signal(number) for number in signals]


@pytest.mark.parametrize(("number", "step"), [(signal.SIGTERM, EVAL_EVERY * 2), (signal.SIGINT, TOTAL_STEPS - 1)])
def test_a_run_told_to_stop_saves_the_step_it_is_in(config, uninterrupted, tmp_path, happens_before, number, step):
    handlers = [signal.getsignal(each) for each in SIGNALS]
    happens_before(step, send(number))
    with pytest.raises(Stopped, match=rf"stopped by {number.name} after step {step + 1} of {TOTAL_STEPS}: the same"):
        loop.train(config, tmp_path)
    assert [signal.getsignal(each) for each in SIGNALS] == handlers
    assert measurements(tmp_path)[-1]["step"] == step + 1

    happens_before(step, lambda: pytest.fail("a step was taken twice"))
    loop.train(config, tmp_path)
    assert_ends_like(tmp_path, uninterrupted)


def test_a_second_signal_stops_at_once(config, tmp_path, happens_before):
    happens_before(EVAL_EVERY, send(signal.SIGTERM, signal.SIGINT))
    with pytest.raises(KeyboardInterrupt) as interrupt:
        loop.train(config, tmp_path)
    assert not isinstance(interrupt.value, Stopped)
    assert measurements(tmp_path)[-1]["step"] == EVAL_EVERY


def test_a_run_that_blew_up_is_not_saved_when_told_to_stop(config, tmp_path, happens_before, monkeypatch):
    config = runs.config_of(runs.TOY_CONFIG, **{"training.log_every_steps": 4, "training.eval_every_steps": 4})
    whole = loop.build_objective

    def blown_up(config, source, spec):
        objective = whole(config, source, spec)

        def make_step(num_terms):
            step = objective.make_step(num_terms)

            def blown_up_step(current, batch):
                current, metrics = step(current, batch)
                return current, {name: jnp.nan * value for name, value in metrics.items()}

            return blown_up_step

        return objective._replace(make_step=make_step)

    monkeypatch.setattr(loop, "build_objective", blown_up)
    monkeypatch.setitem(globals(), "PROGRAMS", Programs())  # which would hand it the step of another test
    happens_before(1, send(signal.SIGTERM))
    with pytest.raises(RuntimeError, match="became non-finite between steps 0 and 2"):
        loop.train(config, tmp_path)
    assert not (tmp_path / "checkpoints").exists()


def test_a_run_is_saved_between_validations_that_are_far_apart(config, tmp_path, happens_before, monkeypatch):
    class Killed(Exception):
        pass

    def die():
        raise Killed

    happens_before(EVAL_EVERY + 1, die)
    for seconds, saved in ((600.0, EVAL_EVERY), (0.0, EVAL_EVERY + 1)):
        monkeypatch.setattr(loop, "SAVE_SECONDS", seconds)
        with pytest.raises(Killed):
            loop.train(config, tmp_path / str(seconds))
        assert newest(tmp_path / str(seconds)) == saved


def test_the_command_line_of_a_run_told_to_stop_says_how_to_go_on(config_file, tmp_path, happens_before, capsys):
    happens_before(1, send(signal.SIGTERM))
    status = runs.train_script().main(["train.py", f"--config={config_file}", f"--workdir={tmp_path}"])
    out, err = capsys.readouterr()
    assert status == 143
    assert err.splitlines()[-1] == f"stopped by SIGTERM after step 2 of {TOTAL_STEPS}: the same command goes on from it"
    assert out == ""


# Each is a function that tells when it is entered, how long after that the signal comes, and whether the step is saved first.
MOMENTS = {
    "initialisation": ("iresnet_jax.training.objectives.likelihood", "initial_variables", 0.1, False),
    "compilation": ("iresnet_jax.runs.loop", "_compile_ahead", 0.1, False),
    "validation": ("iresnet_jax.training.objectives.likelihood", "Validation.measure", 0.1, True),
    "checkpoint": ("iresnet_jax.runs.checkpoints", "_write", 0.0, True),
    "report": ("iresnet_jax.report.report", "write", 0.1, False),
}
# Forks, so that everything is imported once.
MOMENTS_PROGRAM = """
import functools, importlib, json, os, signal, sys, time
import tensorboardX
import train
from iresnet_jax.runs import trained_run as run
from iresnet_jax.report import report
from iresnet_jax.training import loop

def tell(module, name, say):
    owner = importlib.import_module(module)
    *path, last = name.split(".")
    for part in path:
        owner = getattr(owner, part)
    function = getattr(owner, last)

    @functools.wraps(function)
    def telling(*arguments, **options):
        setattr(owner, last, function)
        say()
        return function(*arguments, **options)

    setattr(owner, last, telling)

for line in sys.stdin:
    number, module, name, pause, log, *arguments = json.loads(line)
    ready, told = os.pipe()
    child = os.fork()
    if child == 0:
        output = os.open(log, os.O_WRONLY | os.O_CREAT)
        os.dup2(output, 1), os.dup2(output, 2)
        train.end_at_signals(train.HINT)
        tell(module, name, lambda: [os.write(told, b"!"), time.sleep(0.2 if pause == 0 else 0)])
        sys.exit(train.main(["train.py", *arguments]))
    os.close(told)
    os.read(ready, 1)
    time.sleep(pause)
    os.kill(child, number)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
IMPORT_PROGRAM = """
import runpy, sys

def trace(frame, event, arg):
    if frame.f_code.co_name == "<module>" and frame.f_code.co_filename.endswith("jax/__init__.py"):
        sys.settrace(None)
        print("ready", flush=True)

sys.settrace(trace)
sys.argv = ["train.py"]
runpy.run_path("train.py", run_name="__main__")
"""


@pytest.fixture(scope="module")
def moments(config_file, uninterrupted, tmp_path_factory):
    """Runs a program to be stopped at `MOMENTS`."""
    command = [sys.executable, "-W", "ignore", "-c", MOMENTS_PROGRAM]
    process = subprocess.Popen(
        command, cwd=ROOT, env=runs.environment(), text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdin is not None
    assert process.stdout is not None

    def stop_at(moment, number):
        module, name, pause, _ = MOMENTS[moment]
        folder = tmp_path_factory.mktemp(moment)
        workdir = uninterrupted if moment == "report" else folder / "run"
        arguments = [f"--config={config_file}", f"--workdir={workdir}"]
        print(json.dumps([number, module, name, pause, f"{folder}/log", *arguments]), file=process.stdin, flush=True)
        return int(process.stdout.readline()), (folder / "log").read_text(), workdir

    yield stop_at
    process.stdin.close()
    process.stdout.close()
    process.wait()


@pytest.mark.parametrize(("moment", "number"), list(zip(MOMENTS, itertools.cycle(SIGNALS), strict=False)), ids=list(MOMENTS))
def test_a_signal_at_any_moment_ends_training_in_one_sentence(moments, moment, number):
    status, log, workdir = moments(moment, number)
    assert status == 128 + number
    said = [line for line in log.splitlines() if "INFO" not in line]
    if MOMENTS[moment][3]:
        assert said == [
            f"{number.name}: saving after this step; a second signal stops at once",
            f"stopped by {number.name} after step {EVAL_EVERY} of {TOTAL_STEPS}: the same command goes on from it",
        ]
        assert steps_of(workdir) == [EVAL_EVERY]
    else:
        assert said == [f"stopped by {number.name}: {runs.train_script().HINT}"]


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_during_the_imports_ends_training_in_one_sentence(number):
    process = subprocess.Popen(
        [sys.executable, "-c", IMPORT_PROGRAM],
        cwd=ROOT,
        env=runs.environment(),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (128 + number, "", f"stopped by {number.name}: {runs.train_script().HINT}\n")


# --- what is trained ------------------------------------------------------------------------------------------------


def config_of_one_block(*, max_num_terms=0, training=None, **estimator):
    """A block whose log-determinant is trained like this, and exact in validation."""
    settings = runs.settings_of(runs.TOY_CONFIG)
    settings.model.stages = ({"num_blocks": 1, "hidden": (8,)},)
    settings.logdet.update(estimator)
    settings.evaluation.logdet.kind = "exact"
    settings.training.update({"max_num_terms": max_num_terms, **(training or {})})
    return parse(settings)


def validate_untrained(**settings):
    """Validation of that block, its state without training, and its model."""
    config = config_of_one_block(**settings)
    objective = loop.build_objective(config, load(config.data.name))
    validation = objective.make_validation()
    current = objective.initial_state()
    return validation, current, validation.model(current)


def test_validation_says_what_training_gains_by_what_it_cuts_off(caplog):
    many = {"kind": "series", "num_probes": 1000}
    validation, current, model = validate_untrained(num_terms=1, **many)  # whose trace is exact
    x = jnp.asarray(load("moons").held_out("validation", 32, 0))
    jacobians = jax.jit(jax.vmap(jax.jacfwd(lambda x: model.flow().forward(x[None])[0])))(x)
    scales = np.exp(model.weights["stage0"].actnorm.log_scale[0])
    of_block = np.asarray(jacobians / scales[None, None, :], np.float64)
    missed = np.linalg.slogdet(of_block)[1] - (np.trace(of_block, axis1=1, axis2=2) - 2)  # log det(I + J) - tr J
    with caplog.at_level("WARNING"):
        means, _ = validation.measure(current, model)
    np.testing.assert_allclose(means["training_bias"], missed.mean(), atol=1e-3)  # of 32,000 probes
    assert missed.mean() < -ALARMING_BIAS
    assert f"reads nll lower by {-means['training_bias']:.3f}" in caplog.text
    assert "training exploited what its 1 terms cut off" in caplog.text
    assert means["num_terms"] == 1
    caplog.clear()
    for kind in ("series", "krylov"):  # with the same probes, even few
        patient, current, _ = validate_untrained(kind=kind, num_terms=20)
        with caplog.at_level("WARNING"):
            assert abs(patient.measure(current, model).metrics["training_bias"]) < 1e-4
    assert not caplog.text


def test_terms_are_raised_until_nothing_is_left_to_exploit(caplog):
    validation, current, model = validate_untrained(kind="series", num_terms=1, num_probes=100, max_num_terms=100)

    def bias_with(num_terms):
        ended = current._replace(step=jnp.int32(TOTAL_STEPS), num_terms=jnp.int32(num_terms))
        return validation.measure(ended, model).metrics

    with caplog.at_level("INFO"):
        means, num_terms = validation.measure(current, model)
    assert means["num_terms"] == num_terms
    tried = [1, 2, 3, 5, 8, 12, 18, 27]
    assert num_terms in tried[1:]
    assert f"training goes on with {num_terms} terms" in caplog.text
    before = tried[tried.index(num_terms) - 1]
    assert bias_with(before)["training_bias"] < -TOLERATED_BIAS < bias_with(num_terms)["training_bias"]
    assert bias_with(1) == {**means, "num_terms": 1}  # after the last step there is nothing to go on with


def test_terms_are_not_raised_beyond_the_most_that_are_allowed():
    validation, current, model = validate_untrained(kind="series", num_terms=1, max_num_terms=2)
    assert validation.measure(current, model).num_terms == 2


@pytest.mark.parametrize("kind", ["roulette", "exact"])
def test_an_unbiased_training_has_no_bias_to_show(kind):
    validation, current, model = validate_untrained(kind=kind)
    assert set(validation.measure(current, model).metrics) == {"nll", "log_prior", "log_det"}


def test_a_run_that_raised_its_terms_resumes_with_them(tmp_path, happens_before):
    settings = {"kind": "series", "num_terms": 1, "num_probes": 100, "training": {"total_steps": 6, "eval_every_steps": 2}}
    config = config_of_one_block(max_num_terms=100, **settings)
    whole = loop.train(config, tmp_path / "whole")
    by_step = {record["step"]: record for record in measurements(tmp_path / "whole") if record["split"] == "validation"}
    raised = by_step[2]["num_terms"]
    assert by_step[2]["training_bias"] < -TOLERATED_BIAS
    assert 1 < raised <= by_step[4]["num_terms"] == int(whole.num_terms)
    happens_before(3, send(signal.SIGTERM))
    with pytest.raises(Stopped, match="after step 4 of 6"):
        loop.train(config, tmp_path / "stopped")
    happens_before(3, lambda: pytest.fail("a step was taken twice"))
    chex.assert_trees_all_equal(jax.device_get(loop.train(config, tmp_path / "stopped")), jax.device_get(whole))
    assert measurements(tmp_path / "stopped") == measurements(tmp_path / "whole")

    happens_before(3, lambda: None)
    held = loop.train(config_of_one_block(max_num_terms=0, **settings), tmp_path / "held")
    assert int(held.num_terms) == 1
    with pytest.raises(AssertionError):  # the terms make a difference
        chex.assert_trees_all_close(held.params, whole.params, rtol=1e-5)


# --- devices --------------------------------------------------------------------------------------------------------


def after_steps(config, num_shares, mapped, num_steps=3):
    """Parameters after a few steps with the batch in so many shares."""
    objective = loop.build_objective(config, load(config.data.name))
    batch = np.zeros((num_shares, config.training.batch_size // num_shares), np.float32)
    current = objective.initial_state()
    step = mapped(objective.make_step(objective.num_terms))
    for _ in range(num_steps):
        current, metrics = step(current, batch)
    return jax.device_get((current.params, current.ema, current.spectral, metrics))


def vmapped(step):
    return jax.jit(jax.vmap(step, axis_name=parallel.AXIS, in_axes=(None, 0), out_axes=(None, None)))


def test_one_and_two_devices_give_the_same_result(config):
    one = after_steps(config, 1, vmapped)
    two = after_steps(config, 2, parallel.parallelize)
    chex.assert_trees_all_close(one, two, rtol=DEVICE_RTOL, atol=DEVICE_ATOL)


def test_the_comparison_notices_gradients_that_are_not_averaged(config, monkeypatch):
    monkeypatch.setattr("jax.lax.pmean", lambda value, axis: value)
    with pytest.raises(ValueError, match="out_axes"):  # under vmap; pmap would return the first device's without a word
        after_steps(config, 2, vmapped, num_steps=1)


# --- keys of an evaluation ------------------------------------------------------------------------------------------


def test_probe_draws_share_their_noise_and_nothing_else_is_shared():
    draws = {(s, p): evaluation_keys(jax.random.key(0), np.arange(3), s, p) for s in range(2) for p in range(2)}
    noise = {draw: jax.random.key_data(keys[0]).tolist() for draw, keys in draws.items()}
    assert noise[0, 0] == noise[0, 1]
    distinct = [*noise[0, 0], *noise[1, 0]]
    for _, key_probe in draws.values():
        distinct += jax.random.key_data(key_probe).tolist()
    assert len({tuple(key) for key in distinct}) == len(distinct) == 2 * 3 + 4 * 3


def test_an_example_has_its_keys_in_whatever_batch_it_stands():
    whole = evaluation_keys(jax.random.key(0), np.arange(6), 1, 2)
    part = evaluation_keys(jax.random.key(0), np.array([4, 2]), 1, 2)
    for keys, some in zip(whole, part, strict=True):
        np.testing.assert_array_equal(jax.random.key_data(keys)[np.array([4, 2])], jax.random.key_data(some))


# --- mistakes -------------------------------------------------------------------------------------------------------


def answer(capsys, *arguments):
    """Exit status and the one line on stderr of a command that fails."""
    status = runs.train_script().main(["train.py", *map(str, arguments)])
    out, err = capsys.readouterr()
    [line] = [line for line in err.splitlines() if line.startswith("error: ")]
    assert err.rstrip().splitlines()[-1] == line
    assert "Traceback" not in err
    assert out == ""
    return status, line


MISTAKES = {
    "unknown section": (["--config.trainig.batch_size=3"], "config has no field 'trainig': did you mean 'training'?"),
    "unknown field": (
        ["--config.training.batch_sise=3"],
        "config.training has no field 'batch_sise': did you mean 'batch_size'?",
    ),
    "second of two": (["--config.seed=1", "--config.sed=2"], "config has no field 'sed': did you mean 'seed'?"),
    "type": (["--config.training.batch_size=abc"], "config.training.batch_size must be a whole number, got 'abc'"),
    "no such stage": (["--config.model.stages[3].num_blocks=2"], "config.model.stages has no entry 3: it has 1"),
    "stage field": (
        ["--config.model.stages[0].num_block=2"],
        "config.model.stages[0] has no field 'num_block': did you mean 'num_blocks'?",
    ),
    "flag": (["--worcdir=x"], "worcdir"),
    "stray": (["extra"], "unrecognized arguments: extra"),
    "coeff": (["--config.model.coeff=1.5"], "config.model.coeff must lie in (0, 1), got 1.5"),
    "devices": (["--config.training.batch_size=15"], "a batch of 15 examples cannot be split evenly over 2 devices"),
    "data": (["--config.data.name=mons"], "unknown data set 'mons': known are the images digits"),
    "blocks": (["--config.training.blocks=loop"], "config.training.blocks must be one of auto, scan, unroll, got 'loop'"),
    "entrywise": (["--config.preprocessing.entrywise"], "preprocessing.entrywise is for transform equalize, got 'none'"),
    "norms": (["--config.constraint.norms=exact"], "norms must be one of estimated, certified, none, got 'exact'"),
    "logdet": (
        ["--config.logdet.kind=magic"],
        "config.logdet.kind must be one of exact, series, roulette, krylov, got 'magic'",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_answered_in_one_sentence(name, config_file, tmp_path, capsys):
    arguments, sentence = MISTAKES[name]
    status, line = answer(capsys, f"--config={config_file}", f"--workdir={tmp_path / 'new'}", *arguments)
    assert status == 2
    assert sentence in line
    assert not (tmp_path / "new").exists(), "a mistake must not claim a workdir"


def test_missing_config_file_is_answered_in_one_sentence(capsys):
    status, line = answer(capsys, "--config=configs/nowhere.py")
    assert status == 2
    assert line.startswith("error: there is no config file configs/nowhere.py")


def test_a_config_file_that_fails_is_answered_in_one_sentence(config_file, tmp_path, capsys):
    wrong = tmp_path / "wrong.py"
    wrong.write_text(config_file.read_text().replace("config.data.name", "config.data.nam"))
    status, line = answer(capsys, f"--config={wrong}")
    assert status == 2
    assert line.startswith(f"error: the config file {wrong} fails: ")
    assert 'Did you mean "name" instead of "nam"?' in line
    for program, sentence in (
        (b"def get_config(:", "invalid syntax (wrong.py, line 1)"),
        (b'name = "\xff"', "SyntaxError"),
        (b"import nowhere", "No module named 'nowhere'"),
        (b"def get_config():\n    return 1 / 0", "division by zero"),
        (b"def get_config():\n    return 3", f"get_config() of {wrong} must return a ConfigDict, got 3"),
    ):
        wrong.write_bytes(program)
        status, line = answer(capsys, f"--config={wrong}")
        assert status == 2
        assert sentence in line
    wrong.write_text("def get_config(name):\n    raise ValueError(f'{name} is none of a and b')\n")
    assert answer(capsys, f"--config={wrong}:c") == (2, "error: c is none of a and b")


def test_workdir_with_another_config_is_refused(config_file, uninterrupted, capsys):
    workdir = uninterrupted
    before = (workdir / "config.json").read_text()
    status, line = answer(capsys, f"--config={config_file}", f"--workdir={workdir}", "--config.optimizer.learning_rate=0.5")
    assert status == 2
    assert "config.optimizer.learning_rate is 0.5 now and was 0.001" in line
    assert (workdir / "config.json").read_text() == before


def test_failures_of_a_run_are_sentences_too_unless_debugging(config_file, tmp_path, monkeypatch, capsys):
    def blow_up(config, workdir):
        raise RuntimeError("nll became non-finite between steps 0 and 2;\n lower the learning rate")

    monkeypatch.setattr(loop, "train", blow_up)
    arguments = [f"--config={config_file}", f"--workdir={tmp_path}"]
    status, line = answer(capsys, *arguments)
    assert (status, line) == (2, "error: nll became non-finite between steps 0 and 2; lower the learning rate")
    with pytest.raises(RuntimeError, match="non-finite"):
        runs.train_script().main(["train.py", *arguments, "--debug"])


def test_a_bug_is_not_dressed_up_as_a_mistake(config_file, tmp_path, monkeypatch):
    def crash(config, workdir):
        raise TypeError("a bug")

    monkeypatch.setattr(loop, "train", crash)
    with pytest.raises(TypeError, match="a bug"):
        runs.train_script().main(["train.py", f"--config={config_file}", f"--workdir={tmp_path}"])


def test_two_processes_do_not_train_in_one_workdir(config_file, tmp_path, capsys):
    with alone_in(tmp_path):
        status, line = answer(capsys, f"--config={config_file}", f"--workdir={tmp_path}")
    assert (status, line) == (
        2,
        f"error: another process is training in {tmp_path}: wait until it has ended, or choose another --workdir",
    )
    with alone_in(tmp_path):
        pass  # the lock is gone with its process, or its block


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.eval_every_steps=0", "config.training.eval_every_steps must lie in [1, inf), got 0"),
        ("training.log_every_steps=0", "config.training.log_every_steps must lie in [1, inf), got 0"),
        ("evaluation.num_probe_draws=0", "config.evaluation.num_probe_draws must lie in [1, inf), got 0"),
        ("evaluation.inverse_atol=0.0", "config.evaluation.inverse_atol must lie in (0, inf), got 0.0"),
        ("training.ema_decay=1.5", "config.training.ema_decay must lie in [0, 1), got 1.5"),
        ("preprocessing.alpha=0.7", "config.preprocessing.alpha must lie in (0, 0.5), got 0.7"),
        ("optimizer.learning_rate=nan", "config.optimizer.learning_rate must be a number, got nan"),
        ("optimizer.momentum=1.0", "config.optimizer.momentum must lie in [0, 1), got 1.0"),
        ("optimizer.clip_norm=-1.0", "config.optimizer.clip_norm must lie in [0, inf), got -1.0"),
        ("logdet.parameter=0.0", "config.logdet.parameter must lie in (0, inf), got 0.0"),
        ("seed=4294967296", "config.seed must lie in [0, 4294967296), got 4294967296"),
        ("optimizer.boundaries=(0.6, 0.3)", "config.optimizer.boundaries must increase, got (0.6, 0.3)"),
        ("objective=densities", "config.objective must be one of density, classification, hybrid, inversion, got 'densities'"),
        (
            "augmentation.noise=0.1",
            "config.augmentation.noise is for continuous vectors with preprocessing.transform standardize",
        ),
        ("augmentation.flip=true", "crops and flips of config.augmentation are for the objectives classification and hybrid"),
        ("preprocessing.transform=logit", "preprocessing.transform logit is for data with grey levels"),
        ("model.stages[0].hidden=(4.5,)", "config.model.stages[0].hidden[0] must be a whole number, got 4.5"),
        ("model.stages[0].hidden=(0,)", "hidden must be positive numbers, got (0,)"),
        ("model.stages=((1, 2),)", "config.model.stages[0] must be a dictionary, got (1, 2)"),
    ],
)
def test_settings_that_would_fail_late_are_refused_at_once(config_file, tmp_path, capsys, override, message):
    status, line = answer(capsys, f"--config={config_file}", f"--workdir={tmp_path / 'run'}", f"--config.{override}")
    assert status == 2
    assert message in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"[]", "is damaged: restore it, or choose another --workdir"),
        (b"null", "is damaged: restore it, or choose another --workdir"),
        (b"{", "is damaged: restore it, or choose another --workdir"),
        (b'{"seed": "\xff"}', "is damaged: restore it, or choose another --workdir"),
        (b'{"format": 1, "sede": 0}', "is damaged (config has no field 'sede': did you mean 'seed'?): restore it"),
        (b"{}", "was written by another version of iresnet_jax: train again, or use that version"),
        (b'{"format": 0}', "was written by another version of iresnet_jax: train again, or use that version"),
    ],
)
def test_a_config_of_a_workdir_that_is_no_use_is_said_to_be(config_file, tmp_path, capsys, content, said):
    (tmp_path / "config.json").write_bytes(content)
    status, line = answer(capsys, f"--config={config_file}", f"--workdir={tmp_path}")
    assert status == 2
    assert f"{tmp_path / 'config.json'} {said}" in line


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"[]", "is damaged: restore it, or choose another --workdir"),
        (b'{"model": "\xff"}', "is damaged: restore it, or choose another --workdir"),
        (b'{"format": 1, "model": {"type": "Desnity"}}', "is damaged (model must be of the type DensitySpec or ClassifierSpec"),
        (b'{"format": 1}', "is damaged ('model'): restore it"),
        (b'{"format": 2}', "was written by another version of iresnet_jax: train again, or use that version"),
    ],
)
def test_a_model_of_a_workdir_that_is_no_use_is_said_to_be(tmp_path, content, said):
    (tmp_path / "model.json").write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path / 'model.json'} {said}")):
        read_model(tmp_path)


def test_files_in_the_place_of_folders_are_named(config_file, config, tmp_path, capsys):
    (tmp_path / "file").touch()
    status, line = answer(capsys, f"--config={config_file}", f"--workdir={tmp_path / 'file'}")
    assert (status, line) == (2, f"error: {tmp_path / 'file'} is a file: choose another --workdir")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").touch()
    with pytest.raises(ValueError, match=f"{tmp_path}/run/checkpoints is a file, where a folder is needed: move it away"):
        loop.train(config, tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists()


def write_poisson(path, mean):
    """Images whose pixels are Poisson variables."""
    rng = np.random.default_rng(0)
    np.savez(path, **{f"x_{split}": rng.poisson(mean, (200, 2, 2, 1)).astype(np.uint8) for split in ("train", "test")})


def test_a_model_is_one_of_the_data_it_was_trained_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("IRESNET_JAX_CACHE_DIR", str(tmp_path / "cache"))
    path, workdir = tmp_path / "data.npz", tmp_path / "run"
    settings = runs.settings_of(runs.DIGITS_CONFIG)
    settings.data.name = f"npz:{path}"
    settings.model.stages = ({"num_blocks": 1, "hidden": (4,)},)
    settings.logdet.kind = settings.evaluation.logdet.kind = "exact"
    settings.training.update({"batch_size": 16, "total_steps": 2, "eval_every_steps": 2, "log_every_steps": 1})
    config = parse(settings)
    write_poisson(path, 3)
    loop.train(config, workdir)
    before = read_model(workdir)
    assert read_config(workdir) == config
    command = ("--workdir", str(workdir))
    assert main(["evaluate", *command]) == 0
    assert "other data" not in capsys.readouterr().out

    write_poisson(path, 43)
    other = load(config.data.name).fingerprint
    message = f"was trained on other data: npz.* has the fingerprint {other[:12]} now and had {before[1][:12]} when training"
    with pytest.raises(ValueError, match=message):
        loop.train(config, workdir)
    assert read_model(workdir) == before
    assert main(["evaluate", *command]) == 0
    assert capsys.readouterr().out.startswith("These are other data than the model was trained on: ")

    path.unlink()
    assert main(["sample", *command, "--num", "32"]) == 0
    assert "other data" not in capsys.readouterr().out
    assert 0 < np.median(np.load(workdir / "samples.npy")) < 10
    assert main(["evaluate", *command]) == 2
    assert str(path) in capsys.readouterr().err


def test_a_batch_larger_than_the_data_is_refused_at_once(tmp_path):
    config = runs.config_of(runs.DIGITS_CONFIG, **{"training.batch_size": 2000})
    with pytest.raises(
        ValueError, match=r"training.batch_size must be at most 1257, the training examples of digits, got 2000"
    ):
        loop.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_everything_in_float64_is_refused(config_file, tmp_path, capsys, x64):
    status, line = answer(capsys, f"--config={config_file}", f"--workdir={tmp_path}")
    assert status == 2
    assert "runs are trained and read in float32: unset JAX_ENABLE_X64" in line


def test_a_config_file_may_follow_a_space_and_need_not_have_variants(config_file, tmp_path, capsys):
    status, line = answer(capsys, "--config", str(tmp_path / "none.py"))
    assert (status, line.split(":")[1]) == (2, f" there is no config file {tmp_path / 'none.py'}")
    status, line = answer(capsys, f"--config={config_file}:0.7")
    assert (status, line) == (2, "error: the config file has no variants: leave out the colon and what follows it")


def test_real_command_line_of_a_mistake(config_file):
    command = [sys.executable, str(ROOT / "train.py"), f"--config={config_file}", "--config.trainig.batch_size=3"]
    done = subprocess.run(command, env=runs.environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "error: config has no field 'trainig': did you mean 'training'?"
    assert "Traceback" not in done.stderr


# --- flags ----------------------------------------------------------------------------------------------------------


def test_flags_override_fields_and_name_the_workdir_after_the_config(config_file):
    arguments = [f"--config={config_file}", "--config.seed=3", "--config.model.stages[0].hidden=(4,)"]
    flags = parse_train_flags(["train.py", *arguments])
    assert flags.config.seed == 3
    assert flags.config.model.stages[0].hidden == (4,)
    assert flags.workdir == Path("runs/tiny_moons")
    assert not flags.debug


def test_the_default_config_is_used_where_none_is_named(monkeypatch):
    monkeypatch.chdir(ROOT)
    flags = parse_train_flags(["train.py", "--config.seed=3"], default_config=DEFAULT_CONFIG)
    assert flags.config.seed == 3
    assert flags.workdir == Path("runs/digits_density")


def test_config_json_is_what_was_trained(config, uninterrupted):
    assert json.loads((uninterrupted / "config.json").read_text()) == {"format": 1, **to_plain(config)}
