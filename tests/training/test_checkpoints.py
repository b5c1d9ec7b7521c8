"""States are kept bit by bit, damage is noticed, trainings go on to the same bits."""

import math
import resource
import signal

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from one_number import (
    NUM_STEPS,
    At,
    assert_same,
    steps,
    trained,
    without_blocks,  # noqa: F401 (a fixture)
)

import iresnet_jax as ir
from iresnet_jax.storage import locked
from iresnet_jax.training.checkpoints import Store, to_named
from iresnet_jax.training.signals import Stopped


def big_state(seed):
    """A state whose numbers do not compress, so that its data are in the largest file."""
    return {
        "w": jnp.asarray(np.random.default_rng(seed).normal(size=20_000), jnp.float32),
        "step": jnp.int32(seed),
    }


def assert_same_bits(actual, expected):
    chex.assert_trees_all_equal_structs(actual, expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())


def steps_in(workdir):
    """The steps of the checkpoints of a run, which has nothing else in its folder of them."""
    return sorted(
        int(path.name.removesuffix(".npz")) for path in (workdir / "checkpoints").iterdir()
    )


def test_round_trip_is_bit_exact_and_arrays_can_be_donated(tmp_path):
    state = {"params": {"prior": {"mean": jnp.array([jnp.pi, -0.0, jnp.nan])}}}
    state |= {"flag": jnp.array([True, False]), "empty": jnp.zeros((0, 3)), "step": jnp.int32(5)}
    assert "params/prior/mean" in to_named(state)
    assert Store(tmp_path).restore(state) is None
    Store(tmp_path).save(120, state, about={"seconds": 1.5})
    for best in (False, True):
        restored = Store(tmp_path).restore(jax.eval_shape(lambda: state), best=best)
        assert (restored.step, np.isnan(restored.metric), restored.notes) == (120, True, ())
        assert restored.about == {"seconds": 1.5}
        assert_same_bits(restored.state, state)
        jax.block_until_ready(
            jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)(restored.state)
        )
        assert restored.state["params"]["prior"]["mean"].is_deleted()


def test_the_newest_and_the_best_are_kept_and_an_earlier_step_gives_up_the_later_ones(tmp_path):
    store = Store(tmp_path)
    for step, metric in ((10, 2.0), (20, 1.0), (30, 1.5), (40, math.nan), (50, math.nan)):
        store.save(step, big_state(step), metric=metric, best=min(step, 20))
    assert steps_in(tmp_path) == [20, 40, 50]
    best = Store(tmp_path).restore(big_state(0), best=True)
    assert (best.step, best.metric, int(best.state["step"])) == (20, 1.0, 20)
    store.save(45, big_state(45), metric=np.float32(0.5), best=45)
    assert steps_in(tmp_path) == [40, 45]
    for best in (False, True):
        assert store.restore(big_state(0), best=best).step == 45


def flip_bit(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "half of it": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "a folder": lambda path: [path.unlink(), path.mkdir()],
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path, damage):
    checkpoints = Store(tmp_path)
    for step, metric in ((10, 2.0), (20, 1.0)):
        checkpoints.save(step, big_state(step), metric=metric, best=step)
    damage(checkpoints.path(20))
    for best in (False, True):
        restored = checkpoints.restore(big_state(0), best=best)
        [note] = restored.notes
        assert note.startswith(f"The checkpoint {checkpoints.path(20)} is damaged (")
        assert note.endswith("): step 10 takes its place.")
        assert_same_bits(restored.state, big_state(10))
    damage(checkpoints.path(10))
    with pytest.raises(
        RuntimeError, match=r"10.npz is damaged \(.*\), and no other can be read"
    ) as error:
        checkpoints.restore(big_state(0))
    assert "\n" not in str(error.value)


def test_no_flipped_bit_goes_unnoticed(tmp_path):
    state = {"w": np.arange(40.0, dtype=np.float32), "deep": {"single": jnp.ones(3)}}
    checkpoints = Store(tmp_path)
    checkpoints.save(1, state)
    path, noticed = checkpoints.path(1), 0
    for at in range(0, path.stat().st_size, 7):
        flip_bit(path, at)
        try:
            found = checkpoints.restore(state).state
        except (RuntimeError, ValueError):
            noticed += 1
        else:  # in what a zip file repeats or does not use, such as its dates
            assert_same_bits(found, state)
        flip_bit(path, at)
    assert noticed > path.stat().st_size / 14


