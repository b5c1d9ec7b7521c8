"""Machines that a training step is compiled for though they are not here: TPU topologies, and GPUs."""

import os
from dataclasses import dataclass
from typing import Any

import jax

# Passes of bfloat16 products that make one of float32 on a TPU, by `training.matmul_precision`.
PASSES = {"float32": 6, "highest": 6, "tensorfloat32": 3, "high": 3, "default": 1}
_GIB, _GBIT = 2.0**30, 1e9 / 8


@dataclass(frozen=True)
class Chip:
    """A kind of TPU chip.

    Attributes:
        memory_bytes: Memory.
        peak_flops: Multiplications and additions a second of bfloat16 products.
        link_bytes: Bytes a second that a chip exchanges with its neighbours, over all links.
        accelerator_type: The smallest machine, by the name that libtpu knows.
    """

    memory_bytes: float
    peak_flops: float
    link_bytes: float
    accelerator_type: str


CHIPS = {  # as their makers publish it: https://cloud.google.com/tpu/docs/system-architecture-tpu-vm
    "v4": Chip(32 * _GIB, 275e12, 2400 * _GBIT, "v4-8"),
    "v5e": Chip(16 * _GIB, 197e12, 1600 * _GBIT, "v5litepod-4"),
    "v5p": Chip(95 * _GIB, 459e12, 4800 * _GBIT, "v5p-8"),
    "v6e": Chip(32 * _GIB, 918e12, 3584 * _GBIT, "v6e-4"),
}


@dataclass(frozen=True)
class Machine:
    """Devices to compile for.

    Attributes:
        topology: Its name, such as "v5e:4x8" or "cuda:8".
        platform: "tpu" or "cuda".
        devices: What stands for its devices here: the topology's, or one CPU for one GPU.
        num_devices: Their number.
        num_hosts: Their hosts; 1 for GPUs.
        chip: Their kind; None for GPUs.
    """

    topology: str
    platform: str
    devices: tuple[Any, ...]
    num_devices: int
    num_hosts: int = 1
    chip: Chip | None = None


def machine(topology: str) -> Machine:
    """The machine of a name: ``v5e:4x8`` and other TPU topologies, ``cuda`` for one GPU or ``cuda:8``.

    Raises:
        ValueError: If there is none of this name.
        RuntimeError: If the compiler for TPUs is not installed or in use.
    """
    kind, _, layout = topology.partition(":")
    if kind == "cuda" and (layout or "1").isdecimal() and int(layout or 1):
        return Machine(topology, "cuda", (jax.devices("cpu")[0],), int(layout or 1))
    if kind not in CHIPS or not layout:
        known = ", ".join(f"{name}:2x2" for name in CHIPS)
        raise ValueError(f"there is no topology {topology!r}: give one such as {known}, or cuda:8 for eight GPUs")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # no machine is asked what it is
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", CHIPS[kind].accelerator_type)
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    from jax.experimental import topologies

    try:
        devices = topologies.get_topology_desc(topology, platform="tpu").devices
    except Exception as error:  # whatever the plugin raises
        text = " ".join(str(error).split())
        if "not installed" in text:
            raise RuntimeError(f"compiling for TPUs needs pip install '.[tpu]': {text[:200]}") from None
        if "lockfile" in text:
            raise RuntimeError("another process uses the compiler for TPUs, which serves one at a time: wait for it") from None
        raise ValueError(f"the compiler for TPUs knows no topology {topology!r}: {text[:200]}") from None
    num_hosts = len({device.process_index for device in devices})
    return Machine(topology, "tpu", tuple(devices), len(devices), num_hosts, CHIPS[kind])
