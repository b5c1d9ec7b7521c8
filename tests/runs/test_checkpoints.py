"""States survive a round trip bit by bit, under readable names; damaged checkpoints are noticed and stepped over."""

import resource
import subprocess
import sys
import time
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from iresnet_jax.runs.checkpoints import Checkpoints, from_named, load_named, to_named

MAX_SAVE_S = 2.0  # measured 0.04 for 1000 arrays; one file an array takes about 0.5, and a busy machine is slower


class State(NamedTuple):
    params: dict
    opt_state: tuple
    spectral: dict
    step: jax.Array


def make_state(seed=0, num_blocks=3):
    rng = np.random.default_rng(seed)

    def array(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    params = {
        "stage0": {
            "blocks": {
                "conv1": {
                    "kernel": array(num_blocks, 3, 3, 2, 4),
                    "bias": array(num_blocks, 4),
                }
            },
            "first": {"kernel": array(2, 2)},
        },
        "prior": {"mean": array(5)},
    }
    opt_state = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3)).init(params)
    opt_state = jax.tree.map(lambda leaf: leaf + jnp.asarray(seed, leaf.dtype), opt_state)
    spectral = {"stage0": {"blocks": {"conv1": {"u": array(num_blocks, 4)}}}}
    return State(params, opt_state, spectral, jnp.int32(seed))


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
        "half": jnp.array([1.5, -0.0, jnp.nan], jnp.bfloat16),
        "double": np.array([np.pi]),
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


def without(named, name):
    return {key: value for key, value in named.items() if key != name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda named: without(named, "params/prior/mean"), "it lacks 'params/prior/mean'"),
        (
            lambda named: without(named, "params/stage0/block01/conv1/bias"),
            "it lacks 'params/stage0/block01/conv1/bias'",
        ),
        (lambda named: named | {"ema/w": np.zeros(1)}, "it holds 'ema/w', which this state does not have"),
        (
            lambda named: named | {"params/prior/mean": np.zeros(4, np.float32)},
            r"'params/prior/mean' has shape \(4,\) in it, not \(5,\)",
        ),
        (lambda named: named | {"step": np.int64(0)}, "'step' has dtype int64 in it, not int32"),
    ],
)
def test_a_difference_is_named_in_one_sentence(change, message):
    state = make_state()
    with pytest.raises(ValueError, match=message) as caught:
        from_named(change(to_named(state)), state)
    assert "\n" not in str(caught.value)


def test_more_blocks_than_the_state_has_are_noticed():
    with pytest.raises(ValueError, match="it holds 'params/stage0/block02/"):
        from_named(to_named(make_state(num_blocks=3)), make_state(num_blocks=2))


def test_names_that_cannot_be_told_apart_are_refused():
    with pytest.raises(ValueError, match="two arrays of the state are called 'a/b'"):
        to_named({"a": {"b": np.zeros(1)}, "a/b": np.zeros(1)})
    with pytest.raises(ValueError, match="the scalar 'blocks/slope' lies under 'blocks'"):
        to_named({"blocks": {"slope": np.float32(1)}})


def restored_latest(checkpoints, target):
    result = checkpoints.restore_latest(target)
    assert result is not None
    return result


def restored_best(checkpoints, target):
    result = checkpoints.restore_best(target)
    assert result is not None
    return result


# --- saving and restoring ----------------------------------------------------------------------------------------


def steps_in(workdir):
    """The steps of the checkpoints of a run, which has nothing else in its folder of them."""
    return sorted(int(path.name.removesuffix(".npz")) for path in (workdir / "checkpoints").iterdir())


def test_round_trip_is_bit_exact_across_processes(tmp_path):
    state = make_state(seed=5)
    assert Checkpoints(tmp_path).restore_latest(state) is None
    assert Checkpoints(tmp_path).restore_best(state) is None
    Checkpoints(tmp_path).save(120, state)
    restored, step = restored_latest(Checkpoints(tmp_path), jax.eval_shape(lambda: state))
    assert step == 120
    assert_same_bits(restored, state)
    with pytest.raises(AssertionError):  # the comparison can fail
        assert_same_bits(restored, make_state(seed=6))


def test_every_dtype_and_empty_arrays_survive(tmp_path, x64):
    state = {
        "double": jnp.array([jnp.pi, -0.0, jnp.nan]),
        "half": jnp.array([1.5, 2.5], jnp.bfloat16),
        "flag": jnp.array([True, False]),
        "key": jax.random.PRNGKey(0),
        "empty": jnp.zeros((0, 3)),
        "step": jnp.int32(1),
    }
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state)
    restored, _ = restored_latest(checkpoints, state)
    assert_same_bits(restored, state)


