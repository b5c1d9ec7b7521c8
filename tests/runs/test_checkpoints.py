"""States survive a round trip bit by bit, under readable names; damaged checkpoints are noticed and stepped over."""

import resource
import subprocess
import sys
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from iresnet_jax.runs import checkpoints
from iresnet_jax.runs.checkpoints import Checkpoints, from_named, load_named, to_named


class State(NamedTuple):
    params: dict
    opt_state: tuple
    spectral: dict
    step: jax.Array


def make_state(seed=0, num_blocks=3):
    rng = np.random.default_rng(seed)

    def array(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    blocks = {"conv1": {"kernel": array(num_blocks, 3, 3, 2, 4), "bias": array(num_blocks, 4)}}
    params = {"stage0": {"blocks": blocks, "first": {"kernel": array(2, 2)}}, "prior": {"mean": array(5)}}
    opt_state = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3)).init(params)
    opt_state = jax.tree.map(lambda leaf: leaf + jnp.asarray(seed, leaf.dtype), opt_state)
    spectral = {"stage0": {"blocks": {"conv1": {"u": array(num_blocks, 4)}}}}
    return State(params, opt_state, spectral, jnp.int32(seed))


def big_state(seed):
    """A state whose numbers do not compress, so that its data are in the largest file."""
    return {"w": jnp.asarray(np.random.default_rng(seed).normal(size=20_000), jnp.float32), "step": jnp.int32(seed)}


def assert_same_bits(actual, expected):
    chex.assert_trees_all_equal_structs(actual, expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())


# --- names -------------------------------------------------------------------------------------------------------


def test_names_read_like_paths_and_speak_of_one_block():
    state = make_state()
    named = to_named(state)
    for name in (
        "params/stage0/block02/conv1/kernel",
        "params/stage0/first/kernel",
        "opt_state/1/0/mu/stage0/block00/conv1/bias",
        "opt_state/1/0/count",
        "spectral/stage0/block01/conv1/u",
        "step",
    ):
        assert name in named
    kernel = state.params["stage0"]["blocks"]["conv1"]["kernel"]
    np.testing.assert_array_equal(named["params/stage0/block02/conv1/kernel"], kernel[2])
    assert len([name for name in named if name.startswith("params/")]) == 3 * 2 + 2


def test_names_do_not_depend_on_the_stacking():
    stacked = {"stage0": {"blocks": {"bias": np.arange(6.0).reshape(3, 2)}}}
    unrolled = {"stage0": {f"block{i:02d}": {"bias": np.arange(6.0).reshape(3, 2)[i]} for i in range(3)}}
    assert_same_bits(from_named(to_named(unrolled), stacked), stacked)
    assert_same_bits(from_named(to_named(stacked), unrolled), unrolled)


def test_from_named_inverts_to_named_for_every_kind_of_leaf():
    tree = {
        "blocks": [jnp.arange(4, dtype=jnp.uint32).reshape(2, 2), np.zeros((2, 0, 3))],
        "none_yet": {"blocks": {"bias": jnp.zeros((0, 4), jnp.bfloat16)}},
        "flag": jnp.array(True),
        "epoch": 3,
        "rate": 0.1,
    }
    restored = from_named(to_named(tree), tree)
    assert_same_bits(restored, tree)
    assert [type(leaf) for leaf in jax.tree.leaves(restored)] == [type(leaf) for leaf in jax.tree.leaves(tree)]
    assert restored["epoch"] == 3


def test_restored_arrays_can_be_donated():
    state = make_state()
    restored = from_named(to_named(state), jax.eval_shape(lambda: state))
    jax.block_until_ready(jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)(restored))
    assert restored.params["prior"]["mean"].is_deleted()


MISFITS = [
    ({"params/prior/mean": None}, "it lacks 'params/prior/mean'"),
    ({"params/stage0/block01/conv1/bias": None}, "it lacks 'params/stage0/block01/conv1/bias'"),
    ({"params/stage0/block03/conv1/bias": np.zeros(4)}, "it holds 'params/stage0/block03/conv1/bias'"),
    ({"params/prior/mean": np.zeros(4, np.float32)}, r"'params/prior/mean' is float32\[4\] in it, not float32\[5\]"),
    ({"step": np.int64(0)}, r"'step' is int64\[\] in it, not int32\[\]"),
]


@pytest.mark.parametrize(("changes", "message"), MISFITS)
def test_a_difference_is_named_in_one_sentence(changes, message):
    state = make_state()
    named = {name: array for name, array in (to_named(state) | changes).items() if array is not None}
    with pytest.raises(ValueError, match=message) as caught:
        from_named(named, state)
    assert "\n" not in str(caught.value)


