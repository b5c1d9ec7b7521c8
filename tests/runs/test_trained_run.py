"""A run in its folder: which parameters count, and what is said of damage and other data."""

import shutil

import jax
import kept
import numpy as np
import pytest
import tiny_runs as runs

from iresnet_jax import data
from iresnet_jax.models.model import FILE_NAME
from iresnet_jax.runs import trained_run as run
from iresnet_jax.runs.job import Job, model_spec, train
from iresnet_jax.training.checkpoints import Store

NORM_RTOL = 1e-2  # ten times the tolerance of the norms


def begin(workdir, config):
    """The data of a run that has claimed its folder, and nothing else."""
    found = data.load(config.data.name)
    with run.claimed(workdir, config, model_spec(config, found), found):
        return found


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run on a toy with two checkpoints of random averages, the first of them the best."""
    workdir = tmp_path_factory.mktemp("toy")
    config = runs.config_of(runs.TOY_CONFIG)
    start = runs.random_state(Job.of(config, begin(workdir, config)))
    rng = np.random.default_rng(0)
    for step, metric in ((20, 2.0), (40, 3.0)):
        ema = jax.tree.map(lambda a: rng.normal(size=a.shape).astype(np.float32), start.ema)
        Store(workdir).save(step, start._replace(step=np.int32(step), ema=ema), metric=metric)
    return workdir


@pytest.fixture(scope="module")
def toy(trained):
    return run.load(trained)


@pytest.fixture
def copied(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


def same(a, b):
    return jax.tree.structure(a) == jax.tree.structure(b) and jax.tree.all(
        jax.tree.map(np.array_equal, a, b)
    )


def test_the_parameters_are_the_average_of_the_best_checkpoint(toy, trained):
    named = runs.arrays_of(trained, 20)
    assert (toy.step, toy.notes) == (20, ())
    np.testing.assert_array_equal(toy.model.prior.mean, named["ema/prior/mean"])
    branch = toy.model.weights["stage0"].branch.weights
    np.testing.assert_array_equal(branch["dense0"]["bias"], named["ema/stage0/blocks/dense0/bias"])
    for layer, found in branch.items():
        before = named[f"ema/stage0/blocks/{layer}/kernel"].astype(np.float64)
        for kernel, raw in zip(np.asarray(found["kernel"], np.float64), before, strict=True):
            scale = min(1, 0.9 / np.linalg.norm(raw, 2))
            np.testing.assert_allclose(
                np.linalg.norm(kernel, 2), scale * np.linalg.norm(raw, 2), rtol=NORM_RTOL
            )
            np.testing.assert_allclose(
                kernel * np.abs(raw).max(), raw * np.abs(kernel).max(), atol=1e-5
            )
    assert toy.model.certificate().certified
    assert toy.model.how.solver.atol == toy.config.evaluation.inverse_atol


def test_a_best_checkpoint_that_is_damaged_is_said_to_be(toy, copied):
    (copied / "checkpoints" / "20.npz").write_bytes(b"")
    found = run.load(copied)
    assert found.step == 40
    assert not same(found.model.prior, toy.model.prior)
    [note] = found.notes
    assert note.startswith(f"The checkpoint {copied / 'checkpoints' / '20.npz'} is damaged")
    assert note.endswith("step 40 takes its place.")


def test_a_model_alone_is_the_same_run_and_one_beside_a_run_does_not_replace_it(
    toy, copied, tmp_path
):
    path = run.save(toy, tmp_path / FILE_NAME)
    assert path == tmp_path / FILE_NAME
    alone = run.load(tmp_path)
    assert run.read_config(tmp_path) == run.read_config(copied) == toy.config
    for name in ("config", "fingerprint", "step"):
        assert getattr(alone, name) == getattr(toy, name)
    assert (alone.model.spec, alone.model.how) == (toy.model.spec, toy.model.how)
    assert same(alone.model.prior, toy.model.prior)
    ours, theirs = (model.weights["stage0"].branch for model in (alone.model, toy.model))
    assert same(ours.weights, theirs.weights)
    np.testing.assert_allclose(
        alone.model.certificate().max_block, toy.model.certificate().max_block, rtol=1e-6
    )
    np.testing.assert_array_equal(alone.test_data().x, toy.test_data().x)
    assert alone.test_data().x.shape == (256, 2)
    run.save(run.Run(copied, kept.model(kept.POINTS), toy.config, toy.fingerprint, step=7))
    assert run.load(copied).step == 20


def test_a_run_on_other_data_or_of_another_config_is_not_gone_on_with(tmp_path):
    path, workdir = tmp_path / "data.npz", tmp_path / "run"
    changes = {"data.name": kept.write_data(path)}
    before = begin(workdir, runs.config_of(runs.DIGITS_CONFIG, **changes)).fingerprint
    with pytest.raises(ValueError, match=r"another config: config.seed is 7 now.*initial_model="):
        begin(workdir, runs.config_of(runs.DIGITS_CONFIG, **changes, seed=7))
    now = data.load(kept.write_data(path, seed=5)).fingerprint
    said = f"fingerprint {now[:12]} now and had {before[:12]} when training"
    with pytest.raises(ValueError, match=said):
        train(runs.config_of(runs.DIGITS_CONFIG, **changes), workdir)
    assert run.read_model(workdir)[1] == before


@pytest.fixture
def of_images(tmp_path):
    """The folder of a hybrid's ``model.npz``, and the file of its data."""
    path = tmp_path / "images.npz"
    return kept.folder(tmp_path / "run", kept.HYBRID, kept.write_data(path)), path


def test_other_data_are_noticed_and_needed_by_nothing_else(of_images):
    folder, path = of_images
    loaded = run.load(folder)
    assert loaded.with_data_checked() is loaded
    kept.write_data(path, seed=5)
    [note] = run.load(folder).with_data_checked().notes
    now = data.load(loaded.config.data.name).fingerprint
    assert note.startswith(
        "These are other data than the model was trained on, or other parts of them: "
    )
    assert f"npz:{path} has the fingerprint {now[:12]}" in note
    assert loaded.fingerprint[:12] in note
    path.unlink()
    without = run.load(folder)
    assert (without.model.spec, without.fingerprint) == (loaded.model.spec, loaded.fingerprint)
    with pytest.raises(FileNotFoundError, match=str(path)):
        without.with_data_checked()
