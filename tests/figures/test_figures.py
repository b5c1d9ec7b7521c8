"""Figures at reduced size: the numbers behind each hold what the figure claims, and the command writes both."""

import csv
import dataclasses
import re
import shutil

import jax
import kept
import numpy as np
import pytest
from tiny_runs import ROOT

from iresnet_jax.__main__ import main
from iresnet_jax.branches.layers import LayerSpec
from iresnet_jax.data.toys import TOYS
from iresnet_jax.figures import (
    densities,
    drawing,
    inverses,
    latents,
    logdets,
    reconstructions,
    singular_values,
    tables,
    trajectories,
)
from iresnet_jax.figures.blocks_of_models import loosest_block
from iresnet_jax.figures.catalogue import FIGURES
from iresnet_jax.models.architecture import FlowSpec, StageSpec
from iresnet_jax.models.density import Density
from iresnet_jax.models.density_spec import DensitySpec
from iresnet_jax.runs import trained_run
from iresnet_jax.runs.config import AugmentationConfig

SIGMAS = 5  # standard errors that a mean may be off
SIX = DensitySpec(FlowSpec((6,), (StageSpec(1, hidden=(8,)),)))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A run of a density of images."""
    parent = tmp_path_factory.mktemp("kept")
    return trained_run.load(kept.folder(parent / "images", kept.IMAGES, kept.write_data(parent / "images.npz")))


@pytest.fixture(scope="module")
def block():
    """A block of a density of vectors, at two examples."""
    with jax.enable_x64():
        return loosest_block(kept.model(SIX), np.random.default_rng(0).normal(size=(2, 6)))


def column(rows, name, /, **chosen):
    """A column of the rows that have the chosen values."""
    return np.array([row[name] for row in rows if all(row[key] == value for key, value in chosen.items())])


# --- numbers --------------------------------------------------------------------------------------------------------


def test_only_paths_of_the_ordinary_network_cross():
    rows = trajectories.measure(num_blocks=12, width=8, num_steps=400)
    assert np.all(column(rows, "gap", network="invertible") >= column(rows, "least_gap", network="invertible") - 1e-6)
    start = column(rows, "start", network="invertible", blocks=12)
    for network in trajectories.NETWORKS:  # both fit the same maps, as well as their noise allows
        assert np.abs(column(rows, "position", network=network, blocks=6) - start**3).mean() < trajectories.NOISE
        assert np.abs(column(rows, "position", network=network, blocks=12) - start).mean() < trajectories.NOISE
    ordinary, invertible, *_ = [axes.get_title(loc="left") for axes in trajectories.draw(rows).axes]
    assert re.fullmatch("ordinary: [1-9][0-9]* crossings?", ordinary)
    assert invertible == "invertible: 0 crossings"


def test_logdets_are_within_their_bounds_and_spread_as_the_root_of_the_probes(block):
    with jax.enable_x64():
        rows = logdets.measure(block, products=(2, 4), probes=(1, 4))
    assert len(logdets.draw(rows).axes) == 2
    for row in rows:
        if row["probes"] > 1:
            continue
        assert abs(row["bias_nats"]) <= row["bound_nats"] + SIGMAS * row["bias_stderr_nats"]
        assert abs(row["mean_nats"] - row["exact_nats"]) <= row["bound_nats"] + SIGMAS * row["mean_stderr_nats"]
        if row["estimator"] == "roulette":
            assert abs(row["bias_nats"]) <= SIGMAS * row["bias_stderr_nats"]
    two, four = (column(rows, "bound_nats", estimator="series", products=n, probes=1) for n in (2, 4))
    assert four <= column(rows, "lipschitz_bound")[0] ** 2 * two
    for kind in logdets.KINDS:
        one, many = (column(rows, "spread_nats", estimator=kind, products=4, probes=p) for p in (1, 4))
        assert 0.3 < many / one < 0.8


def test_inverses_keep_their_rate(block):
    with jax.enable_x64():
        rows = inverses.measure(block, evaluations=(1, 6))
    assert len(inverses.draw(rows).axes) == 1
    for solver in inverses.MEMORIES:
        error = column(rows, "max_error", solver=solver)
        assert np.all(error <= column(rows, "rate_bound", solver=solver) + 1e-14)
        assert np.all(error <= column(rows, "posterior_bound", solver=solver))
        assert np.all(np.diff(error) < 0)
    banach, anderson = (column(rows, "max_error", solver=solver)[-1] for solver in inverses.MEMORIES)
    assert anderson < banach


def test_singular_values_are_within_their_bounds(images):
    transformed = dataclasses.replace(images.config, augmentation=AugmentationConfig(transformations=("left",)))
    _, rows = singular_values.figure(dataclasses.replace(images, config=transformed))  # a model that was given its context
    for when in ("before", "after"):
        value, bound = column(rows, "singular_value", when=when), column(rows, "bound", when=when)
        assert np.all(value <= bound * (1 + 1e-6))
        assert np.all(bound <= images.model.spec.flow.coeff * (1 + 1e-6))
    assert np.any(column(rows, "singular_value", when="before") != column(rows, "singular_value", when="after"))
    with pytest.raises(ValueError, match="no record of its training"):
        singular_values.figure(dataclasses.replace(images, fingerprint=""))


@pytest.mark.parametrize(("kernel_shape", "in_shape"), [((1, 1, 2, 3), (2, 2, 2)), ((3, 3, 1, 2), (3, 3, 1))])
def test_singular_values_are_those_of_the_matrix(kernel_shape, in_shape):
    layer, kernel = LayerSpec("layer", kernel_shape, in_shape, None), jax.random.normal(jax.random.key(0), kernel_shape)
    matrix = jax.jit(jax.jacobian(lambda x: layer.linear_map()(kernel, x[None])[0]))(np.ones(in_shape, np.float32))
    dense = np.asarray(matrix, np.float64).reshape(-1, np.prod(in_shape))
    found = singular_values.singular_values(layer, kernel)
    np.testing.assert_allclose(found, np.linalg.svd(dense, compute_uv=False), rtol=1e-5, atol=1e-6)


def test_densities_are_beside_the_entropy():
    model = kept.model(kept.POINTS)
    assert isinstance(model, Density)
    figure, [row] = densities.drawing_of([(TOYS["moons"], model)], num_test=500, side=48)
    assert row["nll_nats"] - row["entropy_nats"] == pytest.approx(row["divergence_nats"], abs=SIGMAS * row["stderr_nats"])
    assert 0.5 < row["mass"] <= 1.02  # the picture need not hold all of it
    assert row["lipschitz_bound"] < 1
    assert len([axes for axes in figure.axes if axes.images]) == 2


def test_reconstructions_need_the_constraint(images):
    models = reconstructions.fit(images.data, stages=(StageSpec(1, (2,), (1, 1)),), num_steps=2, batch_size=8)
    constrained, free = models[reconstructions.CONSTRAINED], models[reconstructions.FREE]
    models[reconstructions.FREE] = free.with_(weights=kept.uncertified(free.weights, 30.0))  # as long training leaves it
    figure, rows = reconstructions.drawing_of(models, images.test_examples(), images.data.labels["test"])
    assert len(figure.axes) == 4
    assert constrained.spec.constrained
    assert not free.spec.constrained
    for name, is_small in ((reconstructions.CONSTRAINED, True), (reconstructions.FREE, False)):
        [row] = [row for row in rows if row["model"] == name]
        assert row["block"] == "stage0/block00"
        assert (row["mean_relative_error"] < 1e-4) == is_small
        assert (row["converged"] == 1) == is_small


def test_lines_of_latents_end_at_the_images_and_nearest_images_are_nearest(images):
    figure, rows = latents.figure(images)
    for pair in (1, 2):
        for line in ("latents", "pixels"):
            assert column(rows, "distance", name=f"pair {pair}, {line}")[[0, -1]].tolist() == [0, 0]
    assert len(figure.axes) == 2 * latents.NUM_PAIRS + len(latents.TEMPERATURES) + 1
    (train, _), (test, _) = kept.images(12), kept.images(4, seed=1)
    places, distances = latents.nearest_images(test, train, kept.LEVELS)
    differences = (test[:, None].astype(float) - train[None]).reshape(len(test), len(train), -1) / (kept.LEVELS - 1)
    of_all = np.linalg.norm(differences, axis=2)
    np.testing.assert_array_equal(places, of_all.argmin(axis=1))
    np.testing.assert_allclose(distances, of_all.min(axis=1), rtol=1e-12)


# --- the command ----------------------------------------------------------------------------------------------------


def test_the_command_writes_the_tables_of_the_records_and_of_a_run_without_its_data(images, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(trained_run.Run, "with_data_checked", None)
    own = shutil.copytree(images.folder, tmp_path / "mine")
    run = dataclasses.replace(images, folder=own, notes=("Another checkpoint.",))
    monkeypatch.setattr(trained_run, "load", lambda folder: run)
    shutil.copy(tables.RESULTS / "digits_classification" / "report.json", own)
    assert main(["figure", "tables", "--workdir", str(own), "--output", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert told.startswith("Another checkpoint.")
    assert "written" in told
    svg = (tmp_path / "tables.svg").read_text()
    assert svg.startswith("<?xml")
    assert 'href="http' not in svg
    assert "Residual Flow 0.97" in svg
    [width], [place] = re.findall(r'width="([\d.]+)pt"', svg), re.findall(r'x="([\d.]+)"[^>]*>published<', svg)[:1]
    assert float(place) > (tables.COLUMNS[-1] - 0.02) * float(width)  # long cells do not squeeze the columns
    with (tmp_path / "tables.csv").open() as file:
        rows = list(csv.DictReader(file))
    value, low, high = (column(rows, name).astype(float) for name in ("value", "low", "high"))
    assert np.all((low <= value) & (value <= high))
    assert column(rows, "value", table="digits_classification", model="c = 0.9").astype(float) == pytest.approx(100 * 11 / 1080)
    assert column(rows, "value", table="mine").astype(float) == pytest.approx(100 * 4 / 360)
    assert "1.06" in column(rows, "published", table="mnist_density")[0]


def test_pictures_in_an_svg_keep_their_scale():
    written = '<image x="1.2345" transform="matrix(2.15625 0 0 -2.15625 3.0 152.25)"/><path d="M 10.123 4.567"/>'
    expected = '<image x="1.2" transform="matrix(2.15625 0 0 -2.15625 3.0 152.25)"/><path d="M 10.1 4.5"/>'
    assert drawing.smaller(written) == expected


def test_the_command_lists_every_figure_and_the_docs_show_it(capsys):
    assert main(["figure", "--list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(FIGURES)
    page = (ROOT / "docs" / "figures.md").read_text()
    assert not [name for name in FIGURES if f"**`{name}`" not in page or f"(figures/{name}.svg)" not in page]
    sizes = [path.stat().st_size for path in (ROOT / "docs" / "figures").glob("*.svg")]
    assert sum(sizes) < 400_000


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        ([], "choose one of trajectories"),
        (["nothing"], "choose one of trajectories"),
        (["tables", "--workdir", "nowhere"], "nowhere"),
        (["tables", "--data", "digits"], "leave --data out"),
    ],
)
def test_mistakes_are_answered(arguments, fragment, capsys):
    assert main(["figure", *arguments]) == 2
    assert fragment in capsys.readouterr().err


def test_a_missing_matplotlib_is_named(monkeypatch, capsys):
    monkeypatch.setattr("iresnet_jax.figures.catalogue.find_spec", lambda name: None)
    assert main(["figure", "tables"]) == 2
    assert "pip install" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "fragment"),
    [
        ("trajectories", "leave --workdir out"),
        ("densities", "no density of a 2-D toy"),
        ("reconstructions", "no classifier"),
        ("tables", "no report yet"),
    ],
)
def test_runs_that_a_figure_cannot_show_are_refused(name, fragment, images, capsys):
    assert main(["figure", name, "--workdir", str(images.folder)]) == 2
    assert fragment in capsys.readouterr().err
