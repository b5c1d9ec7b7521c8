"""After training: the parts of a standard error, samples, inverses and reports, on runs small enough to train here."""

import dataclasses
import json
import os
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs

from iresnet_jax.__main__ import main
from iresnet_jax.bijections import bijection as bijections
from iresnet_jax.evaluation import environment, frozen, lipschitz, trained
from iresnet_jax.evaluation import inversion as reconstruct
from iresnet_jax.evaluation import likelihood as evaluate
from iresnet_jax.evaluation import samples as sample
from iresnet_jax.maths.logdet.hutchinson_series import SeriesLogdet
from iresnet_jax.models import density
from iresnet_jax.report import report
from iresnet_jax.training import loop
from iresnet_jax.training.checkpoints import load_named
from iresnet_jax.training.objectives.likelihood import evaluation_keys

# Estimates of variances from thousands of draws scatter by a few percent; a part that absorbs another one is off by far more.
PARTS_RTOL = 0.1
EXACT_RTOL = 1e-12  # the same float64 sums in another order
SAME_RTOL = 1e-5  # the same maths by another route, float32
NORM_RTOL = 1e-2  # ten times the tolerance of the norms

pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")


@pytest.fixture(scope="module", autouse=True)
def compilations(tmp_path_factory):
    with runs.shared_compilations(tmp_path_factory):
        yield


@pytest.fixture(scope="module")
def toy_run(tmp_path_factory):
    """The workdir of a toy's training run, and no report yet."""
    workdir = tmp_path_factory.mktemp("toy")
    loop.train(runs.config_of(runs.TOY_CONFIG), workdir)
    return workdir


@pytest.fixture(scope="module")
def toy(toy_run):
    return trained.load(toy_run)


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory):
    """The workdir of a run on digits from the command line, report included, and what it printed."""
    folder = tmp_path_factory.mktemp("digits")
    (folder / "tiny_digits.py").write_text(runs.DIGITS_CONFIG)
    workdir = folder / "run"
    with pytest.MonkeyPatch.context() as patch:
        said = []
        patch.setattr("builtins.print", lambda *words, **_: said.append(" ".join(map(str, words))))
        status = runs.train_script().main(["train.py", f"--config={folder / 'tiny_digits.py'}", f"--workdir={workdir}"])
    assert status == 0
    return workdir, "\n".join(said)


@pytest.fixture(scope="module")
def digits(digits_run):
    return trained.load(digits_run[0])


@pytest.fixture
def one_evaluation(monkeypatch):
    """An inverse that is stopped far too early."""
    hasty = lambda settings: bijections.Solver(atol=settings["inverse_atol"], max_evals=1)  # noqa: E731
    monkeypatch.setattr("iresnet_jax.training.config.build_solver", hasty)


# --- parts of the standard error ------------------------------------------------------------------------------------


def nested_draws(data, noise, probes, *, n=4000, s=4, p=3, seed=0):
    """Values whose standard deviations between examples, noise draws and probe draws are known; probes' vary by example."""
    rng = np.random.default_rng(seed)
    spread = rng.uniform(0.5, 1.5, (n, 1, 1))
    spread *= probes / np.sqrt(np.mean(spread**2))
    parts = rng.normal(0, data, (n, 1, 1)), rng.normal(0, noise, (n, s, 1)), spread * rng.normal(size=(n, s, p))
    return 3 + sum(parts)


def check_parts(split, data, noise, probes):
    n, s, p = 4000, 4, 3
    result = split(nested_draws(data, noise, probes))
    assert abs(result.mean - 3) < 5 * result.stderr
    np.testing.assert_allclose(result.stderr_data, data / np.sqrt(n), rtol=PARTS_RTOL)
    np.testing.assert_allclose(result.stderr_dequantisation, noise / np.sqrt(s * n), rtol=PARTS_RTOL)
    np.testing.assert_allclose(result.stderr_probes, probes / np.sqrt(s * p * n), rtol=PARTS_RTOL)
    total = data**2 / n + noise**2 / (s * n) + probes**2 / (s * p * n)
    np.testing.assert_allclose(result.stderr, np.sqrt(total), rtol=PARTS_RTOL)


