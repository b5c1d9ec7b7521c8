"""Classification error against the coefficient (Table 2 of Behrmann et al. 2019), and likelihoods of densities.

All numbers are those of records and reports; nothing is measured here. Published numbers are those that a config names.
"""

import json
import math
import re
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from iresnet_jax.evaluation.accuracy import fraction_interval
from iresnet_jax.figures import style
from iresnet_jax.figures.drawing import Drawing, Row
from iresnet_jax.runs.trained_run import Run

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"  # of a checkout; the package has no records and no models
SWEEPS, REPORTS = "lipschitz_sweep_*.json", "**/report.json"

# % error on MNIST by coefficient, Behrmann et al. 2019, Table 2, quoted second-hand; their network is larger.
PUBLISHED = {
    ("mnist_classification", variant): f"i-ResNet (Behrmann et al. 2019, Table 2) {error:.2f}"
    for variant, error in {"vanilla": 0.38, "0.9": 0.40, "0.8": 0.42, "0.7": 0.40, "0.6": 0.42, "0.5": 0.86}.items()
}

PUBLISHED_WIDTH = 36  # characters of the last column
COLUMNS = (0.0, 0.14, 0.26, 0.54, 0.61, 0.77)  # where they begin, as shares of the width

_MEASURES = {"bits_per_dim": "bits/dim", "nll": "nats"}
_VARIANTS = {"batchnorm": "BatchNorm", "vanilla": "no constraint", "none": "no constraint"}


def figure(run: Run | None) -> Drawing:
    """The tables of all records and kept models, and of a run that has a report.

    Raises:
        ValueError: If there are no records, or the run has no report yet.
    """
    rows = [row for path in sorted(RESULTS.glob(SWEEPS)) for row in _of_sweep(json.loads(path.read_text()))]
    swept = {row["table"] for row in rows}
    reports = [row for path in sorted(RESULTS.glob(REPORTS)) for row in _of_report(path)]
    rows += [row for row in reports if row["unit"] != "% error" or row["table"] not in swept]
    if run is not None:
        own = run.folder / "report.json"
        if not own.exists():
            raise ValueError(f"{run.folder} has no report yet: run python -m iresnet_jax report --workdir {run.folder}")
        rows += [row | {"model": f"{row['model']} this run".strip()} for row in _of_report(own)]
    if not rows:
        raise ValueError(f"records are in the repository, not in the package: {RESULTS} is not there")
    return Drawing(draw(rows), rows)


def _row(table: str, model: str, value: float, unit: str, **known: Any) -> dict[str, Any]:
    """A row; ``low`` and ``high`` are the 95 % interval of the value, ``minutes`` the time of training."""
    empty = {"low": math.nan, "high": math.nan, "num_examples": "", "published": "", "minutes": math.nan, "hardware": ""}
    return {"table": table, "model": model, "value": value, "unit": unit, **empty, **known}


def _of_sweep(record: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Rows of a record of classifiers: one for each coefficient, over all seeds."""
    runs, machine = record["results"], record["environment"]
    name = record["benchmark"].removeprefix("lipschitz_sweep_")
    for variant in dict.fromkeys(run["variant"] for run in runs):
        own = [run for run in runs if run["variant"] == variant]
        num, error = own[0]["num_examples"], sum(run["error"] for run in own) / len(own)
        low, high = fraction_interval(round(error * num), num)  # seeds share their test images: these count once
        yield _row(
            name,
            _VARIANTS.get(variant, f"c = {variant}"),
            100 * error,
            "% error",
            low=100 * low,
            high=100 * high,
            num_examples=num,
            minutes=sum(run["total_seconds"] for run in own) / len(own) / 60,
            published=PUBLISHED.get((name, variant), ""),
            hardware=_hardware(machine),
        )


def _of_report(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a report: its likelihood, and its test error if it has no likelihood."""
    report = json.loads(path.read_text())
    published = dict(report["config"].get("references", {}).get("values", ()))
    seconds = report["train"].get("total_seconds")
    known = {
        "published": "; ".join(f"{name} {value:g}" for name, value in published.items()),
        "minutes": math.nan if seconds is None else seconds / 60,
        "hardware": _hardware(report["environment"]),
    }
    found = report.get("classification")
    for key, unit in _MEASURES.items():
        if key in report and "mean" in report[key]:
            mean, stderr = (math.nan if report[key][name] is None else report[key][name] for name in ("mean", "stderr"))
            reach = 1.96 * stderr
            interval = {"low": mean - reach, "high": mean + reach, "num_examples": report[key]["num_examples"]}
            yield _row(path.parent.name, "hybrid" if found else "", mean, unit, **interval, **known)
            return
    if found:
        low, high = found["interval"]
        interval = {"low": 100 * low, "high": 100 * high, "num_examples": found["num_examples"]}
        config = report["config"]
        has_batchnorm = config["classifier"].get("normalization") == "batchnorm"
        variant = "batchnorm" if has_batchnorm else config["constraint"]["norms"]
        model = _VARIANTS.get(variant, f"c = {config['model']['coeff']}")
        yield _row(path.parent.name.removesuffix(f"_{variant}"), model, 100 * found["error"], "% error", **interval, **known)


def _hardware(machine: dict[str, Any]) -> str:
    """Such as "2 cores of AMD EPYC", "1 core" of a record that does not name its processor, or "1 x NVIDIA H100"."""
    if machine["backend"] != "cpu":
        return machine["devices"]
    num = machine["cpu_count"]
    return f"{num} core{'s' if num > 1 else ''}" + (f" of {machine['processor']}" if "processor" in machine else "")


def draw(rows: Sequence[Row]) -> Any:
    """Both tables as text, a line for each row."""
    errors = [row for row in rows if row["unit"] == "% error"]
    others = [row for row in rows if row["unit"] != "% error"]
    head = ("value, 95 % interval", "minutes", "machine", "published")
    lines = [("classifier of", "constraint", *head), *_lines(errors), ("",) * 6]
    lines += [("density of", "", *head), *_lines(others)]
    figure = style.figure(width=style.PAGE_WIDTH, height=0.2 * len(lines))
    axes = figure.add_subplot()
    axes.set_axis_off()
    for number, cells in enumerate(lines):
        weight = "bold" if cells[2:] == head else "normal"
        for place, cell in zip(COLUMNS, cells, strict=True):
            axes.text(place, -number, cell, size=7.5, color=style.INK, weight=weight, va="center", in_layout=False)
    axes.set(xlim=(0.0, 1.0), ylim=(-len(lines) + 0.5, 0.5))
    return figure


def _lines(rows: Sequence[Row]) -> Iterator[tuple[str, ...]]:
    """A line for each row, and further ones for what was published more often than a line holds."""
    for row in rows:
        *own, published = _cells(row)
        first, *others = textwrap.wrap(published, PUBLISHED_WIDTH) or [""]
        yield (*own, first)
        yield from ((*[""] * len(own), other) for other in others)


def _cells(row: Row) -> tuple[str, ...]:
    value = f"{row['value']:.3f} {row['unit']}"
    interval = f", {row['low']:.3f} to {row['high']:.3f}" if math.isfinite(row["low"]) else ""
    minutes = f"{row['minutes']:.3g}" if math.isfinite(row["minutes"]) else ""
    published = re.sub(r" \([^)]*\)", "", row["published"])  # the sources are in the CSV
    name = re.sub("_(classification|density|hybrid)", "", row["table"])
    return name, row["model"], value + interval, minutes, row["hardware"], published
