"""Densities of continuous data for other libraries: a log-density, which samplers take, and a distribution of NumPyro.

``model.continuous`` is the density of a model of integer levels or of values on a grid. Values are unknown when a function is
compiled, so one outside of the ranges of a bounded density is not refused: its log-density is minus infinity.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from iresnet_jax.bijections.bounded import Bounded
from iresnet_jax.maths.keys import typed_key
from iresnet_jax.models.density import Contexts, Density
from iresnet_jax.models.leading_axes import context_vectors

_log_prob = jax.jit(Density.log_prob)
_sample_and_log_prob = jax.jit(Density.sample_and_log_prob, static_argnames="num")


@functools.partial(jax.tree_util.register_dataclass, data_fields=["model", "context"], meta_fields=[])
@dataclass(frozen=True)
class LogDensity:
    """The log-density of examples, made by `log_density`: called, it takes one or any leading axes of them.

    Attributes:
        model: The density.
        context: Contexts, as vectors ``(..., k)``; None without.
    """

    model: Density
    context: Any = None

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """``log p(x)``, or ``log p(x | context)``."""
        x = jnp.asarray(x)
        x = x if jnp.issubdtype(x.dtype, jnp.floating) else x.astype(jnp.result_type(float))
        return _log_prob(self.model, x, context=self.context)

    @property
    def event_shape(self) -> tuple[int, ...]:
        """Shape of one example."""
        return tuple(self.model.spec.flow.event_shape)

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """Leading axes of the contexts."""
        return () if self.context is None else self.context.shape[:-1]

    def sample_and_log_prob(
        self, key: Any, sample_shape: tuple[int, ...] = ()
    ) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
        """Samples of shape ``(*sample_shape, *batch_shape, *event_shape)`` and their log-densities, by one inverse."""
        axes = (*sample_shape, *self.batch_shape)
        num, context = math.prod(axes), self.context
        if context is not None:
            context = jnp.broadcast_to(context, (*axes, context.shape[-1])).reshape(num, -1)
        x, log_prob = _sample_and_log_prob(self.model, typed_key(key), num, context=context)[:2]
        return x.reshape(*axes, *self.event_shape), log_prob.reshape(axes)


def log_density(model: Density, *, context: Contexts | None = None) -> LogDensity:
    """The log-density of one example, which BlackJAX and other samplers take; JAX differentiates it.

    Args:
        model: The density.
        context: Context of a conditional density ``(k,)``; with leading axes ``(..., k)``, those are the batch shape.

    Raises:
        ValueError: If it is no density of continuous data, or the context is not one that it takes.

    Example:
        >>> nuts = blackjax.nuts(ir.adapters.log_density(density), 0.1, jnp.ones(2))  # doctest: +SKIP
        >>> state = nuts.init(jnp.zeros(2))  # doctest: +SKIP
    """
    if not isinstance(model, Density):
        raise ValueError(f"a distribution can be made of a Density, got a {type(model).__name__}")
    if model.spec.num_levels is not None or model.spec.grid is not None:
        kind = "integer levels" if model.spec.num_levels is not None else "values on a grid"
        raise ValueError(f"this is a model of {kind}, which have probabilities and no density: give model.continuous")
    dim = model.spec.context_dim
    if context is None:
        if dim:
            raise ValueError(f"this density is conditional: give a context of shape (..., {dim})")
        return LogDensity(model)
    vectors = jnp.asarray(context_vectors(context, dim), jnp.result_type(float))
    if not dim or vectors.shape[-1:] != (dim,):
        wanted = f"a context of shape (..., {dim})" if dim else "no context"
        raise ValueError(f"this density takes {wanted}, got one of shape {jnp.shape(context)}")
    return LogDensity(model, vectors)


def to_numpyro(model: Density, *, context: Contexts | None = None) -> Any:
    """The density as a NumPyro distribution: a prior inside of a model, or the guide of a variational inference.

    It is a pytree with the model and its context as leaves. Samples are reparametrised and come with their log-density, which
    a guide does not compute again.

    Args:
        model: The density. In a guide that is trained, make it from parameters in every call of the guide.
        context: Context of a conditional density ``(..., k)``, whose leading axes are the batch shape.

    Raises:
        ImportError: If NumPyro is not installed.
        ValueError: If it is no density of continuous data, or the context is not one that it takes.

    Example:
        >>> def model():  # doctest: +SKIP
        ...     theta = numpyro.sample("theta", ir.adapters.to_numpyro(density))
        ...     numpyro.sample("x", dist.Normal(theta[0], 0.1), obs=0.3)
    """
    return _numpyro_class()(log_density(model, context=context))


@functools.cache
def _numpyro_class() -> Any:
    """The class of NumPyro's distributions, made here so that only `to_numpyro` imports NumPyro."""
    try:
        from numpyro.distributions import Distribution, constraints
        from numpyro.distributions.util import validate_sample
    except ImportError as error:
        raise ImportError(f"NumPyro cannot be imported ({error}): pip install 'iresnet_jax[numpyro]'") from error

    class DensityDistribution(Distribution):
        arg_constraints = {}  # noqa: RUF012 (as NumPyro has it): none of the parameters is a number, and all samples have gradients
        pytree_data_fields = ("log_density",)

        def __init__(self, log_density: LogDensity, *, validate_args: bool | None = None):
            self.log_density = log_density
            super().__init__(log_density.batch_shape, log_density.event_shape, validate_args=validate_args)

        @property
        def support(self) -> constraints.Constraint:
            """All real arrays, or vectors whose entries stay within their bounds."""
            transform = self.log_density.model.spec.transform
            if not isinstance(transform, Bounded):
                return constraints.independent(constraints.real, self.event_dim)
            entries = [
                constraints.real if ends is None else constraints.interval(ends.low, ends.high) for ends in transform.intervals
            ]
            return constraints.independent(constraints.cat(entries, dim=-1), 1)

        def sample(self, key: Any, sample_shape: tuple[int, ...] = ()) -> Any:
            return self.log_density.sample_and_log_prob(key, sample_shape)[0]

        def sample_with_intermediates(self, key: Any, sample_shape: tuple[int, ...] = ()) -> tuple[Any, list[Any]]:
            """Samples, and their log-densities as what `log_prob` need not compute."""
            x, log_prob = self.log_density.sample_and_log_prob(key, sample_shape)
            return x, [log_prob]

        @validate_sample
        def log_prob(self, value: Any, intermediates: list[Any] | None = None) -> Any:
            return intermediates[0] if intermediates else self.log_density(value)

    return DensityDistribution
