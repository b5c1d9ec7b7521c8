"""Plans: the step lowered for machines that are not here, and mistakes."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_runs as runs
from jax import lax

from iresnet_jax.__main__ import main
from iresnet_jax.runs import plan
from iresnet_jax.training import parallel

HAS_LIBTPU = importlib.util.find_spec("libtpu") is not None


def test_a_step_for_devices_is_the_one_that_trains():
    def step(state, _, batch):
        return state + lax.pmean(batch.mean(), parallel.AXIS), {
            "sum": lax.psum(batch.sum(), parallel.AXIS)
        }

    batch = np.arange(8.0, dtype=np.float32)
    state, metrics = parallel.for_devices(step, jax.devices()[:2])(jnp.zeros(()), (), batch)
    expected = parallel.parallelize(step)(jnp.zeros(()), (), parallel.shard(batch, num_devices=2))
    assert (
        (float(state), float(metrics["sum"]))
        == (float(expected[0]), float(expected[1]["sum"]))
        == (3.5, 28.0)
    )


@pytest.mark.slow
@pytest.mark.skipif(not HAS_LIBTPU, reason="needs libtpu, of the extra tpu")
def test_a_step_for_tpus_fits_and_has_one_reduction_for_all_gradients():
    config = runs.config_of(runs.TOY_CONFIG, **{"training.batch_size": 32})
    made = plan.make(config, plan.machine("v5e:2x2"))
    assert made.problem is None
    assert "fits v5e:2x2 with 8 examples a device" in str(made)
    lowered, *_ = plan.lower(config, plan.machine("v5e:2x2"), plan.data_for(config))
    assert 1 <= lowered.compile().as_text().count(" all-reduce(") <= 3


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "toy.py"
    path.write_text(runs.TOY_CONFIG)
    return f"--config={path}"


def test_the_command_prints_the_plan(capsys, config_file):
    assert (
        main(["plan", config_file, "--topology", "cuda:4", "--config.training.batch_size=32"]) == 0
    )
    out, err = capsys.readouterr()
    verdict, memory, _ = out.splitlines()
    assert verdict.startswith(
        "lowers for cuda:4 with 8 examples a device; what it takes on the way is known after a step"
    )
    assert " parameters; a device: " in memory
    assert err == ""


MISTAKES = [
    (["--topology=v7:2x2"], "has no topology 'v7:2x2' such as v5e:2x2"),
    (["--topology=cuda:3"], "multiple of 3 devices times 1 parts, got 16"),
    (["--topology=cuda", "--config.training.batch_sise=3"], "no config.training.batch_sise"),
    *([] if HAS_LIBTPU else [(["--topology=v5e:2x2"], "pip install '.[tpu]'")]),
]


@pytest.mark.parametrize(("arguments", "sentence"), MISTAKES)
def test_mistakes_are_answered_in_a_sentence(capsys, config_file, arguments, sentence):
    assert main(["plan", config_file, *arguments]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert sentence in line
