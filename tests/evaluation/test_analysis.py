"""After training: likelihoods, samples, inverses and reports, on runs small enough to train here."""

import dataclasses
import json
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
from iresnet_jax.evaluation.examples import held_out
from iresnet_jax.maths.logdet.series import SeriesLogdet

from iresnet_jax.__main__ import main
from iresnet_jax.bijections import bijection as bijections
from iresnet_jax.evaluation import frozen, inversion, likelihood, lipschitz, samples, trained
from iresnet_jax.evaluation.results import SUSPICIOUS_Z
from iresnet_jax.models import density
from iresnet_jax.training import loop
from iresnet_jax.training.checkpoints import load_named
from iresnet_jax.training.objectives.likelihood import evaluation_keys

EXACT_RTOL = 1e-12  # the same float64 sums in another order
SAME_RTOL = 1e-5  # the same maths by another route, float32
DIFFERENCE_RTOL = 1e-3  # differences of such float32 numbers
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
    hasty = lambda settings: bijections.Solver(atol=settings.inverse_atol, max_evals=1)  # noqa: E731
    for module in (samples, inversion):
        monkeypatch.setattr(module, "build_solver", hasty)


# --- evaluation -----------------------------------------------------------------------------------------------------


def exact_values(digits, noise_draw):
    """Bits/dim of the test images by the exact log-determinant, one an image."""
    images = jnp.asarray(digits.source.images.images["test"])
    key_noise, _ = evaluation_keys(jax.random.key(digits.config.seed), np.arange(len(images)), noise_draw, 0)
    x = density.to_continuous(digits.spec, key_noise, images)
    log_p = jax.jit(lambda x: density.log_prob(digits.spec, digits.weights, digits.prior, x, jax.random.key(0)).log_prob)(x)
    return -np.asarray(log_p, np.float64) / (64 * np.log(2)) + np.log2(17)


def test_the_exact_likelihood_is_the_headline_up_to_the_dimensions_where_it_is_affordable(digits, digits_run):
    by_hand = np.stack([exact_values(digits, draw) for draw in range(2)])
    result = json.loads((digits_run[0] / "report.json").read_text())["bits_per_dim"]
    np.testing.assert_allclose(result["mean"], by_hand.mean(), rtol=SAME_RTOL)
    assert result["estimator"] == "exact log-determinant"
    assert result["truncation_bound"] == result["stderr_probes"] == 0
    assert result["num_examples"] == by_hand.shape[1] == 360
    per_image = by_hand.mean(axis=0)
    np.testing.assert_allclose(result["stderr"], per_image.std(ddof=1) / np.sqrt(360), rtol=SAME_RTOL)
    noise = np.sqrt(by_hand.var(axis=0, ddof=1).mean() / (2 * 360))
    np.testing.assert_allclose(result["stderr_dequantisation"], noise, rtol=DIFFERENCE_RTOL)
    assert 0 < result["stderr_dequantisation"] < result["stderr_data"]
    estimate = result["estimate"]
    assert abs(estimate["z"]) < SUSPICIOUS_Z
    assert estimate["unbiased"]
    assert estimate["difference"] != 0
    np.testing.assert_allclose(estimate["mean"] - estimate["difference"], by_hand[0].mean(), rtol=SAME_RTOL)


def test_an_estimate_is_the_headline_beyond(toy, monkeypatch):
    settings, seed = toy.config.evaluation, toy.config.seed
    points = held_out(toy.source, settings, seed)[:256]
    exact = likelihood.evaluate(toy, points, settings, seed)
    monkeypatch.setattr(likelihood, "MAX_EXACT_DIMS", 1)
    result = likelihood.evaluate(toy, points, settings, seed)
    assert result.estimator == "unbiased, 20 exact terms and a Poisson(2) tail"
    assert result.estimate is None
    assert abs(result.mean - exact.mean) < 5 * result.stderr_probes
    assert 0 < result.stderr_probes < result.stderr_data
    assert 0 < result.truncation_bound < 2 * 0.81**21 / 21 / (1 - 0.81)  # two dimensions, twenty terms, two blocks at most


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
    settings = toy.config.evaluation
    a, b, c = (samples.draw(toy, 4, settings, seed=seed).values for seed in (0, 0, 1))
    np.testing.assert_array_equal(a, b)
    assert np.abs(a - c).max() > 0.1
    assert np.ptp(samples.draw(toy, 4, settings, temperature=0.0).values, axis=0).max() == 0
    with pytest.raises(ValueError, match="number of samples must be at least 1, got 0"):
        samples.draw(toy, 0, settings)


