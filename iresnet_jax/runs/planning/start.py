"""Where the time goes from the start of a process to the end of its first training step, cold and warm.

Each of two processes starts as `train.py` does and takes one step. The first finds no compiled programs on disk and leaves its
own for the second. They do one thing after the other, so that the parts add up; training itself compiles its step in a thread
of its own beside the initial state, which saves time where there are two cores.
"""

import contextlib
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.monitoring

from iresnet_jax.data.cache import FOLDER_VARIABLE
from iresnet_jax.runs.stored_programs import RETRIEVAL, keep_compiled_programs
from iresnet_jax.training.parallel import parallelize

COSTLIEST = 12  # programs and packages that are shown
IMPORTS, COMPILING, READING, REST, PROGRAMS = "imports", "compiling", "reading", "rest", "programs"
EVENTS = {  # of `jax.monitoring`, whose durations hold those of the events within them
    "/jax/core/compile/jaxpr_trace_duration": "tracing",
    "/jax/core/compile/jaxpr_to_mlir_module_duration": "lowering",
    "/jax/core/compile/backend_compile_duration": COMPILING,
    "/jax/compilation_cache/cache_retrieval_time_sec": READING,
    RETRIEVAL: READING,
}
WORK = (IMPORTS, *dict.fromkeys(EVENTS.values()))
_IMPORTED = re.compile(r"import time:\s+(\d+) \|\s+\d+ \|\s*(\S+)")  # of ``python -X importtime``: microseconds and the module
_IMPORTS_ENDED = "iresnet_jax: imports ended"
_CHILD = "import time; now = time.time(); from iresnet_jax.runs.planning.start import record; record(now)"


@dataclass(frozen=True)
class Start:
    """Seconds of one start. As a string it is a table whose lines and columns add up.

    Attributes:
        seconds: Wall-clock time of each part.
        cpu_seconds: Processor time of the process, over all its threads.
        work: Seconds of each kind of `WORK` by part.
        programs: Seconds of each kind of work by the program that it was for.
        packages: Seconds of imports by package.
    """

    seconds: dict[str, float]
    cpu_seconds: float
    work: dict[str, dict[str, float]]
    programs: dict[str, dict[str, float]]
    packages: dict[str, float]

    @property
    def whole(self) -> float:
        """Seconds from the start of the process to the end of its first step."""
        return sum(self.seconds.values())

    def __str__(self) -> str:
        def row(name, seconds, work):
            columns = [work.get(kind, 0.0) for kind in WORK]
            columns.append(seconds - sum(columns))
            shown = "".join(f" {value:9.2f}" for value in columns)
            return f"{name:<14} {seconds:8.2f}{shown} {work.get(PROGRAMS, 0):9.0f}"

        totals = dict[str, float]()
        for work in self.work.values():
            _add(totals, work)
        lines = [f"{'part':<14} {'seconds':>8}" + "".join(f" {kind:>9}" for kind in (*WORK, REST, PROGRAMS))]
        lines += [row(part, seconds, self.work.get(part, {})) for part, seconds in self.seconds.items()]
        return "\n".join([*lines, row("whole", self.whole, totals)])


@dataclass(frozen=True)
class Starts:
    """A start without compiled programs on disk, and one with those that it left. As a string it is a page of tables."""

    cold: Start
    warm: Start

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        titles = {"cold": "no compiled programs on disk", "warm": "with those of the cold start"}
        for name, title in titles.items():
            start: Start = getattr(self, name)
            yield f"{name}, {title}: first step after {start.whole:.2f} s, {start.cpu_seconds:.2f} s of processors\n{start}\n"
        starts = (self.cold, self.warm)
        yield from _compared("programs", *({name: _seconds(work) for name, work in start.programs.items()} for start in starts))
        yield ""
        yield from _compared("imports by package", *(start.packages for start in starts))


def _seconds(work: dict[str, float]) -> float:
    """Seconds of all kinds of work."""
    return sum(work.get(kind, 0.0) for kind in WORK)


def _compared(title: str, cold: dict[str, float], warm: dict[str, float]) -> Iterator[str]:
    """Lines of the names that took longest, and one of all others."""
    yield f"{title:<60} {'cold':>7} {'warm':>7}"
    names = sorted({*cold, *warm}, key=lambda name: -max(cold.get(name, 0), warm.get(name, 0)))
    for name in names[:COSTLIEST]:
        yield f"{name[:60]:<60} {cold.get(name, 0):7.2f} {warm.get(name, 0):7.2f}"
    if rest := names[COSTLIEST:]:
        others = (sum(start.get(name, 0) for name in rest) for start in (cold, warm))
        yield f"{f'{len(rest)} others':<60}" + "".join(f" {value:7.2f}" for value in others)


def measure(flags: Sequence[str]) -> Starts:
    """Starts two processes one after the other.

    Args:
        flags: Options of `train.py`.

    Raises:
        RuntimeError: If a process fails; the message is the end of what it said.
    """
    with tempfile.TemporaryDirectory(prefix="iresnet_jax_start_") as folder:
        cold, warm = (_started(flags, folder) for _ in range(2))
    return Starts(cold, warm)


