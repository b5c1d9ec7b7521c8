"""Every part of a program's key changes by itself, and what cannot be told makes no key."""

import contextlib
import functools
import os
import time
from dataclasses import replace
from types import MethodType, SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from iresnet_jax.branches import kinds
from iresnet_jax.maths import platforms
from iresnet_jax.models.architecture import StageSpec
from iresnet_jax.runs import program_keys
from iresnet_jax.runs.config import Config, ConstraintConfig, DataConfig, ModelConfig, OptimizerConfig, TrainingConfig
from iresnet_jax.runs.program_keys import UnknownError, described, key_of

ROWS = jax.ShapeDtypeStruct((4, 2), jnp.float32)


@pytest.fixture(autouse=True)
def known(monkeypatch):
    """The functions of this file count as the package's."""
    monkeypatch.setattr(program_keys, "PACKAGES", (*program_keys.PACKAGES, __name__.partition(".")[0]))


def scaled(factor, *, shift=0.0):
    def scale(x, power=1):
        return factor * x**power + shift

    return scale


def another(factor):
    @functools.wraps(scaled(factor))
    def scale(x):
        return factor * x

    return scale


def with_default(power):
    function = scaled(2.0)
    function.__defaults__ = (power,)
    return function


def itself(factor):
    def times(x, count):
        return factor * times(x, count - 1) if count else x

    return times


# --- what a function is bound to --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "function",
    [
        *(scaled(3.0), scaled(2), scaled(2.0, shift=1.0), another(2.0), with_default(2), functools.partial(scaled(2.0))),
        *(functools.lru_cache(scaled(2.0)),),
        *(scaled(np.float32(2)), scaled(np.arange(2.0)), scaled(np.arange(3)), scaled((2.0, 3.0)), scaled([2.0, 3.0])),
        *(scaled({"a": 2.0}), scaled({"b": 2.0}), scaled({2.0}), scaled(scaled(2.0)), scaled(ROWS.dtype.type), itself(2.0)),
    ],
)
def test_other_functions_have_other_keys(function):
    assert described(function) != described(scaled(2.0))


@pytest.mark.parametrize("name", ["seed", "data", "model", "constraint", "optimizer", "training"])
def test_other_settings_have_other_keys(name):
    changed = {
        "seed": 1,
        "data": DataConfig("moons"),
        "model": ModelConfig(stages=(StageSpec(num_blocks=5),)),
        "constraint": ConstraintConfig(rtol=0.1),
        "optimizer": OptimizerConfig(learning_rate=1.0),
        "training": TrainingConfig(ema_decay=0.5),
    }
    assert described(replace(Config(), **{name: changed[name]})) != described(Config())


@pytest.mark.parametrize("value", [2.0, np.arange(3.0), {"b": 1, "a": None}, {"x", "y", "z"}, SimpleNamespace, b"a"])
def test_equal_functions_have_equal_keys(value):
    assert described(scaled(value)) == described(scaled(value))
    assert described(itself(value)) == described(itself(value))


def test_functions_of_unknown_origin_have_no_key(monkeypatch):
    wrapped = functools.wraps(jax.nn.silu)(scaled(2.0))
    assert wrapped.__module__.startswith("jax.")
    for value in (object(), np.array([object()]), jnp.negative, iter([])):
        with pytest.raises(UnknownError):
            described(scaled(value))
    monkeypatch.setattr(program_keys, "PACKAGES", ("jax", "numpy"))
    for function in (scaled(2.0), wrapped, functools.partial(wrapped), MethodType(wrapped, 1)):
        with pytest.raises(UnknownError, match="is not from jax"):
            described(function)


def test_a_registered_kind_of_branch_is_part_of_a_stage(monkeypatch):
    monkeypatch.setattr(kinds, "KINDS", dict(kinds.KINDS))
    monkeypatch.setattr(program_keys, "PACKAGES", ("iresnet_jax", "jax", "numpy"))
    assert described(StageSpec(1, kind="sandwich")) != described(StageSpec(1))
    kinds.register("odd", scaled(2.0))
    with pytest.raises(UnknownError, match="is not from iresnet_jax"):
        described(StageSpec(1, kind="odd"))


