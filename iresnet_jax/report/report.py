"""Report of a run: every result as ``report.json``, and as the page ``report.html`` that needs nothing else."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from iresnet_jax.evaluation import accuracy, environment, inversion, likelihood, lipschitz, samples
from iresnet_jax.evaluation.certificate import Certificate
from iresnet_jax.evaluation.examples import held_out
from iresnet_jax.evaluation.results import Classification, Inversion, Likelihood, SampleQuality, TrainingTimes
from iresnet_jax.evaluation.trained import Trained
from iresnet_jax.files import replacing
from iresnet_jax.report import page, pictures, plots
from iresnet_jax.report.contents import Report
from iresnet_jax.report.style import to_svg_or_png
from iresnet_jax.training.config import to_plain
from iresnet_jax.training.metrics import read_metrics

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NUM_IMAGES, NUM_POINTS = 64, 2000  # samples shown
NUM_UNCERTIFIED = 64  # examples that a model without a certificate inverts: its solver runs to the cap
SAMPLES_A_CLASS, CLASSES_SHOWN = 8, 10  # samples of each of the first classes
MAP_SIDE = 128

Figures = dict[str, "Figure"]


def write(trained: Trained) -> Report:
    """Computes everything that a report holds and writes ``report.json`` and ``report.html`` into the workdir.

    Args:
        trained: The run.

    Example:
        >>> report = write(load("runs/digits_density"))  # doctest: +SKIP
        >>> report.likelihood.mean  # doctest: +SKIP
    """
    records, config = read_metrics(trained.workdir), to_plain(trained.config)
    examples = held_out(trained.source, trained.config.evaluation, trained.config.seed)
    figures: Figures = {}
    if curves := [record for record in records if record["split"] != "timing"]:
        figures["learning_curves"] = plots.learning_curves(curves, trained.step)
    measured, drawn = (None, None) if trained.is_classifier else _density(trained, examples, figures)
    classification, by_class = _classes(trained, examples, figures) if trained.has_classes else (None, None)
    inverse, certificate = _bijection(trained, examples, figures) if trained.is_bijective else (None, None)
    report = Report(
        train=TrainingTimes.from_metrics(records, trained.step),
        environment=environment.describe(),
        config=config,
        likelihood=measured,
        classification=classification,
        samples=drawn,
        samples_by_class=by_class,
        inverse=inverse,
        lipschitz=certificate,
        notes=trained.notes,
    )
    uris = {name: to_svg_or_png(figure) for name, figure in figures.items()}
    html = page.render(report, uris, title=trained.workdir.resolve().name, references=dict(config["references"]["values"]))
    _write_text(trained.workdir / "report.json", json.dumps(report.to_json(), indent=2, allow_nan=False) + "\n")
    _write_text(trained.workdir / "report.html", html)
    return report


def _density(trained: Trained, examples: np.ndarray, figures: Figures) -> tuple[Likelihood, SampleQuality]:
    """Likelihood and samples of a density."""
    settings, seed, toy, levels = trained.config.evaluation, trained.config.seed, trained.source.toy, trained.spec.num_levels
    drawn = samples.draw(trained, NUM_IMAGES if levels else NUM_POINTS, settings, seed=seed)
    figures["samples"] = pictures.examples(drawn.values, levels)
    if levels is None:
        figures["density"] = plots.density_map(*likelihood.log_density_on_grid(trained, examples[:NUM_POINTS], MAP_SIDE))
    floor = None if toy is None else float(toy.entropy)
    return likelihood.evaluate(trained, examples, settings, seed, entropy_floor=floor), drawn.quality


def _classes(trained: Trained, images: np.ndarray, figures: Figures) -> tuple[Classification, SampleQuality | None]:
    """Test error of a model with classes and, of a density, samples of each class."""
    settings, levels = trained.config.evaluation, trained.spec.num_levels
    result = accuracy.evaluate(trained, images, trained.source.labels("test"), settings.batch_size)
    figures["confusion"] = plots.confusion_matrix(np.array(result.confusion))
    if result.mistakes:
        captions = [f"{mistake.label} as {mistake.prediction}" for mistake in result.mistakes]
        figures["mistakes"] = pictures.examples(
            images[[mistake.index for mistake in result.mistakes]], levels, captions=captions
        )
    if trained.is_classifier:
        return result, None
    labels = np.repeat(range(min(trained.spec.num_classes, CLASSES_SHOWN)), SAMPLES_A_CLASS).tolist()
    drawn = samples.draw(trained, len(labels), settings, seed=trained.config.seed + 1, labels=labels)
    figures["samples_by_class"] = pictures.examples(drawn.values, levels, columns=SAMPLES_A_CLASS)
    return result, drawn.quality


def _bijection(trained: Trained, examples: np.ndarray, figures: Figures) -> tuple[Inversion, Certificate]:
    """Round trips and Lipschitz constants; a certified classifier inverts all test images, as its features lose nothing."""
    certificate = lipschitz.measure(trained)
    num = len(examples) if trained.is_classifier else inversion.NUM_EXAMPLES
    chosen = examples[: num if certificate.certified else NUM_UNCERTIFIED]
    result = inversion.reconstruct(trained, chosen, trained.config.evaluation, trained.config.seed)
    if shown := pictures.reconstructions(result):
        figures["reconstructions"] = shown
    errors, bounds = np.asarray(result.refined.euclidean_error), np.asarray(result.refined.error_bound)
    if np.isfinite(errors).any():
        figures["error_histogram"] = plots.error_histogram(errors, bounds if np.isfinite(bounds).any() else None)
    names, estimates, limits = zip(*((block.name, block.estimate, block.bound) for block in certificate.blocks), strict=True)
    figures["lipschitz"] = plots.lipschitz_bars(names, estimates, limits, target=certificate.target)
    return result.summary, certificate


def _write_text(path: Path, text: str) -> None:
    with replacing(path) as incoming:
        incoming.write_text(text, encoding="utf-8")
