"""The report of a run: every result as ``report.json``, and as the page ``report.html`` that needs nothing else."""

import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from iresnet_jax.evaluation import accuracy as classify
from iresnet_jax.evaluation import environment, lipschitz
from iresnet_jax.evaluation import inversion as reconstruct
from iresnet_jax.evaluation import likelihood as evaluate
from iresnet_jax.evaluation import samples as sample
from iresnet_jax.evaluation.trained import Trained
from iresnet_jax.files import replacing
from iresnet_jax.models import density
from iresnet_jax.plain import to_plain
from iresnet_jax.report import page, plots
from iresnet_jax.training.metrics import read_metrics

NUM_IMAGES, NUM_POINTS = 64, 2000  # samples shown
NUM_UNCERTIFIED = 64  # examples that a network of blocks that may be no contractions tries to reconstruct: it runs to its cap
SAMPLES_A_CLASS, CLASSES_SHOWN = 8, 10  # of a model with classes, the first of them
MAP_SIDE = 128


def write(trained: Trained) -> dict[str, Any]:
    """Computes everything a report holds and writes ``report.json`` and ``report.html`` into the workdir.

    Args:
        trained: The model.

    Returns:
        The report. In ``report.json`` numbers that are not finite are null.

    Example:
        >>> report = write(load("runs/digits_density"))  # doctest: +SKIP
        >>> report["bits_per_dim"]["mean"]  # doctest: +SKIP
    """
    records = read_metrics(trained.workdir)
    results, figures, warnings = (_of_classes if trained.is_classifier else _of_density)(trained)
    if trained.is_bijective:
        found, drawn = _of_bijection(trained)
        results, figures = {**results, **found}, {**figures, **drawn}
    config = to_plain(trained.config)
    report = {
        **results,
        "train": training_times(records, trained.step),
        "environment": environment.describe(),
        "config": config,
        "warnings": [*trained.notes, *warnings],
    }
    curves = [record for record in records if record["split"] != "timing"]
    headline = "accuracy" if trained.is_classifier else density.objective_name(trained.spec)
    if any(headline in record for record in curves):
        figures["learning_curves"] = plots.learning_curves(curves, trained.step)
    uris = {name: plots.to_svg_or_png(figure) for name, figure in figures.items() if figure is not None}
    shown = {**report, "config": {**config, "reference": dict(config["references"]["values"])}}
    html = page.render(shown, uris, title=trained.workdir.resolve().name)
    _write_text(trained.workdir / "report.json", json.dumps(_strict(report), indent=2, allow_nan=False) + "\n")
    _write_text(trained.workdir / "report.html", html)
    return report


def _of_bijection(trained: Trained) -> tuple[dict[str, Any], dict[str, Any]]:
    """Results and figures about the inverse and about Lipschitz constants."""
    constants = lipschitz.measure(trained)
    reconstructions = reconstruct.reconstruct(trained, _num_reconstructed(trained, certified=constants["certified"]))
    figures = {"reconstructions": reconstruct.figure(reconstructions), "lipschitz": _lipschitz_figure(trained, constants)}
    errors, bounds = (np.asarray(getattr(reconstructions.refined, name)) for name in ("euclidean_error", "error_bound"))
    if np.isfinite(errors).any():
        figures["error_histogram"] = plots.error_histogram(errors, bounds if np.isfinite(bounds).any() else None)
    return {"inverse": reconstruct.summarize(trained, reconstructions), "lipschitz": constants}, figures


def _of_density(trained: Trained) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """Results, figures and warnings that only a density has."""
    likelihood = evaluate.evaluate(trained)
    is_toy = trained.spec.num_levels is None
    samples = sample.draw(trained, NUM_POINTS if is_toy else NUM_IMAGES, seed=trained.config.seed)
    results = {
        density.objective_name(trained.spec): likelihood,
        "samples": {
            "num": len(samples.values),
            "fraction_converged": float(samples.converged.mean()),
            "max_error_bound": float(samples.error_bound.max()),
        },
    }
    figures = {"samples": sample.figure(trained, samples.values)}
    warnings = [*evaluate.warnings(likelihood), *sample.warnings(samples)]
    if is_toy:
        figures["density"] = plots.density_map(*density_on_grid(trained))
    if trained.has_classes:
        found, drawn, _ = _of_classes(trained)
        results, figures = {**results, **found}, {**figures, **drawn}
        labels = [label for label in range(min(trained.spec.num_classes, CLASSES_SHOWN)) for _ in range(SAMPLES_A_CLASS)]
        by_class = sample.draw(trained, len(labels), seed=trained.config.seed + 1, labels=labels)
        figures["samples_by_class"] = plots.image_grid(sample.grey_values(trained, by_class.values), columns=SAMPLES_A_CLASS)
        warnings += [f"Of samples by class: {warning}" for warning in sample.warnings(by_class)]
    return results, figures, warnings


