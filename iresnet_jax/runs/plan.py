"""Whether a config fits a machine that is not there: its training step compiled for a TPU topology,
on a CPU.

The step is the one that training runs, with its optimizer. For TPUs it is compiled for all chips;
that needs the extra ``tpu``, whose compiler knows how much memory a step takes. For GPUs one
device's share is only lowered, as their compiler needs the GPU.
"""

import os
import sys
import time
import warnings
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from iresnet_jax.data.dataset import SPLITS, DataSet
from iresnet_jax.data.images import CUSTOMARY
from iresnet_jax.maths.platforms import compiling_for
from iresnet_jax.models.free import num_parameters
from iresnet_jax.runs.config import Config
from iresnet_jax.runs.job import Job
from iresnet_jax.training import parallel
from iresnet_jax.training.step import abstract_state
from iresnet_jax.training.train import check_batch_size

# Kinds of TPU, each with libtpu's name of its smallest machine.
TPUS = {"v4": "v4-8", "v5e": "v5litepod-4", "v5p": "v5p-8", "v6e": "v6e-4"}
NUM_STAND_INS = 256  # random images in place of a data set


@dataclass(frozen=True)
class Machine:
    """Devices to compile for.

    Attributes:
        topology: Name, such as "v5e:4x8" or "cuda:8".
        platform: "tpu" or "cuda".
        devices: The topology's devices, or one CPU in place of a GPU.
        num_devices: Number of devices of the machine.
    """

    topology: str
    platform: str
    devices: tuple[Any, ...]
    num_devices: int


def machine(topology: str) -> Machine:
    """The machine with a name: ``v5e:4x8`` and other TPU topologies, ``cuda`` for one GPU or
    ``cuda:8``.
    """
    kind, _, layout = topology.partition(":")
    if kind == "cuda":
        return Machine(topology, "cuda", (jax.devices("cpu")[0],), int(layout or 1))
    from jax.experimental import topologies

    try:
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # no query of a machine's metadata
        os.environ.setdefault("TPU_ACCELERATOR_TYPE", TPUS[kind])
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
        devices = topologies.get_topology_desc(topology, platform="tpu").devices
    except Exception as error:  # the plugin may raise anything
        raise ValueError(
            f"the compiler for TPUs, which pip install '.[tpu]' brings and one process at a time "
            f"uses, has no topology {topology!r} such as v5e:2x2 ({str(error)[:200]})"
        ) from None
    return Machine(topology, "tpu", tuple(devices), len(devices))


@dataclass(frozen=True)
class Plan:
    """Memory that a training step takes. As a string it is a few lines.

    Attributes:
        topology: Machine that the step was made for, such as "v5e:4x8" or "cuda:8".
        num_devices: Its devices.
        batch_size: Examples of a step, over all devices.
        num_parameters: Parameters of the model.
        argument_bytes: Bytes per device of the state and of the device's share of the batch.
        seconds: Time to trace, lower and compile the step here.
        temporary_bytes: Bytes per device of the step's temporary arrays; None if the compiler was
            not asked.
        problem: Why the step does not fit, in the compiler's words; None if it does, or was not
            compiled.
    """

    topology: str
    num_devices: int
    batch_size: int
    num_parameters: int
    argument_bytes: int
    seconds: float
    temporary_bytes: int | None = None
    problem: str | None = None

    def __str__(self) -> str:
        where = f"{self.topology} with {self.batch_size // self.num_devices} examples a device"
        memory = (
            f"{self.num_parameters:,} parameters; a device: {self.argument_bytes / 1e9:.3g} "
            "GB of state and batch"
        )
        if self.problem is not None:
            verdict = f"does NOT fit {where}: {self.problem}"
        elif self.temporary_bytes is None:
            verdict = (
                f"lowers for {where}; what it takes on the way is known after a step on the machine"
            )
        else:
            verdict = f"fits {where}"
            memory += f", {self.temporary_bytes / 1e9:.3g} GB on the way"
        return f"{verdict}\n{memory}\nplanned in {self.seconds:.0f} s"


def data_for(config: Config) -> DataSet:
    """The data of a config; random data of the same shape replace data sets of TensorFlow
    Datasets.
    """
    if (name := config.data.name) not in CUSTOMARY:
        return config.data.load()
    shape, num_classes = CUSTOMARY[name]
    drawn = np.random.default_rng(0).integers(0, 256, (NUM_STAND_INS, *shape), np.uint8)
    examples, labels = dict.fromkeys(SPLITS, drawn), {}
    if num_classes is not None:
        classes = np.arange(NUM_STAND_INS, dtype=np.int32) % num_classes
        labels = dict.fromkeys(SPLITS, classes)
    data = DataSet(name, examples, labels, num_levels=256, num_classes=num_classes)
    return config.data.changed(data)


def make(config: Config, on: Machine) -> Plan:
    """Compiles the training step of a config for a machine, which may take minutes, and returns
    its needs.
    """
    began, batch_size = time.monotonic(), config.training.batch_size
    check_batch_size(batch_size, config.training.num_parts, None, on.num_devices)
    lowered, num_params, argument_bytes = lower(config, on, data_for(config))
    temporary_bytes, problem = None, None
    if on.platform == "tpu":
        what = f"a step of {batch_size} examples for {on.topology}"
        print(f"compiling {what}: a deep model takes minutes", file=sys.stderr, flush=True)
        try:
            # JAX's cache on disk cannot read programs for absent devices.
            with warnings.catch_warnings():
                cache = "Error (reading|writing) persistent compilation cache"
                warnings.filterwarnings("ignore", cache)
                temporary_bytes = lowered.compile().memory_analysis().temp_size_in_bytes
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            problem = " ".join(str(error).split("RESOURCE_EXHAUSTED:")[-1].split())[:200]
    seconds, where = time.monotonic() - began, (on.topology, on.num_devices, batch_size)
    return Plan(*where, num_params, argument_bytes, seconds, temporary_bytes, problem)


def lower(config: Config, on: Machine, data: DataSet) -> tuple[Any, int, int]:
    """The training step lowered for a machine, the number of its parameters, and the bytes of its
    arguments.
    """
    share = config.training.batch_size // on.num_devices
    with compiling_for(on.platform), jax.default_matmul_precision(config.training.matmul_precision):
        job = Job.of(config, data)
        step, fixed = job.step()
        state = abstract_state(job.spec, step.optimizer)
        # A placeholder stands for endless data.
        examples = np.zeros(1, np.float32) if job.examples is None else job.examples
        batch = parallel.abstract_batch(examples, share * len(on.devices))
        traced = parallel.for_devices(step, on.devices).trace(state, fixed, batch)
        lowered = traced.lower(lowering_platforms=(on.platform,))
    argument_bytes = _num_bytes((state, fixed)) + _num_bytes(batch) // len(on.devices)
    return lowered, num_parameters(state.params), argument_bytes


def _num_bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
