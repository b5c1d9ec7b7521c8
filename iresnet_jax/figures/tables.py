"""Classification error against the coefficient (Table 2 of Behrmann et al. 2019), and likelihoods of densities.

All numbers are those of records and reports; nothing is measured here. Published numbers are those that a config names.
"""

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from iresnet_jax.evaluation.accuracy import fraction_interval
from iresnet_jax.figures import style
from iresnet_jax.figures.drawing import Drawing, Row

SWEEPS, REPORTS = "lipschitz_sweep_*.json", "**/report.json"

_MEASURES = {"bits_per_dim": "bits/dim", "nll": "nats"}
_VARIANTS = {"batchnorm": "BatchNorm", "vanilla": "no constraint"}


def figure(results: Path, own: Path | None = None) -> Drawing:
    """Collects and draws.

    Args:
        results: Folder of the benchmarks' records and of kept models.
        own: Folder of a run whose report is added.

    Raises:
        ValueError: If there are no records, or the run has no report yet.
    """
    rows = [row for path in sorted(results.glob(SWEEPS)) for row in _of_sweep(json.loads(path.read_text()))]
    rows += [row for path in sorted(results.glob(REPORTS)) for row in _of_report(path)]
    if own is not None:
        if not (own / "report.json").exists():
            raise ValueError(f"{own} has no report yet: run python -m iresnet_jax report --workdir {own}")
        rows += _of_report(own / "report.json")
    if not rows:
        raise ValueError(f"{results} holds no records")
    return Drawing(draw(rows), rows)


def _row(table: str, model: str, value: float, unit: str, **known: Any) -> dict[str, Any]:
    """A row; ``low`` and ``high`` are the 95 % interval of the value, ``minutes`` the time of training."""
    empty = {"low": math.nan, "high": math.nan, "num_examples": "", "published": "", "minutes": math.nan, "hardware": ""}
    return {"table": table, "model": model, "value": value, "unit": unit, **empty, **known}


def _of_sweep(record: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Rows of a record of classifiers: one for each coefficient, over all seeds."""
    runs, machine = record["results"], record["environment"]
    for variant in dict.fromkeys(run["variant"] for run in runs):
        own = [run for run in runs if run["variant"] == variant]
        num, error = own[0]["num_examples"], sum(run["error"] for run in own) / len(own)
        low, high = fraction_interval(round(error * num), num)  # seeds share their test images: these count once
        yield _row(
            record["benchmark"].removeprefix("lipschitz_sweep_"),
            _VARIANTS.get(variant, f"c = {variant}"),
            100 * error,
            "% error",
            low=100 * low,
            high=100 * high,
            num_examples=num,
            minutes=sum(run["total_seconds"] for run in own) / len(own) / 60,
            hardware=_hardware(machine),
        )


def _of_report(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of the report of a density; those of classifiers stand in the sweeps."""
    report = json.loads(path.read_text())
    published = dict(report["config"].get("references", {}).get("values", ()))
    for key, unit in _MEASURES.items():
        if key in report and "mean" in report[key]:
            mean, reach = report[key]["mean"], 1.96 * report[key]["stderr"]
            seconds = report["train"].get("total_seconds")
            yield _row(
                path.parent.name,
                "density",
                mean,
                unit,
                low=mean - reach,
                high=mean + reach,
                num_examples=report[key]["num_examples"],
                published="; ".join(f"{name} {value:g}" for name, value in published.items()),
                minutes=math.nan if seconds is None else seconds / 60,
                hardware=_hardware(report["environment"]),
            )


def _hardware(machine: dict[str, Any]) -> str:
    return f"{machine.get('processor', 'processor unknown')}, {machine['cpu_count']} cores, {machine['devices']}"


def draw(rows: Sequence[Row]) -> Any:
    """The table as text, a line for each row."""
    figure = style.figure(width=style.PAGE_WIDTH, height=0.4 + 0.19 * len(rows))
    axes = figure.add_subplot()
    axes.set_axis_off()
    places = (0.0, 0.25, 0.38, 0.66, 0.76)
    lines = [("data", "model", "value and 95 % interval", "minutes", "published"), *map(_cells, rows)]
    for number, cells in enumerate(lines):
        for place, cell in zip(places, cells, strict=True):
            weight = "bold" if number == 0 else "normal"
            axes.text(place, -number, cell, size=6.5, color=style.INK, weight=weight, va="center")
    axes.set(xlim=(0.0, 1.0), ylim=(-len(lines) + 0.5, 0.5))
    return figure


def _cells(row: Row) -> tuple[str, ...]:
    interval = f" [{row['low']:.3f}, {row['high']:.3f}]" if math.isfinite(row["low"]) else ""
    minutes = f"{row['minutes']:.3g}" if math.isfinite(row["minutes"]) else ""
    published = row["published"].replace("; ", "\n")
    return row["table"], row["model"], f"{row['value']:.3f} {row['unit']}{interval}", minutes, published
