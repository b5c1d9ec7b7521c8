"""Programs that were stored give the bits of those that are traced; what cannot be read or written does no harm."""

import os
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_runs as runs
from jax.experimental.compilation_cache import compilation_cache

from iresnet_jax.maths import platforms
from iresnet_jax.runs import program_keys, stored_programs
from iresnet_jax.training import parallel

BATCH = np.linspace(-1, 1, 24, dtype=np.float32).reshape(8, 3)


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    """Where programs are stored, from a cache of their own. The functions of this file count as the package's."""
    monkeypatch.setattr(program_keys, "PACKAGES", (*program_keys.PACKAGES, __name__.partition(".")[0]))
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}

    def use(*values):
        for name, value in zip(names, values, strict=True):
            jax.config.update(name, value)
        compilation_cache.reset_cache()

    use(str(tmp_path), 0.0)
    monkeypatch.setattr(platforms, "_find", stored_programs.find)
    yield tmp_path / stored_programs.FOLDER
    use(*before.values())


def trained(factor=1.0, num_devices=2):
    """The state and the metrics after three steps, and how often a step was traced."""
    traces = []

    def step(state, batch):
        traces.append(1)
        noise = jax.random.normal(jax.random.fold_in(jax.random.key(0), state["step"]), batch.shape)
        loss, gradient = jax.value_and_grad(lambda w: jnp.mean(jnp.tanh((batch + noise) @ w) ** 2))(state["w"])
        loss, gradient = jax.lax.pmean((loss, gradient), parallel.AXIS)
        return {"w": state["w"] - factor * gradient, "step": state["step"] + 1}, {"loss": loss}

    batch = parallel.shard(BATCH, num_devices=num_devices)
    state, metrics = {"w": jnp.ones(3), "step": jnp.int32(0)}, {}
    run = parallel.parallelize(step)
    run.compile(state, batch)
    for _ in range(3):
        state, metrics = run(state, batch)
    return jax.device_get((state, metrics)), len(traces)


def assert_alike(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize("num_devices", [1, 2])
def test_a_stored_step_gives_the_bits_of_a_traced_one_and_is_not_traced(folder, num_devices):
    expected, num_traces = trained(num_devices=num_devices)
    assert num_traces == 1
    paths = [*folder.iterdir()]
    for path in paths:
        os.utime(path, (1, 1))
    found, num_traces = trained(num_devices=num_devices)
    assert num_traces == 0
    assert_alike(found, expected)
    assert min(path.stat().st_mtime for path in paths) > 1  # they were used, and are not among those that make room


def test_another_step_is_not_taken_for_it():
    trained()
    found, num_traces = trained(factor=2.0)
    assert num_traces == 1
    with pytest.raises(AssertionError):
        assert_alike(found, trained()[0])


def test_sources_that_lower_to_the_same_program_find_it_again(folder, monkeypatch):
    expected, _ = trained()
    first = {*folder.iterdir()}
    monkeypatch.setattr(program_keys, "_hash_of_sources", lambda newest: "changed")
    for expected_traces in (1, 0):
        found, num_traces = trained()
        assert num_traces == expected_traces
        assert_alike(found, expected)
    [link] = {*folder.iterdir()} - first
    assert link.stat().st_size < 200  # the program is not stored again


def test_damaged_and_foreign_files_are_replaced(folder):
    expected, _ = trained()
    files = {path: path.read_bytes() for path in folder.iterdir()}
    assert len(files) == 2
    for path, whole in files.items():
        [other] = {*files} - {path}
        for content in (b"", whole[:-1], whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:], files[other]):
            path.write_bytes(content)
            for cached in folder.parent.glob("*-cache"):
                cached.unlink()  # of JAX's programs, of which none could be stored
            found, num_traces = trained()
            assert num_traces == 1
            assert_alike(found, expected)
            assert trained()[1] == 0


def test_a_program_of_jax_s_cache_is_used_and_not_stored(folder):
    """jaxlib 0.10 would serialise a part of it."""
    expected, _ = trained()
    for path in folder.iterdir():
        path.unlink()
    found, num_traces = trained()
    assert num_traces == 1
    assert_alike(found, expected)
    assert not [*folder.iterdir()]


def test_a_disk_that_cannot_be_written_or_has_no_space_stops_nothing(folder, monkeypatch):
    folder.touch()
    trained()
    assert not folder.read_bytes()
    folder.unlink()

    def full(path):
        raise OSError("no space")

    monkeypatch.setattr(stored_programs, "replacing", full)
    trained(factor=2.0)
    assert not [*folder.iterdir()]


