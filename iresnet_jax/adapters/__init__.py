"""Densities as distributions of other libraries of JAX; each function imports its library when it is called.

| function | gives | needs |
|---|---|---|
| `to_numpyro` | a `Distribution` for models and guides | `pip install 'iresnet_jax[numpyro]'` |
| `to_blackjax` | a log-density for NUTS and other samplers | `pip install 'iresnet_jax[blackjax]'` |
| `to_flowjax` | an `AbstractDistribution`, whose condition is the context | `pip install 'iresnet_jax[flowjax]'` |
| `to_distrax` | a `Distribution` | `pip install 'iresnet_jax[distrax]'` |

All take densities of continuous data; ``model.continuous`` is the one of a model of integer levels or of values on a grid.
Outside of the ranges of a bounded density their log-density is minus infinity.
"""

import importlib
from typing import TYPE_CHECKING, Any

from iresnet_jax.adapters.one_density import LogDensity
from iresnet_jax.models.density import Contexts, Density

if TYPE_CHECKING:
    from iresnet_jax.adapters import distrax, flowjax, numpyro


def to_numpyro(model: Density, *, context: Contexts | None = None) -> "numpyro.DensityDistribution":
    """The density as a NumPyro distribution: a prior inside of a model, or the guide of a variational inference.

    Args:
        model: The density. In a guide that is trained, make it from parameters in every call of the guide.
        context: Context of a conditional density ``(..., k)``, whose leading axes are the batch shape.

    Raises:
        ImportError: If NumPyro cannot be imported.
        ValueError: If the data of the density are not continuous.

    Example:
        >>> def model():  # doctest: +SKIP
        ...     theta = numpyro.sample("theta", ir.adapters.to_numpyro(density))
        ...     numpyro.sample("x", dist.Normal(theta[0], 0.1), obs=0.3)
    """
    return _module("numpyro").DensityDistribution(model, context)


def to_blackjax(model: Density, *, context: Contexts | None = None) -> LogDensity:
    """The log-density of one example, which BlackJAX and other samplers take; JAX differentiates it.

    Args:
        model: The density.
        context: Context of a conditional density ``(k,)``.

    Raises:
        ValueError: If the data of the density are not continuous.

    Example:
        >>> nuts = blackjax.nuts(ir.adapters.to_blackjax(density), 0.1, jnp.ones(2))  # doctest: +SKIP
        >>> state = nuts.init(jnp.zeros(2))  # doctest: +SKIP
    """
    return LogDensity.of(model, context)


def to_flowjax(model: Density) -> "flowjax.DensityDistribution":
    """The density as a distribution of flowjax; the condition of a conditional one is its context.

    flowjax knows no constraint of weights, so its training leaves those of the model as they are.

    Raises:
        ImportError: If flowjax cannot be imported.
        ValueError: If the data of the density are not continuous.

    Example:
        >>> ir.adapters.to_flowjax(density).sample(jax.random.key(0), (100,))  # doctest: +SKIP
    """
    return _module("flowjax").DensityDistribution(model)


def to_distrax(model: Density, *, context: Contexts | None = None) -> "distrax.DensityDistribution":
    """The density as a distribution of distrax.

    Args:
        model: The density.
        context: Context of a conditional density ``(..., k)``, whose leading axes are the batch shape.

    Raises:
        ImportError: If distrax cannot be imported.
        ValueError: If the data of the density are not continuous.

    Example:
        >>> ir.adapters.to_distrax(density).sample_and_log_prob(seed=jax.random.key(0), sample_shape=100)  # doctest: +SKIP
    """
    return _module("distrax").DensityDistribution(model, context)


def _module(library: str) -> Any:
    try:
        return importlib.import_module(f"iresnet_jax.adapters.{library}")
    except ImportError as error:
        raise ImportError(f"{library} cannot be imported ({error}): pip install 'iresnet_jax[{library}]'") from error
