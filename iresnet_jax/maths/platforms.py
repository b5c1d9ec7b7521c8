"""The kind of device that programs are made for, which need not be the kind that makes them.

A few choices that change no result depend on it: the form of convolutions and biases, and whether blocks are unrolled. They
ask `platform` and not JAX, so that a machine without accelerators can compile for one (`iresnet_jax.runs.planning.plan`).
"""

import contextlib
import os
from collections.abc import Iterator

import jax

_chosen = jax.make_user_context(default_value=None)  # JAX traces a function again if it changes


def platform() -> str:
    """Name of the platform that functions are traced for, such as "cpu", "gpu" or "tpu".

    It is the platform that this process runs on, except within `compiling_for`.
    """
    return _chosen.value or jax.default_backend()


def is_slow_in_place() -> bool:
    """Whether an elementwise operation takes several times as long where its result overwrites an operand.

    It does with XLA:CPU's older emitters of fusions, which training asks for (`iresnet_jax.runs.machine`): LLVM vectorises
    their loops only for arrays that do not overlap; other loops run entry by entry.
    """
    return platform() == "cpu" and "--xla_cpu_use_fusion_emitters=false" in os.environ.get("XLA_FLAGS", "")


@contextlib.contextmanager
def compiling_for(name: str) -> Iterator[None]:
    """Traces functions for another platform within ``with``.

    Args:
        name: A platform's name, as `platform` returns it.
    """
    with _chosen(name):
        yield
