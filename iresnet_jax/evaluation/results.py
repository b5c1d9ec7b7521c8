"""Results of evaluations as values, from which ``report.json`` and the page of a report are written.

``str`` of a result is what a command prints. ``warnings`` are sentences about numbers that contradict each other or break a
promise.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from iresnet_jax.models.certificate import Certificate

SUSPICIOUS_Z = 4.0  # one in 16,000 unbiased estimates differs from the exact value by more standard errors
FLOOR_Z = 3.0  # standard errors below the entropy of the data from which a likelihood is too good to be true
ESTIMATE_RTOL = 1e-5  # rounding by which a norm's estimate may exceed its bound
RECOVERED = 1e-4  # largest entry of an error up to which an example counts as recovered, whatever was promised


@dataclass(frozen=True)
class MeanAndError:
    """A mean over examples and its standard error, in parts whose squares add up.

    Attributes:
        mean: Mean over examples, noise and probes.
        stderr: Standard error of the mean, all parts together.
        stderr_data: Part due to the choice of test examples; more examples shrink it.
        stderr_probes: Part due to probes and series lengths; more draws or probes shrink it. None after a single draw, whose
            effect the other parts contain.
        stderr_dequantisation: Part due to the noise; more dequantisations shrink it. None after a single dequantisation, whose
            effect ``stderr_data`` contains.
    """

    mean: float
    stderr: float
    stderr_data: float
    stderr_probes: float | None
    stderr_dequantisation: float | None


@dataclass(frozen=True)
class Estimate:
    """Estimated log-determinants beside exact ones, on the same examples with the noise of the first dequantisation.

    Attributes:
        estimator: Estimator in words.
        unbiased: Whether ``difference`` is 0 in expectation.
        mean: Mean objective by the estimate.
        difference: Mean of estimate less exact value.
        z: ``difference`` in its standard errors.
    """

    estimator: str
    unbiased: bool
    mean: float
    difference: float
    z: float


@dataclass(frozen=True)
class Accuracy:
    """Error of examples' log-likelihoods that comes from their log-determinants, root mean square over examples.

    Attributes:
        target: Largest ``bias + stderr`` that was asked for, in ``unit``.
        bias: Estimate of how far the expectation over probes is off, from how Krylov subspaces of increasing dimension converge
            for the same probes; 0 if exact.
        stderr: Standard error over probes, of the mean over noise draws; 0 if exact.
        bias_bound: Guaranteed bound of the bias if the Lipschitz constants are guaranteed; often far above it.
        products: Operations of an example for each noise draw, in those of a product with a block's Jacobian, summed over
            blocks.
        plan: What every stage does, in words.
        unit: "bits/dim" or "nats".
    """

    target: float
    bias: float
    stderr: float
    bias_bound: float
    products: float
    plan: tuple[str, ...]
    unit: str

    @property
    def met(self) -> bool:
        """Whether the target was met."""
        return self.bias + self.stderr <= self.target

    def __str__(self) -> str:
        found = f"bias about {self.bias:.1g} (at most {self.bias_bound:.1g}) + stderr {self.stderr:.1g} {self.unit}"
        verdict = f"{'within' if self.met else 'NOT within'} {self.target:g}"
        return (
            f"log-determinants of an example: {found}, {verdict}; as dear as {self.products:,.0f} products with Jacobians "
            f"({'; '.join(self.plan)})"
        )


@dataclass(frozen=True)
class Likelihood(MeanAndError):
    """Negative log-likelihood of test data; lower is better.

    Attributes:
        unit: "bits/dim" for images, "nats" for points.
        estimator: Log-determinant behind ``mean`` in words, "exact log-determinant" where that is affordable.
        unbiased: Whether ``mean`` has no truncation bias.
        truncation_bound: Bound of what the terms that are always computed can miss, mean over examples; 0 if exact.
        num_examples: Test examples.
        num_dequantisations: Noise draws of each example; 0 for points.
        num_probes: Probe draws of each noise draw.
        estimate: Estimate that checks an exact ``mean``; None without one.
        entropy_floor: Entropy of the data in nats, if known.
        num_dims: Entries of an example; None if not known.
        accuracy: How a stated accuracy of the log-determinants was met; None if none was stated.
    """

    unit: str
    estimator: str
    unbiased: bool
    truncation_bound: float
    num_examples: int
    num_dequantisations: int
    num_probes: int
    estimate: Estimate | None = None
    entropy_floor: float | None = None
    num_dims: int | None = None
    accuracy: Accuracy | None = None

    @property
    def key(self) -> str:
        """Name in ``report.json``."""
        return "nll" if self.unit == "nats" else "bits_per_dim"

    def __str__(self) -> str:
        parts = {"test examples": self.stderr_data, "probes": self.stderr_probes, "dequantisation": self.stderr_dequantisation}
        split = ", ".join(f"{name} {stderr:.2g}" for name, stderr in parts.items() if stderr)
        lines = [f"test: {self.mean:.4f} ± {self.stderr:.4f} {self.unit} ({split}; {self.estimator})"]
        if self.unit == "nats" and self.num_dims:
            lines.append(f"a dimension: {self.mean / self.num_dims:.4f} ± {self.stderr / self.num_dims:.4f} nats")
        if self.entropy_floor is not None:
            lines.append(f"entropy of the data, below which no model can go: {self.entropy_floor:.4f} nats")
        if self.accuracy:
            lines.append(str(self.accuracy))
        elif self.truncation_bound:
            lines.append(f"terms beyond those always computed change it by at most {self.truncation_bound:.2g} {self.unit}")
        if self.estimate:
            lines.append(
                f"check: {self.estimate.mean:.4f} {self.unit} on the first noise by an estimate ({self.estimate.estimator}), "
                f"z = {self.estimate.z:+.2f} from the exact value"
            )
        return "\n".join([*lines, *self.warnings()])

    def warnings(self) -> list[str]:
        """Sentences about a likelihood that is not finite, too good to be true, or off its check."""
        found = []
        if not math.isfinite(self.mean):
            found.append("The likelihood is not finite.")
        if self.accuracy and not self.accuracy.met:
            found.append(
                f"The log-determinants missed their target_stderr: bias about {self.accuracy.bias:.1g} and standard error "
                f"{self.accuracy.stderr:.1g} instead of {self.accuracy.target:g} {self.unit} together."
            )
        if self.estimate and self.estimate.unbiased and not abs(self.estimate.z) <= SUSPICIOUS_Z:
            found.append(
                f"The estimated likelihood is {abs(self.estimate.z):.1f} standard errors away from the exact one: one of them "
                "is wrong."
            )
        if self.entropy_floor is not None and self.mean < self.entropy_floor - FLOOR_Z * self.stderr:
            below = (self.entropy_floor - self.mean) / max(self.stderr, 1e-12)
            found.append(f"The likelihood is better than the entropy of the data allows, by {below:.1f} standard errors.")
        return found


@dataclass(frozen=True)
class Entry:
    """An entry of a vector: its number, its value, and its distance from the mean of all vectors in standard deviations."""

    index: int
    value: float
    deviations: float


@dataclass(frozen=True)
class Unlikely:
    """A test point with a low likelihood: its row in the test split, log p in nats, and the entries that are furthest out."""

    row: int
    log_prob: float
    entries: tuple[Entry, ...]


@dataclass(frozen=True)
class Points:
    """Likelihood of each test point.

    Attributes:
        file: Name of the ``.npy`` file in the folder of the run with log p of all test points in the order of their rows.
        least_likely: The least likely of them, from the first.
    """

    file: str
    least_likely: tuple[Unlikely, ...]


@dataclass(frozen=True)
class Posterior:
    """A conditional density beside the true posterior.

    Attributes:
        divergence: Expected Kullback-Leibler divergence of the truth from the model in nats, mean over test pairs.
        stderr: Standard error of ``divergence``.
        num_examples: Test pairs.
        c2st: Accuracy of a classifier that tells samples of the model from true ones, for each of a few test contexts.
        num_samples: Samples of the model, and of the truth, for each of these contexts.
    """

    divergence: float
    stderr: float
    num_examples: int
    c2st: tuple[float, ...]
    num_samples: int

    @property
    def mean_c2st(self) -> float | None:
        """Mean accuracy over the contexts; .5 says that the classifier cannot tell. None without contexts."""
        return float(np.mean(self.c2st)) if self.c2st else None

    def __str__(self) -> str:
        lines = [f"true posterior: the model diverges by {self.divergence:.4f} ± {self.stderr:.4f} nats"]
        if self.mean_c2st is not None:
            lines.append(
                f"C2ST {self.mean_c2st:.3f} (.5 is indistinguishable; {self.num_samples} samples each for {len(self.c2st)} "
                f"contexts, {min(self.c2st):.3f} to {max(self.c2st):.3f})"
            )
        return "\n".join([*lines, *self.warnings()])

    def warnings(self) -> list[str]:
        """Sentences about a model that is better than the truth, or whose numbers are not finite."""
        found = []
        if not math.isfinite(self.divergence):
            found.append("The divergence from the true posterior is not finite.")
        elif self.divergence < -FLOOR_Z * self.stderr:
            below = -self.divergence / max(self.stderr, 1e-12)
            found.append(f"The model is more likely than the true posterior, by {below:.1f} standard errors.")
        if not all(map(math.isfinite, self.c2st)):
            found.append("C2ST is not a number: some samples of the model are not finite.")
        return found


@dataclass(frozen=True)
class InverseProblem:
    """Reconstructions of test images from measurements, and what perturbed measurements do to them.

    Attributes:
        relative_error: ``|P(F^-1(y)) - x| / |x|``, mean over test images.
        stderr: Standard error of ``relative_error``.
        psnr: Peak signal-to-noise ratio in dB, mean over test images.
        num_examples: Test images.
        certified_amplification: Guaranteed bound of ``|F^-1(y + d) - F^-1(y)| / |d|``: 1 / (1 - L). Of a network without a
            constraint the product of its blocks' bounds, often useless.
        largest_amplification: Largest such ratio of all perturbations.
        largest_amplification_of_noise: Largest such ratio for random noise.
        num_perturbed: Measurements that were perturbed.
        fraction_within_bound: Fraction of test images and perturbed measurements whose error was within its certified bound.
        fraction_converged: Fraction of test images whose inverse met its tolerance.
        width: Standard deviation of the blur in pixels.
        noise: Standard deviation of the noise, as a fraction of the range from black to white.
    """

    relative_error: float
    stderr: float
    psnr: float
    num_examples: int
    certified_amplification: float
    largest_amplification: float
    largest_amplification_of_noise: float
    num_perturbed: int
    fraction_within_bound: float
    fraction_converged: float
    width: float
    noise: float

    def __str__(self) -> str:
        return (
            f"reconstruction: relative error {self.relative_error:.4f} ± {self.stderr:.4f}, {self.psnr:.2f} dB, of "
            f"{self.num_examples} test images (blur of {self.width:g} pixels, {100 * self.noise:g} % noise)\n"
            f"amplification of perturbations: certified {self.certified_amplification:.4g} at most; found "
            f"{self.largest_amplification:.4g} in the worst directions of {self.num_perturbed} measurements, "
            f"{self.largest_amplification_of_noise:.4g} for noise"
        )

    def warnings(self) -> list[str]:
        """Sentences about errors beyond their bounds and images whose inverse did not converge."""
        found = []
        if (outside := 1 - self.fraction_within_bound) > 0:
            found.append(
                f"{100 * outside:.3g} % of the reconstructions exceed their certified bound: a constant is underestimated."
            )
        if self.fraction_converged < 1:
            percent = 100 * (1 - self.fraction_converged)
            found.append(f"The inverse did not converge for {percent:.3g} % of the measurements: allow more evaluations.")
        return found


@dataclass(frozen=True)
class Mistake:
    """A test image that was classified wrongly, with its place in the test split and the probability of the wrong class."""

    index: int
    label: int
    prediction: int
    probability: float


@dataclass(frozen=True)
class Classification:
    """Top-1 error on test images.

    Attributes:
        error: Fraction of images that were classified wrongly.
        interval: Wilson interval of ``error``, low and high.
        confidence: Probability that the interval covers the true error.
        num_errors: Images that were classified wrongly.
        num_examples: Test images.
        loss: Mean cross-entropy in nats, without label smoothing.
        confusion: Numbers of images by class (row) and predicted class (column).
        mistakes: First mistakes.
    """

    error: float
    interval: tuple[float, float]
    confidence: float
    num_errors: int
    num_examples: int
    loss: float
    confusion: tuple[tuple[int, ...], ...]
    mistakes: tuple[Mistake, ...]

    def __str__(self) -> str:
        low, high = self.interval
        line = (
            f"test error: {100 * self.error:.2f} % ({self.num_errors} of {self.num_examples} images; "
            f"{100 * self.confidence:.0f} % interval {100 * low:.2f} to {100 * high:.2f} %), cross-entropy {self.loss:.4f} nats"
        )
        return "\n".join([line, *self.warnings()])

    def warnings(self) -> list[str]:
        """A sentence about logits that are not finite."""
        return [] if math.isfinite(self.loss) else ["The cross-entropy is not finite: the test error means nothing."]


@dataclass(frozen=True)
class InverseGuarantee:
    """Guaranteed errors of computed inverses of the whole flow, rounding included, see `models.certified_inverse`.

    Attributes:
        num_examples: Examples that were certified, the first ones.
        num_applied: Those to whose whole trajectory the theorem applied; the blocks' bounds multiply for the others.
        median_bound: Median of the Euclidean bounds, in the units of the flow's input; infinite if nothing was certified.
        max_bound: Largest of them.
        median_data_bound: Median of the bounds in the units of continuous data, or of images on the scale of [0, 1].
        max_data_bound: Largest of them.
        fraction_certain: Fraction of entries whose level, or value on a grid, is guaranteed; None for continuous data.
        median_beta: Median of ``beta``, the bound of how far residuals of the trajectory's equations reach.
        K: Lipschitz constant of the equations' derivative.
        max_h: Largest ``h = beta K eta``.
        reason: Why the theorem did not apply, or nothing was certified; empty if it applied to all.
    """

    num_examples: int = 0
    num_applied: int = 0
    median_bound: float = math.inf
    max_bound: float = math.inf
    median_data_bound: float = math.inf
    max_data_bound: float = math.inf
    fraction_certain: float | None = None
    median_beta: float = math.inf
    K: float = math.inf
    max_h: float = math.inf
    reason: str = ""

    def __str__(self) -> str:
        if not self.num_examples:
            return f"guaranteed error of the inverse: none, {self.reason}"
        how = "by the theorem for the whole flow" if self.num_applied else "by the bounds of the blocks, which multiply"
        how += f" for {self.num_applied}" if 0 < self.num_applied < self.num_examples else ""
        how += f" ({self.reason})" if self.reason else ""
        certain = "" if self.fraction_certain is None else f"; {100 * self.fraction_certain:.4g} % of the levels are certain"
        return (
            f"guaranteed error of the inverse, Euclidean: at most {self.max_bound:.2g} in the flow's units and "
            f"{self.max_data_bound:.2g} in the data's (medians {self.median_bound:.2g} and {self.median_data_bound:.2g}), of "
            f"{self.num_examples} examples {how}{certain}"
        )


@dataclass(frozen=True)
class SampleQuality:
    """How the inverse ended for a number of samples.

    Attributes:
        num: Samples.
        fraction_converged: Fraction whose inverse met its tolerance.
        max_error_bound: Largest product of the blocks' error bounds, Euclidean, in the units of continuous data.
        failed: Numbers of the samples that did not converge.
        guarantee: Guaranteed errors of the first samples; None if that was not asked for.
    """

    num: int
    fraction_converged: float
    max_error_bound: float
    failed: tuple[int, ...] = ()
    guarantee: InverseGuarantee | None = None

    def __str__(self) -> str:
        line = f"samples: the inverse converged for {self.num - len(self.failed)} of {self.num}"
        return "\n".join([line, *([str(self.guarantee)] if self.guarantee else []), *self.warnings()])

    def warnings(self, name: str = "samples") -> list[str]:
        """A sentence that numbers the samples whose inverse did not converge."""
        if not self.failed:
            return []
        named = ", ".join(map(str, self.failed[:10])) + (", ..." if len(self.failed) > 10 else "")
        return [f"The inverse did not converge for {len(self.failed)} of {self.num} {name}, numbers {named}."]


@dataclass(frozen=True)
class RoundTrips:
    """Errors of examples that were encoded and inverted.

    Attributes:
        max_abs_error: Largest entry of any error, in the units of the flow's input.
        max_euclidean_error: Largest Euclidean norm of an example's error.
        max_error_bound: Largest bound of a Euclidean error that multiplies the bounds of the blocks: vacuous for deep flows.
        fraction_within_bound: Fraction of examples whose Euclidean error is within its bound.
        fraction_converged: Fraction of examples whose inverse met its tolerance.
        fraction_recovered: Fraction of examples with no entry off by more than 1e-4, whatever was promised.
        mean_evals: Evaluations of the branch, mean over blocks and examples.
    """

    max_abs_error: float
    max_euclidean_error: float
    max_error_bound: float
    fraction_within_bound: float
    fraction_converged: float
    fraction_recovered: float
    mean_evals: float


@dataclass(frozen=True)
class Inversion(RoundTrips):
    """Round trips in the precision of training, and in float64.

    Attributes:
        num_examples: Test examples.
        refined: Round trips in float64 of the first test examples.
        max_grey_level_error: Largest error of a pixel in grey levels; None for points.
        max_padding_residual: Largest Euclidean norm of what should be zero padding; None without padding.
        guarantee: Guaranteed errors of the first examples, in the precision of training; None if that was not asked for.
    """

    num_examples: int
    refined: RoundTrips
    max_grey_level_error: float | None = None
    max_padding_residual: float | None = None
    guarantee: InverseGuarantee | None = None

    def __str__(self) -> str:
        converged, recovered = (round(f * self.num_examples) for f in (self.fraction_converged, self.fraction_recovered))
        grey = "" if self.max_grey_level_error is None else f" ({self.max_grey_level_error:.2g} grey levels)"
        verdict = "inverted" if converged == self.num_examples else "NOT INVERTED"
        by_luck = "" if converged == recovered else f"; {recovered} came back to {RECOVERED:g}"
        line = (
            f"inverse: {verdict}; {converged} of {self.num_examples} test examples converged, largest error "
            f"{self.max_abs_error:.2g}{grey}, Euclidean {self.max_euclidean_error:.2g}, in float64 "
            f"{self.refined.max_euclidean_error:.2g}, {self.mean_evals:.1f} evaluations a block{by_luck}"
        )
        return f"{line}\n{self.guarantee}" if self.guarantee else line

    def warnings(self, *, promised: bool = True) -> list[str]:
        """Sentences about errors beyond their bounds and, where an inverse is promised, examples that did not converge."""
        wrong = "a Lipschitz constant or the rounding is underestimated."
        found = []
        if not self.max_abs_error <= self.max_error_bound:
            found.append(f"The largest inversion error exceeds its bound: {wrong}")
        for precision, trips in (("the precision of training", self), ("float64", self.refined)):
            if (outside := 1 - trips.fraction_within_bound) > 0:
                found.append(f"{100 * outside:.3g} % of the inversion errors in {precision} exceed their bound: {wrong}")
        if promised and self.fraction_converged < 1:
            percent = 100 * (1 - self.fraction_converged)
            found.append(f"The inverse did not converge for {percent:.3g} % of the examples: allow more evaluations.")
        return found


def certificate_warnings(certificate: Certificate) -> list[str]:
    """Sentences about blocks that are not certified contractions, and about estimates above their certified bound."""
    blocks = certificate.blocks
    if certificate.coeff is None:
        loose = sum(not block.bound < 1 for block in blocks)
        return [
            f"This network has no Lipschitz constraint: {loose} of its {len(blocks)} blocks are not certified contractions, so "
            "no inverse is promised."
        ]
    found = []
    for block in blocks:
        if not block.estimate < 1:
            found.append(f"{block.name}: Lipschitz estimate {block.estimate:.4g} is not below 1, the inverse may not exist.")
        elif not block.bound < 1:
            found.append(f"{block.name}: certified bound {block.bound:.4g} is not below 1, invertibility is not proven.")
        if block.estimate > block.bound * (1 + ESTIMATE_RTOL):
            found.append(f"{block.name}: the estimate {block.estimate:.4g} exceeds the certified bound {block.bound:.4g}.")
    return found


@dataclass(frozen=True)
class Score:
    """Area under the ROC curve of a score, and the score's definition: areas of different scores do not compare."""

    auroc: float
    definition: str


