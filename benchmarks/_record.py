"""Timing that a busy machine cannot bend, and a file that says what was measured, with what and on
what.

Functions that are compared run in turns (A B A B ...): whatever else the machine does slows all of
them alike. A ratio is the median over turns of the ratio within a turn. Compare numbers of one run,
not of two.
"""

import argparse
import contextlib
import importlib.metadata
import json
import math
import platform
import re
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from iresnet_jax.evaluation.report import describe_environment
from iresnet_jax.storage import replacing

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
LEAST_TURNS = 3
_FLAT = re.compile(r"\[([^][{}]+)\]")  # a list of numbers and words takes one line


class Timing(NamedTuple):
    """Wall-clock times of one function, in seconds, in the order they were taken."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The median time."""
        return statistics.median(self.seconds)

    def speedup_over(self, baseline: "Timing") -> float:
        """Median over turns of the baseline's time over this one, both from the same run."""
        return statistics.median(
            b / own for own, b in zip(self.seconds, baseline.seconds, strict=True)
        )

    def summary(self) -> dict[str, Any]:
        """The numbers for a record."""
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return {"median_s": self.median, "quartiles_s": [low, high], "turns": len(self.seconds)}


def take_turns(
    asked: Mapping[Any, Callable[[int], float]],
    *,
    turns: int,
    seconds_a_turn: float = 0,
    most_seconds: float = math.inf,
) -> dict[Any, Timing]:
    """Seconds of one unit of work of everyone, in turns.

    Args:
        asked: ``num ->`` mean seconds of each of ``num`` units, by name.
        turns: Measurements of each, after one that is not counted.
        seconds_a_turn: About what a measurement takes; units that take longer are measured one by
            one.
        most_seconds: Stops early, but not before `LEAST_TURNS`.
    """
    nums = {name: max(round(seconds_a_turn / ask(1)), 1) for name, ask in asked.items()}
    measured: dict[Any, list[float]] = {name: [] for name in asked}
    began = time.perf_counter()
    for turn in range(turns):
        if turn >= LEAST_TURNS and time.perf_counter() - began > most_seconds:
            break
        for name, ask in asked.items():
            measured[name].append(ask(nums[name]))
    return {name: Timing(tuple(seconds)) for name, seconds in measured.items()}


def interleave(functions: Mapping[str, Callable[[], Any]], **settings: Any) -> dict[str, Timing]:
    """Times functions by `take_turns`, each until its result is ready; two calls beforehand
    compile and warm up.
    """

    def timed(function):
        def seconds(_):
            start = time.perf_counter()
            jax.block_until_ready(function())
            return time.perf_counter() - start

        return seconds

    jax.block_until_ready([function() for function in functions.values()])
    return take_turns({name: timed(function) for name, function in functions.items()}, **settings)


def summarize(timings: Mapping[str, Timing], baseline: str) -> dict[str, Any]:
    """Every timing's numbers with its speed-up over the baseline, which has 1."""
    return {
        name: {**own.summary(), "speedup": own.speedup_over(timings[baseline])}
        for name, own in timings.items()
    }


def parser(description: str | None) -> argparse.ArgumentParser:
    """The command line that all benchmarks share."""
    made = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    made.add_argument(
        "--quick",
        action="store_true",
        help="fewer cases and turns, to see that it works; writes no file",
    )
    made.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="where to write the results instead, quick ones too",
    )
    return made


def show(results: Any, name: str = "") -> None:
    """Prints the numbers of a record, a line for each of its innermost parts."""
    if isinstance(results, Mapping):
        single = {
            key: value
            for key, value in results.items()
            if not isinstance(value, Mapping | list | tuple)
        }
        written = (
            f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
            for key, value in single.items()
        )
        if line := ", ".join(written):
            print(f"{name}: {line}" if name else line, flush=True)
        for key, part in results.items():
            show(part, f"{name} {key}".strip())
    elif isinstance(results, list):
        for place, part in enumerate(results):
            show(part, f"{name} {place}".strip())


def write(
    name: str,
    arguments: argparse.Namespace,
    settings: Mapping[str, Any],
    results: Any,
    *,
    is_shown: bool = False,
) -> None:
    """Prints the numbers, unless they were before, and writes ``results/<name>.json`` with all
    settings that they depend on.

    A quick run that names no file writes nothing.
    """
    if not is_shown:
        show(results)
    # of data such as "npy:FILE"
    path = arguments.output or RESULTS / f"{re.sub('[/:]', '_', name)}.json"
    if arguments.quick and not arguments.output:
        return
    record = {
        "benchmark": name,
        "command": shlex.join(["python", *sys.argv]),
        "environment": {**describe_environment(), "processor": _processor()},
        "settings": {"quick": arguments.quick, **settings},
        "results": results,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as incoming:
        incoming.write_text(
            _FLAT.sub(lambda found: f"[{' '.join(found[1].split())}]", json.dumps(record, indent=1))
            + "\n"
        )
    print(f"written: {path}")


def resume(
    name: str,
    arguments: argparse.Namespace,
    settings: Mapping[str, Any],
    identities: Iterable[dict[str, Any]],
    measure: Callable[..., Mapping[str, Any]],
    summarize: Callable[[list[dict[str, Any]]], Any],
    packages: Iterable[str],
) -> list[dict[str, Any]]:
    """Makes the runs that a record lacks, writes it after each of them, and shows its summary.

    Args:
        name: Name of the record.
        arguments: What `parser` has read.
        settings: All that every run depends on; a record with others is left alone.
        identities: What tells the runs from each other, arguments of ``measure`` by name, in the
            order in which they are made.
        measure: Makes a run.
        summarize: The summary of all runs.
        packages: Packages whose versions a run keeps.

    Returns:
        All runs of the record.
    """
    path, runs = arguments.output or (None if arguments.quick else RESULTS / f"{name}.json"), []
    if path is not None and path.exists():
        record = json.loads(path.read_text())
        if record["settings"] != json.loads(json.dumps({"quick": arguments.quick, **settings})):
            raise SystemExit(
                f"error: {path} was made under other settings: move it away, or write "
                "elsewhere with --output"
            )
        runs = record["results"]["runs"]
    for identity in identities:
        if not any(identity.items() <= run.items() for run in runs):
            runs.append({**identity, **measure(**identity), **made_with(packages)})
            show(runs[-1])
            write(
                name, arguments, settings, {"summary": summarize(runs), "runs": runs}, is_shown=True
            )
    show(summarize(runs))
    return runs


def made_with(packages: Iterable[str]) -> dict[str, Any]:
    """What a run was made with, which may be another commit than that of the next one."""
    found, installed = describe_environment(), {}
    for name in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            installed[name] = importlib.metadata.version(name)
    return {"commit": found["commit"], "date": found["date"], "versions": installed}


def _processor() -> str:
    """The model of this machine's processor, as far as the operating system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return platform.processor() or "unknown"
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
        "unknown",
    )
