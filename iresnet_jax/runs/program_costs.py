"""Costs of a traced or compiled program: its arithmetic, with loops counted, and its reductions over devices."""

import math
import re
from collections import Counter
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr

_ALL_REDUCE = re.compile(r"= (?P<shapes>.*?) all-reduce(?:-start)?\(")
_SHAPE = re.compile(r"\b(pred|[suf]\d+|bf16)\[([\d,]*)\]")


def flops(jaxpr: Jaxpr) -> Counter[str]:
    """Multiplications and additions of matrix products and convolutions, by the dtype of their operands.

    The body of a scan counts as often as it runs. One of ``while``, whose number of runs is not known, counts once; of the
    branches of a condition the dearest counts. Zeros of a convolution's padding count, as in XLA's own counts, which leave out
    how often loops run.
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


def has_random_loops(jaxpr: Jaxpr) -> bool:
    """Whether a loop runs until a condition holds, so that `flops` does not know how often."""
    return any(each.primitive.name == "while" or any(map(has_random_loops, _inner(each.params))) for each in jaxpr.eqns)


def reductions(jaxpr: Jaxpr) -> list[int]:
    """Bytes of every reduction over devices before it is compiled, which will combine many of them; the largest first."""
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name.startswith(("psum", "pmax", "pmin")):
            found += [num_bytes(value.aval) for value in equation.outvars]
        for inner in _inner(equation.params):
            found += reductions(inner)
    return sorted(found, reverse=True)


def compiled_reductions(program: str) -> list[int]:
    """Bytes of every reduction over devices in the text of a compiled program, the largest first."""
    found = []
    for match in _ALL_REDUCE.finditer(program):
        shapes = [(kind, [int(size) for size in sizes.split(",") if size]) for kind, sizes in _SHAPE.findall(match["shapes"])]
        found.append(sum(math.prod(sizes) * (1 if kind == "pred" else int(kind.lstrip("subf")) // 8) for kind, sizes in shapes))
    return sorted(found, reverse=True)


def num_bytes(tree: Any) -> int:
    """Bytes of arrays or of their shapes."""
    return sum(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))


def _inner(parameters: dict[str, Any]) -> list[Jaxpr]:
    """The programs among the parameters of an equation."""
    leaves = jax.tree.leaves(list(parameters.values()), is_leaf=lambda value: isinstance(value, ClosedJaxpr | Jaxpr))
    return [leaf.jaxpr if isinstance(leaf, ClosedJaxpr) else leaf for leaf in leaves if isinstance(leaf, ClosedJaxpr | Jaxpr)]
