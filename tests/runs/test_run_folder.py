"""What a run wrote down of its config and its model is read again, or said to be damaged or of
other data.
"""

import re

import kept
import numpy as np
import pytest
import tiny_runs as runs

from iresnet_jax.data import load
from iresnet_jax.runs import job
from iresnet_jax.runs.model_from_config import model_spec
from iresnet_jax.runs.run_folder import claimed, model_of_run, read_config, read_model


def begin(workdir, config):
    """The data of a run that has claimed its folder, and nothing else."""
    data = load(config.data.name)
    with claimed(workdir, config, model_spec(config, data), data):
        return data


DAMAGED, OTHER_VERSION = "cannot be read", "was written by another version"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"{", DAMAGED),
        (b'{"seed": "\xff"}', DAMAGED),
        (
            b'{"format": 1, "sede": 0}',
            f"{DAMAGED} (there is no config.sede: did you mean 'seed'?)",
        ),
        (b'{"format": 1, "model": {"type": "Desnity"}}', DAMAGED),
        (b'{"format": 0}', OTHER_VERSION),
    ],
)
@pytest.mark.parametrize(
    ("name", "read"), [("config.json", read_config), ("model.json", read_model)]
)
def test_a_file_that_is_no_use_is_said_to_be(tmp_path, content, said, name, read):
    (tmp_path / name).write_bytes(content)
    said = said if name == "config.json" else said.split(" (")[0]
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path / name} {said}")):
        read(tmp_path)


def test_a_run_on_other_data_is_not_gone_on_with(tmp_path):
    path, workdir = tmp_path / "data.npz", tmp_path / "run"
    config = runs.config_of(runs.DIGITS_CONFIG, **{"data.name": kept.write_data(path)})
    data = begin(workdir, config)
    assert read_config(workdir) == config
    before = read_model(workdir)
    assert before[1] == data.fingerprint

    other = load(kept.write_data(path, seed=5)).fingerprint
    with pytest.raises(
        ValueError,
        match=f"fingerprint {other[:12]} now and had {data.fingerprint[:12]} when training",
    ):
        job.train(config, workdir)
    assert read_model(workdir) == before


def test_a_run_that_another_process_began_meanwhile_is_not_gone_on_with(tmp_path):
    begin(tmp_path, runs.config_of(runs.TOY_CONFIG))
    with pytest.raises(ValueError, match=r"holds a run with another config: .*seed"):
        begin(tmp_path, runs.config_of(runs.TOY_CONFIG, seed=7))


def test_a_model_without_a_config_was_left_by_a_start_that_failed(tmp_path):
    config = runs.config_of(runs.TOY_CONFIG)
    data = begin(tmp_path, config)
    (tmp_path / "config.json").unlink()  # as on a full disk
    changed = runs.config_of(runs.TOY_CONFIG, **{"model.coeff": 0.5})
    assert model_of_run(tmp_path, data) is None
    begin(tmp_path, changed)
    assert read_model(tmp_path)[0].flow.coeff == read_config(tmp_path).model.coeff == 0.5


def test_data_without_test_examples_are_refused_before_training(tmp_path):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(40, 2)))
    config = runs.config_of(
        runs.TOY_CONFIG, **{"data.name": f"npy:{tmp_path}/x.npy", "data.test_fraction": 0.0}
    )
    with pytest.raises(ValueError, match=r"has not the two test examples .* data.test_fraction"):
        job.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
