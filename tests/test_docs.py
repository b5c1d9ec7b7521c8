"""The README and the pages of docs/: their code runs, their commands parse, their numbers are those of the records."""

import itertools
import json
import os
import pkgutil
import re
import shlex
import subprocess
import sys
import tomllib
from importlib import metadata
from typing import NamedTuple

import kept
import numpy as np
import pytest
import tiny_runs as runs
from tiny_runs import ROOT

from iresnet_jax.__main__ import make_parser
from iresnet_jax.report.page import MINUS
from iresnet_jax.runs.command_line import parse_train_flags

FILES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = {path.relative_to(ROOT).as_posix(): path for path in FILES}
README = PAGES["README.md"].read_text(encoding="utf-8")
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
MODEL = "benchmarks/results/digits_hybrid/model.npz"  # read by a block
SECTIONS = (
    "Install",
    "A first model",
    "How it works",
    "Training from a config",
    "Results",
    "What is guaranteed",
    "Commands",
    "Map",
    "Limits",
    "Citation",
)


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
    return {name: found for name, text in texts.items() if (found := [b for b in blocks(text) if b.language == language])}


def test_blocks_are_found_with_their_lines():
    text = "a\n```sh\nls\n```\n\n```python\nx = 1\ny = 2\n```\n"
    assert blocks(text) == [
        Block("sh", "ls\n", 3),
        Block("python", "x = 1\ny = 2\n", 7),
    ]
    assert {block.language for path in PAGES.values() for block in blocks(path.read_text())} == {
        "python",
        "sh",
        "text",
        "bash",
        "yaml",
        "bibtex",
    }


# --- Python ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run_pages(tmp_path_factory):
    """A function that runs blocks by page in the folder of a reader, and gives what failed by page."""
    folder = tmp_path_factory.mktemp("reader")
    draw = np.random.default_rng(0)
    np.save(folder / "my_array.npy", draw.normal(size=(200, 2)))
    np.save(folder / "my_images.npy", draw.integers(0, 16, size=(60, 8, 8, 1)))
    np.save(folder / "my_labels.npy", np.arange(60) % 3)
    (folder / MODEL).parent.mkdir(parents=True)
    kept.model(kept.TEN_DIGITS).save(folder / MODEL)

    def run(pages):
        path = folder / "blocks.json"
        path.write_text(json.dumps({name: [(block.line, block.code) for block in found] for name, found in pages.items()}))
        flags = os.environ["XLA_FLAGS"].replace("device_count=2", "device_count=1")
        environment = {**runs.environment(), "XLA_FLAGS": flags}
        command = [sys.executable, str(ROOT / "tests" / "page_blocks.py"), str(path)]
        subprocess.run(command, cwd=folder, env=environment, check=True, timeout=300)
        return json.loads(path.read_text())

    return run


@pytest.fixture(scope="module")
def failures(run_pages):
    broken = [Block("python", "import iresnet_jax as ir\n\nir.no_such_function()\n", 10)]
    return run_pages({**blocks_of("python"), "broken.md": broken})


@pytest.mark.parametrize("page", blocks_of("python"))
def test_python_blocks_run(failures, page):
    assert failures[page] is None, failures[page]


def test_a_block_that_fails_is_named(failures):
    assert 'File "broken.md", line 12' in failures["broken.md"]
    assert "no_such_function" in failures["broken.md"]


def test_every_name_of_the_package_exists():
    names = {name for path in PAGES.values() for name in re.findall(r"`(iresnet_jax(?:\.\w+)+)`", path.read_text())}
    assert len(names) > 30
    for name in names:
        pkgutil.resolve_name(name)


# --- commands -------------------------------------------------------------------------------------------------------


def commands(text):
    """All commands of a page, in blocks and between backticks, as lists of words."""
    lines = [line for block in blocks(text) if block.language == "sh" for line in block.code.splitlines()]
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
                assert set(extras.split(",") if extras else ()) <= set(known), f"{name} has no extra {extras}"
        case ["python", "train.py", *_]:
            parse_train_flags(command[1:], default_config="configs/digits_density.py")
        case ["python", "-m", "iresnet_jax", "plan" | "profile" as name, *options]:
            _, rest = make_parser().parse_known_args([name, *options])
            parse_train_flags([name, *rest], default_config="configs/digits_density.py")
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


