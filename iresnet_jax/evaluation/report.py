"""Report of a run: every result as ``report.json``, and with pictures as the page ``report.html``
that needs nothing else.

A result is a dataclass beside the computation that fills it, and its ``str`` is its line on the
page and in the terminal.
"""

import datetime
import importlib.metadata
import json
import platform
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from iresnet_jax.evaluation import (
    calibration,
    classification,
    likelihood,
    plots,
    robustness,
    round_trips,
    samples,
)
from iresnet_jax.evaluation.calibration import Calibration
from iresnet_jax.evaluation.classification import Classification
from iresnet_jax.evaluation.likelihood import Likelihood
from iresnet_jax.evaluation.robustness import Robustness
from iresnet_jax.evaluation.round_trips import Inversion
from iresnet_jax.evaluation.samples import SampleConvergence
from iresnet_jax.maths.logdet_exact import ExactLogdet
from iresnet_jax.maths.platforms import device_summary, num_cores
from iresnet_jax.models.certificate import Certificate
from iresnet_jax.models.density import Density
from iresnet_jax.models.preprocessing import cells
from iresnet_jax.runs.config import to_plain
from iresnet_jax.runs.metrics import read_metrics
from iresnet_jax.runs.trained_run import Run
from iresnet_jax.storage import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NUM_IMAGES, NUM_POINTS = 64, 2000  # samples shown
CERTIFY_S = 0.5  # rough time for guaranteed errors of inverses, without some seconds of compiling
CLASSES_SHOWN = 10  # first classes, with a row of samples each
TITLES = {  # by field of `Report`, in the order of the page
    "likelihood": "Likelihood",
    "calibration": "Calibration",
    "classification": "Classes",
    "robustness": "Robustness",
    "samples": "Samples",
    "samples_by_class": "Samples by class",
    "inverse": "Inverse",
    "lipschitz": "Lipschitz constants",
    "noise_lipschitz": "Lipschitz constants of the flow of noise",
    "train": "Training",
}

Results = dict[str, Any]  # values by field of `Report`
# Figures by field of `Report` and by caption.
Figures = dict[str, dict[str, "Figure"]]


@dataclass(frozen=True)
class TrainingTimes:
    """Wall-clock time of a training run; None if its metrics do not tell.

    Attributes:
        steps: Number of updates that led to the evaluated parameters.
        total_steps: Updates of the run so far.
        seconds_per_step: Median over the logged windows.
        compile_seconds: Time from the last process' start to the end of its first step.
        total_seconds: Time from the start to the last record.
    """

    steps: int
    total_steps: int
    seconds_per_step: float | None = None
    compile_seconds: float | None = None
    total_seconds: float | None = None

    @classmethod
    def from_metrics(cls, records: Iterable[Mapping[str, Any]], steps: int) -> "TrainingTimes":
        """Times of a run from the records of its metrics."""
        records = list(records)
        windows = [record["seconds_per_step"] for record in records if "seconds_per_step" in record]
        compiles = [record["compile_seconds"] for record in records if "compile_seconds" in record]
        return cls(
            steps=steps,
            total_steps=max((record["step"] for record in records), default=steps),
            seconds_per_step=float(np.median(windows)) if windows else None,
            compile_seconds=compiles[-1] if compiles else None,
            total_seconds=max((record["wall_time_s"] for record in records), default=None),
        )

    def __str__(self) -> str:
        times = {
            "in all": self.total_seconds,
            "a step": self.seconds_per_step,
            "to compile": self.compile_seconds,
        }
        known = "".join(
            f", {seconds:.3g} s {what}" for what, seconds in times.items() if seconds is not None
        )
        return f"training: {self.steps} steps of {self.total_steps}{known}"


