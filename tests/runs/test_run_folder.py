"""What a run wrote down of its config and its model is read again, or said to be damaged or of other data."""

import re

import numpy as np
import pytest
import tiny_runs as runs

from iresnet_jax.__main__ import main
from iresnet_jax.data import load
from iresnet_jax.runs import loop
from iresnet_jax.runs.config import parse
from iresnet_jax.runs.run_folder import read_config, read_model

DAMAGED, OTHER_VERSION = "is damaged", "was written by another version"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"[]", DAMAGED),
        (b"null", DAMAGED),
        (b"{", DAMAGED),
        (b'{"seed": "\xff"}', DAMAGED),
        (b'{"format": 1, "sede": 0}', f"{DAMAGED} (config has no field 'sede': did you mean 'seed'?)"),
        (b'{"format": 1, "model": {"type": "Desnity"}}', DAMAGED),
        (b"{}", OTHER_VERSION),
        (b'{"format": 0}', OTHER_VERSION),
    ],
)
@pytest.mark.parametrize(("name", "read"), [("config.json", read_config), ("model.json", read_model)])
def test_a_file_that_is_no_use_is_said_to_be(tmp_path, content, said, name, read):
    (tmp_path / name).write_bytes(content)
    said = said if name == "config.json" else said.split(" (")[0]
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path / name} {said}")):
        read(tmp_path)


def write_poisson(path, mean):
    """Images whose pixels are Poisson variables."""
    rng = np.random.default_rng(0)
    np.savez(path, **{f"x_{split}": rng.poisson(mean, (200, 2, 2, 1)).astype(np.uint8) for split in ("train", "test")})


def test_a_model_is_one_of_the_data_it_was_trained_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("IRESNET_JAX_CACHE_DIR", str(tmp_path / "cache"))
    path, workdir = tmp_path / "data.npz", tmp_path / "run"
    settings = runs.settings_of(runs.DIGITS_CONFIG)
    settings.data.name = f"npz:{path}"
    settings.model.stages = ({"num_blocks": 1, "hidden": (4,)},)
    settings.logdet.kind = settings.evaluation.logdet.kind = "exact"
    settings.training.update({"batch_size": 16, "total_steps": 2, "eval_every_steps": 2, "log_every_steps": 1})
    config = parse(settings)
    write_poisson(path, 3)
    loop.train(config, workdir)
    before = read_model(workdir)
    assert read_config(workdir) == config
    command = ("--workdir", str(workdir))
    assert main(["evaluate", *command]) == 0
    assert "other data" not in capsys.readouterr().out

    write_poisson(path, 43)
    other = load(config.data.name).fingerprint
    with pytest.raises(ValueError, match=f"fingerprint {other[:12]} now and had {before[1][:12]} when training"):
        loop.train(config, workdir)
    assert read_model(workdir) == before
    assert main(["evaluate", *command]) == 0
    assert capsys.readouterr().out.startswith("These are other data than the model was trained on: ")

    path.unlink()
    assert main(["sample", *command, "--num", "32"]) == 0
    assert "other data" not in capsys.readouterr().out
    assert 0 < np.median(np.load(workdir / "samples.npy")) < 10
    assert main(["evaluate", *command]) == 2
    assert str(path) in capsys.readouterr().err