@pytest.mark.parametrize(
    "line",
    [
        "pip install '.[trian]'",
        "pip install 'jax[cuda0]'",
        "python train.py --config=configs/no_such.py",
        "python train.py --config.model.coef=0.9",
        "python train.py --config.model.coeff=1.5",
        "python -m iresnet_jax evalute --workdir runs/x",
        "python -m iresnet_jax plan --topology=v5e:2x2 --config.training.batchsize=3",
        "python -m iresnet_jax profile --config.training.batchsize=3",
        "python -m iresnet_jax sample --workdir runs/x --nun 3",
        "pytest tests/no_such",
        "make docs",
    ],
)
def test_a_wrong_command_is_noticed(line, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    with pytest.raises((AssertionError, ValueError, SystemExit)):
        check_command(shlex.split(line))


# --- numbers and links ----------------------------------------------------------------------------------------------


def numbers(report):
    """The results of a report as pages write them."""
    written = []
    for kind in ("bits_per_dim", "nll"):
        if kind in report:
            written.append(report[kind]["mean"])
            written += [report[kind]["stderr"]] if kind == "bits_per_dim" else [report[kind]["entropy_floor"]]
    written = [f"{value:.3f}" for value in written]
    if "classification" in report:
        found = report["classification"]
        written += [f"{100 * value:.2f}" for value in (found["error"], *found["interval"])]
    return [number.removeprefix("0") for number in written]


def assert_row_agrees(row, folder):
    report = json.loads((ROOT / "benchmarks/results" / folder / "report.json").read_text())
    for number in numbers(report):
        assert re.search(rf"(?<![\d.]){re.escape(number)}(?!\d)", row), f"{folder} has {number}, the row is {row}"


def test_results_are_those_of_the_records():
    rows = re.findall(
        r"^(\|.*\((?:\S*)benchmarks/results/(\S+)/report\.json\).*)$", PAGES["docs/results.md"].read_text(), re.MULTILINE
    )
    assert len(rows) == len(list((ROOT / "benchmarks/results").rglob("report.json")))
    for row, folder in rows:
        assert_row_agrees(row, folder)
    with pytest.raises(AssertionError, match=r"mnist_density has 1\.090"):
        assert_row_agrees("| MNIST | 1.080 ± .003 |", "mnist_density")


README_ROWS = {
    "MNIST density, 28 x 28": "mnist_density",
    "MNIST classes": "mnist_classification",
    "Fashion-MNIST density": "fashion_mnist_density",
    "digits, density and classes": "digits_hybrid",
    "moons, density": "toy_2d/moons",
}


def test_the_readme_has_the_results_of_the_records():
    section = README.split("\n## Results\n")[1].split("\n## ")[0]
    rows = {row.split("|")[1].strip(): row for row in section.splitlines() if row.startswith("|")}
    assert [name for name in rows if name not in ("data", "---")] == list(README_ROWS)
    for name, folder in README_ROWS.items():
        assert_row_agrees(rows[name].replace("toy_2d/", ""), folder)


DENSITIES = {
    "iresnet_jax": "ours",
    "flowjax": "flowjax",
    "normflows": "normflows",
    "mixture": "gmm",
    "kernel density": "kde",
    "truth": "truth",
}


def test_the_table_of_vectors_is_that_of_the_record():
    record = json.loads((ROOT / "benchmarks/results/tabular.json").read_text())
    expected = {(line["data"], line["model"]): line["log_prob"] for line in record["results"]["summary"]}
    section = PAGES["docs/results.md"].read_text().split("\n## Vectors\n")[1].split("\n## ")[0]
    header, _, *rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("|")]
    assert [cell.strip() for cell in header] == ["data", "dimensions", *DENSITIES]
    assert {row[0].strip() for row in rows} == {data for data, _ in expected}
    for row in rows:
        for model, cell in zip(DENSITIES.values(), row[2:], strict=True):
            found = expected.get((row[0].strip(), model))
            assert cell.strip() == (in_cell(found) if found else "")


