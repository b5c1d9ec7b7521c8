"""Report of a run: every result as ``report.json``, and as the page ``report.html`` that needs nothing else."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from iresnet_jax.atomic_files import replacing
from iresnet_jax.checked_dataclasses import to_plain
from iresnet_jax.evaluation import (
    accuracy,
    calibration,
    draws,
    environment,
    guarantee,
    inversion,
    likelihood,
    points,
    samples,
)
from iresnet_jax.models.density import Density
from iresnet_jax.report import page, pictures, plots
from iresnet_jax.report.contents import Report, TrainingTimes
from iresnet_jax.report.style import to_svg_or_png
from iresnet_jax.runs.metrics import read_metrics
from iresnet_jax.runs.trained_run import Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NUM_IMAGES, NUM_POINTS = 64, 2000  # samples shown
NUM_UNCERTIFIED = 64  # examples that a model without a certificate inverts: its solver runs to the cap
CERTIFY_S = 0.5  # roughly, for guaranteed errors of inverses; compiling takes some seconds beside
SAMPLES_A_CLASS, CLASSES_SHOWN = 8, 10  # samples of each of the first classes
MAP_SIDE = 128
LOG_PROB_FILE = "test_log_prob.npy"

Results = dict[str, Any]  # fields of `Report`
Figures = dict[str, "Figure"]  # by the name that the page gives them


def write(run: Run) -> Report:
    """Computes everything that a report holds and writes ``report.json`` and ``report.html`` into the folder of the run.

    Example:
        >>> report = write(load("runs/digits_density"))  # doctest: +SKIP
        >>> report.likelihood.mean  # doctest: +SKIP
    """
    run = run.with_data_checked()
    records, examples = read_metrics(run.folder), run.test_examples()
    results: Results = {}
    figures: Figures = {}
    if curves := [record for record in records if record["split"] != "timing"]:
        figures["learning_curves"] = plots.learning_curves(curves, run.step)
    if isinstance(run.model, Density):
        results |= _density(run, run.model, examples, figures)
    if run.model.spec.num_classes is not None:
        results |= _classes(run, examples, figures)
    results |= _bijection(run, examples, figures)
    times, config = TrainingTimes.from_metrics(records, run.step, run.config.training.minutes), to_plain(run.config)
    report = Report(times, environment.describe(), config, notes=run.notes, **results)
    uris = {name: to_svg_or_png(figure) for name, figure in figures.items()}
    html = page.render(report, uris, title=run.folder.resolve().name, references=dict(run.config.references.values))
    _write_text(run.folder / "report.json", json.dumps(report.to_json(), indent=2, allow_nan=False) + "\n")
    _write_text(run.folder / "report.html", html)
    return report


def _density(run: Run, model: Density, examples: np.ndarray, figures: Figures) -> Results:
    """Likelihood, of vectors that of each point as well, and samples of a density."""
    settings, seed = run.config.evaluation, run.config.seed
    contexts, is_image = run.test_contexts(), len(model.spec.flow.event_shape) == 3
    num = NUM_IMAGES if is_image else NUM_POINTS
    drawn = samples.draw(model, num, settings.batch_size, seed=seed, contexts=contexts)
    figures["samples"] = pictures.examples(drawn.values, model.spec.num_levels)
    if model.spec.flow.event_shape == (2,) and contexts is None:
        figures["density"] = plots.density_map(*points.log_density_on_grid(model, examples[:num], MAP_SIDE))
    elif not is_image:
        figures["pairs"] = plots.pairs(examples[:num], drawn.values)
    measured = likelihood.measure(model, examples, settings, seed, contexts=contexts, entropy_floor=run.data.entropy)
    results = {"likelihood": measured.summary, "samples": drawn.convergence}
    if is_image:
        return results
    if contexts is not None:
        results |= _posteriors(run, model, examples, contexts, figures)
    taken = None if contexts is None else contexts[np.arange(num) % len(contexts)]  # as `samples.draw` does
    of_samples = draws.log_prob(model, drawn.values, settings, seed, contexts=taken)
    unlikely = points.least_likely(examples, measured.log_prob)
    figures["likelihoods"] = plots.likelihoods(examples, measured.log_prob, of_samples, [point.row for point in unlikely])
    with replacing(run.folder / LOG_PROB_FILE) as incoming, incoming.open("wb") as file:
        np.save(file, measured.log_prob)
    return {**results, "points": points.Points(LOG_PROB_FILE, unlikely)}


def _posteriors(run: Run, model: Density, examples: np.ndarray, contexts: np.ndarray, figures: Figures) -> Results:
    """Samples of a density of vectors given each of the first test contexts, and its calibration if there are enough."""
    settings, seed, num = run.config.evaluation, run.config.seed, len(contexts[:2])
    repeated = np.repeat(contexts[:num], NUM_POINTS, axis=0)
    drawn = samples.draw(model, len(repeated), settings.batch_size, seed=seed, contexts=repeated)
    figures["posterior_pairs"] = plots.posterior_pairs(drawn.values.reshape(num, NUM_POINTS, -1), examples[:num])
    if len(examples) < calibration.LEAST_EXAMPLES:
        return {}
    found = calibration.calibrate_run(run)
    figures["ranks"] = plots.rank_histograms(found)
    return {"calibration": found}


def _classes(run: Run, images: np.ndarray, figures: Figures) -> Results:
    """Test error of a model with classes and, of a density, samples of each class."""
    model, size, levels = run.model, run.config.evaluation.batch_size, run.model.spec.num_levels
    result = accuracy.evaluate(model, images, run.data.labels["test"], size)
    figures["confusion"] = plots.confusion_matrix(np.array(result.confusion))
    if result.mistakes:
        chosen = images[[mistake.index for mistake in result.mistakes]]
        captions = [f"{mistake.label} as {mistake.prediction}" for mistake in result.mistakes]
        figures["mistakes"] = pictures.examples(chosen, levels, captions=captions)
    if not isinstance(model, Density):
        return {"classification": result}
    labels = np.repeat(range(min(model.spec.num_classes or 0, CLASSES_SHOWN)), SAMPLES_A_CLASS).tolist()
    drawn = samples.draw(model, len(labels), size, seed=run.config.seed + 1, labels=labels)
    figures["samples_by_class"] = pictures.examples(drawn.values, levels, columns=SAMPLES_A_CLASS)
    return {"classification": result, "samples_by_class": drawn.convergence}


def _bijection(run: Run, examples: np.ndarray, figures: Figures) -> Results:
    """Round trips and Lipschitz constants; a certified classifier inverts all test images, as its features lose nothing."""
    certificate, contexts = run.model.certificate(), run.test_contexts()
    num = inversion.NUM_EXAMPLES if isinstance(run.model, Density) else len(examples)
    chosen = examples[: num if certificate.certified else NUM_UNCERTIFIED]
    contexts = None if contexts is None else contexts[: len(chosen)]
    size, num_certified = run.config.evaluation.batch_size, guarantee.affordable(run.model.spec.flow, CERTIFY_S)
    result = inversion.reconstruct(run.model, chosen, size, run.config.seed, contexts=contexts, num_certified=num_certified)
    if shown := pictures.reconstructions(result):
        figures["reconstructions"] = shown
    errors, bounds = np.asarray(result.refined.euclidean_error), np.asarray(result.refined.error_bound)
    if result.certificate is not None:
        errors, bounds = result.certified_errors, result.certificate.error_bound
    if np.isfinite(errors).any():
        figures["error_histogram"] = plots.error_histogram(errors, bounds if np.isfinite(bounds).any() else None)
    figures["lipschitz"] = plots.lipschitz_bars(certificate)
    of_noise = run.model.noise_certificate() if isinstance(run.model, Density) else None
    return {"inverse": result.summary, "lipschitz": certificate, "noise_lipschitz": of_noise}


def _write_text(path: Path, text: str) -> None:
    with replacing(path) as incoming:
        incoming.write_text(text, encoding="utf-8")
