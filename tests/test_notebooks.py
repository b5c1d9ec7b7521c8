"""The notebooks run from top to bottom."""

import json
import re

import matplotlib as mpl
import pytest
from runs import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def code_of(path):
    """The code cells as one program, with short trainings."""
    cells = json.loads(path.read_text())["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    return re.sub(r"NUM_STEPS := \d+", "NUM_STEPS := 60", code)


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, monkeypatch, capsys):
    monkeypatch.chdir(path.parent)
    mpl.use("Agg")
    exec(compile(code_of(path), str(path), "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out
