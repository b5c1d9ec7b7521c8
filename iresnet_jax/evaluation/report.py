"""Report of a run: every result as ``report.json``, and with pictures as the page ``report.html``
that needs nothing else.

A result is a dataclass beside the computation that fills it. Its ``str`` is its text on the
page, of which a training ends with the first line.
"""

import datetime
import importlib.metadata
import json
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from iresnet_jax.evaluation import calibration, classification, likelihood, plots, round_trips
from iresnet_jax.evaluation.calibration import Calibration
from iresnet_jax.evaluation.classification import Classification, Robustness
from iresnet_jax.evaluation.likelihood import Likelihood
from iresnet_jax.evaluation.round_trips import Inversion, SampleConvergence
from iresnet_jax.maths.logdet_exact import ExactLogdet
from iresnet_jax.maths.platforms import device_summary, num_cores
from iresnet_jax.models.certificate import Certificate
from iresnet_jax.models.classifier import Classifier
from iresnet_jax.models.density import Density
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
    def from_metrics(cls, records: Sequence[Mapping[str, Any]], steps: int) -> "TrainingTimes":
        """Times of a run from the records of its metrics."""

        def logged(name: str) -> list[float]:
            return [record[name] for record in records if name in record]

        windows, compiles = logged("seconds_per_step"), logged("compile_seconds")
        return cls(
            steps=steps,
            total_steps=max((record["step"] for record in records), default=steps),
            seconds_per_step=float(np.median(windows)) if windows else None,
            compile_seconds=compiles[-1] if compiles else None,
            total_seconds=max(logged("wall_time_s"), default=None),
        )

    def __str__(self) -> str:
        times = (self.total_seconds, self.seconds_per_step, self.compile_seconds)
        known = [
            f"{seconds:.3g} s {what}"
            for seconds, what in zip(times, ("in all", "a step", "to compile"), strict=True)
            if seconds is not None
        ]
        return ", ".join([f"training: {self.steps} steps of {self.total_steps}", *known])


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
        for part in (getattr(self, name) for name in TITLES):
            if isinstance(part, Certificate):
                found += [] if part.certified else [part.verdict]
            elif hasattr(part, "warnings"):
                found += part.warnings()
        return found

    def __str__(self) -> str:
        measured = self.likelihood, self.calibration, self.classification
        said = [str(part).partition("\n")[0] for part in measured if part]
        said += [self.inverse.headline] if self.inverse else []
        said += [str(self.robustness)] if self.robustness else []
        said += [self.lipschitz.verdict] if self.lipschitz else []
        text = "\n".join(said)
        return "\n".join([text, *(warning for warning in self.warnings() if warning not in text)])

    def to_json(self) -> dict[str, Any]:
        """Content of ``report.json``; numbers that are not finite become None."""
        facts = {name: value for name, value in asdict(self).items() if value is not None}
        del facts["notes"]
        if self.likelihood:
            name = "nll" if self.likelihood.unit == "nats" else "bits_per_dim"
            facts[name] = facts.pop("likelihood")
        if found := self.calibration:
            of_all = {"p_value": found.p_value, "calibrated": found.is_calibrated}
            facts["calibration"] |= of_all
        for name in ("lipschitz", "noise_lipschitz"):
            if known := getattr(self, name):
                facts[name] |= {"certified": known.certified, "max_block": known.max_block}
        facts["warnings"] = self.warnings()
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
    options = "--always", "--exclude=*", "--abbrev=12", "--dirty= with changes"
    command = ["git", "-C", str(root), "describe", *options]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        return found.stdout.strip()
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
    records, results = read_metrics(run.folder), on_test_data(run)
    figures: Figures = {}
    if curves := [record for record in records if record["split"] != "timing"]:
        drawn = plots.learning_curves(curves, run.step)
        figures["train"] = {"Learning curves; the line is the evaluated step": drawn}
    if isinstance(run.model, Density):
        results |= _samples(run, run.model, figures)
    if found := results.get("classification"):
        figures["classification"] = _mistakes(run, found)
    results |= _inverse(run, figures)
    times = TrainingTimes.from_metrics(records, run.step)
    report = Report(times, describe_environment(), to_plain(run.config), notes=run.notes, **results)
    references = dict(run.config.references.values)
    html = render(report, figures, title=run.folder.absolute().name, references=references)
    content = json.dumps(report.to_json(), indent=2, allow_nan=False) + "\n"
    for name, text in {"report.json": content, "report.html": html}.items():
        with replacing(run.folder / name) as incoming:
            incoming.write_text(text, encoding="utf-8")
    return report


