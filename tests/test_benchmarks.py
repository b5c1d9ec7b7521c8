"""Benchmarks read their command lines, what they compare is right, and kept models give the
numbers of their reports.
"""

import importlib
import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from iresnet_jax.evaluation import classification, likelihood
from iresnet_jax.runs import trained_run

pytestmark = pytest.mark.slow

FOLDER = Path(__file__).parents[1] / "benchmarks"
PAGE = (FOLDER / "README.md").read_text(encoding="utf-8")
SCRIPTS = sorted(path.stem for path in FOLDER.glob("[!_]*.py"))


@pytest.fixture
def benchmark(monkeypatch):
    """A function that imports a script or a module beside it, as when it is run; nobody else
    finds them.
    """
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
    """The exact one under the first of the report's noises, which its check has compared with an
    estimate.
    """
    run, report = report_of("digits_density")
    settings = replace(run.config.evaluation, num_dequantisations=1)
    # so that no estimate checks it once more
    settings = replace(settings, logdet=replace(settings.logdet, kind="exact"))
    found = likelihood.measure(run.model, run.test_examples(), settings, run.config.seed)
    check = report["bits_per_dim"]["estimate"]
    assert found.mean == pytest.approx(check["mean"] - check["difference"], abs=1e-6)


def test_kept_toy_has_the_likelihood_of_its_report():
    run, report = report_of("toy_2d/moons")
    found = likelihood.measure(
        run.model, run.test_examples(), run.config.evaluation, run.config.seed
    )
    assert found.mean == pytest.approx(report["nll"]["mean"], abs=1e-5)


def test_kept_hybrid_makes_the_errors_of_its_report():
    run, report = report_of("digits_hybrid")
    found = classification.evaluate(
        run.model, run.test_examples(), run.data.labels["test"], batch_size=360
    )
    assert found.error == report["classification"]["error"]


# --- what is compared -----------------------------------------------------------------------------


def test_no_pixel_of_a_photograph_is_in_two_splits(benchmark):
    tables = benchmark("_tables")
    numbered = np.arange(2 * 427 * 640).reshape(2, 427, 640)
    parts = tables.cut(numbered, np.random.default_rng(0), tables.QUICK)
    assert [len(part) for part in parts] == list(tables.QUICK.values())
    assert sum(len(np.unique(part)) for part in parts) == len(np.unique(np.concatenate(parts)))


@pytest.mark.parametrize(
    ("values", "width"),
    [((1, 2, 2, 1), 1), ((0.3, 1.2, 5.5, 2.7), 0.1), ((1065, 1050, 735, 1480, 1285, 1547), 5)],
)
def test_noise_is_as_wide_as_the_grid_of_most_values(benchmark, values, width):
    assert benchmark("_tables").grid_width(np.array(values, float)) == pytest.approx(width)


def test_density_of_ridges_integrates_to_one(benchmark):
    x = 2 * np.random.default_rng(0).normal(size=(400_000, 6))
    log_proposal = -0.5 * (x**2 / 4 + np.log(8 * np.pi)).sum(axis=1)
    weights = np.exp(benchmark("_tables").Ridges.log_prob(x) - log_proposal)
    stderr = weights.std() / len(x) ** 0.5
    assert stderr < 0.06
    assert abs(weights.mean() - 1) < 5 * stderr


@pytest.mark.parametrize("values", [np.r_[np.repeat(0, 40), 1:31], np.linspace(0, 7, 29).round(1)])
def test_likelihoods_of_values_without_training_add_up_to_one(benchmark, values):
    untrained, series = benchmark("_untrained"), pd.Series(values)
    kind = untrained.Kind.of(series)
    places = kind.places(kind.numbers(series))
    marginal = untrained.Marginal(places, 0, np.random.default_rng(0))
    step = np.diff(kind.knots).min()
    every = kind.places(np.arange(-3000, 3000) * step)
    assert np.sum(np.exp(marginal.log_prob(every)) * every.unit) == pytest.approx(1, abs=1e-3)
