"""Who may import whom: read from the syntax trees, and from what an import really loads."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import iresnet_jax

PACKAGE = Path(iresnet_jax.__file__).parent  # the checkout's or an installed one
ROOT = Path(__file__).parents[1]  # train.py and configs/ are never installed

# A module may import from the layers above its own in this list, never from its own layer or from below.
LAYERS = (
    ("rounding", "files", "anderson"),
    ("activations", "convolution", "gram", "fixed_point", "logdet", "reshape", "actnorm", "likelihood"),
    ("spectral", "embedding", "roulette", "krylov", "histogram"),
    ("certify",),
    ("branches", "residual"),
    ("constraint", "bijections"),
    ("flow",),
    ("model",),
    ("density", "classifier"),
    ("modules",),
    ("data",),
    ("training",),
    ("analysis",),
    ("__init__", "__main__"),
)
MATHS = {
    *("activations", "convolution", "gram", "spectral", "embedding", "certify"),
    *("anderson", "fixed_point", "logdet", "roulette", "krylov", "rounding"),
}
HEAVY = {"absl", "optax", "orbax", "tensorflow", "tensorflow_datasets", "matplotlib", "sklearn", "flax", "ml_collections"}


def sources():
    return sorted(PACKAGE.rglob("*.py"))


def name_of(path):
    """``iresnet_jax/data/feed.py`` belongs to ``data``, ``iresnet_jax/flow.py`` to ``flow``."""
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


def layer(name):
    found = [i for i, names in enumerate(LAYERS) if name in names]
    assert found, f"{name} has no place in LAYERS yet"
    return found[0]


def assert_points_up(name, source):
    for other in own_imports(source) - ({name} if name in ("data", "training", "analysis") else set()):
        assert layer(other) < layer(name), f"{name} must not import {other}"


def test_dependencies_point_one_way():
    for path in sources():
        assert_points_up(name_of(path), path.read_text())


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("spectral", "from iresnet_jax import certify"),
        ("logdet", "from iresnet_jax.spectral import spectral_norm"),
        ("flow", "import iresnet_jax.training.config"),
    ],
)
def test_a_wrong_dependency_is_rejected(name, line):
    with pytest.raises(AssertionError, match=f"{name} must not import"):
        assert_points_up(name, line)


def test_the_mathematics_imports_jax_and_nothing_of_upper_layers():
    allowed = {"jax", "jaxtyping", "numpy", "iresnet_jax"} | sys.stdlib_module_names
    for name in MATHS:
        source = (PACKAGE / f"{name}.py").read_text()
        assert packages_of(source) <= allowed, name
        assert own_imports(source) <= {
            *("rounding", "anderson"),
            *(("logdet",) if name in ("roulette", "krylov") else ("convolution", "gram", "embedding")),
        }, name


def files_with(predicate):
    return {str(path.relative_to(PACKAGE)) for path in sources() if predicate(path.read_text())}


def test_one_file_imports_flax():
    assert files_with(lambda source: "flax" in packages_of(source)) == {"modules.py"}


def test_one_file_mentions_pmap():
    assert files_with(lambda source: "pmap" in source) == {"training/parallel.py"}
    others = [ROOT / "train.py", *(ROOT / "configs").glob("*.py")]
    assert not [path for path in others if "pmap" in path.read_text()]


def test_config_objects_stay_above_the_mathematics_and_the_bijections():
    users = files_with(lambda source: "ml_collections" in packages_of(source))
    assert all(user.split("/")[0] in ("training", "analysis") for user in users), users


def test_importing_the_library_loads_jax_alone():
    program = "import sys, iresnet_jax; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    loaded = set(run.stdout.split())
    assert "jax" in loaded
    assert not loaded & HEAVY