CASES = [(1.0, 0.5, 0.8), (0.2, 0.6, 1.0), (1.0, 1.0, 1.0)]


@pytest.mark.parametrize("parts", CASES)
def test_parts_of_the_standard_error_are_recovered(parts):
    check_parts(evaluate.split_error, *parts)


def test_a_split_that_forgets_to_subtract_the_probes_is_rejected():
    def naive(values):
        right = evaluate.split_error(values)
        noise = np.sqrt(values.mean(axis=2).var(axis=1, ddof=1).mean() / (values.shape[1] * len(values)))
        return right._replace(stderr_dequantisation=float(noise))

    with pytest.raises(AssertionError):
        check_parts(naive, *CASES[0])


def test_parts_add_up_to_the_standard_error_of_independent_examples():
    values = nested_draws(1.0, 0.5, 0.8, n=50)
    result = evaluate.split_error(values)
    np.testing.assert_allclose(result.stderr, values.mean(axis=(1, 2)).std(ddof=1) / np.sqrt(50), rtol=EXACT_RTOL)
    squares = result.stderr_data**2 + result.stderr_probes**2 + result.stderr_dequantisation**2
    np.testing.assert_allclose(result.stderr**2, squares, rtol=EXACT_RTOL)


def test_what_one_draw_cannot_tell_is_none_and_stays_in_the_total():
    values = nested_draws(0.1, 0.5, 0.8, s=1, p=1)
    result = evaluate.split_error(values)
    assert result.stderr_probes is None
    assert result.stderr_dequantisation is None
    np.testing.assert_allclose(result.stderr, values.std(ddof=1) / np.sqrt(len(values)), rtol=EXACT_RTOL)
    assert evaluate.split_error(values[:, :, [0, 0]]).stderr_probes == 0
    with pytest.raises(ValueError, match="at least 2 examples, got 1"):
        evaluate.split_error(values[:1])


def test_no_dequantisation_part_becomes_negative():
    result = evaluate.split_error(nested_draws(1.0, 0.0, 1.0, n=20, seed=3))
    assert 0 <= result.stderr_dequantisation < result.stderr_probes


# --- evaluation -----------------------------------------------------------------------------------------------------


def test_evaluation_of_images_agrees_with_the_exact_likelihood_by_hand(digits, digits_run):
    images = jnp.asarray(digits.source.images.images["test"])
    key_noise, _ = evaluation_keys(jax.random.key(digits.config.seed), np.arange(len(images)), 0, 0)
    x = density.to_continuous(digits.spec, key_noise, images)
    terms = jax.jit(lambda x: density.log_prob(digits.spec, digits.weights, digits.prior, x, jax.random.key(0)))(x)
    by_hand = -np.asarray(terms.log_prob, np.float64) / (64 * np.log(2)) + np.log2(17)
    result = json.loads((digits_run[0] / "report.json").read_text())["bits_per_dim"]
    np.testing.assert_allclose(result["exact"]["mean"], by_hand.mean(), rtol=SAME_RTOL)
    assert abs(result["exact"]["z"]) < evaluate.SUSPICIOUS_Z
    assert abs(result["mean"] - by_hand.mean()) < 5 * (result["stderr_probes"] + result["stderr_dequantisation"])
    assert result["num_examples"] == len(images) == 360
    np.testing.assert_allclose(result["stderr_data"], by_hand.std() / np.sqrt(360), rtol=0.05)
    assert 0 < result["stderr_probes"] < result["stderr_data"]
    assert 0 < result["stderr_dequantisation"] < result["stderr_data"]
    assert 0 < result["truncation_bound"] < 1e-3  # twenty exact terms at a Lipschitz constant of at most 0.81


