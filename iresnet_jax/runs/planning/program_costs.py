"""What a traced or compiled program costs: its arithmetic, with loops counted, and its reductions over devices."""

import math
import re
from collections import Counter
from typing import Any

import jax
import numpy as np
from jax.extend import core

_ALL_REDUCE = re.compile(r"= (?P<shapes>.*?) all-reduce(?:-start)?\(")
_LOWERED_ALL_REDUCE = re.compile(r'"stablehlo\.all_reduce"\(')
_SHAPE = re.compile(r"\b(pred|[suf]\d+|bf16)\[([\d,]*)\]")
_LOWERED_SHAPE = re.compile(r"tensor<((?:\d+x)*)(i1|u?i\d+|f\d+|bf16)>")
_BYTES = {"pred": 1, "i1": 1}


def flops(jaxpr: core.Jaxpr) -> Counter[str]:
    """Multiplications and additions of matrix products and convolutions, by the dtype of their operands.

    The body of a scan counts as often as it runs. One of ``while``, whose number of runs is not known, counts once; of the
    branches of a condition the dearest counts. Zeros of a convolution's padding count, as in XLA's own counts.
    """
    total: Counter[str] = Counter()
    for equation in jaxpr.eqns:
        name, parameters = equation.primitive.name, equation.params
        inputs: list[Any] = [value.aval for value in equation.invars]  # whose shapes type checkers cannot see
        outputs: list[Any] = [value.aval for value in equation.outvars]
        if name == "dot_general":
            (contracted, _), _ = parameters["dimension_numbers"]
            length = math.prod(inputs[0].shape[axis] for axis in contracted)
            total[inputs[0].dtype.name] += 2 * length * math.prod(outputs[0].shape)
        elif name == "conv_general_dilated":
            kernel, numbers = inputs[1], parameters["dimension_numbers"]
            taps = math.prod(kernel.shape) // kernel.shape[numbers.rhs_spec[0]]  # of one output channel
            total[kernel.dtype.name] += 2 * taps * math.prod(outputs[0].shape)
        elif name == "convolution":  # that of CPUs, see `iresnet_jax.maths.convolution`
            total[inputs[1].dtype.name] += 2 * math.prod(inputs[1].shape[:3]) * math.prod(outputs[0].shape)
        elif name == "cond":
            total += max((flops(branch.jaxpr) for branch in parameters["branches"]), key=lambda cost: cost.total())
        else:
            runs = parameters["length"] if name == "scan" else 1
            for inner in _inner(parameters):
                total += Counter({dtype: runs * cost for dtype, cost in flops(inner).items()})
    return total


def has_random_loops(jaxpr: core.Jaxpr) -> bool:
    """Whether a loop runs until a condition holds, so that `flops` does not know how often."""
    return any(
        equation.primitive.name == "while" or any(map(has_random_loops, _inner(equation.params))) for equation in jaxpr.eqns
    )


def _inner(parameters: dict[str, Any]) -> list[core.Jaxpr]:
    found = []
    for value in parameters.values():
        for leaf in value if isinstance(value, tuple | list) else [value]:
            if isinstance(leaf, core.ClosedJaxpr):
                found.append(leaf.jaxpr)
            elif isinstance(leaf, core.Jaxpr):
                found.append(leaf)
    return found


def all_reduces(hlo: str) -> list[int]:
    """Bytes of every reduction over devices in a compiled program, the largest first."""
    found = []
    for match in _ALL_REDUCE.finditer(hlo):
        shapes = _SHAPE.findall(match["shapes"])
        found.append(sum(_size(kind) * math.prod(map(int, filter(None, dims.split(",")))) for kind, dims in shapes))
    return sorted(found, reverse=True)


def lowered_all_reduces(stablehlo: str) -> list[int]:
    """Bytes of every reduction in a program before it is compiled, which will combine many of them; the largest first."""
    found = []
    for match in _LOWERED_ALL_REDUCE.finditer(stablehlo):
        types = re.search(r"\}\) : \([^)]*\) -> (\([^)]*\)|tensor<[^>]*>)", stablehlo[match.end() :])
        assert types is not None
        shapes = _LOWERED_SHAPE.findall(types[1])
        found.append(sum(_size(kind) * math.prod(map(int, filter(None, dims.split("x")))) for dims, kind in shapes))
    return sorted(found, reverse=True)


def _size(kind: str) -> int:
    return _BYTES.get(kind) or int(re.sub(r"\D", "", kind)) // 8


def num_bytes(tree: Any) -> int:
    """Bytes of arrays or of their shapes."""
    return sum(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))