def test_the_table_of_plans_is_that_of_the_record():
    made = json.loads((ROOT / "benchmarks/results/plans.json").read_text())["results"]
    section = PAGES["docs/clusters.md"].read_text().split("\n## A plan before")[1].split("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line.startswith("|")]
    assert rows[2:] == [plan_row(one) for one in made]
    paper = next(one for one in made if (one["config"], one["topology"]) == ("iresnet_density:cifar10", "v5e:4x8"))
    assert paper["compile_seconds"] <= 180


def plan_row(made):
    """The cells of a plan, as the page has them."""
    share = f"{made['batch_size'] // made['num_devices']}"
    share += f", at most {made['largest_share']}" if made["largest_share"] else ""
    megabytes = [made["argument_bytes"], made["temporary_bytes"], sum(made["reductions"])]
    state, on_the_way, reduced = ("" if size is None else f"{size / 1e6:.0f}" for size in megabytes)
    costs = [
        f"{made['flops_per_example'] / 1e9:.3g}",
        f"{len(made['reductions'])}: {reduced}",
        f"{1 / made['step_seconds']:.0f}",
        f"{made['compile_seconds']:.0f}",
    ]
    name = f"{made['config']}, {made['topology']}"
    return [name, "no" if made["problem"] else "yes", share, f"{made['num_parameters']:,}", state, on_the_way, *costs]


def in_cell(found):
    """A log-likelihood with the larger of its errors."""
    error = max(found["stderr_examples"], found["stderr_seeds"])
    return f"{found['mean']:.2f} ± {error:.2f}".replace("-", MINUS)


def test_the_table_of_posteriors_is_that_of_the_record():
    results = json.loads((ROOT / "benchmarks/results/posterior.json").read_text())["results"]
    section = PAGES["docs/results.md"].read_text().split("\n## Posteriors\n")[1].split("\n## ")[0]
    _, _, *rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line.startswith("|")
    ]
    assert [row[0] for row in rows] == list(results)
    for name, divergence, *others in rows:
        found = results[name]
        assert divergence == f"{found['divergence']:.4f} ± {found['stderr']:.4f}"
        c2st = [f"{found['mean_c2st']:.3f}", f"{max(found['c2st']):.3f}", str(len(found["c2st"]))]
        assert others == [*c2st, f"{found['training_seconds'] / 60:.1f}"]


def test_the_tables_of_inverse_problems_are_those_of_the_records():
    section = PAGES["docs/inverse-problems.md"].read_text().split("\n## Measured\n")[1].split("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line.startswith("|")]
    folder = ROOT / "benchmarks/results"
    expected = []
    for record in map(read_json, sorted(folder.glob("inverse_problem_*.json"))):
        name = record["settings"]["config"]["data"]["name"]
        expected += [inverse_problem_row(name, noise, found) for noise, found in record["results"].items()]
    by_lipschitz = []
    for trained, file in (("inverse", "inverse_problem_digits.json"), ("operator", "forward_share1_digits.json")):
        for noise, found in read_json(folder / file)["results"].items():
            errors = [f"{own['relative_error']:.3f}".replace("0.", ".") for own in found["lipschitz"].values()]
            by_lipschitz.append([f"{trained}, {100 * float(noise):g} %", *errors])
    assert rows[2 : 2 + len(expected)] == expected
    assert rows[2 + len(expected) + 2 :] == by_lipschitz


def read_json(path):
    return json.loads(path.read_text())


def inverse_problem_row(name, noise, found):
    """The cells of the network that is best on validation beside the other methods, as the page has them."""
    best = found["best"]["lipschitz"]
    own = found["lipschitz"][str(best)]
    errors = [found["tikhonov"], found["total_variation"], own, found["vanilla"]]
    written = [f"{one['relative_error']:.3f} ± {one['stderr']:.3f}".replace("0.", ".") for one in errors]
    amplified = [f"{one['largest_amplification']:.1f}" for one in (own, found["vanilla"])]
    return [f"{name}, {100 * float(noise):g} %", *written, f"{best:g}", f"{own['certified_amplification']:.1f}", *amplified]


def links(text):
    """Files that a page links to or shows."""
    found = re.findall(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"", text)
    return [target.split("#")[0] for pair in found for target in pair if target and not re.match(r"https?:|#", target)]


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files(page):
    path = PAGES[page]
    for target in links(path.read_text(encoding="utf-8")):
        assert (path.parent / target).exists(), f"{page} links to {target}"


def test_the_readme_is_short_and_in_order():
    assert len(README.split()) <= 900
    assert tuple(re.findall(r"^## (.+)$", README, re.MULTILINE)) == SECTIONS
    shell = "".join(block.code for block in blocks(README) if block.language == "sh")
    for promise in ("pip install '.[train]' && python train.py", "pip install '.[test]' && pytest"):
        assert promise in shell
    [picture] = [target for target in links(README) if target.endswith(".png")]
    assert (ROOT / picture).stat().st_size < 300_000


def test_the_citation_has_the_version_of_the_package():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
