"""States survive a round trip bit by bit, under readable names; damaged checkpoints are noticed
and stepped over; trainings that are stopped go on to the same bits.
"""

import math
import resource
import signal
import subprocess
import sys
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from one_number import (
    NUM_STEPS,
    At,
    assert_same,
    steps,
    trained,
    without_blocks,  # noqa: F401 (a fixture)
)

import iresnet_jax as ir
from iresnet_jax.storage import locked, path_of
from iresnet_jax.training.checkpoints import Store, from_named, to_named
from iresnet_jax.training.signals import Stopped


class State(NamedTuple):
    params: dict
    opt_state: tuple
    step: jax.Array


def make_state(seed=0, num_blocks=3):
    rng = np.random.default_rng(seed)

    def array(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    params = {
        "stage0": {"blocks": {"conv1": {"bias": array(num_blocks, 4)}}},
        "prior": {"mean": array(5)},
    }
    opt_state = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3)).init(params)
    opt_state = jax.tree.map(lambda leaf: leaf + jnp.asarray(seed, leaf.dtype), opt_state)
    return State(params, opt_state, jnp.int32(seed))


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


# --- names ----------------------------------------------------------------------------------------


def test_restored_arrays_can_be_donated():
    state = make_state()
    restored = from_named(to_named(state), jax.eval_shape(lambda: state))
    jax.block_until_ready(
        jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)(restored)
    )
    assert restored.params["prior"]["mean"].is_deleted()


MISFITS = [
    (lambda named: named.pop("params/prior/mean"), "params/prior/mean is there now alone"),
    (
        lambda named: named.update({"params/prior/mean": np.zeros(5)}),
        r"params/prior/mean is \"float32\[5\]\" now and \"float64\[5\]\".*JAX_ENABLE_X64",
    ),
]


@pytest.mark.parametrize(("change", "message"), MISFITS)
def test_a_difference_is_named(change, message):
    named = to_named(make_state())
    change(named)
    with pytest.raises(ValueError, match=message):
        from_named(named, make_state())


# --- saving and restoring -------------------------------------------------------------------------


def steps_in(workdir):
    """The steps of the checkpoints of a run, which has nothing else in its folder of them."""
    return sorted(
        int(path.name.removesuffix(".npz")) for path in (workdir / "checkpoints").iterdir()
    )


def test_round_trip_is_bit_exact(tmp_path):
    state = make_state(seed=5)
    assert Store(tmp_path).restore(state) is None
    Store(tmp_path).save(120, state, about={"seconds": 1.5})
    for best in (False, True):
        restored = Store(tmp_path).restore(jax.eval_shape(lambda: state), best=best)
        assert (restored.step, np.isnan(restored.metric), restored.notes) == (120, True, ())
        assert restored.about == {"seconds": 1.5}
        assert_same_bits(restored.state, state)
    # and is not taken for a damaged one
    with pytest.raises(ValueError, match="does not fit this state"):
        Store(tmp_path).restore(make_state(num_blocks=4))


@pytest.mark.parametrize(
    ("saved", "kept"), [((10, 20, 30, 30), [20, 30]), ((10, 20, 15), [10, 15])]
)
def test_the_newest_are_kept_and_an_earlier_step_gives_up_the_later_ones(tmp_path, saved, kept):
    for step in saved:
        Store(tmp_path).save(step, make_state(step))
    assert steps_in(tmp_path) == kept
    restored = Store(tmp_path).restore(make_state())
    assert restored.step == int(restored.state.step) == kept[-1]


def test_the_best_survives_a_resume(tmp_path):
    for step, metric, best in (
        *((10, 2.0, 10), (20, 1.0, 20), (30, 1.5, 20), (40, math.nan, 20), (50, math.nan, 20)),
    ):
        Store(tmp_path).save(step, make_state(step), metric=metric, best=best)
    assert steps_in(tmp_path) == [20, 40, 50]
    best = Store(tmp_path).restore(make_state(), best=True)
    assert (best.step, best.metric, int(best.state.step)) == (20, 1.0, 20)
    Store(tmp_path).save(60, make_state(60), metric=np.float32(0.5), best=60)
    assert Store(tmp_path).restore(make_state(), best=True).step == 60
    assert steps_in(tmp_path) == [50, 60]


KILLS = """
import itertools, os, pathlib, sys, tempfile, warnings
import numpy as np
from iresnet_jax.training.checkpoints import Store

warnings.simplefilter("ignore")  # of forking
state = lambda step: {"w": np.full(20_000, step), "step": np.int64(step)}

def dies_at(death):
    calls = itertools.count()
    def counted(whole):
        def call(*args, **kwargs):
            if next(calls) == death:
                os._exit(9)  # nothing is cleaned up
            return whole(*args, **kwargs)
        return call
    np.lib.format.write_array = counted(np.lib.format.write_array)
    for name in ("mkdir", "replace", "unlink"):
        setattr(pathlib.Path, name, counted(getattr(pathlib.Path, name)))

for death in itertools.count():
    folder = pathlib.Path(tempfile.mkdtemp(dir=sys.argv[1]))
    checkpoints = Store(folder)
    checkpoints.save(10, state(10), metric=2.0, best=10)
    child = os.fork()
    if child == 0:
        dies_at(death)
        checkpoints.save(20, state(20), metric=1.0, best=20)
        os._exit(0)
    killed = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    for best in (False, True):
        found = checkpoints.restore(state(0), best=best)
        assert found.step in (10, 20) and np.array_equal(found.state["w"], state(found.step)["w"])
    checkpoints.save(20, state(20), metric=1.0, best=20)
    checkpoints.save(30, state(30), metric=1.5, best=20)
    assert sorted(os.listdir(folder / "checkpoints")) == ["20.npz", "30.npz"]
    assert checkpoints.restore(state(0), best=True).step == 20
    if not killed:
        break
print(death)
"""


