"""Densities of continuous data as distributions of NumPyro, of ``pip install
'iresnet_jax[numpyro]'``.

Other samplers, such as BlackJAX's, take ``model.log_prob``. ``model.continuous`` is the density of
a model of integer levels or of values that own cells. Values are unknown while a function is
compiled, so values outside of a bounded density's ranges are no error: their log-density is minus
infinity.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.distributions import Distribution, constraints
from numpyro.distributions.util import validate_sample

from iresnet_jax.bijections.bounded import Bounded
from iresnet_jax.maths.keys import typed_key
from iresnet_jax.models.contexts import Contexts, as_vectors
from iresnet_jax.models.density import Density

_log_prob = jax.jit(Density.log_prob)
_sample_and_log_prob = jax.jit(Density.sample_and_log_prob, static_argnames="num")


def to_numpyro(model: Density, *, context: Contexts | None = None) -> "DensityDistribution":
    """The density as a NumPyro distribution: a prior inside of a model, or the guide of a
    variational inference.

    It is a pytree with the model and its context as leaves. Samples are reparametrised and come
    with their log-density, which a guide does not compute again.

    Args:
        model: The density. In a guide that is trained, make it from parameters in every call of the
            guide.
        context: Context of a conditional density ``(..., k)``, whose leading axes are the batch
            shape.

    Example:
        >>> def model():  # doctest: +SKIP
        ...     theta = numpyro.sample("theta", ir.adapters.to_numpyro(density))
        ...     numpyro.sample("x", dist.Normal(theta[0], 0.1), obs=0.3)
    """
    model.spec.check_continuous()
    if context is not None:
        context = as_vectors(model.spec.context_numbers(context), model.spec.context_dim)
        context = jnp.asarray(context, jnp.result_type(float))
    return DensityDistribution(model, context)


class DensityDistribution(Distribution):
    """A density given a context, or none, as a distribution."""

    arg_constraints = {}  # noqa: RUF012 (as NumPyro has it): none of the parameters is a number, and all samples have gradients
    pytree_data_fields = ("model", "context")

    def __init__(self, model: Density, context: jax.Array | None):
        self.model, self.context = model, context
        batch_shape = () if context is None else context.shape[:-1]
        super().__init__(batch_shape, tuple(model.spec.flow.event_shape))

    @property
    def support(self) -> constraints.Constraint:
        """All real arrays, or vectors whose entries stay within their bounds."""
        transform = self.model.spec.transform
        if not isinstance(transform, Bounded) or not (
            np.isfinite(transform.low).any() or np.isfinite(transform.high).any()
        ):
            if self.event_dim == 1:
                # Mixtures compare the types of their components' supports.
                return constraints.real_vector
            return constraints.independent(constraints.real, self.event_dim)
        entries = []
        for low, high in zip(transform.low.tolist(), transform.high.tolist(), strict=True):
            if math.isfinite(high - low):
                entries.append(constraints.interval(low, high))
            elif math.isfinite(low):
                entries.append(constraints.greater_than(low))
            elif math.isfinite(high):
                entries.append(constraints.less_than(high))
            else:
                entries.append(constraints.real)
        return constraints.independent(constraints.cat(entries, dim=-1), 1)

    def sample(self, key: Any, sample_shape: tuple[int, ...] = ()) -> Any:
        """Samples of the model."""
        return self.sample_with_intermediates(key, sample_shape)[0]

    def sample_with_intermediates(
        self, key: Any, sample_shape: tuple[int, ...] = ()
    ) -> tuple[Any, list[Any]]:
        """Samples, and their log-densities, which `log_prob` then need not compute."""
        axes, context = (*sample_shape, *self.batch_shape), self.context
        num = math.prod(axes)
        if context is not None:
            context = jnp.broadcast_to(context, (*axes, context.shape[-1])).reshape(num, -1)
        x, log_prob = _sample_and_log_prob(self.model, typed_key(key), num, context=context)[:2]
        return x.reshape(*axes, *self.event_shape), [log_prob.reshape(axes)]

    @validate_sample
    def log_prob(self, value: Any, intermediates: list[Any] | None = None) -> Any:
        """Log-density, or the one that came with samples."""
        if intermediates:
            return intermediates[0]
        return _log_prob(self.model, value, context=self.context)
