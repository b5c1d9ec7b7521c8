"""What all adapters are made of: a continuous density under its contexts, with values and samples of any leading axes.

Functions are compiled, once for all models of one architecture. Values are unknown to them, so one outside of the ranges of a
bounded density has the log-density minus infinity, as other libraries have it, and is not refused.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from iresnet_jax.maths.keys import typed_key
from iresnet_jax.models.density import Contexts, Density
from iresnet_jax.models.leading_axes import context_vectors

_log_prob = jax.jit(Density.log_prob)
_sample = jax.jit(Density.sample, static_argnames="num")
_sample_and_log_prob = jax.jit(Density.sample_and_log_prob, static_argnames="num")


@functools.partial(jax.tree_util.register_dataclass, data_fields=["model", "context"], meta_fields=[])
@dataclass(frozen=True)
class LogDensity:
    """The log-density of examples: called, it takes one or any leading axes of them.

    Attributes:
        model: The density.
        context: Contexts, as vectors ``(..., k)``; None without.
    """

    model: Density
    context: Any = None

    @classmethod
    def of(cls, model: Density, context: Contexts | None = None) -> "LogDensity":
        """The log-density of a model under contexts.

        Raises:
            ValueError: If it is no density of continuous data, or the contexts are not what it takes.
        """
        check_continuous(model)
        dim = model.spec.context_dim
        if context is None:
            if dim:
                raise ValueError(f"this density is conditional: give a context of shape (..., {dim})")
            return cls(model)
        vectors = jnp.asarray(context_vectors(context, dim), jnp.result_type(float))
        if not dim or vectors.shape[-1:] != (dim,):
            wanted = f"a context of shape (..., {dim})" if dim else "no context"
            raise ValueError(f"this density takes {wanted}, got one of shape {jnp.shape(context)}")
        return cls(model, vectors)

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

    def sample(self, key: Any, sample_shape: tuple[int, ...] = ()) -> Float[Array, "..."]:
        """Samples of shape ``(*sample_shape, *batch_shape, *event_shape)``."""
        return self._drawn(_sample, key, sample_shape)[0]

    def sample_and_log_prob(
        self, key: Any, sample_shape: tuple[int, ...] = ()
    ) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
        """Samples and their log-densities, by one pass through the inverse."""
        return self._drawn(_sample_and_log_prob, key, sample_shape)[:2]

    def _drawn(self, draw: Any, key: Any, sample_shape: tuple[int, ...]) -> Any:
        axes = (*sample_shape, *self.batch_shape)
        num, context = math.prod(axes), self.context
        if context is not None:
            context = jnp.broadcast_to(context, (*axes, context.shape[-1])).reshape(num, -1)
        drawn = draw(self.model, typed_key(key), num, context=context)
        return jax.tree.map(lambda a: a.reshape(*axes, *a.shape[1:]), tuple(drawn))


def check_continuous(model: Any) -> None:
    """Raises ``ValueError`` unless this is a density of continuous data."""
    if not isinstance(model, Density):
        raise ValueError(f"a distribution can be made of a Density, got a {type(model).__name__}")
    if model.spec.num_levels is not None or model.spec.grid is not None:
        kind = "integer levels" if model.spec.num_levels is not None else "values on a grid"
        raise ValueError(f"this is a model of {kind}, which have probabilities and no density: give model.continuous")
