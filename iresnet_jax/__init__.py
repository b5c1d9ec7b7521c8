"""Invertible residual networks in JAX (Behrmann et al., ICML 2019).

Importing this needs JAX and jaxtyping alone. Networks with names and collections are in `iresnet_jax.modules` (Flax Linen),
trained models in `iresnet_jax.analysis.trained`.
"""

from iresnet_jax import (
    activations,
    actnorm,
    bijections,
    branches,
    certify,
    classifier,
    constraint,
    density,
    flow,
    histogram,
    likelihood,
    model,
    reshape,
    residual,
    spectral,
)
from iresnet_jax.bijections import Bijection, Solver
from iresnet_jax.convolution import conv
from iresnet_jax.fixed_point import FixedPointInfo, invert_residual
from iresnet_jax.flow import chain, multiscale, repeat
from iresnet_jax.krylov import KrylovLogdet
from iresnet_jax.logdet import ExactLogdet, LogdetInfo, SeriesLogdet, exact_logdet
from iresnet_jax.model import FlowSpec, StageSpec, bijection, constrain, freeze
from iresnet_jax.roulette import RouletteLogdet
from iresnet_jax.spectral import soft_normalize, spectral_norm

__all__ = [
    "Bijection",
    "ExactLogdet",
    "FixedPointInfo",
    "FlowSpec",
    "KrylovLogdet",
    "LogdetInfo",
    "RouletteLogdet",
    "SeriesLogdet",
    "Solver",
    "StageSpec",
    "activations",
    "actnorm",
    "bijection",
    "bijections",
    "branches",
    "certify",
    "chain",
    "classifier",
    "constrain",
    "constraint",
    "conv",
    "density",
    "exact_logdet",
    "flow",
    "freeze",
    "histogram",
    "invert_residual",
    "likelihood",
    "model",
    "multiscale",
    "repeat",
    "reshape",
    "residual",
    "soft_normalize",
    "spectral",
    "spectral_norm",
]