def test_mistakes_are_refused(tmp_path):
    with pytest.raises(ValueError, match="two arrays of the state are called 'a/b'"):
        to_named({"a": {"b": np.zeros(1)}, "a/b": np.zeros(1)})
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(ValueError, match="where a folder is needed"):
        Checkpoints(tmp_path)


# --- saving and restoring ----------------------------------------------------------------------------------------


def restored_latest(checkpoints, target):
    result = checkpoints.restore_latest(target)
    assert result is not None
    return result


def best_of(checkpoints):
    """The step of the best checkpoint, which holds a state of that step."""
    state, step = checkpoints.restore_best(make_state())
    assert int(state.step) == step
    return step


def steps_in(workdir):
    """The steps of the checkpoints of a run, which has nothing else in its folder of them."""
    return sorted(int(path.name.removesuffix(".npz")) for path in (workdir / "checkpoints").iterdir())


def test_round_trip_is_bit_exact(tmp_path):
    state = make_state(seed=5)
    assert Checkpoints(tmp_path).restore_latest(state) is None
    assert Checkpoints(tmp_path).restore_best(state) is None
    Checkpoints(tmp_path).save(120, state)
    restored, step = restored_latest(Checkpoints(tmp_path), jax.eval_shape(lambda: state))
    assert step == 120
    assert_same_bits(restored, state)
    with pytest.raises(AssertionError):  # the comparison can fail
        assert_same_bits(restored, make_state(seed=6))
    assert_same_bits(load_named(tmp_path / "checkpoints" / "120.npz"), to_named(state))
    with pytest.raises(ValueError, match="does not fit this state"):  # and is not taken for a damaged one
        Checkpoints(tmp_path).restore_latest(make_state(num_blocks=4))


def test_every_dtype_and_empty_arrays_survive(tmp_path, x64):
    state = {
        "double": jnp.array([jnp.pi, -0.0, jnp.nan]),
        "half": jnp.array([1.5, -0.0, jnp.nan], jnp.bfloat16),
        "flag": jnp.array([True, False]),
        "key": jax.random.PRNGKey(0),
        "empty": jnp.zeros((0, 3)),
        "step": jnp.int32(1),
    }
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state)
    restored, _ = restored_latest(checkpoints, state)
    assert_same_bits(restored, state)


@pytest.mark.parametrize(("saved", "kept"), [((10, 20, 30, 30), [20, 30]), ((10, 20, 15), [10, 15])])
def test_the_newest_are_kept_and_an_earlier_step_gives_up_the_later_ones(tmp_path, saved, kept):
    checkpoints = Checkpoints(tmp_path)
    for step in saved:
        checkpoints.save(step, make_state(step))
    assert steps_in(tmp_path) == kept
    restored, step = restored_latest(checkpoints, make_state())
    assert step == int(restored.step) == kept[-1]


def test_a_checkpoint_whose_metric_cannot_be_read_once_is_kept(tmp_path, monkeypatch):
    kept = Checkpoints(tmp_path)
    for step, metric in ((1, 0.1), (2, 0.5), (3, 0.6)):
        kept.save(step, make_state(), metric=metric)
    whole = checkpoints._read

    def read(path, *names):
        if path.stem == "1":
            raise OSError("stale file handle")
        return whole(path, *names)

    monkeypatch.setattr(checkpoints, "_read", read)
    kept.save(4, make_state(), metric=0.7)
    monkeypatch.undo()
    kept.save(5, make_state(), metric=0.8)
    assert kept.restore_best(make_state())[1] == 1


def test_the_best_survives_a_resume(tmp_path):
    Checkpoints(tmp_path).save(10, make_state(10), metric=2.0)
    Checkpoints(tmp_path).save(20, make_state(20), metric=1.0)
    checkpoints = Checkpoints(tmp_path)
    for step, metric in ((30, 1.5), (40, float("nan")), (50, 1.0), (60, None)):
        checkpoints.save(step, make_state(step), metric=metric)
    assert steps_in(tmp_path) == [20, 50, 60]
    assert best_of(checkpoints) == 20
    checkpoints.save(70, make_state(70), metric=np.float32(0.5))
    assert best_of(checkpoints) == 70
    assert steps_in(tmp_path) == [60, 70]


