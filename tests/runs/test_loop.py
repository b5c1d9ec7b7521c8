"""The loop on disk: the same after a kill, a signal at any moment, and a resume."""

import json
import shutil
import signal

import chex
import jax
import numpy as np
import pytest
import tiny_runs as runs
from one_of_several import status_of_one_killed_in_a_save
from tiny_runs import (
    EVAL_EVERY,
    TOTAL_STEPS,
    arrays_of,
    assert_ends_like,
    measurements,
    newest,
)

from iresnet_jax.models.free import abstract
from iresnet_jax.runs import job, trained_run
from iresnet_jax.training import train as loop
from iresnet_jax.training.checkpoints import Store
from iresnet_jax.training.objectives import evaluate_examples
from iresnet_jax.training.optimizers import make_optimizer
from iresnet_jax.training.signals import SIGNALS, Stopped
from iresnet_jax.training.step import abstract_state


@pytest.fixture(scope="module")
def config():
    return runs.config_of(runs.TOY_CONFIG)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The workdir of the run that was never stopped."""
    return runs.trained(tmp_path_factory, "toy")


def test_training_improves_validation_and_never_recompiles(uninterrupted):
    assert (uninterrupted / runs.TRACES).read_text() == "1"
    assert newest(uninterrupted) == TOTAL_STEPS == arrays_of(uninterrupted)["step"]
    validation = [
        record["nll"] for record in measurements(uninterrupted) if record["split"] == "validation"
    ]
    assert len(validation) == TOTAL_STEPS // EVAL_EVERY
    assert validation[-1] < validation[0]


def rewrite(workdir, step, change, **arrays):
    """Writes a checkpoint anew, with what it says of its training changed, and more arrays."""
    path = Store(workdir).path(step)
    with np.load(path) as archive:
        found = {name: archive[name] for name in archive.files}
    about = change(json.loads(found.pop("(about)").tobytes()))
    if about is not None:
        found["(about)"] = np.frombuffer(json.dumps(about).encode(), np.uint8)
    np.savez(path, **found, **arrays)


def test_a_run_of_an_earlier_version_goes_on_to_the_same_bits(config, uninterrupted, tmp_path):
    workdir = shutil.copytree(uninterrupted, tmp_path / "run")
    Store(workdir).path(TOTAL_STEPS).unlink()
    rewrite(workdir, newest(workdir), lambda about: None, num_terms=np.int32(5))
    assert trained_run.load(workdir).step == newest(workdir) < TOTAL_STEPS
    job.train(config, workdir)
    assert_ends_like(workdir, uninterrupted)


@pytest.fixture
def happens_before(monkeypatch):
    """Has something happen while a step waits for its batch."""

    def arrange(step, event):
        def eventful(examples, *, first_step, **options):
            feeding = feed(examples, first_step=first_step, **options)
            for k, batch in enumerate(feeding, first_step):
                if k == step:
                    event()
                yield batch

        monkeypatch.setattr(loop, "device_batches", eventful)

    feed = loop.device_batches
    return arrange


def send(*signals):
    return lambda: [signal.raise_signal(number) for number in signals]


def test_a_run_told_to_stop_saves_the_step_it_is_in(
    config, uninterrupted, tmp_path, happens_before
):
    number, step = signal.SIGTERM, EVAL_EVERY * 2
    handlers = [signal.getsignal(each) for each in SIGNALS]
    happens_before(step, send(number))
    with pytest.raises(
        Stopped, match=rf"stopped by {number.name} after step {step + 1} of {TOTAL_STEPS}: the same"
    ):
        job.train(config, tmp_path)
    assert [signal.getsignal(each) for each in SIGNALS] == handlers
    assert measurements(tmp_path)[-1]["step"] == step + 1

    happens_before(step, lambda: pytest.fail("a step was taken twice"))
    job.train(config, tmp_path)
    assert_ends_like(tmp_path, uninterrupted)


@pytest.mark.slow
def test_a_killed_run_ends_bit_for_bit_like_one_never_stopped(config, uninterrupted, tmp_path):
    assert status_of_one_killed_in_a_save("toy", tmp_path / "run", call=2) == -signal.SIGKILL
    assert newest(tmp_path / "run") == EVAL_EVERY
    resumed = job.train(config, tmp_path / "run")
    assert_ends_like(tmp_path / "run", uninterrupted)
    # what is returned is what is saved
    chex.assert_trees_all_equal(resumed.weights, trained_run.load(uninterrupted).model.weights)


def test_a_density_of_transformed_images_is_validated_and_kept_as_one_of_images_as_they_are(
    tmp_path,
):
    changes = {
        "augmentation.transformations": ("left", "mirror"),
        "model.stages": ({"num_blocks": 1, "hidden": (4,)},),
    }
    changes |= {
        "logdet.kind": "roulette",
        "evaluation.logdet.kind": "exact",
        "training.blocks": "unroll",
    }
    config = runs.config_of(runs.DIGITS_CONFIG, **changes)
    returned = job.train(config, tmp_path / "run")
    logged = {
        r["step"]: r["bits_per_dim"]
        for r in measurements(tmp_path / "run")
        if r["split"] == "validation"
    }
    run = trained_run.load(tmp_path / "run")
    assert (run.step, run.model.spec.context_dim, returned.spec.context_dim) == (6, 0, 0)

    def bits(model):
        model, images = (
            model.with_(estimator=config.evaluation.logdet.build()),
            run.data.held_out("validation").x,
        )
        outputs = evaluate_examples(
            model, images, jax.random.key(config.seed), config.evaluation.batch_size
        )
        return outputs["bits_per_dim"].mean()

    assert abs(bits(run.model) - logged[6]) < 1e-3  # norms are certified and not estimated
    conditional, _ = trained_run.read_model(tmp_path / "run")
    state = abstract_state(conditional, make_optimizer(config.optimizer))
    ema = Store(tmp_path / "run").restore(state).state.ema
    of_moved = abstract(conditional).certified(ema).given(np.float32([1, 0]))
    assert abs(bits(of_moved) - logged[6]) > 1e-2
