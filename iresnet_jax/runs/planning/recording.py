"""Where the time of recorded steps goes: the operations that a profiler's trace has of each device, added up.

A lane is what one operation runs on at a time: a CPU core or an accelerator.
"""

import functools
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from iresnet_jax.runs.planning.operations import KINDS, PARTS, Operation

COSTLIEST = 10


class Share(NamedTuple):
    """What some operations take in a recorded step.

    Attributes:
        seconds: Their time, mean over lanes.
        runs: How often a device runs one of them.
    """

    seconds: float = 0.0
    runs: float = 0.0

    def plus(self, other: "Share") -> "Share":
        """What both take."""
        return Share(self.seconds + other.seconds, self.runs + other.runs)


class Costly(NamedTuple):
    """Operations of one kind, shape and place in the code.

    Attributes:
        share: What they take.
        operation: The costliest of them.
    """

    share: Share
    operation: Operation


class Recording(NamedTuple):
    """A recorded step, mean over those that were recorded.

    Attributes:
        seconds: From the first operation to the last, divided by the steps.
        parts: What operations take by `PARTS`.
        kinds: The same by `KINDS`.
        costliest: What took longest, at most `COSTLIEST`.
    """

    seconds: float
    parts: dict[str, Share]
    kinds: dict[str, Share]
    costliest: tuple[Costly, ...]

    @property
    def busy_seconds(self) -> float:
        """Time in operations; one that is spread over several cores counts for one of them."""
        return sum(share.seconds for share in self.parts.values())

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
    for number, (line, is_host) in enumerate(_lines(trace, backend)):
        for event in line.events:
            name = _statistics(event).get("hlo_op", None if is_host else event.name)
            if name is not None:  # TPUs call an operation by its whole text
                yield Event(number, str(name).split(" = ")[0].lstrip("%"), event.start_ns, event.duration_ns)


def _statistics(event: Any) -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # about a type of jaxlib 0.12 itself
        return dict(event.stats)


def _lines(trace: Any, backend: str) -> Iterator[tuple[Any, bool]]:
    """The lines of operations, and whether they hold other events, too."""
    for plane in trace.planes:
        lines = list(plane.lines)
        if backend == "cpu" and plane.name.startswith("/host:"):
            yield from ((line, True) for line in lines)
        elif backend != "cpu" and plane.name.startswith("/device:"):
            whole = [line for line in lines if line.name == "XLA Ops"]
            yield from ((line, False) for line in whole or lines if line in whole or line.name.startswith("Stream"))


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
    parts, kinds = {part: Share() for part in PARTS}, {kind: Share() for kind in KINDS}
    alike: dict[tuple[str, ...], list[Costly]] = defaultdict(list)
    for name, seconds in self_seconds(events).items():
        operation = known.get(name) or Operation(name, "", "", PARTS[-1], KINDS[-1])
        share = Share(seconds / (num_steps * num_lanes), runs[name] / (num_steps * num_devices))
        parts[operation.part] = parts[operation.part].plus(share)
        kinds[operation.kind] = kinds[operation.kind].plus(share)
        alike[operation.kind, operation.shape, operation.path or name].append(Costly(share, operation))
    groups = []
    for group in alike.values():
        total = functools.reduce(Share.plus, (each.share for each in group))
        groups.append(Costly(total, max(group, key=lambda each: each.share.seconds).operation))
    costliest = sorted(groups, key=lambda group: -group.share.seconds)[:COSTLIEST]
    whole = max(event.start + event.duration for event in events) - min(event.start for event in events)
    return Recording(1e-9 * whole / num_steps, parts, kinds, tuple(costliest))


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
