"""Benchmarks read their command lines, and kept models give the numbers of their reports."""

import importlib
import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from iresnet_jax.evaluation import classification, likelihood
from iresnet_jax.runs import trained_run

pytestmark = pytest.mark.slow

FOLDER = Path(__file__).parents[1] / "benchmarks"
PAGE = (FOLDER / "README.md").read_text(encoding="utf-8")
SCRIPTS = sorted(path.stem for path in FOLDER.glob("[!_]*.py"))


@pytest.fixture
def benchmark(monkeypatch):
    """A function that imports a script, as when it is run."""
    monkeypatch.syspath_prepend(str(FOLDER))
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if Path(getattr(sys.modules[name], "__file__", None) or "").parent == FOLDER:
            del sys.modules[name]


@pytest.mark.parametrize("name", SCRIPTS)
def test_script_of_the_page_explains_its_options(benchmark, name, monkeypatch, capsys):
    [command] = re.findall(rf"^\| `python benchmarks/{name}\.py(.*?)` \|", PAGE, re.MULTILINE)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit) as ended:
        benchmark(name).main()
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    for option in ["--quick", "--output", *re.findall(r"--[\w-]+|\{.*\}", command)]:
        assert option in shown


def report_of(name):
    """A kept run, and its report."""
    folder = FOLDER / "results" / name
    return trained_run.load(folder), json.loads((folder / "report.json").read_text())


def test_kept_density_has_the_likelihood_of_its_report():
    """Under the first of the report's noises, which its check has compared."""
    run, report = report_of("digits_density")
    settings = replace(run.config.evaluation, num_dequantisations=1)
    # so that no estimate checks it once more
    settings = replace(settings, logdet=replace(settings.logdet, kind="exact"))
    found = likelihood.measure(run.model, run.test_data().x, settings, run.config.seed)
    check = report["bits_per_dim"]["estimate"]
    assert found.mean == pytest.approx(check["mean"] - check["difference"], abs=1e-6)


def test_kept_hybrid_makes_the_errors_of_its_report():
    run, report = report_of("digits_hybrid")
    found = classification.evaluate(
        run.model, run.test_data().x, run.data.labels["test"], batch_size=360
    )
    assert found.error == report["classification"]["error"]


# --- what is compared -----------------------------------------------------------------------------
