"""A density as a distribution of distrax."""

from typing import Any

import distrax

from iresnet_jax.adapters.one_density import LogDensity
from iresnet_jax.models.density import Contexts, Density


class DensityDistribution(distrax.Distribution):
    """A `Density` for distrax; a pytree with the model and its context as leaves.

    Args:
        model: The density.
        context: Context of a conditional density ``(..., k)``, whose leading axes are the batch shape.

    Raises:
        ValueError: If it is no density of continuous data, or the context is not what it takes.
    """

    def __init__(self, model: Density, context: Contexts | None = None):
        self.log_density = LogDensity.of(model, context)

    def log_prob(self, value: Any) -> Any:
        """Log-density, with the leading axes of the values and of the contexts."""
        return self.log_density(value)

    @property
    def event_shape(self) -> tuple[int, ...]:
        """Shape of one example."""
        return self.log_density.event_shape

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """Leading axes of the contexts."""
        return self.log_density.batch_shape

    def _sample_n(self, key: Any, n: int) -> Any:
        return self.log_density.sample(key, (n,))

    def _sample_n_and_log_prob(self, key: Any, n: int) -> Any:
        return self.log_density.sample_and_log_prob(key, (n,))
