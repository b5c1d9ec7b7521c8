"""What TPU chips have, as their makers publish it."""

from dataclasses import dataclass


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


_GIB, _GBIT = 2.0**30, 1e9 / 8
CHIPS = {  # https://cloud.google.com/tpu/docs/system-architecture-tpu-vm
    "v4": Chip(32 * _GIB, 275e12, 2400 * _GBIT, "v4-8"),
    "v5e": Chip(16 * _GIB, 197e12, 1600 * _GBIT, "v5litepod-4"),
    "v5p": Chip(95 * _GIB, 459e12, 4800 * _GBIT, "v5p-8"),
    "v6e": Chip(32 * _GIB, 918e12, 3584 * _GBIT, "v6e-4"),
}
# Passes of bfloat16 products that make one of float32, by `training.matmul_precision`.
PASSES = {"float32": 6, "highest": 6, "tensorfloat32": 3, "high": 3, "default": 1}