def _of_classes(trained: Trained) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """Results, figures and warnings that only a model with classes has."""
    result = classify.evaluate(trained)
    return {"classification": result}, classify.figures(trained, result), []


def _num_reconstructed(trained: Trained, *, certified: bool) -> int:
    """All test images of a classifier, whose features are to be as good as the images; a sample of a density's."""
    if not certified:
        return NUM_UNCERTIFIED
    return len(trained.source.labels("test")) if trained.is_classifier else reconstruct.NUM_EXAMPLES


def describe(report: dict[str, Any], workdir: Path) -> str:
    """The headline of a report, and where it is."""
    lines = []
    if likelihood := report.get("bits_per_dim") or report.get("nll"):
        lines.append(evaluate.describe({**likelihood}))
    if "classification" in report:
        lines.append(classify.describe(report["classification"]))
    if "inverse" in report:
        lines += [reconstruct.describe(report["inverse"]), lipschitz.verdict(report["lipschitz"])]
    said = "\n".join(lines)
    lines += [warning for warning in report["warnings"] if warning not in said]
    return "\n".join([*lines, f"report: {workdir / 'report.html'}"])


def training_times(records: list[dict[str, Any]], step: int) -> dict[str, Any]:
    """How long training took, from its metrics; None for what they do not tell.

    Returns:
        ``steps`` behind the evaluated parameters and ``total_steps`` of the run so far, ``seconds_per_step`` (median of the
        logged windows), ``compile_seconds`` (start to end of the first step, of the last process), ``total_seconds``.
    """
    windows = [record["seconds_per_step"] for record in records if "seconds_per_step" in record]
    compiles = [record["compile_seconds"] for record in records if "compile_seconds" in record]
    return {
        "steps": step,
        "total_steps": max((record["step"] for record in records), default=step),
        "seconds_per_step": float(np.median(windows)) if windows else None,
        "compile_seconds": compiles[-1] if compiles else None,
        "total_seconds": max((record["wall_time_s"] for record in records), default=None),
    }


def density_on_grid(
    trained: Trained, side: int = MAP_SIDE
) -> tuple[Float[np.ndarray, "n n"], tuple[float, float, float, float]]:
    """The exact log-density of a model of the plane on a square grid around its data.

    Args:
        trained: A model of a 2-D toy.
        side: Grid points along each axis.

    Returns:
        Natural log of the density, rows along the second coordinate, and (left, right, bottom, top).
    """
    points = trained.source.held_out("test", NUM_POINTS, trained.config.seed)
    reach = 1.1 * float(np.abs(points).max())
    edge = (np.arange(side) + 0.5) / side * 2 * reach - reach
    grid = np.stack(np.meshgrid(edge, edge), axis=-1).reshape(-1, 2).astype(np.float32)

    @jax.jit
    def log_density(weights, prior, grid):
        def of_row(x):
            return density.log_prob(trained.spec, weights, prior, x, jax.random.key(0)).log_prob

        return jax.lax.map(of_row, grid.reshape(side, side, 2))

    values = np.asarray(log_density(trained.weights, trained.prior, jnp.asarray(grid)))
    return values, (-reach, reach, -reach, reach)


def _lipschitz_figure(trained: Trained, constants: dict[str, Any]) -> Any:
    blocks = constants["blocks"]
    names, estimates = [block["name"] for block in blocks], [block["estimate"] for block in blocks]
    return plots.lipschitz_bars(names, estimates, [block["bound"] for block in blocks], target=lipschitz.target(constants))


def _strict(value: Any) -> Any:
    """The same data with null for numbers that JSON does not have."""
    if isinstance(value, dict):
        return {name: _strict(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _write_text(path: Path, text: str) -> None:
    with replacing(path) as incoming:
        incoming.write_text(text, encoding="utf-8")
