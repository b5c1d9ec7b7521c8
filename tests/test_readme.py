"""Every function and test that `README.md` names exists, and `pytest` runs these tests."""

import ast
import functools
import importlib
import re
from pathlib import Path

HERE = Path(__file__).parent
ROWS = [
    line
    for line in (HERE / "README.md").read_text(encoding="utf-8").splitlines()
    if line.startswith("| ")
]


def named_tests(cell):
    """Pairs of file and test; a name that begins with ``::`` is in the file before it."""
    file = ""
    for named, test in re.findall(r"`([\w/.]*)::(\w+)`", cell):
        file = named or file
        yield file, test


def find(name):
    """The object at ``folder.module.attribute`` of the package."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            module = importlib.import_module(".".join(["iresnet_jax", *parts[:end]]))
        except ModuleNotFoundError:
            continue
        return functools.reduce(getattr, parts[end:], module)
    raise AttributeError(name)


@functools.cache
def quick_tests(file):
    """Names of the tests of a file that are not marked slow."""
    body = ast.parse((HERE / file).read_text(encoding="utf-8")).body
    if any(ast.unparse(node) == "pytestmark = pytest.mark.slow" for node in body):
        return frozenset()
    return frozenset(
        node.name
        for node in body
        if isinstance(node, ast.FunctionDef)
        and "pytest.mark.slow" not in map(ast.unparse, node.decorator_list)
    )


def cells(row):
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]]


def test_every_name_exists():
    num_tests = 0
    for _, function, oracle, test in map(cells, ROWS[1:]):
        if not test:
            continue
        assert oracle, test
        for name in re.findall(r"`([\w.]+)`", function):
            find(name)
        named = list(named_tests(test))
        assert named, test
        for file, name in named:
            assert name in quick_tests(file), f"{file} has no {name}, or it is slow"
        num_tests += len(named)
    assert num_tests > 50