def _started(flags: Sequence[str], folder: str) -> Start:
    environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    command = [sys.executable, "-X", "importtime", "-c", _CHILD, *flags]
    began = time.time()
    run = subprocess.run(command, capture_output=True, text=True, env={**environment, FOLDER_VARIABLE: folder}, check=False)
    said = run.stderr.splitlines()
    if run.returncode:
        [last] = [line for line in said if not _IMPORTED.match(line)][-1:] or [f"exit status {run.returncode}"]
        raise RuntimeError(re.sub(r"^(\w+: )?", "the start fails: ", last, count=1))
    told = json.loads(run.stdout.splitlines()[-1])
    ends, packages = [began, *told["ends"].values()], _packages(said)
    seconds = {part: end - before for part, (before, end) in zip(told["ends"], itertools.pairwise(ends), strict=True)}
    work = {**told["work"], IMPORTS: {IMPORTS: min(sum(packages.values()), seconds[IMPORTS])}}
    return Start(seconds, told["cpu_seconds"], work, told["programs"], packages)


def _packages(said: Sequence[str]) -> dict[str, float]:
    """Seconds of the imports before `_IMPORTS_ENDED` by package, from what Python and `record` wrote to stderr."""
    packages = dict[str, float]()
    for line in itertools.takewhile(_IMPORTS_ENDED.__ne__, said):
        if found := _IMPORTED.match(line):
            _add(packages, {found[2].split(".")[0]: int(found[1]) / 1e6})
    return packages


def _add(totals: dict[str, float], numbers: Mapping[str, float]) -> None:
    for name, number in numbers.items():
        totals[name] = totals.get(name, 0.0) + number


class _Work:
    """Work of JAX that has ended, by the program that it was for; work within other work counts for the outermost."""

    def __init__(self):
        self._ended: list[tuple[float, str, dict[str, float]]] = []  # start, program, seconds by kind
        jax.monitoring.register_event_duration_secs_listener(self.note)

    def note(self, event: str, duration_secs: float, **about: Any) -> None:
        """Takes what JAX says when work has ended, see `jax.monitoring`."""
        if event not in EVENTS:
            return
        start, kind, work = time.time() - duration_secs, EVENTS[event], dict[str, float]()
        while self._ended and self._ended[-1][0] >= start:
            _add(work, self._ended.pop()[2])
        _add(work, {kind: duration_secs - _seconds(work), PROGRAMS: float(kind == COMPILING or event == RETRIEVAL)})
        self._ended.append((start, str(about.get("fun_name")), work))

    def take(self) -> Iterator[tuple[str, dict[str, float]]]:
        """What has ended since this was called before: programs, and the seconds of each kind of work."""
        ended, self._ended = self._ended, []
        for _, name, work in ended:
            yield re.sub(r"^jit[_(](.*?)\)?$", r"\1", name), work


def record(began: float) -> None:
    """What a started process does, with the options of `train.py`; it prints when each part ended as JSON.

    Args:
        began: When Python was ready, in seconds since the epoch.
    """
    work, ends = _Work(), {"Python": began}
    parts, programs = dict[str, dict[str, float]](), dict[str, dict[str, float]]()

    @contextlib.contextmanager
    def part(name):
        yield
        ends[name], parts[name] = time.time(), {}
        for program, seconds in work.take():
            _add(parts[name], seconds)
            _add(programs.setdefault(f"{name}: {program}", {}), seconds)

    with part(IMPORTS):
        import iresnet_jax.models.linen  # noqa: F401 (which the initial state imports late)
        from iresnet_jax.data.batches import device_batches
        from iresnet_jax.runs import allocator, command_line, loop, machine, model_from_config, objective_from_config

        print(_IMPORTS_ENDED, file=sys.stderr, flush=True)
        allocator.collect_garbage_rarely()
        allocator.keep_freed_memory()
    with part("devices"):
        config = command_line.parse_train_flags(["python -m iresnet_jax profile", *sys.argv[1:]]).config
        machine.compile_quickly()
        machine.use_all_cores(config)
        machine.prepare_backend(config.training.matmul_precision)
        keep_compiled_programs()
    with part("data"):
        data = model_from_config.load_data(config.data)
        loop.check_batch_size(config.training, data)
    with part("model"):
        objective = objective_from_config.build_objective(config, data)
    with part("initial state"):
        state = jax.block_until_ready(objective.initial_state())
    with part("first step"):
        batches = device_batches(objective.examples, seed=config.seed, batch_size=config.training.batch_size)
        step, batch = parallelize(objective.training_step), next(batches)
        step.compile(state, batch)
        jax.block_until_ready(step(state, batch))
    print(json.dumps({"ends": ends, "cpu_seconds": time.process_time(), "work": parts, "programs": programs}))
