"""A conditional density that is the posterior of the simulator ``linear_gaussian``, or a wrong one."""

import functools
import math

import jax
import jax.numpy as jnp
import kept
import numpy as np

from iresnet_jax.models.architecture import FlowSpec, StageSpec
from iresnet_jax.models.contractions import freeze
from iresnet_jax.models.density import Density
from iresnet_jax.models.density_spec import DensitySpec

LINEAR_FLOW = FlowSpec((10,), (StageSpec(1, hidden=(2,)),), context_dim=10)


@functools.cache
def zero_weights():
    """Frozen weights of that flow, all zero."""
    shapes = jax.eval_shape(lambda params: freeze(LINEAR_FLOW, params), kept.random_params(LINEAR_FLOW))
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)


def linear_gaussian_model(shift=0.0, scale=1.0):
    """The posterior ``N(x / 2, .05 I)`` as a flow of one block ``z = theta - x / 2`` and a prior of its own."""
    weights = jax.tree.map(jnp.asarray, zero_weights())
    weights["stage0"].branch.weights["dense1"]["context"] = -0.5 * jnp.eye(10)[None]
    prior = {"mean": jnp.full((10,), shift), "log_std": jnp.full((10,), math.log(scale * math.sqrt(0.05)))}
    return Density(DensitySpec(LINEAR_FLOW), weights, prior)
