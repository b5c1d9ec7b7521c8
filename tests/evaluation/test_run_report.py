"""Training ends with a report: every result as strict JSON, and a page that needs nothing else."""

import json

import pytest
import tiny_runs as runs

import iresnet_jax as ir

pytestmark = pytest.mark.slow


def test_training_ends_with_a_report_of_images(tmp_path, capsys, monkeypatch):
    workdir, config_file = tmp_path / "run", tmp_path / "config.py"
    config_file.write_text(runs.HYBRID_CONFIG)
    runs.shorten_reports(monkeypatch)
    assert runs.train_main(f"--config={config_file}", f"--workdir={workdir}") == 0
    said = capsys.readouterr().out.strip()

    def no_constant(name):
        raise AssertionError(f"{name} is not JSON")

    content = json.loads((workdir / "report.json").read_text(), parse_constant=no_constant)
    assert content["train"]["steps"] <= content["train"]["total_steps"] == 8
    assert min(content["train"][name] for name in ("compile_seconds", "seconds_per_step")) > 0
    assert content["inverse"]["fraction_converged"] == 1
    assert content["environment"]["devices"] == "2 x cpu"
    assert ir.load(workdir / "model.npz").certificate().certified
    config = json.loads((workdir / "config.json").read_text())
    del config["format"]
    assert content["config"] == config
    assert content["warnings"] == []
    bits = content["bits_per_dim"]
    assert (bits["num_examples"], bits["estimator"]) == (360, "exact log-determinant")
    assert said.startswith(f"test: {bits['mean']:.4f} ± {bits['stderr']:.4f} bits/dim")
    assert "by the variational mean" in (workdir / "report.html").read_text()
    assert content["noise_lipschitz"]["certified"]
    assert "inverse: inverted; 360 of 360" in said
    assert said.endswith(f"model: {workdir}/model.npz\nreport: {workdir}/report.html")
    page = (workdir / "report.html").read_text()
    # Curves, samples, confusion, mistakes, samples by class, reconstructions.
    assert page.count("data:image/") == 6
    assert "://" not in page  # it needs nothing from elsewhere
    assert not list(workdir.glob("*.incoming"))
