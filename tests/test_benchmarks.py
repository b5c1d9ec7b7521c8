"""Every benchmark script still imports what it uses and reads its command line; what they measure is not tested."""

import importlib
import sys
from pathlib import Path
from unittest import mock

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


def test_every_script_has_its_line_in_the_readme():
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert SCRIPTS
    assert [name for name in SCRIPTS if f"python benchmarks/{name}.py" not in readme] == []
