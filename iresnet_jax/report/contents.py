"""Contents of a report: the results of one run."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from iresnet_jax.evaluation.machine_and_versions import Environment
from iresnet_jax.evaluation.results import (
    Classification,
    InverseProblem,
    Inversion,
    Likelihood,
    Points,
    Posterior,
    SampleQuality,
    TrainingTimes,
    certificate_warnings,
)
from iresnet_jax.models.certificate import Certificate


@dataclass(frozen=True)
class Report:
    """Results of a run; None for what its kind of model does not have.

    Attributes:
        train: Training times.
        environment: What the results were computed with.
        config: Settings of the run.
        likelihood: Test likelihood of a density.
        points: Likelihood of each test point, of a density of vectors.
        posterior: Comparison of a conditional density with the true posterior, where that is known.
        classification: Test error of a model with classes.
        inverse_problem: Reconstructions from measurements, of a reconstructor.
        samples: Samples of a density.
        samples_by_class: Samples of each class, of a density with classes.
        inverse: Round trips of a model with an inverse.
        lipschitz: Lipschitz constants of a model with an inverse.
        notes: Sentences about the parameters, such as which checkpoint had to be used instead.
    """

    train: TrainingTimes
    environment: Environment
    config: Mapping[str, Any]
    likelihood: Likelihood | None = None
    points: Points | None = None
    posterior: Posterior | None = None
    classification: Classification | None = None
    inverse_problem: InverseProblem | None = None
    samples: SampleQuality | None = None
    samples_by_class: SampleQuality | None = None
    inverse: Inversion | None = None
    lipschitz: Certificate | None = None
    notes: tuple[str, ...] = ()

    @property
    def certified(self) -> bool:
        """Whether every block is certified a contraction."""
        return self.lipschitz is not None and self.lipschitz.certified

    def warnings(self) -> list[str]:
        """Sentences to read before any number."""
        promised = self.lipschitz is None or self.lipschitz.coeff is not None
        return [
            *self.notes,
            *(self.likelihood.warnings() if self.likelihood else ()),
            *(self.posterior.warnings() if self.posterior else ()),
            *(self.classification.warnings() if self.classification else ()),
            *(self.inverse_problem.warnings() if self.inverse_problem else ()),
            *(self.samples.warnings() if self.samples else ()),
            *(self.samples_by_class.warnings("samples by class") if self.samples_by_class else ()),
            *(self.inverse.warnings(promised=promised) if self.inverse else ()),
            *(certificate_warnings(self.lipschitz) if self.lipschitz else ()),
        ]

    def __str__(self) -> str:
        verdict = self.lipschitz and self.lipschitz.verdict
        headlines = [self.likelihood, self.posterior, self.classification, self.inverse_problem, self.inverse, verdict]
        said = "\n".join(str(headline) for headline in headlines if headline)
        return "\n".join([said, *(warning for warning in self.warnings() if warning not in said)])

    def to_json(self) -> dict[str, Any]:
        """Content of ``report.json``; numbers that are not finite become None."""
        facts = {name: value for name, value in asdict(self).items() if value is not None}
        del facts["notes"]
        if self.likelihood:
            facts[self.likelihood.key] = facts.pop("likelihood")
        if self.posterior:
            facts["posterior"]["mean_c2st"] = self.posterior.mean_c2st
        if self.lipschitz:
            facts["lipschitz"] |= {"certified": self.lipschitz.certified, "max_block": self.lipschitz.max_block}
        return _strict({**facts, "warnings": self.warnings()})


def _strict(value: Any) -> Any:
    """The same data with None for numbers that JSON does not have."""
    if isinstance(value, Mapping):
        return {name: _strict(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
