"""Contents of a report: the results of one run."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from iresnet_jax.evaluation.accuracy import Classification
from iresnet_jax.evaluation.calibration import Calibration
from iresnet_jax.evaluation.environment import Environment
from iresnet_jax.evaluation.inversion import Inversion
from iresnet_jax.evaluation.likelihood import Likelihood
from iresnet_jax.evaluation.points import Points
from iresnet_jax.evaluation.samples import SampleConvergence
from iresnet_jax.models.certificate import Certificate

ESTIMATE_RTOL = 1e-5  # rounding by which a norm's estimate may exceed its bound


@dataclass(frozen=True)
class TrainingTimes:
    """Wall-clock time of a training run; None where its metrics do not tell.

    Attributes:
        steps: Number of updates that led to the evaluated parameters.
        total_steps: Updates of the run so far.
        seconds_per_step: Median over the logged windows.
        compile_seconds: Start to end of the first step, of the last process.
        total_seconds: Start to last record.
        limit_seconds: What the run was allowed by ``config.training.minutes``; None without a limit.
    """

    steps: int
    total_steps: int
    seconds_per_step: float | None = None
    compile_seconds: float | None = None
    total_seconds: float | None = None
    limit_seconds: float | None = None

    @classmethod
    def from_metrics(cls, records: Iterable[Mapping[str, Any]], steps: int, minutes: float = 0.0) -> "TrainingTimes":
        """Times of a run from the records of its metrics and its time limit, 0 for none."""
        records = list(records)
        windows = [record["seconds_per_step"] for record in records if "seconds_per_step" in record]
        compiles = [record["compile_seconds"] for record in records if "compile_seconds" in record]
        return cls(
            steps=steps,
            total_steps=max((record["step"] for record in records), default=steps),
            seconds_per_step=float(np.median(windows)) if windows else None,
            compile_seconds=compiles[-1] if compiles else None,
            total_seconds=max((record["wall_time_s"] for record in records), default=None),
            limit_seconds=60 * minutes or None,
        )


@dataclass(frozen=True)
class Report:
    """Results of a run; None for what its kind of model does not have.

    Attributes:
        calibration: Ranks of test examples among samples given their contexts, of a conditional density of vectors.
        inverse: Round trips of a model with an inverse.
        lipschitz: Lipschitz constants of a model with an inverse.
        noise_lipschitz: Those of the flow that makes the noise of variational dequantisation.
        notes: Sentences about the parameters, such as which checkpoint had to be used instead.
    """

    train: TrainingTimes
    environment: Environment
    config: Mapping[str, Any]
    likelihood: Likelihood | None = None
    points: Points | None = None
    calibration: Calibration | None = None
    classification: Classification | None = None
    samples: SampleConvergence | None = None
    samples_by_class: SampleConvergence | None = None
    inverse: Inversion | None = None
    lipschitz: Certificate | None = None
    noise_lipschitz: Certificate | None = None
    notes: tuple[str, ...] = ()

    @property
    def certified(self) -> bool:
        """Whether every block is certified a contraction, by bounds that are guaranteed and not the user's word."""
        known = self.lipschitz
        return known is not None and known.certified and all(block.word == "certified" for block in known.blocks)

    def warnings(self) -> list[str]:
        """Sentences to read before any number."""
        found = list(self.notes)
        measured = [self.likelihood, self.calibration, self.classification, self.samples]
        for part in measured:
            found += part.warnings() if part else ()
        if self.samples_by_class:
            found += self.samples_by_class.warnings("samples by class")
        if self.inverse:
            found += self.inverse.warnings(promised=self.lipschitz is None or self.lipschitz.coeff is not None)
        certificates = (self.lipschitz, self.noise_lipschitz)
        return [*found, *(sentence for known in certificates if known for sentence in certificate_warnings(known))]

    def __str__(self) -> str:
        verdict = self.lipschitz and self.lipschitz.verdict
        calibration = self.calibration and self.calibration.headline
        headlines = [self.likelihood, calibration, self.classification, self.inverse, verdict]
        said = "\n".join(str(headline) for headline in headlines if headline)
        return "\n".join([said, *(warning for warning in self.warnings() if warning not in said)])

    def to_json(self) -> dict[str, Any]:
        """Content of ``report.json``; numbers that are not finite become None."""
        facts = {name: value for name, value in asdict(self).items() if value is not None and name != "notes"}
        if self.likelihood:
            facts[self.likelihood.key] = facts.pop("likelihood")
        if self.calibration:
            facts["calibration"] |= {"p_value": self.calibration.p_value, "calibrated": self.calibration.is_calibrated}
        for name, known in (("lipschitz", self.lipschitz), ("noise_lipschitz", self.noise_lipschitz)):
            if known:
                facts[name] |= {"certified": known.certified, "max_block": known.max_block}
        return _strict({**facts, "warnings": self.warnings()})


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


def _strict(value: Any) -> Any:
    """The same data with None for numbers that JSON does not have."""
    if isinstance(value, Mapping):
        return {name: _strict(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
