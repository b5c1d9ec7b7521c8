"""A density as a distribution of NumPyro."""

from typing import Any

from numpyro.distributions import Distribution, constraints
from numpyro.distributions.util import validate_sample

from iresnet_jax.adapters.one_density import LogDensity
from iresnet_jax.bijections.transforms.bounded import Bounded
from iresnet_jax.models.density import Contexts, Density


class DensityDistribution(Distribution):
    """A `Density` for NumPyro, with reparametrised samples; a pytree with the model and its context as leaves.

    A sample comes with its log-density, which a guide does not compute again.

    Args:
        model: The density.
        context: Context of a conditional density ``(..., k)``, whose leading axes are the batch shape.
        validate_args: Whether values are compared to the support, see NumPyro.

    Raises:
        ValueError: If it is no density of continuous data, or the context is not what it takes.
    """

    arg_constraints = {}  # noqa: RUF012 (as NumPyro has it): none of the parameters is a number, and all samples have gradients
    pytree_data_fields = ("log_density",)

    def __init__(self, model: Density, context: Contexts | None = None, *, validate_args: bool | None = None):
        self.log_density = LogDensity.of(model, context)
        shapes = self.log_density.batch_shape, self.log_density.event_shape
        super().__init__(*shapes, validate_args=validate_args)

    @property
    def support(self) -> constraints.Constraint:
        """All real arrays, or vectors whose entries stay within their bounds."""
        transform = self.log_density.model.spec.transform
        if not isinstance(transform, Bounded):
            return constraints.independent(constraints.real, self.event_dim)
        of_entries = [
            constraints.real if ends is None else constraints.interval(ends.low, ends.high) for ends in transform.intervals
        ]
        return constraints.independent(constraints.cat(of_entries, dim=-1), 1)

    def sample(self, key: Any, sample_shape: tuple[int, ...] = ()) -> Any:
        """Samples of shape ``sample_shape + batch_shape + event_shape``."""
        return self.log_density.sample(key, sample_shape)

    def sample_with_intermediates(self, key: Any, sample_shape: tuple[int, ...] = ()) -> tuple[Any, list[Any]]:
        """Samples, and their log-densities as what `log_prob` need not compute."""
        x, log_prob = self.log_density.sample_and_log_prob(key, sample_shape)
        return x, [log_prob]

    @validate_sample
    def log_prob(self, value: Any, intermediates: list[Any] | None = None) -> Any:
        """Log-density, with the leading axes of the values and of the contexts."""
        return intermediates[0] if intermediates else self.log_density(value)
