"""Whether a config fits a machine that is not there: its training step compiled for a TPU topology, on a CPU.

The step is the one that training runs, with its optimizer. For TPUs it is compiled for all chips, with the sums of several
hosts; that needs the extra ``tpu``, whose compiler knows how much memory a step takes. For GPUs one device's share is lowered
only: their compiler asks the GPU.
"""

import dataclasses
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from iresnet_jax.data import conditioned_on_labels, tfds
from iresnet_jax.data.dataset import DataSet
from iresnet_jax.maths import platforms as target
from iresnet_jax.runs.config import Config
from iresnet_jax.runs.hosts import Wish, with_wishes
from iresnet_jax.runs.model_from_config import load_data
from iresnet_jax.runs.objective_from_config import build_objective
from iresnet_jax.runs.program_costs import compiled_reductions, flops, has_random_loops, num_bytes, reductions
from iresnet_jax.runs.topologies import PASSES, Machine
from iresnet_jax.training import parallel
from iresnet_jax.training.initialization import num_parameters

UTILIZATION = 0.4  # share of the peak that the estimate of a step's time assumes
RESOLUTION = 8  # the largest batch is found to one part in so many


@dataclass(frozen=True)
class Plan:
    """Time and memory that a training step takes. As a string it is a few lines.

    Attributes:
        topology: Machine that the step was made for, such as "v5e:4x8" or "cuda:8".
        num_devices: Its devices.
        batch_size: Examples of a step, over all devices.
        num_parameters: Parameters of the model.
        argument_bytes: Bytes on each device of the state and of its share of the batch.
        flops_per_example: Multiplications and additions of products and convolutions, with loops counted, an example; what a
            step does once, as for norms, is shared out.
        has_random_loops: Whether loops of random length, as of a roulette's terms, were counted as if they ran once.
        reductions: Bytes of every reduction over devices in a step, the largest first; on GPUs before they are combined.
        temporary_bytes: Bytes on each device of what the step makes on the way; None if the compiler was not asked.
        code_bytes: Bytes of the program; None if it was not compiled.
        problem: Why the step does not fit, in the compiler's words; None if it does, or was not compiled.
        compile_seconds: Time to trace, lower and compile the step here.
        largest_share: Most examples a device that fit, if that was asked.
        step_seconds: Estimate of a step's time, see `estimate`; None for GPUs.
        assumptions: What the estimate assumes.
    """

    topology: str
    num_devices: int
    batch_size: int
    num_parameters: int
    argument_bytes: int
    flops_per_example: float
    has_random_loops: bool
    reductions: tuple[int, ...]
    compile_seconds: float
    temporary_bytes: int | None = None
    code_bytes: int | None = None
    problem: str | None = None
    largest_share: int | None = None
    step_seconds: float | None = None
    assumptions: str = ""

    @property
    def verdict(self) -> str:
        """One line: whether it fits."""
        share = f"{self.batch_size // self.num_devices} examples a device"
        if self.problem is not None:
            return f"does NOT fit {self.topology} with {share}: {self.problem}"
        if self.temporary_bytes is None:
            return f"lowers for {self.topology} with {share}; what it takes on the way is known after a step on the machine"
        return f"fits {self.topology} with {share}"

    def __str__(self) -> str:
        arguments = f"{_size(self.argument_bytes)} of state and batch"
        temporary = "" if self.temporary_bytes is None else f", {_size(self.temporary_bytes)} on the way"
        code = "" if self.code_bytes is None else f", {_size(self.code_bytes)} of code"
        reductions = ", ".join(_size(size) for size in self.reductions[:4])
        if len(self.reductions) > 4:
            reductions += f" and {len(self.reductions) - 4} smaller, {_size(sum(self.reductions))} in all"
        lines = [
            self.verdict,
            f"{self.num_parameters:,} parameters; a device: {arguments}{temporary}{code}",
            f"{self.flops_per_example / 1e9:.3g} GFLOP an example"
            + (", with loops of random length counted as if they ran once" if self.has_random_loops else ""),
        ]
        if self.reductions:
            lines.append(f"{len(self.reductions)} reductions over devices a step: {reductions}")
        if self.largest_share is not None:
            lines.append(f"largest batch that fits: {self.largest_share} examples a device")
        if self.step_seconds is not None:
            lines.append(f"at most about {1 / self.step_seconds:.3g} steps a second, {self.assumptions}")
        verb = "lowered" if self.code_bytes is None and self.problem is None else "compiled"
        return "\n".join([*lines, f"{verb} in {self.compile_seconds:.0f} s"])


def _size(num: float | int) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num >= scale:
            return f"{num / scale:.3g} {unit}"
    return f"{num:.0f} B"


def data_for(config: Config) -> DataSet:
    """The data of a config; random ones of the same shape in place of those of TensorFlow Datasets."""
    data = tfds.stand_in(config.data.name)
    if data is None:
        return load_data(config.data)
    return conditioned_on_labels(data) if config.data.condition_on_labels else data


def make(config: Config, on: Machine, *, find_largest: bool = False, say: Callable[[str], None] = print) -> Plan:
    """Compiles the training step of a config for a machine and tells what it takes.

    Args:
        config: All settings.
        on: The machine, from `topologies.machine`.
        find_largest: Also search for the largest batch that fits, which compiles several times.
        say: Takes a line of progress of the compilations, which may take minutes each.

    Raises:
        ValueError: If the batch does not split over the devices, settings contradict each other or the data, or the largest
            batch is asked for where memory is not known.
    """
    if find_largest and on.chip is None:
        raise ValueError(f"--largest-batch needs a TPU topology: what a step takes on {on.topology} is not known here")
    data = data_for(config)
    size, num_devices = config.training.batch_size, on.num_devices
    config.training.check_splits(num_devices)
    plan = _plan(config, on, data, size, say)
    if find_largest:
        plan_of = lambda share: _plan(config, on, data, share * num_devices, say)  # noqa: E731
        largest = _largest(plan, plan_of, on, config.training.num_parts, say)
        plan = dataclasses.replace(plan, largest_share=largest)
    return plan


