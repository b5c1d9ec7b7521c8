"""Errors of reconstructions, and perturbations against the dense Jacobian of the inverse and against a wrong bound."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import tiny_runs as runs

from iresnet_jax.__main__ import main
from iresnet_jax.evaluation import inverse_problem
from iresnet_jax.runs import trained_run


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return runs.trained(tmp_path_factory, "reconstructor")


@pytest.fixture(scope="module")
def run(workdir):
    return trained_run.load(workdir)


@pytest.fixture(scope="module")
def evaluated(run):
    return inverse_problem.evaluate_run(run)


def test_errors_are_those_of_the_definition(run, evaluated):
    summary, found = evaluated
    x = run.test_examples() / 16
    np.testing.assert_allclose(found.x, x, atol=1e-6)
    own, _ = jax.jit(lambda m, y: m.reconstruct(y))(run.model, found.y)
    np.testing.assert_allclose(found.found, own, atol=1e-5)
    errors = np.sqrt(((own - x) ** 2).sum(axis=(1, 2, 3)) / (x**2).sum(axis=(1, 2, 3)))
    assert summary.relative_error == pytest.approx(errors.mean(), rel=1e-4)
    assert summary.stderr == pytest.approx(errors.std(ddof=1) / np.sqrt(360), rel=1e-4)
    psnr = -10 * np.log10(((own - x) ** 2).mean(axis=(1, 2, 3)))
    assert summary.psnr == pytest.approx(psnr.mean(), rel=1e-4)


def test_no_error_exceeds_its_bound_and_one_that_did_would_be_named(evaluated):
    summary, _ = evaluated
    assert summary.fraction_within_bound == summary.fraction_converged == 1
    assert summary.largest_amplification_of_noise < summary.largest_amplification <= summary.certified_amplification
    assert summary.warnings() == []
    wrong = dataclasses.replace(summary, fraction_within_bound=0.75, fraction_converged=0.5)
    first, second = wrong.warnings()
    assert str(wrong).splitlines()[-2:] == [first, second]
    assert first.startswith("25 % of the reconstructions exceed their certified bound")
    assert second.startswith("The inverse did not converge for 50 % of the measurements")


def test_the_worst_direction_is_that_of_the_dense_jacobian(run, evaluated):
    y = evaluated[1].y[: inverse_problem.NUM_PERTURBED]  # as many as `evaluated` has compiled the search for
    found = inverse_problem.perturb(run.model, y, 0.05, run.model.noise_amplification, 0)

    @jax.jit
    def of_operator(model, y):  # whose Jacobian is the inverse of that of the inverse
        x, _ = model.invert(y)
        return jax.vmap(jax.jacfwd(lambda x: model.measure(x[None])[0].ravel()))(x)

    jacobian = np.asarray(of_operator(run.model, y[:3]), np.float64).reshape(3, 64, 64)
    largest = 1 / np.linalg.norm(jacobian, ord=-2, axis=(1, 2))
    # power iteration of 20 steps, perturbations of finite size
    np.testing.assert_allclose(found.adversarial[:3], largest, rtol=0.03)
    assert (found.random < found.adversarial).all()
    too_small = 0.9 * float(found.adversarial.min())
    assert not np.any(inverse_problem._perturb(run.model, y, 0.05, too_small, jax.random.key(0)).within_bound)


def test_command_and_report_say_the_same(workdir, run, evaluated, capsys, monkeypatch):
    summary, _ = evaluated
    runs.shorten_reports(monkeypatch, drawn=True)  # whose figures are few
    assert main(["report", "--workdir", str(workdir)]) == 0
    said = capsys.readouterr().out
    assert f"relative error {summary.relative_error:.4f} ± {summary.stderr:.4f}" in said
    report = json.loads((workdir / "report.json").read_text())
    assert report["inverse_problem"]["relative_error"] == pytest.approx(summary.relative_error, rel=1e-5)
    assert report["warnings"] == []
    html = (workdir / "report.html").read_text()
    assert "Amplification of noise" in html
    assert "Reconstruction from measurements" in html
    assert "://" not in html.replace("http://www.w3.org", "")  # its figures are drawn, and need nothing from elsewhere
    assert main(["evaluate", "--workdir", str(workdir)]) == 0
    assert capsys.readouterr().out.strip() == str(summary)


def test_what_a_reconstructor_cannot_do_is_said_in_a_sentence(workdir, run, capsys):
    assert main(["sample", "--workdir", str(workdir)]) == 2
    assert "holds no density" in capsys.readouterr().err