@pytest.mark.usefixtures("one_evaluation")
def test_failed_inverses_are_named_and_fail_the_command(toy_run, capsys):
    assert main(["sample", "--workdir", str(toy_run), "--num", "3"]) == 1
    assert "did not converge for 3 of 3 samples, numbers 0, 1, 2." in capsys.readouterr().out
    assert main(["reconstruct", "--workdir", str(toy_run), "--num", "3"]) == 1
    assert "NOT INVERTED; 0 of 3" in capsys.readouterr().out


def test_reconstructions_are_exact_to_rounding_and_within_their_bound(digits, digits_run, capsys):
    images = digits.source.images.images["test"][:300]  # more than a batch
    result = inversion.reconstruct(digits, images, digits.config.evaluation, digits.config.seed)
    summary = result.summary
    assert result.trip.converged.all()
    assert (result.trip.euclidean_error <= result.trip.error_bound).all()
    assert result.refined.converged.all()
    assert (result.refined.euclidean_error <= result.refined.error_bound).all()
    assert result.refined.error_bound.max() < 1e-6 * result.trip.error_bound.max()
    assert 0 < result.refined.euclidean_error.max() < 1e-6 * result.trip.euclidean_error.max()
    assert summary.num_examples == 300
    assert summary.max_abs_error <= summary.max_euclidean_error <= summary.max_error_bound < 1e-4
    np.testing.assert_allclose(
        summary.max_grey_level_error, 17 * np.abs(result.originals - result.reconstructions).max(), rtol=EXACT_RTOL
    )
    assert 1 < summary.mean_evals < 200
    assert main(["reconstruct", "--workdir", str(digits_run[0]), "--num", "8"]) == 0
    assert capsys.readouterr().out.startswith("inverse: inverted; 8 of 8 test examples converged")
    assert (digits_run[0] / "reconstructions.png").read_bytes().startswith(b"\x89PNG")


# --- Lipschitz constants --------------------------------------------------------------------------------------------


def test_lipschitz_table_agrees_with_singular_values(toy, toy_run):
    named = load_named(toy_run / "checkpoints" / "best" / str(toy.step))
    certificate = lipschitz.measure(toy)
    assert [block.name for block in certificate.blocks] == ["stage0/block00", "stage0/block01"]
    for block in certificate.blocks:
        product = 1.0
        for layer, norms in block.layers.items():
            trained_norm = np.linalg.norm(named[f"ema/{block.name}/{layer}/kernel"].astype(np.float64), 2)
            stage, index = block.name.split("/block")
            deployed = np.linalg.norm(np.asarray(toy.weights[stage]["branch"][layer]["kernel"][int(index)], np.float64), 2)
            np.testing.assert_allclose(deployed, min(trained_norm, 0.9), rtol=NORM_RTOL)
            assert norms.estimate * (1 - 1e-6) <= deployed <= norms.bound <= norms.target == 0.9
            np.testing.assert_allclose([norms.estimate, norms.bound], deployed, rtol=NORM_RTOL)
            product *= deployed
        assert product <= block.bound <= block.target * (1 + 1e-6)
        np.testing.assert_allclose([block.estimate, block.bound], product, rtol=NORM_RTOL)
    assert certificate.certified
    assert certificate.max_block == max(block.bound for block in certificate.blocks) <= certificate.target * (1 + 1e-6)


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
    points = held_out(toy.source, toy.config.evaluation, toy.config.seed)
    values, (left, right, bottom, top) = likelihood.log_density_on_grid(toy, points, side=8)
    assert (left, bottom) == (-right, -top)
    centres = left + (np.arange(8) + 0.5) * (right - left) / 8
    point = jnp.asarray([[centres[5], centres[2]]], jnp.float32)
    expected = density.log_prob(toy.spec, toy.weights, toy.prior, point, jax.random.key(0)).log_prob[0]
    np.testing.assert_allclose(values[2, 5], expected, rtol=SAME_RTOL)
    assert abs(values[5, 2] - expected) > 1e-3


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