def test_warnings_of_an_evaluation():
    sound = {"mean": 2.4, "stderr": 0.01, "entropy_floor": 2.41, "unbiased": True, "exact": {"z": 1.0}}
    assert evaluate.warnings(sound) == []
    [below] = evaluate.warnings({**sound, "mean": 2.37})
    assert "better than the entropy of the data allows, by 4.0 standard errors" in below
    [off] = evaluate.warnings({**sound, "exact": {"z": -4.5}})
    assert "4.5 standard errors away from the exact one" in off


# --- samples and inverses -------------------------------------------------------------------------------------------


def test_sample_command_writes_levels_and_a_picture(digits_run, capsys):
    workdir, _ = digits_run
    assert main(["sample", "--workdir", str(workdir), "--num", "5", "--temperature", "0.8", "--seed", "3"]) == 0
    assert "converged for 5 of 5" in capsys.readouterr().out
    levels = np.load(workdir / "samples.npy")
    assert (levels.shape, levels.dtype) == ((5, 8, 8, 1), np.uint8)
    assert levels.max() < 17
    assert (workdir / "samples.png").read_bytes().startswith(b"\x89PNG")


def test_samples_depend_on_the_seed_alone_and_concentrate_at_low_temperature(toy):
    a, b, c = (sample.draw(toy, 4, seed=seed).values for seed in (0, 0, 1))
    np.testing.assert_array_equal(a, b)
    assert np.abs(a - c).max() > 0.1
    assert np.ptp(sample.draw(toy, 4, temperature=0.0).values, axis=0).max() == 0
    with pytest.raises(ValueError, match="number of samples must be at least 1, got 0"):
        sample.draw(toy, 0)


@pytest.mark.usefixtures("one_evaluation")
def test_failed_inverses_are_named_and_fail_the_command(toy_run, capsys):
    assert main(["sample", "--workdir", str(toy_run), "--num", "3"]) == 1
    assert "did not converge for 3 of 3 samples, numbers 0, 1, 2." in capsys.readouterr().out
    assert main(["reconstruct", "--workdir", str(toy_run), "--num", "3"]) == 1
    assert "NOT INVERTED; 0 of 3" in capsys.readouterr().out


def test_reconstructions_are_exact_to_rounding_and_within_their_bound(digits, digits_run, capsys):
    result = reconstruct.reconstruct(digits, 300)  # more than a batch
    summary = reconstruct.summarize(digits, result)
    assert result.trip.converged.all()
    assert (result.trip.euclidean_error <= result.trip.error_bound).all()
    assert result.refined.converged.all()
    assert (result.refined.euclidean_error <= result.refined.error_bound).all()
    assert result.refined.error_bound.max() < 1e-6 * result.trip.error_bound.max()
    assert 0 < result.refined.euclidean_error.max() < 1e-6 * result.trip.euclidean_error.max()
    assert summary["num_examples"] == 300
    assert summary["max_abs_error"] <= summary["max_euclidean_error"] <= summary["max_error_bound"] < 1e-4
    np.testing.assert_allclose(
        summary["max_grey_level_error"], 17 * np.abs(result.originals - result.reconstructions).max(), rtol=EXACT_RTOL
    )
    assert 1 < summary["mean_evals"] < 200
    assert main(["reconstruct", "--workdir", str(digits_run[0]), "--num", "8"]) == 0
    assert capsys.readouterr().out.startswith("inverse: inverted; 8 of 8 test examples converged")
    assert (digits_run[0] / "reconstructions.png").read_bytes().startswith(b"\x89PNG")


# --- Lipschitz constants --------------------------------------------------------------------------------------------


