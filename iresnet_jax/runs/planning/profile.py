"""Where the time of a config's training step goes on this machine: steps timed, then recorded, operation by operation.

The step is the one that training runs, on all devices of this process, with random parameters. Data of TensorFlow Datasets are
replaced by random ones of their shape.
"""

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Jaxpr
from jax.profiler import ProfileData, ProfileOptions

from iresnet_jax.runs import allocator
from iresnet_jax.runs.config import Config
from iresnet_jax.runs.machine import device_summary, prepare_backend
from iresnet_jax.runs.objective_from_config import build_objective
from iresnet_jax.runs.planning import plan
from iresnet_jax.runs.planning.operations import KINDS, PARTS, Operation, operations
from iresnet_jax.runs.planning.program_costs import flops, has_random_loops
from iresnet_jax.runs.planning.recording import Recording, Share, read_events, summarize
from iresnet_jax.training import parallel
from iresnet_jax.training.initialization import abstract_variables
from iresnet_jax.training.step import Objective, TrainState

WARMUP, FEWEST, MOST, MOST_S = 3, 5, 50, 10.0  # steps that are not timed; that are, at least and at most; seconds for them
RECORDED, COSTLIEST = 10, 10  # steps that are recorded, operations that are shown
MATRIX_SIZE = {"cpu": 2048}  # of the product whose speed is the peak
LARGE_MATRIX_SIZE = 8192  # on accelerators
PRODUCTS = 5  # of which the fastest counts
_SCALE = 0.02  # of random parameters
_PATHS_IN_PROGRAMS = ("jax_include_full_tracebacks_in_locations", "jax_compilation_cache_include_metadata_in_key")


@dataclass(frozen=True)
class Profile:
    """Where a training step's time goes. As a string it is a page of tables.

    Attributes:
        devices: The devices, such as "2 x cpu".
        lanes: What operations ran on, such as "2 cores".
        batch_size: Examples of a step, over all devices.
        step_seconds: Median time of a step that was not recorded.
        flops: Multiplications and additions of a step's products and convolutions, on all devices, see `program_costs.flops`.
        has_random_loops: Whether loops of random length were counted as if they ran once.
        peak_flops: Multiplications and additions a second of one large matrix product on all devices at once.
        peak_dtype: Its dtype, the one of the step's products.
        recording: What was recorded; None if the profiler saw no operation of these devices.
        folder: Folder of the trace.
    """

    devices: str
    lanes: str
    batch_size: int
    step_seconds: float
    flops: float
    has_random_loops: bool
    peak_flops: float
    peak_dtype: str
    recording: Recording | None
    folder: Path

    @property
    def share_of_peak(self) -> float:
        """Speed of the step's arithmetic as a share of that of a large matrix product."""
        return self.flops / self.step_seconds / self.peak_flops

    def __str__(self) -> str:
        counted = ", with loops of random length counted as if they ran once" if self.has_random_loops else ""
        speed, peak = self.flops / self.step_seconds / 1e9, self.peak_flops / 1e9
        lines = [
            f"step: {_ms(self.step_seconds)}, median, {self.batch_size} examples on {self.devices}",
            f"arithmetic: {self.flops / 1e9:.3g} GFLOP a step{counted}: {speed:.3g} GFLOP/s, {self.share_of_peak:.1%} of the "
            f"{peak:.3g} GFLOP/s of one large {self.peak_dtype} matrix product on all devices",
        ]
        if self.recording is None:
            lines.append("no operations of these devices were recorded: the profiler of this JAX does not see them")
        else:
            lines += _tables(self.recording, self.lanes)
        return "\n".join([*lines, f"trace: {self.folder}"])


def _tables(recording: Recording, lanes: str) -> Iterator[str]:
    whole, busy, idle = _ms(recording.seconds), _ms(recording.busy_seconds), recording.idle_share

    def row(name, share, rest=""):
        runs = f"{share.runs:.4g}" if share.runs else ""
        return f"{name:<34} {1e3 * share.seconds:8.2f} {share.seconds / recording.seconds:7.1%} {runs:>7}{rest}"

    yield f"recorded step: {whole}, mean over {lanes}: operations {busy}, idle {idle:.1%}; recording lengthens every run"
    for title, attribute, names in (("by part", "part", PARTS), ("by kind of operation", "kind", KINDS)):
        yield f"\n{title:<34} {'ms':>8} {'share':>7} {'runs':>7}"
        shares = dict.fromkeys(names, Share()) | recording.by(attribute)
        yield from (row(name, share) for name, share in sorted(shares.items(), key=lambda item: -item[1].seconds))
        yield row("idle", Share(idle * recording.seconds))
    yield f"\n{'costliest operations':<34} {'ms':>8} {'share':>7} {'runs':>7}  result, from"
    for (kind, shape, path), share in itertools.islice(recording.by("place").items(), COSTLIEST):
        yield row(kind, share, f"  {_shortened(shape, 30)}  {_shortened(path, 90)}")
    yield ""


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.{0 if seconds >= 0.1 else 1}f} ms"


def _shortened(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 3] + "..."