# --- arguments and surroundings ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        *((jax.ShapeDtypeStruct((4, 3), jnp.float32),), (jax.ShapeDtypeStruct((4, 2), jnp.int32),), (ROWS, ROWS), ((ROWS,),)),
        *(({"a": ROWS},), (jax.ShapeDtypeStruct((4, 2), jnp.float32, weak_type=True),)),
    ],
)
def test_other_arguments_have_other_keys(arguments):
    assert key_of(scaled(2.0), arguments) != key_of(scaled(2.0), (ROWS,))


def device(**changed):
    return SimpleNamespace(**{"platform": "cpu", "device_kind": "cpu", "id": 0, "client": jax.devices()[0].client} | changed)


SURROUNDINGS = {
    "a version": lambda patch: patch.setattr(program_keys, "_versions", lambda: ("99",)),
    "Python": lambda patch: patch.setattr(program_keys.sys, "version", "4.0"),
    "one device more": lambda patch: patch.setattr(jax, "local_devices", lambda: [*jax.devices(), jax.devices()[0]]),
    "a kind of device": lambda patch: patch.setattr(jax, "local_devices", lambda: [device(), device(id=1, device_kind="new")]),
    "a platform": lambda patch: patch.setattr(jax, "local_devices", lambda: [device(), device(id=1, platform="tpu")]),
    "a runtime": lambda patch: patch.setattr(
        jax, "local_devices", lambda: [device(client=SimpleNamespace(platform_version="new")), device(id=1)]
    ),
    "a processor": lambda patch: patch.setattr(program_keys.machine, "processor", lambda: "new"),
    "cores": lambda patch: patch.setattr(program_keys, "num_cores", lambda: 77),
    "flags": lambda patch: patch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"] + " --xla_cpu_enable_fast_math=true"),
    "quick options": lambda patch: patch.setattr(platforms, "QUICK", {"xla_cpu_enable_fast_math": False}),
}
CONTEXTS = {
    "float64": lambda: jax.enable_x64(True),
    "precision": lambda: jax.default_matmul_precision("bfloat16"),
    "random bits": lambda: jax.threefry_partitionable(False),
    "random numbers": lambda: jax.default_prng_impl("rbg"),
    "checks": lambda: jax.debug_nans(True),
    "compiling for others": lambda: platforms.compiling_for("tpu"),
}


@pytest.mark.parametrize("name", [*SURROUNDINGS, *CONTEXTS])
def test_other_surroundings_have_other_keys(monkeypatch, name):
    before = key_of(scaled(2.0), (ROWS,))
    with CONTEXTS.get(name, contextlib.nullcontext)():
        SURROUNDINGS.get(name, lambda _: None)(monkeypatch)
        assert key_of(scaled(2.0), (ROWS,)) != before
    monkeypatch.undo()


def test_sources_that_differ_have_other_keys_and_those_that_were_just_changed_none(monkeypatch, tmp_path):
    path = tmp_path / "a.py"

    def key(text, changed):
        path.write_text(text)
        os.utime(path, (changed, changed))
        program_keys._hash_of_sources.cache_clear()
        return program_keys.environment()["sources"]

    monkeypatch.setattr(program_keys, "PACKAGE", tmp_path)
    now = time.time()
    monkeypatch.setattr(program_keys, "_started", now + 100)
    first = key("1", 1)
    assert key("2", 2) != first
    assert key("1", 3) == first
    for started, changed in ((now + 100, now + 101), (now - 100, 1)):  # written later, or copied with its old time
        monkeypatch.setattr(program_keys, "_started", started)
        with pytest.raises(UnknownError, match="changed"):
            key("1", changed)
