"""How programs are compiled: quickly, unless the user has said how, and within other programs as
those are.
"""

import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from iresnet_jax.maths import platforms
from tests import tiny_runs as runs

AT_ONCE = """
import jax, jax.numpy as jnp, numpy as np
from iresnet_jax.branches.feedforward import FeedforwardSpec
from iresnet_jax.maths.logdet_exact import dense_logdet

spec = FeedforwardSpec((40,), (34,))
blocks = jax.vmap(spec.initial_weights)(jax.random.split(jax.random.key(0), 64))
vectors = jax.vmap(spec.initial_iterates)(jax.random.split(jax.random.key(1), 64))

def logdets(blocks, x):
    weights = jax.tree.map(lambda leaf: 0.3 * leaf[0], blocks)
    return sum(dense_logdet(lambda x: 0.1 * jnp.tanh(x), x) + spec.logdet(weights, x))

def norms(blocks, x):
    del x
    return jax.vmap(lambda *own: spec.singular_vectors(*own, num_steps=None))(blocks, vectors)

functions = (jax.grad(logdets, argnums=1), norms)
programs = [jax.pmap(function, in_axes=(None, 0)) for function in functions]
x = np.random.default_rng(0).normal(size=(jax.local_device_count(), 64, 40)).astype(np.float32)

for _ in range(12):
    jax.block_until_ready([program(blocks, x) for program in programs])
"""


@pytest.fixture
def options(monkeypatch):
    """`compile_options` as decided anew by the flags that a test sets."""
    jax.devices()  # XLA reads its flags once, before
    monkeypatch.setattr(platforms, "compile_options", platforms.compile_options.__wrapped__)
    return platforms.compile_options


def test_flags_of_the_user_come_before_options(options, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")
    assert options() == platforms.CPU_OPTIONS
    monkeypatch.setenv(
        "XLA_FLAGS", "--xla_backend_optimization_level=3 --xla_cpu_use_fusion_emitters=true"
    )
    assert options() == {}


def test_the_compiler_knows_the_options(options, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")
    power = platforms.fast_compile(lambda x, power: x**power, static_argnums=(1,))
    np.testing.assert_array_equal(power(jnp.arange(3.0), 2), [0, 1, 4])
    compiled = jax.jit(jnp.sin).lower(jnp.ones(3)).compile(compiler_options=options())
    np.testing.assert_allclose(compiled(jnp.ones(3)), np.sin(np.ones(3)), rtol=1e-6)


def test_a_function_is_traced_once_and_is_part_of_other_programs(options, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")  # other programs refuse parts with options of their own
    inner = platforms.fast_compile(chex.assert_max_traces(lambda x: 2 * x, n=1))
    assert [float(inner(x)) for x in (1.0, 2.0)] == [2, 4]
    within = platforms.fast_compile(lambda x: 2 * x)
    assert float(jax.jit(within)(1.0)) == 2
    assert float(jax.grad(within)(1.0)) == 2
    np.testing.assert_array_equal(jax.vmap(within)(jnp.ones(2)), [2, 2])
    constant = jnp.ones(())  # which does not depend on the other program's arguments
    assert float(jax.jit(lambda x: x * within(constant))(3.0)) == 6
    np.testing.assert_array_equal(
        jax.lax.map(lambda x: x * within(constant), np.float32([3, 4])), [6, 8]
    )


def test_products_on_accelerators_are_in_float32_unless_another_precision_was_chosen():
    seen = []

    def asks_for_precision(x):
        seen.append(jax.config.jax_default_matmul_precision)
        return x

    program = platforms.fast_compile(asks_for_precision)
    program(1.0)
    with platforms.compiling_for("gpu"):
        program(1.0)
        with jax.default_matmul_precision("tensorfloat32"):
            program(1.0)
    assert seen == [None, "float32", "tensorfloat32"]


@pytest.mark.slow
def test_exact_log_determinants_and_norms_on_two_devices_do_not_wait_for_each_other():
    """Batches of LAPACK's functions would wait for ever."""
    subprocess.run([sys.executable, "-c", AT_ONCE], env=runs.environment(), check=True, timeout=120)
