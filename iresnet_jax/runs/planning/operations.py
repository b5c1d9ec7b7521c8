"""What the operations of a compiled step are, read from the program's text: their part of the mathematics and their kind.

The text of an operation ends with its path: the names of `jax.named_scope` and of JAX's transformations around the code that it
was made from, such as ``jit(step)/transpose(jvp(norms))/mul``. A fusion has the path of its last operation, so that its
time counts for one part, whatever else it contains.
"""

import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from iresnet_jax.bijections.residual import LOG_DETERMINANT
from iresnet_jax.models.flow import NORMS
from iresnet_jax.training.state import OPTIMIZER

PARTS = (
    "norms and their gradient",
    "forward, without log-determinants",
    "log-determinants",
    "backward",
    "random numbers",
    "optimizer and averages",
    "sums over devices, with waiting",
    "other",
)
KINDS = (
    "convolutions",
    "matrix products",
    "elementwise",
    "copies and transposes",
    "reductions",
    "sums over devices, with waiting",
    "loops and other",
)
_NORMS, _FORWARD, _LOGDET, _BACKWARD, _RANDOM, _OPTIMIZER, _DEVICES, _OTHER = PARTS
_CONVOLUTION, _PRODUCT, _ELEMENTWISE, _COPY, _REDUCTION, _, _LOOP = KINDS

_COLLECTIVE = re.compile(r"(all-|collective-|reduce-scatter)")
_DRAWS = re.compile(r"threefry|random_|rng_|_(rademacher|bernoulli|uniform|normal\w*|randint|shuffle|gamma|categorical)\)")
_MOVES = frozenset(
    "copy copy-start copy-done transpose reshape bitcast slice dynamic-slice dynamic-update-slice concatenate pad broadcast "
    "reverse gather scatter iota".split()
)
_NO_WORK = frozenset("parameter constant tuple get-tuple-element bitcast iota fusion call".split())
_OTHERS = frozenset(
    "while conditional custom-call sort fft cholesky triangular-solve rng rng-bit-generator partition-id replica-id "
    "infeed outfeed send recv async-start async-update async-done after-all".split()
)
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?(?P<name>[\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(
    r"^\s+(?:ROOT )?%?(?P<name>[\w.\-]+) = (?P<shape>\(.*?\)|\S+) (?P<opcode>[a-z][\w\-]*)\((?P<rest>.*)$"
)
_PATH = re.compile(r'op_name="([^"]*)"')
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|(?:true|false)_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_OPERAND = re.compile(r"%([\w.\-]+)")
_TARGET = re.compile(r'custom_call_target="([^"]*)"')


class Operation(NamedTuple):
    """An operation of a compiled program.

    Attributes:
        name: Its name there, such as "fusion.12".
        shape: Type and shape of its result, without the layout, such as "f32[32,8]".
        path: Where in the step it comes from, see the module; empty if the compiler does not say.
        part: One of `PARTS`.
        kind: One of `KINDS`.
    """

    name: str
    shape: str
    path: str
    part: str
    kind: str

    @property
    def short_path(self) -> str:
        """The path without what is around the whole step; the name if there is no path."""
        return self.path.rpartition("/shard_map/")[2] or self.name

    @property
    def place(self) -> tuple[str, str, str]:
        """What operations have alike that are the same work at the same place in the code."""
        return self.kind, self.shape, self.path or self.name


class _Instruction(NamedTuple):
    """A line of a program: its opcode, what follows in brackets and behind them, and the computation that it is in."""

    shape: str
    opcode: str
    rest: str
    computation: str

    @property
    def path(self) -> str:
        found = _PATH.search(self.rest)
        return found[1] if found else ""

    @property
    def called(self) -> list[str]:
        branches = _BRANCHES.search(self.rest)
        return _CALLED.findall(self.rest) + (_OPERAND.findall(branches[1]) if branches else [])


def operations(program: str) -> dict[str, Operation]:
    """The operations of a program by their names.

    Args:
        program: Text of a compiled program.
    """
    lines = dict(_instructions(program))
    bodies: dict[str, list[_Instruction]] = {}
    caller: dict[str, str] = {}
    for name, line in lines.items():
        bodies.setdefault(line.computation, []).append(line)
        caller.update(dict.fromkeys(line.called, name))
    found = {}
    for name, line in lines.items():
        path = _known_path(name, lines, caller)
        shape = re.sub(r"\{[^}]*\}|/\*.*?\*/", "", line.shape)
        is_sum = _COLLECTIVE.match(line.opcode)
        kind = _DEVICES if is_sum else _kind(list(_inside(line, bodies)))
        found[name] = Operation(name, shape, path, _DEVICES if is_sum else part_of(path), kind)
    return found


def _instructions(program: str) -> Iterator[tuple[str, _Instruction]]:
    computation = ""
    for line in program.splitlines():
        if match := _INSTRUCTION.match(line):
            yield match["name"], _Instruction(match["shape"], match["opcode"], match["rest"], computation)
        elif match := _COMPUTATION.match(line):
            computation = match["name"]


def _known_path(name: str, lines: Mapping[str, _Instruction], caller: Mapping[str, str]) -> str:
    """The path of an operation; of one that the compiler added, that of what it copies or of the loop that it is in."""
    tried: set[str] = set()
    while name in lines and name not in tried:
        tried.add(name)
        line = lines[name]
        if "/" in line.path and not line.path.endswith("/shard_map"):  # which is around everything
            return line.path
        operands = _OPERAND.findall(line.rest.split(")")[0])
        name = next((operand for operand in operands if operand in lines and operand not in tried), "")
        if not name or lines[name].opcode in ("parameter", "constant"):
            name = caller.get(line.computation, "")
    return ""


def part_of(path: str) -> str:
    """The part of a training step, one of `PARTS`, that the path of an operation leads to."""
    if re.search(r"\bp(sum|mean|max)\w*$", path):
        return _DEVICES
    if _DRAWS.search(path):
        return _RANDOM
    for scope, part in ((NORMS, _NORMS), (OPTIMIZER, _OPTIMIZER)):
        if re.search(rf"\b{scope}\b", path):
            return part
    before, is_logdet, _ = path.partition(LOG_DETERMINANT)  # products with J^T inside are no backward pass
    if "transpose(" in before:
        return _BACKWARD
    if is_logdet:
        return _LOGDET
    return _FORWARD if "jvp(" in path else _OTHER


def _inside(line: _Instruction, bodies: Mapping[str, list[_Instruction]]) -> Iterator[_Instruction]:
    """An operation and what it is fused from."""
    yield line
    if line.opcode in ("fusion", "call"):
        for name in line.called:
            for inner in bodies.get(name, []):
                yield from _inside(inner, bodies)


def _kind(inside: list[_Instruction]) -> str:
    """The kind of an operation that consists of these, one of `KINDS`."""
    opcodes = {each.opcode for each in inside}
    targets = " ".join(match[1] for each in inside if (match := _TARGET.search(each.rest))).lower()
    if "convolution" in opcodes or "conv" in targets:
        paths = [each.path for each in inside if each.opcode == "convolution"]
        only_products = paths and all(path.endswith("dot_general") for path in paths)  # as TPUs compute them
        return _PRODUCT if only_products else _CONVOLUTION
    if "dot" in opcodes or re.search("gemm|matmul|dot", targets):
        return _PRODUCT
    if opcodes & {"reduce", "reduce-window"}:
        return _REDUCTION
    if opcodes & _OTHERS:
        return _LOOP
    if opcodes - _NO_WORK - _MOVES:
        return _ELEMENTWISE
    return _COPY if opcodes & _MOVES else _LOOP
