"""A linear Gaussian simulator, and conditional densities that are its posterior, or a wrong one."""

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
from iresnet_jax.models.priors import Gaussian

DIMS, DEVIATION = 10, math.sqrt(0.1)  # task T.1 of the SBI benchmark (Lueckmann et al. 2021)
LINEAR_FLOW = FlowSpec((DIMS,), (StageSpec(1, hidden=(2,)),), context_dim=DIMS)


def linear_gaussian_pairs(num):
    """Parameters ``theta ~ N(0, .1 I)`` and observations ``x ~ N(theta, .1 I)``."""
    prior, noise = DEVIATION * np.random.default_rng(0).normal(size=(2, num, DIMS)).astype(np.float32)
    return prior, prior + noise


@functools.cache
def zero_weights():
    """Frozen weights of that flow, all zero."""
    shapes = jax.eval_shape(lambda params: freeze(LINEAR_FLOW, params), kept.random_params(LINEAR_FLOW))
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)


def linear_gaussian_model(shift=0.0, scale=1.0):
    """The posterior ``N(x / 2, .05 I)`` as a flow of one block ``z = theta - x / 2`` and a prior of its own."""
    weights = jax.tree.map(jnp.asarray, zero_weights())
    weights["stage0"].branch.weights["dense1"]["context"] = -0.5 * jnp.eye(DIMS)[None]
    prior = Gaussian(jnp.full((DIMS,), shift), jnp.full((DIMS,), math.log(scale * math.sqrt(0.05))))
    return Density(DensitySpec(LINEAR_FLOW), weights, prior)
