"""Figures at reduced size: the numbers behind each hold what the figure claims, and the command writes both."""

import csv

import jax
import kept
import numpy as np
import pytest
from tiny_runs import ROOT

from iresnet_jax import data
from iresnet_jax.__main__ import main
from iresnet_jax.branches.layers import LayerSpec
from iresnet_jax.figures import (
    catalogue,
    densities,
    inverses,
    latents,
    logdets,
    reconstructions,
    singular_values,
    tables,
    trajectories,
)
from iresnet_jax.figures.catalogue import FIGURES, RESULTS
from iresnet_jax.models.architecture import StageSpec

SIGMAS = 5  # standard errors that a mean may be off


def column(rows, name, /, **chosen):
    """A column of the rows that have the chosen values."""
    return np.array([row[name] for row in rows if all(row[key] == value for key, value in chosen.items())])


# --- numbers --------------------------------------------------------------------------------------------------------


def test_only_paths_of_the_ordinary_network_cross():
    figure, rows = trajectories.figure(num_blocks=12, num_steps=1000)
    assert trajectories.num_crossings(rows, "ordinary") > 0
    assert trajectories.num_crossings(rows, "invertible") == 0
    assert np.all(column(rows, "gap", network="invertible") >= column(rows, "least_gap", network="invertible") - 1e-6)
    start = column(rows, "start", network="invertible", blocks=12)
    for network in trajectories.NETWORKS:  # both fit the same maps, as well as their noise allows
        assert np.abs(column(rows, "position", network=network, blocks=6) - start**3).mean() < trajectories.NOISE
        assert np.abs(column(rows, "position", network=network, blocks=12) - start).mean() < trajectories.NOISE
    assert [axes.get_title(loc="left") for axes in figure.axes][1] == "invertible: 0 crossings"


def test_logdets_are_within_their_bounds_and_spread_as_the_root_of_the_probes():
    images, _ = kept.images(2)
    _, rows = logdets.figure(kept.model(kept.IMAGES), images, products=(2, 4), probes=(1, 4), num_examples=2, num_draws=40)
    for row in rows:
        assert abs(row["bias_nats"]) <= row["bound_nats"] + SIGMAS * row["bias_stderr_nats"]
        assert abs(row["mean_nats"] - row["exact_nats"]) <= row["bound_nats"] + SIGMAS * row["mean_stderr_nats"]
        if row["estimator"] == "roulette":
            assert abs(row["bias_nats"]) <= SIGMAS * row["bias_stderr_nats"]
    two, four = (column(rows, "bound_nats", estimator="series", products=n, probes=1) for n in (2, 4))
    assert four <= column(rows, "lipschitz_bound")[0] ** 2 * two
    for kind in logdets.KINDS:
        one, many = (column(rows, "spread_nats", estimator=kind, products=4, probes=p) for p in (1, 4))
        assert 0.3 < many / one < 0.8


def test_inverses_keep_their_rate():
    images, _ = kept.images(3)
    _, rows = inverses.figure(kept.model(kept.IMAGES), images, evaluations=(1, 2, 4, 8))
    for solver in inverses.MEMORIES:
        error = column(rows, "max_error", solver=solver)
        assert np.all(error <= column(rows, "rate_bound", solver=solver) + 1e-14)
        assert np.all(error <= column(rows, "posterior_bound", solver=solver))
        assert np.all(np.diff(error) < 0)
    assert column(rows, "max_error", solver="anderson")[-1] < column(rows, "max_error", solver="banach")[-1]


def test_singular_values_are_within_their_bounds():
    images, _ = kept.images(8)
    model = kept.model(kept.IMAGES)
    _, rows = singular_values.figure(model, images)
    for when in ("before", "after"):
        value, bound = column(rows, "singular_value", when=when), column(rows, "bound", when=when)
        assert np.all(value <= bound * (1 + 1e-6))
        assert np.all(bound <= model.spec.flow.coeff * (1 + 1e-6))
    assert np.any(column(rows, "singular_value", when="before") != column(rows, "singular_value", when="after"))


@pytest.mark.parametrize(("kernel_shape", "in_shape"), [((3, 2), (3,)), ((1, 1, 2, 3), (2, 2, 2)), ((3, 3, 1, 2), (3, 3, 1))])
def test_singular_values_are_those_of_the_matrix(kernel_shape, in_shape):
    layer = LayerSpec("layer", kernel_shape, in_shape, None)
    kernel = jax.random.normal(jax.random.key(0), kernel_shape)
    matrix = jax.jacobian(lambda x: layer.linear_map()(kernel, x[None])[0])(np.ones(in_shape, np.float32))
    dense = np.asarray(matrix, np.float64).reshape(-1, np.prod(in_shape))
    found = singular_values.singular_values(layer, kernel)
    np.testing.assert_allclose(found, np.linalg.svd(dense, compute_uv=False), rtol=1e-5, atol=1e-6)


