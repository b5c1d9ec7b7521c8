"""The settings of a log-determinant, and the estimator that they stand for."""

from dataclasses import dataclass
from typing import Any, Literal

from iresnet_jax.arguments import Count, CountOrNone, Positive
from iresnet_jax.maths.logdet_estimator import LogdetEstimator
from iresnet_jax.maths.logdet_exact import ExactLogdet
from iresnet_jax.maths.logdet_krylov import KrylovLogdet
from iresnet_jax.maths.logdet_series import RouletteLogdet, SeriesLogdet


@dataclass(frozen=True)
class LogdetConfig:
    """An estimator of log-determinants; each kind reads only the fields that name it."""

    # "series": the power series, truncated after num_terms. "roulette": a series without bias.
    # "krylov": Krylov subspaces, for blocks close to the limit of their constraint. "exact": the
    # whole Jacobian.
    kind: Literal["exact", "series", "roulette", "krylov"] = "series"
    num_terms: Count = 5  # terms of "series", Jacobian products of "krylov"
    num_probes: Count = 1  # probe vectors per example; all kinds but "exact"
    exact_trace: bool = True  # whether a closed form replaces the estimated trace: less noise
    distribution: Literal["poisson", "geometric"] = "poisson"  # random length of "roulette"
    parameter: Positive = 2.0  # mean of "poisson", or success probability of "geometric"
    num_exact_terms: CountOrNone = 2  # terms of "roulette" before its random ones

    def __post_init__(self):
        self.build()  # raises where a parameter does not suit its distribution

    def build(self, num_terms: int | None = None) -> LogdetEstimator:
        """The estimator; ``num_terms`` replaces the number in the settings."""
        count = num_terms or self.num_terms
        probes: dict[str, Any] = {"num_probes": self.num_probes, "exact_trace": self.exact_trace}
        if self.kind == "exact":
            return ExactLogdet()
        if self.kind == "roulette":
            return RouletteLogdet(self.distribution, self.parameter, self.num_exact_terms, **probes)
        kind = KrylovLogdet if self.kind == "krylov" else SeriesLogdet
        return kind(count, **probes)