@dataclass(frozen=True)
class Report:
    """Results of a run; None if its kind of model does not have them.

    Attributes:
        environment: Devices, versions, date and commit, see `describe_environment`.
        calibration: Ranks of test examples among samples given their contexts, for a conditional
            density of vectors.
        noise_lipschitz: Lipschitz constants of the flow that makes the noise of variational
            dequantisation.
        notes: Sentences about the parameters, such as a replaced checkpoint.
    """

    train: TrainingTimes
    environment: Mapping[str, Any]
    config: Mapping[str, Any]
    likelihood: Likelihood | None = None
    calibration: Calibration | None = None
    classification: Classification | None = None
    robustness: Robustness | None = None
    samples: SampleConvergence | None = None
    samples_by_class: SampleConvergence | None = None
    inverse: Inversion | None = None
    lipschitz: Certificate | None = None
    noise_lipschitz: Certificate | None = None
    notes: tuple[str, ...] = ()

    def warnings(self) -> list[str]:
        """Sentences to read before any number."""
        found = list(self.notes)
        parts = (
            self.likelihood,
            self.calibration,
            self.classification,
            self.robustness,
            self.samples,
            self.inverse,
        )
        for part in parts:
            found += part.warnings() if part else ()
        if self.samples_by_class:
            found += self.samples_by_class.warnings("samples by class")
        return found + [
            known.verdict
            for known in (self.lipschitz, self.noise_lipschitz)
            if known and not known.certified
        ]

    def __str__(self) -> str:
        verdict = self.lipschitz and self.lipschitz.verdict
        calibration = self.calibration and self.calibration.headline
        headlines = [
            self.likelihood,
            calibration,
            self.classification,
            self.robustness,
            self.inverse,
            verdict,
        ]
        said = "\n".join(str(headline) for headline in headlines if headline)
        return "\n".join([said, *(warning for warning in self.warnings() if warning not in said)])

    def to_json(self) -> dict[str, Any]:
        """Content of ``report.json``; numbers that are not finite become None."""
        facts = {
            name: value
            for name, value in asdict(self).items()
            if value is not None and name != "notes"
        }
        if self.likelihood:
            facts["nll" if self.likelihood.unit == "nats" else "bits_per_dim"] = facts.pop(
                "likelihood"
            )
        if self.calibration:
            facts["calibration"] |= {
                "p_value": self.calibration.p_value,
                "calibrated": self.calibration.is_calibrated,
            }
        for name, known in (
            ("lipschitz", self.lipschitz),
            ("noise_lipschitz", self.noise_lipschitz),
        ):
            if known:
                facts[name] |= {"certified": known.certified, "max_block": known.max_block}
        facts |= {"warnings": self.warnings()}
        # JSON has no NaN and no infinity: None stands for them.
        return json.loads(json.dumps(facts), parse_constant=lambda _: None)

    @property
    def headline(self) -> str:
        """The number that is compared with published ones; empty if there is none."""
        if self.likelihood:
            return (
                f"{self.likelihood.mean:.4f} ± {self.likelihood.stderr:.4f} {self.likelihood.unit}"
            )
        return f"{100 * self.classification.error:.2f} % error" if self.classification else ""


