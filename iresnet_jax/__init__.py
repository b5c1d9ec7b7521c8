"""Invertible residual networks in JAX (Behrmann et al., ICML 2019).

Models are `Density` and `Classifier`; `load` reads them. Everything they are made of works by itself on arrays and callables.
Importing this needs JAX and jaxtyping alone; names and collections of Flax are in `iresnet_jax.models.linen`.
"""

import os

from iresnet_jax.bijections.bijection import Bijection
from iresnet_jax.bijections.chain import chain, repeat
from iresnet_jax.bijections.multiscale import multiscale
from iresnet_jax.bijections.residual import Branch, Solver, residual_bijection
from iresnet_jax.bijections.transforms.equalize import Equalize
from iresnet_jax.bijections.transforms.logit import Center, Identity, Logit
from iresnet_jax.maths.convolution import conv
from iresnet_jax.maths.inverse.fixed_point import FixedPointInfo, invert_residual
from iresnet_jax.maths.logdet.estimator import LogdetInfo
from iresnet_jax.maths.logdet.exact import ExactLogdet, exact_logdet
from iresnet_jax.maths.logdet.hutchinson_series import SeriesLogdet
from iresnet_jax.maths.logdet.krylov import KrylovLogdet
from iresnet_jax.maths.logdet.roulette import RouletteLogdet
from iresnet_jax.maths.norms import convolution_certificate as certify
from iresnet_jax.maths.norms.power_iteration import soft_normalize, spectral_norm
from iresnet_jax.models.architecture import FlowSpec, StageSpec
from iresnet_jax.models.classifier import Classifier, ClassifierSpec
from iresnet_jax.models.density import Density, DensitySpec
from iresnet_jax.models.flow import bijection, constrain, freeze

__all__ = [
    "Bijection",
    "Branch",
    "Center",
    "Classifier",
    "ClassifierSpec",
    "Density",
    "DensitySpec",
    "Equalize",
    "ExactLogdet",
    "FixedPointInfo",
    "FlowSpec",
    "Identity",
    "KrylovLogdet",
    "LogdetInfo",
    "Logit",
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
    "load",
    "multiscale",
    "repeat",
    "residual_bijection",
    "soft_normalize",
    "spectral_norm",
]


def load(path: str | os.PathLike[str]) -> Density | Classifier:
    """Reads a trained model: a file that ``model.save`` wrote, a folder that holds ``model.npz``, or the folder of a run.

    Every block's bound is computed anew from the weights that are found. Reading the folder of a run, whose best checkpoint on
    validation counts, takes what training takes (``pip install 'iresnet_jax[train]'``).

    Args:
        path: The file or folder.

    Raises:
        ValueError: If there is no model, or it is damaged or from another version.

    Example:
        >>> model = load("runs/digits_density")  # doctest: +SKIP
        >>> samples, info = model.sample(jax.random.key(0), 64)  # doctest: +SKIP
    """
    from iresnet_jax.models import saved  # late: reading files is not part of the mathematics

    if os.path.isdir(path) and os.path.exists(os.path.join(path, "config.json")):
        from iresnet_jax.evaluation import trained_run

        return trained_run.load(path).model
    return saved.load(path)
