"""README, docs/ and a notebook: code runs, commands parse, numbers are those of records."""

import itertools
import json
import os
import pkgutil
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from importlib import metadata
from typing import NamedTuple

import kept
import numpy as np
import pandas
import pytest
import tiny_runs as runs
from tiny_runs import ROOT

from iresnet_jax.__main__ import make_parser
from iresnet_jax.runs.config import parse_train_flags

FILES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md")),
    *(ROOT / folder / "README.md" for folder in ("benchmarks", "configs")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
PAGES = {path.relative_to(ROOT).as_posix(): path for path in FILES}
README = PAGES["README.md"].read_text(encoding="utf-8")
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
MODEL = "benchmarks/results/digits_hybrid/model.npz"  # read by a block


# absl reads config files so.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")


class Block(NamedTuple):
    """Code between fences, and its first line in the file."""

    language: str
    code: str
    line: int


def blocks(text):
    """All blocks of code of a page."""
    found = re.finditer(r"^```(\w*)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    return [Block(match[1], match[2], text[: match.start(2)].count("\n") + 1) for match in found]


def blocks_of(language):
    """Pages with blocks of a language, for parametrize."""
    texts = {name: path.read_text(encoding="utf-8") for name, path in PAGES.items()}
    return {
        name: found
        for name, text in texts.items()
        if (found := [b for b in blocks(text) if b.language == language])
    }


OWN_DATA = "notebooks/own_data.ipynb"  # whose calls of `fit` are those of the pages


def cells(path):
    """The cells of a notebook as blocks, which a traceback tells by the number of the cell."""
    found = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [
        Block("python", "".join(cell["source"]), i)
        for i, cell in enumerate(found, 1)
        if cell["cell_type"] == "code"
    ]


@pytest.fixture(scope="module")
def failures(tmp_path_factory):
    """What fails by page, run in the folder of a reader."""
    folder = tmp_path_factory.mktemp("reader")
    draw = np.random.default_rng(0)
    np.save(folder / "my_array.npy", draw.normal(size=(256, 2)))
    np.save(folder / "my_images.npy", draw.integers(0, 16, size=(60, 8, 8, 1)))
    np.save(folder / "my_labels.npy", np.arange(60) % 3)
    columns = {
        "age": np.arange(60) % 50 + 20,
        "smoker": np.arange(60) % 3 == 0,
        "city": ["Bern", "Oslo"] * 30,
        "share": draw.random(60),
    }
    pandas.DataFrame(columns).to_csv(folder / "my_table.csv", index=False)
    (folder / MODEL).parents[1].mkdir(parents=True)
    kept.folder((folder / MODEL).parent, kept.TEN_DIGITS, "digits")

    pages, path = blocks_of("python") | {OWN_DATA: cells(ROOT / OWN_DATA)}, folder / "blocks.json"
    numbered = {page: [(each.line, each.code) for each in found] for page, found in pages.items()}
    path.write_text(json.dumps(numbered))
    flags = os.environ["XLA_FLAGS"].replace("device_count=2", "device_count=1")
    environment = {**runs.environment(), "XLA_FLAGS": flags}
    command = [sys.executable, str(ROOT / "tests" / "page_blocks.py"), str(path)]
    subprocess.run(command, cwd=folder, env=environment, check=True, timeout=300)
    return json.loads(path.read_text())


@pytest.mark.slow
@pytest.mark.parametrize("page", [*blocks_of("python"), OWN_DATA])
def test_python_blocks_run(failures, page):
    assert failures[page] is None, failures[page]


@pytest.mark.parametrize("page", PAGES)
def test_code_fits_a_narrow_page(page):
    for block in blocks(PAGES[page].read_text(encoding="utf-8")):
        for number, line in enumerate(block.code.splitlines(), block.line):
            assert len(line) <= 80, f"line {number} of {page} has {len(line)} columns"


def test_the_tables_of_settings_are_those_of_the_code():
    found = runpy.run_path(str(ROOT / "docs" / "settings.py"))
    assert found["PAGE"].read_text("utf-8") == found["page"](), "run python docs/settings.py"


def test_every_module_is_on_one_page_of_the_reference():
    package = ROOT / "iresnet_jax"
    modules = [
        ".".join(path.relative_to(package).with_suffix("").parts)
        for path in package.rglob("*.py")
        if not path.stem.startswith("__")
    ]
    texts = [path.read_text("utf-8") for path in (ROOT / "docs" / "reference").glob("*.md")]
    lists = re.findall(r"<!-- modules:(.*?)-->", "\n".join(texts), re.DOTALL)
    beside = ["load", "certification", "data"]
    named = sorted(" ".join(lists).split())
    assert named == sorted([*modules, *beside]), "name each module on one page of docs/reference/"


def test_every_name_of_the_package_exists():
    pages = "\n".join(path.read_text() for path in PAGES.values())
    names = re.findall(r"`(iresnet_jax(?:\.\w+)+)`", pages)
    assert names
    for name in names:
        pkgutil.resolve_name(name)


def commands(text):
    """All commands of a page, in blocks and between backticks, as lists of words."""
    code = [block.code for block in blocks(text) if block.language == "sh"]
    lines = "\n".join(code).replace("\\\n", " ").splitlines()
    for line in [*lines, *re.findall(r"`((?:pip|python|pytest|mkdocs) [^`\n]+)`", text)]:
        words = shlex.split(line, comments=True)
        starts = [-1, *(i for i, word in enumerate(words) if word == "&&"), len(words)]
        for before, after in itertools.pairwise(starts):
            if command := words[before + 1 : after]:
                yield command


def check_command(command):
    """Raises unless a command names what there is, with options that it has."""
    match command:
        case ["pip", "install", "-e", *packages] | ["pip", "install", *packages]:
            for package in packages:
                name, _, extras = package.rstrip("]").partition("[")
                known = EXTRAS if name == "." else metadata.metadata(name).get_all("Provides-Extra")
                assert set(extras.split(",") if extras else ()) <= set(known), (
                    f"{name} has no extra {extras}"
                )
        case ["python", "train.py", *_]:
            parse_train_flags(command[1:])
        case ["python", "-m", "iresnet_jax", "plan", *options]:
            _, rest = make_parser().parse_known_args(["plan", *options])
            parse_train_flags(["plan", *rest])
        case ["python", "-m", "iresnet_jax", *options]:
            if options not in ([], ["COMMAND"]):
                make_parser().parse_args(options)
        case ["python", "-m", "build"]:
            assert any(package.startswith("build>") for package in EXTRAS["test"])
        case ["python", script, *_]:
            assert (ROOT / script).is_file(), f"there is no {script}"
        case ["pytest", *words]:
            paths = [word for word in words if not word.startswith("-")]
            assert all((ROOT / path).exists() for path in paths), f"there is not all of {paths}"
        case ["mkdocs", "serve" | "build", *_]:
            assert any(package.startswith("mkdocs>") for package in EXTRAS["docs"])
        case _:
            raise AssertionError(f"a page gives a command that nobody checks: {command}")


@pytest.mark.parametrize("page", blocks_of("sh"))
def test_commands_parse(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    found = list(commands(PAGES[page].read_text(encoding="utf-8")))
    assert found
    for command in found:
        check_command(command)


README_ROWS = {
    "MNIST density, 28 x 28": "mnist_density_variational",
    "the same, padded and copied to 32 x 32 x 3 as in the paper": "mnist_density_padded",
    "MNIST classes": "mnist_classification_muon",
    "CIFAR-10 density, JPEG copies": "cifar10_density",
    "digits, density and classes": "digits_hybrid",
    "BSDS300 patches, density": "bsds300",
}


def numbers(report):
    """The results of a report as pages write them."""
    of_likelihoods = {"bits_per_dim": ("mean", "stderr"), "nll": ("mean", "entropy_floor")}
    found = [
        report[kind][name]
        for kind, names in of_likelihoods.items()
        if kind in report
        for name in names
    ]
    weighted = report.get("bits_per_dim", {}).get("importance")
    written = [
        f"{value:.3f}"
        for value in (*found, *([weighted["mean"]] if weighted else []))
        if value is not None
    ]
    if "classification" in report:
        found = report["classification"]
        written += [f"{100 * value:.2f}" for value in (found["error"], *found["interval"])]
    return [number.removeprefix("0") for number in written]


def assert_row_agrees(row, folder):
    report = json.loads((ROOT / "benchmarks/results" / folder / "report.json").read_text())
    for number in numbers(report):
        assert re.search(rf"(?<![\d.]){re.escape(number)}(?!\d)", row), (
            f"{folder} has {number}, the row is {row}"
        )


def test_results_are_those_of_the_records():
    rows = re.findall(
        r"^(\|.*\((?:\S*)benchmarks/results/(\S+)/report\.json\).*)$",
        PAGES["docs/results.md"].read_text(),
        re.MULTILINE,
    )
    assert rows
    for row, folder in rows:
        assert_row_agrees(row, folder)
        assert_time_agrees(row, folder)


def assert_time_agrees(row, folder):
    """The first time in a row is that of the training, to the digits that are written."""
    seconds = json.loads((ROOT / "benchmarks/results" / folder / "report.json").read_text())[
        "train"
    ]["total_seconds"]
    if found := re.search(r"\| (\d+(?:\.(\d+))?) (min|s)\b", row):
        number, decimals, unit = found.groups()
        last_digit = (60 if unit == "min" else 1) * 10.0 ** -len(decimals or "")
        written = float(number) * (60 if unit == "min" else 1)
        assert abs(seconds - written) <= last_digit / 2, (
            f"{folder} took {seconds:.0f} s, the row is {row}"
        )


def test_largest_errors_of_reconstructions_are_those_of_the_linked_sweeps():
    page = PAGES["docs/results.md"].read_text()
    rows = re.findall(r"^(\|.*/(lipschitz_sweep_\w+\.json).*)$", page, re.MULTILINE)
    assert rows
    for row, record in rows:
        results = json.loads((ROOT / "benchmarks/results" / record).read_text())["results"]
        of_variant = [run["inverse"]["banach"] for run in results if run["variant"] == "0.9"]
        largest = f"{max(errors['max_error'] for errors in of_variant):.1e}".replace("e-0", "e-")
        assert largest in row, f"{record} has {largest}, the row is {row}"


def test_the_readme_has_the_results_of_the_records():
    rows = {
        row.split("|")[1].strip(): row
        for row in README.split("\n## Results\n")[1].splitlines()
        if row.startswith("|")
    }
    for name, folder in README_ROWS.items():
        assert_row_agrees(rows[name], folder)


def links(text):
    """Files that a page links to or shows."""
    found = re.findall(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"", text)
    return [
        target.split("#")[0]
        for pair in found
        for target in pair
        if target and not re.match(r"https?:|#", target)
    ]


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files(page):
    path = PAGES[page]
    for target in links(path.read_text(encoding="utf-8")):
        assert (path.parent / target).exists(), f"{page} links to {target}"


def test_the_citation_has_the_version_of_the_package():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
