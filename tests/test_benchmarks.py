"""Every benchmark script still imports what it uses and reads its command line; what they measure is not tested."""

import importlib
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"
SCRIPTS = sorted(path.stem for path in FOLDER.glob("[!_]*.py"))
NOT_INSTALLED = ("normflows", "torch")  # the extra `bench`


@pytest.fixture
def in_folder(monkeypatch):
    """Scripts find the modules beside them, as when they are run, and nobody else does."""
    monkeypatch.syspath_prepend(str(FOLDER))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if Path(getattr(sys.modules[name], "__file__", None) or "").parent == FOLDER:
            del sys.modules[name]


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.usefixtures("in_folder")
def test_script_explains_its_options(name, monkeypatch, capsys):
    if name == "density_comparison":
        for package in NOT_INSTALLED:
            monkeypatch.setitem(sys.modules, package, mock.MagicMock())
    script = importlib.import_module(name)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit) as ended:
        script.main()
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert "--quick" in shown
    assert "--output" in shown


@pytest.mark.usefixtures("in_folder")
def test_no_pixel_of_a_photograph_is_in_two_splits():
    tables = importlib.import_module("_tables")
    numbered = np.arange(2 * 427 * 640).reshape(2, 427, 640)
    parts = tables.cut(numbered, np.random.default_rng(0), tables.PATCHES)
    assert [len(part) for part in parts] == list(tables.PATCHES)
    assert sum(len(np.unique(part)) for part in parts) == len(np.unique(np.concatenate(parts)))


@pytest.mark.usefixtures("in_folder")
def test_noise_is_as_wide_as_the_grid_of_most_values():
    tables = importlib.import_module("_tables")
    assert tables.grid_width(np.array([1.0, 2, 2, 1])) == pytest.approx(1)
    assert tables.grid_width(np.array([0.3, 1.2, 5.5, 2.7])) == pytest.approx(0.1)
    assert tables.grid_width(np.array([1065.0, 1050, 735, 1480, 1285, 1547])) == pytest.approx(5)
    ages = np.repeat(np.arange(20.0, 60.0), 5)[:, None]
    noisy = tables.dequantized(ages, np.random.default_rng(0), [])
    assert 0.45 < np.abs(noisy - ages).max() < 0.5


@pytest.mark.usefixtures("in_folder")
def test_density_of_ridges_integrates_to_one():
    ridges = importlib.import_module("_tables").Ridges
    x = 2 * np.random.default_rng(0).normal(size=(400_000, 6))
    log_proposal = -0.5 * (x**2 / 4 + np.log(8 * np.pi)).sum(axis=1)
    weights = np.exp(ridges.log_prob(x) - log_proposal)
    stderr = weights.std() / len(x) ** 0.5
    assert stderr < 0.06
    assert abs(weights.mean() - 1) < 5 * stderr


def test_every_script_has_its_line_in_the_readme():
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert SCRIPTS
    assert [name for name in SCRIPTS if f"python benchmarks/{name}.py" not in readme] == []