def test_lipschitz_table_agrees_with_singular_values(toy, toy_run):
    named = load_named(toy_run / "checkpoints" / "best" / str(toy.step))
    table = lipschitz.measure(toy)
    assert [block["name"] for block in table["blocks"]] == ["stage0/block00", "stage0/block01"]
    for block in table["blocks"]:
        product = 1.0
        for layer, norms in block["layers"].items():
            trained_norm = np.linalg.norm(named[f"ema/{block['name']}/{layer}/kernel"].astype(np.float64), 2)
            stage, index = block["name"].split("/block")
            deployed = np.linalg.norm(np.asarray(toy.weights[stage]["branch"][layer]["kernel"][int(index)], np.float64), 2)
            np.testing.assert_allclose(deployed, min(trained_norm, 0.9), rtol=NORM_RTOL)
            assert norms["estimate"] * (1 - 1e-6) <= deployed <= norms["bound"] <= norms["target"] == 0.9
            np.testing.assert_allclose([norms["estimate"], norms["bound"]], deployed, rtol=NORM_RTOL)
            product *= deployed
        assert product <= block["bound"] <= block["target"] * (1 + 1e-6)
        np.testing.assert_allclose([block["estimate"], block["bound"]], product, rtol=NORM_RTOL)
    assert table["certified"]
    assert table["max_block"] == max(block["bound"] for block in table["blocks"]) <= lipschitz.target(table) * (1 + 1e-6)


