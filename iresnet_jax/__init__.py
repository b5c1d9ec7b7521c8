"""Invertible residual networks in JAX (Behrmann et al., ICML 2019).

Importing this needs JAX and jaxtyping alone. Networks with names and collections are in `iresnet_jax.models.linen`, trained
models in `iresnet_jax.evaluation.trained`.
"""

from iresnet_jax.bijections.bijection import Bijection
from iresnet_jax.bijections.compose import chain, multiscale, repeat
from iresnet_jax.bijections.residual import Solver
from iresnet_jax.maths.convolution import conv
from iresnet_jax.maths.inverse.fixed_point import FixedPointInfo, invert_residual
from iresnet_jax.maths.logdet.estimator import LogdetInfo
from iresnet_jax.maths.logdet.exact import ExactLogdet, exact_logdet
from iresnet_jax.maths.logdet.hutchinson_series import SeriesLogdet
from iresnet_jax.maths.logdet.krylov import KrylovLogdet
from iresnet_jax.maths.logdet.roulette import RouletteLogdet
from iresnet_jax.maths.norms import layer_certificates as certify
from iresnet_jax.maths.norms.power_iteration import soft_normalize, spectral_norm
from iresnet_jax.models.flow import FlowSpec, StageSpec, bijection, constrain, freeze

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
    "bijection",
    "certify",
    "chain",
    "constrain",
    "conv",
    "exact_logdet",
    "freeze",
    "invert_residual",
    "multiscale",
    "repeat",
    "soft_normalize",
    "spectral_norm",
]