def describe_environment() -> dict[str, Any]:
    """Devices, versions and date of this process and, in a checkout, the commit, if known."""
    versions = {}
    for package in ("iresnet_jax", "jax", "jaxlib", "flax", "optax", "numpy"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:  # run from a checkout that is not installed
            versions[package] = None
    return {
        "devices": device_summary(),
        "backend": jax.default_backend(),
        "matmul_precision": getattr(jax.config, "jax_default_matmul_precision", None) or "default",
        "cpu_count": num_cores(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        **versions,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
    }


def _commit() -> str | None:
    """Commit of the checkout that holds this package, marked if its files differ from it."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    command = [
        "git",
        "-C",
        str(root),
        "describe",
        "--always",
        "--exclude=*",
        "--abbrev=12",
        "--dirty= with changes",
    ]
    try:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):  # no git, or no commit yet
        return None


# --- what is measured -----------------------------------------------------------------------------


def write(run: Run) -> Report:
    """Computes everything that a report holds and writes ``report.json`` and ``report.html`` into
    the folder of the run.

    Example:
        >>> report = write(load("runs/digits_density"))  # doctest: +SKIP
        >>> report.likelihood.mean  # doctest: +SKIP
    """
    run = run.with_data_checked()
    records, examples = read_metrics(run.folder), run.test_examples()
    results: Results = {}
    figures: Figures = {}
    if curves := [record for record in records if record["split"] != "timing"]:
        figures["train"] = {
            "Learning curves; the line is the evaluated step": plots.learning_curves(
                curves, run.step
            )
        }
    if isinstance(run.model, Density):
        results |= _density(run, run.model, examples, figures)
    if run.model.spec.num_classes is not None:
        results |= _classes(run, examples, figures)
    results |= _inverse(run, examples, figures)
    times = TrainingTimes.from_metrics(records, run.step)
    report = Report(times, describe_environment(), to_plain(run.config), notes=run.notes, **results)
    html = render(
        report,
        figures,
        title=run.folder.absolute().name,
        references=dict(run.config.references.values),
    )
    content = json.dumps(report.to_json(), indent=2, allow_nan=False) + "\n"
    for name, text in {"report.json": content, "report.html": html}.items():
        with replacing(run.folder / name) as incoming:
            incoming.write_text(text, encoding="utf-8")
    return report


def _density(run: Run, model: Density, examples: np.ndarray, figures: Figures) -> Results:
    """Likelihood and samples of a density, and the calibration of a conditional one of vectors."""
    settings, seed, contexts = run.config.evaluation, run.config.seed, run.test_contexts()
    is_image = len(model.spec.flow.event_shape) == 3
    values, convergence = samples.draw(
        model,
        NUM_IMAGES if is_image else NUM_POINTS,
        settings.batch_size,
        seed=seed,
        contexts=contexts,
    )
    measured = likelihood.measure(
        model, examples, settings, seed, contexts=contexts, entropy_floor=run.data.entropy
    )
    results: Results = {"likelihood": measured, "samples": convergence}
    if is_image:
        figures["samples"] = {"Samples": plots.images(values, model.spec.num_levels)}
        return results
    figures["samples"] = {
        "Samples beside test data": plots.pairs(
            {"test data": examples[:NUM_POINTS], "samples": values}
        )
    }
    if model.spec.flow.event_shape == (2,) and contexts is None:
        figures["samples"]["Density"] = plots.density_map(
            *log_density_on_grid(model, examples[:NUM_POINTS])
        )
    if contexts is not None and len(examples) >= calibration.LEAST_EXAMPLES:
        results["calibration"] = calibration.calibrate_run(run)
        figures["calibration"] = {
            "Ranks of test examples": plots.rank_histograms(results["calibration"])
        }
    return results


def log_density_on_grid(
    model: Density, points: Float[np.ndarray, "n 2"], side: int = 128
) -> tuple[Float[np.ndarray, "m m"], tuple[float, float, float, float]]:
    """Exact log-density of a model of the plane on a grid around points; for data with cells, of
    the dequantised data.

    Returns:
        Natural log of the density, rows along the second coordinate, and (left, right, bottom,
        top).
    """
    points = np.asarray(cells(model.spec).forward(jnp.asarray(points)), np.float64)
    low, high = points.min(axis=0), points.max(axis=0)
    margin = np.maximum(0.05 * (high - low), 1e-6)
    low, high = low - margin, high + margin
    edges = low + (np.arange(side)[:, None] + 0.5) / side * (high - low)
    grid = np.stack(np.meshgrid(*edges.T), axis=-1).astype(np.float32)
    exact = model.continuous.with_(estimator=ExactLogdet())
    log_density = jax.jit(lambda model, grid: jax.lax.map(model.log_prob, grid))(exact, grid)
    return np.asarray(log_density), (*np.stack([low, high]).T.ravel().tolist(),)


def _classes(run: Run, examples: np.ndarray, figures: Figures) -> Results:
    """Test error of a model with classes; a classifier's robustness, or a density's samples of each
    class.
    """
    model, size, levels = run.model, run.config.evaluation.batch_size, run.model.spec.num_levels
    is_image = examples.ndim == 4
    result = classification.evaluate(model, examples, run.data.labels["test"], size)
    figures["classification"] = {
        "Classes and what they were taken for": plots.confusion_matrix(np.array(result.confusion))
    }
    if result.mistakes and is_image:
        chosen = examples[[mistake.index for mistake in result.mistakes]]
        captions = [f"{mistake.label} as {mistake.prediction}" for mistake in result.mistakes]
        figures["classification"]["First mistakes"] = plots.images(
            chosen, levels, captions=captions
        )
    if not isinstance(model, Density):
        results: Results = {"classification": result}
        if run.config.evaluation.radii:
            labels = run.data.labels["test"]
            found, radii = robustness.measure(
                model, examples, labels, run.config.evaluation, run.config.seed
            )
            results["robustness"] = found
            figures["robustness"] = {"Accuracy by radius": plots.robustness_curves(found, radii)}
        return results
    labels = np.repeat(
        range(min(model.spec.num_classes or 0, CLASSES_SHOWN)), plots.COLUMNS
    ).tolist()
    values, convergence = samples.draw(
        model, len(labels), size, seed=run.config.seed + 1, labels=labels
    )
    if is_image:
        figures["samples_by_class"] = {"Samples, a class a row": plots.images(values, levels)}
    return {"classification": result, "samples_by_class": convergence}


def _inverse(run: Run, examples: np.ndarray, figures: Figures) -> Results:
    """Round trips and Lipschitz constants."""
    model, certificate, contexts = run.model, run.model.certificate(), run.test_contexts()
    # The solver of a model without a certificate runs to its cap.
    chosen = examples[: round_trips.NUM_EXAMPLES if certificate.certified else 64]
    contexts = None if contexts is None else contexts[: len(chosen)]
    size = run.config.evaluation.batch_size
    num_certified = round_trips.affordable(model.spec.flow, CERTIFY_S)
    result = round_trips.reconstruct(
        model, chosen, size, run.config.seed, contexts=contexts, num_certified=num_certified
    )
    if shown := plots.reconstructions(result.originals, result.reconstructions):
        figures["inverse"] = {"Test images and what came back": shown}
    figures["lipschitz"] = {"Lipschitz constants of the blocks": plots.lipschitz_bars(certificate)}
    of_noise = model.noise_certificate() if isinstance(model, Density) else None
    return {"inverse": result.summary, "lipschitz": certificate, "noise_lipschitz": of_noise}


# --- the page -------------------------------------------------------------------------------------


def render(
    report: Report, figures: Figures, *, title: str, references: Mapping[str, float | int]
) -> str:
    """The report of a run as one HTML page without scripts that needs no other file.

    Args:
        figures: Figures by field of `Report` and by caption.
        references: Published numbers to compare the headline with, by name.
    """
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined
    )
    template = environment.from_string(
        files("iresnet_jax.evaluation").joinpath("page.html.jinja").read_text("utf-8")
    )
    return template.render(
        title=title,
        report=report,
        sections=[
            (heading, getattr(report, name), figures.get(name, {}))
            for name, heading in TITLES.items()
        ],
        data_uri=plots.data_uri,
        references=references if report.headline else {},
        config=json.dumps(report.config, indent=2),
    )
