"""Every benchmark script still imports what it uses and reads its command line; what they measure is not tested."""

import importlib
import os
import sys
import warnings
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import kept
import numpy as np
import pytest

from iresnet_jax.data.measurements import Measurement
from iresnet_jax.models.architecture import FlowSpec, StageSpec
from iresnet_jax.models.density import Density, DensitySpec

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


@pytest.fixture
def torch():
    """PyTorch and normflows, of the extra `bench`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of their imports
        pytest.importorskip("normflows")
        return pytest.importorskip("torch")


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


@pytest.mark.usefixtures("in_folder")
def test_no_pixel_of_a_photograph_is_in_two_splits():
    tables = importlib.import_module("_tables")
    numbered = np.arange(2 * 427 * 640).reshape(2, 427, 640)
    parts = tables.cut(numbered, np.random.default_rng(0), tables.PATCHES)
    assert [len(part) for part in parts] == list(tables.PATCHES)
    assert sum(len(np.unique(part)) for part in parts) == len(np.unique(np.concatenate(parts)))


@pytest.mark.usefixtures("in_folder")
def test_noise_is_as_wide_as_the_grid_of_most_values():
    tables = importlib.import_module("_tables")
    assert tables.grid_width(np.array([1.0, 2, 2, 1])) == pytest.approx(1)
    assert tables.grid_width(np.array([0.3, 1.2, 5.5, 2.7])) == pytest.approx(0.1)
    assert tables.grid_width(np.array([1065.0, 1050, 735, 1480, 1285, 1547])) == pytest.approx(5)
    ages = np.repeat(np.arange(20.0, 60.0), 5)[:, None]
    noisy = tables.dequantized(ages, np.random.default_rng(0), [])
    assert 0.45 < np.abs(noisy - ages).max() < 0.5


@pytest.mark.usefixtures("in_folder")
def test_density_of_ridges_integrates_to_one():
    ridges = importlib.import_module("_tables").Ridges
    x = 2 * np.random.default_rng(0).normal(size=(400_000, 6))
    log_proposal = -0.5 * (x**2 / 4 + np.log(8 * np.pi)).sum(axis=1)
    weights = np.exp(ridges.log_prob(x) - log_proposal)
    stderr = weights.std() / len(x) ** 0.5
    assert stderr < 0.06
    assert abs(weights.mean() - 1) < 5 * stderr


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system pins no processes")
@pytest.mark.usefixtures("in_folder")
def test_worker_answers_in_its_process_and_tells_why_it_ended(tmp_path):
    processes = importlib.import_module("_peers_processes")
    (tmp_path / "doubling.py").write_text(
        "import os\n"
        "class Doubling:\n"
        "    def __init__(self, number):\n"
        "        print('noise of a library')\n"
        "        self.number = number\n"
        "    def times(self, factor):\n"
        "        return [factor * self.number, os.getpid(), sorted(os.sched_getaffinity(0))]\n"
    )
    cores = processes.core_counts()[1]
    with processes.workers() as start:
        worker = start(cores, "doubling", "Doubling", {"number": 21}, {"PYTHONPATH": str(tmp_path)})
        answer, process, used = worker.ask("times", factor=2)
        assert answer == 42
        assert process != os.getpid()
        assert used == cores
        with pytest.raises(RuntimeError, match="unsupported operand"):
            worker.ask("times", factor=None)


@pytest.mark.usefixtures("in_folder")
def test_inverses_are_tuned_to_the_first_tolerance_that_reaches_the_error():
    inverse = importlib.import_module("_peers_inverse")

    class Halving:
        """A worker whose error is half of its tolerance, at least .01, from more and more evaluations."""

        def ask(self, method, tolerance=None, **_):
            if method == "invert":
                self.tolerance = tolerance
                return 1.0
            return {"largest": max(self.tolerance / 2, 0.01), "evals": 1 / self.tolerance}

    settings = [{"tolerance": 10.0**-k} for k in range(1, 6)]
    found, tried = inverse.first_that_reaches(Halving(), settings, 0.03)
    assert found == {"tolerance": 0.01}
    assert [each["largest"] for each in tried] == [0.05, 0.01]
    found, tried = inverse.first_that_reaches(Halving(), settings, 0.001, gives_up=lambda found: found["evals"] > 500)
    assert found is None
    assert len(tried) == 3


@pytest.mark.usefixtures("in_folder")
def test_turns_end_early_but_not_before_three():
    processes = importlib.import_module("_peers_processes")
    timings = processes.take_turns({"slow": lambda num: 5.0}, turns=9, seconds_a_turn=1.0, most_seconds=0)
    assert timings["slow"].seconds == (5.0, 5.0, 5.0)


@pytest.mark.usefixtures("in_folder", "torch")
def test_pytorch_flow_with_weights_of_ours_is_the_same_function(tmp_path):
    cases, fixed = (importlib.import_module(name) for name in ("_peers_cases", "_peers_fixed"))
    convolutional = StageSpec(2, (6,), (3, 3), "clipswish", squeeze=2, positional_bias=True)
    spec = FlowSpec((8, 8, 1), (convolutional, StageSpec(1, (5, 3), (3, 1, 3), "elu"), StageSpec(1, (7,), None, "lipswish")))
    rng, weights = np.random.default_rng(0), {}
    for stage in spec.layout:
        branch = stage.branch.initial_weights(jax.random.key(0))
        channels, blocks = stage.branch.in_shape[-1], stage.spec.num_blocks
        scale = {name: jnp.zeros(channels) for name in ("bias", "log_scale")}
        weights[stage.name] = jax.tree.map(
            lambda leaf, blocks=blocks: jnp.asarray(0.3 * rng.normal(size=(blocks, *leaf.shape)), jnp.float32),
            {"actnorm": scale, "branch": branch},
        ) | {"lipschitz": jnp.full(blocks, 0.9)}
    model = Density(DensitySpec(spec), weights, {})
    x = rng.normal(size=(3, 8, 8, 1))
    z = model.flow().forward(jnp.asarray(x, jnp.float32))
    cases.write_arrays(model, x, z, tmp_path / "arrays.npz")
    theirs = fixed.Normflows(cases.architecture(model.spec), tmp_path / "arrays.npz", threads=1)
    assert max(theirs.check().values()) < 1e-5


@pytest.mark.usefixtures("in_folder")
def test_our_inverses_are_shared_by_devices_in_both_precisions(tmp_path):
    cases, fixed = (importlib.import_module(name) for name in ("_peers_cases", "_peers_fixed"))
    model, z = kept.model(kept.POINTS), np.random.default_rng(0).normal(size=(3, 2)).astype(np.float32)
    cases.write_arrays(model, cases.exact_inverse(model, z), z, tmp_path / "arrays.npz")
    ours = fixed.Ours(model.save(tmp_path / "model.npz"), tmp_path / "arrays.npz")
    for atol, refine in ((1e-6, False), (1e-9, True)):
        assert ours.invert(1, atol, refine) > 0
        found = ours.error()
        assert found["euclidean"] < 10 * atol
        assert found["converged"] == 1


@pytest.mark.usefixtures("in_folder")
def test_naive_series_has_value_and_gradient_of_its_terms(torch):
    naive = importlib.import_module("_peers_torch").NaiveResidual
    net = torch.nn.Linear(5, 5, bias=False).double()
    x, matrix = torch.zeros(2, 5, dtype=torch.float64), 0.2 * net.weight.detach().numpy()
    net.weight.data.mul_(0.2)
    torch.manual_seed(0)
    _, log_det = naive(net, 4).inverse(x)
    log_det.sum().backward()
    torch.manual_seed(0)
    v = torch.randn_like(x).numpy()
    powers = [np.linalg.matrix_power(matrix, k) for k in range(5)]
    series = sum((-1) ** (k + 1) / k * powers[k] for k in range(1, 5))
    np.testing.assert_allclose(log_det.detach().numpy(), np.einsum("bi,ij,bj->b", v, series, v), rtol=1e-10)
    gradient = sum(  # of sum_b v^T J^k v
        (-1) ** (k + 1) / k * powers[i].T @ (v.T @ v) @ powers[k - 1 - i].T for k in range(1, 5) for i in range(k)
    )
    np.testing.assert_allclose(net.weight.grad.numpy(), gradient, rtol=1e-10)


def test_every_script_has_its_line_in_the_readme():
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert SCRIPTS
    assert [name for name in SCRIPTS if f"python benchmarks/{name}.py" not in readme] == []


@pytest.fixture
def variational(in_folder):
    """Reconstructions without learning, with images, measurements and eigenvalues of a problem of 6 x 7 pixels."""
    module = importlib.import_module("_variational")
    rng = np.random.default_rng(0)
    spectra, x = module.Spectra.of(6, 7, 0.8), np.zeros((2, 6, 7))
    x[:, 2:5, 1:4] = 0.9
    return module, spectra, x, spectra.apply(spectra.blur, x) + 0.05 * rng.normal(size=x.shape)


def test_spectra_are_those_of_the_blur_and_of_the_laplacian(variational):
    module, spectra, x, _ = variational
    blurred = Measurement(0.8, 0.0).exact(jnp.asarray(x[..., None], jnp.float32))[..., 0]
    np.testing.assert_allclose(spectra.apply(spectra.blur, x), blurred, atol=1e-6)
    p = np.random.default_rng(1).normal(size=(2, *x.shape))
    assert (module.gradient(x) * p).sum() == pytest.approx((x * module.gradient_transposed(p)).sum())
    np.testing.assert_allclose(module.gradient_transposed(module.gradient(x)), spectra.apply(spectra.laplacian, x), atol=1e-12)


def test_tikhonov_solves_its_normal_equations(variational):
    module, spectra, _, y = variational
    bright = 0.5 + 0.1 * y  # so that the projection changes nothing
    for penalty, quadratic in (("norm", np.ones_like(spectra.laplacian)), ("gradient", spectra.laplacian)):
        found = module.tikhonov(spectra, bright, 0.1, penalty)
        slope = spectra.apply(spectra.blur, spectra.apply(spectra.blur, found) - bright) + 0.1 * spectra.apply(quadratic, found)
        np.testing.assert_allclose(slope, 0, atol=1e-12)


@pytest.mark.parametrize("weight", [1e-4, 3e-3, 0.1])
def test_no_image_fits_with_less_total_variation(variational, weight):
    module, spectra, x, y = variational
    found = module.minimize_total_variation(spectra, y, weight, num_steps=4000)
    least, rng = module.objective(spectra, found, y, weight), np.random.default_rng(2)
    assert (found >= 0).all()
    assert (found <= 1).all()
    others = [x, np.clip(y, 0, 1), np.full_like(y, 0.3)]
    others += [np.clip(found + size * rng.normal(size=y.shape), 0, 1) for size in np.repeat([1e-1, 1e-2, 1e-3], 50)]
    others += [found + share * (other - found) for share in (1e-2, 1e-3) for other in others]  # the problem is convex
    for other in others:
        assert (module.objective(spectra, other, y, weight) >= least * (1 - 1e-5)).all()


def test_total_variation_agrees_with_scikit_image(variational):
    pytest.importorskip("skimage")
    module, spectra, _, y = variational
    ours = module.minimize_total_variation(spectra, y, 3e-3, num_steps=2000)
    theirs = module.by_scikit_image(spectra, y, 3e-3)
    np.testing.assert_allclose(ours, theirs, atol=2e-3)
