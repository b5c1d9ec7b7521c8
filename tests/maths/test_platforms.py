"""How programs are compiled: quickly, unless the user has said how, and within other programs as those are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from iresnet_jax.maths import platforms


def asks(x):
    """Doubles, and adds 1 where compiling is quick by the older emitters."""
    return 2 * x + platforms.is_slow_in_place()


@pytest.fixture(autouse=True)
def _flags_are_read():
    jax.devices()  # XLA reads its flags once


@pytest.fixture
def without_flags(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setattr(platforms, "QUICK", {**platforms.QUICK, "xla_cpu_use_fusion_emitters": False})


def test_flags_of_the_user_come_before_options(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=3 --xla_cpu_use_fusion_emitters=true")
    assert platforms.quick_options() == {}
    assert not platforms.is_slow_in_place()


def test_accelerators_have_no_options(without_flags):
    assert platforms.quick_options() == platforms.QUICK
    with platforms.compiling_for("tpu"):
        assert platforms.quick_options() == {}


def test_products_on_accelerators_are_in_float32_unless_another_precision_was_chosen():
    seen = []

    def asks_for_precision(x):
        seen.append(jax.config.jax_default_matmul_precision)
        return x

    program = platforms.quick_jit(asks_for_precision)
    program(1.0)
    with platforms.compiling_for("gpu"):
        program(1.0)
        with jax.default_matmul_precision("tensorfloat32"):
            program(1.0)
    assert seen == [None, "float32", "tensorfloat32"]


def test_the_compiler_knows_the_options(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")
    quick = platforms.quick_jit(lambda x, power: x**power, static_argnums=(1,))
    np.testing.assert_array_equal(quick(jnp.arange(3.0), 2), [0, 1, 4])
    compiled = platforms.compile_quickly(platforms.lower_quickly(jax.jit(jnp.sin), jnp.ones(3)))
    np.testing.assert_allclose(compiled(jnp.ones(3)), np.sin(np.ones(3)), rtol=1e-6)


def test_programs_that_are_compiled_quickly_are_traced_for_the_older_emitters(monkeypatch, without_flags):
    options = []
    monkeypatch.setattr(jax, "jit", lambda function, compiler_options=None, **_: options.append(compiler_options) or function)
    assert float(platforms.quick_jit(asks)(1.0)) == 3
    assert float(platforms.quick_jit(asks, is_rare=True)(1.0)) == 3
    assert options == [platforms.QUICK, platforms.RARE]
    assert float(asks(1.0)) == 2


def test_within_another_program_options_are_those_of_that_one(without_flags):
    inner = platforms.quick_jit(asks)
    assert float(jax.jit(inner)(1.0)) == 2
    np.testing.assert_array_equal(jax.vmap(inner)(jnp.ones(2)), [2, 2])
    assert float(jax.grad(inner)(1.0)) == 2


def test_objects_that_are_no_arrays_run_as_they_are(without_flags):
    assert platforms.quick_jit(lambda told, x: told.upper() + str(x))("no array, ", 1) == "NO ARRAY, 1"