def test_densities_are_not_below_the_entropy():
    fitted = densities.fit(("moons",), num_blocks=2, hidden=(8,), num_steps=40, batch_size=64)
    figure, [row] = densities.figure(fitted, num_test=500, side=48)
    assert row["nll_nats"] > row["entropy_nats"] - SIGMAS * row["stderr_nats"]
    assert row["mass"] <= 1.02  # the picture need not hold all of it
    assert row["lipschitz_bound"] < 1
    assert len([axes for axes in figure.axes if axes.images]) == 2


def test_reconstructions_need_the_constraint(tmp_path):
    digits = data.load(kept.write_data(tmp_path / "images.npz"))
    stages = (StageSpec(2, (4,), (3, 3)),)
    models = reconstructions.fit(digits, stages=stages, num_steps=3, batch_size=8)
    constrained = models[reconstructions.CONSTRAINED]
    models["broken"] = constrained.with_(weights=kept.uncertified(constrained.weights, 10.0))
    _, rows = reconstructions.figure(models, digits.examples["test"], digits.labels["test"])
    assert column(rows, "max_relative_error", model=reconstructions.CONSTRAINED).max() < 1e-4
    assert column(rows, "converged", model=reconstructions.CONSTRAINED).min() == 1
    assert column(rows, "lipschitz_bound", model=reconstructions.CONSTRAINED).max() < 1
    assert column(rows, "mean_relative_error", model="broken")[0] > 0.01
    assert [row["block"] for row in rows if row["model"] == "broken"] == ["stage0/block00", "stage0/block01"]


def test_lines_of_latents_end_at_the_images_and_nearest_images_are_nearest():
    (train, _), (test, _) = kept.images(12), kept.images(4, seed=1)
    settings = {"temperatures": (0.5, 1.0), "num_steps": 3, "num_samples": 4}
    figure, rows = latents.figure(kept.model(kept.IMAGES), train, test, **settings)
    for pair in (1, 2):
        for line in ("latents", "pixels"):
            assert column(rows, "distance", name=f"pair {pair}, {line}")[[0, -1]].tolist() == [0, 0]
    assert len(figure.axes) == 2 * latents.NUM_PAIRS + 3
    places, distances = latents.nearest_images(test, train, kept.LEVELS)
    differences = (test[:, None].astype(float) - train[None]).reshape(len(test), len(train), -1) / (kept.LEVELS - 1)
    of_all = np.linalg.norm(differences, axis=2)
    np.testing.assert_array_equal(places, of_all.argmin(axis=1))
    np.testing.assert_allclose(distances, of_all.min(axis=1), rtol=1e-12)


def test_tables_are_those_of_the_records():
    _, rows = tables.figure(RESULTS)
    value, low, high = (column(rows, name) for name in ("value", "low", "high"))
    assert np.all((low <= value) & (value <= high))
    assert column(rows, "value", table="digits_classification", model="c = 0.9")[0] == pytest.approx(100 * 11 / 1080)
    assert "1.06" in column(rows, "published", table="mnist_density")[0]


# --- the command ----------------------------------------------------------------------------------------------------


def test_the_command_writes_the_drawing_and_its_numbers(tmp_path, capsys):
    assert main(["figure", "tables", "--output", str(tmp_path)]) == 0
    assert "written" in capsys.readouterr().out
    svg = (tmp_path / "tables.svg").read_text()
    assert svg.startswith("<?xml")
    assert 'href="http' not in svg
    with (tmp_path / "tables.csv").open() as file:
        found = list(csv.DictReader(file))
    assert [float(row["value"]) for row in found] == [row["value"] for row in tables.figure(RESULTS).rows]


def test_the_command_lists_every_figure_and_the_docs_show_it(capsys):
    assert main(["figure", "--list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(FIGURES)
    page = (ROOT / "docs" / "figures.md").read_text()
    assert not [name for name in FIGURES if f"**`{name}`" not in page]


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        (["nothing"], "choose one of trajectories"),
        (["trajectories", "--workdir", "runs/mine"], "leave --workdir out"),
        (["tables", "--workdir", "nowhere"], "nowhere"),
    ],
)
def test_mistakes_are_answered(arguments, fragment, capsys):
    assert main(["figure", *arguments]) == 2
    assert fragment in capsys.readouterr().err


def test_figures_refuse_runs_of_other_models(tmp_path):
    folder = kept.folder(tmp_path / "points", kept.POINTS)
    for name, fragment in (("reconstructions", "no classifier"), ("latents", "images"), ("tables", "no report yet")):
        with pytest.raises(ValueError, match=fragment):
            catalogue.make(name, folder)