@dataclass(frozen=True)
class Separation:
    """How well scores tell other images from test images.

    Attributes:
        other: "rotated", "noise" or the name of a data set.
        num_inside: Test images.
        num_outside: Other images.
        scores: Scores by name.
    """

    other: str
    num_inside: int
    num_outside: int
    scores: Mapping[str, Score]

    def __str__(self) -> str:
        lines = [f"{self.num_inside} test images against {self.num_outside} others ({self.other}):"]
        lines += [f"  AUROC {score.auroc:.4f}  {name}: {score.definition}" for name, score in self.scores.items()]
        return "\n".join(lines)


@dataclass(frozen=True)
class RobustnessAt:
    """How a classifier holds against perturbations of one norm.

    Attributes:
        radius: Largest norm of a perturbation, of pixels on the scale of [0, 1].
        verified: Fraction of images that are classified rightly whatever the perturbation, guaranteed.
        interval: Wilson interval of ``verified``, low and high.
        attacked: Fraction of images that are classified rightly and whose class no attack changed: an upper bound.
        num_broken: Images with a certified radius of that size whose class the attack changed: 0, or a certificate is wrong.
    """

    radius: float
    verified: float
    interval: tuple[float, float]
    attacked: float
    num_broken: int


@dataclass(frozen=True)
class Robustness:
    """Verified accuracy and accuracy under attack against the radius.

    Attributes:
        num_examples: Test images.
        accuracy: Fraction that is classified rightly.
        at: Results by radius.
        median_radius: Median of the certified radii.
        median_global_radius: Median of those that the Lipschitz constant of the whole network gives.
        confidence: Probability that an interval covers the true accuracy.
    """

    num_examples: int
    accuracy: float
    at: tuple[RobustnessAt, ...]
    median_radius: float
    median_global_radius: float
    confidence: float

    @property
    def num_broken(self) -> int:
        """Certificates that the attack broke, at any radius."""
        return sum(row.num_broken for row in self.at)

    def __str__(self) -> str:
        lines = [
            f"{self.num_examples} test images, {100 * self.accuracy:.1f} % right; median certified radius "
            f"{self.median_radius:.2g}, by the Lipschitz constant alone {self.median_global_radius:.2g}",
            f"    radius  verified [%]  ({100 * self.confidence:.0f} % interval)  under attack [%]",
        ]
        for row in self.at:
            interval = "({:.1f} to {:.1f})".format(*(100 * value for value in row.interval))
            lines.append(f"{row.radius:10g}  {100 * row.verified:12.1f}  {interval:>16}  {100 * row.attacked:16.1f}")
        if self.num_broken:
            lines.append(f"{self.num_broken} certificates were broken by the attack: please report it")
        return "\n".join(lines)


@dataclass(frozen=True)
class TrainingTimes:
    """Wall-clock time of a training run; None where its metrics do not tell.

    Attributes:
        steps: Updates behind the evaluated parameters.
        total_steps: Updates of the run so far.
        seconds_per_step: Median over the logged windows.
        compile_seconds: Start to end of the first step, of the last process.
        total_seconds: Start to last record.
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