KILLS = """
import itertools, os, pathlib, sys, tempfile, warnings
import numpy as np
from iresnet_jax.runs.checkpoints import Checkpoints

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

def check(step, checkpoints):
    latest, newest = checkpoints.restore_latest(state(0))
    assert newest in (10, 20) and np.array_equal(latest["w"], state(newest)["w"]), newest
    best, number = checkpoints.restore_best(state(0))
    assert number == newest and np.array_equal(best["w"], state(number)["w"]), number

for death in itertools.count():
    folder = tempfile.mkdtemp(dir=sys.argv[1])
    checkpoints = Checkpoints(folder)
    checkpoints.save(10, state(10), metric=2.0)
    child = os.fork()
    if child == 0:
        dies_at(death)
        checkpoints.save(20, state(20), metric=1.0)
        os._exit(0)
    killed = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    check(20, Checkpoints(folder))
    checkpoints.save(20, state(20), metric=1.0)
    checkpoints.save(30, state(30), metric=1.5)
    assert sorted(os.listdir(folder + "/checkpoints")) == ["20.npz", "30.npz"]
    assert checkpoints.restore_best(state(0))[1] == 20
    if not killed:
        break
print(death)
"""


def test_a_kill_at_any_moment_loses_neither_the_newest_nor_the_best(tmp_path):
    done = subprocess.run([sys.executable, "-c", KILLS, str(tmp_path)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert int(done.stdout) >= 6  # at each of three arrays, before and after the renaming, and when the old ones are deleted


# --- damage ------------------------------------------------------------------------------------------------------


def truncate(path, size):
    path.write_bytes(path.read_bytes()[:size])


def flip_bit(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def clear_page(path):
    content = path.read_bytes()
    path.write_bytes(content[:4096] + bytes(4096) + content[8192:])


DAMAGE = {
    "half of it": lambda path: truncate(path, path.stat().st_size // 2),
    "without its last byte": lambda path: truncate(path, -1),
    "one bit of the data": lambda path: flip_bit(path, path.stat().st_size // 2),
    "one bit of the index": lambda path: flip_bit(path, -30),
    "a page that never reached the disk": clear_page,
    "empty": lambda path: truncate(path, 0),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "a folder": lambda path: [path.unlink(), path.mkdir()],
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path, damage):
    checkpoints = Checkpoints(tmp_path)
    for step, metric in ((10, 2.0), (20, 1.0)):
        checkpoints.save(step, big_state(step), metric=metric)
    damage(checkpoints.path(20))
    for restore in (Checkpoints(tmp_path).restore_latest, checkpoints.restore_best):
        with pytest.warns(UserWarning, match="20.npz is damaged .* falling back to step 10"):
            restored, step = restore(big_state(0))
        assert step == 10
        assert_same_bits(restored, big_state(10))

    if checkpoints.path(20).is_file():
        checkpoints.save(20, big_state(20))  # a resumed run comes by again
        assert restored_latest(checkpoints, big_state(0))[1] == 20  # warnings are errors
        damage(checkpoints.path(20))
    damage(checkpoints.path(10))
    with pytest.warns(UserWarning, match="20.npz"), pytest.raises(RuntimeError, match=r"no checkpoint in .*") as error:
        checkpoints.restore_latest(big_state(0))
    assert "\n" not in str(error.value)


def test_no_flipped_bit_goes_unnoticed(tmp_path):
    state = {"w": np.arange(40.0), "deep": {"single": jnp.ones(3)}}
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state)
    path, named = checkpoints.path(1), to_named(state)
    noticed = 0
    for at in range(0, path.stat().st_size, 7):
        flip_bit(path, at)
        try:
            found = load_named(path)
        except Exception:
            noticed += 1
        else:  # in what a zip file repeats or does not use, such as its dates
            assert_same_bits(found, named)
        flip_bit(path, at)
    assert noticed > path.stat().st_size / 14


def test_an_unfinished_save_is_ignored_and_cleaned_up(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(10, big_state(10))
    leftover = tmp_path / "checkpoints" / "20.npz.incoming"
    leftover.write_bytes(checkpoints.path(10).read_bytes())
    assert restored_latest(Checkpoints(tmp_path), big_state(0))[1] == 10
    checkpoints.save(30, big_state(30))
    assert steps_in(tmp_path) == [10, 30]


def test_a_full_disk_is_one_sentence_and_keeps_what_was_there(tmp_path, caplog):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(10, big_state(10))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        for size in (20_000, 500, checkpoints.path(10).stat().st_size - 40):  # in the data, in the metadata, in the index
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))  # writes fail as they do on a full disk
            for step in (20, 10):  # also when it would replace the only one
                with pytest.raises(OSError, match=rf"step {step} could not be written .*\(File too large\)") as error:
                    checkpoints.save(step, big_state(step + 1))
                assert "\n" not in str(error.value)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert steps_in(tmp_path) == [10]
    restored, _ = restored_latest(checkpoints, big_state(0))
    assert_same_bits(restored, big_state(10))
    assert not caplog.records


def test_a_thousand_small_arrays_are_one_file(tmp_path):
    Checkpoints(tmp_path).save(1, {f"layer{i}": {"kernel": np.full((8, 8), i, np.float32)} for i in range(1000)})
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["1.npz"]