@pytest.mark.slow
def test_a_kill_at_any_moment_loses_neither_the_newest_nor_the_best(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", KILLS, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    # at each of three arrays, before and after the renaming, and when the old ones are deleted
    assert int(done.stdout) >= 6


# --- damage ---------------------------------------------------------------------------------------


def flip_bit(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "half of it": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
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


def test_a_bucket_that_fails_for_a_moment_costs_no_checkpoint(monkeypatch):
    folder, left = path_of("memory://bucket/run"), [-1]  # requests before one fails

    def failing(method):
        def request(*args, **kwargs):
            left[0] -= 1
            if left[0] == 0:
                raise RuntimeError("503 at the moment")
            return method(*args, **kwargs)

        return request

    for name in ("cat_file", "ls"):
        monkeypatch.setattr(MemoryFileSystem, name, failing(getattr(MemoryFileSystem, name)))
    for step in (10, 20, 30):
        Store(folder).save(step, big_state(step), metric=step, best=10)
    for left[0] in (1, 2, 5):  # the listing, a metric and the whole state
        with pytest.raises(ConnectionError, match="503 at the moment"):
            Store(folder).restore(big_state(0), best=True)
    for left[0] in (1, 2):  # both listings of a save
        Store(folder).save(40, big_state(40), metric=40.0, best=10)
        assert Store(folder).restore(big_state(0), best=True).step == 10
    Store(folder).save(50, big_state(50), metric=50.0, best=10)
    assert sorted(int(path.stem) for path in (folder / "checkpoints").glob("*.npz")) == [10, 40, 50]


def test_a_checkpoint_that_its_training_deletes_is_not_called_damaged(tmp_path, monkeypatch):
    checkpoints = Store(tmp_path)
    for step in (10, 20):
        checkpoints.save(step, big_state(step), metric=1.0, best=10)
    monkeypatch.setattr(Store, "steps", lambda self: [30, 20, 10])
    for best in (False, True):
        restored = checkpoints.restore(big_state(0), best=best)
        assert (restored.step, restored.notes) == (20, ())


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


# --- trainings that are resumed -------------------------------------------------------------------


def stops(run):
    signal.raise_signal(signal.SIGTERM)


def crashes(run):
    raise ZeroDivisionError


@pytest.mark.parametrize("step", [2, 4, 6, 11])
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


def test_patience_counts_validations_before_the_stop(tmp_path):
    options = {"steps": 60, "patience": 3}
    with pytest.raises(Stopped):
        trained(At(8, stops), ir.Checkpoints(tmp_path), held_out=[1.0, 2.0], **options)
    model, run = trained(ir.Checkpoints(tmp_path), held_out=[3.0, 4.0, 5.0], **options)
    assert (run.step, model.history.step) == (12, 3)


def test_a_training_that_crashed_goes_on_from_its_last_validation(tmp_path):
    with pytest.raises(ZeroDivisionError):
        trained(At(8, crashes), ir.Checkpoints(str(tmp_path / "new" / "folder")))
    found = trained(ir.Checkpoints(tmp_path / "new" / "folder"))
    assert found[1].first_step == 6
    assert_same(found, trained())


def test_a_checkpoint_that_cannot_be_written_ends_training(tmp_path):
    def full(run):
        (tmp_path / "checkpoints" / "6.npz").mkdir()

    with pytest.raises(OSError, match=r"6.npz cannot be written"):
        trained(At(5, full), ir.Checkpoints(tmp_path))


ENDS = {
    "by its steps": ({}, ()),
    "by patience": ({"held_out": [1.0, 2.0, 3.0], "patience": 2}, ()),
    "by a callback between two validations": ({}, (At(5, lambda run: run.end("enough")),)),
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


def test_a_training_that_blew_up_gives_the_same_model_again(tmp_path):
    def blow_up(run):
        run.state = run.state._replace(params={"number": run.state.params["number"] * np.nan})

    found = []
    for _ in range(2):
        with pytest.warns(UserWarning, match="The model is the best one of the validations before"):
            found.append(trained(At(7, blow_up), ir.Checkpoints(tmp_path))[0])
    assert found[0].number == found[1].number
    assert {each.history.step for each in found} == {6}


def test_a_damaged_checkpoint_costs_the_steps_since_the_one_before(tmp_path):
    checkpoints = ir.Checkpoints(tmp_path)
    trained(checkpoints)
    checkpoints.store.path(NUM_STEPS).write_bytes(b"damaged")
    with pytest.warns(UserWarning, match=f"{NUM_STEPS}.npz is damaged .* step 9 takes its place"):
        found = trained(ir.Checkpoints(tmp_path))
    assert found[1].first_step == 9
    assert_same(found, trained())


OTHER = ir.DensitySpec(ir.FlowSpec((1,), (ir.StageSpec(1, (2,)),)))
OTHERS = {
    "seed": ({"key": 1}, r"training.seed is 1 now and 0 before"),
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