@pytest.mark.parametrize("reason", ["no cache", "switched off", "remote", "several processes", "unknown origin"])
def test_nothing_is_stored_where_that_is_not_wanted_or_cannot_be(folder, monkeypatch, reason):
    settings = {"jax_compilation_cache_dir": str(folder.parent), "jax_enable_compilation_cache": reason != "switched off"}
    settings["jax_compilation_cache_dir"] = {"no cache": None, "remote": "gs://bucket"}.get(reason, str(folder.parent))
    monkeypatch.setattr(stored_programs, "_settings", SimpleNamespace(**settings))
    if reason == "several processes":
        monkeypatch.setattr(jax, "process_count", lambda: 2)
    if reason == "unknown origin":
        monkeypatch.setattr(program_keys, "PACKAGES", ("jax",))
    assert stored_programs.find("step", trained, lambda: pytest.fail("it was traced"), (jnp.ones(1),), {}) is None
    assert not folder.exists()


# --- functions ----------------------------------------------------------------------------------------------------------


def powers(power=2):
    """A function by `quick_jit`, and how often it was traced."""
    traces = []

    def function(x, key, power):
        traces.append(1)
        x = x + jax.random.normal(key, x.shape, x.dtype)
        return {"power": x**power, "factor": jnp.linalg.cholesky(x @ x.T + jnp.eye(len(x)))}

    found = platforms.quick_jit(function, static_argnums=(2,))
    return lambda x, key=None: (found(x, jax.random.key(0) if key is None else key, power), len(traces))


def test_a_function_is_not_traced_again_for_arrays_of_one_shape_dtype_and_placement():
    expected, num_traces = powers()(jnp.asarray(BATCH))
    assert num_traces == 1
    call = powers()
    for x in (jnp.asarray(BATCH), BATCH, jnp.asarray(BATCH)):
        found, num_traces = call(x, jax.random.key(0))
        assert_alike(found, expected)
        assert num_traces == 0
    assert powers(3)(BATCH)[1] == 1
    _, num_traces = call(BATCH[:4])
    assert num_traces == 1
    with jax.enable_x64(True):
        precise, num_traces = call(BATCH.astype(np.float64))
    assert num_traces == 2
    assert precise["power"].dtype == np.float64
    elsewhere, num_traces = call(*jax.device_put((BATCH, jax.random.key(0)), jax.devices()[1]))
    assert num_traces == 3
    assert elsewhere["power"].device == jax.devices()[1]
    assert not call(BATCH)[0]["power"].committed  # it goes with arrays on other devices
    with pytest.raises(ValueError, match="promotion"), jax.numpy_dtype_promotion("strict"):
        powers()(jnp.ones((3, 3), jnp.bfloat16))


def test_arguments_that_are_not_used_count():
    """JAX leaves them out of a program's text, and an executable has a place for them."""

    def first(used, unused):
        return 2 * used

    def second(unused, used):
        return 2 * used

    x, other = jnp.ones(3), jnp.zeros(3)
    for function, arguments in ((first, (x, other)), (first, (x, jnp.ones((2, 2)))), (second, (other, x))):
        np.testing.assert_array_equal(platforms.quick_jit(function)(*arguments), 2 * x)
        np.testing.assert_array_equal(platforms.quick_jit(function)(*arguments), 2 * x)


def test_random_keys_are_those_of_jax():
    def split(key):
        return jax.random.split(key)

    for _ in range(2):
        keys = platforms.quick_jit(split)(jax.random.key(0))
        assert jax.random.key_impl(keys) == jax.random.key_impl(jax.random.key(0))
        jax.random.poisson(keys[0], 1.0)


def test_what_is_computed_is_committed_as_without_stored_programs():
    def double(x, number):
        return number * x

    x = jnp.ones(3)
    for placed in (jax.device_put(x, jax.devices()[0]), x):
        for number in (2, 2.0):
            assert platforms.quick_jit(double)(placed, number).committed == placed.committed
            assert platforms.quick_jit(double)(placed, number).dtype == x.dtype
    with jax.set_mesh(jax.sharding.Mesh(np.array(jax.devices()), ("x",), axis_types=(jax.sharding.AxisType.Auto,))):
        assert len(platforms.quick_jit(double)(x, 2).sharding.device_set) == 2
    assert len(platforms.quick_jit(double)(x, 2).sharding.device_set) == 1


