"""Who may import whom: read from the syntax trees, and from what an import really loads."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import iresnet_jax

PACKAGE = Path(iresnet_jax.__file__).parent  # the checkout's or an installed one
ROOT = Path(__file__).parents[1]  # train.py and configs/ are never installed

# A folder's files may import those of folders further up in this list, and of their own.
FOLDERS = ("maths", "branches", "bijections", "models", "certification", "data", "training", "runs", "evaluation", "report")
# Files beside the folders: how files are written whole and dataclasses become JSON is for everyone, the others may import all.
FOR_EVERYONE, EDGES = ("atomic_files", "json_dataclasses"), ("__init__", "__main__", "commands", "estimators", "fitting")
HEAVY = {"absl", "optax", "orbax", "tensorflow", "tensorflow_datasets", "matplotlib", "sklearn", "flax", "ml_collections"}


def sources():
    return sorted(PACKAGE.rglob("*.py"))


def folder_of(path):
    """``iresnet_jax/data/feed.py`` belongs to ``data``, ``iresnet_jax/atomic_files.py`` to ``atomic_files``."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(source):
    """Dotted names of everything that is imported, anywhere in the file."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the layer"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def packages_of(source):
    return {name.split(".")[0] for name in imported(source)}


def own_imports(source):
    return {name.split(".")[1] for name in imported(source) if name.startswith("iresnet_jax.")}


def assert_points_up(folder, source):
    if folder in EDGES:
        return
    assert folder in (*FOLDERS, *FOR_EVERYONE), f"{folder} has no place in FOLDERS yet"
    allowed = {*FOR_EVERYONE, *FOLDERS[: FOLDERS.index(folder) + 1 if folder in FOLDERS else 0]}
    for other in own_imports(source):
        assert other in allowed, f"{folder} must not import {other}"


def test_dependencies_point_one_way():
    for path in sources():
        assert_points_up(folder_of(path), path.read_text())


@pytest.mark.parametrize(
    ("folder", "line"),
    [
        ("maths", "from iresnet_jax.bijections import residual"),
        ("bijections", "from iresnet_jax import models"),
        ("models", "import iresnet_jax.runs.config"),
        ("evaluation", "from iresnet_jax.report import plots"),
        ("atomic_files", "from iresnet_jax.maths.enclosures.upward_rounding import at_least"),
    ],
)
def test_a_wrong_dependency_is_rejected(folder, line):
    with pytest.raises(AssertionError, match=f"{folder} must not import"):
        assert_points_up(folder, line)


def test_the_mathematics_imports_jax_alone():
    allowed = {"jax", "jaxtyping", "numpy", "iresnet_jax"} | sys.stdlib_module_names
    for path in (PACKAGE / "maths").rglob("*.py"):
        assert packages_of(path.read_text()) <= allowed, path.name


def files_with(predicate):
    return {str(path.relative_to(PACKAGE)) for path in sources() if predicate(path.read_text())}


def test_one_file_imports_flax():
    assert files_with(lambda source: "flax" in packages_of(source)) == {"models/linen.py"}


def test_one_file_mentions_pmap():
    assert files_with(lambda source: "pmap" in source) == {"training/parallel.py"}
    others = [ROOT / "train.py", *(ROOT / "configs").glob("*.py")]
    assert not [path for path in others if "pmap" in path.read_text()]


def test_config_objects_stay_above_the_mathematics_and_the_bijections():
    users = files_with(lambda source: "ml_collections" in packages_of(source))
    assert all(user.split("/")[0] in ("training", "evaluation") for user in users), users


def test_importing_the_library_loads_jax_alone():
    program = "import sys, iresnet_jax; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    loaded = set(run.stdout.split())
    assert "jax" in loaded
    assert not loaded & HEAVY
