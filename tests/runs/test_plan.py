"""Plans: counts of arithmetic and of reductions, the step lowered for machines that are not here, and mistakes."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_runs as runs
from jax import lax

from iresnet_jax.__main__ import main
from iresnet_jax.maths import platforms as target
from iresnet_jax.maths.convolution import conv
from iresnet_jax.runs import plan, topologies
from iresnet_jax.runs.program_costs import compiled_reductions, flops, num_bytes, reductions
from iresnet_jax.training import parallel

HAS_LIBTPU = importlib.util.find_spec("libtpu") is not None
SHARED = {"training.batch_size": 32}


def cost(function, *shapes):
    arguments = [jax.ShapeDtypeStruct(shape, np.float32) for shape in shapes]
    return flops(jax.jit(function).trace(*arguments).jaxpr.jaxpr)


def test_arithmetic_is_counted_with_loops():
    assert cost(jnp.matmul, (3, 5), (5, 7)) == {"float32": 2 * 3 * 5 * 7}
    assert cost(lambda x, w: lax.scan(lambda x, _: (x @ w, None), x, length=11)[0], (3, 5), (5, 5)) == {
        "float32": 11 * 2 * 3 * 5 * 5
    }
    assert cost(lambda x: jax.checkpoint(lambda x: jax.jit(jnp.matmul)(x, x))(x.astype(jnp.bfloat16)), (4, 4)) == {
        "bfloat16": 2 * 4**3
    }
    assert cost(lambda x: lax.cond(x[0, 0] > 0, lambda x: x @ x @ x, lambda x: x @ x, x), (4, 4)) == {"float32": 4 * 4**3}


def test_convolutions_are_counted_by_their_taps():
    def convolve(x, kernel):
        with target.compiling_for("tpu"):
            return conv(x, kernel)

    images, kernel = (2, 8, 8, 3), (3, 3, 3, 5)
    once = 2 * (3 * 3 * 3) * (2 * 8 * 8 * 5)
    assert cost(convolve, images, kernel) == {"float32": once}
    by_input = jax.grad(lambda x, kernel: jnp.sum(convolve(x, kernel) ** 2))
    assert cost(by_input, images, kernel) == {"float32": 2 * once}


def test_reductions_are_read_from_programs():
    def step(state, batch):
        total = lax.pmean(batch.sum(0), parallel.AXIS)
        return state + total, {"loss": lax.pmean(batch.mean().astype(jnp.bfloat16), parallel.AXIS)}

    traced = parallel.for_devices(step, jax.devices()[:2]).trace(jnp.zeros((5, 3)), jnp.zeros((4, 5, 3)))
    assert reductions(traced.jaxpr.jaxpr) == [60, 2]
    assert sum(compiled_reductions(traced.lower().compile().as_text())) in (62, 64)  # CPUs may sum bfloat16 as float32
    text = """
  %all-reduce.1 = (f32[2,3]{1,0:T(8,128)}, bf16[4]{0}) all-reduce(%a, %b), channel_id=1
  ROOT %start = f32[] all-reduce-start(f32[] %c), to_apply=%add
  %done = f32[] all-reduce-done(%start)