def test_a_search_for_what_is_not_finite_is_jax_s():
    def root(x):
        return jnp.sqrt(x)

    call = platforms.quick_jit(root)
    assert np.isnan(call(-jnp.ones(())))
    with jax.debug_nans(True), pytest.raises(FloatingPointError):
        call(-jnp.ones(()))


def test_programs_in_memory_are_not_without_number(monkeypatch):
    monkeypatch.setattr(platforms, "MOST_PROGRAMS", 2)
    programs = platforms.FoundPrograms(powers, "test")
    for size in (1, 2, 1, 3):
        assert programs.of(lambda: jax.jit(jnp.sin).lower(BATCH[:size]), (BATCH[:size],)) is not None  # noqa: B023
    assert [key[2][0][0] for key in programs._programs] == [(1, 3), (3, 3)]


def test_functions_are_themselves_within_other_programs():
    call, x = powers(), jnp.asarray(BATCH)
    expected, _ = call(x)
    found = jax.vmap(lambda x: call(x)[0])(x[None])
    np.testing.assert_allclose(found["power"][0], expected["power"], rtol=1e-6)
    gradient = jax.grad(lambda x: call(x)[0]["power"].sum())(x)
    np.testing.assert_allclose(gradient, 2 * (x + jax.random.normal(jax.random.key(0), x.shape)), rtol=1e-5)


def test_evaluations_of_all_examples_find_their_programs():
    for expected_traces in (1, 0):
        traces = []

        def evaluate(state, batch, traces=traces):
            traces.append(1)
            return batch * state

        found = parallel.over_batches(evaluate, jnp.float32(2), lambda places: BATCH[places], len(BATCH), 4)
        np.testing.assert_array_equal(found, 2 * BATCH)
        assert len(traces) == expected_traces


ALONE = """
import jax, jax.numpy as jnp
from iresnet_jax.maths import platforms
from iresnet_jax.runs import program_keys, stored_programs

program_keys.PACKAGES = (*program_keys.PACKAGES, "__main__")
stored_programs.keep_compiled_programs()
seen = []
jax.monitoring.register_event_duration_secs_listener(lambda event, *_, **about: seen.append((event, about.get("fun_name"))))

def factor(x):
    return jnp.linalg.cholesky(x)

print(platforms.quick_jit(factor)(jnp.eye(2) * 4)[1, 1])
print((stored_programs.RETRIEVAL, "factor") in seen)
"""


def test_a_process_that_lowers_nothing_of_lapack_runs_a_stored_program_that_calls_it(tmp_path):
    environment = {**runs.environment(), "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "alone")}
    for expected in ("2.0\nFalse\n", "2.0\nTrue\n"):
        run = subprocess.run([sys.executable, "-c", ALONE], env=environment, capture_output=True, text=True, check=True)
        assert run.stdout == expected


# --- folders ------------------------------------------------------------------------------------------------------------


def test_programs_that_were_not_used_for_longest_make_room(tmp_path):
    for used, (name, size) in enumerate([("older", 2**28), ("old", 2**29), ("new", 2**29), ("newest", 2**29)]):
        path = tmp_path / f"{name}-cache"
        path.touch()
        os.truncate(path, size)
        os.utime(path, (used, used))
    stored_programs.remove_oldest(tmp_path.iterdir(), 2**30)
    assert {path.name for path in tmp_path.iterdir()} == {"new-cache", "newest-cache"}


@pytest.mark.parametrize("setting", ["switched off", "nowhere to write", "another folder"])
def test_nothing_is_kept_where_that_is_not_wanted_or_cannot_be(tmp_path, monkeypatch, setting):
    folder = tmp_path / "theirs" if setting == "another folder" else None
    enabled = setting != "switched off"
    settings = SimpleNamespace(jax_compilation_cache_dir=folder, jax_enable_compilation_cache=enabled)
    monkeypatch.setattr(stored_programs, "_settings", settings)
    parent = "/dev/null" if setting == "nowhere to write" else str(tmp_path)
    monkeypatch.setenv("IRESNET_JAX_CACHE_DIR", f"{parent}/cache")
    before = jax.config.jax_compilation_cache_dir
    assert stored_programs.keep_compiled_programs() is None
    assert not list(tmp_path.iterdir())
    assert jax.config.jax_compilation_cache_dir == before
