"""Timing that a busy machine cannot bend, and a file that says what was measured, with what and on what.

Functions that are compared run in turns (A B A B ...): whatever else the machine does slows all of them alike. A ratio is the
median over turns of the ratio within a turn. Compare numbers of one run, not of two.
"""

import argparse
import json
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import jax

from iresnet_jax.atomic_files import replacing
from iresnet_jax.evaluation import environment

RESULTS = Path(__file__).parent / "results"


class Timing(NamedTuple):
    """Wall-clock times of one function, in seconds, in the order they were taken."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The median time."""
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """The times that a quarter and three quarters of the turns stayed below."""
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return low, high

    def speedup_over(self, baseline: "Timing") -> float:
        """Median over turns of the baseline's time over this one, both from the same run."""
        return statistics.median(b / own for own, b in zip(self.seconds, baseline.seconds, strict=True))

    def summary(self, baseline: "Timing | None" = None) -> dict[str, Any]:
        """The numbers for a results file."""
        low, high = self.quartiles
        numbers: dict[str, Any] = {"median_s": self.median, "quartiles_s": [low, high], "turns": len(self.seconds)}
        return numbers if baseline is None else {**numbers, "speedup": self.speedup_over(baseline)}


def interleave(
    functions: Mapping[str, Callable[[], Any]], *, turns: int = 20, warmup: int = 2, max_seconds: float = float("inf")
) -> dict[str, Timing]:
    """Times functions in turns, each until its result is ready; what they compile in the warm-up is not counted.

    Args:
        functions: Functions to time, by name.
        turns: Measurements of each.
        warmup: Calls of each beforehand.
        max_seconds: Stops early, but not before two turns.
    """
    for function in functions.values():
        for _ in range(warmup):
            jax.block_until_ready(function())
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    begin = time.perf_counter()
    for turn in range(max(turns, 2)):
        if turn >= 2 and time.perf_counter() - begin > max_seconds:
            break
        for name, function in functions.items():
            start = time.perf_counter()
            jax.block_until_ready(function())
            seconds[name].append(time.perf_counter() - start)
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def summarize(timings: Mapping[str, Timing], baseline: str) -> dict[str, Any]:
    """Every timing's numbers with its speed-up over the baseline, which has 1."""
    return {name: timing.summary(timings[baseline]) for name, timing in timings.items()}


def describe(timings: Mapping[str, Timing], baseline: str) -> str:
    """One line: the baseline's median and spread, then the others' with their speed-ups."""
    parts = []
    for name in (baseline, *(other for other in timings if other != baseline)):
        timing = timings[name]
        low, high = timing.quartiles
        ratio = "" if name == baseline else f" ({timing.speedup_over(timings[baseline]):.2f}x)"
        parts.append(f"{name} {1e3 * timing.median:.3g} ms [{1e3 * low:.3g}, {1e3 * high:.3g}]{ratio}")
    return "  ".join(parts)


def parser(description: str | None) -> argparse.ArgumentParser:
    """The command line that all benchmarks share."""
    made = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    made.add_argument("--quick", action="store_true", help="fewer cases and turns, to see that it works; writes no file")
    made.add_argument("--output", type=Path, metavar="FILE", help="where to write the results instead, quick ones too")
    return made


def table(rows: Sequence[Sequence[Any]], header: Sequence[str]) -> str:
    """Columns aligned to the right."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in cells)


def write(name: str, arguments: argparse.Namespace, settings: Mapping[str, Any], results: Any) -> Path | None:
    """Writes ``results/<name>.json`` and says where; nothing for a quick run that names no file.

    Args:
        name: Name of the benchmark.
        arguments: Command line that `parser` read.
        settings: Everything that the numbers depend on.
        results: The numbers.
    """
    path = arguments.output
    if path is None:
        if arguments.quick:
            return None
        path = RESULTS / f"{name}.json"
    record = {
        "benchmark": name,
        "command": shlex.join(["python", *sys.argv]),
        "environment": {**asdict(environment.describe()), "processor": processor()},
        "settings": {"quick": arguments.quick, **settings},
        "results": results,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as incoming:
        incoming.write_text(json.dumps(record, indent=1) + "\n")
    print(f"written: {path}")
    return path


def processor() -> str:
    """The model of this machine's processor, as far as the operating system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return platform.processor() or "unknown"
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
