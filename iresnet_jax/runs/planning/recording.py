"""Where the time of recorded steps goes: the operations that a profiler's trace has of each device, added up.

A lane is what one operation runs on at a time: a CPU core or an accelerator.
"""

import itertools
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from iresnet_jax.runs.planning.operations import KINDS, PARTS, Operation


class Share(NamedTuple):
    """What some operations take in a recorded step.

    Attributes:
        seconds: Their time, mean over lanes.
        runs: How often a device runs one of them.
    """

    seconds: float = 0.0
    runs: float = 0.0


class Recording(NamedTuple):
    """A recorded step, mean over those that were recorded.

    Attributes:
        seconds: From the first operation to the last, divided by the steps.
        operations: What every operation takes.
    """

    seconds: float
    operations: tuple[tuple[Operation, Share], ...]

    def by(self, attribute: str) -> dict[Any, Share]:
        """What operations take together that have an attribute of `Operation` in common, the most first."""
        total: defaultdict[Any, Share] = defaultdict(Share)
        for operation, share in self.operations:
            before = total[getattr(operation, attribute)]
            total[getattr(operation, attribute)] = Share(before.seconds + share.seconds, before.runs + share.runs)
        return dict(sorted(total.items(), key=lambda item: -item[1].seconds))

    @property
    def busy_seconds(self) -> float:
        """Time in operations; one that is spread over several cores counts for one of them."""
        return sum(share.seconds for _, share in self.operations)

    @property
    def idle_share(self) -> float:
        """Share of the time without an operation."""
        return max(1 - self.busy_seconds / self.seconds, 0.0)


class Event(NamedTuple):
    """A run of an operation.

    Attributes:
        line: Thread or stream that it ran on.
        name: The operation's name in the program.
        start: Nanoseconds.
        duration: Nanoseconds.
    """

    line: int
    name: str
    start: float
    duration: float


def read_events(trace: Any, backend: str) -> Iterator[Event]:
    """The operations that a trace, a `jax.profiler.ProfileData`, has of the devices of a backend."""
    place = "/host:" if backend == "cpu" else "/device:"
    planes = [list(plane.lines) for plane in trace.planes if plane.name.startswith(place)]
    if backend != "cpu":
        planes = [_of_operations(lines) for lines in planes]
    for number, line in enumerate(itertools.chain(*planes)):
        for event in line.events:  # threads of a CPU have others, too
            name = _statistics(event).get("hlo_op", None if backend == "cpu" else event.name)
            if name is not None:  # TPUs call an operation by its whole text
                yield Event(number, str(name).split(" = ")[0].lstrip("%"), event.start_ns, event.duration_ns)


def _of_operations(lines: list[Any]) -> list[Any]:
    """The line of an accelerator's operations, or of each of its streams."""
    return [line for line in lines if line.name == "XLA Ops"] or [line for line in lines if line.name.startswith("Stream")]


def _statistics(event: Any) -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # about a type of jaxlib 0.12 itself
        return dict(event.stats)


def summarize(
    events: list[Event], known: Mapping[str, Operation], *, num_steps: int, num_lanes: int, num_devices: int
) -> Recording | None:
    """The times of recorded steps; None if there are no events.

    Args:
        events: What ran.
        known: The operations of the step's program; others are counted as "other".
        num_steps: Steps that were recorded.
        num_lanes: CPU cores or accelerators that they had.
        num_devices: Devices that ran them.
    """
    if not events:
        return None
    runs = Counter(event.name for event in events)
    took = tuple(
        (
            known.get(name) or Operation(name, "", "", PARTS[-1], KINDS[-1]),
            Share(seconds / (num_steps * num_lanes), runs[name] / (num_steps * num_devices)),
        )
        for name, seconds in self_seconds(events).items()
    )
    whole = max(event.start + event.duration for event in events) - min(event.start for event in events)
    return Recording(1e-9 * whole / num_steps, took)


def self_seconds(events: list[Event]) -> dict[str, float]:
    """Seconds of every operation without those of the operations inside it, such as the body of a loop."""
    own: dict[str, float] = defaultdict(float)
    around: list[tuple[int, float, str]] = []  # line, end and name of what an event may be inside
    for line, name, start, duration in sorted(events, key=lambda event: (event.line, event.start, -event.duration)):
        while around and (around[-1][0] != line or around[-1][1] <= start):
            around.pop()
        if around:
            own[around[-1][2]] -= 1e-9 * duration
        own[name] += 1e-9 * duration
        around.append((line, start + duration, name))
    return own
