"""The notebooks run from top to bottom; own_data.ipynb does in test_docs.py."""

import json
import re

import kept
import matplotlib as mpl
import pytest
from tiny_runs import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SHORTER = {  # what makes a notebook long, and what the test runs instead
    r"NUM_STEPS := \d+": "NUM_STEPS := 10",
    r"(digits\.\w+\[[^]]*\])": r"\1[:40]",
    r"\b(num_blocks\W+)\d+": r"\g<1>1",
    r"\b(hidden\W+)\d+, \d+\)": r"\g<1>8,)",
    r"\bz\[:32\]": "z[:4]",
    r"steps = \[1, 2, 5, 10, 50\]": "steps = [50]",
    r"products = \(2, 4, 6\)": "products = (4,)",
    r'root / "benchmarks/results/digits_hybrid"': "SMALL_HYBRID",
}


def cells_of(path):
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def code_of(path):
    """The code cells as one program, with short trainings."""
    code = "\n".join(
        "".join(cell["source"]) for cell in cells_of(path) if cell["cell_type"] == "code"
    )
    for long, short in SHORTER.items():
        code = re.sub(long, short, code)
    return code


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_kept_without_outputs(path):
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells_of(path))


@pytest.mark.slow
@pytest.mark.parametrize(
    "path", [path for path in NOTEBOOKS if path.stem != "own_data"], ids=lambda path: path.stem
)
def test_notebook_runs(path, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(path.parent)
    mpl.use("Agg")
    small = kept.model(kept.TEN_DIGITS).save(tmp_path / "model.npz")
    exec(compile(code_of(path), str(path), "exec"), {"__name__": "__main__", "SMALL_HYBRID": small})
    assert capsys.readouterr().out
