"""A density as a distribution of flowjax."""

from typing import Any

import equinox as eqx
import paramax
from flowjax.distributions import AbstractDistribution

from iresnet_jax.adapters.one_density import LogDensity, check_continuous
from iresnet_jax.models.density import Density


class DensityDistribution(AbstractDistribution):
    """A `Density` for flowjax, whose condition is the context, and whose weights its training does not change.

    Attributes:
        model: The density.
        shape: Shape of one example.
        cond_shape: Shape of a context; None without.

    Raises:
        ValueError: If it is no density of continuous data.
    """

    model: Any
    shape: tuple[int, ...] = eqx.field(static=True)
    cond_shape: tuple[int, ...] | None = eqx.field(static=True)

    def __init__(self, model: Density):
        check_continuous(model)
        spec = model.spec
        self.model = paramax.NonTrainable(model)
        self.shape = tuple(spec.flow.event_shape)
        self.cond_shape = (spec.context_dim,) if spec.context_dim else None

    def _given(self, condition: Any) -> LogDensity:
        return LogDensity.of(paramax.unwrap(self.model), condition)

    def _log_prob(self, x: Any, condition: Any = None) -> Any:
        return self._given(condition)(x)

    def _sample(self, key: Any, condition: Any = None) -> Any:
        return self._given(condition).sample(key)

    def _sample_and_log_prob(self, key: Any, condition: Any = None) -> Any:
        return self._given(condition).sample_and_log_prob(key)