def test_the_newest_are_kept_and_a_step_can_be_saved_again(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (10, 20, 30, 30):
        checkpoints.save(step, make_state(step))
    assert steps_in(tmp_path) == [20, 30]
    restored, step = restored_latest(checkpoints, make_state())
    assert (step, int(restored.step)) == (30, 30)


def test_saving_an_earlier_step_gives_up_the_later_ones(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (10, 20, 15):
        checkpoints.save(step, make_state(step))
    assert steps_in(tmp_path) == [10, 15]


def test_the_best_survives_a_resume(tmp_path):
    Checkpoints(tmp_path).save(10, make_state(10), metric=2.0)
    Checkpoints(tmp_path).save(20, make_state(20), metric=1.0)
    checkpoints = Checkpoints(tmp_path)
    for step, metric in ((30, 1.5), (40, float("nan")), (50, 1.0), (60, None)):
        checkpoints.save(step, make_state(step), metric=metric)
    assert steps_in(tmp_path) == [20, 50, 60]
    restored, step = restored_best(checkpoints, make_state())
    assert (step, int(restored.step)) == (20, 20)
    checkpoints.save(70, make_state(70), metric=np.float32(0.5))
    assert restored_best(checkpoints, make_state())[1] == 70
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
    checkpoints = Checkpoints(folder, keep=1)
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


def test_of_several_with_a_metric_the_lowest_is_the_best(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=3)
    for step, metric in ((10, 1.0), (20, 2.0), (30, 1.0)):
        checkpoints.save(step, make_state(step), metric=metric)
    assert restored_best(checkpoints, make_state())[1] == 10


def test_named_arrays_can_be_read_without_a_state(tmp_path):
    state = make_state()
    Checkpoints(tmp_path).save(7, state)
    named = load_named(tmp_path / "checkpoints" / "7.npz")
    assert_same_bits(named, to_named(state))


def test_a_checkpoint_of_another_model_is_not_taken_for_a_damaged_one(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, make_state(num_blocks=2))
    checkpoints.save(2, make_state(num_blocks=2))
    with pytest.raises(ValueError, match="does not fit this state, it lacks 'params/stage0/block02/conv1/bias'"):
        checkpoints.restore_latest(make_state(num_blocks=3))


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


def big_state(seed):
    """A state whose numbers do not compress, so that its data are in the largest file."""
    return {"w": jnp.asarray(np.random.default_rng(seed).normal(size=20_000), jnp.float32), "step": jnp.int32(seed)}


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
    for step in (10, 20):
        checkpoints.save(step, big_state(step))
    damage(checkpoints.path(20))
    with pytest.warns(UserWarning, match="20.npz is damaged .* falling back to step 10"):
        restored, step = restored_latest(Checkpoints(tmp_path), big_state(0))
    assert step == 10
    assert_same_bits(restored, big_state(10))

    if checkpoints.path(20).is_file():
        checkpoints.save(20, big_state(20))  # a resumed run comes by again
        assert restored_latest(checkpoints, big_state(0))[1] == 20  # warnings are errors
        damage(checkpoints.path(20))
    damage(checkpoints.path(10))
    with (
        pytest.warns(UserWarning, match="20.npz is damaged"),
        pytest.raises(RuntimeError, match=r"no checkpoint in .* can be read .* put back a copy") as error,
    ):
        checkpoints.restore_latest(big_state(0))
    assert "\n" not in str(error.value)


def test_the_best_that_is_damaged_falls_back_to_the_next(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    for step, metric in ((10, 3.0), (20, 1.0), (30, 2.0)):
        checkpoints.save(step, big_state(step), metric=metric)
    flip_bit(checkpoints.path(20), 1000)
    with pytest.warns(UserWarning, match="20.npz is damaged .* falling back to step 30"):
        assert restored_best(checkpoints, big_state(0))[1] == 30
    checkpoints.path(20).write_bytes(b"")
    with pytest.warns(UserWarning, match="20.npz is damaged .* falling back to step 30"):
        assert restored_best(checkpoints, big_state(0))[1] == 30


def test_no_flipped_bit_goes_unnoticed(tmp_path):
    state = {"w": np.arange(40.0), "deep": {"half": jnp.ones(3, jnp.bfloat16)}}
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
    checkpoints = Checkpoints(tmp_path, keep=1)
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


def test_a_file_in_the_place_of_the_folder_is_named(tmp_path):
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(ValueError, match=r"checkpoints is a file, where a folder is needed: move it away"):
        Checkpoints(tmp_path)


def test_a_thousand_small_arrays_are_cheap_to_save(tmp_path):
    state = {f"layer{i}": {"kernel": np.full((8, 8), i, np.float32)} for i in range(1000)}
    start = time.perf_counter()
    Checkpoints(tmp_path).save(1, state)
    assert time.perf_counter() - start < MAX_SAVE_S
    assert steps_in(tmp_path) == [1]


def test_arguments_out_of_range(tmp_path):
    with pytest.raises(ValueError, match="keep must be at least 1, got 0"):
        Checkpoints(tmp_path, keep=0)
    with pytest.raises(ValueError, match="step must not be negative, got -1"):
        Checkpoints(tmp_path).save(-1, make_state())
    with pytest.raises(ValueError, match="no values to save"):
        Checkpoints(tmp_path).save(0, {"empty": np.zeros((0, 3))})
