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
from iresnet_jax.runs.planning import plan
from iresnet_jax.runs.planning.program_costs import all_reduces, flops, lowered_all_reduces, num_bytes
from iresnet_jax.training import parallel

HAS_LIBTPU = importlib.util.find_spec("libtpu") is not None
SHARED = {"training.batch_size": 32}

pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")


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

    mapped = parallel.for_devices(step, jax.devices()[:2])
    lowered = mapped.lower(jnp.zeros((5, 3)), jnp.zeros((4, 5, 3)))
    assert lowered_all_reduces(lowered.as_text()) == [60, 2]
    assert sum(all_reduces(lowered.compile().as_text())) in (62, 64)  # CPUs may sum bfloat16 as float32
    text = """
  %all-reduce.1 = (f32[2,3]{1,0:T(8,128)}, bf16[4]{0}) all-reduce(%a, %b), channel_id=1
  ROOT %start = f32[] all-reduce-start(f32[] %c), to_apply=%add
  %done = f32[] all-reduce-done(%start)
"""
    assert all_reduces(text) == [32, 4]
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
    config = runs.config_of(runs.CONFIGS[name], **SHARED)
    made = plan.make(config, plan.machine("cuda:4"))
    assert (made.num_devices, made.batch_size) == (4, 32)
    assert made.temporary_bytes is None
    params = 4 * made.num_parameters
    assert 3 * params <= made.argument_bytes  # parameters, average and a moment at least; the batch and more
    assert params <= sum(made.reductions)  # of gradients, before they are combined
    assert made.flops_per_example > 0
    text = str(made)
    assert text.startswith("lowers for cuda:4 with 8 examples a device; what it takes on the way is known after a step")
    assert f"{made.num_parameters:,} parameters; a device: " in text
    assert ("loops of random length" in text) == (config.objective == "inversion")  # those of its fixed points


def test_a_roulette_says_that_its_loops_are_counted_once():
    config = runs.config_of(runs.TOY_CONFIG, **{"logdet.kind": "roulette", **SHARED})
    assert "GFLOP an example, with loops of random length counted as if they ran once" in str(
        plan.make(config, plan.machine("cuda"))
    )


def test_a_plan_is_of_the_model_that_the_config_describes(tmp_path):
    config = runs.config_of(runs.DIGITS_CONFIG, **{"data.name": "mnist", "training.batch_size": 8})
    conditional = runs.config_of(
        runs.DIGITS_CONFIG, **{"data.name": "mnist", "training.batch_size": 8, "data.condition_on_labels": True}
    )
    plain, given = (plan.make(one, plan.machine("cuda")).num_parameters for one in (config, conditional))
    assert given == plain + 10 * (4 + 1)  # from 10 classes to the outputs of both layers


def test_arithmetic_of_a_plan_does_not_depend_on_how_the_batch_is_spread():
    config = runs.config_of(runs.HYBRID_CONFIG, **SHARED, **{"constraint.norms": "certified"})
    one, four = (plan.make(config, plan.machine(name)) for name in ("cuda", "cuda:4"))
    assert one.flops_per_example < four.flops_per_example < 4 * one.flops_per_example  # the constraint is shared by fewer
    parts = runs.config_of(runs.HYBRID_CONFIG, **SHARED, **{"training.num_parts": 4, "constraint.norms": "certified"})
    assert plan.make(parts, plan.machine("cuda")).flops_per_example == pytest.approx(one.flops_per_example, rel=0.02)


@pytest.mark.skipif(not HAS_LIBTPU, reason="needs libtpu, of the extra tpu")
def test_a_step_for_tpus_has_one_reduction_for_all_gradients():
    """Whose bytes depend on neither power iterations, terms nor batch."""
    on = plan.machine("v5e:2x2")
    usual = {"logdet.num_terms": 5, "constraint.num_steps": 1, **SHARED}
    made = plan.make(runs.config_of(runs.HYBRID_CONFIG, **usual), on)
    assert made.problem is None
    assert made.temporary_bytes > 0
    assert 0 < made.step_seconds < 1
    assert len(made.reductions) <= 3
    assert made.reductions[0] >= 4 * made.num_parameters
    for change in ({"logdet.num_terms": 10}, {"constraint.num_steps": 4}, {"training.batch_size": 64}):
        changed = plan.make(runs.config_of(runs.HYBRID_CONFIG, **{**usual, **change}), on)
        assert changed.reductions == made.reductions


@pytest.mark.skipif(not HAS_LIBTPU, reason="needs libtpu, of the extra tpu")
def test_memory_does_not_depend_on_the_number_of_terms():
    config = {"logdet.kind": "series", **SHARED}
    few, many = (
        plan.make(runs.config_of(runs.HYBRID_CONFIG, **config, **{"logdet.num_terms": terms}), plan.machine("v5e:2x2"))
        for terms in (5, 20)
    )
    assert many.temporary_bytes == pytest.approx(few.temporary_bytes, rel=0.05)


def test_the_largest_batch_is_found_between_what_fits_and_what_does_not():
    on = plan.Machine("v5e:2x2", "tpu", (), 4, chip=plan.CHIPS["v5e"])
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


def answer(capsys, *arguments):
    assert main(["plan", *arguments]) == 2
    [line] = capsys.readouterr().err.splitlines()
    return line


def test_mistakes_are_answered_in_a_sentence(capsys, tmp_path):
    config = tmp_path / "toy.py"
    config.write_text(runs.TOY_CONFIG)
    given = f"--config={config}"
    assert "no topology 'v7:2x2': give one such as v4:2x2" in answer(capsys, given, "--topology=v7:2x2")
    assert "no topology 'cuda:x'" in answer(capsys, given, "--topology=cuda:x")
    assert "--largest-batch needs a TPU topology" in answer(capsys, given, "--topology=cuda:8", "--largest-batch")
    assert "batch_size must be a multiple of 3 devices times 1 parts, got 16" in answer(capsys, given, "--topology=cuda:3")
    assert "config.training has no field 'batch_sise'" in answer(
        capsys, given, "--topology=cuda", "--config.training.batch_sise=3"
    )
    if not HAS_LIBTPU:
        assert "compiling for TPUs needs pip install '.[tpu]'" in answer(capsys, given, "--topology=v5e:2x2")


def test_the_command_prints_the_plan(capsys, tmp_path):
    config = tmp_path / "toy.py"
    config.write_text(runs.TOY_CONFIG)
    assert main(["plan", "--config", str(config), "--topology", "cuda", "--config.training.batch_size=64"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("lowers for cuda with 64 examples a device")
    assert err == ""