def on_test_data(run: Run) -> Results:
    """Test likelihood, test error of a model with classes, and robustness of a classifier."""
    model, settings, seed = run.model, run.config.evaluation, run.config.seed
    data, results = run.test_data(), {}
    if isinstance(model, Density):
        floor = run.data.entropy
        results["likelihood"] = likelihood.measure(
            model, data.x, settings, seed, contexts=data.context, entropy_floor=floor
        )
    if model.spec.num_classes is not None:
        size = settings.batch_size
        results["classification"] = classification.evaluate(model, data.x, data.labels, size)
    if isinstance(model, Classifier) and settings.radii:
        results["robustness"] = classification.robustness(
            model, data.x, data.labels, settings, seed
        )
    return results


def _samples(run: Run, model: Density, figures: Figures) -> Results:
    """Samples of a density, also class by class, and the calibration of a conditional one of
    vectors.
    """
    size, seed, spec = run.config.evaluation.batch_size, run.config.seed, model.spec
    are_images, test = len(spec.flow.event_shape) == 3, run.test_data()
    num = NUM_IMAGES if are_images else NUM_POINTS
    values, convergence = round_trips.draw(model, num, size, seed=seed, contexts=test.context)
    results: Results = {"samples": convergence}
    if are_images:
        figures["samples"] = {"Samples": plots.images(values, spec.num_levels)}
    else:
        beside = plots.pairs({"test data": test.x[:NUM_POINTS], "samples": values})
        figures["samples"] = {"Samples beside test data": beside}
    if spec.flow.event_shape == (2,) and test.context is None:
        drawn = plots.density_map(*log_density_on_grid(model, test.x[:NUM_POINTS]))
        figures["samples"]["Density"] = drawn
    if spec.num_classes is not None:
        of_rows = np.repeat(range(min(spec.num_classes, CLASSES_SHOWN)), plots.COLUMNS).tolist()
        values, results["samples_by_class"] = round_trips.draw(
            model, len(of_rows), size, seed=seed + 1, labels=of_rows
        )
        if are_images:
            drawn = plots.images(values, spec.num_levels)
            figures["samples_by_class"] = {"Samples, a class a row": drawn}
    if not are_images and test.context is not None and len(test.x) >= calibration.LEAST_EXAMPLES:
        results["calibration"] = found = calibration.calibrate_run(run)
        figures["calibration"] = {"Ranks of test examples": plots.rank_histograms(found)}
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
    points = np.asarray(model.spec.dequantizer.forward(jnp.asarray(points)), np.float64)
    margin = 0.05 * np.ptp(points, axis=0) + 1e-6
    low, high = points.min(axis=0) - margin, points.max(axis=0) + margin
    shares = (np.arange(side) + 0.5) / side
    grid = low + (high - low) * np.stack(np.meshgrid(shares, shares), axis=-1)
    exact = model.continuous.with_(estimator=ExactLogdet())
    log_density = jax.jit(lambda model, grid: jax.lax.map(model.log_prob, grid))(
        exact, np.float32(grid)
    )
    return np.asarray(log_density), (*np.stack([low, high]).T.ravel().tolist(),)


def _mistakes(run: Run, found: Classification) -> dict[str, "Figure"]:
    """Figures of the confusion of classes, and of images that were classified wrongly."""
    drawn = plots.confusion_matrix(np.array(found.confusion))
    figures = {"Classes and what they were taken for": drawn}
    examples = run.test_data().x
    if found.mistakes and examples.ndim == 4:
        chosen = examples[[mistake.index for mistake in found.mistakes]]
        captions = [f"{mistake.label} as {mistake.prediction}" for mistake in found.mistakes]
        drawn = plots.images(chosen, run.model.spec.num_levels, captions=captions)
        figures["First mistakes"] = drawn
    return figures


def _inverse(run: Run, figures: Figures) -> Results:
    """Round trips and Lipschitz constants."""
    model, certificate = run.model, run.model.certificate()
    # The solver of blocks that are no contractions runs to its cap.
    test = run.test_data(round_trips.NUM_EXAMPLES if certificate.max_block < 1 else 64)
    num, size = round_trips.affordable(model.spec.flow, CERTIFY_S), run.config.evaluation.batch_size
    originals, back, result = round_trips.reconstruct(
        model, test.x, size, run.config.seed, contexts=test.context, num_certified=num
    )
    if shown := plots.reconstructions(originals, back):
        figures["inverse"] = {"Test images and what came back": shown}
    of_noise = model.noise_certificate() if isinstance(model, Density) else None
    return {"inverse": result, "lipschitz": certificate, "noise_lipschitz": of_noise}


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
    page = files("iresnet_jax.evaluation").joinpath("page.html.jinja").read_text("utf-8")
    return environment.from_string(page).render(
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
