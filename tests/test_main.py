"""The commands, on folders that hold a model: results, exit statuses, mistakes."""

import shutil

import kept
import numpy as np
import pytest
from certified_flows import times

from iresnet_jax.__main__ import main
from iresnet_jax.evaluation import round_trips
from iresnet_jax.runs import trained_run as run

PNG = b"\x89PNG"


@pytest.fixture(scope="module")
def data_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "images.npz"
    kept.write_data(path)
    return path


@pytest.fixture(scope="module")
def folders(tmp_path_factory, data_file):
    """The folders of a hybrid and a classifier of images, and of a density of points."""
    parent = tmp_path_factory.mktemp("kept")
    models = {
        "hybrid": (kept.HYBRID, f"npz:{data_file}"),
        "classifier": (kept.CLASSIFIER, f"npz:{data_file}"),
    }
    models |= {"points": (kept.POINTS, "moons"), "given": (kept.GIVEN, "moons")}
    return {name: kept.folder(parent / name, *model) for name, model in models.items()}


@pytest.fixture
def copied(folders, tmp_path):
    return {name: shutil.copytree(folder, tmp_path / name) for name, folder in folders.items()}


def said(capsys, command, folder, *options, status=0):
    """What a command prints."""
    assert main([command, "--workdir", str(folder), *options]) == status
    out, err = capsys.readouterr()
    assert err == ""
    return out


def answer(capsys, *arguments):
    """The one line that a failing command leaves on stderr."""
    status = main(list(map(str, arguments)))
    out, err = capsys.readouterr()
    assert status == 2
    assert out == ""
    [line] = err.splitlines()
    assert line.startswith("error: ")
    return line


def test_evaluate_says_the_likelihood_and_the_error(folders, capsys):
    lines = said(capsys, "evaluate", folders["hybrid"]).splitlines()
    assert [line.partition(":")[0] for line in lines] == ["test", "test error"]
    assert "bits/dim" in lines[0]
    assert "exact log-determinant" in lines[0]
    assert "of 25 examples" in lines[1]
    assert said(capsys, "evaluate", folders["classifier"]).startswith("test error: ")
    assert " nats (" in said(capsys, "evaluate", folders["points"])
    assert "by the importance-weighted bound with 2 draws" in said(
        capsys, "evaluate", folders["hybrid"], "--importance", "2"
    )


@pytest.mark.slow
def test_sample_writes_levels_and_a_picture_and_needs_no_data(copied, tmp_path, capsys):
    path = tmp_path / "images.npz"
    folder = kept.folder(tmp_path / "run", kept.HYBRID, kept.write_data(path))
    path.unlink()
    options = ("--num", "5", "--temperature", "0.8", "--seed", "3")
    assert "converged for 5 of 5" in said(capsys, "sample", folder, *options)
    levels = np.load(folder / "samples.npy")
    assert (levels.shape, levels.dtype) == ((5, *kept.SHAPE), np.uint8)
    np.testing.assert_array_equal(
        levels, round_trips.draw(run.load(folder).model, 5, 32, temperature=0.8, seed=3)[0]
    )
    assert (folder / "samples.png").read_bytes().startswith(PNG)
    said(capsys, "sample", folder, *options, "--label", "2", "--certify", "0")
    assert np.any(np.load(folder / "samples.npy") != levels)
    assert "converged for 3 of 3" in said(
        capsys, "sample", copied["points"], "--certify", "0", "--num", "3"
    )
    assert np.load(copied["points"] / "samples.npy").dtype == np.float32


def test_certify_tells_layer_by_layer_and_fails_without_a_certificate(folders, capsys, monkeypatch):
    lines = said(capsys, "certify", folders["points"]).splitlines()
    assert any(line.startswith("stage0/block01/dense0   0.9000") for line in lines)
    assert lines[-1].startswith("certified: every one of 2 blocks is invertible, proven")
    loaded = run.load(folders["points"])
    broken = run.Run(loaded.folder, times(loaded.model, 3), loaded.config, loaded.fingerprint, 7)
    monkeypatch.setattr(run, "load", lambda folder: broken)
    assert said(capsys, "certify", folders["points"], status=1).splitlines()[-1] == (
        "NOT CERTIFIED: no bound of Lip(g) below 1 for 2 of 2 blocks, the first is stage0/block00"
    )


MISTAKES = [
    # of the command line
    ("evalute", None, [], "invalid choice: 'evalute'"),
    ("sample", "points", ["--nun", "3"], "--nun"),
    ("reconstruct", "points", ["--num", "0"], "argument --num: invalid count value: '0'"),
    # what a model does not have
    ("sample", "classifier", ["--label", "1"], "holds no density"),
    ("sample", "points", ["--temperature", "nan"], "temperature must lie in [0, inf), got nan"),
    ("sample", "given", ["--certify", "0"], "takes a context of shape (batch, 3), got none"),
]


@pytest.mark.parametrize(("command", "folder", "options", "sentence"), MISTAKES)
def test_mistakes_are_answered_in_one_sentence(
    folders, tmp_path, capsys, command, folder, options, sentence
):
    workdir = [] if folder is None else ["--workdir", folders.get(folder, tmp_path / folder)]
    assert sentence in answer(capsys, command, *workdir, *options)