def test_a_full_disk_keeps_what_was_there(tmp_path):
    checkpoints = Store(tmp_path)
    checkpoints.save(10, big_state(10))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        # in the data, in the metadata, in the index
        for size in (20_000, 500, checkpoints.path(10).stat().st_size - 40):
            # writes fail as they do on a full disk
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
            for step in (20, 10):  # also when it would replace the only one
                with pytest.raises(OSError, match=rf"{step}.npz cannot be written .*too large"):
                    checkpoints.save(step, big_state(step + 1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert steps_in(tmp_path) == [10]
    assert_same_bits(checkpoints.restore(big_state(0)).state, big_state(10))


def stops(run):
    signal.raise_signal(signal.SIGTERM)


def crashes(run):
    raise ZeroDivisionError


@pytest.mark.parametrize("step", [2, 6, 11])
def test_a_training_that_was_stopped_goes_on_to_the_same_bits(tmp_path, step):
    expected = trained()
    with pytest.raises(Stopped, match=f"stopped by SIGTERM after step {step} of {NUM_STEPS}"):
        trained(At(step, stops), ir.Checkpoints(tmp_path))
    found = trained(ir.Checkpoints(tmp_path))
    assert found[1].first_step == step
    assert_same(found, expected)
    assert steps(found[1], "validation") == steps(expected[1], "validation")


def test_a_best_model_before_the_stop_is_still_the_best_after_it(tmp_path):
    losses = [2.0, 1.0, 4.0, 5.0]
    expected = trained(held_out=losses)
    with pytest.raises(Stopped):
        trained(At(10, stops), ir.Checkpoints(tmp_path), held_out=losses)
    found = trained(ir.Checkpoints(tmp_path), held_out=losses[3:])
    assert (found[0].history.step, found[0].history.loss) == (6, 1.0)
    assert_same(found, expected)


def test_a_training_that_crashed_goes_on_from_its_last_validation(tmp_path):
    with pytest.raises(ZeroDivisionError):
        trained(At(8, crashes), ir.Checkpoints(str(tmp_path / "new" / "folder")))
    found = trained(ir.Checkpoints(tmp_path / "new" / "folder"))
    assert found[1].first_step == 6
    assert_same(found, trained())


ENDS = {
    "by its steps": ({}, ()),
    "by a function": ({"callback": lambda step, model, metrics: step == 6}, ()),
}


@pytest.mark.parametrize(("options", "callbacks"), ENDS.values(), ids=ENDS)
def test_a_training_that_has_ended_stays_ended(tmp_path, options, callbacks):
    model, run = trained(*callbacks, ir.Checkpoints(tmp_path), **options)
    again, run_again = trained(ir.Checkpoints(tmp_path), **options)
    assert run_again.first_step == run.step
    assert_same((again, run_again), (model, run))
    assert again.history.ended == model.history.ended
    assert again.history.train == model.history.train


OTHER = ir.DensitySpec(ir.FlowSpec((1,), (ir.StageSpec(1, (2,)),)))
OTHERS = {
    "data": ({"batch": 4.0}, r"training.data is"),
    "model": ({"spec": OTHER}, r"model.flow.stages.*hidden"),
}


@pytest.mark.parametrize(("options", "difference"), OTHERS.values(), ids=OTHERS)
def test_another_training_is_refused_in_a_sentence_that_names_the_difference(
    tmp_path, options, difference
):
    trained(ir.Checkpoints(tmp_path), steps=12)
    with pytest.raises(ValueError, match=f"{tmp_path} holds another training: .*{difference}"):
        trained(ir.Checkpoints(tmp_path), **options)


def test_a_folder_in_which_another_process_trains_is_refused(tmp_path):
    with (
        locked(tmp_path / "training"),
        pytest.raises(ValueError, match=f"another process is training in {tmp_path}"),
    ):
        trained(ir.Checkpoints(tmp_path))


def test_a_bucket_keeps_a_training(tmp_path):
    with pytest.raises(Stopped):
        trained(At(5, stops), ir.Checkpoints("memory://bucket/resumed"))
    assert_same(trained(ir.Checkpoints("memory://bucket/resumed")), trained())