def _plan(config: Config, on: Machine, data: DataSet, batch_size: int, say: Callable[[str], None]) -> Plan:
    began = time.monotonic()
    if on.chip is not None:
        say(f"tracing a step of {batch_size} examples for {on.topology}")
    traced, lowered, about = lower(config, on, data, batch_size)
    costs = flops(traced.jaxpr.jaxpr)
    plan = Plan(
        topology=on.topology,
        num_devices=on.num_devices,
        batch_size=batch_size,
        flops_per_example=costs.total() * on.num_devices / batch_size,
        has_random_loops=has_random_loops(traced.jaxpr.jaxpr),
        reductions=() if on.chip else tuple(reductions(traced.jaxpr.jaxpr)),
        compile_seconds=time.monotonic() - began,
        **about,
    )
    if on.chip is None:
        return plan
    say(f"compiling it, after {plan.compile_seconds:.0f} s: a deep model takes minutes")
    try:
        with warnings.catch_warnings():  # JAX's cache on disk cannot read programs for devices that are not here
            warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache")
            compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        problem = " ".join(str(error).split("RESOURCE_EXHAUSTED:")[-1].split())[:200]
        return dataclasses.replace(plan, problem=problem, compile_seconds=time.monotonic() - began)
    memory, combined = compiled.memory_analysis(), tuple(compiled_reductions(compiled.as_text()))
    seconds, assumptions = estimate(costs, combined, on, config.training.matmul_precision)
    return dataclasses.replace(
        plan,
        reductions=combined,
        temporary_bytes=memory.temp_size_in_bytes,
        code_bytes=memory.generated_code_size_in_bytes,
        step_seconds=seconds,
        assumptions=assumptions,
        compile_seconds=time.monotonic() - began,
    )


def lower(config: Config, on: Machine, data: DataSet, batch_size: int) -> tuple[Any, Any, dict[str, Any]]:
    """The training step, traced and lowered for a machine, and its parameters and the bytes of its arguments."""
    share = batch_size // on.num_devices
    with target.compiling_for(on.platform), jax.default_matmul_precision(config.training.matmul_precision):
        objective = build_objective(config, data)
        current = objective.abstract_state()
        step, batch = objective.training_step, objective.abstract_batch(share * len(on.devices))
        if on.num_hosts > 1:
            step, batch = with_wishes(step), (batch, jax.ShapeDtypeStruct((len(on.devices), len(Wish)), np.float32))
        traced = parallel.for_devices(step, on.devices).trace(current, batch)
        lowered = traced.lower(lowering_platforms=(on.platform,))
    argument_bytes = num_bytes(current) + num_bytes(batch) // len(on.devices)
    return traced, lowered, {"num_parameters": num_parameters(current.params), "argument_bytes": argument_bytes}


def estimate(costs: Any, reductions: tuple[int, ...], on: Machine, precision: str) -> tuple[float, str]:
    """Seconds of a step, and what they assume: products at a share of the peak, then reductions at the speed of the links."""
    assert on.chip is not None
    passes, peak = PASSES[precision], on.chip.peak_flops
    products = sum(cost * (1 if dtype == "bfloat16" else passes) for dtype, cost in costs.items())
    n = on.num_devices
    exchanged = 2 * (n - 1) / n * sum(reductions)
    seconds = products / (UTILIZATION * peak) + exchanged / on.chip.link_bytes
    return seconds, (
        f"if products reach {UTILIZATION:.0%} of the peak ({peak / 1e12:.0f} TFLOP/s in bfloat16, of which float32 takes "
        f"{passes} passes) and reductions the speed of the links ({on.chip.link_bytes / 1e9:.0f} GB/s)"
    )


def _largest(plan: Plan, plan_of: Callable[[int], Plan], on: Machine, multiple: int, say: Callable[[str], None]) -> int:
    """The largest share of a device that fits, to one part in `RESOLUTION`: guessed along a line through memory, bracketed."""
    assert on.chip is not None
    used = {0: plan.argument_bytes}  # memory by share
    share = plan.batch_size // plan.num_devices
    fits, fails = 0, None
    while True:
        if plan.problem is None and plan.temporary_bytes is not None:
            fits = max(fits, share)
            used[share] = plan.argument_bytes + plan.temporary_bytes
        else:
            fails = share
        say(f"{share} examples a device: {plan.verdict}")
        gap = max(multiple, fits // RESOLUTION // multiple * multiple)
        if fails is not None and fails - fits <= gap:
            return fits
        guess = _guess(used, on.chip.memory_bytes) if len(used) > 1 else share // 2
        least, most = fits + gap, 8 * max(fits, multiple) if fails is None else fails - gap
        share = int(min(max(guess, least), max(most, least))) // multiple * multiple
        if share in (0, fits, fails):
            return fits
        plan = plan_of(share)


def _guess(used: dict[int, int], limit: float) -> float:
    """Batch size at which a line through the two largest known points reaches the limit."""
    (a, at_a), (b, at_b) = sorted(used.items())[-2:]
    return b + (limit - at_b) * (b - a) / max(at_b - at_a, 1)
