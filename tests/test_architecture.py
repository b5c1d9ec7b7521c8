"""Who may import whom: read from the syntax trees, and from what an import really loads."""

import ast
import functools
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

import iresnet_jax

PACKAGE = Path(iresnet_jax.__file__).parent  # the checkout's or an installed one
ROOT = Path(__file__).parents[1]  # train.py and configs/ are never installed

# A folder's files may import those of folders further up in this list, and of their own: the
# library, then the application.
FOLDERS = "maths branches bijections models certification training data runs evaluation".split()
# Files beside the folders: how files are written whole and dataclasses become JSON is for everyone,
# the others may import all.
FOR_EVERYONE = ("arguments", "storage", "pytrees")
EDGES = """__init__ __main__ adapters conversion conversion_stages energies
estimators fit_settings fitting losses starts""".split()
HEAVY = set(
    """absl optax orbax tensorflow tensorflow_datasets matplotlib sklearn flax ml_collections
    pydantic numpyro blackjax""".split()
)
PLACES = {
    "flax": {"models/linen.py"},
    "numpyro": {"adapters.py"},
    "blackjax": {"energies.py"},
}


def sources():
    return sorted(PACKAGE.rglob("*.py"))


def module_of(path):
    """``iresnet_jax/data/feed.py`` is ``iresnet_jax.data.feed``."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def folder_of(module):
    """``iresnet_jax.data.feed`` belongs to ``data``, the package to ``__init__``."""
    return (*module.split("."), "__init__")[1]


@functools.cache
def imported(source):
    """Dotted names of everything that is imported, anywhere in the file, functions included."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the layer"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(names)


def packages_of(source):
    return {name.split(".")[0] for name in imported(source)}


def graph():
    """The modules of the package that each module imports."""
    files = {module_of(path): path.read_text() for path in sources()}

    def module(name):
        return name if name in files else name.rpartition(".")[0]

    return {
        own: {module(name) for name in imported(text)} & files.keys() - {own}
        for own, text in files.items()
    }


def test_dependencies_point_one_way_and_form_no_circle():
    for module, others in graph().items():
        folder = folder_of(module)
        if folder in EDGES:
            continue
        assert folder in (*FOLDERS, *FOR_EVERYONE), f"{folder} has no place in FOLDERS yet"
        above = FOLDERS[: FOLDERS.index(folder) + 1] if folder in FOLDERS else []
        for other in others:
            assert folder_of(other) in (*FOR_EVERYONE, *above), f"{module} must not import {other}"
    list(graphlib.TopologicalSorter(graph()).static_order())  # raises, and names the circle


def test_the_mathematics_imports_jax_and_what_jax_needs():
    allowed = {"jax", "jaxtyping", "numpy", "scipy", "iresnet_jax"} | sys.stdlib_module_names
    for path in (PACKAGE / "maths").rglob("*.py"):
        assert packages_of(path.read_text()) <= allowed, path.name


def files_with(predicate):
    return {str(path.relative_to(PACKAGE)) for path in sources() if predicate(path.read_text())}


def test_other_packages_stay_in_their_files():
    users = {
        package: files_with(lambda source, own=package: own in packages_of(source))
        for package in PLACES
    }
    assert users == PLACES
    assert not [
        module for module, others in graph().items() if "iresnet_jax.models.linen" in others
    ]
    configs = files_with(lambda source: "ml_collections" in packages_of(source))
    assert all(user.startswith("runs/") for user in configs), configs


@pytest.mark.slow
def test_heavy_packages_are_loaded_where_they_are_needed():
    show = "print('loaded', *sorted({name.split('.')[0] for name in sys.modules}))"
    loads = "iresnet_jax", "iresnet_jax.runs.metrics", "iresnet_jax.__main__"
    program = "\n".join(["import sys", *(f"import {load}\n{show}" for load in loads)])
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT
    )
    shown = [line.split() for line in run.stdout.splitlines() if line.startswith("loaded")]
    of_library, of_metrics, of_commands = map(set, shown)
    assert "jax" in of_library
    assert not of_library & HEAVY
    assert not of_metrics & {"tensorboardX", "tqdm", "tensorflow"}
    needed = {"absl", "ml_collections", "optax", "pydantic"}
    assert not of_commands & HEAVY - needed
