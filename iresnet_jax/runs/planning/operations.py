"""What the operations of a compiled step are, read from the program's text: their part of the mathematics and their kind.

The text of an operation ends with its path: the names of `jax.named_scope` and of JAX's transformations around the code that it
was made from, such as ``jit(step)/transpose(jvp(norms))/mul``. A fusion has the path of its last operation, so that its
time counts for one part, whatever else it contains.
"""

import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from iresnet_jax.bijections.residual import LOG_DETERMINANT
from iresnet_jax.models.contractions import NORMS
from iresnet_jax.training.step import OPTIMIZER

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
    r"^\s+(?:ROOT )?%?(?P<name>[\w.\-]+) = (?P<shape>\(.*?\)|\S+) (?P<opcode>[a-z][\w\-]*)\((?P<operands>[^)]*)(?P<rest>.*)$"
)
_PATH = re.compile(r'op_name="([^"]*)"')
_CALLS = re.compile(r"(?:calls|to_apply|body|condition|\w+_computations?)=(\{[^}]*\}|%?[\w.\-]+)")
_NAME = re.compile(r"%?([\w.\-]+)")
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
    def place(self) -> tuple[str, str, str]:
        """Kind, shape, and path without what is around the whole step, or the name if there is no path."""
        return self.kind, self.shape, self.path.rpartition("/shard_map/")[2] or self.name


def operations(program: str) -> dict[str, Operation]:
    """The operations of a program by their names.

    Args:
        program: Text of a compiled program.
    """
    lines: dict[str, re.Match[str]] = {}
    home: dict[str, str] = {}  # the computation that an operation is in
    bodies: dict[str, list[re.Match[str]]] = {}
    caller: dict[str, str] = {}
    for text in program.splitlines():
        if header := _COMPUTATION.match(text):
            body = bodies[header["name"]] = []
            computation = header["name"]
        elif line := _INSTRUCTION.match(text):
            lines[line["name"]], home[line["name"]] = line, computation
            body.append(line)
            caller.update(dict.fromkeys(_called(line), line["name"]))

    def known_path(name: str) -> str:
        """The path of an operation; of one that the compiler added, that of what it copies or of the loop that it is in."""
        tried: set[str] = set()
        while name in lines and name not in tried:
            tried.add(name)
            path, operands = _path(lines[name]), _NAME.findall(lines[name]["operands"])
            if "/" in path and not path.endswith("/shard_map"):  # which is around everything
                return path
            copied = next((operand for operand in operands if operand in lines and operand not in tried), "")
            is_made_here = copied and lines[copied]["opcode"] not in ("parameter", "constant")
            name = copied if is_made_here else caller.get(home[name], "")
        return ""

    found = {}
    for name, line in lines.items():
        path, shape = known_path(name), re.sub(r"\{[^}]*\}|/\*.*?\*/", "", line["shape"])
        if _COLLECTIVE.match(line["opcode"]):
            found[name] = Operation(name, shape, path, _DEVICES, _DEVICES)
        else:
            found[name] = Operation(name, shape, path, part_of(path), _kind(list(_inside(line, bodies))))
    return found


def _path(line: re.Match[str]) -> str:
    found = _PATH.search(line["rest"])
    return found[1] if found else ""


def _called(line: re.Match[str]) -> list[str]:
    """The computations that an operation calls."""
    return [name for called in _CALLS.findall(line["rest"]) for name in _NAME.findall(called)]


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


def _inside(line: re.Match[str], bodies: Mapping[str, list[re.Match[str]]]) -> Iterator[re.Match[str]]:
    """An operation and what it is fused from."""
    yield line
    if line["opcode"] in ("fusion", "call"):
        for name in _called(line):
            for inner in bodies.get(name, []):
                yield from _inside(inner, bodies)


def _kind(inside: list[re.Match[str]]) -> str:
    """The kind of an operation that consists of these, one of `KINDS`."""
    opcodes = {line["opcode"] for line in inside}
    targets = " ".join(target for line in inside for target in _TARGET.findall(line["rest"])).lower()
    if "convolution" in opcodes or "conv" in targets:
        paths = [_path(line) for line in inside if line["opcode"] == "convolution"]
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