def take(config: Config, folder: str | Path) -> Profile:
    """Runs training steps of a config on this machine and measures where their time goes.

    Args:
        config: All settings.
        folder: Folder that the trace is written to, in which others may be.

    Raises:
        ValueError: If the batch does not split over the devices, or settings contradict each other or the data.
        OSError: If the folder cannot be written.
    """
    prepare_backend(config.training.matmul_precision)
    data = plan.data_for(config)
    config.training.check_splits(parallel.all_devices())
    objective = build_objective(config, data)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    current, batch = random_state(objective), first_batch(objective.examples, config.training.batch_size)
    step = objective.training_step
    traced = traced_step(step, current, batch)
    run = parallel.parallelize(step)
    with _paths_in_programs():
        run.compile(current, batch)
    clock = _clocked(run, current, batch)
    _, seconds = list(itertools.islice(clock, WARMUP)), [next(clock)]
    while len(seconds) < FEWEST or (len(seconds) < MOST and sum(seconds) < MOST_S):
        seconds.append(next(clock))
    is_cpu = jax.default_backend() == "cpu"
    num_lanes, lane = (allocator.num_cores(), "core") if is_cpu else (jax.local_device_count(), "device")
    dtype = jnp.bfloat16 if config.training.bfloat16 and not is_cpu else jnp.float32
    return Profile(
        devices=device_summary(),
        lanes=f"{num_lanes} {lane}{'s' if num_lanes > 1 else ''}",
        batch_size=config.training.batch_size,
        step_seconds=float(np.median(seconds)),
        flops=float(flops(traced).total()) * jax.local_device_count(),
        has_random_loops=has_random_loops(traced),
        peak_flops=matmul_peak(dtype),
        peak_dtype=jnp.dtype(dtype).name,
        recording=_record(clock, operations(run.program), folder, num_lanes),
        folder=folder,
    )


def traced_step(step: Callable[[Any, Any], Any], current: Any, batch: Any) -> Jaxpr:
    """The program of an objective's step on one device's share of a batch, for `program_costs`."""
    share = jax.tree.map(lambda rows: jax.ShapeDtypeStruct(rows.shape[1:], rows.dtype), batch)
    return parallel.for_devices(step, jax.local_devices()[:1]).trace(current, share).jaxpr.jaxpr


@contextlib.contextmanager
def _paths_in_programs() -> Iterator[None]:
    """Compiles programs with the paths of this code: not without, and not with those of other code that left them on disk."""
    settings: Any = jax.config  # whose fields type checkers cannot see
    before = {name: getattr(settings, name) for name in _PATHS_IN_PROGRAMS}
    try:
        for name in before:
            jax.config.update(name, True)  # noqa: FBT003
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


def random_state(objective: Objective) -> TrainState:
    """A state with random parameters, whose steps take as long as those of a trained one."""
    rng = np.random.default_rng(0)
    draw = lambda leaf: (_SCALE * rng.normal(size=leaf.shape)).astype(leaf.dtype)  # noqa: E731
    variables = jax.tree.map(draw, abstract_variables(objective.training_step.model.spec))
    for statistics in jax.tree.leaves(variables.get("batch_stats", {})):
        statistics[...] = 1
    return objective.state_of(variables)


def first_batch(examples: Any, size: int) -> Any:
    """The first of an objective's examples as a batch, repeated if they are fewer; placeholders for endless data."""
    if examples is None:
        return parallel.shard(np.zeros(size, np.float32))
    places = np.arange(size) % len(jax.tree.leaves(examples)[0])
    return parallel.shard(jax.tree.map(lambda rows: rows[places], examples))


def _clocked(run: Callable[[Any, Any], tuple[Any, Any]], current: Any, batch: Any) -> Iterator[float]:
    """Steps one after the other, each of which is waited for, and their seconds."""
    while True:
        began = time.perf_counter()
        current, metrics = run(current, batch)
        jax.block_until_ready(metrics)
        yield time.perf_counter() - began


def matmul_peak(dtype: Any, size: int | None = None) -> float:
    """Multiplications and additions a second of one large matrix product on every device at once, the fastest of some.

    Args:
        dtype: Type of the matrices' entries.
        size: Their rows and columns; by default large enough for these devices to reach their best.
    """
    size = MATRIX_SIZE.get(jax.default_backend(), LARGE_MATRIX_SIZE) if size is None else size
    drawn = np.random.default_rng(0).normal(size=(size, size)).astype(dtype)
    matrices = [jax.device_put(drawn, device) for device in jax.local_devices()]
    multiply = jax.jit(jnp.matmul)
    fastest = np.inf
    for _ in range(1 + PRODUCTS):  # the first one compiles
        began = time.perf_counter()
        jax.block_until_ready([multiply(matrix, matrix) for matrix in matrices])
        fastest = min(fastest, time.perf_counter() - began)
    return 2 * size**3 * len(matrices) / fastest


def _record(clock: Iterator[float], known: Mapping[str, Operation], folder: Path, num_lanes: int) -> Recording | None:
    options = ProfileOptions()
    options.python_tracer_level = 0  # which would slow the steps down
    earlier = set(folder.rglob("*.xplane.pb"))
    with jax.profiler.trace(folder, profiler_options=options):
        for _ in range(RECORDED):
            next(clock)
    written = sorted(set(folder.rglob("*.xplane.pb")) - earlier)
    traces = [ProfileData.from_file(str(path)) for path in written]
    events = [event for trace in traces for event in read_events(trace, jax.default_backend())]
    return summarize(events, known, num_steps=RECORDED, num_lanes=num_lanes, num_devices=jax.local_device_count())