"""
    assert compiled_reductions(text) == [32, 4]
    assert num_bytes({"a": jax.ShapeDtypeStruct((3, 2), np.float32), "b": np.zeros(5, np.uint8)}) == 29


def test_a_step_for_devices_is_the_one_that_trains():
    def step(state, batch):
        return state + lax.pmean(batch.mean(), parallel.AXIS), {"sum": lax.psum(batch.sum(), parallel.AXIS)}

    batch = np.arange(8.0, dtype=np.float32)
    state, metrics = parallel.for_devices(step, jax.devices()[:2])(jnp.zeros(()), batch)
    expected = parallel.parallelize(step)(jnp.zeros(()), parallel.shard(batch, num_devices=2))
    assert (float(state), float(metrics["sum"])) == (float(expected[0]), float(expected[1]["sum"])) == (3.5, 28.0)


def test_the_target_is_this_process_unless_another_is_chosen():
    traced = []

    @jax.jit
    def ask(x):
        traced.append(target.platform())
        return x

    ask(1.0)
    with target.compiling_for("tpu"):
        ask(1.0)
    ask(1.0)
    assert traced == ["cpu", "tpu"]


@pytest.mark.parametrize("name", runs.CONFIGS)
def test_a_plan_for_gpus(name):
    changes = {} if name == "toy" else {"logdet.kind": "series", "logdet.num_terms": 2}
    config = runs.config_of(runs.CONFIGS[name], **SHARED, **changes)
    made = plan.make(config, topologies.machine("cuda:4"))
    assert (made.num_devices, made.batch_size) == (4, 32)
    assert made.temporary_bytes is None
    params = 4 * made.num_parameters
    assert 3 * params <= made.argument_bytes  # parameters, average and a moment at least; the batch and more
    assert params <= sum(made.reductions)  # of gradients, before they are combined
    assert made.flops_per_example > 0
    text = str(made)
    assert text.startswith("lowers for cuda:4 with 8 examples a device; what it takes on the way is known after a step")
    assert f"{made.num_parameters:,} parameters; a device: " in text
    # Those of a roulette's terms.
    assert ("loops of random length" in text) == (name == "toy")


def test_a_plan_is_of_the_model_that_the_config_describes():
    usual = {"data.name": "mnist", "training.batch_size": 8, "logdet.num_terms": 1}
    plain, given = (
        plan.make(runs.config_of(runs.DIGITS_CONFIG, **usual, **changes), topologies.machine("cuda")).num_parameters
        for changes in ({}, {"data.condition_on_labels": True})
    )
    assert given == plain + 10 * (4 + 1)  # from 10 classes to the outputs of both layers


def test_arithmetic_of_a_plan_does_not_depend_on_how_the_batch_is_spread():
    usual = {**SHARED, "constraint.norms": "certified", "logdet.num_terms": 1}
    config, parts = (runs.config_of(runs.DIGITS_CONFIG, **usual, **{"training.num_parts": count}) for count in (1, 4))
    one, four, in_parts = (
        plan.make(settings, topologies.machine(name)).flops_per_example
        for settings, name in ((config, "cuda"), (config, "cuda:4"), (parts, "cuda"))
    )
    assert one < four < 4 * one  # the constraint is shared by fewer
    assert in_parts == pytest.approx(one, rel=0.02)


@pytest.mark.skipif(not HAS_LIBTPU, reason="needs libtpu, of the extra tpu")
def test_a_step_for_tpus_has_one_reduction_for_all_gradients():
    """Whose bytes depend on neither power iterations, terms nor batch, as memory does not depend on the number of terms."""
    on = topologies.machine("v5e:2x2")
    usual = {"logdet.kind": "series", "logdet.num_terms": 5, "constraint.num_steps": 1, **SHARED}
    made = plan.make(runs.config_of(runs.HYBRID_CONFIG, **usual), on)
    assert made.problem is None
    assert 0 < made.step_seconds < 1
    assert len(made.reductions) <= 3
    assert made.reductions[0] >= 4 * made.num_parameters
    for change in ({"logdet.num_terms": 20}, {"constraint.num_steps": 4}, {"training.batch_size": 64}):
        changed = plan.make(runs.config_of(runs.HYBRID_CONFIG, **{**usual, **change}), on)
        assert changed.reductions == made.reductions
        if "logdet.num_terms" in change:
            assert changed.temporary_bytes == pytest.approx(made.temporary_bytes, rel=0.05)


def test_the_largest_batch_is_found_between_what_fits_and_what_does_not():
    on = topologies.Machine("v5e:2x2", "tpu", (), 4, chip=topologies.CHIPS["v5e"])
    tried = []

    def plan_of(share):
        tried.append(share)
        temporary = int(1e9 + 1.7e8 * share + 1e5 * share**2)
        fits = 2e9 + temporary < on.chip.memory_bytes
        known = {"topology": on.topology, "num_devices": 4, "batch_size": 4 * share, "num_parameters": 0}
        known |= {"argument_bytes": int(2e9), "flops_per_example": 0.0, "has_random_loops": False, "reductions": ()}
        known["compile_seconds"] = 0.0
        return plan.Plan(**known, temporary_bytes=temporary if fits else None, problem=None if fits else "too much")

    true = max(share for share in range(1, 300) if plan_of(share).problem is None)
    for first in (8, 32, 200):
        tried.clear()
        found = plan._largest(plan_of(first), plan_of, on, 1, lambda line: None)
        assert true * (1 - 1 / plan.RESOLUTION) - 1 <= found <= true
        assert len(tried) < 10


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "toy.py"
    path.write_text(runs.TOY_CONFIG)
    return f"--config={path}"


def test_the_command_prints_the_plan(capsys, config_file):
    assert main(["plan", config_file, "--topology", "cuda", "--config.training.batch_size=64"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("lowers for cuda with 64 examples a device")
    assert err == ""


MISTAKES = [
    (["--topology=v7:2x2"], "no topology 'v7:2x2'"),
    (["--topology=cuda:x"], "no topology 'cuda:x'"),
    (["--topology=cuda:8", "--largest-batch"], "needs a TPU topology"),
    (["--topology=cuda:3"], "multiple of 3 devices times 1 parts, got 16"),
    (["--topology=cuda", "--config.training.batch_sise=3"], "no field 'batch_sise'"),
    *([] if HAS_LIBTPU else [(["--topology=v5e:2x2"], "pip install '.[tpu]'")]),
]


@pytest.mark.parametrize(("arguments", "sentence"), MISTAKES)
def test_mistakes_are_answered_in_a_sentence(capsys, config_file, arguments, sentence):
    assert main(["plan", config_file, *arguments]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert sentence in line