def test_certify_command_tells_layer_by_layer_and_fails_without_a_certificate(toy, toy_run, capsys, monkeypatch):
    assert main(["certify", "--workdir", str(toy_run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("stage0/block01/dense0   0.9000") for line in lines)
    assert lines[-1].startswith("certified: every one of 2 blocks is a contraction")
    broken = jax.tree.map(np.array, toy.weights)
    broken["stage0"]["lipschitz"][1] = np.nan
    monkeypatch.setattr(trained, "load", lambda workdir: dataclasses.replace(toy, weights=broken))
    assert main(["certify", "--workdir", str(toy_run)]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == (
        "NOT CERTIFIED: no bound below 1 for 1 of 2 blocks, the first is stage0/block01"
    )


def test_a_frozen_model_is_the_same_model_in_one_file(digits, digits_run, tmp_path, capsys):
    path = tmp_path / "model.npz"
    assert main(["freeze", "--workdir", str(digits_run[0]), "--output", str(path)]) == 0
    said = capsys.readouterr().out
    assert "certified: every one of" in said
    assert f"written: {path}" in said
    loaded = frozen.load(path)
    assert (loaded.spec, loaded.step) == (digits.spec, digits.step)
    for ours, theirs in ((loaded.weights, digits.weights), (loaded.prior, digits.prior), (loaded.bounds, digits.bounds)):
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    samples, info = loaded.sample(jax.random.key(1), 3)
    assert info.converged.all()
    np.testing.assert_array_equal(samples, density.sample(digits.spec, digits.weights, digits.prior, jax.random.key(1), 3)[0])
    back, _ = loaded.decode(loaded.encode(samples))
    np.testing.assert_allclose(back, samples, atol=1e-5)
    with pytest.raises(ValueError, match="SeriesLogdet draws probes: pass a key"):
        loaded.log_prob(samples, estimator=SeriesLogdet())
    terms = loaded.log_prob(samples, jax.random.key(0), SeriesLogdet(num_terms=30, num_probes=8))
    assert np.abs(terms.log_prob - loaded.log_prob(samples).log_prob).max() < 5 * terms.info.stderr.max()
    with jax.enable_x64(True):
        np.testing.assert_allclose(frozen.load(path).encode(samples), loaded.encode(samples), atol=1e-5)
    shutil.copy(path, tmp_path / frozen.FILE_NAME)
    alone = trained.load(tmp_path)
    assert (alone.spec, alone.step, alone.source.name) == (digits.spec, digits.step, digits.source.name)
    for name, stage in digits.weights.items():
        chex.assert_trees_all_equal(alone.weights[name]["branch"], stage["branch"])
        np.testing.assert_allclose(alone.weights[name]["lipschitz"], stage["lipschitz"], rtol=1e-6)  # computed anew
    chex.assert_trees_all_equal(alone.prior, digits.prior)
    chex.assert_trees_all_close(alone.bounds, digits.bounds, rtol=1e-6)
    assert main(["certify", "--workdir", str(tmp_path)]) == 0
    assert "certified: every one of" in capsys.readouterr().out
    (tmp_path / frozen.FILE_NAME).unlink()
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.npz is damaged or was written by another version .*: freeze the model again"):
        frozen.load(path)
    path.write_bytes(content[:1000])
    with pytest.raises(ValueError, match="is damaged"):
        frozen.load(path)
    with pytest.raises(ValueError, match=r"there is no frozen model .*frozen\.npz: write one with"):
        frozen.load(tmp_path)


# --- reports --------------------------------------------------------------------------------------------------------


def test_training_ends_with_a_report_of_images(digits_run):
    workdir, said = digits_run

    def no_constant(name):
        raise AssertionError(f"{name} is not JSON")

    content = json.loads((workdir / "report.json").read_text(), parse_constant=no_constant)
    assert content["train"]["steps"] <= content["train"]["total_steps"] == 6
    assert content["train"]["compile_seconds"] > 0
    assert content["train"]["seconds_per_step"] > 0
    assert content["inverse"]["fraction_converged"] == 1
    assert content["environment"]["devices"] == "2 x cpu"
    assert content["config"] == json.loads((workdir / "config.json").read_text())
    assert content["warnings"] == []
    bits = content["bits_per_dim"]
    assert f"test: {bits['mean']:.4f} ± {bits['stderr']:.4f} bits/dim" in said
    assert "inverse: inverted; 360 of 360" in said
    assert f"report: {workdir / 'report.html'}" in said
    page = (workdir / "report.html").read_text()
    assert page.count("data:image/") >= 5  # curves, samples, reconstructions, histogram, constants
    assert "://" not in page.replace("http://www.w3.org", "")  # it needs nothing from elsewhere
    assert not list(workdir.glob("*.incoming"))


def test_report_of_a_toy(toy_run, toy, capsys):
    assert main(["report", "--workdir", str(toy_run)]) == 0
    assert "nats" in capsys.readouterr().out
    content = json.loads((toy_run / "report.json").read_text())
    assert content["nll"]["entropy_floor"] == pytest.approx(2.3939)
    assert content["nll"]["mean"] > 2.39
    assert content["nll"]["stderr_dequantisation"] == 0
    assert content["samples"]["fraction_converged"] == 1
    page = (toy_run / "report.html").read_text()
    assert "somebody" in page  # the value to compare with, from the config


def test_density_map_has_the_second_coordinate_along_its_rows(toy):
    values, (left, right, bottom, top) = report.density_on_grid(toy, side=8)
    assert (left, bottom) == (-right, -top)
    centres = left + (np.arange(8) + 0.5) * (right - left) / 8
    point = jnp.asarray([[centres[5], centres[2]]], jnp.float32)
    expected = density.log_prob(toy.spec, toy.weights, toy.prior, point, jax.random.key(0)).log_prob[0]
    np.testing.assert_allclose(values[2, 5], expected, rtol=SAME_RTOL)
    assert abs(values[5, 2] - expected) > 1e-3


def test_numbers_json_does_not_have_become_null():
    assert report._strict({"a": [1.0, float("nan")], "b": (float("inf"), 2), "c": "x"}) == {
        "a": [1.0, None],
        "b": [None, 2],
        "c": "x",
    }


def test_training_times_are_those_of_the_log():
    records = [
        {"step": 0, "split": "timing", "wall_time_s": 3.0, "compile_seconds": 2.5},
        *(
            {"step": k, "split": "train", "wall_time_s": 3.0 + k, "seconds_per_step": s}
            for k, s in enumerate((9.0, 0.1, 0.2), 1)
        ),
    ]
    expected = {"steps": 2, "total_steps": 3, "seconds_per_step": 0.2, "compile_seconds": 2.5, "total_seconds": 6.0}
    assert report.training_times(records, 2) == expected
    assert set(report.training_times([], 0).values()) == {0, None}


def test_environment_names_versions_and_devices():
    facts = environment.describe()
    assert facts["jax"] == jax.__version__
    assert facts["cpu_count"] >= 1


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system cannot pin a process to processors")
def test_environment_counts_the_processors_that_the_process_may_use():
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        assert environment.describe()["cpu_count"] == 1
    finally:
        os.sched_setaffinity(0, allowed)


# --- which parameters, and mistakes ---------------------------------------------------------------------------------


@pytest.fixture
def copied(toy_run, tmp_path):
    return shutil.copytree(toy_run, tmp_path / "run", ignore=shutil.ignore_patterns("tensorboard"))


def damage(folder):
    for path in folder.rglob("*"):
        if path.is_file():
            path.write_bytes(b"")


def test_the_parameters_are_the_average_of_the_best_checkpoint(toy, toy_run):
    [best] = (toy_run / "checkpoints" / "best").iterdir()
    named = load_named(best)
    assert toy.step == int(best.name)
    assert toy.notes == ()
    np.testing.assert_array_equal(toy.prior["mean"], named["ema/prior/mean"])
    bias = toy.weights["stage0"]["branch"]["dense0"]["bias"][1]
    np.testing.assert_array_equal(bias, named["ema/stage0/block01/dense0/bias"])
    assert np.any(named["ema/stage0/block01/dense0/bias"] != named["params/stage0/block01/dense0/bias"])


def test_the_latest_checkpoint_is_the_second_choice_and_said_to_be(copied):
    damage(copied / "checkpoints" / "best")
    [note] = trained.load(copied).notes
    assert note == (
        f"These are the parameters of the latest checkpoint, step {runs.TOTAL_STEPS}: "
        "the checkpoint that was best on validation is damaged."
    )
    shutil.rmtree(copied / "checkpoints" / "best")
    [note] = trained.load(copied).notes
    assert "there is no checkpoint chosen on validation" in note


def answer(capsys, *arguments):
    """The one line that a failing command leaves on stderr."""
    try:
        status = main(list(arguments))
    except SystemExit as exit:  # argparse's way
        status = exit.code
    out, err = capsys.readouterr()
    assert status == 2
    assert out == ""
    [line] = err.splitlines()
    assert line.startswith("error: ")
    return line


def test_mistakes_of_the_command_line_are_answered_in_one_sentence(tmp_path, capsys):
    assert "invalid choice: 'evalute'" in answer(capsys, "evalute", "--workdir", "x")
    assert "--workdir" in answer(capsys, "evaluate")
    assert "--nun" in answer(capsys, "sample", "--workdir", "x", "--nun", "3")
    assert f"there is no workdir {tmp_path / 'none'}" in answer(capsys, "evaluate", "--workdir", str(tmp_path / "none"))
    assert "has no config.json" in answer(capsys, "report", "--workdir", str(tmp_path))
    with pytest.raises(ValueError, match="there is no workdir"):
        main(["evaluate", "--workdir", str(tmp_path / "none"), "--debug"])


def test_damaged_workdirs_are_answered_in_one_sentence(copied, capsys):
    workdir = ("--workdir", str(copied))
    assert "number of samples must be at least 1, got -1" in answer(capsys, "sample", *workdir, "--num", "-1")
    damage(copied / "checkpoints")
    shutil.rmtree(copied / "checkpoints" / "latest" / str(runs.TOTAL_STEPS))  # one left: falling back would warn
    assert "no checkpoint in" in answer(capsys, "evaluate", *workdir)
    shutil.rmtree(copied / "checkpoints")
    assert "has no checkpoint yet" in answer(capsys, "evaluate", *workdir)
    config = json.loads((copied / "config.json").read_text())
    del config["model"]["coeff"]
    (copied / "config.json").write_text(json.dumps(config))
    assert "lacks config.model.coeff" in answer(capsys, "evaluate", *workdir)
    for damaged in ("{", "{}", "[]"):
        (copied / "config.json").write_text(damaged)
        assert "config.json is damaged" in answer(capsys, "evaluate", *workdir)


def test_help_lists_the_commands(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["--help"])
    assert exit.value.code == 0
    said = capsys.readouterr().out
    assert all(command in said for command in ("evaluate", "sample", "reconstruct", "report"))
