"""The script of the papers' figures: it draws, and its table has the numbers of the records."""

import importlib.util
import json

import pytest
from tiny_runs import ROOT

pytestmark = pytest.mark.slow

SPEC = importlib.util.spec_from_file_location("figures", ROOT / "docs" / "figures.py")
assert SPEC is not None
assert SPEC.loader is not None
figures = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(figures)


def test_figures_are_written_and_tables_have_the_numbers_of_records(tmp_path, capsys):
    figures.main(["coefficients", "tables", "--output", str(tmp_path)])
    assert "published" in (tmp_path / "coefficients.svg").read_text()
    report = json.loads((ROOT / "benchmarks/results/mnist_density/report.json").read_text())
    [row] = [
        line
        for line in capsys.readouterr().out.splitlines()
        if line.startswith("| mnist_density |")
    ]
    assert f"{report['bits_per_dim']['mean']:.3f} bits/dim" in row


def test_paths_of_the_invertible_network_do_not_cross():
    _, axes = figures.trajectories(num_blocks=4, steps=60).axes
    assert axes.get_title(loc="left") == "invertible: 0 crossings"
